//! One instantiation of a kernel template: what NVRTC is asked to compile.

use std::borrow::Cow;

use crate::Family;

/// A `__global__` template with all its arguments given.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kernel {
    /// The header that defines it, below `kernels/`.
    pub header: Cow<'static, str>,
    /// Its name expression, which NVRTC instantiates, e.g. `norm::rms_norm<bf16_t, 4096>`.
    pub symbol: String,
    /// Threads of a CTA.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    /// The lowest family whose architectures can run it. A portable kernel is compiled for Hopper too.
    pub family: Family,
}
