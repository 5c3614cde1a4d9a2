//! `mixtral diff`: two engines, or one on two backends, operation by operation.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use mixtral_cpu::{CpuBackend, CpuOptions};
use mixtral_engine::{Backend, EngineDir, Inspect, Program};
use mixtral_model::{Mapping, Rank};
use mixtral_runtime::session::Capabilities;
use mixtral_runtime::{Local, Request, Session, Tokenizer};
use serde_json::json;

use super::bench::Numbers;
use crate::args::build::BackendChoice;
use crate::args::diff::DiffOptions;
use crate::args::place::PlaceArgs;
use crate::diff::difference::Tolerance;
use crate::diff::{Exchange, Findings, Lockstep, Member, Ranks, Share, find, same_model, same_operations};
use crate::run::cache::Wanted;
use crate::run::load::{LoadOptions, Part};
use crate::run::machine;
use crate::run::place::Place;
use crate::run::prompts::{self, Encoder};
use crate::say;

/// An engine, and where it runs.
struct Side {
    engine: EngineDir,
    place: Place,
    /// Rank 0's.
    program: Program,
    load: LoadOptions<'static>,
}

impl Side {
    fn open(engine: EngineDir, backend: BackendChoice, options: &DiffOptions) -> Result<Side> {
        // The cache is as large as the prompts need, whatever part of the memory that is.
        let all = Some(1.0);
        let args = PlaceArgs {
            backend,
            ranks_per_gpu: None,
            threads: options.args.threads,
            kv_cache_free_gpu_mem_fraction: all,
        };
        let load = LoadOptions { place: args, count_experts: false, time_ops: false, graphs: false, windows: &[] };
        let mut program = engine.program(Rank(0))?;
        let mut place = Place::choose(&engine, &program, None, args)?;
        if let Some(layers) = options.args.layers {
            let first = program.first_layers(layers).with_context(|| engine.dir().display().to_string())?;
            place = place.first_layers(&program, &first)?;
            program = first;
        }
        Ok(Side { engine, place, program, load })
    }

    fn mapping(&self) -> &Mapping {
        &self.engine.config().mapping
    }

    fn load(&self, kv_blocks: usize) -> Result<Box<dyn Inspect>> {
        let part = Part { engine: &self.engine, program: self.program.clone(), place: &self.place, options: self.load };
        let layers = self.program.num_layers;
        let wanted = Wanted { most: kv_blocks, least: kv_blocks, longest: self.program.limits.max_seq_len };
        part.load(None, wanted)
            .with_context(|| format!("{} ({layers} layers; --layers compares fewer)", self.describe()))
    }

    /// Loads all ranks on the CPU. They run one after another, so each gets all threads.
    fn load_ranks(&self, kv_blocks: usize, exchange: &Arc<Exchange>) -> Result<Vec<Member>> {
        let threads = self.load.place.threads.unwrap_or_else(machine::cores);
        let load = |rank: Rank| -> Result<Member> {
            let program = self.engine.program(rank)?;
            let part = Part { engine: &self.engine, program, place: &self.place, options: self.load };
            let options = CpuOptions { kv_blocks, threads, ..CpuOptions::default() };
            let backend = CpuBackend::load(part.program.clone(), part.weights()?, options)?;
            let share = Share::new(&self.engine.config().model, self.mapping(), rank);
            Ok(Member { backend: Box::new(backend.with_ranks(exchange.seat(rank.0))), share })
        };
        self.mapping().ranks().map(load).collect()
    }

    fn describe(&self) -> String {
        let ranks = match self.mapping().world_size() {
            1 => String::new(),
            ranks => format!(" {ranks} ranks"),
        };
        format!("{}{ranks} on {}", self.engine.dir().display(), self.place)
    }
}

/// Opens both engines. If one of them has several ranks, the other is the reference, and both run on the CPU.
fn sides(options: &DiffOptions) -> Result<[Side; 2]> {
    let [(a, on_a), (b, on_b)] = &options.sides;
    let (a, b) = (EngineDir::open(a)?, EngineDir::open(b)?);
    let ranks = [&a, &b].map(|engine| engine.config().mapping.world_size());
    if ranks == [1, 1] {
        return Ok([Side::open(a, *on_a, options)?, Side::open(b, *on_b, options)?]);
    }
    if ranks.iter().all(|&ranks| ranks > 1) {
        bail!(
            "the engines have {} and {} ranks, but the reference must have one; convert with --tp-size 1 --pp-size 1",
            ranks[0],
            ranks[1]
        );
    }
    if options.args.layers.is_some() {
        bail!("--layers is for engines of one rank; --start and --stop compare fewer operations");
    }
    if [on_a, on_b].into_iter().any(|&on| on == BackendChoice::Cuda) {
        bail!("an engine of several ranks is compared on the CPU; leave out --backends, or use --backends cpu");
    }
    let (reference, other) = if ranks[0] == 1 { (a, b) } else { (b, a) };
    same_model(reference.config(), other.config())?;
    let cpu = BackendChoice::Cpu;
    Ok([Side::open(reference, cpu, options)?, Side::open(other, cpu, options)?])
}

/// Runs the command.
pub fn main(options: &DiffOptions) -> Result<()> {
    let args = &options.args;
    let [reference, other] = sides(options)?;
    let compared = find(&reference.program, args.start.as_deref(), args.stop.as_deref())?;

    let requests = requests(options, &reference)?;
    let kv_blocks = Wanted::by(&reference.program.limits, &requests).most;
    let findings = Findings::new(Tolerance { f32: args.f32_limit, half: args.half_limit });
    let findings = Arc::new(Mutex::new(findings));
    let seen = Arc::clone(&findings);
    let both: Box<dyn Backend> = if other.mapping().world_size() > 1 {
        let exchange = Arc::new(Exchange::default());
        let ranks = other.load_ranks(kv_blocks, &exchange)?;
        let tp_size = other.mapping().tp_size;
        Box::new(Ranks::new(reference.load(kv_blocks)?, ranks, tp_size, exchange, compared, seen))
    } else {
        same_operations(&reference.program, &other.program)?;
        Box::new(Lockstep::new(reference.load(kv_blocks)?, other.load(kv_blocks)?, compared, seen))
    };
    let Program { limits, vocab_size, .. } = reference.program;
    let capabilities = Capabilities { limits, vocab_size, gather_context_logits: false };
    let mut session = Session::new(Box::new(Local::new(both)), capabilities, None);
    for request in requests {
        session.submit(request).context("the engine does not take the prompts")?;
    }
    while !session.is_idle() {
        for event in session.step()? {
            event.ok()?;
        }
    }

    let findings = findings.lock().unwrap_or_else(PoisonError::into_inner);
    let mut out = std::io::stdout().lock();
    if args.json {
        let mut object = findings.to_json();
        object["reference"] = json!(reference.describe());
        object["other"] = json!(other.describe());
        writeln!(out, "{object:#}")?;
    } else {
        writeln!(out, "reference {}\nother     {}", reference.describe(), other.describe())?;
        findings.print(say::shows(say::Level::Verbose), &mut out)?;
    }
    match findings.verdict() {
        None => Ok(()),
        Some(verdict) => bail!(verdict),
    }
}

/// The requests: prompts that are continued greedily, and that no token ends.
fn requests(options: &DiffOptions, reference: &Side) -> Result<Vec<Request>> {
    let args = &options.args;
    let output = args.max_output_len;
    let Some(prompts) = &options.prompts else {
        let mut numbers = Numbers::new(args.random_seed);
        let vocab_size = reference.program.vocab_size;
        return Ok(args.input_len.iter().map(|&len| numbers.request(vocab_size, len, output)).collect());
    };
    let dir = args.tokenizer_dir.as_deref().unwrap_or(reference.engine.dir());
    let tokenizer = prompts::are_texts(prompts).then(|| Tokenizer::load(dir)).transpose()?;
    let encoder = Encoder { tokenizer: tokenizer.as_ref(), special: !args.no_add_special_tokens, ..Encoder::default() };
    let read = prompts::read(prompts, encoder, args.max_input_length)?;
    Ok(read.into_iter().map(|p| Request { prompt: p.ids, max_output_len: output, ..Request::default() }).collect())
}
