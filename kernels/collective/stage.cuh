// Op: send, recv. CPU twin: the same, between buffers of the host.
// Regime: any number of rows.
// Tile: a row.
// Grid: persistent, a CTA a row at a time, as all_reduce.
// Numerics: copies.
// Requires: an inbox of the next stage that this rank can write to, and a word of this rank that the next stage can write to.
// Traffic: a row sent; a row received and written.
// Measured: not tuned.
#pragma once

#include "base/step.cuh"
#include "collective/exchange.cuh"
#include "norm/row.cuh"
#include "ptx/pdl.cuh"

namespace exchange {

// Where the current step's rows lie in a stage's inbox. `steps` counts the steps so far, with the current one.
template <typename T, int COLS>
__device__ __forceinline__ uint4* stage_row(u8* inbox, i64 capacity, u32 steps, i64 row) {
    return reinterpret_cast<uint4*>(inbox + ((steps - 1) % STAGE_SLOTS) * capacity) + row * packets(COLS) * Packet<T>::PARTS;
}

// Sends rows to the next stage's `inbox`. Waits until that stage has read the rows of the step that used the same slot
// before.
template <typename T, int COLS, step::Rows ROWS>
__global__ void __launch_bounds__(rms::threads(COLS), per_sm(COLS))
    send(const step::Header* header, i32 times, const T* input, u8* inbox, i64 capacity, const u32* steps, const u32* taken,
         u32* stop, u32* report) {
    pdl::launch_dependents();
    constexpr bool ALIGNED = whole_vectors(COLS);
    const i64 rows = step::num_rows<ROWS>(header, times);
    Patience patience(stop, report);
    pdl::wait();
    if (threadIdx.x == 0) {
        while (static_cast<i32>(*steps - look(taken)) > STAGE_SLOTS && !patience.is_over()) {}
    }
    __syncthreads();
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        uint4* to = stage_row<T, COLS>(inbox, capacity, *steps, row);
        for (int i = threadIdx.x; i < packets(COLS); i += blockDim.x) {
            float x[VECTOR];
            load<ALIGNED>(x, input + row * COLS + i * VECTOR, COLS - i * VECTOR);
            Packet<T> packet;
            packet.pack_from(x);
            packet.put_to(to + i * Packet<T>::PARTS);
        }
    }
}

// Reads the rows of the stage before from this rank's `inbox`.
template <typename T, int COLS, step::Rows ROWS>
__global__ void __launch_bounds__(rms::threads(COLS), per_sm(COLS))
    recv(const step::Header* header, i32 times, T* out, u8* inbox, i64 capacity, const u32* steps, u32* stop, u32* report) {
    pdl::launch_dependents();
    constexpr bool ALIGNED = whole_vectors(COLS);
    const i64 rows = step::num_rows<ROWS>(header, times);
    Patience patience(stop, report);
    pdl::wait();
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        uint4* from = stage_row<T, COLS>(inbox, capacity, *steps, row);
        for (int i = threadIdx.x; i < packets(COLS); i += blockDim.x) {
            Packet<T> packet;
            packet.take_from(from + i * Packet<T>::PARTS, patience);
            float x[VECTOR];
            packet.unpack_to(x);
            store<ALIGNED>(out + row * COLS + i * VECTOR, x, COLS - i * VECTOR);
        }
    }
}

}  // namespace exchange
