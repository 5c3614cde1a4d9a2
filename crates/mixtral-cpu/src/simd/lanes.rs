//! A vector of the contract's 16 lanes, on each instruction set.
//!
//! All implementations give the same bits: a fused multiply-add rounds once, widening is exact, narrowing rounds to
//! nearest even, and `sum` adds in the contract's tree.

use half::{bf16, f16};

/// Lanes of a vector, and of the contract's dot product.
pub(crate) const LANES: usize = 16;

/// Sixteen f32 lanes. Pointers need no alignment. Loads and stores access exactly sixteen elements.
pub(super) trait Lanes: Copy {
    /// All lanes `x`.
    unsafe fn splat(x: f32) -> Self;
    /// Sixteen f32.
    unsafe fn load_f32(p: *const u8) -> Self;
    /// Sixteen bf16, widened.
    unsafe fn load_bf16(p: *const u8) -> Self;
    /// Sixteen f16, widened.
    unsafe fn load_f16(p: *const u8) -> Self;
    /// Sixteen bytes as unsigned integers, widened.
    unsafe fn load_u8(p: *const u8) -> Self;
    /// Sixteen unsigned integers of 4 bits, widened: two a byte, the first in the lower half.
    unsafe fn load_u4(p: *const u8) -> Self;
    /// Sixteen f32.
    unsafe fn store_f32(self, p: *mut u8);
    /// Sixteen bf16, rounded.
    unsafe fn store_bf16(self, p: *mut u8);
    /// Sixteen f16, rounded.
    unsafe fn store_f16(self, p: *mut u8);
    /// `self + a · b` with one rounding a lane.
    unsafe fn fma(self, a: Self, b: Self) -> Self;
    /// The lanes' sum: l with l + 8, then + 4, + 2, + 1.
    unsafe fn sum(self) -> f32;
    /// Prefetches the cache line at `p`. `p` may point anywhere.
    fn prefetch(p: *const u8);
}

/// Plain Rust, for machines without the vector instructions and for comparison.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; LANES]);

// SAFETY (of every implementation below): callers of the trait guarantee sixteen readable or writable elements.
impl Lanes for Portable {
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Portable([x; LANES])
    }

    #[inline(always)]
    unsafe fn load_f32(p: *const u8) -> Self {
        // SAFETY: sixteen readable elements, by contract.
        Portable(unsafe { p.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        // SAFETY: sixteen readable elements, by contract.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        Portable(bits.map(|b| f32::from_bits(u32::from(b) << 16)))
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        // SAFETY: sixteen readable elements, by contract.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        Portable(bits.map(|b| f16::from_bits(b).to_f32()))
    }

    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self {
        // SAFETY: sixteen readable elements, by contract.
        Portable(unsafe { p.cast::<[u8; LANES]>().read_unaligned() }.map(f32::from))
    }

    #[inline(always)]
    unsafe fn load_u4(p: *const u8) -> Self {
        // SAFETY: sixteen readable elements, by contract.
        let bytes = unsafe { p.cast::<[u8; LANES / 2]>().read_unaligned() };
        Portable(std::array::from_fn(|lane| f32::from(bytes[lane / 2] >> (lane % 2 * 4) & 15)))
    }

    #[inline(always)]
    unsafe fn store_f32(self, p: *mut u8) {
        // SAFETY: sixteen writable elements, by contract.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(self.0) };
    }

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u8) {
        // SAFETY: sixteen writable elements, by contract.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(self.0.map(|x| bf16::from_f32(x).to_bits())) };
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u8) {
        // SAFETY: sixteen writable elements, by contract.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(self.0.map(|x| f16::from_f32(x).to_bits())) };
    }

    #[inline(always)]
    unsafe fn fma(mut self, a: Self, b: Self) -> Self {
        for l in 0..LANES {
            self.0[l] = a.0[l].mul_add(b.0[l], self.0[l]);
        }
        self
    }

    #[inline(always)]
    unsafe fn sum(mut self) -> f32 {
        for half in [8, 4, 2, 1] {
            for l in 0..half {
                self.0[l] += self.0[l + half];
            }
        }
        self.0[0]
    }

    #[inline(always)]
    fn prefetch(_: *const u8) {}
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Lanes;

    /// Two halves of 8 lanes. Needs AVX2, FMA and F16C.
    #[derive(Clone, Copy)]
    pub(in crate::simd) struct Avx2(__m256, __m256);

    /// `round to nearest even` as F16C's immediate.
    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;

    /// Lanes 0 to 3 summed as (0 + 2) + (1 + 3).
    #[inline(always)]
    unsafe fn sum4(x: __m128) -> f32 {
        // SAFETY: SSE is part of the architecture.
        unsafe {
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps::<1>(x, x)))
        }
    }

    /// Sixteen integers of 4 bits as bytes.
    #[inline(always)]
    unsafe fn spread(p: *const u8) -> __m128i {
        // SAFETY: SSE2 is part of the architecture; eight readable bytes, by the caller.
        unsafe {
            let pairs = _mm_loadl_epi64(p.cast());
            let low = _mm_and_si128(pairs, _mm_set1_epi8(15));
            let high = _mm_and_si128(_mm_srli_epi16::<4>(pairs), _mm_set1_epi8(15));
            _mm_unpacklo_epi8(low, high)
        }
    }

    /// Eight f32 as bf16, in the low halves of 32-bit lanes.
    #[inline(always)]
    unsafe fn round_bf16(x: __m256) -> __m256i {
        // SAFETY: the caller runs with AVX2.
        unsafe {
            let bits = _mm256_castps_si256(x);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
            let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, bias));
            let quiet = _mm256_or_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(0x40));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
            _mm256_blendv_epi8(rounded, quiet, nan)
        }
    }

    // SAFETY (of every block below): the caller runs with AVX2, FMA and F16C, and the pointers hold sixteen
    // elements, by the trait's contract.
    #[expect(clippy::undocumented_unsafe_blocks, reason = "one contract for all, stated above")]
    impl Lanes for Avx2 {
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { Avx2(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
        }

        #[inline(always)]
        unsafe fn load_f32(p: *const u8) -> Self {
            unsafe { Avx2(_mm256_loadu_ps(p.cast()), _mm256_loadu_ps(p.add(32).cast())) }
        }

        #[inline(always)]
        unsafe fn load_bf16(p: *const u8) -> Self {
            unsafe {
                let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(16).cast()));
                Avx2(
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
                )
            }
        }

        #[inline(always)]
        unsafe fn load_f16(p: *const u8) -> Self {
            unsafe {
                Avx2(_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(16).cast())))
            }
        }

        #[inline(always)]
        unsafe fn load_u8(p: *const u8) -> Self {
            unsafe { Avx2::of_bytes(_mm_loadu_si128(p.cast())) }
        }

        #[inline(always)]
        unsafe fn load_u4(p: *const u8) -> Self {
            unsafe { Avx2::of_bytes(spread(p)) }
        }

        #[inline(always)]
        unsafe fn store_f32(self, p: *mut u8) {
            unsafe {
                _mm256_storeu_ps(p.cast(), self.0);
                _mm256_storeu_ps(p.add(32).cast(), self.1);
            }
        }

        #[inline(always)]
        unsafe fn store_bf16(self, p: *mut u8) {
            unsafe {
                // Packing works on 128-bit halves; the permutation puts the four quarters in order.
                let packed = _mm256_packus_epi32(round_bf16(self.0), round_bf16(self.1));
                _mm256_storeu_si256(p.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
            }
        }

        #[inline(always)]
        unsafe fn store_f16(self, p: *mut u8) {
            unsafe {
                _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<NEAREST>(self.0));
                _mm_storeu_si128(p.add(16).cast(), _mm256_cvtps_ph::<NEAREST>(self.1));
            }
        }

        #[inline(always)]
        unsafe fn fma(self, a: Self, b: Self) -> Self {
            unsafe { Avx2(_mm256_fmadd_ps(a.0, b.0, self.0), _mm256_fmadd_ps(a.1, b.1, self.1)) }
        }

        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe {
                let x = _mm256_add_ps(self.0, self.1);
                sum4(_mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x)))
            }
        }

        #[inline(always)]
        fn prefetch(p: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) };
        }
    }

    impl Avx2 {
        /// Sixteen bytes, widened.
        #[inline(always)]
        unsafe fn of_bytes(bytes: __m128i) -> Self {
            // SAFETY: the caller runs with AVX2.
            unsafe {
                let widen = |bytes| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
                Avx2(widen(bytes), widen(_mm_srli_si128::<8>(bytes)))
            }
        }
    }

    /// One register. Needs AVX-512F besides what [`Avx2`] needs.
    #[derive(Clone, Copy)]
    pub(in crate::simd) struct Avx512(__m512);

    // SAFETY (of every block below): the caller runs with AVX-512F, AVX2, FMA and F16C, and the pointers hold
    // sixteen elements, by the trait's contract.
    #[expect(clippy::undocumented_unsafe_blocks, reason = "one contract for all, stated above")]
    impl Lanes for Avx512 {
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { Avx512(_mm512_set1_ps(x)) }
        }

        #[inline(always)]
        unsafe fn load_f32(p: *const u8) -> Self {
            unsafe { Avx512(_mm512_loadu_ps(p.cast())) }
        }

        #[inline(always)]
        unsafe fn load_bf16(p: *const u8) -> Self {
            unsafe {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)))
            }
        }

        #[inline(always)]
        unsafe fn load_f16(p: *const u8) -> Self {
            unsafe { Avx512(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))) }
        }

        #[inline(always)]
        unsafe fn load_u8(p: *const u8) -> Self {
            unsafe { Avx512(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())))) }
        }

        #[inline(always)]
        unsafe fn load_u4(p: *const u8) -> Self {
            unsafe { Avx512(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(spread(p)))) }
        }

        #[inline(always)]
        unsafe fn store_f32(self, p: *mut u8) {
            unsafe { _mm512_storeu_ps(p.cast(), self.0) };
        }

        #[inline(always)]
        unsafe fn store_bf16(self, p: *mut u8) {
            unsafe {
                let bits = _mm512_castps_si512(self.0);
                let high = _mm512_srli_epi32::<16>(bits);
                let bias = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
                let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, bias));
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
                let result = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
                _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(result));
            }
        }

        #[inline(always)]
        unsafe fn store_f16(self, p: *mut u8) {
            unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<NEAREST>(self.0)) };
        }

        #[inline(always)]
        unsafe fn fma(self, a: Self, b: Self) -> Self {
            unsafe { Avx512(_mm512_fmadd_ps(a.0, b.0, self.0)) }
        }

        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe {
                let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self.0)));
                let x = _mm256_add_ps(_mm512_castps512_ps256(self.0), high);
                sum4(_mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x)))
            }
        }

        #[inline(always)]
        fn prefetch(p: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) };
        }
    }
}
