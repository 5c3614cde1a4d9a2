//! Starting the ranks of an engine.

use std::fmt;
use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use mixtral_comm::process::JoinOptions;
use mixtral_comm::{Launch, World, process, threads};
use mixtral_engine::EngineConfig;

use crate::args::chain;
use crate::say;

/// A rank's error with its causes, in the form in which other ranks are told of it.
struct Failure(anyhow::Error);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&chain(&self.0))
    }
}

/// Runs `rank_main` for every rank that this process is to run. An engine of one rank runs without a [`World`]. If a
/// launcher (mpirun, srun, RANK and WORLD_SIZE) started this process as one rank, only that rank runs. Else all ranks
/// run as threads. With `signals`, SIGTERM and SIGINT end the job.
pub fn run(
    engine: &EngineConfig,
    signals: bool,
    rank_main: impl Fn(Option<&World>) -> Result<()> + Sync,
) -> Result<()> {
    let world_size = engine.mapping.world_size();
    let launch = Launch::detect(&|name| std::env::var(name).ok())?;
    let rank_of = |world: &World| rank_main(Some(world)).map_err(Failure);
    match launch {
        Launch::Threads if world_size == 1 => rank_main(None),
        Launch::Threads => threads::run(world_size, rank_of).map(drop).map_err(|failure| anyhow!("{failure}")),
        Launch::Process(process) => {
            if process.world_size != world_size {
                bail!(
                    "{} processes were started ({}) for an engine of {world_size} rank(s) (tp_size {} × pp_size {}); start {world_size}, or build an engine for {}",
                    process.world_size,
                    process.source,
                    engine.mapping.tp_size,
                    engine.mapping.pp_size,
                    process.world_size
                );
            }
            // All ranks must load the same engine, so they compare its hash when they join.
            let identity = *blake3::hash(engine.run_id.as_bytes()).as_bytes();
            let options =
                JoinOptions { signals, warn: Arc::new(|warning| say::warning(warning)), ..JoinOptions::new(identity) };
            process::run(&process, &options, rank_of).map_err(|failure| anyhow!("{}", failure.cause))
        }
    }
}
