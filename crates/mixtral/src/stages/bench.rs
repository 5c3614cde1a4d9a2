//! `mixtral bench`: decode steps by batch size, prefill by length, and the throughput of many requests.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mixtral_build::Roof;
use mixtral_build::cost::{StepShape, cost};
use mixtral_cpu::probe;
use mixtral_engine::text::op_text;
use mixtral_engine::{EngineDir, Program, RandomKey, SamplingParams};
use mixtral_model::TokenId;
use mixtral_runtime::session::StepStats;
use mixtral_runtime::{Request, Session};
use serde::Serialize;

use crate::args::bench::BenchArgs;
use crate::run::job::{self, Job, LoadOptions};
use crate::run::machine;
use crate::run::report::{decode_weight_bytes, f, median, quantile, ratio};

/// Decode steps of one batch size.
#[derive(Debug, Serialize)]
struct Decode {
    batch_size: usize,
    steps: usize,
    median_ms: f64,
    p99_ms: f64,
    min_ms: f64,
    tokens_per_s: f64,
    /// Weights read, experts counted as hit evenly.
    weight_gb_per_s: f64,
    bandwidth_percent: f64,
}

/// Prompts of one length, one at a time.
#[derive(Debug, Serialize)]
struct Prefill {
    tokens: usize,
    median_ms: f64,
    min_ms: f64,
    tokens_per_s: f64,
    gflop_per_s: f64,
    compute_percent: f64,
}

/// Many requests.
#[derive(Debug, Serialize)]
struct Throughput {
    requests: usize,
    sequential: bool,
    seconds: f64,
    prompt_tokens: usize,
    output_tokens: usize,
    output_tokens_per_s: f64,
    tokens_per_s: f64,
    first_token_ms_median: f64,
    first_token_ms_p99: f64,
    per_token_ms_median: f64,
    per_token_ms_p99: f64,
}

/// One operation's share of the measured steps.
#[derive(Debug, Serialize)]
struct OpTime {
    op: String,
    ms: f64,
    percent: f64,
}

/// Everything measured.
#[derive(Debug, Serialize)]
struct Bench {
    engine: String,
    threads: usize,
    read_gb_per_s: f64,
    gflop_per_s: f64,
    decode: Vec<Decode>,
    prefill: Vec<Prefill>,
    throughput: Option<Throughput>,
    per_op: Vec<OpTime>,
}

/// Runs the command.
pub fn main(args: &BenchArgs) -> Result<()> {
    let engine = EngineDir::open(&args.engine_dir)?;
    let load = LoadOptions { threads: args.threads, count_experts: false, time_ops: args.per_op };
    job::run(&engine, load, |job| {
        let bench = measure(args, &engine, job)?;
        let mut out = std::io::stdout().lock();
        if args.json {
            writeln!(out, "{}", serde_json::to_string_pretty(&bench)?)?;
        } else {
            print(&mut out, &bench)?;
        }
        Ok(())
    })
}

/// Reproducible numbers for prompts, lengths and arrivals.
struct Numbers {
    seed: u64,
    drawn: u32,
}

impl Numbers {
    fn bits(&mut self) -> u64 {
        self.drawn += 1;
        RandomKey { seed: self.seed, prompt: 0, hypothesis: 0, position: self.drawn }.bits()
    }

    fn within(&mut self, (low, high): (usize, usize)) -> usize {
        let span = (high - low) as u64 + 1;
        low + usize::try_from(self.bits() % span).unwrap_or(0)
    }

    /// Uniform in (0, 1].
    #[expect(clippy::cast_precision_loss, reason = "53 bits are exact")]
    fn unit(&mut self) -> f64 {
        ((self.bits() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    fn request(&mut self, vocab_size: usize, input: usize, output: usize) -> Request {
        let token = |bits: u64| TokenId(u32::try_from(bits % vocab_size as u64).unwrap_or(0));
        Request {
            prompt: (0..input).map(|_| token(self.bits())).collect(),
            max_output_len: output,
            params: SamplingParams::default(),
            ..Request::default()
        }
    }
}

fn measure(args: &BenchArgs, engine: &EngineDir, job: &Job<'_>) -> Result<Bench> {
    let geometry = job.geometry();
    let (limits, vocab_size) = (geometry.limits, geometry.vocab_size);
    let mut numbers = Numbers { seed: args.random_seed, drawn: 0 };
    let output = args.warmup + args.steps + 1;
    let batches: Vec<Vec<Request>> = args
        .batch_size
        .iter()
        .map(|&n| (0..n).map(|_| numbers.request(vocab_size, args.context, output)).collect())
        .collect();
    let lengths = if args.prefill.is_empty() {
        [128, 512].into_iter().filter(|&n| n < limits.max_seq_len).collect()
    } else {
        args.prefill.clone()
    };
    let prompts: Vec<Request> = lengths.iter().map(|&n| numbers.request(vocab_size, n, 1)).collect();
    let many: Vec<Request> = (0..args.requests)
        .map(|_| {
            let (input, output) = (numbers.within(args.input_len), numbers.within(args.output_len));
            numbers.request(vocab_size, input, output)
        })
        .collect();
    if let Some(&n) = args.batch_size.iter().find(|&&n| n > limits.max_batch_size) {
        bail!(
            "--batch-size {n}: the engine takes {} sequences; build it with --max-batch-size {n}",
            limits.max_batch_size
        );
    }
    let all: Vec<Request> = batches.iter().flatten().chain(&prompts).chain(&many).cloned().collect();
    let mut session = job.session(&all, None)?;
    let threads = args.threads.unwrap_or_else(machine::cores);
    // The machine's own rates, before and after what is measured against them.
    let probe_bytes = if args.quick { probe::QUICK } else { probe::THOROUGH };
    let before = probe::measure(threads, probe_bytes);
    let program = job.program();

    let mut decode_steps = Vec::new();
    for batch in &batches {
        let steps = run_batch(&mut session, batch)?;
        let steps: Vec<f64> = steps
            .iter()
            .filter(|s| s.prefill_tokens == 0 && s.decode_tokens == batch.len())
            .skip(args.warmup)
            .map(|s| s.time.as_secs_f64())
            .collect();
        decode_steps.push((batch.len(), steps));
    }

    let mut prefill_times = Vec::new();
    for prompt in &prompts {
        let mut times = Vec::new();
        for round in 0..args.warmup.min(1) + 3 {
            let steps = run_batch(&mut session, std::slice::from_ref(prompt))?;
            if round >= args.warmup.min(1) {
                times.push(steps.iter().map(|s| s.time).sum::<Duration>().as_secs_f64());
            }
        }
        prefill_times.push((prompt.prompt.len(), times));
    }

    let throughput = (!many.is_empty()).then(|| throughput(&mut session, args, &many, &mut numbers)).transpose()?;
    let roof = machine::roof(before.max(probe::measure(threads, probe_bytes)));
    let decode = decode_steps.into_iter().map(|(n, steps)| Decode::new(program, roof, n, steps)).collect();
    let prefill = prefill_times.into_iter().map(|(n, times)| Prefill::new(program, roof, n, times)).collect();
    let times: Vec<f64> = session.op_times().iter().map(Duration::as_secs_f64).collect();
    let total: f64 = times.iter().sum();
    let per_op = program
        .ops
        .iter()
        .zip(&times)
        .map(|(op, time)| OpTime { op: op_text(op), ms: 1e3 * time, percent: 100.0 * ratio(*time, total) })
        .collect();
    Ok(Bench {
        engine: engine.config().run_id.clone(),
        threads,
        read_gb_per_s: roof.bytes_per_s / 1e9,
        gflop_per_s: roof.flops_per_s / 1e9,
        decode,
        prefill,
        throughput,
        per_op,
    })
}

impl Decode {
    fn new(program: &Program, roof: Roof, batch_size: usize, steps: Vec<f64>) -> Self {
        let typical = median(steps.clone());
        let bandwidth = ratio(decode_weight_bytes(program, batch_size), typical);
        Decode {
            batch_size,
            steps: steps.len(),
            median_ms: 1e3 * typical,
            p99_ms: 1e3 * quantile(steps.clone(), 0.99),
            min_ms: 1e3 * quantile(steps, 0.0),
            tokens_per_s: ratio(f(batch_size), typical),
            weight_gb_per_s: bandwidth / 1e9,
            bandwidth_percent: 100.0 * ratio(bandwidth, roof.bytes_per_s),
        }
    }
}

impl Prefill {
    fn new(program: &Program, roof: Roof, tokens: usize, times: Vec<f64>) -> Self {
        let shape = StepShape { num_tokens: tokens, num_logits: 1, context: tokens / 2 + 1 };
        let flops: f64 = program.ops.iter().map(|op| cost(program, op, shape).flops).sum();
        let typical = median(times.clone());
        Prefill {
            tokens,
            median_ms: 1e3 * typical,
            min_ms: 1e3 * quantile(times, 0.0),
            tokens_per_s: ratio(f(tokens), typical),
            gflop_per_s: ratio(flops, typical) / 1e9,
            compute_percent: 100.0 * ratio(ratio(flops, typical), roof.flops_per_s),
        }
    }
}

/// Answers requests together; the steps it took.
fn run_batch(session: &mut Session, requests: &[Request]) -> Result<Vec<StepStats>> {
    for request in requests {
        session.submit(request.clone()).context("the engine does not take what is to be measured")?;
    }
    let mut steps = Vec::new();
    while !session.is_idle() {
        session.step()?;
        steps.push(session.last_step());
    }
    Ok(steps)
}

fn throughput(
    session: &mut Session,
    args: &BenchArgs,
    requests: &[Request],
    numbers: &mut Numbers,
) -> Result<Throughput> {
    // The gaps of a Poisson process are exponential.
    let mut at = 0.0;
    let mut arrivals: Vec<f64> = Vec::with_capacity(requests.len());
    for _ in requests {
        if args.arrival_rate > 0.0 {
            at -= numbers.unit().ln() / args.arrival_rate;
        }
        arrivals.push(at);
    }
    let start = Instant::now();
    let (mut next, mut first_id, mut finished) = (0, None, Vec::new());
    while finished.len() < requests.len() {
        let now = start.elapsed().as_secs_f64();
        while next < requests.len() && arrivals[next] <= now && (!args.sequential || session.is_idle()) {
            let id =
                session.submit(requests[next].clone()).context("the engine does not take what is to be measured")?;
            first_id.get_or_insert(id.0);
            next += 1;
        }
        if session.is_idle() {
            let wait = (arrivals[next] - start.elapsed().as_secs_f64()).max(0.0);
            std::thread::sleep(Duration::from_secs_f64(wait));
            continue;
        }
        let ended = session.step()?.into_iter().filter_map(|event| Some((event.id.0, event.finished?.1)));
        finished.extend(ended);
    }
    let seconds = start.elapsed().as_secs_f64();
    let output_tokens: usize = requests.iter().map(|r| r.max_output_len).sum();
    let prompt_tokens: usize = requests.iter().map(|r| r.prompt.len()).sum();
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    let first: Vec<f64> = finished.iter().map(|(_, t)| ms(t.first_token)).collect();
    let first_id = first_id.unwrap_or(0);
    // Between the first token and the last; outputs of one token have no time between tokens.
    let between: Vec<f64> = finished
        .iter()
        .map(|(id, timing)| (requests[id - first_id].max_output_len, timing))
        .filter(|(tokens, _)| *tokens > 1)
        .map(|(tokens, timing)| ms(timing.total - timing.first_token) / f(tokens - 1))
        .collect();
    Ok(Throughput {
        requests: requests.len(),
        sequential: args.sequential,
        seconds,
        prompt_tokens,
        output_tokens,
        output_tokens_per_s: ratio(f(output_tokens), seconds),
        tokens_per_s: ratio(f(output_tokens + prompt_tokens), seconds),
        first_token_ms_median: median(first.clone()),
        first_token_ms_p99: quantile(first, 0.99),
        per_token_ms_median: median(between.clone()),
        per_token_ms_p99: quantile(between, 0.99),
    })
}

fn print(out: &mut dyn Write, bench: &Bench) -> Result<()> {
    let Bench { engine, threads, read_gb_per_s, gflop_per_s, decode, prefill, throughput, per_op } = bench;
    writeln!(
        out,
        "engine {engine}, {threads} threads; the machine reads {read_gb_per_s:.2} GB/s and computes {gflop_per_s:.0} GFLOP/s"
    )?;
    if !decode.is_empty() {
        writeln!(
            out,
            "\n{:>6} {:>10} {:>10} {:>10} {:>10} {:>10} {:>8}",
            "batch", "median ms", "p99 ms", "min ms", "tok/s", "GB/s", "% read"
        )?;
    }
    for d in decode {
        writeln!(
            out,
            "{:>6} {:>10.3} {:>10.3} {:>10.3} {:>10.1} {:>10.2} {:>8.0}",
            d.batch_size, d.median_ms, d.p99_ms, d.min_ms, d.tokens_per_s, d.weight_gb_per_s, d.bandwidth_percent
        )?;
    }
    if !prefill.is_empty() {
        writeln!(
            out,
            "\n{:>6} {:>10} {:>10} {:>10} {:>10} {:>8}",
            "prompt", "median ms", "min ms", "tok/s", "GFLOP/s", "% roof"
        )?;
    }
    for p in prefill {
        writeln!(
            out,
            "{:>6} {:>10.2} {:>10.2} {:>10.1} {:>10.1} {:>8.0}",
            p.tokens, p.median_ms, p.min_ms, p.tokens_per_s, p.gflop_per_s, p.compute_percent
        )?;
    }
    if let Some(t) = throughput {
        writeln!(
            out,
            "\n{} requests {} in {:.3} s: {:.1} output tok/s, {:.1} tok/s with prompts",
            t.requests,
            if t.sequential { "one after another" } else { "in flight" },
            t.seconds,
            t.output_tokens_per_s,
            t.tokens_per_s
        )?;
        writeln!(out, "first token  {:.2} ms median, {:.2} ms p99", t.first_token_ms_median, t.first_token_ms_p99)?;
        writeln!(out, "each token   {:.3} ms median, {:.3} ms p99", t.per_token_ms_median, t.per_token_ms_p99)?;
    }
    if !per_op.is_empty() {
        writeln!(out, "\n{:>10} {:>6}  operation", "ms", "%")?;
    }
    for op in per_op {
        writeln!(out, "{:>10.2} {:>6.1}  {}", op.ms, op.percent, op.op)?;
    }
    Ok(())
}
