//! Where a rank runs: on the CPU or on which GPU, with which of the engine's kernels, and what that place can do at most.

use std::fmt;

use anyhow::{Result, anyhow, bail};
use mixtral_build::Roof;
use mixtral_comm::World;
use mixtral_engine::{EngineDir, Program};
use mixtral_kernels::{Code, Executable};
use mixtral_model::Rank;

use super::gpus::{self, Share};
use super::machine;
use crate::args::build::BackendChoice;
use crate::args::place::PlaceArgs;
use crate::say;

/// Where a rank runs.
pub enum Place {
    /// On this many threads of the host.
    Cpu(usize),
    /// On a GPU, with the schedule and kernels that it runs.
    Cuda(Share, Box<Executable>),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Cpu(threads) => write!(f, "{threads} threads"),
            Place::Cuda(Share { device, of, .. }, executable) => {
                let times = if *of > 1 { format!("{of} × ") } else { String::new() };
                write!(f, "{times}{} ({})", device.name, executable.images.code)
            }
        }
    }
}

impl Place {
    /// Chooses where to run a rank's program: where the user asks, else on a GPU if the engine has kernels for one. All ranks
    /// of a world call this together.
    pub fn choose(engine: &EngineDir, program: &Program, world: Option<&World>, args: PlaceArgs) -> Result<Place> {
        let rank = Rank(program.rank);
        let codes: Vec<Code> = engine.images(rank)?.into_iter().filter_map(Code::of_image).collect();
        if args.backend == BackendChoice::Cpu || args.backend == BackendChoice::Auto && codes.is_empty() {
            return Ok(Place::Cpu(args.threads.unwrap_or_else(machine::cores)));
        }
        if codes.is_empty() {
            bail!(
                "the engine was built for the CPU alone; build it again with --arch (sm_80, sm_90a, …), or use --backend cpu"
            );
        }
        let share = gpus::choose(world, args.ranks_per_gpu.unwrap_or(1))?;
        let code = mixtral_cuda::choose(&share.device, &codes)?;
        let executable = Executable::read(engine, rank, program, code)?;
        Ok(Place::Cuda(share, Box::new(executable)))
    }

    /// The same place for the first layers of the program that it was chosen for.
    pub fn first_layers(self, whole: &Program, first: &Program) -> Result<Place> {
        let Place::Cuda(share, mut executable) = self else { return Ok(self) };
        if whole == first {
            return Ok(Place::Cuda(share, executable));
        }
        let schedule = executable.schedule.first_layers(whole, first);
        executable.schedule =
            schedule.ok_or_else(|| anyhow!("the engine's schedule cannot be cut to fewer --layers"))?;
        Ok(Place::Cuda(share, executable))
    }

    /// Measures the highest rates that this place can reach. With `quick` the measurement is short; else it is good
    /// enough to compare the figures of an engine with `weights` bytes of weights to. A rate that cannot be measured is
    /// 0.
    pub fn roof(&self, quick: bool, weights: usize) -> Result<Roof> {
        say::timed("the machine's own rates", || match self {
            Place::Cpu(threads) => {
                let (least, most) = (mixtral_cpu::probe::QUICK, mixtral_cpu::probe::THOROUGH);
                // The probe reads as many bytes as the engine's weights have, within its bounds.
                let bytes = if quick { least } else { weights.clamp(least, most) };
                Ok(machine::roof(mixtral_cpu::probe::measure(*threads, bytes)))
            }
            Place::Cuda(share, executable) => {
                let bytes = if quick { mixtral_cuda::probe::QUICK } else { mixtral_cuda::probe::THOROUGH };
                let probe = mixtral_cuda::probe::measure(share.device.ordinal, executable, bytes)?;
                // The ceiling that figures are compared with is that of 16 bits, for fp8 engines too.
                Ok(Roof {
                    bytes_per_s: probe.read_bytes_per_s,
                    flops_per_s: probe.flops_per_s,
                    fp8_flops_per_s: probe.flops_per_s,
                })
            }
        })
    }
}
