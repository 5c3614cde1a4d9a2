//! `mixtral build`: a checkpoint, or a geometry and dummy weights → an engine.

use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use mixtral_build::explain::{bytes, explain};
use mixtral_build::{Roof, WeightsFrom, dot};
use mixtral_checkpoint::{Checkpoint, CheckpointConfig};
use mixtral_convert::recipes;
use mixtral_model::ModelConfig;

use crate::args::build::{BuildOptions, Model};
use crate::run::machine;

/// Sequences are at most this long unless asked for.
const DEFAULT_MAX_SEQ_LEN: usize = 4096;

/// Runs the stage.
pub fn main(options: &BuildOptions) -> Result<()> {
    let checkpoint = match &options.model {
        Model::Checkpoint(dir) => Some(Checkpoint::open(dir)?),
        Model::Dummy(_) => None,
    };
    let config = match (&checkpoint, &options.model) {
        (Some(checkpoint), _) => checkpoint.config().clone(),
        (None, Model::Dummy(name)) => {
            let config = CheckpointConfig::new(geometry(name, options)?, options.mapping);
            config.validate()?;
            config
        }
        (None, Model::Checkpoint(_)) => unreachable!("a checkpoint was opened above"),
    };
    check_plugins(options, &config.model)?;

    let mut limits = options.limits;
    let model_limit = config.model.max_position_embeddings;
    if limits.max_seq_len == 0 {
        limits.max_seq_len = model_limit.min(DEFAULT_MAX_SEQ_LEN);
    } else if limits.max_seq_len > model_limit {
        eprintln!(
            "warning: --max-seq-len {} is more than the {model_limit} positions that the model was trained for",
            limits.max_seq_len
        );
    }
    let dummy = |rank| recipes(&config, rank, false);
    let weights = match &checkpoint {
        Some(checkpoint) if checkpoint.has_weights() => WeightsFrom::Checkpoint(checkpoint),
        _ => WeightsFrom::Dummy { seed: options.seed, recipes: &dummy },
    };
    let is_dummy = matches!(weights, WeightsFrom::Dummy { .. });
    // Mapped weights can be paged out; dummy ones cannot.
    let budget = machine::available_memory();
    let build = mixtral_build::BuildOptions {
        limits,
        gather_context_logits: options.gather_context_logits,
        recorded: options.recorded.clone(),
        workers: options.workers,
        memory_budget: budget.filter(|_| is_dummy),
    };
    let built = mixtral_build::build(&config, &weights, &build, &options.output_dir)?;
    if is_dummy {
        eprintln!("weights: dummy, seed {}", options.seed);
    }
    if options.recorded.values().any(|v| v == "disable") {
        eprintln!("warning: plugins are disabled (the portable kernels only); on the CPU that changes nothing");
    }
    let mut out = std::io::stdout().lock();
    let roof = options.explain.then(|| machine::measure_roof(machine::cores()));
    if let Some(Roof { bytes_per_s, flops_per_s }) = roof {
        writeln!(out, "roof: {:.1} GB/s read, {:.0} GFLOP/s, measured now", bytes_per_s / 1e9, flops_per_s / 1e9)?;
    }
    for program in &built.programs {
        if options.explain {
            writeln!(out, "{}", explain(program, roof))?;
        }
        if let Some(path) = &options.graph {
            // One file a rank, where there are several.
            let path = match built.programs.len() {
                1 => path.clone(),
                _ => path.with_extension(format!("rank{}.dot", program.rank)),
            };
            write_graph(&path, &dot::dot(program))?;
        }
        let memory = program.memory_plan();
        eprintln!(
            "rank {}: {} operations, weights {}, activations {}, KV cache {} a block of {} tokens",
            program.rank,
            program.ops.len(),
            bytes(memory.weights),
            bytes(memory.arena),
            bytes(memory.kv_block),
            program.limits.block_size
        );
    }
    eprintln!("wrote {} (engine {})", options.output_dir.display(), built.config.run_id);
    Ok(())
}

fn write_graph(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// The geometry of `--model-config`: a preset's name, or a config.json of a checkpoint or of Hugging Face.
fn geometry(name: &str, options: &BuildOptions) -> Result<ModelConfig> {
    match name {
        "mixtral-8x7b" => return Ok(ModelConfig::mixtral_8x7b(options.dtype)),
        "mixtral-8x22b" => return Ok(ModelConfig::mixtral_8x22b(options.dtype)),
        _ => {}
    }
    let path = Path::new(name);
    let dir = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) };
    if !path.exists() {
        bail!("--model-config {name}: expected mixtral-8x7b, mixtral-8x22b, or a config.json that exists");
    }
    if let Ok(config) = CheckpointConfig::read(dir) {
        return Ok(config.model);
    }
    let input = mixtral_convert::Input::Directory(dir.to_owned());
    let mut convert = mixtral_convert::ConvertOptions::new(input, options.output_dir.clone());
    (convert.dtype, convert.save_config_only) = (None, true);
    Ok(mixtral_convert::plan(&convert)?.model)
}

/// A plugin of another data type than the model's is a mistake in the command line.
fn check_plugins(options: &BuildOptions, model: &ModelConfig) -> Result<()> {
    for (flag, dtype) in &options.plugins {
        if *dtype != model.dtype {
            bail!(
                "--{} {dtype}, but the model is {}; use {} or auto, or convert with --dtype {dtype}",
                flag.replace('_', "-"),
                model.dtype,
                model.dtype
            );
        }
    }
    Ok(())
}
