//! `mixtral build`: a checkpoint, or a geometry and dummy weights → an engine.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use mixtral_build::explain::{bytes, explain};
use mixtral_build::{Built, Gpu, Job, Kernels, Roof, WeightsFrom, dot, fold};
use mixtral_checkpoint::names::CONFIG_FILE;
use mixtral_checkpoint::{Checkpoint, CheckpointConfig, ConfigFileError, ReadError};
use mixtral_convert::recipes;
use mixtral_engine::{Limits, Op, Program};
use mixtral_kernels::select::CUBLASLT_ABOVE;
use mixtral_kernels::{Arch, Code, Family, KernelImages, LinearPlan};
use mixtral_model::{DType, Formats, Mapping, ModelConfig, WeightOnly};
use tempfile::TempDir;

use crate::args::build::{BuildFor, BuildOptions, Model};
use crate::kernels::{Plugins, kernel_options};
use crate::progress::{Bytes, Kernels as Progress};
use crate::run::machine;
use crate::say;
use crate::stages::convert::show_losses;

/// Runs the stage.
pub fn main(options: &BuildOptions) -> Result<()> {
    let mut checkpoint = match &options.model {
        Model::Checkpoint(dir) => Some(open(dir)?),
        Model::Dummy(_) => None,
    };
    let mut config = match (&checkpoint, &options.model) {
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
        let place = format!("the checkpoint in {}", checkpoint.dir().display());
        options.beside(&config.mapping, config.model.dtype, checkpoint.has_weights(), &place)?;
    }
    check_plugins(options, &config.model)?;
    let mut quantized = None;
    if let Some(formats) = formats_to_make(options, &config.model)? {
        config.model.formats = formats;
        config.validate()?;
        if let (Some(floats), Some(weight_only), false) = (&checkpoint, options.weight_only, options.dry_run)
            && floats.has_weights()
        {
            let folder = quantize(floats, weight_only, options)?;
            checkpoint = Some(Checkpoint::open(folder.path())?);
            quantized = Some(folder);
        }
    }

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
    if let (Some(checkpoint), true) = (&checkpoint, is_dummy) {
        say::warning(format_args!(
            "{} has a config.json and no weights; the engine gets dummy weights (seed {seed})",
            checkpoint.dir().display()
        ));
    }
    let plugins = Plugins::of(&options.recorded);
    let kernels = archs(&options.build_for)?.map(|archs| kernel_options(archs, plugins.clone(), options.workers));
    // Only dummy weights of an engine for the CPU must fit into memory. Mapped weights can be paged out, and GPUs have
    // a memory of their own.
    let is_held_here = is_dummy && kernels.is_none() && !options.dry_run;
    let budget = machine::available_memory().filter(|_| is_held_here);
    let build = mixtral_build::BuildOptions {
        limits,
        gather_context_logits: options.gather_context_logits,
        fp8_context: options.fp8_context,
        recorded: options.recorded.clone(),
        workers: options.workers.unwrap_or(1),
        kernels,
        memory_budget: budget,
    };
    if options.dry_run {
        let programs = mixtral_build::plan(&config, &build)?;
        let family = build.kernels.as_ref().and_then(|kernels| best(&kernels.codes()));
        return show(&programs, &[], family, options.explain, options.graph.as_deref());
    }
    let progress = Progress::new();
    let advance = |done, total| progress.advance(done, total);
    let built = mixtral_build::build(&config, &weights, &build, &options.output_dir, &advance);
    progress.finish();
    let built = built?;
    drop(quantized);
    if is_dummy {
        say::note(format_args!("weights: dummy, seed {seed}"));
    }
    match &built.kernels {
        Some(kernels) => report(kernels, &plugins, &built.programs),
        None if options.recorded.values().any(|v| v == "disable") => {
            say::warning("plugins are disabled (the portable kernels only); on the CPU that changes nothing");
        }
        None if plugins.cublaslt => {
            say::warning("--gemm-plugin cublaslt: on the CPU that changes nothing");
        }
        None => {}
    }
    show_built(&built, options.explain, options.graph.as_deref())?;
    say::note(format_args!("wrote {} (engine {})", options.output_dir.display(), built.config.run_id));
    Ok(())
}

/// The formats that the checkpoint's weights, or the dummy weights, have yet to be brought into.
fn formats_to_make(options: &BuildOptions, model: &ModelConfig) -> Result<Option<Formats>> {
    let Some(formats) = options.weight_only.map(|weight_only| weight_only.formats(model.dtype)) else {
        return Ok(None);
    };
    match model.formats {
        found if found == formats => Ok(None),
        found if found == Formats::default() => Ok(Some(formats)),
        found => bail!(
            "--weight-only-precision asks for {} and {} in attention, but the checkpoint is quantized already, to {} and {} in attention; leave the flag out, or convert the model again",
            formats.feed_forward,
            formats.attention,
            found.feed_forward,
            found.attention
        ),
    }
}

/// Quantizes a checkpoint of floats into a folder beside the engine's directory. The engine keeps the folder's weight files. The
/// folder is removed when it is dropped.
fn quantize(floats: &Checkpoint, weight_only: WeightOnly, options: &BuildOptions) -> Result<TempDir> {
    let beside = options.output_dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = std::fs::create_dir_all(beside)
        .and_then(|()| tempfile::Builder::new().prefix(".quantized-").tempdir_in(beside));
    let folder = folder.with_context(|| format!("cannot make a folder in {}", beside.display()))?;
    let workers = options.workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let progress = Bytes::new();
    let lost = mixtral_convert::requantize(floats, weight_only, folder.path(), workers, &progress);
    progress.finish();
    show_losses(&lost?);
    Ok(folder)
}

/// Shows what was built.
pub fn show_built(built: &Built, explains: bool, graph: Option<&Path>) -> Result<()> {
    let kernels = built.kernels.as_ref().map_or(&[][..], |kernels| &kernels.ranks);
    let family = built.kernels.as_ref().and_then(|kernels| best(&kernels.codes));
    show(&built.programs, kernels, family, explains, graph)
}

/// The family of the fastest of an engine's kernels.
fn best(codes: &BTreeSet<Code>) -> Option<Family> {
    codes.iter().map(|code| code.family()).max()
}

/// Prints and draws the programs if the flags ask for it, and prints how large they are. `family` is that of the engine's
/// kernels, if it has any.
fn show(
    programs: &[Program],
    kernels: &[Vec<KernelImages>],
    family: Option<Family>,
    explains: bool,
    graph: Option<&Path>,
) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let gpu = family.zip(programs.first()).and_then(|(family, program)| Gpu::of(family, program.dtype));
    // This machine's CPU is measured only for engines that run on a CPU.
    let is_shown = explains || graph.is_some();
    let roof = match family {
        Some(_) => gpu.map(|gpu| gpu.roof),
        None => is_shown.then(|| machine::measure_roof(machine::cores())),
    };
    if explains {
        if let Some(Roof { bytes_per_s, flops_per_s, .. }) = roof {
            let of = gpu.map_or("measured now".to_owned(), |gpu| format!("of {}", gpu.name));
            writeln!(out, "roof: {:.1} GB/s read, {:.0} GFLOP/s, {of}", bytes_per_s / 1e9, flops_per_s / 1e9)?;
        }
        writeln!(out, "{}", explain(programs, kernels, roof))?;
        match (family, gpu.zip(family).map(|(gpu, family)| Job::new(programs, gpu, family))) {
            (_, Some(Ok(job))) => writeln!(out, "{}", job.table())?,
            (_, Some(Err(error))) => writeln!(out, "steps are not predicted: {error}\n")?,
            (Some(_), None) => writeln!(
                out,
                "steps are not predicted: that takes figures of Hopper kernels in 16 bits, and no others were measured\n"
            )?,
            (None, None) => {}
        }
    }
    if let Some(path) = graph {
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

/// Opens the checkpoint, and prints when it was written: it may be older than the user thinks.
fn open(dir: &Path) -> Result<Checkpoint> {
    let checkpoint = Checkpoint::open(dir).map_err(|error| match error {
        ReadError::NoDirectory { .. } | ReadError::NoConfig { .. } => {
            anyhow!("{error}. For an engine with dummy weights name a geometry: --model-config mixtral-8x7b")
        }
        ReadError::Config(ConfigFileError::HuggingFace { .. }) => {
            anyhow!("{error}. For an engine with dummy weights of its geometry: --model-config {}", dir.display())
        }
        error => error.into(),
    })?;
    let written = std::fs::metadata(dir.join(CONFIG_FILE)).and_then(|meta| meta.modified());
    let age = written.ok().and_then(|time| time.elapsed().ok()).map(|age| format!(", written {}", ago(age)));
    say::note(format_args!("from {}: {}{}", dir.display(), checkpoint.config().model, age.unwrap_or_default()));
    Ok(checkpoint)
}

/// How long ago, roughly: `just now`, `90 seconds ago`, `3 days ago`.
fn ago(time: Duration) -> String {
    let units = [("days", 86_400), ("hours", 3600), ("minutes", 60), ("seconds", 1)];
    let seconds = time.as_secs();
    match units.into_iter().find(|(_, length)| seconds >= 2 * length) {
        Some((unit, length)) => format!("{} {unit} ago", seconds / length),
        None => "just now".to_owned(),
    }
}

/// The architectures to build for; `None` for the CPU alone.
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

/// Prints what was compiled, and what the user should know about it.
pub fn report(kernels: &Kernels, plugins: &Plugins, programs: &[Program]) {
    let targets: Vec<_> = kernels.codes.iter().map(ToString::to_string).collect();
    say::note(format_args!(
        "kernels: {} compiled for {}, {} found in the cache, {:.1} s",
        kernels.compiled,
        targets.join(", "),
        kernels.from_cache,
        kernels.took.as_secs_f64()
    ));
    kernels.warnings.iter().for_each(say::warning);
    if plugins.cublaslt && programs.iter().flat_map(|program| &program.ops).any(is_by_cublaslt) {
        say::warning(format_args!(
            "--gemm-plugin cublaslt: in steps of more than {CUBLASLT_ABOVE} tokens dense linears run on cuBLASLt, which the machine that runs the engine needs; the bits of a result then depend on what else is in its steps and on how its prompt is cut"
        ));
    } else if plugins.cublaslt {
        say::warning(format_args!(
            "--gemm-plugin cublaslt changes nothing: it is for steps of more than {CUBLASLT_ABOVE} tokens (--max-num-tokens) of f16 and bf16 models whose sizes are multiples of 8"
        ));
    }
    if !plugins.portable.is_empty() {
        let flags: Vec<_> = plugins.portable.iter().map(|flag| format!("{flag} disable")).collect();
        say::warning(format_args!(
            "{}: the portable kernels, which are right on any GPU but slower on some than what auto selects",
            flags.join(", ")
        ));
    }
}

/// Whether cuBLASLt computes the operation in some steps.
fn is_by_cublaslt(op: &Op) -> bool {
    let plan = LinearPlan::CublasLt.to_string();
    matches!(op, Op::Linear { ladder, .. } if ladder.iter().any(|rung| rung.plan == plan))
}

/// The geometry that `--model-config` names, and its mapping. The name is a preset's, or the path of a config.json of a
/// checkpoint or of Hugging Face. Flags that were given override the data type and mapping found there.
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

/// Checks that no plugin flag names another data type than the model's: that would be a mistake in the command line.
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
