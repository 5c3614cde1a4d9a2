//! Speeds of the kernels that carry a model:
//! `cargo run --release --example bench -- [tiny] [mapped] [threads=N] [tokens=N,N,…] [linear | attention]`.
//!
//! Prints the machine's read bandwidth, the bandwidth of a decode linear, the rate of a prefill linear, and prefill
//! and decode attention. Weights rotate over 4 GB, so that none comes from a cache: anonymous memory, or with
//! `mapped` a file in the page cache. `tiny` shrinks everything, to see that it runs.

use std::fs::File;
use std::io::Write as _;
use std::sync::Arc;
use std::time::Instant;

use memmap2::{Advice, Mmap, MmapMut};
use mixtral_cpu::{CpuBackend, CpuOptions};
use mixtral_engine::{Backend as _, Epilogue, Op, Program, Rows, StepInputs, WeightSource, WeightView, Weights};
use mixtral_model::DType;
use mixtral_testkit::assembly::Assembly;
use mixtral_testkit::batch::{self, Part};

const DTYPE: DType = DType::Bf16;

/// A byte that differs from its neighbours'.
fn byte(i: usize) -> u8 {
    u8::try_from(i % 251).unwrap_or_default()
}

/// Weights of one shape, one after another in memory.
struct Rotation {
    memory: Memory,
    shape: [usize; 2],
}

enum Memory {
    Anonymous(MmapMut),
    File(Mmap),
}

impl Memory {
    fn bytes(&self) -> &[u8] {
        match self {
            Memory::Anonymous(map) => map,
            Memory::File(map) => map,
        }
    }

    /// Memory full of small bf16 values.
    fn new(bytes: usize, mapped: bool) -> std::io::Result<Memory> {
        let pattern: Vec<u8> = (0..1 << 19).flat_map(|i| [byte(i * 37), [0x3c, 0xbc][i % 2]]).collect();
        if mapped {
            let path = std::env::temp_dir().join(format!("mixtral-bench-{}", std::process::id()));
            let mut file = File::create(&path)?;
            for start in (0..bytes).step_by(pattern.len()) {
                file.write_all(&pattern[..pattern.len().min(bytes - start)])?;
            }
            let file = File::open(&path)?;
            std::fs::remove_file(&path)?;
            // SAFETY: nobody else knows the file, which has no name any more.
            Ok(Memory::File(unsafe { Mmap::map(&file)? }))
        } else {
            let mut map = MmapMut::map_anon(bytes)?;
            let _ = map.advise(Advice::HugePage);
            map.chunks_mut(pattern.len()).for_each(|chunk| chunk.copy_from_slice(&pattern[..chunk.len()]));
            Ok(Memory::Anonymous(map))
        }
    }
}

impl WeightSource for Rotation {
    fn weight(&self, name: &str) -> Option<WeightView<'_>> {
        let index: usize = name.parse().ok()?;
        let size = self.shape[0] * self.shape[1] * DTYPE.size();
        Some(WeightView { dtype: DTYPE, shape: &self.shape, bytes: &self.memory.bytes()[index * size..][..size] })
    }
}

/// Seconds that all threads of this process have been on a core.
fn core_seconds() -> f64 {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let nanos = |task: std::fs::DirEntry| -> Option<f64> {
        std::fs::read_to_string(task.path().join("schedstat")).ok()?.split(' ').next()?.parse().ok()
    };
    tasks.filter_map(nanos).sum::<f64>() / 1e9
}

/// The fastest of some runs.
#[derive(Clone, Copy)]
struct Time {
    /// Seconds that passed.
    wall: f64,
    /// Seconds on a core, a thread: what would have passed on a machine that does nothing else.
    core: f64,
}

fn fastest(runs: usize, threads: usize, mut f: impl FnMut()) -> Time {
    let mut best = Time { wall: f64::INFINITY, core: f64::INFINITY };
    for _ in 0..runs {
        let (start, core) = (Instant::now(), core_seconds());
        f();
        best.wall = best.wall.min(start.elapsed().as_secs_f64());
        best.core = best.core.min((core_seconds() - core) / threads as f64);
    }
    best
}

/// Sum of the words of a slice.
#[inline(always)]
fn sum_words(part: &[u8]) -> u64 {
    let mut lanes = [0u64; 32];
    for group in part.chunks_exact(256) {
        for (lane, word) in lanes.iter_mut().zip(group.chunks_exact(8)) {
            *lane = lane.wrapping_add(u64::from_ne_bytes(word.try_into().unwrap_or_default()));
        }
    }
    lanes.iter().fold(0u64, |sum, lane| sum.wrapping_add(*lane))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(part: &[u8]) -> u64 {
    sum_words(part)
}

fn sum(part: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the machine has AVX2.
        return unsafe { sum_avx2(part) };
    }
    sum_words(part)
}

/// The machine's read bandwidth in GB/s: a vectorized sum, each thread over a contiguous part.
fn read_bandwidth(memory: &[u8], threads: usize) -> Time {
    let words: Vec<&[u8]> = memory.chunks(memory.len().div_ceil(threads).next_multiple_of(4096)).collect();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    let time = fastest(5, threads, || {
        pool.broadcast(|thread| std::hint::black_box(words.get(thread.index()).map(|part| sum(part))));
    });
    let rate = |seconds: f64| memory.len() as f64 / seconds / 1e9;
    Time { wall: rate(time.wall), core: rate(time.core) }
}

fn assembly(max_num_tokens: usize, max_seq_len: usize) -> Assembly {
    let mut a = Assembly::new(DTYPE);
    a.program.limits.max_num_tokens = max_num_tokens;
    a.program.limits.max_num_logits = 1;
    a.program.limits.max_seq_len = max_seq_len;
    a.program.limits.block_size = 64;
    (a.program.kv.num_kv_heads, a.program.kv.head_dim) = (8, 128);
    a
}

/// A program of one linear a weight.
fn linears(max_num_tokens: usize, shape: [usize; 2], count: usize) -> Program {
    let mut a = assembly(max_num_tokens, max_num_tokens);
    let input = a.activation("x", Rows::Tokens, shape[1]);
    let out = a.activation("y", Rows::Tokens, shape[0]);
    for i in 0..count {
        let weight = a.declare(&i.to_string(), DTYPE, &shape);
        let (input, out) = (input.clone(), out.clone());
        a.op(Op::Linear { input, weight, rows: None, epilogue: Epilogue::Store, residual: None, out, ladder: vec![] });
    }
    a.place_apart();
    a.program
}

fn prompt(program: &Program, n: usize, blocks: usize) -> StepInputs<'static> {
    let mut inputs = batch::prompt(&program.limits, program.vocab_size, blocks, n);
    inputs.return_logits = false;
    inputs
}

fn bench_linear(rotation: &Arc<Rotation>, threads: usize, bandwidth: Time, steps: &[usize]) {
    let [rows, cols] = rotation.shape;
    let size = rows * cols * DTYPE.size();
    let count = rotation.memory.bytes().len() / size;
    let most = steps.iter().copied().max().unwrap_or(1);
    let blocks = most.div_ceil(64);
    let options = CpuOptions { kv_blocks: blocks, threads, ..CpuOptions::default() };
    let program = linears(most, rotation.shape, count);
    let mut backend = CpuBackend::load(program.clone(), Weights::Source(rotation.clone()), options).expect("a backend");
    let x: Vec<u8> = (0..most * cols).flat_map(|i| [byte(i), 0x3c]).collect();
    backend.write_buffer("x", &x).expect("a buffer");
    for &n in steps {
        let inputs = prompt(&program, n, blocks);
        // Enough work to time, over weights that no cache holds.
        let ops = if n <= 16 { count } else { (count * 16 / n).clamp(1, count) };
        backend.run_ops(0..1, &inputs).expect("a step");
        let time = fastest(5, threads, || {
            backend.run_ops(0..ops, &inputs).expect("a step");
        });
        let (bytes, flops) = ((ops * size) as f64, 2.0 * (ops * rows * cols * n) as f64);
        println!(
            "linear {rows}x{cols} {n:>4} tokens: {:8.2} ms, {:6.2} GB/s, {:7.1} GFLOP/s; by core time {:6.2} GB/s \
             ({:3.0} % of read), {:7.1} GFLOP/s",
            time.wall * 1e3 / ops as f64,
            bytes / time.wall / 1e9,
            flops / time.wall / 1e9,
            bytes / time.core / 1e9,
            bytes / time.core / 1e7 / bandwidth.core,
            flops / time.core / 1e9
        );
    }
}

fn bench_attention(threads: usize, past: usize, new: usize) {
    let (heads, d) = (32, 128);
    let mut a = assembly(new, past + new);
    let query = a.activation("q", Rows::Tokens, heads * d);
    let out = a.activation("o", Rows::Tokens, heads * d);
    a.op(Op::Attention { query, num_heads: heads, window: None, layer: 0, out });
    a.place_apart();
    let blocks = (past + new).div_ceil(64);
    let limits = a.program.limits;
    let sequence = batch::sequences(1, &[past + new], &limits, a.program.vocab_size, blocks).remove(0);
    let mut inputs = batch::step(&limits, &[Part { sequence: &sequence, past, new }]);
    inputs.logits_indices.truncate(1);
    let options = CpuOptions { kv_blocks: blocks, threads, ..CpuOptions::default() };
    let mut backend = CpuBackend::load(a.program, Weights::Dummy { seed: 0 }, options).expect("a backend");
    let fill =
        |bytes: &mut [u8]| bytes.chunks_exact_mut(2).enumerate().for_each(|(i, b)| b.copy_from_slice(&[byte(i), 0x3d]));
    let (keys, values) = backend.cache_bytes_mut(0).expect("a layer");
    fill(keys);
    fill(values);
    let mut q = vec![0; new * heads * d * 2];
    fill(&mut q);
    backend.write_buffer("q", &q).expect("a buffer");
    let time = fastest(6, threads, || {
        backend.step(&inputs).expect("a step");
    });
    let pairs: usize = (past..past + new).map(|i| i + 1).sum();
    let flops = 4.0 * (pairs * heads * d) as f64;
    println!(
        "attention {new:>4} tokens after {past:>5}: {:8.2} ms, {:7.1} GFLOP/s; by core time {:7.1} GFLOP/s",
        time.wall * 1e3,
        flops / time.wall / 1e9,
        flops / time.core / 1e9
    );
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| arguments.iter().any(|a| a == word);
    let number = |key: &str| arguments.iter().find_map(|a| a.strip_prefix(key)).map(str::to_owned);
    let (tiny, mapped) = (has("tiny"), has("mapped"));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = number("threads=").and_then(|n| n.parse().ok()).unwrap_or(cores);
    let steps: Vec<usize> = match number("tokens=") {
        None => vec![1, 2, 4, 6, 8, 12, 16, 32, 128, 512],
        Some(list) => list.split(',').filter_map(|n| n.parse().ok()).collect(),
    };
    if !has("attention") {
        let (shape, total) = if tiny { ([64, 128], 1 << 20) } else { ([14_336, 4096], 36 * 14_336 * 4096 * 2) };
        let memory = Memory::new(total, mapped).expect("memory");
        let bandwidth = read_bandwidth(memory.bytes(), threads);
        let kind = if mapped { "mapped" } else { "anonymous" };
        println!(
            "{threads} threads, {kind} memory: reads {:.2} GB/s, by core time {:.2}",
            bandwidth.wall, bandwidth.core
        );
        let rotation = Arc::new(Rotation { memory, shape });
        bench_linear(&rotation, threads, bandwidth, &steps);
        let Ok(rotation) = Arc::try_unwrap(rotation) else { return };
        let rotation = Arc::new(Rotation { shape: [shape[1], shape[0]], ..rotation });
        bench_linear(&rotation, threads, bandwidth, &steps);
    }
    if !has("linear") {
        let scale = if tiny { 16 } else { 1 };
        for (past, new) in [(0, 2048), (0, 512), (8192, 1), (30_000, 1)] {
            bench_attention(threads, past / scale, (new / scale).max(1));
        }
    }
}
