// A decode's newest token. Either a kernel before attention has rotated its queries and written its key and value to the cache
// (rope_write_kv), or decode attention does that itself, which saves a launch. The bits are the same.
#pragma once

#include "attention/rotation.cuh"
#include "attention/works.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/shared.cuh"

namespace attention {

// The newest token is in the cache, and its queries are rotated.
struct IsWritten {
    static constexpr bool WRITES = false;
    struct Token {};
};

// `rows` are Q ‖ K ‖ V as the linear wrote them. Of each sequence, the warp that computes the strip of 16 tokens which holds the newest
// one puts its key and its value into the tile in shared memory, over whatever the cache had there, and into the cache.
// DIRECTED: keys are rounded by `directions` [KV_HEADS][D].
template <typename C, bool DIRECTED>
struct Writes {
    static constexpr bool WRITES = true;
    using T = typename C::T;
    using Stored = typename C::Stored;
    using Own = Share<C::D>;
    static constexpr int HALF = Own::HALF, PAIRS = Own::PAIRS, BYTES = PAIRS * sizeof(Stored);
    static_assert(PAIRS <= 2 && sizeof(T) == 2 && (PAIRS == 2 || !C::FP8), "a lane has one or two elements of each half");
    static_assert(C::PARTS == 1, "one warp has the newest token of a head");

    const i32* slots;
    const float2* table;
    const T* rows;
    float key_scale, value_scale;
    Stored *keys, *values;
    const float* directions;

    __device__ __forceinline__ const float2* angles(int seq) const { return table + static_cast<i64>(seq) * HALF; }

    // A lane's elements of each half of the newest token's key and value: first as the linear wrote them, then the key as the cache stores it.
    struct Token {
        u32 key[2], value[2];
    };

    // Called before the wait: no kernel of the step writes what it reads.
    __device__ __forceinline__ void prefetch(const DecodeWork<C>& c) const {
        if constexpr (DIRECTED) ptx::prefetch_l1(directions + c.head() * C::D + threadIdx.x % 32 * (C::D / 32));
        ptx::prefetch_l1(slots + c.seq);
    }

    // Every warp loads the token, together with its queries: one that found out first whether it needs it would wait for memory twice.
    __device__ __forceinline__ void load(Token& token, const DecodeWork<C>& c) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            token.key[half] = word(c, c.head(), half);
            token.value[half] = word(c, C::KV_HEADS + c.head(), half);
        }
    }

    // Called by the warp that computes the newest token.
    __device__ __forceinline__ void round(Token& token, const DecodeWork<C>& c) const {
        Own key = unpacked(token.key);
        key.rotate(angles(c.seq));
        if constexpr (DIRECTED) {
            Own direction;
            direction.load(directions + c.head() * C::D);
            direction.rotate(angles(c.seq));
            u32 bytes[2][PAIRS];
            round_directed<T>(bytes, key, direction, fp8::Divisor(key_scale));
#pragma unroll
            for (int half = 0; half < 2; ++half) token.key[half] = bytes[half][0] | bytes[half][PAIRS - 1] << 8;
        } else {
            stored(token.key, key, key_scale);
        }
    }

    // Puts the newest token into the cache, and into the tiles of keys and values in shared memory, where these have what the cache had
    // in its place. Called by the warp that reads these 16 rows of the tiles; no other warp does.
    template <typename Layout>
    __device__ __forceinline__ void put(const Token& token, const DecodeWork<C>& c, u32 key_tile, u32 value_tile) const {
        u32 value[2];
        stored(value, unpacked(token.value), value_scale);
        store<Layout>(token.key, c, key_tile, keys);
        store<Layout>(value, c, value_tile, values);
        __syncwarp();
    }

private:
    __device__ __forceinline__ u32 word(const DecodeWork<C>& c, int head, int half) const {
        const T* at = rows + static_cast<i64>(c.seq) * C::COLS + (C::HEADS + head) * C::D + half * HALF + Own::first();
        if constexpr (PAIRS == 2) return *reinterpret_cast<const u32*>(at);
        return at->bits;
    }

    static __device__ __forceinline__ Own unpacked(const u32 (&words)[2]) {
        Own x;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            x.at[half][0] = low_of<T>(words[half]);
            if constexpr (PAIRS == 2) x.at[half][PAIRS - 1] = high_of<T>(words[half]);
        }
        return x;
    }

    // What the cache stores of a lane's elements, as `keep` rounds them.
    static __device__ __forceinline__ void stored(u32 (&words)[2], Own x, float scale) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float(&two)[PAIRS] = x.at[half];
            if constexpr (C::FP8) {
#pragma unroll
                for (int i = 0; i < PAIRS; ++i) two[i] = rounded<T>(two[i]);
                fp8::Divisor(scale).divide(two);
                words[half] = fp8::pack(two[0], two[PAIRS - 1]);
            } else {
                words[half] = pack<T>(two[0], two[PAIRS - 1]);
            }
        }
    }

    template <typename Layout>
    __device__ __forceinline__ void store(const u32 (&words)[2], const DecodeWork<C>& c, u32 tile, Stored* cache) const {
        using Word = If<BYTES == 4, u32, u16>;
        const i32 slot = slots[c.seq];
        Stored* to = cache + cache_offset<C::KV_HEADS, C::BLOCK_SIZE, C::D>(slot, c.head()) + Own::first();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int byte = (half * HALF + Own::first()) * static_cast<int>(sizeof(Stored));
            ptx::store_shared(tile + Layout::at((c.end - 1) % TILE, byte / 16) + byte % 16, static_cast<Word>(words[half]));
            if (slot >= 0) *reinterpret_cast<Word*>(to + half * HALF) = static_cast<Word>(words[half]);
        }
    }
};

}  // namespace attention
