//! `mixtral diff`: two engines, or one on two backends, operation by operation.

use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use mixtral_engine::{EngineDir, Inspect, Program};
use mixtral_model::Rank;
use mixtral_runtime::session::Capabilities;
use mixtral_runtime::{Local, Request, Session, Tokenizer};
use serde_json::json;

use super::bench::Numbers;
use crate::args::build::BackendChoice;
use crate::args::diff::DiffOptions;
use crate::args::place::PlaceArgs;
use crate::diff::difference::Tolerance;
use crate::diff::{Findings, Lockstep, find, same_operations};
use crate::run::cache::Wanted;
use crate::run::load::{LoadOptions, Part};
use crate::run::place::Place;
use crate::run::prompts;
use crate::say;

/// An engine, and where it runs.
struct Side {
    engine: EngineDir,
    place: Place,
    program: Program,
    load: LoadOptions,
}

impl Side {
    fn open(dir: &Path, backend: BackendChoice, options: &DiffOptions) -> Result<Side> {
        let engine = EngineDir::open(dir)?;
        let ranks = engine.config().mapping.world_size();
        if ranks > 1 {
            bail!(
                "{}: the engine has {ranks} ranks, and engines of one are compared; convert with --tp-size 1 --pp-size 1",
                dir.display()
            );
        }
        // The cache is as large as the prompts need, whatever part of the memory that is.
        let all = Some(1.0);
        let args = PlaceArgs {
            backend,
            ranks_per_gpu: None,
            threads: options.args.threads,
            kv_cache_free_gpu_mem_fraction: all,
        };
        let load = LoadOptions { place: args, count_experts: false, time_ops: false, graphs: false };
        let mut program = engine.program(Rank(0))?;
        let mut place = Place::choose(&engine, &program, None, args)?;
        if let Some(layers) = options.args.layers {
            let first = program.first_layers(layers).with_context(|| dir.display().to_string())?;
            place = place.first_layers(&program, &first)?;
            program = first;
        }
        Ok(Side { engine, place, program, load })
    }

    fn load(&self, kv_blocks: usize) -> Result<Box<dyn Inspect>> {
        let part = Part { engine: &self.engine, program: self.program.clone(), place: &self.place, options: self.load };
        let layers = self.program.num_layers;
        part.load(None, Wanted::exactly(kv_blocks))
            .with_context(|| format!("{} ({layers} layers; --layers compares fewer)", self.describe()))
    }

    fn describe(&self) -> String {
        format!("{} on {}", self.engine.dir().display(), self.place)
    }
}

/// Runs the command.
pub fn main(options: &DiffOptions) -> Result<()> {
    let args = &options.args;
    let [reference, other] = &options.sides;
    let reference = Side::open(&reference.0, reference.1, options)?;
    let other = Side::open(&other.0, other.1, options)?;
    same_operations(&reference.program, &other.program)?;
    let compared = find(&reference.program, args.start.as_deref(), args.stop.as_deref())?;

    let requests = requests(options, &reference)?;
    let kv_blocks = Wanted::by(&reference.program.limits, &requests).most;
    let findings = Findings::new(Tolerance { f32: args.f32_limit, half: args.half_limit });
    let findings = Arc::new(Mutex::new(findings));
    let both = Lockstep::new(reference.load(kv_blocks)?, other.load(kv_blocks)?, compared, Arc::clone(&findings));
    let Program { limits, vocab_size, .. } = reference.program;
    let capabilities = Capabilities { limits, vocab_size, gather_context_logits: false };
    let mut session = Session::new(Box::new(Local::new(Box::new(both))), capabilities, None);
    for request in requests {
        session.submit(request).context("the engine does not take the prompts")?;
    }
    while !session.is_idle() {
        session.step()?;
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
    let read = prompts::read(prompts, !args.no_add_special_tokens, args.max_input_length, tokenizer.as_ref())?;
    Ok(read.into_iter().map(|p| Request { prompt: p.ids, max_output_len: output, ..Request::default() }).collect())
}
