//! Measures the highest rates of this machine, with the backend's own kernels: read bandwidth and arithmetic rate.

use std::time::Instant;

use crate::memory::Memory;
use crate::simd::{Isa, LANES, Simd};

/// Rounds of a measurement. The fastest counts, because other work on the machine can only slow a round down.
const ROUNDS: usize = 5;

// Sizes of the arithmetic: 20 KB of operands, which fit into the first-level cache.
const ROWS: usize = 16;
const TOKENS: usize = 24;
const DEPTH: usize = 128;

/// Bytes that a short measurement reads: more than most caches hold.
pub const QUICK: usize = 1 << 28;

/// Bytes that a measurement reads whose figure is compared with that of a large engine.
pub const THOROUGH: usize = 4 << 30;

/// A machine's ceilings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Probe {
    /// Bytes that all threads together read from memory in a second, in the fastest of five rounds. In a round each
    /// thread sums a contiguous part of anonymous memory in huge pages. 0 if there is not enough memory.
    pub read_bytes_per_s: f64,
    /// Floating-point operations that all threads together do in a second, in the tiles of dots, with operands in the
    /// cache.
    pub flops_per_s: f64,
}

impl Probe {
    /// The better of two measurements (of one before and one after something), figure by figure.
    #[must_use]
    pub fn max(self, other: Probe) -> Probe {
        Probe {
            read_bytes_per_s: self.read_bytes_per_s.max(other.read_bytes_per_s),
            flops_per_s: self.flops_per_s.max(other.flops_per_s),
        }
    }
}

/// Measures with `threads` threads, reading `bytes`.
#[must_use]
pub fn measure(threads: usize, bytes: usize) -> Probe {
    Probe { read_bytes_per_s: read(threads, bytes).unwrap_or(0.0), flops_per_s: arithmetic(threads) }
}

/// The rate of the fastest of some rounds of `work` on every thread. A round processes `amount`; the rate is in amounts
/// a second.
fn best(threads: usize, amount: f64, work: impl Fn(usize) + Sync) -> f64 {
    let round = || {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let work = &work;
                scope.spawn(move || work(thread));
            }
        });
        amount / start.elapsed().as_secs_f64()
    };
    (0..ROUNDS).map(|_| round()).fold(0.0, f64::max)
}

#[expect(clippy::cast_precision_loss, reason = "a rate")]
fn read(threads: usize, bytes: usize) -> Option<f64> {
    let mut memory = Memory::new("the bandwidth probe", Some(bytes), "").ok()?;
    let words: &mut [u64] = bytemuck::cast_slice_mut(memory.bytes_mut());
    // All untouched pages are the same page of zeros, so a word of each page is written.
    words.iter_mut().step_by(512).for_each(|w| *w = 1);
    let words: &[u64] = words;
    let share = words.len() / threads;
    // The widest vectors do not read fastest on every machine, so all instruction sets are tried.
    let rate = |isa: Isa| {
        let simd = Simd::new(isa)?;
        let sum = |thread: usize| {
            std::hint::black_box(simd.sum_words(&words[thread * share..][..share]));
        };
        Some(best(threads, (share * threads * 8) as f64, sum))
    };
    Isa::available().into_iter().filter_map(rate).max_by(f64::total_cmp)
}

#[expect(clippy::cast_precision_loss, reason = "a rate")]
fn arithmetic(threads: usize) -> f64 {
    const REPEATS: usize = 4000;
    let simd = Simd::detect();
    let work = |_: usize| {
        let (w, x) = (vec![1.0; ROWS * DEPTH], vec![1.0; TOKENS * DEPTH]);
        let mut acc = vec![0.0; TOKENS * ROWS * LANES];
        for _ in 0..REPEATS {
            simd.block(&w, ROWS, &x, TOKENS, DEPTH, &mut acc);
        }
        std::hint::black_box(acc);
    };
    best(threads, (2 * ROWS * TOKENS * DEPTH * REPEATS * threads) as f64, work)
}
