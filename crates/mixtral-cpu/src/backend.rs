//! Loads a program, and runs steps on it.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mixtral_engine::{Backend, BackendError, Collectives, Inspect, Program, StepInputs, StepOutputs, Weights};
use mixtral_model::TokenId;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::cache::KvCache;
use crate::execute::Machine;
use crate::kernels::linear::Workspace;
use crate::kernels::rope::RopeTable;
use crate::kernels::workers::{ROW_SCRATCH, Workers};
use crate::memory::Memory;
use crate::resolve::{Resolved, resolve};
use crate::simd::{Isa, LANES, Simd};
use crate::weights::WeightTable;

/// How to load a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuOptions {
    /// Blocks of the KV cache. The system commits memory when a block is first written.
    pub kv_blocks: usize,
    /// Workers of the backend's own pool.
    pub threads: usize,
    /// Whether to count tokens for [`Backend::expert_counts`].
    pub count_experts: bool,
    /// Whether to measure for [`Backend::op_times`].
    pub time_ops: bool,
    /// Instruction set of the kernels. When absent, the fastest that this machine has. All give the same bits.
    pub isa: Option<Isa>,
}

impl Default for CpuOptions {
    /// One thread, one block.
    fn default() -> Self {
        CpuOptions { kv_blocks: 1, threads: 1, count_experts: false, time_ops: false, isa: None }
    }
}

/// One rank's program on the CPU.
pub struct CpuBackend {
    program: Program,
    resolved: Resolved,
    weights: WeightTable,
    arena: Memory,
    cache: KvCache,
    work: Workspace,
    scratch: Vec<Mutex<Memory>>,
    pool: ThreadPool,
    simd: Simd,
    counts: Option<Vec<Vec<u64>>>,
    /// Time spent in each operation, if it is measured.
    times: Option<Vec<Duration>>,
    ranks: Option<Arc<dyn Collectives>>,
    /// The tokens that the last step drew.
    drawn: Vec<TokenId>,
}

impl CpuBackend {
    /// Loads a program that passed [`Program::check`]: finds its weights, allocates its arena and cache, starts its
    /// workers. It touches no memory that a step may not need.
    ///
    /// # Errors
    /// A missing or wrong weight, too little memory, an instruction set that this machine lacks, or a program that
    /// this backend cannot run.
    pub fn load(program: Program, weights: Weights, options: CpuOptions) -> Result<CpuBackend, BackendError> {
        program.check().map_err(|e| BackendError::Other(e.to_string()))?;
        if program.kv.dtype != program.dtype {
            let (kv, dtype) = (program.kv.dtype, program.dtype);
            return Err(BackendError::Other(format!("a {kv} cache in a {dtype} program is not supported on the CPU")));
        }
        let simd = match options.isa {
            None => Simd::detect(),
            Some(isa) => {
                let missing = || BackendError::Other(format!("this machine does not have {isa:?}; leave it unset"));
                Simd::new(isa).ok_or_else(missing)?
            }
        };
        let threads = options.threads.max(1);
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("cpu-{i}"))
            .build()
            .map_err(|e| BackendError::Other(format!("could not start {threads} threads: {e}; use fewer")))?;
        let resolved = resolve(&program)?;
        let weights = contained(|| pool.install(|| WeightTable::load(&program, weights, simd)))?;
        let arena = Memory::new("the arena", Some(program.arena_bytes), "build with a smaller --max-num-tokens")?;
        let cache = KvCache::new(program.kv, &program.kv_scales, program.limits.block_size, options.kv_blocks)?;
        let widest = program.buffers.iter().map(|b| b.cols.next_multiple_of(LANES)).max().unwrap_or(0);
        let mut scratch = Vec::with_capacity(threads);
        for _ in 0..threads {
            let mut memory = Memory::empty()?;
            memory.reserve_floats(ROW_SCRATCH * widest)?;
            scratch.push(Mutex::new(memory));
        }
        let counts = options.count_experts.then(|| vec![vec![0; program.num_experts]; program.num_layers]);
        let times = options.time_ops.then(|| vec![Duration::ZERO; program.ops.len()]);
        let work = Workspace::new()?;
        Ok(CpuBackend {
            program,
            resolved,
            weights,
            arena,
            cache,
            work,
            scratch,
            pool,
            simd,
            counts,
            times,
            ranks: None,
            drawn: Vec::new(),
        })
    }

    /// Gives the backend its connection to the other ranks. A program of several ranks needs it.
    #[must_use]
    pub fn with_ranks(mut self, ranks: Arc<dyn Collectives>) -> Self {
        self.ranks = Some(ranks);
        self
    }

    /// Offset of a buffer in the arena, if it has at least `len` bytes.
    fn buffer(&self, name: &str, len: usize) -> Result<usize, BackendError> {
        let missing = || BackendError::Other(format!("there is no buffer `{name}`"));
        let buffer = self.program.buffer(name).ok_or_else(missing)?;
        let size = self.program.max_bytes(buffer);
        if len > size {
            return Err(BackendError::Other(format!("{len} bytes of the {size} of buffer `{name}`")));
        }
        Ok(buffer.offset)
    }

    /// The whole arena. No step may depend on what is in it, so tests fill it with garbage.
    pub fn arena_mut(&mut self) -> &mut [u8] {
        self.arena.bytes_mut()
    }

    fn check_layer(&self, layer: usize) -> Result<(), BackendError> {
        let layers = self.program.kv.num_layers;
        if layer < layers { Ok(()) } else { Err(BackendError::Other(format!("layer {layer} of {layers}"))) }
    }
}

impl Backend for CpuBackend {
    fn step(&mut self, inputs: &StepInputs<'_>) -> Result<StepOutputs, BackendError> {
        self.run_ops(0..self.resolved.ops.len(), inputs)
    }

    fn kv_blocks(&self) -> usize {
        self.cache.blocks()
    }

    fn expert_counts(&self) -> Vec<Vec<u64>> {
        let none = || vec![vec![0; self.program.num_experts]; self.program.num_layers];
        self.counts.clone().unwrap_or_else(none)
    }

    fn op_times(&self) -> Vec<Duration> {
        self.times.clone().unwrap_or_default()
    }
}

impl Inspect for CpuBackend {
    fn program(&self) -> &Program {
        &self.program
    }

    fn boundaries(&self) -> Vec<usize> {
        (0..=self.program.ops.len()).collect()
    }

    fn run_ops(&mut self, ops: Range<usize>, inputs: &StepInputs<'_>) -> Result<StepOutputs, BackendError> {
        inputs.check(&self.program, self.cache.blocks(), self.drawn.len())?;
        let resolved = self.resolved.ops.get(ops.clone()).ok_or_else(|| {
            BackendError::Other(format!("operations {ops:?} of a program of {}", self.resolved.ops.len()))
        })?;
        if ops.start == 0 {
            self.cache.carry_out(&inputs.moves)?;
        }
        let (thetas, head_dim) = (&self.resolved.thetas, self.program.kv.head_dim);
        let mut machine = Machine {
            program: &self.program,
            workers: Workers::new(self.simd, self.program.dtype, &self.scratch),
            inputs,
            token_ids: inputs.known_ids(&self.drawn),
            weights: self.weights.matrices()?,
            rope: thetas.iter().map(|&theta| RopeTable::new(theta, head_dim, &inputs.positions)).collect(),
            arena: self.arena.bytes_mut(),
            cache: &mut self.cache,
            work: &mut self.work,
            counts: self.counts.as_deref_mut(),
            ranks: self.ranks.as_deref(),
            outputs: StepOutputs::default(),
        };
        let (pool, times) = (&self.pool, self.times.as_mut());
        let outputs = contained(move || {
            pool.install(move || {
                match times {
                    None => resolved.iter().try_for_each(|op| machine.run(op))?,
                    Some(times) => resolved.iter().zip(&mut times[ops]).try_for_each(|(op, time)| {
                        let start = Instant::now();
                        let done = machine.run(op);
                        *time += start.elapsed();
                        done
                    })?,
                }
                Ok(machine.outputs)
            })
        })?;
        self.drawn.clone_from(&outputs.tokens);
        Ok(outputs)
    }

    fn read_buffer(&self, name: &str, len: usize) -> Result<Vec<u8>, BackendError> {
        let offset = self.buffer(name, len)?;
        Ok(self.arena.bytes()[offset..][..len].to_vec())
    }

    fn write_buffer(&mut self, name: &str, bytes: &[u8]) -> Result<(), BackendError> {
        let offset = self.buffer(name, bytes.len())?;
        self.arena.bytes_mut()[offset..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn read_cache(&self, layer: usize) -> Result<[Vec<u8>; 2], BackendError> {
        self.check_layer(layer)?;
        let (keys, values) = self.cache.layer(layer);
        Ok([keys.bytes.to_vec(), values.bytes.to_vec()])
    }

    fn write_cache(&mut self, layer: usize, keys: &[u8], values: &[u8]) -> Result<(), BackendError> {
        self.check_layer(layer)?;
        let (k, v) = self.cache.layer_mut(layer);
        for (to, from) in [(k, keys), (v, values)] {
            if from.len() != to.len() {
                return Err(BackendError::Other(format!("{} bytes for the {} of a layer", from.len(), to.len())));
            }
            to.copy_from_slice(from);
        }
        Ok(())
    }
}

/// Runs `f`. A panic in it, on any worker, becomes an error.
fn contained<T>(f: impl FnOnce() -> Result<T, BackendError>) -> Result<T, BackendError> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref().copied());
        let text = text.unwrap_or("no message");
        Err(BackendError::Other(format!("the CPU backend failed: {text}; this is a bug, please report it")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_on_any_worker_is_an_error() {
        let pool = ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let result: Result<(), BackendError> = contained(|| {
            pool.broadcast(|worker| assert_ne!(worker.index(), 1, "worker 1 gives up"));
            Ok(())
        });
        let message = result.unwrap_err().to_string();
        assert!(message.starts_with("the CPU backend failed: ") && message.contains("worker 1 gives up"), "{message}");
        assert!(matches!(contained(|| Ok(7)), Ok(7)));
    }
}
