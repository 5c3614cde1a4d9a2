//! `mixtral build`: a checkpoint, or a geometry and dummy weights → an engine.

use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use mixtral_build::explain::{bytes, explain};
use mixtral_build::{DenseLinears, KernelOptions, Kernels, Roof, WeightsFrom, dot, fold};
use mixtral_checkpoint::{Checkpoint, CheckpointConfig};
use mixtral_convert::recipes;
use mixtral_engine::{Limits, Op, Program};
use mixtral_kernels::select::CUBLASLT_ABOVE;
use mixtral_kernels::{Arch, Cache, KernelImages, LinearPlan, Search};
use mixtral_model::{DType, Mapping, ModelConfig};

use crate::args::build::{BuildFor, BuildOptions, Model};
use crate::progress::Kernels as Progress;
use crate::run::machine;
use crate::say;

/// Runs the stage.
pub fn main(options: &BuildOptions) -> Result<()> {
    let checkpoint = match &options.model {
        Model::Checkpoint(dir) => Some(Checkpoint::open(dir)?),
        Model::Dummy(_) => None,
    };
    let config = match (&checkpoint, &options.model) {
        (Some(checkpoint), _) => checkpoint.config().clone(),
        (None, Model::Dummy(name)) => {
            let (model, mapping) = geometry(name, options)?;
            let config = CheckpointConfig::new(model, mapping);
            config.validate()?;
            config
        }
        (None, Model::Checkpoint(_)) => unreachable!("a checkpoint was opened above"),
    };
    if let Some(checkpoint) = &checkpoint {
        let place = checkpoint.dir().join("config.json").display().to_string();
        options.beside(&config.mapping, config.model.dtype, checkpoint.has_weights(), &place)?;
    }
    check_plugins(options, &config.model)?;

    let model_limit = config.model.max_position_embeddings;
    let limits = Limits { max_seq_len: options.max_seq_len.resolve(model_limit), ..options.limits };
    if limits.max_seq_len > model_limit {
        say::warning(format_args!(
            "--max-seq-len {} is more than the {model_limit} positions that the model was trained for",
            limits.max_seq_len
        ));
    }
    let seed = options.seed.unwrap_or(0);
    let dummy = |rank| recipes(&config, rank, false);
    let weights = match &checkpoint {
        Some(checkpoint) if checkpoint.has_weights() => WeightsFrom::Checkpoint(checkpoint),
        _ => WeightsFrom::Dummy { seed, recipes: &dummy },
    };
    let is_dummy = matches!(weights, WeightsFrom::Dummy { .. });
    let kernels = archs(&options.build_for)?.map(|archs| kernel_options(archs, options));
    // Mapped weights can be paged out; dummy ones cannot. GPUs have a memory of their own.
    let is_held_here = is_dummy && kernels.is_none() && !options.dry_run;
    let budget = machine::available_memory().filter(|_| is_held_here);
    let build = mixtral_build::BuildOptions {
        limits,
        gather_context_logits: options.gather_context_logits,
        recorded: options.recorded.clone(),
        workers: options.workers.unwrap_or(1),
        kernels,
        memory_budget: budget,
    };
    if options.dry_run {
        let programs = mixtral_build::plan(&config, &build)?;
        return show(options, &programs, &[], build.kernels.is_none());
    }
    let progress = Progress::new();
    let advance = |done, total| progress.advance(done, total);
    let built = mixtral_build::build(&config, &weights, &build, &options.output_dir, &advance);
    progress.finish();
    let built = built?;
    if is_dummy {
        say::note(format_args!("weights: dummy, seed {seed}"));
    }
    match &built.kernels {
        Some(kernels) => report(kernels, options, &built.programs),
        None if options.recorded.values().any(|v| v == "disable") => {
            say::warning("plugins are disabled (the portable kernels only); on the CPU that changes nothing");
        }
        None if options.cublaslt => {
            say::warning("--gemm-plugin cublaslt: on the CPU that changes nothing");
        }
        None => {}
    }
    let kernels = built.kernels.as_ref().map_or(&[][..], |kernels| &kernels.ranks);
    show(options, &built.programs, kernels, built.kernels.is_none())?;
    say::note(format_args!("wrote {} (engine {})", options.output_dir.display(), built.config.run_id));
    Ok(())
}

/// Prints and draws the programs, as far as that was asked for, and says what they need.
fn show(options: &BuildOptions, programs: &[Program], kernels: &[Vec<KernelImages>], on_cpu: bool) -> Result<()> {
    let mut out = std::io::stdout().lock();
    // This machine's CPU says nothing of a GPU.
    let is_shown = options.explain || options.graph.is_some();
    let roof = (is_shown && on_cpu).then(|| machine::measure_roof(machine::cores()));
    if options.explain {
        if let Some(Roof { bytes_per_s, flops_per_s }) = roof {
            writeln!(out, "roof: {:.1} GB/s read, {:.0} GFLOP/s, measured now", bytes_per_s / 1e9, flops_per_s / 1e9)?;
        }
        writeln!(out, "{}", explain(programs, kernels, roof))?;
    }
    if let Some(path) = &options.graph {
        std::fs::write(path, dot::dot(programs, roof)).with_context(|| format!("cannot write {}", path.display()))?;
    }
    for members in fold::alike(programs) {
        let program = &programs[members[0]];
        let memory = program.memory_plan();
        say::note(format_args!(
            "{}: {} operations, weights {}, activations {}, KV cache {} a block of {} tokens",
            fold::ranks_text(&members, program.world_size),
            program.ops.len(),
            bytes(memory.weights),
            bytes(memory.arena),
            bytes(memory.kv_block),
            program.limits.block_size
        ));
    }
    Ok(())
}

/// The architectures to build for; none for the CPU alone.
fn archs(build_for: &BuildFor) -> Result<Option<Vec<Arch>>> {
    match build_for {
        BuildFor::Cpu => Ok(None),
        BuildFor::Archs(archs) => Ok(Some(archs.clone())),
        BuildFor::Gpus => {
            let hint = "--backend cuda builds for the GPUs of this machine; name others with --arch (sm_90a, …)";
            machine::gpu_archs().context(hint).map(Some)
        }
        BuildFor::Visible => Ok(machine::gpu_archs().ok()),
    }
}

fn kernel_options(archs: Vec<Arch>, options: &BuildOptions) -> KernelOptions {
    KernelOptions {
        archs,
        dense_linears: match options.portable.contains(&"--gemm-plugin") {
            true => DenseLinears::Portable,
            false if options.cublaslt => DenseLinears::CublasLt,
            false => DenseLinears::Tuned,
        },
        tuned_experts: !options.portable.contains(&"--moe-plugin"),
        workers: options.workers.unwrap_or_else(machine::cores),
        nvrtc: Search::from_environment(),
        cache: Cache::folder_from_environment(),
    }
}

/// Says what was compiled and what to know about it.
fn report(kernels: &Kernels, options: &BuildOptions, programs: &[Program]) {
    let targets: Vec<_> = kernels.codes.iter().map(ToString::to_string).collect();
    say::note(format_args!(
        "kernels: {} compiled for {}, {} found in the cache, {:.1} s",
        kernels.compiled,
        targets.join(", "),
        kernels.from_cache,
        kernels.took.as_secs_f64()
    ));
    kernels.warnings.iter().for_each(say::warning);
    if options.cublaslt && programs.iter().flat_map(|program| &program.ops).any(is_by_cublaslt) {
        say::warning(format_args!(
            "--gemm-plugin cublaslt: in steps of more than {CUBLASLT_ABOVE} tokens dense linears run on cuBLASLt, which the machine that runs the engine needs; the bits of a result then depend on what else is in its steps and on how its prompt is cut"
        ));
    } else if options.cublaslt {
        say::warning(format_args!(
            "--gemm-plugin cublaslt changes nothing: it is for steps of more than {CUBLASLT_ABOVE} tokens (--max-num-tokens) of f16 and bf16 models whose sizes are multiples of 8"
        ));
    }
    if !options.portable.is_empty() {
        let flags: Vec<_> = options.portable.iter().map(|flag| format!("{flag} disable")).collect();
        say::warning(format_args!(
            "{}: the portable kernels, which are right on any GPU but slower on some than what auto selects",
            flags.join(", ")
        ));
    }
}

/// Whether cuBLASLt computes it, in some steps.
fn is_by_cublaslt(op: &Op) -> bool {
    let plan = LinearPlan::CublasLt.to_string();
    matches!(op, Op::Linear { ladder, .. } if ladder.iter().any(|rung| rung.plan == plan))
}

/// The geometry of `--model-config` and its mapping: of a preset's name, or a config.json of a checkpoint or of Hugging Face. The
/// flags count where they say something.
fn geometry(name: &str, options: &BuildOptions) -> Result<(ModelConfig, Mapping)> {
    let preset = options.dtype.unwrap_or(DType::F16);
    match name {
        "mixtral-8x7b" => return Ok((ModelConfig::mixtral_8x7b(preset), options.mapping)),
        "mixtral-8x22b" => return Ok((ModelConfig::mixtral_8x22b(preset), options.mapping)),
        _ => {}
    }
    let path = Path::new(name);
    let dir = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) };
    if !path.exists() {
        bail!("--model-config {name}: expected mixtral-8x7b, mixtral-8x22b, or a config.json that exists");
    }
    if let Ok(config) = CheckpointConfig::read(dir) {
        let dtype = options.dtype.unwrap_or(config.model.dtype);
        let mapping = if options.parallel.is_given() { options.mapping } else { config.mapping };
        return Ok((ModelConfig { dtype, ..config.model }, mapping));
    }
    let input = mixtral_convert::Input::Directory(dir.to_owned());
    let mut convert = mixtral_convert::ConvertOptions::new(input, options.output_dir.clone());
    (convert.dtype, convert.save_config_only) = (options.dtype, true);
    Ok((mixtral_convert::plan(&convert)?.model, options.mapping))
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
