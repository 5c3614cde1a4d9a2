//! Runs an engine's ranks from start to end: rank 0 leads and the others follow it.

use std::sync::Arc;

use anyhow::Result;
use mixtral_comm::{CommError, World};
use mixtral_engine::{Backend, EngineDir, Program};
use mixtral_model::Rank;
use mixtral_runtime::ranks::{Driver, follow};
use mixtral_runtime::session::Capabilities;
use mixtral_runtime::{Executor, Local, Request, Session, SessionOptions, Tokenizer};

use super::cache::Wanted;
use super::load::{LoadOptions, Part};
use super::machine::available_memory;
use super::place::Place;
use super::ranks;
use crate::args::place::PlaceArgs;
use crate::say;

/// What rank 0 leads the others with.
pub struct Job<'a> {
    world: Option<&'a World>,
    part: Part<'a>,
}

/// Runs the engine's ranks. Rank 0 runs `lead`; the others follow its session until it ends.
pub fn run(engine: &EngineDir, options: LoadOptions<'_>, lead: impl Fn(&Job<'_>) -> Result<()> + Sync) -> Result<()> {
    run_ranks(engine, options, true, lead)
}

/// The same, but SIGTERM and SIGINT do not end the job.
pub fn run_through_signals(
    engine: &EngineDir,
    options: LoadOptions<'_>,
    lead: impl Fn(&Job<'_>) -> Result<()> + Sync,
) -> Result<()> {
    run_ranks(engine, options, false, lead)
}

fn run_ranks(
    engine: &EngineDir,
    options: LoadOptions<'_>,
    signals: bool,
    lead: impl Fn(&Job<'_>) -> Result<()> + Sync,
) -> Result<()> {
    ranks::run(engine.config(), signals, |world| {
        let program = engine.program(Rank(world.map_or(0, World::rank)))?;
        let place = Place::choose(engine, &program, world, options.place)?;
        let part = Part { engine, program, place: &place, options };
        match world {
            Some(world) if world.rank() > 0 => {
                let mut backend: Box<dyn Backend> = part.load(Some(world), Wanted::default())?;
                Ok(follow(world, engine.config().mapping, backend.as_mut())?)
            }
            world => {
                warn_of_unused(options.place, &place, world);
                say::detail(format_args!("engine {}: {} on {place}", engine.dir().display(), engine.config().run_id));
                lead(&Job { world, part })
            }
        }
    })
}

/// Flags that were given and change nothing.
fn warn_of_unused(args: PlaceArgs, place: &Place, world: Option<&World>) {
    if matches!(place, Place::Cpu(_)) {
        if args.kv_cache_free_gpu_mem_fraction.is_some() {
            say::warning(
                "--kv-cache-free-gpu-mem-fraction changes nothing on the CPU, whose cache is as large as the requests need",
            );
        }
        if args.ranks_per_gpu.is_some() {
            say::warning("--ranks-per-gpu changes nothing on the CPU");
        }
        return;
    }
    if args.threads.is_some() {
        say::warning("--threads changes nothing on a GPU");
    }
    if args.ranks_per_gpu.is_some() && world.is_none() {
        say::warning("--ranks-per-gpu changes nothing: the engine has one rank");
    }
}

impl Job<'_> {
    /// What the engine accepts.
    pub fn capabilities(&self) -> Capabilities {
        let Program { limits, vocab_size, .. } = self.part.program;
        let gather_context_logits = self.part.engine.config().gather_context_logits;
        Capabilities { limits, vocab_size, gather_context_logits }
    }

    /// Rank 0's program.
    pub fn program(&self) -> &Program {
        &self.part.program
    }

    /// Where rank 0 runs.
    pub fn place(&self) -> &Place {
        self.part.place
    }

    /// Loads the engine on all ranks, with a cache for `requests`. Called once in a job.
    pub fn session(
        &self,
        requests: &[Request],
        options: SessionOptions,
        tokenizer: Option<Arc<Tokenizer>>,
    ) -> Result<Session> {
        self.session_with(Wanted::by(&self.part.program.limits, requests), options, tokenizer)
    }

    /// The same, with a cache for as many sequences of any length as the engine takes.
    pub fn largest_session(&self, options: SessionOptions, tokenizer: Option<Arc<Tokenizer>>) -> Result<Session> {
        self.session_with(Wanted::any(&self.part.program.limits), options, tokenizer)
    }

    /// Whether all ranks are alive.
    pub fn check(&self) -> Result<(), CommError> {
        self.world.map_or(Ok(()), World::check)
    }

    /// The most blocks that may lie outside the cache: for half of the memory that this host has available, shared by its
    /// ranks.
    pub fn host_blocks(&self) -> usize {
        let block = self.part.program.memory_plan().kv_block.max(1);
        available_memory().unwrap_or(0) / 2 / block / self.ranks_here()
    }

    /// How many ranks run on this host.
    pub fn ranks_here(&self) -> usize {
        self.world.map_or(1, World::local_size).max(1)
    }

    /// The same, with a cache of as many blocks as are wanted.
    pub fn session_with(
        &self,
        wanted: Wanted,
        options: SessionOptions,
        tokenizer: Option<Arc<Tokenizer>>,
    ) -> Result<Session> {
        let backend = self.part.load(self.world, wanted)?;
        let executor: Box<dyn Executor> = match self.world {
            None => Box::new(Local::new(backend)),
            Some(world) => Box::new(Driver::new(world, self.part.engine.config().mapping, backend)?),
        };
        Ok(Session::with_options(executor, self.capabilities(), tokenizer, options))
    }
}
