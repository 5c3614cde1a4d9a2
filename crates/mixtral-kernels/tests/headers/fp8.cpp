// Compiles kernels/base/fp8.cuh for the host. Reads f32 from standard input and writes the byte of each; then writes, for
// every byte, what it becomes as f32, and what the kernels move of it for f16 and bf16, times the factor, as f32. The
// product itself is an instruction of the GPU.
#include <cmath>
#include <cstdio>
#include <cstring>

#define __device__
#define __forceinline__ inline
#define __CUDA_ARCH__ 800
#define asm(...)

template <typename To, typename From>
static To of_bits(From from) {
    To to;
    memcpy(&to, &from, 4);
    return to;
}
static float __uint_as_float(unsigned bits) { return of_bits<float>(bits); }
static unsigned __float_as_uint(float x) { return of_bits<unsigned>(x); }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static unsigned __byte_perm(unsigned, unsigned, unsigned) { return 0; }

#include "base/fp8.cuh"

static float widened(f16_t x) {
    const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    const float magnitude = exponent == 0 ? ldexpf(mantissa, -24) : ldexpf(1024 + mantissa, exponent - 25);
    return x.bits >> 15 ? -magnitude : magnitude;
}
static float widened(bf16_t x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }

template <typename T>
static void write_moved(u32 byte) {
    // The byte is at every place of a word in turn; its neighbours are other bytes.
    for (int place = 0; place < 4; place++) {
        const u32 word = ~byte * 0x01010101 & ~(0xffu << place * 8) | byte << place * 8;
        const u32 pair = place % 2 == 0 ? fp8::move_even<T>(word) : fp8::move_odd<T>(word);
        const float x = widened(T{static_cast<u16>(pair >> place / 2 * 16)}) * widened(T{static_cast<u16>(fp8::Moved<T>::FACTOR)});
        fwrite(&x, 4, 1, stdout);
    }
}

int main() {
    float x;
    while (fread(&x, 4, 1, stdin) == 1) putchar(from_float<e4m3_t>(x).bits);
    for (u32 byte = 0; byte < 256; byte++) {
        x = to_float(e4m3_t{static_cast<u8>(byte)});
        fwrite(&x, 4, 1, stdout);
        write_moved<f16_t>(byte);
        write_moved<bf16_t>(byte);
    }
}
