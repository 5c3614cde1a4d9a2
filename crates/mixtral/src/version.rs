//! What this build is, and what it finds on this machine.

use mixtral_kernels::{Nvrtc, Search};

/// The version, and the commit where it is known.
pub const SHORT: &str = match env!("MIXTRAL_COMMIT").is_empty() {
    true => env!("CARGO_PKG_VERSION"),
    false => concat!(env!("CARGO_PKG_VERSION"), " (commit ", env!("MIXTRAL_COMMIT"), ")"),
};

/// The version, and the libraries for CUDA that were found.
pub fn long() -> String {
    let nvrtc = match Nvrtc::load(&Search::from_environment()) {
        Ok(nvrtc) => format!("{nvrtc:?}"),
        Err(_) => "none found: building for GPUs takes `pip install nvidia-cuda-nvrtc`, or a CUDA toolkit".to_owned(),
    };
    let driver = mixtral_cuda::driver_version().unwrap_or_else(|_| "none found".to_owned());
    let gpus = match mixtral_cuda::devices() {
        Ok(devices) => {
            let name =
                |d: &mixtral_cuda::Device| format!("{} (sm_{}, {:.0} GB)", d.name, d.capability, d.memory as f64 / 1e9);
            devices.iter().map(name).collect::<Vec<_>>().join(", ")
        }
        Err(_) => "none found: engines run on the CPU".to_owned(),
    };
    let cpu = format!("{} threads", crate::run::machine::cores());
    format!(
        "mixtral {SHORT}\nNVRTC        {}\nCUDA driver  {driver}\nGPU          {gpus}\nCPU          {cpu}",
        nvrtc.trim_start_matches("NVRTC ")
    )
}
