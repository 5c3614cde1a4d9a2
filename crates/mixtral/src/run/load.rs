//! Loads one rank's part of an engine, on any backend.

use std::borrow::Cow;
use std::sync::Arc;

use anyhow::{Context, Result};
use mixtral_comm::World;
use mixtral_cpu::{CpuBackend, CpuOptions};
use mixtral_cuda::{CudaOptions, KvBlocks, Loading};
use mixtral_engine::{BackendError, Collectives, EngineDir, Inspect, MappedWeights, Program, Weights, WeightsKind};
use mixtral_kernels::{Executable, Schedule, Target};
use mixtral_model::Rank;
use mixtral_runtime::ranks::RankCollectives;

use super::cache::{self, Wanted};
use super::gpus::Share;
use super::machine;
use super::place::Place;
use crate::args::place::PlaceArgs;
use crate::kernels::{Plugins, kernel_options};
use crate::say;

/// Part of the GPU's free memory that the cache gets when no part is asked for.
const DEFAULT_KV_CACHE_FRACTION: f32 = 0.9;

/// How every rank loads its part of the engine.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions<'a> {
    /// Where the engine runs, and how much of that place it may use.
    pub place: PlaceArgs,
    /// Whether to count how many tokens each expert gets.
    pub count_experts: bool,
    /// Whether to time operations.
    pub time_ops: bool,
    /// Whether a GPU captures steps of decodes as graphs.
    pub graphs: bool,
    /// The most tokens that attention sees, by layer and over again; as many as the engine says if it is empty.
    pub windows: &'a [usize],
}

/// A rank's part of an engine.
pub struct Part<'a> {
    /// The engine.
    pub engine: &'a EngineDir,
    /// The rank's program, or its first layers.
    pub program: Program,
    /// Where it runs.
    pub place: &'a Place,
    /// How it is loaded.
    pub options: LoadOptions<'a>,
}

impl Part<'_> {
    /// Loads the part, with a cache of as many blocks as rank 0 wants, if all ranks have room for them. All ranks of a
    /// world call this together, and load at the same time.
    pub fn load(&self, world: Option<&World>, wanted: Wanted) -> Result<Box<dyn Inspect>> {
        let weights = self.weights()?;
        let mapping = &self.engine.config().mapping;
        let ranks = world.map(|world| RankCollectives::new(world, mapping)).transpose()?;
        let ranks = ranks.map(|ranks| Arc::new(ranks) as Arc<dyn Collectives>);
        let LoadOptions { place: args, count_experts, time_ops, graphs, windows } = self.options;
        let wanted = wanted.of_leader(world)?;
        // A window that holds the longest sequence changes nothing.
        let windows: Vec<_> = windows.iter().map(|&n| if n < wanted.longest { n } else { usize::MAX }).collect();
        let mut program = self.program.clone();
        program.narrow_attention(mapping.layers(&self.engine.config().model, Rank(program.rank)).start, &windows);
        let backend: Box<dyn Inspect> = match self.place {
            Place::Cpu(_) => {
                let kv_blocks = cache::agree(world, || self.room_on_host(world, wanted))?;
                let local_ranks = world.map_or(1, World::local_size);
                let threads = args.threads.unwrap_or_else(|| (machine::cores() / local_ranks).max(1));
                let cpu = CpuOptions { kv_blocks, threads, count_experts, time_ops, isa: None };
                let backend = CpuBackend::load(program, weights, cpu)?;
                Box::new(if let Some(ranks) = ranks { backend.with_ranks(ranks) } else { backend })
            }
            Place::Cuda(share, executable) => {
                let Share { device, ranks: sharing, .. } = share;
                let named = |error: BackendError| match error {
                    BackendError::Peer(_) => anyhow::Error::new(error),
                    _ if world.is_none() => anyhow::Error::new(error),
                    _ => anyhow::Error::new(error)
                        .context(format!("GPU {} ({}) of rank {}", device.ordinal, device.name, self.program.rank)),
                };
                let device = device.ordinal;
                let cuda = CudaOptions {
                    device,
                    count_experts,
                    time_ops,
                    graphs,
                    sharing: *sharing,
                    ..CudaOptions::default()
                };
                let executable = self.executable(&program, executable)?;
                let loading = Loading::new(program, &weights, &executable, cuda).map_err(named)?;
                let of_free = args.kv_cache_free_gpu_mem_fraction.unwrap_or(DEFAULT_KV_CACHE_FRACTION);
                let Wanted { most: at_most, least: at_least, .. } = wanted;
                let kv_blocks = cache::agree(world, || {
                    loading.kv_blocks(KvBlocks::Fraction { of_free, at_least, at_most }).map_err(named)
                })?;
                let backend = loading.finish(kv_blocks, ranks).map_err(named)?;
                if let Some(links) = backend.links() {
                    say::detail(links);
                }
                Box::new(backend)
            }
        };
        if let Some(world) = world {
            // A rank that cannot load fails before this barrier, so no rank computes without it.
            world.everyone()?.barrier()?;
        }
        Ok(backend)
    }

    /// What a GPU runs of `program`: what the engine holds, or with kernels that are compiled now if its attention was narrowed.
    fn executable<'e>(&self, program: &Program, held: &'e Executable) -> Result<Cow<'e, Executable>> {
        if *program == self.program {
            return Ok(Cow::Borrowed(held));
        }
        let schedule = Schedule::new(program, Target { family: held.images.code.family() })?;
        let kernels = kernel_options(Vec::new(), Plugins::of(&self.engine.config().options), None);
        let executable = say::timed("kernels for a narrower attention", || {
            kernels.executable(schedule, held.images.clone()).context(
                "--max-attention-window-size: a GPU needs kernels for it, which this engine does not hold; install NVRTC, leave the flag out, or run with --backend cpu",
            )
        })?;
        Ok(Cow::Owned(executable))
    }

    /// Where the weights come from.
    pub fn weights(&self) -> Result<Weights> {
        Ok(match self.engine.config().weights {
            WeightsKind::File => {
                let file = self.engine.weight_file(Rank(self.program.rank))?;
                if matches!(self.place, Place::Cpu(_)) {
                    // The CPU backend reads the file where it lies.
                    file.map()?;
                }
                Weights::Source(Arc::new(MappedWeights(file)))
            }
            WeightsKind::Dummy { seed } => Weights::Dummy { seed },
        })
    }

    /// As many of the wanted blocks as the memory of this host has room for. The first rank of a host measures for all that
    /// run there.
    fn room_on_host(&self, world: Option<&World>, wanted: Wanted) -> Result<usize> {
        let is_first = world.is_none_or(|world| world.local_rank() == 0);
        let Some(available) = machine::available_memory().filter(|_| is_first) else { return Ok(wanted.most) };
        let mut plans = vec![self.program.memory_plan()];
        for rank in world.iter().flat_map(|world| world.local_ranks()).filter(|&rank| rank != self.program.rank) {
            plans.push(self.engine.program(Rank(rank))?.memory_plan());
        }
        cache::room_on_host(available, &plans, self.engine.config().weights, &self.program.limits, wanted)
    }
}
