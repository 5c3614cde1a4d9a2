//! `mixtral bench`: decode steps by batch size, prefill by length, and the throughput of many requests.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mixtral_build::Roof;
use mixtral_build::cost::{StepShape, cost};
use mixtral_engine::{EngineDir, Limits, Program, RandomKey, SamplingParams};
use mixtral_model::TokenId;
use mixtral_runtime::{Request, Session, SessionOptions};
use mixtral_serve::client::{Answered, Times};
use serde::Serialize;

use crate::args::bench::BenchArgs;
use crate::run::job::{self, Job};
use crate::run::load::LoadOptions;
use crate::run::measured::{MeasuredStep, decodes, idle_between, run_batch};
use crate::run::per_op::OpTable;
use crate::run::report::{decode_weight_bytes, f, median, quantile, ratio};
use crate::run::throughput::Throughput;

/// From this rate on, in GFLOP/s, rates are printed in TFLOP/s.
const TERA: f64 = 1e4;

/// Decode steps of one batch size.
#[derive(Debug, Serialize)]
struct Decode {
    batch_size: usize,
    steps: usize,
    median_ms: f64,
    p99_ms: f64,
    min_ms: f64,
    tokens_per_s: f64,
    /// Rate of reading weights, if tokens are spread evenly over the experts.
    weight_gb_per_s: f64,
    bandwidth_percent: f64,
    /// Time between steps in which the GPU had nothing to do, in microseconds. `None` on a CPU.
    gpu_idle_us: Option<f64>,
}

/// A batch whose decodes could not all run in one step.
#[derive(Debug, Serialize)]
struct LeftOut {
    batch_size: usize,
    why: String,
}

/// Prompts of one length, `prompts` of them at a time.
#[derive(Debug, Serialize)]
struct Prefill {
    prompts: usize,
    tokens: usize,
    /// Steps that the prompts took: more than one if they have more tokens than the engine takes in a step.
    steps: usize,
    median_ms: f64,
    min_ms: f64,
    tokens_per_s: f64,
    gflop_per_s: f64,
    /// `None` if the machine's own rate is unknown.
    compute_percent: Option<f64>,
}

/// Everything measured.
#[derive(Debug, Serialize)]
struct Bench {
    engine: String,
    /// Where it ran.
    place: String,
    /// Time to load the engine: kernels, weights, cache and graphs. The GPU's context is not part of it: it was made
    /// before, to measure the GPU's rates.
    load_s: f64,
    /// Time from the start of loading to the first token of the first batch.
    first_token_s: Option<f64>,
    read_gb_per_s: f64,
    /// `None` if it could not be measured.
    gflop_per_s: Option<f64>,
    decode: Vec<Decode>,
    /// Batches that were asked for but not measured.
    left_out: Vec<LeftOut>,
    prefill: Vec<Prefill>,
    throughput: Option<Throughput>,
    /// Part of the time of those requests in which the GPU had nothing to do, in percent. `None` on a CPU.
    requests_gpu_idle_percent: Option<f64>,
    per_op: Vec<OpTable>,
}

/// Runs the command.
pub fn main(args: &BenchArgs) -> Result<()> {
    if let Some(url) = &args.url {
        return super::bench_server::main(args, url);
    }
    let engine = EngineDir::open(&args.engine_dir)?;
    let load =
        LoadOptions { place: args.place, count_experts: false, time_ops: args.per_op, graphs: true, windows: &[] };
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

/// Random numbers for prompts, lengths and arrivals. The same seed gives the same numbers.
pub(super) struct Numbers {
    seed: u64,
    drawn: u32,
}

impl Numbers {
    pub(super) fn new(seed: u64) -> Self {
        Numbers { seed, drawn: 0 }
    }

    fn bits(&mut self) -> u64 {
        self.drawn += 1;
        RandomKey { seed: self.seed, prompt: 0, hypothesis: 0, position: self.drawn }.bits()
    }

    pub(super) fn within(&mut self, (low, high): (usize, usize)) -> usize {
        let span = (high - low) as u64 + 1;
        low + usize::try_from(self.bits() % span).unwrap_or(0)
    }

    /// Uniform in (0, 1].
    #[expect(clippy::cast_precision_loss, reason = "53 bits are exact")]
    fn unit(&mut self) -> f64 {
        ((self.bits() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// A prompt of random tokens.
    pub(super) fn request(&mut self, vocab_size: usize, input: usize, output: usize) -> Request {
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
    let capabilities = job.capabilities();
    let (limits, vocab_size) = (capabilities.limits, capabilities.vocab_size);
    let mut numbers = Numbers::new(args.random_seed);
    let output = args.warmup + args.steps + 1;
    let lengths = if args.prefill.is_empty() {
        [128, 512].into_iter().filter(|&n| n < limits.max_seq_len).collect()
    } else {
        args.prefill.clone()
    };
    check_lengths(args, output, &lengths, &limits)?;
    let (sizes, too_large): (Vec<usize>, Vec<usize>) =
        args.batch_size.iter().partition(|&&n| n <= limits.max_batch_size);
    let mut left_out: Vec<LeftOut> = too_large
        .into_iter()
        .map(|batch_size| {
            let most = limits.max_batch_size;
            let why = format!("the engine takes {most} sequences; build it with --max-batch-size {batch_size}");
            LeftOut { batch_size, why }
        })
        .collect();
    let batches: Vec<Vec<Request>> =
        sizes.iter().map(|&n| (0..n).map(|_| numbers.request(vocab_size, args.context, output)).collect()).collect();
    let prompts: Vec<Vec<Request>> =
        lengths.iter().map(|&n| (0..args.prefill_batch).map(|_| numbers.request(vocab_size, n, 1)).collect()).collect();
    let many: Vec<Request> = (0..args.requests)
        .map(|_| {
            let (input, output) = (numbers.within(args.input_len), numbers.within(args.output_len));
            numbers.request(vocab_size, input, output)
        })
        .collect();
    let all: Vec<Request> = batches.iter().chain(&prompts).flatten().chain(&many).cloned().collect();
    // The machine's own rates are measured before and after the engine.
    let roof = || job.place().roof(args.quick, job.program().weight_bytes());
    let before = roof()?;
    let start = Instant::now();
    let mut session = job.session(&all, args.step.of(SessionOptions::default()), None)?;
    let load_s = start.elapsed().as_secs_f64();
    let program = job.program();
    let cached = session.free_blocks();

    let mut first_token_s = None;
    let mut decode_steps = Vec::new();
    for batch in &batches {
        let (batch_size, each) = (batch.len(), limits.blocks_for(args.context + output));
        if batch_size * each > cached {
            let (fit, tokens) = (cached / each, cached * limits.block_size);
            let why = format!("the cache holds {fit} of its sequences at a time ({tokens} tokens, as memory allows)");
            left_out.push(LeftOut { batch_size, why });
            continue;
        }
        let steps = run_batch(&mut session, batch)?;
        // The prompts of the first batch run first. Its first token comes with the last of their steps.
        first_token_s.get_or_insert_with(|| {
            let prompts = steps.iter().take_while(|s| s.stats.prefill_tokens > 0);
            load_s + prompts.map(|s| s.stats.time.as_secs_f64()).sum::<f64>()
        });
        let stages = engine.config().mapping.pp_size;
        let decodes: Vec<MeasuredStep> = decodes(steps, batch_size, stages).into_iter().skip(args.warmup).collect();
        if decodes.is_empty() {
            let engine = if stages > 1 { "" } else { ", or a larger --max-num-tokens of the engine," };
            let why = format!(
                "its sequences never decoded together: prompts took too long to compute; more --steps{engine} let them"
            );
            left_out.push(LeftOut { batch_size, why });
            continue;
        }
        decode_steps.push((batch_size, decodes));
    }

    let mut prefill_rounds = Vec::new();
    for batch in &prompts {
        let mut rounds = Vec::new();
        for round in 0..args.warmup.min(1) + 3 {
            let steps = run_batch(&mut session, batch)?;
            if round >= args.warmup.min(1) {
                rounds.push(steps);
            }
        }
        prefill_rounds.push((batch, rounds));
    }

    let idle_before = session.device_idle();
    let throughput = (!many.is_empty()).then(|| throughput(&mut session, args, &many, &mut numbers)).transpose()?;
    let idle = idle_between(idle_before, session.device_idle());
    let requests_gpu_idle_percent =
        throughput.as_ref().zip(idle).map(|(all, idle)| 100.0 * ratio(idle.as_secs_f64(), all.seconds()));
    let roof = better(before, roof()?);
    let mut per_op = Vec::new();
    let mut decode = Vec::new();
    for (n, steps) in decode_steps {
        if args.per_op {
            let shape =
                StepShape { num_tokens: n, num_logits: n, context: args.context + args.warmup + args.steps / 2 };
            let times = summed(steps.iter());
            per_op.push(OpTable::new(program, roof, format!("decode of {n}"), shape, &times, steps.len()));
        }
        decode.push(Decode::new(program, roof, n, &steps));
    }
    let mut prefill = Vec::new();
    for (batch, rounds) in prefill_rounds {
        let (n, len) = (batch.len(), batch[0].prompt.len());
        let shape = StepShape { num_tokens: n * len, num_logits: n, context: len / 2 + 1 };
        if args.per_op {
            let times = summed(rounds.iter().flatten());
            per_op.push(OpTable::new(program, roof, format!("prefill of {n} × {len}"), shape, &times, rounds.len()));
        }
        prefill.push(Prefill::new(program, roof, shape, &rounds));
    }
    Ok(Bench {
        engine: engine.config().run_id.clone(),
        place: job.place().to_string(),
        load_s,
        first_token_s,
        read_gb_per_s: roof.bytes_per_s / 1e9,
        gflop_per_s: (roof.flops_per_s > 0.0).then_some(roof.flops_per_s / 1e9),
        decode,
        left_out,
        prefill,
        throughput,
        requests_gpu_idle_percent,
        per_op,
    })
}

/// Checks that the engine takes all lengths that were asked for, before any request is drawn.
fn check_lengths(args: &BenchArgs, output: usize, prefill: &[usize], limits: &Limits) -> Result<()> {
    let longest = limits.max_seq_len;
    let needs = [
        (args.context + output, "--context, --warmup and --steps"),
        (prefill.iter().max().map_or(0, |n| n + 1), "--prefill"),
        (if args.requests > 0 { args.input_len.1 + args.output_len.1 } else { 0 }, "--input-len and --output-len"),
    ];
    if let Some((tokens, flags)) = needs.into_iter().find(|&(tokens, _)| tokens > longest) {
        bail!(
            "{flags} come to {tokens} tokens, but the engine's sequences have at most {longest}; ask for fewer, or build it with --max-seq-len {tokens}"
        );
    }
    if args.prefill_batch > limits.max_batch_size {
        let most = limits.max_batch_size;
        bail!("--prefill-batch {}: the engine takes {most} sequences at a time", args.prefill_batch);
    }
    Ok(())
}

/// The better of two measurements, for each of the two rates.
fn better(a: Roof, b: Roof) -> Roof {
    Roof {
        bytes_per_s: a.bytes_per_s.max(b.bytes_per_s),
        flops_per_s: a.flops_per_s.max(b.flops_per_s),
        fp8_flops_per_s: a.fp8_flops_per_s.max(b.fp8_flops_per_s),
    }
}

/// The times of all operations over some steps.
fn summed<'a>(steps: impl Iterator<Item = &'a MeasuredStep>) -> Vec<Duration> {
    let mut sum: Vec<Duration> = Vec::new();
    for step in steps {
        sum.resize(step.ops.len(), Duration::ZERO);
        sum.iter_mut().zip(&step.ops).for_each(|(sum, time)| *sum += *time);
    }
    sum
}

impl Decode {
    fn new(program: &Program, roof: Roof, batch_size: usize, measured: &[MeasuredStep]) -> Self {
        let steps: Vec<f64> = measured.iter().map(|s| s.stats.time.as_secs_f64()).collect();
        let idle: Option<Vec<f64>> = measured.iter().map(|s| s.idle.map(|idle| 1e6 * idle.as_secs_f64())).collect();
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
            gpu_idle_us: idle.map(median),
        }
    }
}

impl Prefill {
    fn new(program: &Program, roof: Roof, shape: StepShape, rounds: &[Vec<MeasuredStep>]) -> Self {
        let flops: f64 = program.ops.iter().map(|op| cost(program, op, shape).flops).sum();
        let seconds = |steps: &Vec<MeasuredStep>| steps.iter().map(|s| s.stats.time).sum::<Duration>().as_secs_f64();
        let times: Vec<f64> = rounds.iter().map(seconds).collect();
        let typical = median(times.clone());
        let rate = ratio(flops, typical);
        Prefill {
            prompts: shape.num_logits,
            tokens: shape.num_tokens / shape.num_logits.max(1),
            steps: rounds.first().map_or(0, Vec::len),
            median_ms: 1e3 * typical,
            min_ms: 1e3 * quantile(times, 0.0),
            tokens_per_s: ratio(f(shape.num_tokens), typical),
            gflop_per_s: rate / 1e9,
            compute_percent: (roof.flops_per_s > 0.0).then(|| 100.0 * ratio(rate, roof.flops_per_s)),
        }
    }
}

/// When requests arrive, in seconds from the start: all at once, or at random with `rate` a second.
pub(super) fn arrivals(numbers: &mut Numbers, rate: f64, requests: usize) -> Vec<f64> {
    let mut at = 0.0;
    let next = |_| {
        // The gaps of a Poisson process are exponential.
        if rate > 0.0 {
            at -= numbers.unit().ln() / rate;
        }
        at
    };
    (0..requests).map(next).collect()
}

fn throughput(
    session: &mut Session,
    args: &BenchArgs,
    requests: &[Request],
    numbers: &mut Numbers,
) -> Result<Throughput> {
    let arrivals = arrivals(numbers, args.arrival_rate, requests.len());
    let start = Instant::now();
    let (mut first_id, mut finished, mut answers) = (None, 0, Vec::with_capacity(requests.len()));
    while finished < requests.len() {
        let now = start.elapsed();
        while let Some(request) = requests.get(answers.len())
            && arrivals[answers.len()] <= now.as_secs_f64()
            && (!args.sequential || session.is_idle())
        {
            let id = session.submit(request.clone()).context("the engine does not take what is to be measured")?;
            first_id.get_or_insert(id.0);
            answers.push(Answered { sent: now, came: Times::default(), tokens: request.max_output_len });
        }
        if session.is_idle() {
            let wait = (arrivals[answers.len()] - start.elapsed().as_secs_f64()).max(0.0);
            std::thread::sleep(Duration::from_secs_f64(wait));
            continue;
        }
        let first_id = first_id.unwrap_or(0);
        let events = session.step()?;
        let now = start.elapsed();
        for event in events {
            let event = event.ok()?;
            if event.token.is_some() {
                answers[event.id.0 - first_id].came.push(now);
            }
            finished += usize::from(event.finished.is_some());
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let prompt_tokens = requests.iter().map(|r| r.prompt.len()).sum();
    Ok(Throughput::new(args.sequential, seconds, prompt_tokens, &answers))
}

fn print(out: &mut dyn Write, bench: &Bench) -> Result<()> {
    let Bench {
        engine,
        place,
        load_s,
        first_token_s,
        read_gb_per_s,
        gflop_per_s,
        decode,
        left_out,
        prefill,
        throughput,
        requests_gpu_idle_percent,
        per_op,
    } = bench;
    let computes = match gflop_per_s {
        Some(rate) if *rate >= TERA => format!("computes {:.0} TFLOP/s", rate / 1e3),
        Some(rate) => format!("computes {rate:.0} GFLOP/s"),
        None => "computes at an unknown rate (cuBLASLt cannot be found)".to_owned(),
    };
    writeln!(out, "engine {engine}, {place}; the machine reads {read_gb_per_s:.2} GB/s and {computes}")?;
    write!(out, "loaded in {load_s:.2} s")?;
    match first_token_s {
        Some(seconds) => writeln!(out, ", first token after {seconds:.2} s")?,
        None => writeln!(out)?,
    }
    if !decode.is_empty() {
        writeln!(
            out,
            "\n{:>6} {:>10} {:>10} {:>10} {:>10} {:>10} {:>8}{}",
            "batch",
            "median ms",
            "p99 ms",
            "min ms",
            "tok/s",
            "GB/s",
            "% read",
            if decode.iter().any(|d| d.gpu_idle_us.is_some()) { "    idle µs" } else { "" }
        )?;
    }
    for d in decode {
        writeln!(
            out,
            "{:>6} {:>10.3} {:>10.3} {:>10.3} {:>10.1} {:>10.2} {:>8.0}{}",
            d.batch_size,
            d.median_ms,
            d.p99_ms,
            d.min_ms,
            d.tokens_per_s,
            d.weight_gb_per_s,
            d.bandwidth_percent,
            d.gpu_idle_us.map(|idle| format!(" {idle:>10.1}")).unwrap_or_default()
        )?;
    }
    for LeftOut { batch_size, why } in left_out {
        writeln!(out, "{batch_size:>6}  left out: {why}")?;
    }
    let is_tera = prefill.iter().any(|p| p.gflop_per_s >= TERA);
    let (unit, scale) = if is_tera { ("TFLOP/s", 1e-3) } else { ("GFLOP/s", 1.0) };
    if !prefill.is_empty() {
        writeln!(
            out,
            "\n{:>12} {:>6} {:>10} {:>10} {:>10} {:>10} {:>8}",
            "prompts", "steps", "median ms", "min ms", "tok/s", unit, "% roof"
        )?;
    }
    for p in prefill {
        writeln!(
            out,
            "{:>12} {:>6} {:>10.2} {:>10.2} {:>10.1} {:>10.1} {:>8}",
            format!("{} × {}", p.prompts, p.tokens),
            p.steps,
            p.median_ms,
            p.min_ms,
            p.tokens_per_s,
            scale * p.gflop_per_s,
            p.compute_percent.map_or_else(|| "-".to_owned(), |percent| format!("{percent:.0}"))
        )?;
    }
    if let Some(throughput) = throughput {
        throughput.print(out)?;
    }
    if let Some(percent) = requests_gpu_idle_percent {
        writeln!(out, "GPU idle     {percent:.1} % of the time")?;
    }
    per_op.iter().try_for_each(|table| table.print(out))
}
