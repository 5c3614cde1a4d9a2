// Copies tiles of keys and values from the paged cache to shared memory. A tile is 64 tokens that begin at a multiple
// of 64 in the sequence.
#pragma once

#include "base/vector.cuh"
#include "ptx/cp_async.cuh"

namespace attention {

// Tokens of a tile.
inline constexpr int TILE = 64;

// Rows of BYTES bytes in shared memory. The 8 rows of a matrix of ldmatrix lie in different banks: rows of a multiple of
// 128 bytes exchange their 16-byte pieces, other rows have a piece of padding.
template <int BYTES>
struct Rows {
    static_assert(BYTES % 32 == 0, "pairs of pieces");
    static constexpr bool EXCHANGE = BYTES % 128 == 0;
    static constexpr int STRIDE = EXCHANGE ? BYTES : BYTES + 16;

    // Bytes from the first row to piece `piece` (16 bytes) of a row.
    static __device__ __forceinline__ u32 at(int row, int piece) {
        return row * STRIDE + (EXCHANGE ? piece ^ (row & 7) : piece) * 16;
    }

    // Given the address of a row's piece 0 or 1, the address of the piece 2 · k further on. Where pieces are exchanged,
    // rows begin at a multiple of 128 bytes.
    static __device__ __forceinline__ u32 step(u32 address, int k) {
        return EXCHANGE ? (address ^ (2 * k & 7) * 16) + (2 * k & ~7) * 16 : address + 32 * k;
    }
};

// How THREADS threads share rows of D elements of T, a piece of 16 bytes at a time. A thread takes the same piece of every
// STEP-th row.
template <typename T, int D, int THREADS>
struct Pieces {
    using Rows = attention::Rows<D * sizeof(T)>;
    static constexpr int PER = 16 / sizeof(T), PIECES = D / PER, STEP = THREADS / PIECES;
    static constexpr bool ALL = THREADS % PIECES == 0;

    // The thread's first row, its column, and where that piece lies in shared memory.
    int row, column;
    u32 first;

    __device__ __forceinline__ Pieces() {
        const int thread = ptx::thread_anew();
        row = thread / PIECES;
        column = thread % PIECES * PER;
        first = Rows::at(row, thread % PIECES);
    }

    // Where the thread's piece lies in shared memory, of the row `rows` behind its first.
    __device__ __forceinline__ u32 at(int rows) const {
        constexpr bool LINEAR = !Rows::EXCHANGE || STEP % 8 == 0;
        return LINEAR ? first + rows * Rows::STRIDE : Rows::at(row + rows, column / PER);
    }

    // Calls f for each of the thread's rows among COUNT, UNROLL of them side by side. f gets how far the row is behind
    // the thread's first.
    template <int COUNT, int UNROLL = COUNT, typename F>
    __device__ __forceinline__ void each(F f) const {
        if (!ALL && row >= STEP) return;
#pragma unroll UNROLL
        for (int rows = 0; rows < COUNT; rows += STEP) {
            if (COUNT % STEP == 0 || row + rows < COUNT) f(rows);
        }
    }
};

// The cache of a layer, keys or values [blocks, KV_HEADS, BLOCK_SIZE, D], as one sequence's KV head sees it.
template <typename Stored, int KV_HEADS, int D, int BLOCK_SIZE>
struct Cache {
    static constexpr int BYTES = TILE * Rows<D * sizeof(Stored)>::STRIDE;

    const Stored* keys;
    const Stored* values;

    // Whether each tile lies in one block, so that it needs only one entry of the table.
    static constexpr bool ONE_BLOCK = BLOCK_SIZE % TILE == 0;

    // The tile's entry in a sequence's row of the table.
    static __device__ __forceinline__ i32 entry(const i32* blocks, int tile) {
        return ONE_BLOCK ? blocks[tile * TILE / BLOCK_SIZE] : 0;
    }

    // All THREADS of the CTA copy a tile: keys to `shared`, values BYTES behind them. `block` is the tile's entry.
    // Tokens outside [first, end) become zeros in shared memory; their memory and table entries are not read.
    template <int THREADS>
    __device__ __forceinline__ void load(u32 shared, const i32* blocks, i32 block, int head, int tile, int first, int end) const {
        const Pieces<Stored, D, THREADS> own;
        const int token = tile * TILE + own.row;
        i64 offset = 0;
        if constexpr (ONE_BLOCK) {
            offset = ((static_cast<i64>(block) * KV_HEADS + head) * BLOCK_SIZE + tile * TILE % BLOCK_SIZE + own.row) * D + own.column;
        }
        // (Only two entries of the table are looked up at a time. More would not fit into registers beside a prefill's
        // sums.)
        own.template each<TILE, ONE_BLOCK ? TILE : 2>([&](int rows) {
            const bool valid = token + rows >= first && token + rows < end;
            i64 from = offset + rows * D;
            if constexpr (!ONE_BLOCK) {
                const i64 block = valid ? blocks[(token + rows) / BLOCK_SIZE] : 0;
                from = ((block * KV_HEADS + head) * BLOCK_SIZE + (token + rows) % BLOCK_SIZE) * D + own.column;
            }
            const u32 to = shared + own.at(rows);
            ptx::cp_async_16(to, keys + from, valid);
            ptx::cp_async_16(to + BYTES, values + from, valid);
        });
    }
};

// The first token that the query at a position sees.
template <int WINDOW>
__device__ __forceinline__ int first_visible(int position) {
    return WINDOW > 0 && position >= WINDOW ? position - WINDOW + 1 : 0;
}

}  // namespace attention
