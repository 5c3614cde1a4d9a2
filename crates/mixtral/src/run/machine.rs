//! What this machine has and can do.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use mixtral_build::Roof;
use mixtral_cpu::probe::{self, Probe};
use mixtral_kernels::Arch;

/// Bytes of memory that can be allocated without swapping; `None` where the system does not say.
pub fn available_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kilobytes: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

/// How many threads can run at the same time.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Measures read bandwidth and arithmetic rate, in about a second.
pub fn measure_roof(threads: usize) -> Roof {
    roof(probe::measure(threads, probe::QUICK))
}

/// The ceilings of a probe.
pub fn roof(probe: Probe) -> Roof {
    let flops_per_s = probe.flops_per_s;
    Roof { bytes_per_s: probe.read_bytes_per_s, flops_per_s, fp8_flops_per_s: flops_per_s }
}

/// The architectures to build for, so that an engine runs on this machine's GPUs: one for each kind of GPU.
///
/// # Errors
/// If there is no driver, no GPU, or only GPUs that kernels do not run on.
pub fn gpu_archs() -> Result<Vec<Arch>> {
    let devices = mixtral_cuda::devices()?;
    let archs: BTreeSet<Arch> = devices.iter().filter_map(|device| Arch::native(device.capability)).collect();
    if archs.is_empty() {
        let names: Vec<_> = devices.iter().map(|d| format!("{} (sm_{})", d.name, d.capability)).collect();
        bail!("the kernels need a GPU of {} or newer; found {}", Arch::BASE, names.join(", "));
    }
    Ok(archs.into_iter().collect())
}
