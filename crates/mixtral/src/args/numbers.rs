//! Numbers of the command line, and their bounds: a number that can only be a slip of the finger is said to be one, before
//! anything is made of that size.

/// Threads, and things done at a time: more than any machine has cores, and each takes a stack.
pub const MAX_THREADS: usize = 1024;

/// Tokens of a sequence or a step, and steps: what an engine's own limits end at.
pub const MAX_TOKENS: usize = 1 << 30;

/// Sequences at a time: what an engine's own limits end at.
pub const MAX_SEQUENCES: usize = 1 << 20;

/// Sequences drawn for a prompt, each of which is kept until the end of a run.
pub const MAX_RETURN_SEQUENCES: usize = 4096;

/// Requests of a measurement, which are all drawn before it starts.
pub const MAX_REQUESTS: usize = 1 << 20;

/// Ranks along one dimension of a job.
pub const MAX_RANKS: usize = 1 << 16;

/// Requests a second: fewer would be waited for longer than a quarter of an hour each, more are all at once.
pub const ARRIVAL_RATES: std::ops::RangeInclusive<f64> = 1e-3..=1e9;

/// Why there is a bound of tokens and sequences.
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

/// The same, or none.
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

/// A number of requests, or none.
pub fn requests(text: &str) -> Result<usize, String> {
    whole(text, 0, MAX_REQUESTS, "all are drawn before the first is sent")
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

/// Requests a second; 0 is all at once.
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
