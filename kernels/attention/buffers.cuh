// Buffers in shared memory. Producers fill them, and warps read them.
#pragma once

#include "base/types.cuh"
#include "ptx/mbarrier.cuh"

namespace attention {

// A ring of COUNT buffers and their barriers. TMA or warps fill the buffers in turn, and other warps empty them.
template <int COUNT>
struct Buffers {
    u32 barriers;
    int stage = 0;
    u32 phase = 0;

    // `warps` is how many warps empty each buffer, `fillers` how many threads arrive when they have filled it.
    __device__ __forceinline__ void init(int warps, int fillers = 1) const {
        for (int i = 0; i < COUNT; i++) {
            mbarrier::init(barriers + i * 8, fillers);
            mbarrier::init(barriers + (COUNT + i) * 8, warps);
        }
    }
    __device__ __forceinline__ u32 full() const { return barriers + stage * 8; }
    __device__ __forceinline__ u32 empty() const { return barriers + (COUNT + stage) * 8; }
    __device__ __forceinline__ void wait_full() const { mbarrier::wait(full(), phase); }
    __device__ __forceinline__ void wait_empty() const { mbarrier::wait(empty(), phase ^ 1); }
    __device__ __forceinline__ void advance() {
        if (++stage == COUNT) {
            stage = 0;
            phase ^= 1;
        }
    }
    __device__ __forceinline__ void wait_next_full() const {
        Buffers next = *this;
        next.advance();
        next.wait_full();
    }
    // Called by a warp when it has read the buffer. It then goes on to the next one.
    __device__ __forceinline__ void release() {
        if (threadIdx.x % 32 == 0) mbarrier::arrive(empty());
        advance();
    }
};

}  // namespace attention
