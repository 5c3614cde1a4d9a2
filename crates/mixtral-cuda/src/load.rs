//! Loads a program onto a GPU in two steps: first its kernels, then everything else. In between, the ranks of a job
//! agree on the size of the cache.

use std::collections::VecDeque;
use std::sync::Arc;

use mixtral_engine::{BackendError, Collectives, Program, Weights};
use mixtral_kernels::lower::dummy;
use mixtral_kernels::plan::LAST_RUNG;
use mixtral_kernels::{Executable, Launch, Schedule, StepBlock, Work};

use crate::CudaError;
use crate::backend::CudaBackend;
use crate::budget::{KvBlocks, Needs};
use crate::driver::{Context, DeviceMemory, Stream};
use crate::exchange::Exchange;
use crate::execute::{Addresses, Functions, Shape, Timer, WorkList};
use crate::flight::Turns;
use crate::moves::HostBlocks;
use crate::staging::{Matrix, Queue};
use crate::weights::{self, Targets};

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
    /// Whether steps of few tokens are captured as graphs.
    pub graphs: bool,
    /// Whether a kernel may start while its predecessor still runs. This needs a GPU and a kernel that allow it.
    pub overlap: bool,
    /// Whether ranks map each other's memory where they can. Otherwise NCCL carries everything, as between hosts.
    pub maps: bool,
}

impl Default for CudaOptions {
    /// GPU 0 for one rank alone, and everything that makes steps fast.
    fn default() -> Self {
        let (graphs, overlap, maps) = (true, true, true);
        CudaOptions { device: 0, sharing: 1, count_experts: false, time_ops: false, graphs, overlap, maps }
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
        for work in schedule.regimes.iter().flat_map(|(_, work)| work) {
            functions.load(work)?;
        }
        let packs = schedule.packs.iter().map(|pack| &pack.launch.kernel);
        let fills = schedule.fills.iter().map(|(_, launch)| &launch.kernel);
        for kernel in packs.chain(fills) {
            functions.get(kernel)?;
        }
        let needs = Needs::new(&program, schedule);
        Ok(Loading { program, source, schedule, options, context, stream, functions, needs })
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
        let Loading { program, source, schedule, options, context, stream, mut functions, needs } = self;
        let block = schedule.block.clone();
        let memory = Memory::new(&context, &stream, &needs, &program, schedule, kv_blocks, options.count_experts)?;
        let exchange = match (&schedule.exchange, ranks) {
            (None, _) => None,
            (Some(sizes), Some(ranks)) => Some(Exchange::new(&context, &program, sizes, ranks, options.maps)?),
            (Some(_), None) => {
                let alone = format!("rank {} of {} was loaded without the others", program.rank, program.world_size);
                return Err(BackendError::Other(alone));
            }
        };
        let (starts, weight_bytes) = weights::layout(&program, schedule);
        let addresses = memory.addresses(&program, kv_blocks, &starts, &block, exchange.as_ref());
        let queue = Queue::new(&program, schedule);
        // Runs launches one after another, and waits for them.
        let mut run = |launches: Vec<Launch>| -> Result<(), BackendError> {
            let works: Vec<Work> = launches.into_iter().map(Work::Launch).collect();
            let list = WorkList::new(&works, &mut functions, &addresses, &|_| None)?;
            list.run(&stream, Shape { tokens: 0, logits: 0 }, &(0..usize::MAX), false)?;
            Ok(stream.synchronize()?)
        };
        let pack = |matrix: &Matrix, start| {
            let pack =
                schedule.pack(matrix.weight).map(|pack| pack.of_matrix(matrix.weight, matrix.expert, matrix.at(start)));
            pack.ok_or_else(|| BackendError::Other("a weight without a kernel that packs it".to_owned()))
        };
        match source {
            Weights::Source(source) => {
                let targets =
                    Targets { weights: &memory.weights, starts: &starts, staging: &memory.cache, queue: &queue };
                weights::upload(&program, source.as_ref(), &context, &targets, |matrix, start| {
                    run(vec![pack(matrix, start)?])
                })?;
            }
            Weights::Dummy { seed } => {
                let none =
                    |fill| BackendError::Other(format!("the engine has no kernel that fills weights with {fill:?}"));
                // Parts of a weight that no piece covers are zero.
                stream.fill(&memory.weights, 0, weight_bytes, 0)?;
                run(dummy::launches(&program, &schedule.fills, *seed).map_err(none)?)?;
                for matrix in queue.matrices() {
                    stream.fill(&memory.cache, 0, queue.bytes(), 0)?;
                    let weight = &program.weights[matrix.weight];
                    let (rows, at) = (matrix.rows.clone(), matrix.at(0));
                    let mut launches = dummy::of_matrix(weight, &schedule.fills, *seed, rows, at).map_err(none)?;
                    launches.push(pack(matrix, 0)?);
                    run(launches)?;
                }
            }
        }
        // The cache held matrices until now.
        stream.fill(&memory.cache, 0, queue.bytes(), 0)?;
        stream.synchronize()?;

        let overlap = options.overlap && options.sharing <= 1 && context.device().capability >= OVERLAPS;
        let mut work = Vec::with_capacity(schedule.regimes.len());
        let carried = |launch: &Launch| exchange.as_ref()?.transfer(&program, schedule, launch);
        for (regime, works) in &schedule.regimes {
            let mut list = WorkList::new(works, &mut functions, &addresses, &carried)?;
            // For more tokens, the GPU takes longer than the host does for the launches.
            let is_small = regime.max_tokens <= LAST_RUNG && list.is_of_kernels();
            if (regime.decodes || is_small) && options.graphs && !options.time_ops {
                list.capture(&stream, *regime, program.limits.max_num_logits, overlap)?;
            }
            work.push((*regime, list));
        }
        Ok(CudaBackend {
            work,
            timer: options.time_ops.then(|| Timer::new(&context, program.ops.len())).transpose()?,
            turns: Turns::new(&context, &block)?,
            flights: VecDeque::new(),
            num_drawn: 0,
            known_draws: Vec::new(),
            stream,
            exchange,
            memory,
            host_blocks: HostBlocks::new(),
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
    kv_blocks * kv.num_kv_heads * program.limits.block_size * kv.head_dim * kv.elem().size()
}

/// What is allocated on the device.
pub(crate) struct Memory {
    pub(crate) weights: DeviceMemory,
    pub(crate) arena: DeviceMemory,
    pub(crate) cache: DeviceMemory,
    pub(crate) scratch: DeviceMemory,
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
            cache: zeroed((needs.kv_block * kv_blocks).max(needs.staging))?,
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
        kv_blocks: usize,
        starts: &[usize],
        block: &StepBlock,
        exchange: Option<&Exchange>,
    ) -> Addresses {
        let half = half_layer(program, kv_blocks);
        let at = |memory: &DeviceMemory, offset: usize| memory.address() + offset as u64;
        Addresses {
            buffers: program.buffers.iter().map(|b| at(&self.arena, b.offset)).collect(),
            weights: starts.iter().map(|&start| at(&self.weights, start)).collect(),
            cache: (0..program.kv.num_layers)
                .map(|layer| [at(&self.cache, 2 * layer * half), at(&self.cache, (2 * layer + 1) * half)])
                .collect(),
            kv_scales: program.kv_scales.clone(),
            cache_rows: (half / (program.kv.head_dim * program.kv.elem().size()).max(1)) as u64,
            step: self.step.address(),
            block: block.clone(),
            scratch: self.scratch.address(),
            staging: self.cache.address(),
            exchange: exchange.map(Exchange::words),
            counts: self.counts.as_ref().map(|counts| (counts.address(), program.num_experts)),
        }
    }
}
