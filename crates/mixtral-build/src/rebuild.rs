//! An engine's kernels, built again from the programs that it holds: `mixtral build --from-engine`.

use std::collections::BTreeMap;

use mixtral_engine::dir::weights_file_name;
use mixtral_engine::{EngineConfig, EngineDir, EngineWriter, Program, WeightsKind};
use mixtral_model::Rank;

use crate::build::{for_each_rank, targets};
use crate::{BuildError, Built, KernelOptions};

/// What to build again.
#[derive(Clone, Debug)]
pub struct RebuildOptions {
    /// The kernels.
    pub kernels: KernelOptions,
    /// The build's other options, for the engine's config.
    pub recorded: BTreeMap<String, String>,
    /// Ranks written at a time.
    pub workers: usize,
}

/// Builds an engine again in its own directory: its programs with plans and kernels chosen anew. Its weights stay the files
/// that they are (linked, or copied where links cannot be made), and so do the tokenizer's files, limits and layout. Needs no
/// checkpoint. `progress` is told how many kernels of how many are compiled.
///
/// # Errors
/// If the engine is damaged, kernels cannot be compiled, or files cannot be read or written. All kernels are compiled before anything
/// is written.
pub fn rebuild(
    engine: &EngineDir,
    options: &RebuildOptions,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Built, BuildError> {
    let old = engine.config();
    let program = |rank: Rank| -> Result<Program, BuildError> {
        let mut program = engine.program(rank)?;
        // Before anything is changed: what is kept has to be whole.
        if old.weights == WeightsKind::File {
            engine.check_weights(&program)?;
        }
        options.kernels.fill_ladders(&mut program);
        program.check().map_err(|source| BuildError::Program { rank, source })?;
        Ok(program)
    };
    let programs = old.mapping.ranks().map(program).collect::<Result<Vec<_>, _>>()?;
    let kernels = options.kernels.compile(&programs, progress)?;
    let writer = EngineWriter::create(engine.dir())?;
    let ranks = for_each_rank(&programs, options.workers, |program| {
        let rank = Rank(program.rank);
        let weights = (old.weights == WeightsKind::File).then(|| engine.dir().join(weights_file_name(rank)));
        Ok(writer.rank(program, &kernels.images(program), weights.as_deref())?)
    })?;
    for (name, hash) in &old.files {
        writer.copy_in(name, &engine.dir().join(name), Some(hash))?;
    }
    let config = EngineConfig {
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
        targets: targets(Some(&kernels)),
        options: options.recorded.clone(),
        ranks,
        ..old.clone()
    };
    Ok(Built { config: writer.finish(config)?, programs, kernels: Some(kernels) })
}
