//! `mixtral build --from-engine`: builds an engine's kernels again, in place.

use anyhow::{Result, bail};
use mixtral_build::rebuild::rebuild;
use mixtral_engine::EngineDir;
use mixtral_kernels::Arch;

use super::build::{report, show_built};
use crate::args::rebuild::RebuildOptions;
use crate::kernels::{Plugins, kernel_options};
use crate::progress::Kernels as Progress;
use crate::run::machine;
use crate::say;

/// Runs the stage.
pub fn main(options: &RebuildOptions) -> Result<()> {
    let engine = EngineDir::open(&options.engine)?;
    let config = engine.config();
    // The recorded options, overridden by those that were given now.
    let mut recorded = config.options.clone();
    recorded.extend(options.plugins.clone());
    let plugins = Plugins::of(&recorded);
    let kernels = kernel_options(archs(options, &config.targets)?, plugins.clone(), options.workers);
    let rebuild_options =
        mixtral_build::rebuild::RebuildOptions { kernels, recorded, workers: options.workers.unwrap_or(1) };
    let progress = Progress::new();
    let advance = |done, total| progress.advance(done, total);
    let built = rebuild(&engine, &rebuild_options, &advance);
    progress.finish();
    let built = built?;
    if let Some(kernels) = &built.kernels {
        report(kernels, &plugins, &built.programs);
    }
    show_built(&built, options.explain, options.graph.as_deref())?;
    say::note(format_args!("wrote {} (engine {})", options.engine.display(), built.config.run_id));
    Ok(())
}

/// The architectures that were asked for, else those that the engine was built for, else those of this machine.
fn archs(options: &RebuildOptions, targets: &[String]) -> Result<Vec<Arch>> {
    if !options.archs.is_empty() {
        return Ok(options.archs.clone());
    }
    let recorded: Vec<Arch> = targets.iter().filter_map(|target| target.parse().ok()).collect();
    if !recorded.is_empty() {
        return Ok(recorded);
    }
    match machine::gpu_archs() {
        Ok(archs) => Ok(archs),
        Err(_) => bail!(
            "{} was built for the CPU alone, and this machine has no GPU to build for: name architectures with --arch (sm_80, sm_90a, …). On the CPU it runs as it is",
            options.engine.display()
        ),
    }
}
