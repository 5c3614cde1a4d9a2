//! Everything that can fail between a program and a GPU.

use mixtral_engine::BackendError;

/// A failure of the driver, the device, or an engine that does not fit it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// libcuda is missing.
    #[error(
        "no NVIDIA driver: libcuda.so.1 cannot be loaded ({detail}); install the driver (in a container, give it the GPU), or run with --backend cpu"
    )]
    NoDriver {
        /// What the loader said.
        detail: String,
    },
    /// libcuda is too old.
    #[error(
        "the NVIDIA driver is too old: it knows {found}, and {oldest} or newer is needed (driver 545; kernels that a newer CUDA compiled need the driver of that one); install a newer one, or run with --backend cpu"
    )]
    OldDriver {
        /// The newest CUDA version that the driver knows.
        found: String,
        /// The oldest CUDA version that is enough.
        oldest: String,
    },
    /// A driver that does not start.
    #[error("the NVIDIA driver ({driver}) does not start: cuInit says {detail}; {advice}, or run with --backend cpu")]
    Start {
        /// The newest CUDA version that the driver knows.
        driver: String,
        /// What it said.
        detail: String,
        /// What to do.
        advice: &'static str,
    },
    /// A driver without a GPU.
    #[error(
        "the NVIDIA driver sees no GPU ({detail}); check nvidia-smi and CUDA_VISIBLE_DEVICES, or run with --backend cpu"
    )]
    NoDevice {
        /// What the driver said.
        detail: String,
    },
    /// A number past the last GPU.
    #[error("there is no GPU {ordinal}: this machine has {count}, counted from 0")]
    NoSuchDevice {
        /// The number.
        ordinal: usize,
        /// GPUs there are.
        count: usize,
    },
    /// The engine has no kernels that run on the GPU.
    #[error(
        "the engine has no kernels for this GPU ({device}, sm_{capability}): it was built for {targets}; build it again with --arch {arch}, or run with --backend cpu"
    )]
    NoImage {
        /// Its name.
        device: String,
        /// Its compute capability.
        capability: u32,
        /// What the engine was built for.
        targets: String,
        /// What to build for.
        arch: String,
    },
    /// An engine that lacks one of its kernels.
    #[error(
        "the engine has no image of kernel `{symbol}` for {arch}; build its kernels again with `mixtral build --from-engine DIR`"
    )]
    MissingKernel {
        /// The kernel's name expression.
        symbol: String,
        /// The architecture chosen for this GPU.
        arch: String,
    },
    /// An image that the driver does not take.
    #[error(
        "the driver ({driver}) cannot load the kernels of this engine: {name}{log}; they were compiled by a newer CUDA than the driver knows: install a newer driver, or build the engine with the NVRTC of an older CUDA"
    )]
    Image {
        /// CUDA version of the driver.
        driver: String,
        /// The driver's name of the failure.
        name: String,
        /// What its compiler said, after a colon.
        log: String,
    },
    /// A kernel that this GPU cannot launch.
    #[error("kernel `{symbol}` cannot run on this GPU: {problem}; build the engine with --arch {arch}")]
    Unfit {
        /// The kernel's name expression.
        symbol: String,
        /// What is wrong.
        problem: String,
        /// What to build for.
        arch: String,
    },
    /// A kernel that takes other parameters than those it would be launched with.
    #[error(
        "kernel `{symbol}` takes parameters of {taken:?} bytes, and its launch passes {passed:?}; the engine's schedule and its kernels do not belong together: build them again with `mixtral build --from-engine DIR`, or run with --backend cpu"
    )]
    Parameters {
        /// The kernel's name expression.
        symbol: String,
        /// Bytes of each parameter of the launch.
        passed: Vec<usize>,
        /// Bytes of each parameter that the driver knows.
        taken: Vec<usize>,
    },
    /// cuBLASLt is missing.
    #[error(
        "libcublasLt, which computes the engine's dense linears, was not found (looked in {places}); install it with `pip install nvidia-cublas` or a CUDA toolkit (and set CUDA_HOME), or build the engine with --gemm-plugin auto, which does without it"
    )]
    NoCublasLt {
        /// Where it was looked for.
        places: String,
    },
    /// cuBLASLt refuses.
    #[error(
        "cuBLASLt {what}: {call} failed with status {status} ({name}); build the engine with --gemm-plugin auto, which does without it"
    )]
    CublasLt {
        /// What it does not do.
        what: String,
        /// The function.
        call: &'static str,
        /// Its return code.
        status: i32,
        /// The code's name.
        name: String,
    },
    /// NCCL is missing.
    #[error(
        "libnccl.so.2, which carries rows to ranks whose GPUs' memory cannot be mapped, was not found (looked in {places}); install it on every host with `pip install nvidia-nccl-cu13` (or -cu12) or your system's packages, or run all ranks on GPUs of one host that can access each other"
    )]
    NoNccl {
        /// Where it was looked for.
        places: String,
    },
    /// NCCL fails.
    #[error(
        "NCCL failed in {call}: {detail}; NCCL_DEBUG=WARN makes it say more, and NCCL_SOCKET_IFNAME names the network between the hosts"
    )]
    Nccl {
        /// The function.
        call: &'static str,
        /// What it says.
        detail: String,
    },
    /// A launch that this backend cannot carry out.
    #[error("launch of `{symbol}`: {problem}; this is a bug, please report it")]
    Launch {
        /// The kernel's name expression.
        symbol: String,
        /// What is wrong.
        problem: String,
    },
    /// Less memory than the program needs.
    #[error("{0}")]
    Memory(String),
    /// A device that stopped in the middle of a step.
    #[error(
        "the GPU failed in step {step} ({what}): {name}: {text}; its context is lost, so nothing more can run in this process. Run it again; if it happens again, run it under `compute-sanitizer` to see which kernel and address, and report it"
    )]
    Fault {
        /// How many steps came before it.
        step: u64,
        /// What the step was.
        what: String,
        /// The driver's name of the failure.
        name: String,
        /// The driver's words.
        text: String,
    },
    /// Another rank is gone, or does not answer.
    #[error("{0}")]
    Rank(String),
    /// Any other call of the driver.
    #[error("{call} failed: {name}: {text}")]
    Call {
        /// The function.
        call: &'static str,
        /// Its return code.
        code: u32,
        /// The code's name.
        name: String,
        /// The driver's words.
        text: String,
    },
    /// A program or a request that this backend does not take.
    #[error("{0}")]
    Unsupported(String),
}

impl CudaError {
    /// Tells a failure that lost the context as the failure of a step. Other failures stay as they are.
    pub(crate) fn in_step(self, step: u64, what: impl FnOnce() -> String) -> CudaError {
        match self {
            CudaError::Call { code, name, text, .. } if LOST.contains(&code) => {
                CudaError::Fault { step, what: what(), name, text }
            }
            other => other,
        }
    }
}

/// Return codes that lose the context, so that every later call fails with the same code: illegal address, launch
/// timeout, assertion, hardware stack, illegal instruction, misaligned address, invalid address space, invalid program
/// counter, launch failure, and the uncorrectable memory errors.
const LOST: &[u32] = &[700, 702, 710, 714, 715, 716, 717, 718, 719, 214, 220, 226];

/// The driver's codes for an image that it cannot load: invalid image, no binary for the GPU, invalid PTX, unsupported
/// PTX version, JIT compiler missing.
pub(crate) const BAD_IMAGE: &[u32] = &[200, 209, 218, 221, 222];

impl From<CudaError> for BackendError {
    fn from(error: CudaError) -> Self {
        match error {
            CudaError::Rank(text) => BackendError::Peer(text.into()),
            other => BackendError::Other(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_and_one_that_refuses_have_a_way_out() {
        let missing = CudaError::NoCublasLt { places: "the dynamic linker's path, /usr/local/cuda".to_owned() };
        insta::assert_snapshot!(missing, @"libcublasLt, which computes the engine's dense linears, was not found (looked in the dynamic linker's path, /usr/local/cuda); install it with `pip install nvidia-cublas` or a CUDA toolkit (and set CUDA_HOME), or build the engine with --gemm-plugin auto, which does without it");
        let refused = CudaError::CublasLt {
            what: "does not start".to_owned(),
            call: "cublasLtCreate",
            status: 1,
            name: "CUBLAS_STATUS_NOT_INITIALIZED".to_owned(),
        };
        let missing = CudaError::NoNccl { places: "the dynamic linker's path".to_owned() };
        insta::assert_snapshot!(missing, @"libnccl.so.2, which carries rows to ranks whose GPUs' memory cannot be mapped, was not found (looked in the dynamic linker's path); install it on every host with `pip install nvidia-nccl-cu13` (or -cu12) or your system's packages, or run all ranks on GPUs of one host that can access each other");
        let failed = CudaError::Nccl {
            call: "ncclCommInitRank",
            detail: "unhandled system error: no interface found".to_owned(),
        };
        insta::assert_snapshot!(failed, @"NCCL failed in ncclCommInitRank: unhandled system error: no interface found; NCCL_DEBUG=WARN makes it say more, and NCCL_SOCKET_IFNAME names the network between the hosts");
        insta::assert_snapshot!(refused, @"cuBLASLt does not start: cublasLtCreate failed with status 1 (CUBLAS_STATUS_NOT_INITIALIZED); build the engine with --gemm-plugin auto, which does without it");
    }

    #[test]
    fn a_lost_context_is_a_fault_of_its_step() {
        let call = |code| CudaError::Call {
            call: "cuStreamSynchronize",
            code,
            name: "CUDA_ERROR_ILLEGAL_ADDRESS".to_owned(),
            text: "an illegal memory access was encountered".to_owned(),
        };
        let fault = call(700).in_step(3, || "16 tokens of 4 sequences".to_owned());
        insta::assert_snapshot!(fault, @"the GPU failed in step 3 (16 tokens of 4 sequences): CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered; its context is lost, so nothing more can run in this process. Run it again; if it happens again, run it under `compute-sanitizer` to see which kernel and address, and report it");
        assert_eq!(call(2).in_step(3, String::new), call(2));
    }
}
