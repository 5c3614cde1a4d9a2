//! Loading a program, and stepping it.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mixtral_engine::{Backend, BackendError, Collectives, Program, StepInputs, StepOutputs, Weights};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::cache::KvCache;
use crate::execute::Machine;
use crate::kernels::context::{Context, ROW_SCRATCH};
use crate::kernels::linear::Workspace;
use crate::kernels::rope::RopeTable;
use crate::memory::Memory;
use crate::resolve::{Resolved, resolve};
use crate::simd::{Isa, LANES, Simd};
use crate::weights::WeightTable;

/// How a program is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuOptions {
    /// Blocks of the KV cache. Memory is committed as blocks are first written.
    pub kv_blocks: usize,
    /// Workers of the backend's own pool.
    pub threads: usize,
    /// Whether [`Backend::expert_counts`] counts.
    pub count_experts: bool,
    /// Whether [`Backend::op_times`] measures.
    pub time_ops: bool,
    /// Instruction set of the kernels; the fastest of this machine when absent. All give the same bits.
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
}

impl CpuBackend {
    /// Loads a program that passed [`Program::check`]: finds its weights, allocates its arena and cache, starts its
    /// workers. Nothing is touched that a step may not need.
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
        let cache = KvCache::new(program.kv, program.limits.block_size, options.kv_blocks)?;
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
        })
    }

    /// Gives the backend the other ranks, which a program of several speaks to.
    #[must_use]
    pub fn with_ranks(mut self, ranks: Arc<dyn Collectives>) -> Self {
        self.ranks = Some(ranks);
        self
    }

    /// The program.
    #[must_use]
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Runs some of the program's operations. Outputs come from the `sample` operation, if it is among them.
    ///
    /// # Errors
    /// As [`Backend::step`]; a range outside the program.
    pub fn run_ops(&mut self, ops: Range<usize>, inputs: &StepInputs<'_>) -> Result<StepOutputs, BackendError> {
        inputs.check(&self.program, self.cache.blocks())?;
        let steps = self.resolved.steps.get(ops.clone()).ok_or_else(|| {
            BackendError::Other(format!("operations {ops:?} of a program of {}", self.resolved.steps.len()))
        })?;
        let (thetas, head_dim) = (&self.resolved.thetas, self.program.kv.head_dim);
        let mut machine = Machine {
            program: &self.program,
            ctx: Context::new(self.simd, self.program.dtype, &self.scratch),
            inputs,
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
        contained(move || {
            pool.install(move || {
                match times {
                    None => steps.iter().try_for_each(|step| machine.run(step))?,
                    Some(times) => steps.iter().zip(&mut times[ops]).try_for_each(|(step, time)| {
                        let start = Instant::now();
                        let done = machine.run(step);
                        *time += start.elapsed();
                        done
                    })?,
                }
                Ok(machine.outputs)
            })
        })
    }

    /// The bytes of a buffer, at the limits' number of rows, as the last operations left them.
    #[must_use]
    pub fn buffer_bytes(&self, name: &str) -> Option<&[u8]> {
        let buffer = self.program.buffer(name)?;
        Some(&self.arena.bytes()[buffer.offset..][..self.program.max_bytes(buffer)])
    }

    /// Writes the first rows of a buffer.
    ///
    /// # Errors
    /// A name that the program does not have, or more bytes than the buffer's.
    pub fn write_buffer(&mut self, name: &str, bytes: &[u8]) -> Result<(), BackendError> {
        let missing = || BackendError::Other(format!("there is no buffer `{name}`"));
        let buffer = self.program.buffer(name).ok_or_else(missing)?;
        let (offset, size) = (buffer.offset, self.program.max_bytes(buffer));
        if bytes.len() > size {
            return Err(BackendError::Other(format!("{} bytes for the {size} of buffer `{name}`", bytes.len())));
        }
        self.arena.bytes_mut()[offset..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    /// The whole arena, which no step expects anything of: for tests that poison it.
    pub fn arena_mut(&mut self) -> &mut [u8] {
        self.arena.bytes_mut()
    }

    /// Keys and values of a layer of this rank, each `[blocks, num_kv_heads, block_size, head_dim]`.
    #[must_use]
    pub fn cache_bytes(&self, layer: usize) -> Option<(&[u8], &[u8])> {
        let (keys, values) = (layer < self.program.kv.num_layers).then(|| self.cache.layer(layer))?;
        Some((keys.bytes, values.bytes))
    }

    /// Keys and values of a layer of this rank, to be written.
    pub fn cache_bytes_mut(&mut self, layer: usize) -> Option<(&mut [u8], &mut [u8])> {
        (layer < self.program.kv.num_layers).then(|| self.cache.layer_mut(layer))
    }
}

impl Backend for CpuBackend {
    fn step(&mut self, inputs: &StepInputs<'_>) -> Result<StepOutputs, BackendError> {
        self.run_ops(0..self.resolved.steps.len(), inputs)
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

/// Runs `f`; a panic in it, on any worker, becomes an error.
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
