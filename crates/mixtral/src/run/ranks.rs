//! Starting the ranks of an engine.

use anyhow::{Result, bail};
use mixtral_comm::{Launch, World, threads};
use mixtral_engine::EngineConfig;

/// Runs `rank_main` for every rank of the engine that this process is to be: none of a world for an engine of one rank,
/// all of them as threads, or the one that a launcher (mpirun, srun, RANK and WORLD_SIZE) made this process.
pub fn run(engine: &EngineConfig, rank_main: impl Fn(Option<&World>) -> Result<()> + Sync) -> Result<()> {
    let world_size = engine.mapping.world_size();
    let launch = Launch::detect(&|name| std::env::var(name).ok())?;
    match launch {
        Launch::Threads if world_size == 1 => rank_main(None),
        Launch::Threads => match threads::run(world_size, |world| rank_main(Some(world))) {
            Ok(_) => Ok(()),
            Err(failure) => bail!("{failure}"),
        },
        Launch::Process { .. } => bail!("ranks as processes are not wired yet"),
    }
}
