// Compiles kernels/base/fp8.cuh for the host. Reads f32 from standard input and writes the byte of each; then writes, for
// every byte, what it becomes as f32, and what the kernels move of it for f16 and bf16, times the factor, as f32. The
// product itself is an instruction of the GPU. Ends with 1 if the byte of a quotient depends on how it was divided.
#include <cstdio>
#include <initializer_list>

#include "host.h"
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

// Whether x / by becomes the same byte if it is divided as the kernels do.
static bool divides(float x, float by) {
    float quotient[1] = {x};
    fp8::Divisor(by).divide(quotient);
    return from_float<e4m3_t>(quotient[0]).bits == from_float<e4m3_t>(x / by).bits;
}

int main() {
    bool same = true;
    float x;
    while (fread(&x, 4, 1, stdin) == 1) {
        putchar(from_float<e4m3_t>(x).bits);
        for (float by : {1.0f, 0.1f, 3.7e-3f, 448.0f, 1e-12f, 9.9e-21f, 1.1e-20f, 1.2e-38f, 9.9e19f, 1.1e20f, 3e38f}) {
            same &= divides(x, by);
        }
    }
    // Quotients at the borders between two bytes, and beside them.
    for (u32 i = 1; i < 4000; i++) {
        const float by = __uint_as_float(0x3f800000 + i * 2097) * ldexpf(1.0f, static_cast<int>(i % 60) - 30);
        for (u32 byte = 0; byte < 0x7e; byte++) {
            const float low = to_float(e4m3_t{static_cast<u8>(byte)}), high = to_float(e4m3_t{static_cast<u8>(byte + 1)});
            const u32 bits = __float_as_uint((low + high) / 2 * by);
            for (int step = -2; step <= 2; step++) same &= divides(__uint_as_float(bits + step), by);
        }
    }
    for (u32 byte = 0; byte < 256; byte++) {
        x = to_float(e4m3_t{static_cast<u8>(byte)});
        fwrite(&x, 4, 1, stdout);
        write_moved<f16_t>(byte);
        write_moved<bf16_t>(byte);
    }
    return same ? 0 : 1;
}
