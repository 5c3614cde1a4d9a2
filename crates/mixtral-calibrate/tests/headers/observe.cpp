// Compiles kernels/observe/rows.cuh for the host and runs its kernels, a CTA after another, each thread of a CTA as a thread here. Reads a
// step from standard input: the numbers of tokens and sequences, where the sequences begin, where the experts' lists begin, the
// lists, the rows of the tokens (bf16) and those in the order of the lists (f32). Runs every kernel on it twice, and writes what it
// counted and summed up.
#include <algorithm>
#include <barrier>
#include <cstdio>
#include <mutex>
#include <thread>
#include <vector>

#include "../../../mixtral-kernels/tests/headers/host.h"

#define __global__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static constexpr int THREADS = 160;
static thread_local struct { unsigned x; } threadIdx, blockIdx;
static std::barrier all(THREADS);
static unsigned of_threads[THREADS];
static void __syncthreads() { all.arrive_and_wait(); }
static unsigned __reduce_max_sync(unsigned, unsigned x) {
    of_threads[threadIdx.x] = x;
    all.arrive_and_wait();
    unsigned most = 0;
    for (unsigned lane = 0; lane < 32; lane++) most = std::max(most, of_threads[threadIdx.x / 32 * 32 + lane]);
    all.arrive_and_wait();
    return most;
}
// CTAs run one after another, and only the first lane of each warp calls it.
static void atomicMax(unsigned* to, unsigned x) {
    static std::mutex one;
    std::lock_guard lock(one);
    *to = std::max(*to, x);
}

#include "observe/rows.cuh"

static_assert(THREADS == observe::THREADS);

template <typename Kernel>
static void launch(unsigned ctas, Kernel kernel) {
    for (unsigned cta = 0; cta < ctas; cta++) {
        std::vector<std::thread> threads;
        for (unsigned t = 0; t < THREADS; t++) {
            threads.emplace_back([=] {
                threadIdx.x = t, blockIdx.x = cta;
                kernel();
            });
        }
        for (auto& thread : threads) thread.join();
    }
}

template <typename T>
static std::vector<T> read(size_t count) {
    std::vector<T> values(count);
    if (fread(values.data(), sizeof(T), count, stdin) != count) exit(1);
    return values;
}

template <typename Run>
static void observe_twice(int lists, int width, Run run) {
    std::vector<u64> count(lists);
    std::vector<u32> amax(lists);
    std::vector<double> sums(size_t(lists) * width * observe::BLOCK);
    for (int step = 0; step < 2; step++) run(lists * ((width + observe::BLOCK - 1) / observe::BLOCK), count.data(), amax.data(), sums.data());
    fwrite(count.data(), 8, count.size(), stdout);
    fwrite(amax.data(), 4, amax.size(), stdout);
    fwrite(sums.data(), 8, sums.size(), stdout);
}

int main() {
    constexpr int K = 2, EXPERTS = 4, WIDTH = 200, OTHER = 70;
    const auto counts = read<i32>(2);
    step::Header header = {};
    header.num_tokens = counts[0], header.num_seqs = counts[1];
    const auto lens = read<i32>(counts[1] + 1), offsets = read<i32>(EXPERTS + 1), order = read<i32>(counts[0] * K);
    const auto rows = read<bf16_t>(counts[0] * WIDTH);
    const auto in_order = read<float>(counts[0] * K * OTHER);
    observe_twice(1, WIDTH, [&](unsigned ctas, u64* count, u32* amax, double* sums) {
        launch(ctas, [&] { observe::tokens<bf16_t, WIDTH, true>(&header, lens.data(), rows.data(), count, amax, sums); });
    });
    observe_twice(1, WIDTH, [&](unsigned ctas, u64* count, u32* amax, double* sums) {
        launch(ctas, [&] { observe::tokens<bf16_t, WIDTH, false>(&header, lens.data(), rows.data(), count, amax, sums); });
    });
    observe_twice(EXPERTS, WIDTH, [&](unsigned ctas, u64* count, u32* amax, double* sums) {
        launch(ctas, [&] {
            observe::experts<bf16_t, WIDTH, K, false, true>(&header, lens.data(), offsets.data(), order.data(), rows.data(), count, amax, sums);
        });
    });
    observe_twice(EXPERTS, OTHER, [&](unsigned ctas, u64* count, u32* amax, double* sums) {
        launch(ctas, [&] {
            observe::experts<float, OTHER, K, true, true>(&header, lens.data(), offsets.data(), order.data(), in_order.data(), count, amax, sums);
        });
    });
}
