//! A step's inputs as the device sees them. They are one block of memory at a fixed address, so a captured graph can be
//! replayed for any step. The arrays' offsets depend only on the limits. `kernels/base/step.cuh` has the same
//! structures.
//!
//! A step uploads the block's prefix up to the last row of its block table, and its adjustments and score requests if it has
//! any. What the device draws lies behind them, so it is still there when the next step begins.

use mixtral_engine::Program;
use serde::{Deserialize, Serialize};

/// Tokens of a sequence that one split of decode attention takes. The number is fixed, because a sequence's bits may
/// not depend on what else is in the step.
pub const DECODE_SPLIT: usize = 256;

/// Query tokens of one tile of prefill attention. A tile starts at a multiple of it *in its chunk*.
pub const PREFILL_TILE: usize = 64;

/// The most likely tokens that a device finds for a score.
pub const MAX_BEST: usize = 32;

/// The arrays of the block, in order. Element types are 32-bit integers unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Array {
    /// [`Header`].
    Header,
    /// Token ids `[T]`; −1 − n for what draw n of the step before drew.
    TokenIds,
    /// Positions `[T]`.
    Positions,
    /// Cache slots `[T]`, −1 for none.
    SlotMapping,
    /// Where each sequence's tokens start, `[S + 1]`.
    CuQueryLens,
    /// Tokens of each sequence, this step's included, `[S]`.
    SeqLens,
    /// Tokens whose logits are wanted, `[L]`.
    LogitsIndices,
    /// Work items of decode attention, `[n][4]`: sequence, split, the sequence's tokens, 0. The splits of a sequence
    /// lie together, ascending.
    DecodeItems,
    /// Work items of prefill attention, `[n][2]`: sequence, first query token of the tile within the chunk. Items that
    /// see the most keys come first.
    PrefillItems,
    /// [`Sample`]s, `[samples]`.
    Samples,
    /// Blocks of each sequence `[S, max_blocks_per_seq]`, padded with −1.
    BlockTable,
    /// [`Adjustment`]s of all samples. Those of one sample lie together.
    Adjustments,
    /// Score requests: [`Asked`] `[scores]`.
    Scores,
    /// The results of the draws, [`Drawn`] `[samples]`. The device writes them.
    Drawn,
    /// What the scores need: [`Scored`] `[scores]`. The device writes them.
    Scored,
    /// Their lists of tokens: [`Best`] `[scores, MAX_BEST]`, most likely first. The device writes them.
    Best,
}

/// Defines the structures of the step block and lists their layouts, since the kernels have to use the same layouts.
macro_rules! structures {
    ($($(#[$about:meta])* pub struct $name:ident { $($(#[$field_about:meta])* pub $field:ident: $kind:ty,)* })*) => {
        $($(#[$about])*
        #[repr(C)]
        pub struct $name { $($(#[$field_about])* pub $field: $kind,)* })*

        /// The structures of the block, field by field.
        pub const STRUCTURES: &[Structure] = &[$(Structure {
            name: stringify!($name),
            bytes: size_of::<$name>(),
            fields: &[$(Field {
                name: stringify!($field),
                kind: stringify!($kind),
                offset: std::mem::offset_of!($name, $field),
            },)*],
        },)*];
    };
}

/// How a structure lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Structure {
    /// Its name.
    pub name: &'static str,
    /// Its bytes.
    pub bytes: usize,
    /// Its fields, ascending by offset.
    pub fields: &'static [Field],
}

/// A field of a [`Structure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// Its type, as Rust writes it.
    pub kind: &'static str,
    /// Bytes from the structure's start.
    pub offset: usize,
}

structures! {
    /// Counts of the step, 16 integers.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Header {
        /// Tokens.
        pub num_tokens: i32,
        /// Sequences.
        pub num_seqs: i32,
        /// How many of the sequences are decodes. These come first.
        pub num_decodes: i32,
        /// Rows of logits.
        pub num_logits: i32,
        /// Samples.
        pub num_samples: i32,
        /// Items of decode attention.
        pub num_decode_items: i32,
        /// Items of prefill attention.
        pub num_prefill_items: i32,
        /// Score requests.
        pub num_scores: i32,
        /// Zero.
        pub reserved: [i32; 8],
    }

    /// One draw: a `SampleRequest`, converted to the numbers that the kernel needs.
    #[derive(Clone, Copy, Debug, Default, PartialEq)]
    pub struct Sample {
        /// The random bits of its key.
        pub bits: u64,
        /// Tokens with smaller weights are dropped: `round(2^40 · min_p)`; 0 is off.
        pub min_weight: u64,
        /// Row of logits.
        pub row: i32,
        /// How many of the most likely tokens are candidates. 1 is greedy (a temperature of 0 becomes 1 here), 0 is
        /// off.
        pub top_k: i32,
        /// `floor(2^24 · top_p)`; 0 is off.
        pub top_p: u32,
        /// The logits' divisor.
        pub temperature: f32,
        /// As in `SamplingParams`; 1 is off.
        pub repetition_penalty: f32,
        /// As in `SamplingParams`; 0 is off.
        pub presence_penalty: f32,
        /// As in `SamplingParams`; 0 is off.
        pub frequency_penalty: f32,
        /// Index of its first adjustment.
        pub first_adjustment: i32,
        /// How many adjustments it has.
        pub num_adjustments: i32,
        /// Zero.
        pub reserved: i32,
    }

    /// A token whose logit a draw changes. A sample has at most one adjustment for each token.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Adjustment {
        /// The token.
        pub token: i32,
        /// How often it is in the output, with [`Adjustment::SEEN`] if it is in prompt or output and
        /// [`Adjustment::BANNED`] if it may not be drawn. If the bans would leave no token, the host omits them.
        pub code: i32,
    }

    /// The result of a draw.
    #[derive(Clone, Copy, Debug, Default, PartialEq)]
    pub struct Drawn {
        /// The token.
        pub token: i32,
        /// The first id (below the vocabulary's size) whose logit was not finite, or −1.
        pub bad_token: i32,
        /// Its value.
        pub bad_value: f32,
        /// Zero.
        pub reserved: i32,
    }

    /// A score request.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Asked {
        /// Row of logits.
        pub row: i32,
        /// The token, or −1 − n for the token that draw n gives.
        pub token: i32,
        /// The draw whose penalties and bans apply to the row; −1 for none.
        pub adjusted_by: i32,
        /// How many of the most likely tokens are wanted.
        pub best: i32,
    }

    /// What a score is made of: [`mixtral_engine::score::Found`].
    #[derive(Clone, Copy, Debug, Default, PartialEq)]
    pub struct Scored {
        /// The sum of the tokens' weights.
        pub sum: u64,
        /// The largest logit.
        pub max: f32,
        /// The token's logit.
        pub logit: f32,
        /// The first id whose logit was not finite, or −1.
        pub bad_token: i32,
        /// Its value.
        pub bad_value: f32,
        /// How many of the most likely tokens there are.
        pub num_best: i32,
        /// Zero.
        pub reserved: i32,
    }

    /// One of the most likely tokens.
    #[derive(Clone, Copy, Debug, Default, PartialEq)]
    pub struct Best {
        /// The token.
        pub token: i32,
        /// Its logit.
        pub logit: f32,
    }
}

impl Adjustment {
    /// The token is in the prompt or the output.
    pub const SEEN: i32 = 1 << 29;
    /// The token may not be drawn.
    pub const BANNED: i32 = 1 << 30;
}

/// Where the arrays lie: every [`Array`] once, in order, without overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepBlock {
    pub(crate) places: Vec<Place>,
    pub(crate) bytes: usize,
}

/// Where an array lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) array: Array,
    /// Bytes from the block's start.
    pub(crate) offset: usize,
    /// Bytes that it can hold.
    pub(crate) bytes: usize,
}

/// Alignment of the arrays, in bytes.
pub(crate) const ALIGN: usize = 128;

impl StepBlock {
    /// The block of a program.
    #[must_use]
    pub fn new(program: &Program) -> Self {
        let l = program.limits;
        let (t, s, logits) = (l.max_num_tokens, l.max_batch_size, l.max_num_logits);
        let splits = l.max_seq_len.div_ceil(DECODE_SPLIT);
        // A score for each row of logits, and the candidates of each sequence.
        let scores = s.max(logits) + s;
        let sizes = [
            (Array::Header, size_of::<Header>()),
            (Array::TokenIds, 4 * t),
            (Array::Positions, 4 * t),
            (Array::SlotMapping, 4 * t),
            (Array::CuQueryLens, 4 * (s + 1)),
            (Array::SeqLens, 4 * s),
            (Array::LogitsIndices, 4 * logits),
            (Array::DecodeItems, 16 * s * splits),
            (Array::PrefillItems, 8 * (s + t.div_ceil(PREFILL_TILE))),
            (Array::Samples, size_of::<Sample>() * s.max(logits)),
            (Array::BlockTable, 4 * s * l.max_blocks_per_seq()),
            // Room for one adjustment for each position of every sequence, and for as many bans.
            (Array::Adjustments, size_of::<Adjustment>() * 2 * s * l.max_seq_len),
            (Array::Scores, size_of::<Asked>() * scores),
            (Array::Drawn, size_of::<Drawn>() * s.max(logits)),
            (Array::Scored, size_of::<Scored>() * scores),
            (Array::Best, size_of::<Best>() * MAX_BEST * scores),
        ];
        let mut bytes = 0;
        let places = sizes
            .iter()
            .map(|&(array, size)| {
                let offset = bytes;
                bytes = (bytes + size).next_multiple_of(ALIGN);
                Place { array, offset, bytes: size }
            })
            .collect();
        StepBlock { places, bytes }
    }

    /// Bytes from the block's start to an array's.
    #[must_use]
    pub fn offset(&self, array: Array) -> usize {
        self.places[array as usize].offset
    }

    /// Bytes that an array can hold.
    #[must_use]
    pub fn capacity(&self, array: Array) -> usize {
        self.places[array as usize].bytes
    }

    /// Bytes of the block.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}
