//! Numbers of the command line, and their bounds. A number that can only be a typing mistake is refused before anything
//! of that size is allocated.

/// The most threads, and the most things done at a time. No machine has more cores, and every thread needs a stack.
pub const MAX_THREADS: usize = 1024;

/// The most tokens of a sequence or a step, and the most steps: an engine's own limits cannot be larger.
pub const MAX_TOKENS: usize = 1 << 30;

/// The most sequences at a time: an engine's own limit cannot be larger.
pub const MAX_SEQUENCES: usize = 1 << 20;

/// The most sequences drawn for a prompt. Each of them is kept until the end of a run.
pub const MAX_RETURN_SEQUENCES: usize = 4096;

/// The most requests of a measurement. All of them are drawn before it starts.
pub const MAX_REQUESTS: usize = 1 << 20;

/// The most ranks along one dimension of a job.
pub const MAX_RANKS: usize = 1 << 16;

/// The most open connections: no system gives a process more files.
pub const MAX_CONNECTIONS: usize = 1 << 20;

/// The most bytes of a request: a longer text has more tokens than any sequence.
pub const MAX_BODY_BYTES: usize = 1 << 30;

/// The longest time in seconds that anything may be asked to take: a week.
pub const MAX_SECONDS: usize = 7 * 24 * 60 * 60;

/// Requests a second. At a lower rate one would wait more than a quarter of an hour for each request; at a higher rate
/// all arrive at once.
pub const ARRIVAL_RATES: std::ops::RangeInclusive<f64> = 1e-3..=1e9;

/// The reason given when a number of tokens or sequences is above its bound.
const NO_ENGINE: &str = "no engine takes more";

fn whole(text: &str, low: usize, high: usize, why: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(n) if (low..=high).contains(&n) => Ok(n),
        _ => Err(format!("expected a whole number from {low} to {high} ({why})")),
    }
}

/// A number of threads.
pub fn threads(text: &str) -> Result<usize, String> {
    whole(text, 1, MAX_THREADS, "no machine runs more at a time")
}

/// A number of tokens, or of steps that add one each.
pub fn tokens(text: &str) -> Result<usize, String> {
    whole(text, 1, MAX_TOKENS, NO_ENGINE)
}

/// A number of tokens, or 0.
pub fn tokens_or_none(text: &str) -> Result<usize, String> {
    whole(text, 0, MAX_TOKENS, NO_ENGINE)
}

/// A number of sequences at a time.
pub fn sequences(text: &str) -> Result<usize, String> {
    whole(text, 1, MAX_SEQUENCES, NO_ENGINE)
}

/// A number of sequences for each prompt.
pub fn return_sequences(text: &str) -> Result<usize, String> {
    whole(text, 1, MAX_RETURN_SEQUENCES, "all are kept until the end")
}

/// A number of requests, or 0.
pub fn requests(text: &str) -> Result<usize, String> {
    whole(text, 0, MAX_REQUESTS, "all are drawn before the first is sent")
}

/// A number of sequences that wait, or 0.
pub fn waiting(text: &str) -> Result<usize, String> {
    whole(text, 0, MAX_REQUESTS, "all are kept in memory")
}

/// A number of connections.
pub fn connections(text: &str) -> Result<usize, String> {
    whole(text, 1, MAX_CONNECTIONS, "no system gives a process more files")
}

/// A number of bytes of a request.
pub fn body_bytes(text: &str) -> Result<usize, String> {
    whole(text, 1, MAX_BODY_BYTES, "no prompt is longer")
}

/// A time in whole milliseconds.
pub fn milliseconds(text: &str) -> Result<usize, String> {
    whole(text, 1, 1000 * MAX_SECONDS, "a week")
}

/// A time in whole seconds.
pub fn seconds(text: &str) -> Result<usize, String> {
    whole(text, 1, MAX_SECONDS, "a week")
}

/// A number of ranks.
pub fn ranks(text: &str) -> Result<usize, String> {
    whole(text, 1, MAX_RANKS, "no job has more")
}

/// A number of tokens, or a range `A-B` of them.
pub fn span(text: &str) -> Result<(usize, usize), String> {
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    match (tokens(low), tokens(high)) {
        (Ok(low), Ok(high)) if low <= high => Ok((low, high)),
        _ => Err(format!("expected a length N, or a range A-B with A at most B, from 1 to {MAX_TOKENS}")),
    }
}

/// A rate in requests a second; 0 sends all requests at once.
pub fn arrival_rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate == 0.0 || ARRIVAL_RATES.contains(&rate) => Ok(rate),
        _ => Err(format!(
            "expected requests a second, from {} to {:e}, or 0 for all at once",
            ARRIVAL_RATES.start(),
            ARRIVAL_RATES.end()
        )),
    }
}

/// A real number that is at least 0.
pub fn non_negative(text: &str) -> Result<f32, String> {
    real(text, |x| x >= 0.0, "at least 0")
}

/// A real number above 0.
pub fn positive(text: &str) -> Result<f32, String> {
    real(text, |x| x > 0.0, "above 0")
}

/// A probability.
pub fn probability(text: &str) -> Result<f32, String> {
    real(text, |x| (0.0..=1.0).contains(&x), "from 0 to 1")
}

/// Any finite real number.
pub fn finite(text: &str) -> Result<f32, String> {
    real(text, |_| true, "finite")
}

fn real(text: &str, fits: impl Fn(f32) -> bool, range: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(x) if x.is_finite() && fits(x) => Ok(x),
        _ => Err(format!("expected a number {range}")),
    }
}
