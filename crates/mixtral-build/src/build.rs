//! From a checkpoint directory (or a geometry alone) to an engine directory.

use std::collections::BTreeMap;
use std::path::Path;

use mixtral_checkpoint::names::is_tokenizer_file;
use mixtral_checkpoint::{Checkpoint, CheckpointConfig, ReadError, TensorId};
use mixtral_engine::dir::{RankRecord, WeightsKind};
use mixtral_engine::program::FORMAT_VERSION;
use mixtral_engine::{EngineConfig, EngineError, EngineWriter, KvScale, Limits, Program, ProgramError};
use mixtral_model::{CacheFormat, DType, Rank, Recipe};

use crate::{KernelOptions, Kernels, lower};

/// Where the engine's weights come from.
pub enum WeightsFrom<'a> {
    /// A checkpoint with rank files.
    Checkpoint(&'a Checkpoint),
    /// A seed and, for each rank, the recipes of its tensors.
    Dummy {
        /// The seed.
        seed: u64,
        /// The shard plan of a rank.
        recipes: &'a dyn Fn(Rank) -> Vec<Recipe>,
    },
}

/// What to build.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// What a step may hold. The build sets `max_num_logits` itself, to what `gather_context_logits` needs.
    pub limits: Limits,
    /// Whether steps can return the logits of every prompt token.
    pub gather_context_logits: bool,
    /// Whether attention of prompts is computed in fp8.
    pub fp8_context: bool,
    /// Other options, recorded in the engine's config.
    pub recorded: BTreeMap<String, String>,
    /// How many ranks are written at a time.
    pub workers: usize,
    /// The CUDA kernels. Without them the engine runs only on the CPU.
    pub kernels: Option<KernelOptions>,
    /// The most bytes that a rank's weights, activations and inputs may need. This is checked before anything is
    /// written.
    pub memory_budget: Option<usize>,
}

/// What was built.
#[derive(Clone, Debug)]
pub struct Built {
    /// The engine's config.
    pub config: EngineConfig,
    /// The programs, by rank.
    pub programs: Vec<Program>,
    /// Their kernels, if they were asked for.
    pub kernels: Option<Kernels>,
}

/// Why nothing was built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] ReadError),
    /// The engine directory cannot be written.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Limits that are out of range.
    #[error(transparent)]
    Limits(ProgramError),
    /// The build made an ill-formed program: limits are too large, or this is a bug.
    #[error("the program of rank {rank} is not well-formed: {source}")]
    Program {
        /// The rank.
        rank: Rank,
        /// The rule broken.
        source: ProgramError,
    },
    /// A program that CUDA cannot run.
    #[error("rank {rank}: {source}")]
    Lower {
        /// The rank.
        rank: Rank,
        /// What is missing.
        source: mixtral_kernels::LowerError,
    },
    /// Kernels that cannot be compiled.
    #[error(transparent)]
    Kernels(#[from] mixtral_kernels::CompileError),
    /// Compiled kernels with defects that an engine may not hold: a bug, or an untried version of NVRTC.
    #[error("NVRTC compiled these kernels badly; try another version of it, or build with --gemm-plugin disable --moe-plugin disable\n{}", kernels.join("\n"))]
    Unfit {
        /// Kernel, architecture and defect.
        kernels: Vec<String>,
    },
    /// Attention in fp8 without a cache in fp8.
    #[error(
        "--use-fp8-context-fmha: attention in fp8 takes its keys and values from an fp8 cache, and this model's cache is {cache}; convert it with --kv-cache-dtype fp8, or leave the flag out"
    )]
    Fp8Context {
        /// What the cache stores.
        cache: DType,
    },
    /// The engine needs more memory than the machine has.
    #[error("rank {rank} needs {} (weights {}, activations {}, step inputs {}), but {} are there; {}",
        human(*needed), human(*weights), human(*arena), human(*inputs), human(*budget), if weights > budget {
            format!("the weights alone do not fit, and dummy weights cannot be paged out: use a machine with more memory, a smaller model{}",
                ", or fewer layers (--model-config with a config.json of your own)")
        } else {
            format!("lower --max-num-tokens (now {max_num_tokens}){}, or spread the model over more ranks",
                if *gathers { ", build without --gather-context-logits" } else { "" })
        })]
    Memory {
        /// The rank.
        rank: Rank,
        /// Bytes in total.
        needed: usize,
        /// Of weights.
        weights: usize,
        /// Of activations.
        arena: usize,
        /// Of step inputs.
        inputs: usize,
        /// Bytes there are.
        budget: usize,
        /// The limit to lower.
        max_num_tokens: usize,
        /// Whether context logits are gathered.
        gathers: bool,
    },
}

use crate::explain::bytes as human;

/// Lowers every rank's program and checks that it fits, without writing anything.
///
/// # Errors
/// If the model cannot be lowered, or does not fit into memory.
pub fn plan(config: &CheckpointConfig, options: &BuildOptions) -> Result<Vec<Program>, BuildError> {
    let mapping = config.mapping;
    if options.fp8_context && config.model.cache != CacheFormat::Fp8 {
        return Err(BuildError::Fp8Context { cache: config.model.dtype });
    }
    let mut limits = options.limits;
    limits.max_num_logits = if options.gather_context_logits {
        limits.max_num_tokens
    } else {
        limits.max_batch_size.min(limits.max_num_tokens)
    };
    limits.check().map_err(BuildError::Limits)?;
    mapping
        .ranks()
        .map(|rank| {
            let mut program = lower(config, rank, limits);
            if options.fp8_context {
                program.attend_in_fp8();
            }
            if let Some(kernels) = &options.kernels {
                kernels.fill_ladders(&mut program);
            }
            program.check().map_err(|source| BuildError::Program { rank, source })?;
            let memory = program.memory_plan();
            let (needed, budget) = (memory.total(0), options.memory_budget.unwrap_or(usize::MAX));
            if needed > budget {
                return Err(BuildError::Memory {
                    rank,
                    needed,
                    weights: memory.weights,
                    arena: memory.arena,
                    inputs: memory.inputs,
                    budget,
                    max_num_tokens: limits.max_num_tokens,
                    gathers: options.gather_context_logits,
                });
            }
            Ok(program)
        })
        .collect()
}

/// Builds the engine of `config` in `output_dir`. Calls `progress` with the number of compiled kernels and the number
/// of all kernels.
///
/// # Errors
/// As [`plan`], or if kernels cannot be compiled, or files cannot be read or written. Nothing is left in `output_dir`
/// then.
pub fn build(
    config: &CheckpointConfig,
    weights: &WeightsFrom<'_>,
    options: &BuildOptions,
    output_dir: &Path,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Built, BuildError> {
    let mut programs = plan(config, options)?;
    if let WeightsFrom::Checkpoint(checkpoint) = weights {
        programs.iter_mut().try_for_each(|program| read_cache_scales(program, checkpoint))?;
    }
    if let WeightsFrom::Dummy { recipes, .. } = weights {
        for program in &mut programs {
            for recipe in recipes(Rank(program.rank)) {
                if let Some(weight) = program.weights.iter_mut().find(|w| w.name == recipe.name) {
                    weight.pieces = recipe.pieces;
                }
            }
        }
    }
    // Kernels are compiled before the directory is touched, so an engine that is there stays if they cannot be
    // compiled.
    let kernels = options.kernels.as_ref().map(|kernels| kernels.compile(&programs, progress)).transpose()?;
    let writer = EngineWriter::create(output_dir)?;
    let checkpoint = match weights {
        WeightsFrom::Checkpoint(checkpoint) => Some(*checkpoint),
        WeightsFrom::Dummy { .. } => None,
    };
    let ranks = for_each_rank(&programs, options.workers, |program| {
        let rank = Rank(program.rank);
        // The file is opened only for its checks: header, shapes and run id.
        checkpoint.map(|c| c.rank(rank)).transpose()?;
        let images = kernels.as_ref().map(|kernels| kernels.images(rank)).unwrap_or_default();
        Ok(writer.rank(program, &images, checkpoint.map(|c| c.rank_path(rank)).as_deref())?)
    })?;
    let files = checkpoint.map_or(Ok(BTreeMap::new()), |checkpoint| copy_tokenizer(checkpoint, &writer))?;
    let engine = EngineConfig {
        mixtral_engine_format: FORMAT_VERSION,
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
        run_id: String::new(),
        model: config.model.clone(),
        mapping: config.mapping,
        targets: targets(kernels.as_ref()),
        limits: programs[0].limits,
        gather_context_logits: options.gather_context_logits,
        options: options.recorded.clone(),
        weights: match weights {
            WeightsFrom::Checkpoint(_) => WeightsKind::File,
            WeightsFrom::Dummy { seed, .. } => WeightsKind::Dummy { seed: *seed },
        },
        files,
        ranks,
    };
    Ok(Built { config: writer.finish(engine)?, programs, kernels })
}

/// Puts the scales of a checkpoint's cache into a program.
fn read_cache_scales(program: &mut Program, checkpoint: &Checkpoint) -> Result<(), BuildError> {
    if program.kv_scales.is_empty() {
        return Ok(());
    }
    let file = checkpoint.rank(Rank(program.rank))?;
    for (layer, scale) in program.kv_scales.iter_mut().enumerate() {
        let floats = DType::F32.widen(file.tensor(&TensorId::CacheScales(layer).to_string())?.bytes);
        match floats[..] {
            [key, value] => *scale = KvScale { key, value },
            [both] => *scale = KvScale { key: both, value: both },
            _ => {}
        }
    }
    let rank = Rank(program.rank);
    program.check().map_err(|source| BuildError::Program { rank, source })
}

/// What an engine's config names as the targets of the build.
pub(crate) fn targets(kernels: Option<&Kernels>) -> Vec<String> {
    let codes = kernels.iter().flat_map(|kernels| &kernels.codes);
    std::iter::once("cpu".to_owned()).chain(codes.map(ToString::to_string)).collect()
}

/// Calls `write` for every rank, `workers` at a time. That is worth it because weights that cannot be linked are
/// copied, which takes long.
pub(crate) fn for_each_rank(
    programs: &[Program],
    workers: usize,
    write: impl Fn(&Program) -> Result<RankRecord, BuildError> + Sync,
) -> Result<Vec<RankRecord>, BuildError> {
    let write = &write;
    let share = programs.len().div_ceil(workers.max(1));
    std::thread::scope(|scope| {
        let shares = programs.chunks(share.max(1));
        let threads: Vec<_> =
            shares.map(|share| scope.spawn(move || share.iter().map(write).collect::<Result<Vec<_>, _>>())).collect();
        let mut ranks = Vec::with_capacity(programs.len());
        for thread in threads {
            // A panic of the thread continues here.
            ranks.extend(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(ranks)
    })
}

/// Copies the tokenizer's files and returns their hashes. They have to be the hashes that the checkpoint's config
/// names, if it names any.
fn copy_tokenizer(checkpoint: &Checkpoint, writer: &EngineWriter) -> Result<BTreeMap<String, String>, BuildError> {
    let (from, known) = (checkpoint.dir(), &checkpoint.config().files);
    let io = |source| EngineError::Io { path: from.to_owned(), source };
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(from).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_tokenizer_file(&name) {
            let hash = writer.copy_in(&name, &entry.path(), known.get(&name))?;
            files.insert(name, hash.to_string());
        }
    }
    Ok(files)
}
