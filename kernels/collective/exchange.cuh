// How ranks pass rows to each other. Every rank has an inbox in its GPU's memory, and the other ranks can write to it.
// A sender stores rows there as packets. The receiver reads a packet again and again until all of its words have
// arrived, so no flag is needed beside the data.
//
// An inbox is full of EMPTY words until packets arrive, and the receiver empties it again when it has read them. Each
// collective uses the next one of SLOTS slots. So collective g uses the slot of collective g − SLOTS again, and the
// receiver must have emptied it by then. It has: a rank that sends in collective g has all rows of collective g − 1, to
// each of which the receiver contributed, after its collective g − 2 was complete. That is one collective more than
// needed, so a collective without rows in between does no harm.
#pragma once

#include "base/vector.cuh"

namespace exchange {

// Slots of an inbox; `exchange::SLOTS` in lowering.
inline constexpr int SLOTS = 3;
// CTAs on a multiprocessor, for a collective over rows of `cols` elements; `per_sm` in lowering. (With this number the
// compiler spills no registers, but of f32.)
__device__ constexpr int per_sm(int cols) { return cols <= 512 * VECTOR ? 2 : 1; }
// Slots of the inbox of a pipeline stage; `exchange::STAGE_SLOTS` in lowering.
inline constexpr int STAGE_SLOTS = 2;

// No packet contains this word. As numbers it is one NaN, or two, that no arithmetic gives.
inline constexpr u32 EMPTY = 0xffffffffu;
// Sent in its place: another NaN, or two.
inline constexpr u32 OTHER_NAN = 0x7fff7fffu;

// How often a thread reads a packet before it reads the clock and the stop word.
inline constexpr u32 LOOKS = 16;
// Seconds after which a thread gives up. If a rank is gone, the host learns it much earlier and sets the stop word.
inline constexpr u32 PATIENCE = 120;
// After so many looks, about a millisecond, the host is told that the rank waits.
inline constexpr u32 LONG = 1024;

// What the report says: that a kernel waits for another rank, or waited too long. The host clears it after each step.
inline constexpr u32 WAITS = 2;
inline constexpr u32 GAVE_UP = 1;

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

// The time in units of 2^30 nanoseconds, which are about a second.
__device__ __forceinline__ u32 seconds() {
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return static_cast<u32>(t >> 30);
}

// Decides how long a thread waits for another rank. The host sets the stop word if a rank is gone. A thread that has
// waited too long sets it itself, and tells the host through the report. Results after a stop are of no use.
class Patience {
public:
    __device__ __forceinline__ Patience(u32* stop, u32* report) : stop(stop), report(report) {}

    // Whether to stop waiting. A thread calls it before it reads the packet again.
    __device__ __forceinline__ bool is_over() {
        if (++looks % LOOKS != 0) return false;
        if (glance(stop) != 0) return true;
        if (looks == LONG && threadIdx.x == 0 && blockIdx.x == 0) put(report, WAITS);
        if (looks == LOOKS) begun = seconds();
        if (seconds() - begun < PATIENCE) return false;
        put(report, GAVE_UP);
        put(stop, 1);
        return true;
    }

private:
    u32* stop;
    u32* report;
    u32 begun = 0;
    u32 looks = 0;
};

// VECTOR elements that are sent together.
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

    // Waits until the packet is there, reads it, and empties its place.
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

// What a launch of a collective does. If the memory of all ranks is mapped, one launch does it all. Else the launch is in two
// halves, and between them the host has a library carry the rows: in the first half, rows are left in this rank's own inbox,
// and in the second, the inbox holds the rows of all ranks.
inline constexpr i32 WHOLE = 0;
inline constexpr i32 LEAVES = 1;
inline constexpr i32 FINDS = 2;

// Packets of a row.
__device__ constexpr int packets(int cols) { return ceil_div(cols, VECTOR); }

// A collective's slot in the inboxes of a group. In an inbox, a slot has a part of `capacity` bytes for each other rank. If the
// launch is in halves, the inbox holds a part for each rank, this one included, from its start on.
template <typename T, int RANKS>
class Slot {
public:
    // `inboxes[r]` is where rank r's inbox begins. Inboxes never move, so the table may be read before pdl::wait().
    __device__ __forceinline__ Slot(const u64* inboxes, i64 capacity, i32 rank, i32 half)
        : inboxes(inboxes), capacity(capacity), rank(rank), half(half) {
#pragma unroll
        for (i32 peer = 0; peer < KEPT; ++peer) to[peer] = inboxes[peer] + part_of(rank, peer);
        own = inboxes[rank];
    }

    __device__ __forceinline__ bool is_whole() const { return half == WHOLE; }

    // Whether this launch takes no rows.
    __device__ __forceinline__ bool leaves() const { return half == LEAVES; }

    // Selects the slot. `number` is the collective's: `done` plus its index among the step's collectives.
    __device__ __forceinline__ void open(u32 number) {
        offset = is_whole() ? static_cast<i64>(number % SLOTS) * (RANKS - 1) * capacity : 0;
#pragma unroll
        for (i32 peer = 0; peer < KEPT; ++peer) to[peer] += offset;
        own += offset;
    }

    // Sends a packet to all other ranks, or leaves it for them.
    __device__ __forceinline__ void send(const Packet<T>& packet, i64 index) const {
        if (!is_whole()) {
            if (leaves()) packet.put_to(reinterpret_cast<uint4*>(own + rank * capacity) + index * Packet<T>::PARTS);
            return;
        }
#pragma unroll
        for (i32 peer = 0; peer < RANKS; ++peer) {
            if (peer == rank) continue;
            if (peer < KEPT) {
                packet.put_to(reinterpret_cast<uint4*>(to[peer]) + index * Packet<T>::PARTS);
            } else {
                send_to(peer, packet, index);
            }
        }
    }

    // Sends a packet to one of the other ranks.
    __device__ __forceinline__ void send_to(i32 peer, const Packet<T>& packet, i64 index) const {
        packet.put_to(reinterpret_cast<uint4*>(inboxes[peer] + part_of(rank, peer) + offset) + index * Packet<T>::PARTS);
    }

    // Replaces `packet` by the one that `peer` sent, unless this rank is `peer`.
    __device__ __forceinline__ void take(Packet<T>& packet, i32 peer, i64 index, Patience& patience) const {
        if (peer == rank) return;
        const i64 part = is_whole() ? part_of(peer, rank) : peer * capacity;
        packet.take_from(reinterpret_cast<uint4*>(own + part) + index * Packet<T>::PARTS, patience);
    }

private:
    // Where `sender`'s part begins in a slot of another rank's inbox.
    __device__ __forceinline__ i64 part_of(i32 sender, i32 receiver) const {
        return (sender < receiver ? sender : sender - 1) * capacity;
    }

    // Ranks whose places are in registers, so that a small collective does not wait for the table.
    static constexpr int KEPT = RANKS < 4 ? RANKS : 4;

    const u64* inboxes;
    u64 to[KEPT];
    u64 own;
    i64 offset;
    i64 capacity;
    i32 rank;
    i32 half;
};

}  // namespace exchange
