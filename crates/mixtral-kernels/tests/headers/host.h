// The host's stand-ins for what kernels use of CUDA, so that tests can compile their headers with any C++ compiler.
#pragma once

#include <cmath>
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
static float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static unsigned __byte_perm(unsigned, unsigned, unsigned) { return 0; }
