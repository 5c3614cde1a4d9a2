//! Runs an engine's ranks from start to end: rank 0 leads and the others follow it.

use std::fmt;
use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use mixtral_build::Roof;
use mixtral_build::explain::bytes;
use mixtral_comm::World;
use mixtral_cpu::{CpuBackend, CpuOptions};
use mixtral_cuda::{CudaBackend, CudaOptions, Device, KvBlocks};
use mixtral_engine::{Backend, EngineDir, Inspect, MappedWeights, Program, Weights, WeightsKind};
use mixtral_kernels::{Code, Executable};
use mixtral_model::Rank;
use mixtral_runtime::ranks::{Driver, RankCollectives, follow};
use mixtral_runtime::session::Capabilities;
use mixtral_runtime::{Executor, Local, Request, Session, Tokenizer};

use super::{machine, ranks};
use crate::args::build::BackendChoice;
use crate::say;

/// Part of the GPU's free memory that the cache gets when no part is asked for.
const DEFAULT_KV_CACHE_FRACTION: f32 = 0.9;

/// How every rank loads its part of the engine.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// Where the engine runs.
    pub backend: BackendChoice,
    /// Part of the GPU's free memory for the cache, 0 to 1.
    pub kv_cache_fraction: Option<f32>,
    /// Workers of each rank. When absent, the ranks share all cores of the host evenly.
    pub threads: Option<usize>,
    /// Whether to count how many tokens each expert gets.
    pub count_experts: bool,
    /// Whether to time operations.
    pub time_ops: bool,
}

/// What rank 0 leads the others with.
pub struct Job<'a> {
    engine: &'a EngineDir,
    world: Option<&'a World>,
    options: LoadOptions,
    place: &'a Place,
    program: Program,
}

/// Where an engine runs.
pub enum Place {
    /// On this many threads of the host.
    Cpu(usize),
    /// On a GPU, with the schedule and kernels that it runs.
    Cuda(Device, Box<Executable>),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Cpu(threads) => write!(f, "{threads} threads"),
            Place::Cuda(device, executable) => write!(f, "{} ({})", device.name, executable.images.code),
        }
    }
}

impl Place {
    /// Chooses where to run an engine: where the user asks, else on a GPU if the engine has kernels for one.
    pub fn choose(engine: &EngineDir, backend: BackendChoice, threads: Option<usize>) -> Result<Place> {
        let codes: Vec<Code> = engine.images(Rank(0))?.into_iter().filter_map(Code::of_image).collect();
        if backend == BackendChoice::Cpu || backend == BackendChoice::Auto && codes.is_empty() {
            return Ok(Place::Cpu(threads.unwrap_or_else(machine::cores)));
        }
        if codes.is_empty() {
            bail!(
                "the engine was built for the CPU alone; build it again with --arch (sm_80, sm_90a, …), or use --backend cpu"
            );
        }
        let world_size = engine.config().mapping.world_size();
        if world_size > 1 {
            bail!(
                "the engine has {world_size} ranks, and this version runs engines of one on GPUs; use --backend cpu, or convert with --tp-size 1 --pp-size 1"
            );
        }
        let device = mixtral_cuda::devices()?.swap_remove(0);
        let code = mixtral_cuda::choose(&device, &codes)?;
        let executable = Executable::read(engine, Rank(0), &engine.program(Rank(0))?, code)?;
        Ok(Place::Cuda(device, Box::new(executable)))
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
            Place::Cuda(device, executable) => {
                let bytes = if quick { mixtral_cuda::probe::QUICK } else { mixtral_cuda::probe::THOROUGH };
                let probe = mixtral_cuda::probe::measure(device.ordinal, executable, bytes)?;
                Ok(Roof { bytes_per_s: probe.read_bytes_per_s, flops_per_s: probe.flops_per_s })
            }
        })
    }
}

/// Runs the engine's ranks. Rank 0 runs `lead`; the others follow its session until it ends.
pub fn run(engine: &EngineDir, options: LoadOptions, lead: impl Fn(&Job<'_>) -> Result<()> + Sync) -> Result<()> {
    let place = Place::choose(engine, options.backend, options.threads)?;
    match place {
        Place::Cpu(_) if options.kv_cache_fraction.is_some() => {
            say::warning(
                "--kv-cache-free-gpu-mem-fraction changes nothing on the CPU, whose cache is as large as the requests need",
            );
        }
        Place::Cuda(..) if options.threads.is_some() => say::warning("--threads changes nothing on a GPU"),
        _ => {}
    }
    say::detail(format_args!("engine {}: {} on {place}", engine.dir().display(), engine.config().run_id));
    ranks::run(engine.config(), |world| match world {
        Some(world) if world.rank() > 0 => {
            let kv_blocks = agree_on_blocks(Some(world), 0)?;
            let mut backend = load(engine, options, Some(world), kv_blocks)?;
            Ok(follow(world, engine.config().mapping, &mut backend)?)
        }
        world => lead(&Job { engine, world, options, place: &place, program: engine.program(Rank(0))? }),
    })
}

impl Job<'_> {
    /// What the engine accepts.
    pub fn capabilities(&self) -> Capabilities {
        Capabilities {
            limits: self.program.limits,
            vocab_size: self.program.vocab_size,
            gather_context_logits: self.engine.config().gather_context_logits,
        }
    }

    /// Rank 0's program.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Where the engine runs.
    pub fn place(&self) -> &Place {
        self.place
    }

    /// Loads the engine on all ranks, with a cache for `requests`. Called once in a job.
    pub fn session(&self, requests: &[Request], tokenizer: Option<Arc<Tokenizer>>) -> Result<Session> {
        let wanted = wanted_blocks(self.engine, requests);
        let backend: Box<dyn Backend> = match self.place {
            Place::Cpu(_) => {
                let wanted = kv_blocks(self.engine, self.world.map_or(1, World::local_size), wanted)?;
                let blocks = agree_on_blocks(self.world, wanted)?;
                Box::new(load(self.engine, self.options, self.world, blocks)?)
            }
            Place::Cuda(device, executable) => {
                let LoadOptions { kv_cache_fraction, count_experts, time_ops, .. } = self.options;
                let Blocks { most: at_most, least: at_least } = wanted;
                let cuda = CudaOptions { device: device.ordinal, count_experts, time_ops, ..CudaOptions::default() };
                let of_free = kv_cache_fraction.unwrap_or(DEFAULT_KV_CACHE_FRACTION);
                let kv_blocks = KvBlocks::Fraction { of_free, at_least, at_most };
                let weights = weights(self.engine, Rank(0), false)?;
                Box::new(CudaBackend::load(self.program.clone(), &weights, executable, kv_blocks, cuda)?)
            }
        };
        let executor: Box<dyn Executor> = match self.world {
            None => Box::new(Local::new(backend)),
            Some(world) => Box::new(Driver::new(world, self.engine.config().mapping, backend)?),
        };
        Ok(Session::new(executor, self.capabilities(), tokenizer))
    }
}

/// Makes all ranks load equally many blocks of cache: rank 0 tells the others how many.
fn agree_on_blocks(world: Option<&World>, blocks: usize) -> Result<usize> {
    let Some(world) = world else { return Ok(blocks) };
    let mut message = (blocks as u64).to_le_bytes().to_vec();
    world.everyone()?.broadcast(0, &mut message)?;
    let bytes = message.try_into().map_err(|_| anyhow!("rank 0 did not say how large the cache is"))?;
    Ok(usize::try_from(u64::from_le_bytes(bytes))?)
}

/// Where a rank's weights come from. With `in_place` the backend will read the weight file where it lies, so the file
/// is mapped now.
fn weights(engine: &EngineDir, rank: Rank, in_place: bool) -> Result<Weights> {
    Ok(match engine.config().weights {
        WeightsKind::File => {
            let file = engine.weight_file(rank)?;
            if in_place {
                file.map()?;
            }
            Weights::Source(Arc::new(MappedWeights(file)))
        }
        WeightsKind::Dummy { seed } => Weights::Dummy { seed },
    })
}

/// Loads this rank's part of the engine on the CPU.
fn load(engine: &EngineDir, options: LoadOptions, world: Option<&World>, kv_blocks: usize) -> Result<CpuBackend> {
    let rank = Rank(world.map_or(0, World::rank));
    let weights = weights(engine, rank, true)?;
    let local_ranks = world.map_or(1, World::local_size);
    let threads = options.threads.unwrap_or_else(|| (machine::cores() / local_ranks).max(1));
    let LoadOptions { count_experts, time_ops, .. } = options;
    let cpu = CpuOptions { kv_blocks, threads, count_experts, time_ops, isa: None };
    let backend = CpuBackend::load(engine.program(rank)?, weights, cpu)?;
    let Some(world) = world else { return Ok(backend) };
    let backend = backend.with_ranks(Arc::new(RankCollectives::new(world, &engine.config().mapping)?));
    // A rank that cannot load fails before this barrier, so no rank computes without it.
    world.everyone()?.barrier()?;
    Ok(backend)
}

/// Loads the program of an engine of one rank, or the program's first layers, as a backend that can be looked into.
pub fn load_alone(engine: &EngineDir, place: &Place, program: Program, kv_blocks: usize) -> Result<Box<dyn Inspect>> {
    let weights = weights(engine, Rank(0), matches!(place, Place::Cpu(_)))?;
    match place {
        Place::Cpu(threads) => {
            let plan = program.memory_plan();
            // Mapped weights lie in the page cache, which the system can free. Dummy weights are allocated.
            let mapped = if matches!(weights, Weights::Source(_)) { plan.weights } else { 0 };
            let needed = plan.total(kv_blocks).saturating_sub(mapped);
            if let Some(available) = machine::available_memory().filter(|&available| available < needed) {
                bail!(
                    "{} needs {} of memory, of which {} are available; compare fewer --layers, or shorter prompts",
                    engine.dir().display(),
                    bytes(needed),
                    bytes(available)
                );
            }
            let cpu = CpuOptions { kv_blocks, threads: *threads, ..CpuOptions::default() };
            Ok(Box::new(CpuBackend::load(program, weights, cpu)?))
        }
        Place::Cuda(device, executable) => {
            let whole = engine.program(Rank(0))?;
            let schedule = match program == whole {
                true => Some(executable.schedule.clone()),
                false => executable.schedule.first_layers(&whole, &program),
            };
            let schedule = schedule.ok_or_else(|| anyhow!("the engine's schedule cannot be cut to fewer --layers"))?;
            let executable = Executable { schedule, images: executable.images.clone() };
            let kv_blocks = KvBlocks::Exactly(kv_blocks);
            let cuda = CudaOptions { device: device.ordinal, graphs: false, ..CudaOptions::default() };
            Ok(Box::new(CudaBackend::load(program, &weights, &executable, kv_blocks, cuda)?))
        }
    }
}

/// Blocks of the cache for as many of the requests at a time as the engine's batch allows.
pub fn most_blocks(engine: &EngineDir, requests: &[Request]) -> usize {
    wanted_blocks(engine, requests).most
}

/// Blocks of the cache that requests ask for.
#[derive(Clone, Copy)]
struct Blocks {
    /// For as many requests at a time as the engine's batch allows.
    most: usize,
    /// For the longest request.
    least: usize,
}

fn wanted_blocks(engine: &EngineDir, requests: &[Request]) -> Blocks {
    let limits = engine.config().limits;
    // A request that is longer than the engine's sequences is refused later, when it is submitted.
    let tokens = |r: &Request| r.prompt.len().saturating_add(r.max_output_len);
    let mut needs: Vec<usize> =
        requests.iter().map(|r| limits.blocks_for(tokens(r)).min(limits.max_blocks_per_seq())).collect();
    needs.sort_unstable_by(|a, b| b.cmp(a));
    let least = needs.first().copied().unwrap_or(1).max(1);
    Blocks { most: needs.iter().take(limits.max_batch_size).sum::<usize>().max(least), least }
}

/// As many of the wanted blocks as the memory of this host has room for. This is checked before anything is allocated.
fn kv_blocks(engine: &EngineDir, local_ranks: usize, wanted: Blocks) -> Result<usize> {
    let Blocks { most, least } = wanted;
    let Some(available) = machine::available_memory() else { return Ok(most) };
    let is_file = engine.config().weights == WeightsKind::File;
    let (mut fixed, mut block, mut dummies) = (0usize, 0usize, 0usize);
    for rank in engine.config().mapping.ranks().take(local_ranks) {
        let plan = engine.program(rank)?.memory_plan();
        // Mapped weights lie in the page cache, which the system can free. Dummy weights are allocated.
        let weights = if is_file { 0 } else { plan.weights };
        fixed = fixed.saturating_add(plan.total(0) - plan.weights).saturating_add(weights);
        block = block.saturating_add(plan.kv_block);
        dummies = dummies.saturating_add(weights);
    }
    let room = available.saturating_sub(fixed) / block.max(1);
    if dummies > available {
        bail!(
            "the dummy weights alone need {}, but {} of memory are available, and they cannot be paged out; use a machine with more memory, or build a smaller model (--model-config)",
            bytes(dummies),
            bytes(available)
        );
    }
    if room < least {
        bail!(
            "the engine needs {} for {}activations and inputs and {} for the KV cache of the longest prompt, but {} of memory are available; lower --max-output-len, or build with a smaller --max-num-tokens (now {})",
            bytes(fixed),
            if is_file { "" } else { "dummy weights, " },
            bytes(least.saturating_mul(block)),
            bytes(available),
            engine.config().limits.max_num_tokens,
        );
    }
    Ok(most.min(room))
}
