// How `dense` and `grouped` (linear/wgmma.cuh) cut a linear into tiles and stages, and the ring of stages in shared
// memory.
#pragma once

#include "base/types.cuh"
#include "epilogue/tile.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared.cuh"
#include "weight/fp8.cuh"
#include "weight/plain.cuh"
#include "weight/quantized.cuh"

namespace linear {

template <typename Weight, int ROWS_, int COLS_, int BOX_, int DEPTH_, int STAGES_, int WARPGROUPS_, int CLUSTER_, bool DYNAMIC_,
          int OUTPUTS_, int K_, int KIND_, int SHARED_>
struct Config {
    using W = Weight;  // a format: weight/
    using T = typename W::T;
    using Stored = typename W::Stored;
    using Tokens = weight::Plain<typename W::template Token<T>>;
    static constexpr int ROWS = ROWS_;              // weight rows of a tile
    static constexpr int COLS = COLS_;              // tokens of a tile at most
    static constexpr int DEPTH = DEPTH_;            // elements of K in a stage
    static constexpr int STAGES = STAGES_;
    static constexpr int WARPGROUPS = WARPGROUPS_;  // consumers
    static constexpr int CLUSTER = CLUSTER_;        // CTAs that share a tile of tokens, for as many tiles of rows
    static constexpr bool DYNAMIC = DYNAMIC_;       // whether tiles are handed out as CTAs become free
    static constexpr int OUTPUTS = OUTPUTS_;        // columns of the output: features, after silu·mul if there is one
    static constexpr int K = K_;
    static constexpr int KIND = KIND_;              // epilogue::Kind

    static constexpr bool SILU = KIND == epilogue::SiluMul;
    static constexpr int BLOCKS = (ROWS + 64 * WARPGROUPS - 1) / (64 * WARPGROUPS);  // of 64 rows, of a warpgroup
    static constexpr int OUT_ROWS = SILU ? ROWS / 2 : ROWS;                          // outputs of a tile
    static constexpr int ROW_TILES = (OUTPUTS + OUT_ROWS - 1) / OUT_ROWS;
    // Tiles of rows; the CLUSTER tiles of a cluster count as one.
    static constexpr int ROW_TURNS = (ROW_TILES + CLUSTER - 1) / CLUSTER;
    static constexpr int K_BLOCKS = (K + DEPTH - 1) / DEPTH;
    static constexpr int ATOMS = DEPTH / Tokens::ATOM;  // swizzle atoms of 128 bytes along K
    // Tokens are copied in boxes of BOX, as many boxes as a tile needs. A tile has one, three or four.
    static constexpr int BOX = BOX_, BOXES = COLS / BOX;
    static_assert(BOX * BOXES == COLS && (BOXES == 1 || BOXES == 3 || BOXES == 4), "multiply() has these widths");

    // Slabs of a tile, and of a matrix, if the weight is packed.
    static constexpr int SLABS = ROWS / 16, MATRIX_SLABS = ((SILU ? 2 : 1) * OUTPUTS + 15) / 16;

    static constexpr int A_ATOM = ROWS * 128, B_ATOM = COLS * 128;
    // Tokens begin at a multiple of 1024 bytes, as the swizzle needs it.
    static constexpr int COPIED = DEPTH / W::DEPTH * W::tile_bytes(ROWS), A_BYTES = (COPIED + 1023) / 1024 * 1024;
    static constexpr int B_BYTES = ATOMS * B_ATOM;
    static constexpr int STAGE = A_BYTES + B_BYTES;
    // Outputs and tokens that a warpgroup moves at a time.
    static constexpr int MOVED = SILU ? 32 * BLOCKS : 64;
    static constexpr int MOVED_COLS = COLS <= 64 ? COLS : COLS % 64 == 0 ? 64 : 48;
    static constexpr int MOVED_BYTES = KIND == epilogue::F32 ? 0 : epilogue::Tile<MOVED, MOVED_COLS>::BYTES;
    static constexpr int RING = STAGES * STAGE;
    // Products always read 64 rows. If a tile has fewer, they read on behind the tile, and those results are dropped.
    static constexpr int OVERREAD = ROWS < 64 && !W::PACKED ? (64 - ROWS) * 128 : 0;
    static constexpr int MOVED_AT = RING + (OVERREAD > WARPGROUPS * MOVED_BYTES + B_BYTES ? OVERREAD : 0);
    static constexpr int MAP_AT = MOVED_AT + WARPGROUPS * MOVED_BYTES;
    static constexpr int BARRIERS_AT = MAP_AT + WARPGROUPS * COLS * 4;
    static constexpr int TURNS_AT = BARRIERS_AT + 2 * STAGES * 8;
    static constexpr int SHARED = TURNS_AT + 64 + 1024;  // 1024 to align
    static_assert(SHARED == SHARED_, "what the launch asks for");
    // setmaxnreg acts on whole warpgroups, so beside two consumers the producer is a whole warpgroup too.
    static constexpr int PRODUCERS = WARPGROUPS == 1 ? 32 : 128;
    static constexpr int THREADS = WARPGROUPS * 128 + PRODUCERS;

    static_assert(ROWS % 16 == 0 && (ROWS <= 64 || ROWS % (64 * WARPGROUPS) == 0), "whole blocks of 64 rows");
    static_assert(BOX % 8 == 0 && COLS % MOVED_COLS == 0 && DEPTH % W::DEPTH == 0 && K % Tokens::PIECE == 0 && OUTPUTS % 8 == 0, "");
    static_assert(MOVED == 32 || MOVED == 64, "as epilogue::Tile");
    static_assert(SHARED <= 232448, "shared memory of a CTA");
};

// The barriers and stages of the ring.
template <typename C>
struct Ring {
    u32 base;
    int stage = 0;
    u32 phase = 0;

    __device__ __forceinline__ u32 full() const { return base + C::BARRIERS_AT + stage * 8; }
    __device__ __forceinline__ u32 empty(int s) const { return base + C::BARRIERS_AT + (C::STAGES + s) * 8; }
    __device__ __forceinline__ u32 a() const { return base + stage * C::STAGE; }
    __device__ __forceinline__ u32 b() const { return a() + C::A_BYTES; }

    // A warp of consumers tells every producer that fills this CTA's shared memory that a stage is free. `loaded` are words of what the warp
    // has loaded from it by ordinary loads (packed weights), if nothing else proves that those have ended.
    __device__ __forceinline__ void release(int s, u32 loaded = 0) const {
        const int lane = threadIdx.x % 32;
        const u32 barrier = empty(s) + ptx::zero_after(loaded);
        if constexpr (C::CLUSTER == 1) {
            if (lane == 0) mbarrier::arrive(barrier);
        } else {
            if (lane < C::CLUSTER) mbarrier::arrive(barrier, lane);
        }
    }

    __device__ __forceinline__ void advance() {
        if (++stage == C::STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

}  // namespace linear
