// Warpgroup matrix products (sm_90a), f32 accumulation: D[64][N] += A[64][16] · B[N][16]ᵀ, with both operands in shared
// memory, K innermost, and the 128-byte swizzle; of e4m3 A[64][32] and B[N][32]. Also the products of attention, which have A in registers and N
// innermost in B.
#pragma once

#include "base/fp8.cuh"
#include "base/types.cuh"

namespace wgmma {

// The low word of the descriptor of a tile of rows of 128 bytes. The address is a multiple of 1024, and the same for
// the whole warpgroup. Adding 2 moves it 32 bytes (a product's part of K) further. The word is taken from lane 0, so that
// the compiler knows it to be uniform. An addition then takes one uniform instruction; 64-bit arithmetic in vector
// registers took 70 cycles a product. (The high word says: 1024 bytes between groups of eight rows, 128-byte swizzle.)
__device__ __forceinline__ u32 descriptor(u32 shared) { return __shfl_sync(~0u, shared >> 4 | 0x10000, 0); }

// The same for a tile that has N innermost. Its rows of 64 elements of N lie one after another along K, and blocks of
// 64 columns lie `LEADING` bytes apart. Adding 128 moves it 2048 bytes (16 rows of K) further.
template <int LEADING>
__device__ __forceinline__ u32 descriptor_of_rows(u32 shared) {
    static_assert(LEADING % 1024 == 0, "whole groups of eight rows");
    return __shfl_sync(~0u, shared >> 4 | (LEADING >> 4) << 16, 0);
}

// Called before the first product, and after anything but a product has accessed registers of D.
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `PENDING` groups are under way.
template <int PENDING>
__device__ __forceinline__ void wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving reads and writes of D across the asynchronous products.
template <int R>
__device__ __forceinline__ void pin(float (&d)[R]) {
#pragma unroll
    for (int i = 0; i < R; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// The same for operands that products take from registers.
template <int R>
__device__ __forceinline__ void pin(u32 (&a)[R][4]) {
#pragma unroll
    for (int i = 0; i < 4 * R; i++) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// An instruction names each of its registers: first the accumulators %0 …, then the operands that it reads. Each list
// of registers is made from the next shorter list.
#define REGISTERS_4 "%0, %1, %2, %3"
#define REGISTERS_8 REGISTERS_4 ", %4, %5, %6, %7"
#define REGISTERS_12 REGISTERS_8 ", %8, %9, %10, %11"
#define REGISTERS_16 REGISTERS_12 ", %12, %13, %14, %15"
#define REGISTERS_24 REGISTERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define REGISTERS_32 REGISTERS_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_36 REGISTERS_32 ", %32, %33, %34, %35"
#define REGISTERS_48 REGISTERS_36 ", %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define REGISTERS_64 REGISTERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_68 REGISTERS_64 ", %64, %65, %66, %67"
#define REGISTERS_72 REGISTERS_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define REGISTERS_96 REGISTERS_72 \
    ", %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87" \
    ", %88, %89, %90, %91, %92, %93, %94, %95"
#define REGISTERS_128 REGISTERS_96 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define ACCUMULATORS_4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define ACCUMULATORS_8 ACCUMULATORS_4, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define ACCUMULATORS_12 ACCUMULATORS_8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define ACCUMULATORS_16 ACCUMULATORS_12, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define ACCUMULATORS_24 ACCUMULATORS_16, \
    "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define ACCUMULATORS_32 ACCUMULATORS_24, \
    "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define ACCUMULATORS_36 ACCUMULATORS_32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define ACCUMULATORS_48 ACCUMULATORS_36, \
    "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), \
    "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define ACCUMULATORS_64 ACCUMULATORS_48, \
    "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
    "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define ACCUMULATORS_68 ACCUMULATORS_64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define ACCUMULATORS_72 ACCUMULATORS_64, \
    "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define ACCUMULATORS_96 ACCUMULATORS_72, \
    "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
    "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
    "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define ACCUMULATORS_128 ACCUMULATORS_96, \
    "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), \
    "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), \
    "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
    "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// Thread t of the warpgroup holds in d[i] row 16·(t / 32) + t % 32 / 4 + 8·(i % 4 / 2), column 8·(i / 4) + 2·(t % 4) + i % 2.
// `a` and `b` are descriptors.
template <typename T, int N>
struct Product;

// D[64][N] = A[64][16] · B[N][16]ᵀ: as `Product`, for the first product of a sum. It does not read D.
template <typename T, int N>
struct FirstProduct;

// As `Product` and `FirstProduct`, but A comes from registers: a[0] to a[3] are the four registers of ptx::mma's A
// operand, and warp w of the warpgroup has rows 16·w to 16·w + 15. Of e4m3 a register has four elements, of columns 4·(t % 4) to
// 4·(t % 4) + 3 and, in a[2] and a[3], 16 behind these.
template <typename T, int N>
struct FragmentProduct;
template <typename T, int N>
struct FirstFragmentProduct;

// D[64][N] += A[64][16] · B[16][N]. A comes from registers in the layout of 16 columns of D, two elements in each: a[j]
// has d[2·j] and d[2·j + 1]. B lies in shared memory with N innermost; `b` comes from `descriptor_of_rows`.
template <typename T, int N>
struct RegisterProduct;

// Both operands by descriptor. There are COUNT = N / 2 accumulators; A and B are the operands behind them. D is read if
// ADDS. SHAPE is the product's part of K, and FLAGS are the operands that follow: signs, and of 16-bit types which side of
// A and B is innermost.
#define SHARED_PRODUCT(NAME, TYPE, SHAPE, FLAGS, N, COUNT, A, B, ADDS) \
    template <> \
    struct NAME<TYPE##_t, N> { \
        template <int R> \
        __device__ __forceinline__ static void run(float (&d)[R], u32 a, u32 b) { \
            asm volatile("{.reg .b64 a, b; mov.b64 a, {%" #A ", 0x40000040}; mov.b64 b, {%" #B ", 0x40000040}; " \
                         "wgmma.mma_async.sync.aligned.m64n" #N SHAPE ".f32." #TYPE "." #TYPE " {" REGISTERS_##COUNT \
                         "}, a, b, " #ADDS ", " FLAGS ";}" \
                         : ACCUMULATORS_##COUNT \
                         : "r"(a), "r"(b)); \
        } \
    };

// A from the four registers A0 …, B by descriptor. D is read if ADDS. SHAPE and FLAGS are as above, without A's side.
#define REGISTER_PRODUCT(NAME, TYPE, SHAPE, FLAGS, N, COUNT, A0, A1, A2, A3, B, ADDS) \
    template <> \
    struct NAME<TYPE##_t, N> { \
        template <int R> \
        __device__ __forceinline__ static void run(float (&d)[R], const u32 (&a)[4], u32 b) { \
            asm volatile("{.reg .b64 b; mov.b64 b, {%" #B ", 0x40000040}; " \
                         "wgmma.mma_async.sync.aligned.m64n" #N SHAPE ".f32." #TYPE "." #TYPE " {" REGISTERS_##COUNT \
                         "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, b, " #ADDS ", " FLAGS ";}" \
                         : ACCUMULATORS_##COUNT \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b)); \
        } \
    };

#define FRAGMENT_PRODUCTS(NAME, TYPE, ADDS) \
    REGISTER_PRODUCT(NAME, TYPE, "k16", "1, 1, 0", 8, 4, 4, 5, 6, 7, 8, ADDS) \
    REGISTER_PRODUCT(NAME, TYPE, "k16", "1, 1, 0", 16, 8, 8, 9, 10, 11, 12, ADDS) \
    REGISTER_PRODUCT(NAME, TYPE, "k16", "1, 1, 0", 24, 12, 12, 13, 14, 15, 16, ADDS) \
    REGISTER_PRODUCT(NAME, TYPE, "k16", "1, 1, 0", 32, 16, 16, 17, 18, 19, 20, ADDS) \
    REGISTER_PRODUCT(NAME, TYPE, "k16", "1, 1, 0", 48, 24, 24, 25, 26, 27, 28, ADDS) \
    REGISTER_PRODUCT(NAME, TYPE, "k16", "1, 1, 0", 64, 32, 32, 33, 34, 35, 36, ADDS) \
    REGISTER_PRODUCT(NAME, TYPE, "k16", "1, 1, 0", 72, 36, 36, 37, 38, 39, 40, ADDS) \
    REGISTER_PRODUCT(NAME, TYPE, "k16", "1, 1, 0", 96, 48, 48, 49, 50, 51, 52, ADDS) \
    REGISTER_PRODUCT(NAME, TYPE, "k16", "1, 1, 0", 128, 64, 64, 65, 66, 67, 68, ADDS) \
    REGISTER_PRODUCT(NAME, TYPE, "k16", "1, 1, 0", 144, 72, 72, 73, 74, 75, 76, ADDS) \
    REGISTER_PRODUCT(NAME, TYPE, "k16", "1, 1, 0", 192, 96, 96, 97, 98, 99, 100, ADDS) \
    REGISTER_PRODUCT(NAME, TYPE, "k16", "1, 1, 0", 256, 128, 128, 129, 130, 131, 132, ADDS)
#define SHARED_PRODUCTS(NAME, TYPE, SHAPE, FLAGS, ADDS) \
    SHARED_PRODUCT(NAME, TYPE, SHAPE, FLAGS, 8, 4, 4, 5, ADDS) \
    SHARED_PRODUCT(NAME, TYPE, SHAPE, FLAGS, 16, 8, 8, 9, ADDS) \
    SHARED_PRODUCT(NAME, TYPE, SHAPE, FLAGS, 24, 12, 12, 13, ADDS) \
    SHARED_PRODUCT(NAME, TYPE, SHAPE, FLAGS, 32, 16, 16, 17, ADDS) \
    SHARED_PRODUCT(NAME, TYPE, SHAPE, FLAGS, 48, 24, 24, 25, ADDS) \
    SHARED_PRODUCT(NAME, TYPE, SHAPE, FLAGS, 64, 32, 32, 33, ADDS) \
    SHARED_PRODUCT(NAME, TYPE, SHAPE, FLAGS, 72, 36, 36, 37, ADDS) \
    SHARED_PRODUCT(NAME, TYPE, SHAPE, FLAGS, 96, 48, 48, 49, ADDS) \
    SHARED_PRODUCT(NAME, TYPE, SHAPE, FLAGS, 128, 64, 64, 65, ADDS) \
    SHARED_PRODUCT(NAME, TYPE, SHAPE, FLAGS, 144, 72, 72, 73, ADDS) \
    SHARED_PRODUCT(NAME, TYPE, SHAPE, FLAGS, 192, 96, 96, 97, ADDS) \
    SHARED_PRODUCT(NAME, TYPE, SHAPE, FLAGS, 256, 128, 128, 129, ADDS)
#define PRODUCTS(TYPE) \
    SHARED_PRODUCTS(Product, TYPE, "k16", "1, 1, 0, 0", 1) \
    SHARED_PRODUCT(FirstProduct, TYPE, "k16", "1, 1, 0, 0", 64, 32, 32, 33, 0) \
    SHARED_PRODUCT(FirstProduct, TYPE, "k16", "1, 1, 0, 0", 128, 64, 64, 65, 0) \
    REGISTER_PRODUCT(RegisterProduct, TYPE, "k16", "1, 1, 1", 64, 32, 32, 33, 34, 35, 36, 1) \
    REGISTER_PRODUCT(RegisterProduct, TYPE, "k16", "1, 1, 1", 128, 64, 64, 65, 66, 67, 68, 1) \
    FRAGMENT_PRODUCTS(FragmentProduct, TYPE, 1) \
    FRAGMENT_PRODUCTS(FirstFragmentProduct, TYPE, 0)
PRODUCTS(bf16)
PRODUCTS(f16)
REGISTER_PRODUCT(FragmentProduct, e4m3, "k32", "1, 1", 136, 68, 68, 69, 70, 71, 72, 1)
REGISTER_PRODUCT(FirstFragmentProduct, e4m3, "k32", "1, 1", 136, 68, 68, 69, 70, 71, 72, 0)
SHARED_PRODUCTS(Product, e4m3, "k32", "1, 1", 1)
SHARED_PRODUCTS(FirstProduct, e4m3, "k32", "1, 1", 0)
#undef PRODUCTS
#undef SHARED_PRODUCTS
#undef FRAGMENT_PRODUCTS
#undef REGISTER_PRODUCT
#undef SHARED_PRODUCT

}  // namespace wgmma
