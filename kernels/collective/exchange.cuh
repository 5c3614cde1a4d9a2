// How ranks hand rows to each other. Every rank has an inbox in its GPU's memory, which the other ranks can write to. A sender
// stores rows there as packets; the receiver looks at a packet until all of its words have arrived, so the data is its own flag.
//
// An inbox is full of EMPTY words until something arrives, and the receiver makes it so again when it has read. A collective uses
// one of SLOTS slots, the next one each time. When a rank sends in collective g, its slot at the receiver was last used by
// collective g − SLOTS. The sender has all rows of the receiver's collective g − 1, which the receiver sent after its collective
// g − 2 was complete; so the receiver has emptied that slot again, and even one collective without rows in between does no harm.
#pragma once

#include "base/vector.cuh"

namespace exchange {

// Slots of an inbox; `exchange::SLOTS` in lowering.
inline constexpr int SLOTS = 3;
// CTAs of a collective over rows of so many elements that fit on a multiprocessor; `per_sm` in lowering. (Told so, the compiler
// spills nothing.)
__device__ constexpr int per_sm(int cols) { return cols <= 512 * VECTOR ? 2 : 1; }
// Slots of the inbox of a pipeline stage; `exchange::STAGE_SLOTS` in lowering.
inline constexpr int STAGE_SLOTS = 2;

// No packet holds this word: as numbers it is a NaN that no arithmetic gives, or two of them.
inline constexpr u32 EMPTY = 0xffffffffu;
// Sent instead of it: another NaN, or two.
inline constexpr u32 OTHER_NAN = 0x7fff7fffu;

// Looks at a packet between two looks at the clock and at the stop word.
inline constexpr u32 LOOKS = 16;
// Seconds after which a rank gives up: the host knows of a rank that is gone long before, and sets the stop word.
inline constexpr u32 PATIENCE = 120;

__device__ __forceinline__ uint4 look(const uint4* at) {
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at)
                 : "memory");
    return v;
}

__device__ __forceinline__ void put(uint4* at, const uint4& v) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ u32 glance(const u32* at) {
    u32 v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}

__device__ __forceinline__ u32 look(const u32* at) {
    u32 v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}

__device__ __forceinline__ void put(u32* at, u32 v) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory");
}

// 2^30 nanoseconds.
__device__ __forceinline__ u32 seconds() {
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return static_cast<u32>(t >> 30);
}

// How long a thread waits for another rank. The host sets the stop word when a rank is gone. A thread whose patience ends sets it
// itself, and tells the host. What was computed after a stop is of no use.
class Patience {
public:
    __device__ __forceinline__ Patience(u32* stop, u32* report) : stop(stop), report(report) {}

    // To be asked before each further look.
    __device__ __forceinline__ bool is_over() {
        if (++looks % LOOKS != 0) return false;
        if (glance(stop) != 0) return true;
        if (looks == LOOKS) begun = seconds();
        if (seconds() - begun < PATIENCE) return false;
        put(report, 1);
        put(stop, 1);
        return true;
    }

private:
    u32* stop;
    u32* report;
    u32 begun = 0;
    u32 looks = 0;
};

// VECTOR elements on their way.
template <typename T>
struct Packet {
    static constexpr int PARTS = VECTOR * static_cast<int>(sizeof(T)) / 16;

    uint4 parts[PARTS];

    __device__ __forceinline__ void pack_from(const float (&x)[VECTOR]) {
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
            if constexpr (sizeof(T) == 4) {
                parts[p] = make_uint4(word(x[4 * p]), word(x[4 * p + 1]), word(x[4 * p + 2]), word(x[4 * p + 3]));
            } else {
                // Rounding makes every NaN the same one, which is not EMPTY.
                parts[p] = make_uint4(::pack<T>(x[0], x[1]), ::pack<T>(x[2], x[3]), ::pack<T>(x[4], x[5]), ::pack<T>(x[6], x[7]));
            }
        }
    }

    __device__ __forceinline__ void unpack_to(float (&x)[VECTOR]) const {
        if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int p = 0; p < PARTS; ++p) {
                x[4 * p] = __uint_as_float(parts[p].x), x[4 * p + 1] = __uint_as_float(parts[p].y);
                x[4 * p + 2] = __uint_as_float(parts[p].z), x[4 * p + 3] = __uint_as_float(parts[p].w);
            }
        } else {
            ::unpack<T>(x, parts[0]);
        }
    }

    __device__ __forceinline__ void put_to(uint4* at) const {
#pragma unroll
        for (int p = 0; p < PARTS; ++p) put(at + p, parts[p]);
    }

    // Waits until the packet is there, takes it, and leaves its place EMPTY.
    __device__ __forceinline__ void take_from(uint4* at, Patience& patience) {
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
            parts[p] = look(at + p);
            while (is_missing(parts[p]) && !patience.is_over()) parts[p] = look(at + p);
        }
#pragma unroll
        for (int p = 0; p < PARTS; ++p) put(at + p, make_uint4(EMPTY, EMPTY, EMPTY, EMPTY));
    }

private:
    static __device__ __forceinline__ u32 word(float x) {
        const u32 bits = __float_as_uint(x);
        return bits == EMPTY ? OTHER_NAN : bits;
    }

    static __device__ __forceinline__ bool is_missing(const uint4& v) {
        return v.x == EMPTY || v.y == EMPTY || v.z == EMPTY || v.w == EMPTY;
    }
};

// Packets of a row.
__device__ constexpr int packets(int cols) { return ceil_div(cols, VECTOR); }

// A collective's slot in the inboxes of a group. In an inbox, a slot has a part of `capacity` bytes for each other rank.
template <typename T, int RANKS>
class Slot {
public:
    // `inboxes[r]` is where rank r's inbox begins. They stay where they are, so this may come before pdl::wait().
    __device__ __forceinline__ Slot(const u64* inboxes, i64 capacity, i32 rank) : capacity(capacity), rank(rank) {
#pragma unroll
        for (i32 peer = 0; peer < RANKS; ++peer) {
            const i64 part = rank < peer ? rank : rank - 1;
            to[peer] = inboxes[peer] + part * capacity;
        }
        own = inboxes[rank];
    }

    // Which slot it is. `done` counts the collectives before the step, `ordinal` those of the step before this one.
    __device__ __forceinline__ void open(u32 done, i32 ordinal) {
        const i64 offset = static_cast<i64>((done + ordinal) % SLOTS) * (RANKS - 1) * capacity;
#pragma unroll
        for (i32 peer = 0; peer < RANKS; ++peer) to[peer] += offset;
        own += offset;
    }

    // Sends a packet to all others.
    __device__ __forceinline__ void send(const Packet<T>& packet, i64 index) const {
#pragma unroll
        for (i32 peer = 0; peer < RANKS; ++peer) {
            if (peer != rank) packet.put_to(reinterpret_cast<uint4*>(to[peer]) + index * Packet<T>::PARTS);
        }
    }

    // Replaces `packet`, unless this rank is `peer`, by the one that `peer` sent.
    __device__ __forceinline__ void take(Packet<T>& packet, i32 peer, i64 index, Patience& patience) const {
        if (peer == rank) return;
        const i64 part = peer < rank ? peer : peer - 1;
        packet.take_from(reinterpret_cast<uint4*>(own + part * capacity) + index * Packet<T>::PARTS, patience);
    }

private:
    u64 to[RANKS];
    u64 own;
    i64 capacity;
    i32 rank;
};

}  // namespace exchange
