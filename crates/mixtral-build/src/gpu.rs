//! What GPUs can do, as far as it was measured.

use mixtral_kernels::Family;
use mixtral_model::DType;

use crate::Roof;

/// The figures of a GPU from which a step's time is predicted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gpu {
    /// Its name.
    pub name: &'static str,
    /// Bytes that it reads, and operations on 16 and 8 bits that it computes in a second, for as long as a step lasts.
    pub roof: Roof,
    /// What a launch adds to a step, in seconds: the part of its beginning and end during which little is read.
    pub launch_s: f64,
    /// The link to the other GPUs.
    pub link: Link,
}

/// What exchanges rows with other GPUs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Bytes that a GPU sends in a second.
    pub bytes_per_s: f64,
    /// Time from a GPU's write until another GPU has seen it and what belongs to it, in seconds.
    pub latency_s: f64,
}

impl Link {
    /// The time in which every rank of a group sends `bytes` to others and has what they send.
    #[must_use]
    pub fn time(&self, bytes: f64) -> f64 {
        self.latency_s + bytes / self.bytes_per_s
    }
}

/// Rates of reading and computing are those of the tool's `bench` and of products that last (in bursts it computes up to
/// 796 TFLOP/s). That of 8 bits is of a product alone, not of this project's kernels, whose sums were added up as theirs are. The link's rate and latency are those of writes into the other GPU's memory over NVLink. A launch was
/// fitted to decodes of one sequence on one GPU and on two (`docs/perf/ranks.md`).
const H200: Gpu = Gpu {
    name: "an H200",
    roof: Roof { bytes_per_s: 4.43e12, flops_per_s: 670e12, fp8_flops_per_s: 1208e12 },
    launch_s: 2.4e-6,
    link: Link { bytes_per_s: 366e9, latency_s: 1.3e-6 },
};

impl Gpu {
    /// The GPU on which kernels of a family compute in `dtype`. `None` where nothing was measured from which a step could
    /// be predicted.
    #[must_use]
    pub fn of(family: Family, dtype: DType) -> Option<Gpu> {
        (family == Family::Hopper && dtype != DType::F32).then_some(H200)
    }
}
