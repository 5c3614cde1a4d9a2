//! `mixtral bench --url`: the same figures of a server, this one or another's.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use mixtral_serve::client::{Answered, Ask, ClientError, Target};
use serde::Serialize;

use super::bench::{Numbers, arrivals};
use crate::args::bench::BenchArgs;
use crate::run::report::{f, median, quantile, ratio};
use crate::run::throughput::{Finished, Throughput, ms};
use crate::say;

/// The ids that prompts are drawn from. They are text in every vocabulary.
const IDS: (usize, usize) = (300, 999);

/// Everything measured.
#[derive(Debug, Serialize)]
struct ServerBench {
    url: String,
    model: String,
    /// The most requests at a time; `None` if there was no limit.
    concurrency: Option<usize>,
    throughput: Throughput,
    /// Times between two pieces of text of an answer.
    between_chunks_ms_median: f64,
    between_chunks_ms_p99: f64,
    /// Requests a second that were answered within the limits.
    goodput_per_s: Option<f64>,
    /// Requests that were not answered.
    failed: usize,
}

/// Runs the command.
pub fn main(args: &BenchArgs, url: &str) -> Result<()> {
    let target = Target::new(url, args.api_key.clone())?;
    let model = args.model.clone().map_or_else(|| target.model(), Ok)?;
    let mut numbers = Numbers::new(args.random_seed);
    let mut asks: Vec<Ask> = (0..args.requests)
        .map(|_| {
            let (input, max_tokens) = (numbers.within(args.input_len), numbers.within(args.output_len));
            let id = |_| u32::try_from(numbers.within(IDS)).unwrap_or(0);
            Ask { at: Duration::ZERO, prompt: (0..input).map(id).collect(), max_tokens }
        })
        .collect();
    for (ask, at) in asks.iter_mut().zip(arrivals(&mut numbers, args.arrival_rate, args.requests)) {
        ask.at = Duration::from_secs_f64(at);
    }
    let concurrency = if args.sequential { Some(1) } else { args.concurrency };
    let prompts: Vec<usize> = asks.iter().map(|ask| ask.prompt.len()).collect();
    let start = Instant::now();
    let answers = target.measure(&model, asks, concurrency.unwrap_or(usize::MAX))?;
    let seconds = start.elapsed().as_secs_f64();
    let failed: Vec<&ClientError> = answers.iter().filter_map(|answer| answer.as_ref().err()).collect();
    if let Some(error) = failed.first() {
        say::warning(format_args!("{} of {} requests were not answered: {error}", failed.len(), answers.len()));
        if failed.len() == answers.len() {
            bail!("no request was answered: {error}");
        }
    }
    let answered =
        || prompts.iter().zip(&answers).filter_map(|(prompt, answer)| Some((*prompt, answer.as_ref().ok()?)));
    let finished: Vec<Finished> = answered().map(|(_, answer)| finished(answer)).collect();
    let gaps: Vec<f64> = answered().flat_map(|(_, answer)| answer.gaps.iter().copied().map(ms)).collect();
    let bench = ServerBench {
        url: url.to_owned(),
        model,
        concurrency,
        throughput: Throughput::new(args.sequential, seconds, answered().map(|(prompt, _)| prompt).sum(), &finished),
        between_chunks_ms_median: median(gaps.clone()),
        between_chunks_ms_p99: quantile(gaps, 0.99),
        goodput_per_s: goodput(args, &finished).map(|good| ratio(f(good), seconds)),
        failed: failed.len(),
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&bench)?)?;
        return Ok(());
    }
    print(&mut out, &bench)
}

fn finished(answer: &Answered) -> Finished {
    Finished { first_token: answer.first_token, total: answer.total, tokens: answer.tokens }
}

/// How many requests were answered within the limits, if there are any.
fn goodput(args: &BenchArgs, finished: &[Finished]) -> Option<usize> {
    let limit = |limit: Option<usize>| limit.map_or(f64::INFINITY, f);
    let (first, each) = (limit(args.first_token_limit), limit(args.per_token_limit));
    let within = |request: &&Finished| {
        ms(request.first_token) <= first && request.per_token().is_none_or(|time| ms(time) <= each)
    };
    (first.is_finite() || each.is_finite()).then(|| finished.iter().filter(within).count())
}

fn print(out: &mut dyn Write, bench: &ServerBench) -> Result<()> {
    let at_once = bench.concurrency.map_or_else(String::new, |n| format!(", at most {n} at a time"));
    write!(out, "{} at {}{at_once}", bench.model, bench.url)?;
    bench.throughput.print(out)?;
    let [median, p99] = [bench.between_chunks_ms_median, bench.between_chunks_ms_p99];
    writeln!(out, "between two  {median:.3} ms median, {p99:.3} ms p99")?;
    if let Some(goodput) = bench.goodput_per_s {
        writeln!(out, "within limits {goodput:.2} requests/s")?;
    }
    if bench.failed > 0 {
        writeln!(out, "not answered {}", bench.failed)?;
    }
    Ok(())
}
