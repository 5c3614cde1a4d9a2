//! `mixtral convert`: a Hugging Face model → a checkpoint.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, anyhow};
use mixtral_build::explain::bytes;
use mixtral_calibrate::{CalibrateOptions, Calibration, Gpu, Machine};
use mixtral_checkpoint::Progress;
use mixtral_convert::Input;
use mixtral_convert::report::QuantizedTensor;
use mixtral_kernels::{Arch, Nvrtc};
use mixtral_model::{DType, ModelConfig};

use crate::args::build::BackendChoice;
use crate::args::convert::ConvertOptions;
use crate::kernels::{Plugins, kernel_options};
use crate::progress::{Bytes, Tokens};
use crate::run::gpus::{self, Share};
use crate::say;

/// Runs the stage.
pub fn main(options: &ConvertOptions) -> Result<()> {
    let ConvertOptions { convert, calibrate, backend, dry_run, json, geometry } = options;
    if let (Input::Directory(dir), true) = (&convert.input, geometry.is_given()) {
        let place = format!("the configuration in {}", dir.display());
        geometry.beside(&geometry_of(dir)?, &place)?.into_iter().for_each(say::warning);
    }
    if *dry_run {
        let plan = mixtral_convert::plan(convert)?;
        plan.warnings.iter().for_each(say::warning);
        match json {
            true => writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&plan)?)?,
            false => writeln!(std::io::stdout(), "{plan}")?,
        }
        return Ok(());
    }
    say::detail(format_args!("{} threads, {} ranks", convert.workers, convert.mapping.world_size()));
    let convert = &calibrated(convert, calibrate.as_ref(), *backend)?;
    let progress = Bytes::new();
    let report = mixtral_convert::convert(convert, &progress);
    progress.finish();
    let report = report?;
    report.warnings.iter().for_each(say::warning);
    let size = usize::try_from(report.bytes).unwrap_or(usize::MAX);
    say::note(format_args!(
        "wrote {}: {} tensors for {} rank(s), {} in {:.1} s",
        convert.output_dir.display(),
        report.tensors,
        report.ranks,
        bytes(size),
        report.seconds
    ));
    show_losses(&report.quantized);
    if *json {
        writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&report)?)?;
    }
    Ok(())
}

/// Calibrates the model, if that is asked for, and adds what was found to the options. Says which experts saw too few tokens.
fn calibrated(
    convert: &mixtral_convert::ConvertOptions,
    calibrate: Option<&CalibrateOptions>,
    backend: BackendChoice,
) -> Result<mixtral_convert::ConvertOptions> {
    const SHOWN: usize = 5;
    let mut convert = convert.clone();
    let Some(options) = calibrate else { return Ok(convert) };
    // Statistics that were kept need no machine.
    let is_kept = options.cache.as_ref().is_some_and(|cache| cache.exists());
    let machine = if is_kept { Machine::Cpu } else { machine_for(backend)? };
    let options = CalibrateOptions { machine, ..options.clone() };
    let begun = Instant::now();
    let progress = [Tokens::new("tokens written"), Tokens::new("tokens of all layers")];
    let found = mixtral_calibrate::calibrate(&convert, &options, progress.each_ref().map(|p| p as &dyn Progress));
    progress.iter().for_each(Tokens::finish);
    let Some(Calibration { statistics, text }) = found? else { return Ok(convert) };
    let cache = options.cache.as_deref().map(Path::display);
    match (text, cache) {
        (Some((sequences, tokens)), cache) => {
            let kept = cache.map(|cache| format!("; statistics kept in {cache}")).unwrap_or_default();
            let place = match &options.machine {
                Machine::Cpu => "the CPU",
                Machine::Cuda(gpu) => &gpu.device.name,
            };
            say::note(format_args!(
                "calibrated with {sequences} sequences, {tokens} tokens on {place} in {:.1} s{kept}",
                begun.elapsed().as_secs_f64()
            ));
        }
        (None, Some(cache)) => say::note(format_args!("calibrated by the statistics in {cache}")),
        (None, None) => {}
    }
    let rare = statistics.rare();
    if !rare.is_empty() {
        let shown = rare.iter().take(SHOWN).map(|(input, tokens)| format!("{input} ({tokens} tokens)"));
        let shown = shown.collect::<Vec<_>>().join(", ");
        let more = if rare.len() > SHOWN { format!(" and {} more", rare.len() - SHOWN) } else { String::new() };
        say::warning(format_args!(
            "too few tokens of the calibration text came to {shown}{more}; they are quantized by what the other experts of their layers saw"
        ));
    }
    convert.statistics = Some(Arc::new(statistics));
    Ok(convert)
}

/// Where a model is calibrated. A GPU is of use only with NVRTC, which compiles the kernels.
fn machine_for(backend: BackendChoice) -> Result<Machine> {
    let gpu = || -> Result<Machine> {
        let Share { device, .. } = gpus::choose(None, 1)?;
        let arch = Arch::native(device.capability);
        let arch = arch.ok_or_else(|| anyhow!("{} is older than {}, which kernels need", device.name, Arch::BASE))?;
        let kernels = kernel_options(vec![arch], Plugins::default(), None);
        Nvrtc::load(&kernels.nvrtc)?;
        Ok(Machine::Cuda(Box::new(Gpu { device, kernels })))
    };
    match backend {
        BackendChoice::Cpu => Ok(Machine::Cpu),
        BackendChoice::Auto => Ok(gpu().unwrap_or_else(|why| {
            say::detail(format_args!("calibrating on the CPU: {why:#}"));
            Machine::Cpu
        })),
        BackendChoice::Cuda => gpu(),
    }
}

/// Says what quantizing lost: the tensors that lost most, and the middle one.
pub fn show_losses(tensors: &[QuantizedTensor]) {
    const SHOWN: usize = 5;
    let Some(middle) = tensors.get(tensors.len() / 2) else { return };
    say::note(format_args!("quantized {} tensors; the largest errors, as parts of a tensor's size:", tensors.len()));
    for QuantizedTensor { name, error } in tensors.iter().take(SHOWN) {
        say::note(format_args!("  {:6.2} %  {name}", 100.0 * error));
    }
    say::note(format_args!("  {:6.2} %  the median", 100.0 * middle.error));
}

/// The model that a directory's configuration describes. The weights are not read.
fn geometry_of(dir: &Path) -> Result<ModelConfig> {
    let mut convert = mixtral_convert::ConvertOptions::new(Input::Directory(dir.to_owned()), PathBuf::new());
    convert.save_config_only = true;
    // Any data type will do, since it is no part of the geometry. Without one, a configuration that names none would
    // make the weights be read.
    convert.dtype = Some(DType::F16);
    Ok(mixtral_convert::plan(&convert)?.model)
}
