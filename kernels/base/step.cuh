// A step's inputs: the structures of `mixtral_kernels::step_block`, field by field.
#pragma once

#include "base/types.cuh"

namespace step {

// Tokens of a sequence that one split of decode attention takes.
inline constexpr int DECODE_SPLIT = 256;
// Query tokens of one tile of prefill attention.
inline constexpr int PREFILL_TILE = 64;
// The most tokens that the list of a score can have: one for each lane.
inline constexpr int MAX_BEST = 32;

struct Header {
    i32 num_tokens;
    i32 num_seqs;
    i32 num_decodes;
    i32 num_logits;
    i32 num_samples;
    i32 num_decode_items;
    i32 num_prefill_items;
    i32 num_scores;
    i32 reserved[8];
};

struct Sample {
    u64 bits;
    u64 min_weight;
    i32 row;
    i32 top_k;
    u32 top_p;
    float temperature;
    float repetition_penalty;
    float presence_penalty;
    float frequency_penalty;
    i32 first_adjustment;
    i32 num_adjustments;
    i32 reserved;
};

struct Adjustment {
    i32 token;
    i32 code;
};

inline constexpr i32 SEEN = 1 << 29;
inline constexpr i32 BANNED = 1 << 30;

struct Drawn {
    i32 token;
    i32 bad_token;
    float bad_value;
    i32 reserved;
};

struct Asked {
    i32 row;
    i32 token;
    i32 adjusted_by;
    i32 best;
};

struct Scored {
    u64 sum;
    float max;
    float logit;
    i32 bad_token;
    float bad_value;
    i32 num_best;
    i32 reserved;
};

struct Best {
    i32 token;
    float logit;
};

// What determines the number of a buffer's rows.
enum class Rows { TOKENS, LOGITS, ONE };

// Number of rows of a buffer that has `times` rows for each token (or row of logits, or step).
template <Rows ROWS>
__device__ __forceinline__ i32 num_rows(const Header* header, i32 times = 1) {
    if constexpr (ROWS == Rows::TOKENS) return header->num_tokens * times;
    if constexpr (ROWS == Rows::LOGITS) return header->num_logits * times;
    return times;
}

static_assert(sizeof(Header) == 64 && sizeof(Sample) == 56 && sizeof(Drawn) == 16 && sizeof(Scored) == 32, "as the host writes them");

}  // namespace step
