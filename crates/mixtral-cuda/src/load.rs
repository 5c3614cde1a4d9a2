//! Loads a program onto a GPU in two steps: first its kernels, then everything else. In between, the ranks of a job
//! agree on the size of the cache.

use std::sync::Arc;

use mixtral_engine::{BackendError, Collectives, Program, Weights};
use mixtral_kernels::lower::dummy;
use mixtral_kernels::step_block::Array;
use mixtral_kernels::{Executable, Schedule, StepBlock, Work};

use crate::backend::CudaBackend;
use crate::budget::{KvBlocks, Needs};
use crate::driver::{Context, DeviceMemory, Pinned, Stream};
use crate::exchange::Exchange;
use crate::execute::{Addresses, Functions, Shape, Timer, WorkList};
use crate::{CudaError, weights};

/// How to load a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// The GPU, counted from 0 over those that are visible.
    pub device: usize,
    /// Ranks that share the GPU, this one included. If there are more than one, nothing overlaps, and kernels that wait
    /// for other ranks leave room for those ranks' kernels.
    pub sharing: usize,
    /// Whether to count tokens for [`expert_counts`](mixtral_engine::Backend::expert_counts).
    pub count_experts: bool,
    /// Whether to measure for [`op_times`](mixtral_engine::Backend::op_times). Launches are then neither captured nor
    /// overlapped.
    pub time_ops: bool,
    /// Whether steps of decodes are captured as graphs.
    pub graphs: bool,
    /// Whether a kernel may start while its predecessor still runs. This needs a GPU and a kernel that allow it.
    pub overlap: bool,
}

impl Default for CudaOptions {
    /// GPU 0 for one rank alone, and everything that makes steps fast.
    fn default() -> Self {
        CudaOptions { device: 0, sharing: 1, count_experts: false, time_ops: false, graphs: true, overlap: true }
    }
}

/// The lowest compute capability on which kernels can overlap.
const OVERLAPS: u32 = 90;

/// A program that is half loaded onto a GPU: its kernels are loaded, but its memory is not yet allocated.
pub struct Loading<'a> {
    program: Program,
    source: &'a Weights,
    schedule: &'a Schedule,
    options: CudaOptions,
    context: Context,
    stream: Stream,
    functions: Functions<'a>,
    fills: Vec<Work>,
    needs: Needs,
}

impl<'a> Loading<'a> {
    /// Checks a program and its schedule, and loads the kernels.
    ///
    /// # Errors
    /// A program or a schedule that does not pass its check; no driver or GPU; kernels that the GPU cannot run.
    pub fn new(
        program: Program,
        source: &'a Weights,
        executable: &'a Executable,
        options: CudaOptions,
    ) -> Result<Self, BackendError> {
        program.check().map_err(|e| BackendError::Other(e.to_string()))?;
        let schedule = &executable.schedule;
        schedule.check(&program).map_err(|e| BackendError::Other(e.to_string()))?;
        let context = Context::new(options.device)?;
        let stream = Stream::new(&context)?;
        let mut functions = Functions::new(&executable.images, &context, options.sharing);
        let fills: Vec<Work> = match source {
            Weights::Dummy { seed } => {
                let fills = dummy::launches(&program, &schedule.fills, *seed);
                let none = |dtype| BackendError::Other(format!("the engine has no kernel that fills {dtype} weights"));
                fills.map_err(none)?.into_iter().map(Work::Launch).collect()
            }
            Weights::Source(_) => Vec::new(),
        };
        for work in schedule.regimes.iter().flat_map(|(_, work)| work).chain(&fills) {
            functions.load(work)?;
        }
        let needs = Needs::new(&program, schedule);
        Ok(Loading { program, source, schedule, options, context, stream, functions, fills, needs })
    }

    /// The blocks of cache that fit beside everything else, but at most as many as are wanted. The free memory is
    /// divided among the ranks that share the GPU. Kernels take memory too, so all these ranks must have loaded theirs,
    /// and none may have allocated anything.
    ///
    /// # Errors
    /// Too little memory.
    pub fn kv_blocks(&self, wanted: KvBlocks) -> Result<usize, BackendError> {
        let free = self.context.free_memory()? / self.options.sharing.max(1);
        Ok(self.needs.kv_blocks(free, wanted)?)
    }

    /// Allocates everything, copies the weights to the device, and captures the graphs. With `ranks`, all ranks of the
    /// job must call this, and they find each other's memory.
    ///
    /// # Errors
    /// A program of several ranks without `ranks`; memory that another program took meanwhile; GPUs that cannot reach
    /// each other; a missing or wrong weight; kernels that take other parameters than the schedule passes.
    pub fn finish(self, kv_blocks: usize, ranks: Option<Arc<dyn Collectives>>) -> Result<CudaBackend, BackendError> {
        let Loading { program, source, schedule, options, context, stream, mut functions, fills, needs } = self;
        let block = schedule.block.clone();
        let memory = Memory::new(&context, &stream, &needs, &program, schedule, kv_blocks, options.count_experts)?;
        let exchange = match (&schedule.exchange, ranks) {
            (None, _) => None,
            (Some(sizes), Some(ranks)) => Some(Exchange::new(&context, &program, sizes, ranks)?),
            (Some(_), None) => {
                let alone = format!("rank {} of {} was loaded without the others", program.rank, program.world_size);
                return Err(BackendError::Other(alone));
            }
        };
        let (starts, weight_bytes) = weights::layout(&program);
        let addresses = memory.addresses(&program, &starts, &block, exchange.as_ref());
        match source {
            Weights::Source(source) => {
                weights::upload(&program, source.as_ref(), &context, &memory.weights, &starts)?;
            }
            Weights::Dummy { .. } => {
                // Parts of a weight that no piece covers are zero.
                stream.fill(&memory.weights, 0, weight_bytes, 0)?;
                let shape = Shape { tokens: 0, logits: 0 };
                let fills = WorkList::new(&fills, &mut functions, &addresses)?;
                fills.run(&stream, shape, &(0..usize::MAX), false)?;
                stream.synchronize()?;
            }
        }

        let overlap = options.overlap && options.sharing <= 1 && context.device().capability >= OVERLAPS;
        let mut work = Vec::with_capacity(schedule.regimes.len());
        for (regime, works) in &schedule.regimes {
            let mut list = WorkList::new(works, &mut functions, &addresses)?;
            if regime.decodes && options.graphs && !options.time_ops {
                list.capture(&stream, *regime, overlap)?;
            }
            work.push((*regime, list));
        }
        let draws = block.capacity(Array::Drawn);
        Ok(CudaBackend {
            work,
            timer: options.time_ops.then(|| Timer::new(&context, program.ops.len())).transpose()?,
            staging: Pinned::new(&context, block.bytes())?,
            landing: Pinned::new(&context, draws)?,
            stream,
            exchange,
            memory,
            program,
            block,
            kv_blocks,
            overlap,
            steps: 0,
            lost: None,
            context,
        })
    }
}

/// Bytes of a layer's keys, which are also the bytes of its values.
pub(crate) fn half_layer(program: &Program, kv_blocks: usize) -> usize {
    let kv = program.kv;
    kv_blocks * kv.num_kv_heads * program.limits.block_size * kv.head_dim * kv.dtype.size()
}

/// What is allocated on the device.
pub(crate) struct Memory {
    pub(crate) weights: DeviceMemory,
    pub(crate) arena: DeviceMemory,
    pub(crate) cache: DeviceMemory,
    scratch: DeviceMemory,
    pub(crate) step: DeviceMemory,
    pub(crate) counts: Option<DeviceMemory>,
}

impl Memory {
    fn new(
        context: &Context,
        stream: &Stream,
        needs: &Needs,
        program: &Program,
        schedule: &Schedule,
        kv_blocks: usize,
        count_experts: bool,
    ) -> Result<Memory, CudaError> {
        let counters = 8 * program.num_layers * program.num_experts;
        let zeroed = |len: usize| {
            let memory = DeviceMemory::new(context, len)?;
            stream.fill(&memory, 0, len, 0)?;
            Ok::<_, CudaError>(memory)
        };
        let memory = Memory {
            weights: DeviceMemory::new(context, needs.weights)?,
            arena: zeroed(needs.arena)?,
            cache: zeroed(needs.kv_block * kv_blocks)?,
            scratch: zeroed(schedule.scratch_bytes)?,
            step: zeroed(schedule.block.bytes())?,
            counts: count_experts.then(|| zeroed(counters)).transpose()?,
        };
        stream.synchronize()?;
        Ok(memory)
    }

    fn addresses(
        &self,
        program: &Program,
        starts: &[usize],
        block: &StepBlock,
        exchange: Option<&Exchange>,
    ) -> Addresses {
        let half = half_layer(program, self.cache.len() / program.kv.block_bytes(program.limits.block_size).max(1));
        let at = |memory: &DeviceMemory, offset: usize| memory.address() + offset as u64;
        Addresses {
            buffers: program.buffers.iter().map(|b| at(&self.arena, b.offset)).collect(),
            weights: starts.iter().map(|&start| at(&self.weights, start)).collect(),
            cache: (0..program.kv.num_layers)
                .map(|layer| [at(&self.cache, 2 * layer * half), at(&self.cache, (2 * layer + 1) * half)])
                .collect(),
            cache_rows: (half / (program.kv.head_dim * program.kv.dtype.size()).max(1)) as u64,
            step: self.step.address(),
            block: block.clone(),
            scratch: self.scratch.address(),
            exchange: exchange.map(Exchange::words),
            counts: self.counts.as_ref().map(|counts| (counts.address(), program.num_experts)),
        }
    }
}
