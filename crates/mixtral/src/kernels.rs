//! Which kernels a program gets, by the options that its engine records.

use std::collections::BTreeMap;

use mixtral_build::{DenseLinears, KernelOptions};
use mixtral_kernels::{Arch, Cache, Search};

use crate::run::machine;

/// What the plugin flags of a build ask for. Only values that make a difference on a GPU are kept.
#[derive(Clone, Debug, Default)]
pub struct Plugins {
    /// Whether cuBLASLt computes the dense linears of steps of many tokens.
    pub cublaslt: bool,
    /// The flags that ask for portable kernels.
    pub portable: Vec<&'static str>,
}

impl Plugins {
    /// Reads them from the options that an engine records.
    pub fn of(recorded: &BTreeMap<String, String>) -> Self {
        let is = |name: &str, value: &str| recorded.get(name).is_some_and(|found| found == value);
        let tunable = [("gemm_plugin", "--gemm-plugin"), ("moe_plugin", "--moe-plugin")];
        Plugins {
            cublaslt: is("gemm_plugin", "cublaslt"),
            portable: tunable.into_iter().filter(|(name, _)| is(name, "disable")).map(|(_, flag)| flag).collect(),
        }
    }
}

/// The kernels to build.
pub fn kernel_options(archs: Vec<Arch>, plugins: Plugins, workers: Option<usize>) -> KernelOptions {
    KernelOptions {
        archs,
        dense_linears: match plugins.portable.contains(&"--gemm-plugin") {
            true => DenseLinears::Portable,
            false if plugins.cublaslt => DenseLinears::CublasLt,
            false => DenseLinears::Tuned,
        },
        tuned_experts: !plugins.portable.contains(&"--moe-plugin"),
        workers: workers.unwrap_or_else(machine::cores),
        nvrtc: Search::from_environment(),
        cache: Cache::folder_from_environment(),
    }
}
