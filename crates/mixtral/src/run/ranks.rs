//! Starting the ranks of an engine.

use std::fmt;
use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use mixtral_comm::process::JoinOptions;
use mixtral_comm::{Launch, World, process, threads};
use mixtral_engine::EngineConfig;

use crate::args::chain;
use crate::say;

/// A rank's error with its causes, as other ranks are told it.
struct Failure(anyhow::Error);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&chain(&self.0))
    }
}

/// Runs `rank_main` for every rank of the engine that this process is to be: none of a world for an engine of one rank,
/// all of them as threads, or the one that a launcher (mpirun, srun, RANK and WORLD_SIZE) made this process.
pub fn run(engine: &EngineConfig, rank_main: impl Fn(Option<&World>) -> Result<()> + Sync) -> Result<()> {
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
            // What every rank must present alike: the engine.
            let identity = *blake3::hash(engine.run_id.as_bytes()).as_bytes();
            let options = JoinOptions { warn: Arc::new(|warning| say::warning(warning)), ..JoinOptions::new(identity) };
            process::run(&process, &options, rank_of).map_err(|failure| anyhow!("{}", failure.cause))
        }
    }
}
