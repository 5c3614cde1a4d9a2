//! `mixtral bench --url`: the same figures of a server, this one or another's.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use mixtral_serve::client::{Answered, Ask, Target};
use serde::Serialize;

use super::bench::{Numbers, arrivals};
use crate::args::bench::BenchArgs;
use crate::run::report::{f, ratio};
use crate::run::throughput::{Throughput, ms};
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
    /// Above 1 if chunks bring several tokens. What is called the time between tokens is then that between chunks.
    tokens_per_chunk: f64,
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
    let (mut prompt_tokens, mut answered, mut failed) = (0, Vec::new(), Vec::new());
    for (prompt, answer) in prompts.into_iter().zip(answers) {
        match answer {
            Ok(answer) => {
                prompt_tokens += prompt;
                answered.push(answer);
            }
            Err(error) => failed.push(error),
        }
    }
    if let Some(error) = failed.first() {
        say::warning(format_args!("{} of {} requests were not answered: {error}", failed.len(), args.requests));
        if answered.is_empty() {
            bail!("no request was answered: {error}");
        }
    }
    let chunks: usize = answered.iter().map(|answer| answer.came.len()).sum();
    let tokens: usize = answered.iter().map(|answer| answer.tokens).sum();
    let bench = ServerBench {
        url: url.to_owned(),
        model,
        concurrency,
        throughput: Throughput::new(args.sequential, seconds, prompt_tokens, &answered),
        tokens_per_chunk: ratio(f(tokens), f(chunks)),
        goodput_per_s: goodput(args, &answered).map(|good| ratio(f(good), seconds)),
        failed: failed.len(),
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&bench)?)?;
        return Ok(());
    }
    print(&mut out, &bench)
}

/// How many requests were answered within the limits, if there are any.
fn goodput(args: &BenchArgs, answered: &[Answered]) -> Option<usize> {
    let limit = |limit: Option<usize>| limit.map_or(f64::INFINITY, f);
    let (first, each) = (limit(args.first_token_limit), limit(args.per_token_limit));
    let within = |answer: &&Answered| {
        ms(answer.first_token()) <= first && answer.per_token().is_none_or(|time| ms(time) <= each)
    };
    (first.is_finite() || each.is_finite()).then(|| answered.iter().filter(within).count())
}

fn print(out: &mut dyn Write, bench: &ServerBench) -> Result<()> {
    let at_once = bench.concurrency.map_or_else(String::new, |n| format!(", at most {n} at a time"));
    write!(out, "{} at {}{at_once}", bench.model, bench.url)?;
    bench.throughput.print(out)?;
    if bench.tokens_per_chunk > 1.0 {
        writeln!(out, "a chunk has  {:.3} tokens; times between two are those between chunks", bench.tokens_per_chunk)?;
    }
    if let Some(goodput) = bench.goodput_per_s {
        writeln!(out, "within limits {goodput:.2} requests/s")?;
    }
    if bench.failed > 0 {
        writeln!(out, "not answered {}", bench.failed)?;
    }
    Ok(())
}
