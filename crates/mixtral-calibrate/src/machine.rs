//! Where calibration computes: on the CPU, or on a GPU with kernels that are compiled for it.

use mixtral_build::KernelOptions;
use mixtral_cpu::{CpuBackend, CpuOptions};
use mixtral_cuda::{CudaBackend, CudaOptions, Device, KvBlocks, choose};
use mixtral_engine::{Backend, BackendError, Program};
use mixtral_kernels::{Code, KernelImages, Schedule, Target};

use crate::error::CalibrateError;
use crate::step;
use crate::weights::Tensors;

/// Where calibration computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Machine {
    /// On the CPU.
    Cpu,
    /// On a GPU.
    Cuda(Box<Gpu>),
}

/// A GPU, and how kernels are compiled for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// The GPU.
    pub device: Device,
    /// The kernels.
    pub kernels: KernelOptions,
}

impl Machine {
    /// Loads a program that runs whole steps, most of them decodes.
    pub(crate) fn load(
        &self,
        mut program: Program,
        tensors: Tensors,
        threads: usize,
    ) -> Result<Box<dyn Backend>, CalibrateError> {
        let kv_blocks = step::blocks(&program.limits);
        Ok(match self {
            Machine::Cpu => {
                let options = CpuOptions { kv_blocks, threads, ..CpuOptions::default() };
                Box::new(CpuBackend::load(program, tensors.in_memory(threads)?, options)?)
            }
            Machine::Cuda(gpu) => {
                let code = gpu.code()?;
                let mut schedule = schedule(&mut program, &gpu.kernels, code)?;
                schedule.keep_largest(true);
                let executable = gpu.kernels.executable(schedule, KernelImages::new(code, None))?;
                let kv_blocks = KvBlocks::Exactly(kv_blocks);
                Box::new(CudaBackend::load(program, &tensors.streamed(), &executable, kv_blocks, gpu.options())?)
            }
        })
    }
}

impl Gpu {
    /// The kind of code that it runs.
    pub(crate) fn code(&self) -> Result<Code, CalibrateError> {
        let codes: Vec<Code> = self.kernels.codes().into_iter().collect();
        Ok(choose(&self.device, &codes).map_err(BackendError::from)?)
    }

    pub(crate) fn options(&self) -> CudaOptions {
        CudaOptions { device: self.device.ordinal, ..CudaOptions::default() }
    }
}

/// Selects the kernels of a program for a kind of code, and lowers it.
pub(crate) fn schedule(program: &mut Program, kernels: &KernelOptions, code: Code) -> Result<Schedule, CalibrateError> {
    kernels.fill_ladders(program);
    Ok(Schedule::new(program, Target { family: code.family() })?)
}
