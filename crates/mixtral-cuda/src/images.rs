//! Chooses which of an engine's compiled kernels a GPU runs.

use mixtral_kernels::{Arch, Code};

use crate::{CudaError, Device};

/// The best of `codes` for a GPU.
///
/// # Errors
/// If the GPU runs none of them.
pub fn choose(device: &Device, codes: &[Code]) -> Result<Code, CudaError> {
    Code::best(codes.iter().copied(), device.capability).ok_or_else(|| {
        let targets: Vec<String> = codes.iter().map(ToString::to_string).collect();
        CudaError::NoImage {
            device: device.name.clone(),
            capability: device.capability,
            targets: if targets.is_empty() { "the CPU alone".to_owned() } else { targets.join(", ") },
            arch: arch_of(device),
        }
    })
}

/// The architecture to build for, so that kernels run as fast as they can on this GPU.
pub(crate) fn arch_of(device: &Device) -> String {
    let own = Arch { capability: device.capability, specific: false };
    if own.capability == Arch::SM_90A.capability { Arch::SM_90A } else { own }.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(capability: u32) -> Device {
        Device {
            ordinal: 0,
            uuid: [0; 16],
            name: "NVIDIA Something".to_owned(),
            capability,
            multiprocessors: 132,
            memory: 80_000_000_000,
            shared_memory: 232_448,
            l2_bytes: 50 << 20,
        }
    }

    #[test]
    fn a_gpu_without_kernels_says_what_to_build_for() {
        let codes = |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect::<Vec<Code>>();
        assert_eq!(choose(&device(90), &codes(&["sm_90a", "compute_80"])), Ok(Code::Sass(Arch::SM_90A)));
        assert_eq!(choose(&device(120), &codes(&["sm_90a", "compute_80"])), Ok(Code::Ptx(Arch::BASE)));
        let message = |capability, texts: &[&str]| choose(&device(capability), &codes(texts)).unwrap_err();
        insta::assert_snapshot!(message(89, &["sm_90a"]), @"the engine has no kernels for this GPU (NVIDIA Something, sm_89): it was built for sm_90a; build it again with --arch sm_89, or run with --backend cpu");
        insta::assert_snapshot!(message(90, &[]), @"the engine has no kernels for this GPU (NVIDIA Something, sm_90): it was built for the CPU alone; build it again with --arch sm_90a, or run with --backend cpu");
    }
}
