//! The vector kernels, and the only unsafe code of the crate.
//!
//! [`lanes`] is a 16-lane vector on each instruction set, and [`tiles`] are the kernels over it. This file wraps the
//! kernels once for each instruction set, and [`Simd`] calls the wrapper of the chosen set. Its methods are safe
//! because a `Simd` of an instruction set exists only on a machine that has the set.
#![allow(unsafe_code)]

mod lanes;
#[cfg(test)]
mod tests;
mod tiles;

use mixtral_model::{Bits, DType};

pub(crate) use lanes::LANES;

/// An instruction set that the kernels are compiled for. All give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust with `f32::mul_add`.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512F.
    Avx512,
}

impl Isa {
    /// Whether this machine has it.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Isa::Avx2.is_available() && is_x86_feature_detected!("avx512f"),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The instruction sets that this machine has, slowest first.
    #[must_use]
    pub fn available() -> Vec<Isa> {
        [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| isa.is_available()).collect()
    }
}

/// The kernels of one instruction set, which this machine has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Simd(Isa);

/// The most columns that [`Simd::stream`] takes at once.
pub(crate) const STREAM_COLUMNS: usize = 8;

/// The rows of [`Simd::block`] are a multiple of this, on every instruction set.
pub(crate) const BLOCK_ROWS: usize = 4;

/// The most rows that [`Simd::weighted_rows`] takes at once.
pub(crate) const WEIGHTED_ROWS: usize = 6;

/// Calls `$kernel::<$lanes, Elem, …>` for the element type of a data type.
macro_rules! by_dtype {
    ($dtype:expr, $kernel:ident, $lanes:ty, [$($size:tt),*], $args:tt) => {
        match $dtype {
            DType::F32 => tiles::$kernel::<$lanes, tiles::F32 $(, $size)*> $args,
            DType::F16 => tiles::$kernel::<$lanes, tiles::F16 $(, $size)*> $args,
            DType::Bf16 => tiles::$kernel::<$lanes, tiles::Bf16 $(, $size)*> $args,
        }
    };
}

/// Defines one module of wrappers, from an instruction set's vector and features, and the tile sizes that fill its
/// registers.
macro_rules! wrappers {
    ($module:ident, $lanes:ty, $(#[$features:meta])?, stream: [$stream1:tt, $stream2:tt, $stream3:tt, $stream4:tt, $stream5:tt, $stream6:tt, $stream7:tt, $stream8:tt],
     rows: $rows:tt, columns: $columns:tt, groups: $groups:tt) => {
        // SAFETY (of every call): the machine has the features, by the wrapper's contract; sizes are asserted.
        #[expect(clippy::undocumented_unsafe_blocks, reason = "one contract for all, stated above")]
        mod $module {
            use mixtral_model::{Bits, DType};

            use super::{lanes, tiles};

            pub(super) const TILE: (usize, usize) = ($rows, $columns);

            $(#[$features])?
            pub(super) unsafe fn widen(dtype: DType, src: &[u8], dst: &mut [f32]) {
                unsafe { by_dtype!(dtype, widen, $lanes, [], (src, dst)) }
            }

            $(#[$features])?
            pub(super) unsafe fn pack(dtype: DType, src: &[u8], dst: &mut [f32], stride: usize, padding: f32) {
                unsafe { by_dtype!(dtype, pack, $lanes, [], (src, dst, stride, padding)) }
            }

            $(#[$features])?
            pub(super) unsafe fn decode(
                bits: Bits, src: &[u8], runs: (usize, usize), scales: &[f32], zeros: &[f32], dst: &mut [f32],
            ) {
                unsafe {
                    match bits {
                        Bits::Four => tiles::decode::<$lanes, tiles::U4>(src, runs, scales, zeros, dst),
                        Bits::Eight => tiles::decode::<$lanes, tiles::U8>(src, runs, scales, zeros, dst),
                    }
                }
            }

            $(#[$features])?
            pub(super) unsafe fn narrow(dtype: DType, src: &[f32], dst: &mut [u8]) {
                unsafe { by_dtype!(dtype, narrow, $lanes, [], (src, dst)) }
            }

            $(#[$features])?
            pub(super) unsafe fn round(dtype: DType, x: &mut [f32]) {
                unsafe { by_dtype!(dtype, round, $lanes, [], (x)) }
            }

            $(#[$features])?
            pub(super) unsafe fn stream(
                dtype: DType, w: &[u8], cols: usize, x: &[f32], x_stride: usize, n: usize, out: &mut [f32], out_stride: usize,
            ) {
                unsafe {
                    match n {
                        1 => by_dtype!(dtype, stream, $lanes, [$stream1, 1], (w, cols, x, x_stride, out, out_stride)),
                        2 => by_dtype!(dtype, stream, $lanes, [$stream2, 2], (w, cols, x, x_stride, out, out_stride)),
                        3 => by_dtype!(dtype, stream, $lanes, [$stream3, 3], (w, cols, x, x_stride, out, out_stride)),
                        4 => by_dtype!(dtype, stream, $lanes, [$stream4, 4], (w, cols, x, x_stride, out, out_stride)),
                        5 => by_dtype!(dtype, stream, $lanes, [$stream5, 5], (w, cols, x, x_stride, out, out_stride)),
                        6 => by_dtype!(dtype, stream, $lanes, [$stream6, 6], (w, cols, x, x_stride, out, out_stride)),
                        7 => by_dtype!(dtype, stream, $lanes, [$stream7, 7], (w, cols, x, x_stride, out, out_stride)),
                        8 => by_dtype!(dtype, stream, $lanes, [$stream8, 8], (w, cols, x, x_stride, out, out_stride)),
                        _ => panic!("{n} columns in a stream"),
                    }
                }
            }

            $(#[$features])?
            pub(super) unsafe fn block(w: &[f32], rows: usize, x: &[f32], tokens: usize, depth: usize, acc: &mut [f32]) {
                unsafe { tiles::block::<$lanes, $rows, $columns>(w, rows, x, tokens, depth, acc) }
            }

            $(#[$features])?
            pub(super) unsafe fn reduce(acc: &[f32], out: &mut [f32]) {
                unsafe { tiles::reduce::<$lanes>(acc, out) }
            }

            $(#[$features])?
            pub(super) unsafe fn weighted_rows(
                p: &[f32], p_stride: usize, rows: usize, n: usize, v: &[f32], width: usize, acc: &mut [f32],
            ) {
                unsafe {
                    match rows {
                        1 => tiles::weighted_rows::<$lanes, 1, 8>(p, p_stride, n, v, width, acc),
                        2 => tiles::weighted_rows::<$lanes, 2, $groups>(p, p_stride, n, v, width, acc),
                        3 => tiles::weighted_rows::<$lanes, 3, $groups>(p, p_stride, n, v, width, acc),
                        4 => tiles::weighted_rows::<$lanes, 4, $groups>(p, p_stride, n, v, width, acc),
                        5 => tiles::weighted_rows::<$lanes, 5, $groups>(p, p_stride, n, v, width, acc),
                        6 => tiles::weighted_rows::<$lanes, 6, $groups>(p, p_stride, n, v, width, acc),
                        _ => panic!("{rows} weighted rows"),
                    }
                }
            }

            $(#[$features])?
            pub(super) unsafe fn sum_words(words: &[u64]) -> u64 {
                tiles::sum_words(words)
            }

            $(#[$features])?
            pub(super) unsafe fn max(x: &[f32]) -> f32 {
                tiles::max(x)
            }

            $(#[$features])?
            pub(super) unsafe fn exp(x: &mut [f32], max: f32) {
                tiles::exp(x, max);
            }

            $(#[$features])?
            pub(super) unsafe fn silu_mul(up: &mut [f32], gate: &[f32]) {
                tiles::silu_mul(up, gate);
            }
        }
    };
}

wrappers!(portable, lanes::Portable, , stream: [1, 1, 1, 1, 1, 1, 1, 1], rows: 2, columns: 2, groups: 1);
#[cfg(target_arch = "x86_64")]
wrappers!(avx2, lanes::Avx2, #[target_feature(enable = "avx2,fma,f16c")], stream: [4, 2, 2, 1, 1, 1, 1, 1], rows: 2, columns: 3, groups: 1);
#[cfg(target_arch = "x86_64")]
wrappers!(avx512, lanes::Avx512, #[target_feature(enable = "avx512f,avx2,fma,f16c")], stream: [1, 2, 2, 2, 2, 2, 2, 2], rows: 4, columns: 6, groups: 4);

/// Calls the chosen set's wrapper.
macro_rules! dispatch {
    ($simd:expr, $kernel:ident $args:tt) => {
        match $simd.0 {
            Isa::Portable => unsafe { portable::$kernel $args },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::$kernel $args },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::$kernel $args },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unsafe { portable::$kernel $args },
        }
    };
}

// SAFETY (of every call): a `Simd` exists only where its instruction set does.
#[expect(clippy::undocumented_unsafe_blocks, reason = "one contract for all, stated above")]
impl Simd {
    /// The kernels of an instruction set, if this machine has it.
    pub(crate) fn new(isa: Isa) -> Option<Simd> {
        isa.is_available().then_some(Simd(isa))
    }

    /// The fastest kernels of this machine.
    pub(crate) fn detect() -> Simd {
        Simd(Isa::available().last().copied().unwrap_or(Isa::Portable))
    }

    /// `dst[i] = src[i]`, widened.
    pub(crate) fn widen(self, dtype: DType, src: &[u8], dst: &mut [f32]) {
        dispatch!(self, widen(dtype, src, dst));
    }

    /// A row of quantized elements: `dst[i] = (u[i] − zeros[g]) · scales[g]`, each product rounded. `src` holds u. The first
    /// `runs.0` elements are of group 0, then each `runs.1` are of one group; both are whole bytes.
    pub(crate) fn decode(
        self,
        bits: Bits,
        src: &[u8],
        runs: (usize, usize),
        scales: &[f32],
        zeros: &[f32],
        dst: &mut [f32],
    ) {
        dispatch!(self, decode(bits, src, runs, scales, zeros, dst));
    }

    /// `dst[i] = src[i]`, rounded.
    pub(crate) fn narrow(self, dtype: DType, src: &[f32], dst: &mut [u8]) {
        dispatch!(self, narrow(dtype, src, dst));
    }

    /// `x[i]` rounded to the data type and widened again.
    pub(crate) fn round(self, dtype: DType, x: &mut [f32]) {
        if dtype != DType::F32 {
            dispatch!(self, round(dtype, x));
        }
    }

    /// `out[c · out_stride + r] = dot(w[r], x[c])`: `w` is `[rows, cols]`, `x` `[n, x_stride]` padded to whole groups
    /// of lanes with −0, n ≤ [`STREAM_COLUMNS`]. It is for few columns: the rows are read once, from where they lie.
    pub(crate) fn stream(
        self,
        dtype: DType,
        w: &[u8],
        cols: usize,
        x: &[f32],
        x_stride: usize,
        n: usize,
        out: &mut [f32],
        out_stride: usize,
    ) {
        dispatch!(self, stream(dtype, w, cols, x, x_stride, n, out, out_stride));
    }

    /// Rows and columns of a tile of [`Simd::block`].
    fn tile(self) -> (usize, usize) {
        match self.0 {
            Isa::Portable => portable::TILE,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::TILE,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::TILE,
            #[cfg(not(target_arch = "x86_64"))]
            _ => portable::TILE,
        }
    }

    /// Puts a row of weights, widened, into its place among the `rows` rows that [`Simd::block`] reads. `rows` is a
    /// multiple of [`BLOCK_ROWS`], and `panel` `rows · depth` long.
    pub(crate) fn pack_row(self, dtype: DType, src: &[u8], row: usize, depth: usize, panel: &mut [f32]) {
        let (height, _) = self.tile();
        self.pack(dtype, src, row, height, height, depth, 0.0, panel);
    }

    /// Puts a token's activations, widened, into their place among the `tokens` columns that [`Simd::block`] reads.
    /// `panel` is `tokens · depth` long.
    pub(crate) fn pack_column(
        self,
        dtype: DType,
        src: &[u8],
        token: usize,
        tokens: usize,
        depth: usize,
        panel: &mut [f32],
    ) {
        let (_, width) = self.tile();
        let width_here = width.min(tokens - token / width * width);
        // −0 times the rows' zero padding is −0. Adding that leaves every accumulator as it is, even +0 and −0.
        self.pack(dtype, src, token, width, width_here, depth, -0.0, panel);
    }

    fn pack(
        self,
        dtype: DType,
        src: &[u8],
        index: usize,
        tile: usize,
        tile_here: usize,
        depth: usize,
        padding: f32,
        panel: &mut [f32],
    ) {
        let first = index / tile * tile * depth + index % tile * LANES;
        dispatch!(self, pack(dtype, src, &mut panel[first..], tile_here * LANES, padding));
    }

    /// `acc[t][r] += w[r] · x[t]` lane by lane: one block of `depth` columns (a multiple of 16). `w` holds `rows`
    /// packed rows (a multiple of [`BLOCK_ROWS`]), `x` packed columns; `acc` is `[tokens, rows, 16]`. Each packed
    /// operand is read in order, as one stream.
    pub(crate) fn block(self, w: &[f32], rows: usize, x: &[f32], tokens: usize, depth: usize, acc: &mut [f32]) {
        dispatch!(self, block(w, rows, x, tokens, depth, acc));
    }

    /// `out[i]` = the tree sum of the lanes `acc[i]`.
    pub(crate) fn reduce(self, acc: &[f32], out: &mut [f32]) {
        dispatch!(self, reduce(acc, out));
    }

    /// `acc[c] += Σ_j p[c · p_stride + j] · v[j]`, ascending in j by fused multiply-add. `v` is `[n, width]`, `acc`
    /// `[rows, width]`, `width` a multiple of 16, rows ≤ [`WEIGHTED_ROWS`].
    pub(crate) fn weighted_rows(
        self,
        p: &[f32],
        p_stride: usize,
        rows: usize,
        n: usize,
        v: &[f32],
        width: usize,
        acc: &mut [f32],
    ) {
        dispatch!(self, weighted_rows(p, p_stride, rows, n, v, width, acc));
    }

    /// The sum of all words, modulo 2^64. Memory bandwidth is measured with it.
    pub(crate) fn sum_words(self, words: &[u64]) -> u64 {
        dispatch!(self, sum_words(words))
    }

    /// The largest element; −∞ if there is none. NaNs are ignored.
    pub(crate) fn max(self, x: &[f32]) -> f32 {
        dispatch!(self, max(x))
    }

    /// `x[i] = exp(x[i] − max)`.
    pub(crate) fn exp(self, x: &mut [f32], max: f32) {
        dispatch!(self, exp(x, max));
    }

    /// `up[i] = silu(gate[i]) · up[i]`.
    pub(crate) fn silu_mul(self, up: &mut [f32], gate: &[f32]) {
        dispatch!(self, silu_mul(up, gate));
    }
}
