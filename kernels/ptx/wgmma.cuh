// Warpgroup matrix products (sm_90a), f32 accumulation: D[64][N] += A[64][16] · B[N][16]ᵀ, both operands in shared memory with K
// innermost and the 128-byte swizzle; and those of attention, which has A in registers and N innermost.
#pragma once

#include "base/types.cuh"

namespace wgmma {

// The low word of the descriptor of a tile of rows of 128 bytes; the address is a multiple of 1024, the same for the whole
// warpgroup. 32 bytes (16 elements of K) further is `+ 2`. Taken from lane 0, so that the compiler knows it to be uniform: what is
// added to it then costs one uniform instruction, where 64-bit arithmetic in vector registers took 70 cycles a product.
// (The high word: 1024 bytes between groups of eight rows, 128-byte swizzle.)
__device__ __forceinline__ u32 descriptor(u32 shared) { return __shfl_sync(~0u, shared >> 4 | 0x10000, 0); }

// The same of a tile that has N innermost: rows of 64 elements of N one after another along K, and `LEADING` bytes after a block of
// 64 columns the next. 2048 bytes (16 rows of K) further is `+ 128`.
template <int LEADING>
__device__ __forceinline__ u32 descriptor_of_rows(u32 shared) {
    static_assert(LEADING % 1024 == 0, "whole groups of eight rows");
    return __shfl_sync(~0u, shared >> 4 | (LEADING >> 4) << 16, 0);
}

// Before the first product, and after registers of D were touched otherwise.
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `PENDING` groups are under way.
template <int PENDING>
__device__ __forceinline__ void wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving what reads or writes D across the asynchronous products.
template <int R>
__device__ __forceinline__ void pin(float (&d)[R]) {
#pragma unroll
    for (int i = 0; i < R; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// The same of what products take from registers.
template <int R>
__device__ __forceinline__ void pin(u32 (&a)[R][4]) {
#pragma unroll
    for (int i = 0; i < 4 * R; i++) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// Thread t of the warpgroup holds in d[i] row 16·(t / 32) + t % 32 / 4 + 8·(i % 4 / 2), column 8·(i / 4) + 2·(t % 4) + i % 2.
// `a` and `b` are descriptors.
template <typename T, int N>
struct Product;

#define PRODUCT_8(TYPE, SUFFIX) \
    template <> \
    struct Product<TYPE, 8> { \
        template <int R> \
        __device__ __forceinline__ static void run(float (&d)[R], u32 a, u32 b) { \
            asm volatile( \
                "{.reg .b64 a, b; mov.b64 a, {%4, 0x40000040}; mov.b64 b, {%5, 0x40000040}; " \
                "wgmma.mma_async.sync.aligned.m64n8k16.f32." SUFFIX "." SUFFIX " {" \
                "%0, %1, %2, %3" \
                "}, a, b, 1, 1, 1, 0, 0;}" \
                : \
                  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
                : "r"(a), "r"(b)); \
        } \
    };
PRODUCT_8(bf16_t, "bf16")
PRODUCT_8(f16_t, "f16")
#undef PRODUCT_8

#define PRODUCT_16(TYPE, SUFFIX) \
    template <> \
    struct Product<TYPE, 16> { \
        template <int R> \
        __device__ __forceinline__ static void run(float (&d)[R], u32 a, u32 b) { \
            asm volatile( \
                "{.reg .b64 a, b; mov.b64 a, {%8, 0x40000040}; mov.b64 b, {%9, 0x40000040}; " \
                "wgmma.mma_async.sync.aligned.m64n16k16.f32." SUFFIX "." SUFFIX " {" \
                "%0, %1, %2, %3, %4, %5, %6, %7" \
                "}, a, b, 1, 1, 1, 0, 0;}" \
                : \
                  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]) \
                : "r"(a), "r"(b)); \
        } \
    };
PRODUCT_16(bf16_t, "bf16")
PRODUCT_16(f16_t, "f16")
#undef PRODUCT_16

#define PRODUCT_24(TYPE, SUFFIX) \
    template <> \
    struct Product<TYPE, 24> { \
        template <int R> \
        __device__ __forceinline__ static void run(float (&d)[R], u32 a, u32 b) { \
            asm volatile( \
                "{.reg .b64 a, b; mov.b64 a, {%12, 0x40000040}; mov.b64 b, {%13, 0x40000040}; " \
                "wgmma.mma_async.sync.aligned.m64n24k16.f32." SUFFIX "." SUFFIX " {" \
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11" \
                "}, a, b, 1, 1, 1, 0, 0;}" \
                : \
                  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
                  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]) \
                : "r"(a), "r"(b)); \
        } \
    };
PRODUCT_24(bf16_t, "bf16")
PRODUCT_24(f16_t, "f16")
#undef PRODUCT_24

#define PRODUCT_32(TYPE, SUFFIX) \
    template <> \
    struct Product<TYPE, 32> { \
        template <int R> \
        __device__ __forceinline__ static void run(float (&d)[R], u32 a, u32 b) { \
            asm volatile( \
                "{.reg .b64 a, b; mov.b64 a, {%16, 0x40000040}; mov.b64 b, {%17, 0x40000040}; " \
                "wgmma.mma_async.sync.aligned.m64n32k16.f32." SUFFIX "." SUFFIX " {" \
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
                "}, a, b, 1, 1, 1, 0, 0;}" \
                : \
                  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
                  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]) \
                : "r"(a), "r"(b)); \
        } \
    };
PRODUCT_32(bf16_t, "bf16")
PRODUCT_32(f16_t, "f16")
#undef PRODUCT_32

#define PRODUCT_48(TYPE, SUFFIX) \
    template <> \
    struct Product<TYPE, 48> { \
        template <int R> \
        __device__ __forceinline__ static void run(float (&d)[R], u32 a, u32 b) { \
            asm volatile( \
                "{.reg .b64 a, b; mov.b64 a, {%24, 0x40000040}; mov.b64 b, {%25, 0x40000040}; " \
                "wgmma.mma_async.sync.aligned.m64n48k16.f32." SUFFIX "." SUFFIX " {" \
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                "%16, %17, %18, %19, %20, %21, %22, %23" \
                "}, a, b, 1, 1, 1, 0, 0;}" \
                : \
                  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
                  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
                  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]) \
                : "r"(a), "r"(b)); \
        } \
    };
PRODUCT_48(bf16_t, "bf16")
PRODUCT_48(f16_t, "f16")
#undef PRODUCT_48

#define PRODUCT_64(TYPE, SUFFIX) \
    template <> \
    struct Product<TYPE, 64> { \
        template <int R> \
        __device__ __forceinline__ static void run(float (&d)[R], u32 a, u32 b) { \
            asm volatile( \
                "{.reg .b64 a, b; mov.b64 a, {%32, 0x40000040}; mov.b64 b, {%33, 0x40000040}; " \
                "wgmma.mma_async.sync.aligned.m64n64k16.f32." SUFFIX "." SUFFIX " {" \
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
                "}, a, b, 1, 1, 1, 0, 0;}" \
                : \
                  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
                  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
                  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
                  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]) \
                : "r"(a), "r"(b)); \
        } \
    };
PRODUCT_64(bf16_t, "bf16")
PRODUCT_64(f16_t, "f16")
#undef PRODUCT_64

#define PRODUCT_72(TYPE, SUFFIX) \
    template <> \
    struct Product<TYPE, 72> { \
        template <int R> \
        __device__ __forceinline__ static void run(float (&d)[R], u32 a, u32 b) { \
            asm volatile( \
                "{.reg .b64 a, b; mov.b64 a, {%36, 0x40000040}; mov.b64 b, {%37, 0x40000040}; " \
                "wgmma.mma_async.sync.aligned.m64n72k16.f32." SUFFIX "." SUFFIX " {" \
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                "%32, %33, %34, %35" \
                "}, a, b, 1, 1, 1, 0, 0;}" \
                : \
                  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
                  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
                  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
                  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
                  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]) \
                : "r"(a), "r"(b)); \
        } \
    };
PRODUCT_72(bf16_t, "bf16")
PRODUCT_72(f16_t, "f16")
#undef PRODUCT_72

#define PRODUCT_96(TYPE, SUFFIX) \
    template <> \
    struct Product<TYPE, 96> { \
        template <int R> \
        __device__ __forceinline__ static void run(float (&d)[R], u32 a, u32 b) { \
            asm volatile( \
                "{.reg .b64 a, b; mov.b64 a, {%48, 0x40000040}; mov.b64 b, {%49, 0x40000040}; " \
                "wgmma.mma_async.sync.aligned.m64n96k16.f32." SUFFIX "." SUFFIX " {" \
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
                "}, a, b, 1, 1, 1, 0, 0;}" \
                : \
                  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
                  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
                  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
                  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
                  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
                  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]) \
                : "r"(a), "r"(b)); \
        } \
    };
PRODUCT_96(bf16_t, "bf16")
PRODUCT_96(f16_t, "f16")
#undef PRODUCT_96

#define PRODUCT_128(TYPE, SUFFIX) \
    template <> \
    struct Product<TYPE, 128> { \
        template <int R> \
        __device__ __forceinline__ static void run(float (&d)[R], u32 a, u32 b) { \
            asm volatile( \
                "{.reg .b64 a, b; mov.b64 a, {%64, 0x40000040}; mov.b64 b, {%65, 0x40000040}; " \
                "wgmma.mma_async.sync.aligned.m64n128k16.f32." SUFFIX "." SUFFIX " {" \
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
                "}, a, b, 1, 1, 1, 0, 0;}" \
                : \
                  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
                  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
                  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
                  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
                  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
                  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
                  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
                  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]) \
                : "r"(a), "r"(b)); \
        } \
    };
PRODUCT_128(bf16_t, "bf16")
PRODUCT_128(f16_t, "f16")
#undef PRODUCT_128

#define PRODUCT_144(TYPE, SUFFIX) \
    template <> \
    struct Product<TYPE, 144> { \
        template <int R> \
        __device__ __forceinline__ static void run(float (&d)[R], u32 a, u32 b) { \
            asm volatile( \
                "{.reg .b64 a, b; mov.b64 a, {%72, 0x40000040}; mov.b64 b, {%73, 0x40000040}; " \
                "wgmma.mma_async.sync.aligned.m64n144k16.f32." SUFFIX "." SUFFIX " {" \
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
                "%64, %65, %66, %67, %68, %69, %70, %71" \
                "}, a, b, 1, 1, 1, 0, 0;}" \
                : \
                  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
                  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
                  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
                  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
                  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
                  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
                  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
                  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), \
                  "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]) \
                : "r"(a), "r"(b)); \
        } \
    };
PRODUCT_144(bf16_t, "bf16")
PRODUCT_144(f16_t, "f16")
#undef PRODUCT_144

#define PRODUCT_192(TYPE, SUFFIX) \
    template <> \
    struct Product<TYPE, 192> { \
        template <int R> \
        __device__ __forceinline__ static void run(float (&d)[R], u32 a, u32 b) { \
            asm volatile( \
                "{.reg .b64 a, b; mov.b64 a, {%96, 0x40000040}; mov.b64 b, {%97, 0x40000040}; " \
                "wgmma.mma_async.sync.aligned.m64n192k16.f32." SUFFIX "." SUFFIX " {" \
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
                "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
                "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
                "}, a, b, 1, 1, 1, 0, 0;}" \
                : \
                  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
                  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
                  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
                  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
                  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
                  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
                  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
                  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), \
                  "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
                  "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
                  "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
                  "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]) \
                : "r"(a), "r"(b)); \
        } \
    };
PRODUCT_192(bf16_t, "bf16")
PRODUCT_192(f16_t, "f16")
#undef PRODUCT_192

#define PRODUCT_256(TYPE, SUFFIX) \
    template <> \
    struct Product<TYPE, 256> { \
        template <int R> \
        __device__ __forceinline__ static void run(float (&d)[R], u32 a, u32 b) { \
            asm volatile( \
                "{.reg .b64 a, b; mov.b64 a, {%128, 0x40000040}; mov.b64 b, {%129, 0x40000040}; " \
                "wgmma.mma_async.sync.aligned.m64n256k16.f32." SUFFIX "." SUFFIX " {" \
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
                "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
                "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
                "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
                "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127" \
                "}, a, b, 1, 1, 1, 0, 0;}" \
                : \
                  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
                  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
                  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
                  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
                  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
                  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
                  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
                  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), \
                  "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
                  "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
                  "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
                  "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), \
                  "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), \
                  "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), \
                  "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
                  "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127]) \
                : "r"(a), "r"(b)); \
        } \
    };
PRODUCT_256(bf16_t, "bf16")
PRODUCT_256(f16_t, "f16")
#undef PRODUCT_256

// D[64][N] = A[64][16] · B[N][16]ᵀ: as `Product`, for the first step of a sum. What D holds is not read.
template <typename T, int N>
struct FirstProduct;

#define FIRST_PRODUCT_64(TYPE, SUFFIX) \
    template <> \
    struct FirstProduct<TYPE, 64> { \
        template <int R> \
        __device__ __forceinline__ static void run(float (&d)[R], u32 a, u32 b) { \
            asm volatile( \
                "{.reg .b64 a, b; mov.b64 a, {%32, 0x40000040}; mov.b64 b, {%33, 0x40000040}; " \
                "wgmma.mma_async.sync.aligned.m64n64k16.f32." SUFFIX "." SUFFIX " {" \
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
                "}, a, b, 0, 1, 1, 0, 0;}" \
                : \
                  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
                  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
                  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
                  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]) \
                : "r"(a), "r"(b)); \
        } \
    };
FIRST_PRODUCT_64(bf16_t, "bf16")
FIRST_PRODUCT_64(f16_t, "f16")
#undef FIRST_PRODUCT_64

#define FIRST_PRODUCT_128(TYPE, SUFFIX) \
    template <> \
    struct FirstProduct<TYPE, 128> { \
        template <int R> \
        __device__ __forceinline__ static void run(float (&d)[R], u32 a, u32 b) { \
            asm volatile( \
                "{.reg .b64 a, b; mov.b64 a, {%64, 0x40000040}; mov.b64 b, {%65, 0x40000040}; " \
                "wgmma.mma_async.sync.aligned.m64n128k16.f32." SUFFIX "." SUFFIX " {" \
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
                "}, a, b, 0, 1, 1, 0, 0;}" \
                : \
                  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
                  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
                  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
                  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
                  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
                  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
                  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
                  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]) \
                : "r"(a), "r"(b)); \
        } \
    };
FIRST_PRODUCT_128(bf16_t, "bf16")
FIRST_PRODUCT_128(f16_t, "f16")
#undef FIRST_PRODUCT_128

// D[64][N] += A[64][16] · B[16][N]. A comes from registers, which hold it as D holds 16 of its columns, two elements in one: a[j] has
// d[2·j] and d[2·j + 1]. B lies in shared memory with N innermost; `b` is of `descriptor_of_rows`.
template <typename T, int N>
struct RegisterProduct;

#define REGISTER_PRODUCT_64(TYPE, SUFFIX) \
    template <> \
    struct RegisterProduct<TYPE, 64> { \
        template <int R> \
        __device__ __forceinline__ static void run(float (&d)[R], const u32 (&a)[4], u32 b) { \
            asm volatile( \
                "{.reg .b64 b; mov.b64 b, {%36, 0x40000040}; " \
                "wgmma.mma_async.sync.aligned.m64n64k16.f32." SUFFIX "." SUFFIX " {" \
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
                "}, {%32, %33, %34, %35}, b, 1, 1, 1, 1;}" \
                : \
                  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
                  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
                  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
                  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]) \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b)); \
        } \
    };
REGISTER_PRODUCT_64(bf16_t, "bf16")
REGISTER_PRODUCT_64(f16_t, "f16")
#undef REGISTER_PRODUCT_64

#define REGISTER_PRODUCT_128(TYPE, SUFFIX) \
    template <> \
    struct RegisterProduct<TYPE, 128> { \
        template <int R> \
        __device__ __forceinline__ static void run(float (&d)[R], const u32 (&a)[4], u32 b) { \
            asm volatile( \
                "{.reg .b64 b; mov.b64 b, {%68, 0x40000040}; " \
                "wgmma.mma_async.sync.aligned.m64n128k16.f32." SUFFIX "." SUFFIX " {" \
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
                "}, {%64, %65, %66, %67}, b, 1, 1, 1, 1;}" \
                : \
                  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
                  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
                  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
                  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
                  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
                  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
                  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
                  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]) \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b)); \
        } \
    };
REGISTER_PRODUCT_128(bf16_t, "bf16")
REGISTER_PRODUCT_128(f16_t, "f16")
#undef REGISTER_PRODUCT_128

}  // namespace wgmma
