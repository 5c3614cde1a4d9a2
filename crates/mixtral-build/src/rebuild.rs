//! Builds an engine's kernels again from the programs that it holds: `mixtral build --from-engine`.

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
    /// Other options, recorded in the engine's config.
    pub recorded: BTreeMap<String, String>,
    /// How many ranks are written at a time.
    pub workers: usize,
}

/// Builds an engine again in its own directory. Its programs get new plans and kernels. Its weight files stay (they are
/// linked, or copied where links cannot be made), and so do the tokenizer's files, the limits and the layout. Needs no
/// checkpoint. Calls `progress` with the number of compiled kernels and the number of all kernels.
///
/// # Errors
/// If the engine is damaged, if kernels cannot be compiled, or if files cannot be read or written. All kernels are
/// compiled before anything is written.
pub fn rebuild(
    engine: &EngineDir,
    options: &RebuildOptions,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Built, BuildError> {
    let old = engine.config();
    let program = |rank: Rank| -> Result<Program, BuildError> {
        let mut program = engine.program(rank)?;
        // The weights are kept, so they are checked before anything is changed.
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
        Ok(writer.rank(program, &kernels.images(rank), weights.as_deref())?)
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
