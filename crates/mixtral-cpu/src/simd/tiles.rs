//! The kernels, written once over [`Lanes`]. Each is inlined into one wrapper for each instruction set.

#![expect(clippy::needless_range_loop, reason = "tiles are indexed by row and column, and unroll")]

use mixtral_engine::math;

use super::lanes::{LANES, Lanes};

/// An element type in memory.
pub(super) trait Elem {
    /// Bytes of one element.
    const SIZE: usize;
    /// Sixteen elements, widened.
    unsafe fn load<L: Lanes>(p: *const u8) -> L;
    /// Sixteen elements, rounded.
    unsafe fn store<L: Lanes>(value: L, p: *mut u8);
}

macro_rules! elem {
    ($name:ident, $size:literal, $load:ident, $store:ident) => {
        pub(super) struct $name;
        impl Elem for $name {
            const SIZE: usize = $size;
            #[inline(always)]
            unsafe fn load<L: Lanes>(p: *const u8) -> L {
                // SAFETY: the caller's.
                unsafe { L::$load(p) }
            }
            #[inline(always)]
            unsafe fn store<L: Lanes>(value: L, p: *mut u8) {
                // SAFETY: the caller's.
                unsafe { value.$store(p) }
            }
        }
    };
}
elem!(F32, 4, load_f32, store_f32);
elem!(F16, 2, load_f16, store_f16);
elem!(Bf16, 2, load_bf16, store_bf16);

/// A type of unsigned integers in memory.
pub(super) trait Integers {
    /// Integers of a byte.
    const PER_BYTE: usize;
    /// Sixteen integers, widened.
    unsafe fn load<L: Lanes>(p: *const u8) -> L;
}

macro_rules! integers {
    ($name:ident, $per_byte:literal, $load:ident) => {
        pub(super) struct $name;
        impl Integers for $name {
            const PER_BYTE: usize = $per_byte;
            #[inline(always)]
            unsafe fn load<L: Lanes>(p: *const u8) -> L {
                // SAFETY: the caller's.
                unsafe { L::$load(p) }
            }
        }
    };
}
integers!(U8, 1, load_u8);
integers!(U4, 2, load_u4);

/// Loads `n < 16` elements; the other lanes are +0.
#[inline(always)]
unsafe fn load_partial<L: Lanes, E: Elem>(p: *const u8, n: usize) -> L {
    let mut buffer = [0u8; 4 * LANES];
    // SAFETY: n elements are readable, and the buffer holds sixteen of any type.
    unsafe {
        std::ptr::copy_nonoverlapping(p, buffer.as_mut_ptr(), n * E::SIZE);
        E::load(buffer.as_ptr())
    }
}

/// `dst[i] = src[i]`, widened.
#[inline(always)]
pub(super) unsafe fn widen<L: Lanes, E: Elem>(src: &[u8], dst: &mut [f32]) {
    assert_eq!(src.len(), dst.len() * E::SIZE);
    let (src, n) = (src.as_ptr(), dst.len());
    let dst: *mut u8 = dst.as_mut_ptr().cast();
    let mut i = 0;
    // SAFETY: i + 16 ≤ n in the loop; the rest goes through a buffer of sixteen.
    unsafe {
        while i + LANES <= n {
            E::load::<L>(src.add(i * E::SIZE)).store_f32(dst.add(i * 4));
            i += LANES;
        }
        if i < n {
            let mut buffer = [0u8; 4 * LANES];
            load_partial::<L, E>(src.add(i * E::SIZE), n - i).store_f32(buffer.as_mut_ptr());
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), dst.add(i * 4), (n - i) * 4);
        }
    }
}

/// The elements of one group: `dst[i] = (u[i] − z) · s`, each operation rounded. `u` is packed in `src`, [`Integers::PER_BYTE`] to a
/// byte.
#[inline(always)]
unsafe fn decode_run<L: Lanes, U: Integers>(src: *const u8, z: f32, s: f32, dst: &mut [f32]) {
    let n = dst.len();
    let dst: *mut u8 = dst.as_mut_ptr().cast();
    // SAFETY: i + 16 ≤ n in the loop; the rest goes through a buffer of sixteen.
    unsafe {
        // u − z is exact, and adding −0 to a product changes nothing, so the only rounding is the product's.
        let (one, minus_z, s, nothing) = (L::splat(1.0), L::splat(-z), L::splat(s), L::splat(-0.0));
        let decode = |p: *const u8| nothing.fma(minus_z.fma(U::load::<L>(p), one), s);
        let mut i = 0;
        while i + LANES <= n {
            decode(src.add(i / U::PER_BYTE)).store_f32(dst.add(i * 4));
            i += LANES;
        }
        if i < n {
            let (mut integers, mut floats) = ([0u8; LANES], [0u8; 4 * LANES]);
            let bytes = (n - i).div_ceil(U::PER_BYTE);
            std::ptr::copy_nonoverlapping(src.add(i / U::PER_BYTE), integers.as_mut_ptr(), bytes);
            decode(integers.as_ptr()).store_f32(floats.as_mut_ptr());
            std::ptr::copy_nonoverlapping(floats.as_ptr(), dst.add(i * 4), (n - i) * 4);
        }
    }
}

/// A row of quantized elements from one in group 0 on: `dst[i] = (u[i] − zeros[g]) · scales[g]`. The first `first` elements are
/// of group 0, then each `len` are of one group. `first` and `len` are multiples of [`Integers::PER_BYTE`].
#[inline(always)]
pub(super) unsafe fn decode<L: Lanes, U: Integers>(
    src: &[u8],
    (first, len): (usize, usize),
    scales: &[f32],
    zeros: &[f32],
    dst: &mut [f32],
) {
    assert!(src.len() >= dst.len().div_ceil(U::PER_BYTE));
    let (mut at, mut run) = (0, first);
    for (&s, &z) in scales.iter().zip(zeros) {
        let end = (at + run).min(dst.len());
        // SAFETY: the assert covers every element of dst.
        unsafe { decode_run::<L, U>(src.as_ptr().add(at / U::PER_BYTE), z, s, &mut dst[at..end]) };
        (at, run) = (end, len);
    }
    assert_eq!(at, dst.len());
}

/// Group g of `src`, widened, goes to `dst[g · stride..]`. The last group is filled up with `padding`.
#[inline(always)]
pub(super) unsafe fn pack<L: Lanes, E: Elem>(src: &[u8], dst: &mut [f32], stride: usize, padding: f32) {
    let n = src.len() / E::SIZE;
    let (groups, tail) = (n / LANES, n % LANES);
    assert!(n == 0 || dst.len() >= (n.div_ceil(LANES) - 1) * stride + LANES);
    // SAFETY: the assert covers every group of dst; the partial group of src goes through a buffer of sixteen.
    unsafe {
        let dst = dst.as_mut_ptr();
        for g in 0..groups {
            E::load::<L>(src.as_ptr().add(g * LANES * E::SIZE)).store_f32(dst.add(g * stride).cast());
        }
        if tail > 0 {
            let last = dst.add(groups * stride);
            load_partial::<L, E>(src.as_ptr().add(groups * LANES * E::SIZE), tail).store_f32(last.cast());
            for lane in tail..LANES {
                *last.add(lane) = padding;
            }
        }
    }
}

/// `dst[i] = src[i]`, rounded to nearest even.
#[inline(always)]
pub(super) unsafe fn narrow<L: Lanes, E: Elem>(src: &[f32], dst: &mut [u8]) {
    assert_eq!(dst.len(), src.len() * E::SIZE);
    let n = src.len();
    let src: *const u8 = src.as_ptr().cast();
    let dst = dst.as_mut_ptr();
    let mut i = 0;
    // SAFETY: i + 16 ≤ n in the loop; the rest goes through a buffer of sixteen.
    unsafe {
        while i + LANES <= n {
            E::store(L::load_f32(src.add(i * 4)), dst.add(i * E::SIZE));
            i += LANES;
        }
        if i < n {
            let mut buffer = [0u8; 4 * LANES];
            E::store(load_partial::<L, F32>(src.add(i * 4), n - i), buffer.as_mut_ptr());
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), dst.add(i * E::SIZE), (n - i) * E::SIZE);
        }
    }
}

/// `x[i]` rounded to the element type and widened again.
#[inline(always)]
pub(super) unsafe fn round<L: Lanes, E: Elem>(x: &mut [f32]) {
    let n = x.len();
    let x: *mut u8 = x.as_mut_ptr().cast();
    let mut buffer = [0u8; 4 * LANES];
    let mut i = 0;
    // SAFETY: i + 16 ≤ n in the loop; the rest goes through a buffer of sixteen.
    unsafe {
        while i + LANES <= n {
            E::store(L::load_f32(x.add(i * 4)), buffer.as_mut_ptr());
            E::load::<L>(buffer.as_ptr()).store_f32(x.add(i * 4));
            i += LANES;
        }
        if i < n {
            E::store(load_partial::<L, F32>(x.add(i * 4), n - i), buffer.as_mut_ptr());
            E::load::<L>(buffer.as_ptr()).store_f32(buffer.as_mut_ptr());
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), x.add(i * 4), (n - i) * 4);
        }
    }
}

/// `acc[r][c] += w[r] · x[c]` lane by lane over `groups` groups of sixteen, ascending.
#[inline(always)]
unsafe fn accumulate<L: Lanes, E: Elem, const R: usize, const C: usize>(
    w: *const u8,
    w_stride: usize,
    x: *const f32,
    x_stride: usize,
    groups: usize,
    acc: &mut [[L; C]; R],
) {
    // SAFETY: the caller's R rows of w and C rows of x hold `groups` groups each.
    unsafe {
        for g in 0..groups {
            let mut rows = [L::splat(0.0); R];
            for r in 0..R {
                let row = w.add(r * w_stride + g * LANES * E::SIZE);
                if (g * LANES * E::SIZE).is_multiple_of(64) {
                    L::prefetch(row.wrapping_add(PREFETCH));
                }
                rows[r] = E::load(row);
            }
            for c in 0..C {
                let column = L::load_f32(x.add(c * x_stride + g * LANES).cast());
                for r in 0..R {
                    acc[r][c] = acc[r][c].fma(rows[r], column);
                }
            }
        }
    }
}

/// How many bytes ahead of its reads a stream prefetches. The weights are contiguous, so the bytes ahead are read soon,
/// whichever row they belong to. Measured: 4 to 16 KiB is best, on large pages and on small ones.
const PREFETCH: usize = 8192;

/// The dots of R whole rows with C columns; see [`stream`].
#[inline(always)]
unsafe fn stream_rows<L: Lanes, E: Elem, const R: usize, const C: usize>(
    w: *const u8,
    cols: usize,
    x: *const f32,
    x_stride: usize,
    out: *mut f32,
    out_stride: usize,
) {
    // SAFETY: the caller's; a partial group of w is read through a buffer, and x is padded to whole groups.
    unsafe {
        let mut acc = [[L::splat(0.0); C]; R];
        let (groups, tail) = (cols / LANES, cols % LANES);
        accumulate::<L, E, R, C>(w, cols * E::SIZE, x, x_stride, groups, &mut acc);
        if tail > 0 {
            let start = groups * LANES;
            for r in 0..R {
                let row = load_partial::<L, E>(w.add((r * cols + start) * E::SIZE), tail);
                for c in 0..C {
                    acc[r][c] = acc[r][c].fma(row, L::load_f32(x.add(c * x_stride + start).cast()));
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                *out.add(c * out_stride + r) = acc[r][c].sum();
            }
        }
    }
}

/// `out[c · out_stride + r] = dot(w[r], x[c])` for all rows of `w` `[rows, cols]`, read once, R at a time.
/// `x` is `[C, x_stride]`, padded with −0 to whole groups.
#[inline(always)]
pub(super) unsafe fn stream<L: Lanes, E: Elem, const R: usize, const C: usize>(
    w: &[u8],
    cols: usize,
    x: &[f32],
    x_stride: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    let rows = w.len() / (cols * E::SIZE);
    assert!(x_stride >= cols.next_multiple_of(LANES) && x.len() >= (C - 1) * x_stride + cols.next_multiple_of(LANES));
    assert!(out_stride >= rows && out.len() >= (C - 1) * out_stride + rows);
    let (w, x, out) = (w.as_ptr(), x.as_ptr(), out.as_mut_ptr());
    let mut r = 0;
    // SAFETY: rows r to r + R lie in w, and the asserts cover x and out.
    unsafe {
        while r + R <= rows {
            stream_rows::<L, E, R, C>(w.add(r * cols * E::SIZE), cols, x, x_stride, out.add(r), out_stride);
            r += R;
        }
        while r < rows {
            stream_rows::<L, E, 1, C>(w.add(r * cols * E::SIZE), cols, x, x_stride, out.add(r), out_stride);
            r += 1;
        }
    }
}

/// C columns of [`block`].
#[inline(always)]
unsafe fn block_columns<L: Lanes, const R: usize, const C: usize>(
    w: *const f32,
    rows: usize,
    x: *const f32,
    depth: usize,
    acc: *mut f32,
) {
    let mut r0 = 0;
    // SAFETY: the caller's; rows is a multiple of R.
    unsafe {
        while r0 < rows {
            let mut tile = [[L::splat(0.0); C]; R];
            for r in 0..R {
                for c in 0..C {
                    tile[r][c] = L::load_f32(acc.add((c * rows + r0 + r) * LANES).cast());
                }
            }
            let (mut w, mut x) = (w.add(r0 * depth), x);
            for _ in 0..depth / LANES {
                let mut group = [L::splat(0.0); R];
                for r in 0..R {
                    group[r] = L::load_f32(w.add(r * LANES).cast());
                }
                for c in 0..C {
                    let column = L::load_f32(x.add(c * LANES).cast());
                    for r in 0..R {
                        tile[r][c] = tile[r][c].fma(group[r], column);
                    }
                }
                (w, x) = (w.add(R * LANES), x.add(C * LANES));
            }
            for r in 0..R {
                for c in 0..C {
                    tile[r][c].store_f32(acc.add((c * rows + r0 + r) * LANES).cast());
                }
            }
            r0 += R;
        }
    }
}

/// `acc[t][r] += w[r] · x[t]` lane by lane: one block of K. `w` is `[rows / R][group][R][16]` with `rows` a multiple
/// of R, `x` `[tokens / C][group][C][16]` with as many columns as are left in its last tile, `acc` `[tokens, rows, 16]`.
/// C is at most 6.
#[inline(always)]
pub(super) unsafe fn block<L: Lanes, const R: usize, const C: usize>(
    w: &[f32],
    rows: usize,
    x: &[f32],
    tokens: usize,
    depth: usize,
    acc: &mut [f32],
) {
    assert!(rows.is_multiple_of(R) && depth.is_multiple_of(LANES));
    assert!(w.len() >= rows * depth && x.len() >= tokens * depth && acc.len() >= tokens * rows * LANES);
    let mut t = 0;
    while t < tokens {
        let left = (tokens - t).min(C);
        // SAFETY: columns t to t + left lie in x and acc, by the asserts.
        unsafe {
            let (x, acc) = (x.as_ptr().add(t * depth), acc.as_mut_ptr().add(t * rows * LANES));
            // Branches for more than C columns are never reached and compile to nothing.
            if C >= 6 && left == 6 {
                block_columns::<L, R, 6>(w.as_ptr(), rows, x, depth, acc);
            } else if C >= 5 && left == 5 {
                block_columns::<L, R, 5>(w.as_ptr(), rows, x, depth, acc);
            } else if C >= 4 && left == 4 {
                block_columns::<L, R, 4>(w.as_ptr(), rows, x, depth, acc);
            } else if C >= 3 && left == 3 {
                block_columns::<L, R, 3>(w.as_ptr(), rows, x, depth, acc);
            } else if C >= 2 && left == 2 {
                block_columns::<L, R, 2>(w.as_ptr(), rows, x, depth, acc);
            } else {
                block_columns::<L, R, 1>(w.as_ptr(), rows, x, depth, acc);
            }
        }
        t += left;
    }
}

/// `out[i]` = the contract's tree sum of the lanes `acc[i]`.
#[inline(always)]
pub(super) unsafe fn reduce<L: Lanes>(acc: &[f32], out: &mut [f32]) {
    assert!(acc.len() >= out.len() * LANES);
    for (i, value) in out.iter_mut().enumerate() {
        // SAFETY: sixteen elements, by the assert.
        *value = unsafe { L::load_f32(acc.as_ptr().add(i * LANES).cast()).sum() };
    }
}

/// C rows and D groups of columns of [`weighted_rows`].
#[inline(always)]
unsafe fn weighted_tile<L: Lanes, const C: usize, const D: usize>(
    p: *const f32,
    p_stride: usize,
    n: usize,
    v: *const f32,
    width: usize,
    acc: *mut f32,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut tile = [[L::splat(0.0); D]; C];
        for c in 0..C {
            for d in 0..D {
                tile[c][d] = L::load_f32(acc.add(c * width + d * LANES).cast());
            }
        }
        for j in 0..n {
            let mut row = [L::splat(0.0); D];
            for d in 0..D {
                row[d] = L::load_f32(v.add(j * width + d * LANES).cast());
            }
            for c in 0..C {
                let weight = L::splat(*p.add(c * p_stride + j));
                for d in 0..D {
                    tile[c][d] = tile[c][d].fma(weight, row[d]);
                }
            }
        }
        for c in 0..C {
            for d in 0..D {
                tile[c][d].store_f32(acc.add(c * width + d * LANES).cast());
            }
        }
    }
}

/// `acc[c] += Σ_j p[c · p_stride + j] · v[j]`, ascending in j by fused multiply-add, for C rows. `v` is `[n, width]`,
/// `acc` `[C, width]`, `width` a multiple of 16. Tiles are C × D groups.
#[inline(always)]
pub(super) unsafe fn weighted_rows<L: Lanes, const C: usize, const D: usize>(
    p: &[f32],
    p_stride: usize,
    n: usize,
    v: &[f32],
    width: usize,
    acc: &mut [f32],
) {
    assert!(width.is_multiple_of(LANES) && v.len() >= n * width && acc.len() >= C * width);
    assert!(p.len() >= (C - 1) * p_stride + n);
    let mut i = 0;
    // SAFETY: columns i to i + 16·D lie within the width; the asserts cover the rest.
    unsafe {
        while i + D * LANES <= width {
            let acc = acc.as_mut_ptr().add(i);
            weighted_tile::<L, C, D>(p.as_ptr(), p_stride, n, v.as_ptr().add(i), width, acc);
            i += D * LANES;
        }
        while i < width {
            let acc = acc.as_mut_ptr().add(i);
            weighted_tile::<L, C, 1>(p.as_ptr(), p_stride, n, v.as_ptr().add(i), width, acc);
            i += LANES;
        }
    }
}

/// The sum of all words, modulo 2^64. It reads memory and does little else.
#[inline(always)]
pub(super) fn sum_words(words: &[u64]) -> u64 {
    let mut lanes = [0u64; 2 * LANES];
    let mut groups = words.chunks_exact(2 * LANES);
    for group in &mut groups {
        for l in 0..2 * LANES {
            lanes[l] = lanes[l].wrapping_add(group[l]);
        }
    }
    lanes.iter().chain(groups.remainder()).fold(0, |sum, word| sum.wrapping_add(*word))
}

/// The largest element; −∞ if there is none. NaNs are ignored.
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut groups = x.chunks_exact(LANES);
    for group in &mut groups {
        for l in 0..LANES {
            lanes[l] = if group[l] > lanes[l] { group[l] } else { lanes[l] };
        }
    }
    let mut max = f32::NEG_INFINITY;
    for &value in lanes.iter().chain(groups.remainder()) {
        max = if value > max { value } else { max };
    }
    max
}

/// `x[i] = exp(x[i] − max)`.
#[inline(always)]
pub(super) fn exp(x: &mut [f32], max: f32) {
    for value in x {
        *value = math::exp(*value - max);
    }
}

/// `up[i] = silu(gate[i]) · up[i]`.
#[inline(always)]
pub(super) fn silu_mul(up: &mut [f32], gate: &[f32]) {
    for (up, gate) in up.iter_mut().zip(gate) {
        *up *= math::silu(*gate);
    }
}
