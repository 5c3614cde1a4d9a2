//! Which part of the model a rank owns.
//!
//! rank = pp_rank · tp_size + tp_rank. Inside a tensor-parallel group, experts are laid out over moe_tp_size ×
//! moe_ep_size, and the expert-parallel index changes fastest. TensorRT-LLM 0.11 does the same.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{ModelConfig, Rank, WeightFormat};

/// Degrees of parallelism of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Mapping {
    /// Tensor-parallel ranks.
    pub tp_size: usize,
    /// Pipeline stages.
    pub pp_size: usize,
    /// Ranks that share one expert's matrices; `moe_tp_size · moe_ep_size = tp_size`.
    pub moe_tp_size: usize,
    /// Ranks over which whole experts are distributed.
    pub moe_ep_size: usize,
}

/// The position of one rank in a [`Mapping`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RankCoords {
    /// Position inside the tensor-parallel group.
    pub tp_rank: usize,
    /// Pipeline stage.
    pub pp_rank: usize,
    /// Which slice of an expert's matrices.
    pub moe_tp_rank: usize,
    /// Which group of experts.
    pub moe_ep_rank: usize,
}

/// A mapping that does not fit a model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MappingError {
    /// A degree is zero.
    #[error("{0} is 0; it must be at least 1")]
    Zero(&'static str),
    /// More ranks than any machine has.
    #[error("{0} ranks are more than the supported 4096")]
    TooManyRanks(usize),
    /// The expert layout does not fill the tensor-parallel group.
    #[error("moe_tp_size {moe_tp} × moe_ep_size {moe_ep} is {}, but tp_size is {tp}; their product must equal it", moe_tp * moe_ep)]
    MoeProduct {
        /// Tensor-parallel degree of the experts.
        moe_tp: usize,
        /// Expert-parallel degree.
        moe_ep: usize,
        /// Tensor-parallel degree.
        tp: usize,
    },
    /// A size that cannot be divided evenly among the ranks.
    #[error("{what} {size} does not divide over {degree} {by}; choose a {by} that divides it")]
    Indivisible {
        /// The size, as the config names it.
        what: &'static str,
        /// Its value.
        size: usize,
        /// The degree's name.
        by: &'static str,
        /// The degree.
        degree: usize,
    },
    /// KV heads can neither be split nor replicated evenly.
    #[error(
        "num_key_value_heads {kv_heads} can neither be split over nor replicated to tp_size {tp}; one must be a multiple of the other"
    )]
    KvHeads {
        /// KV heads of the model.
        kv_heads: usize,
        /// Tensor-parallel degree.
        tp: usize,
    },
    /// There are more ranks than things to distribute.
    #[error("{degree} {by} is more than the model's {size} {what}; every rank needs at least one")]
    TooMany {
        /// What is distributed.
        what: &'static str,
        /// How many there are.
        size: usize,
        /// The degree's name.
        by: &'static str,
        /// The degree.
        degree: usize,
    },
    /// A rank's part of a quantized row that begins inside a group.
    #[error(
        "with {by} {degree}, a rank's part of each {what} row begins at element {start}, inside a group of format {format}; choose a {by} or a group size so that ranks begin at whole groups"
    )]
    Group {
        /// The matrix.
        what: &'static str,
        /// The degree's name.
        by: &'static str,
        /// The degree.
        degree: usize,
        /// The first element of the part.
        start: usize,
        /// The matrix's format.
        format: WeightFormat,
    },
    /// A dense model has no experts to distribute.
    #[error("moe_ep_size {0} needs a model with experts; a dense model has none")]
    DenseExpertParallel(usize),
}

/// The `index`-th of `parts` ranges that cover `0..len` as evenly as possible. Earlier ranges take the remainder.
#[must_use]
pub fn even_split(len: usize, parts: usize, index: usize) -> Range<usize> {
    let (base, extra) = (len / parts, len % parts);
    let start = index * base + index.min(extra);
    start..start + base + usize::from(index < extra)
}

impl Default for Mapping {
    fn default() -> Self {
        Mapping::single()
    }
}

impl Mapping {
    /// One rank that owns everything.
    #[must_use]
    pub const fn single() -> Self {
        Mapping { tp_size: 1, pp_size: 1, moe_tp_size: 1, moe_ep_size: 1 }
    }

    /// A job of `tp_size · pp_size` ranks whose experts are split like every other matrix.
    #[must_use]
    pub const fn tensor_parallel(tp_size: usize, pp_size: usize) -> Self {
        Mapping { tp_size, pp_size, moe_tp_size: tp_size, moe_ep_size: 1 }
    }

    /// A job of `tp_size · pp_size` ranks, over which whole experts are distributed.
    #[must_use]
    pub const fn expert_parallel(tp_size: usize, pp_size: usize) -> Self {
        Mapping { tp_size, pp_size, moe_tp_size: 1, moe_ep_size: tp_size }
    }

    /// Ranks of the job.
    #[must_use]
    pub const fn world_size(&self) -> usize {
        self.tp_size * self.pp_size
    }

    /// All ranks in order.
    pub fn ranks(&self) -> impl Iterator<Item = Rank> + use<> {
        (0..self.world_size()).map(Rank)
    }

    /// The position of `rank`.
    ///
    /// # Panics
    /// If `rank` is not below [`Mapping::world_size`].
    #[must_use]
    pub fn coords(&self, rank: Rank) -> RankCoords {
        assert!(rank.0 < self.world_size(), "rank {rank} of a world of {}", self.world_size());
        let tp_rank = rank.0 % self.tp_size;
        RankCoords {
            tp_rank,
            pp_rank: rank.0 / self.tp_size,
            moe_tp_rank: tp_rank / self.moe_ep_size,
            moe_ep_rank: tp_rank % self.moe_ep_size,
        }
    }

    /// Checks that the mapping fits `model`.
    ///
    /// # Errors
    /// The first rule it breaks.
    pub fn validate(&self, model: &ModelConfig) -> Result<(), MappingError> {
        let degrees = [
            ("tp_size", self.tp_size),
            ("pp_size", self.pp_size),
            ("moe_tp_size", self.moe_tp_size),
            ("moe_ep_size", self.moe_ep_size),
        ];
        if let Some((name, _)) = degrees.iter().find(|(_, size)| *size == 0) {
            return Err(MappingError::Zero(name));
        }
        if degrees.iter().any(|(_, size)| *size > 4096) || self.world_size() > 4096 {
            return Err(MappingError::TooManyRanks(self.tp_size.saturating_mul(self.pp_size)));
        }
        if self.moe_tp_size * self.moe_ep_size != self.tp_size {
            return Err(MappingError::MoeProduct {
                moe_tp: self.moe_tp_size,
                moe_ep: self.moe_ep_size,
                tp: self.tp_size,
            });
        }
        let divides = |what, size: usize, by, degree: usize| {
            if size.is_multiple_of(degree) { Ok(()) } else { Err(MappingError::Indivisible { what, size, by, degree }) }
        };
        divides("num_attention_heads", model.num_heads, "tp_size", self.tp_size)?;
        divides("intermediate_size", model.intermediate_size, "moe_tp_size", self.moe_tp_size)?;
        if !model.num_kv_heads.is_multiple_of(self.tp_size) && !self.tp_size.is_multiple_of(model.num_kv_heads) {
            return Err(MappingError::KvHeads { kv_heads: model.num_kv_heads, tp: self.tp_size });
        }
        let enough = |what, size: usize, by, degree: usize| {
            if size >= degree { Ok(()) } else { Err(MappingError::TooMany { what, size, by, degree }) }
        };
        enough("layers", model.num_layers, "pp_size", self.pp_size)?;
        if self.moe_ep_size > 1 && !model.has_router() {
            return Err(MappingError::DenseExpertParallel(self.moe_ep_size));
        }
        let formats = model.formats;
        for rank in (0..self.tp_size).map(Rank) {
            let attended = self.heads(model, rank).start * model.head_dim;
            if !formats.attention.can_be_cut_at(attended) {
                let (what, by, degree) = ("attention.dense", "tp_size", self.tp_size);
                return Err(MappingError::Group { what, by, degree, start: attended, format: formats.attention });
            }
            let inner = self.intermediate(model, rank).start;
            if !formats.feed_forward.can_be_cut_at(inner) {
                let (what, by, degree) = ("mlp.proj", "moe_tp_size", self.moe_tp_size);
                return Err(MappingError::Group { what, by, degree, start: inner, format: formats.feed_forward });
            }
        }
        enough("experts", model.moe.num_experts, "moe_ep_size", self.moe_ep_size)
    }

    /// Layers of a pipeline stage, counted over the whole model.
    #[must_use]
    pub fn layers(&self, model: &ModelConfig, rank: Rank) -> Range<usize> {
        even_split(model.num_layers, self.pp_size, self.coords(rank).pp_rank)
    }

    /// Whether `rank` is on the first pipeline stage, which embeds the tokens.
    #[must_use]
    pub fn is_first_stage(&self, rank: Rank) -> bool {
        self.coords(rank).pp_rank == 0
    }

    /// Whether `rank` is on the last pipeline stage, which computes the logits.
    #[must_use]
    pub fn is_last_stage(&self, rank: Rank) -> bool {
        self.coords(rank).pp_rank + 1 == self.pp_size
    }

    /// Query heads of a rank.
    #[must_use]
    pub fn heads(&self, model: &ModelConfig, rank: Rank) -> Range<usize> {
        even_split(model.num_heads, self.tp_size, self.coords(rank).tp_rank)
    }

    /// KV heads of a rank. When there are fewer heads than tensor-parallel ranks, neighbouring ranks share one.
    #[must_use]
    pub fn kv_heads(&self, model: &ModelConfig, rank: Rank) -> Range<usize> {
        let tp_rank = self.coords(rank).tp_rank;
        if model.num_kv_heads >= self.tp_size {
            even_split(model.num_kv_heads, self.tp_size, tp_rank)
        } else {
            let head = tp_rank / (self.tp_size / model.num_kv_heads);
            head..head + 1
        }
    }

    /// Experts of a rank.
    #[must_use]
    pub fn experts(&self, model: &ModelConfig, rank: Rank) -> Range<usize> {
        even_split(model.moe.num_experts, self.moe_ep_size, self.coords(rank).moe_ep_rank)
    }

    /// Columns of each expert's intermediate width that a rank owns.
    #[must_use]
    pub fn intermediate(&self, model: &ModelConfig, rank: Rank) -> Range<usize> {
        even_split(model.intermediate_size, self.moe_tp_size, self.coords(rank).moe_tp_rank)
    }

    /// Vocabulary rows of the whole model, padded so that they divide over the tensor-parallel ranks.
    #[must_use]
    pub fn padded_vocab_size(&self, model: &ModelConfig) -> usize {
        model.vocab_size.next_multiple_of(self.tp_size)
    }

    /// Rows of the padded vocabulary that a rank owns. Rows from `vocab_size` on are padding.
    #[must_use]
    pub fn vocab(&self, model: &ModelConfig, rank: Rank) -> Range<usize> {
        even_split(self.padded_vocab_size(model), self.tp_size, self.coords(rank).tp_rank)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::DType;

    #[test]
    fn hybrid_expert_groups_follow_the_documented_example() {
        // moe_tp 2 × moe_ep 4 on 8 ranks: EP groups [0..3], [4..7]; MoE-TP groups [0,4], [1,5], [2,6], [3,7].
        let mapping = Mapping { tp_size: 8, pp_size: 1, moe_tp_size: 2, moe_ep_size: 4 };
        let coords: Vec<_> =
            mapping.ranks().map(|r| mapping.coords(r)).map(|c| (c.moe_tp_rank, c.moe_ep_rank)).collect();
        assert_eq!(coords, [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]);
    }

    #[test]
    fn kv_heads_are_replicated_to_neighbours() {
        let mut model = ModelConfig::mixtral_8x7b(DType::F16);
        model.num_kv_heads = 2;
        let mapping = Mapping::tensor_parallel(8, 1);
        mapping.validate(&model).unwrap();
        let heads: Vec<_> = mapping.ranks().map(|r| mapping.kv_heads(&model, r).start).collect();
        assert_eq!(heads, [0, 0, 0, 0, 1, 1, 1, 1]);
    }

    #[test]
    fn impossible_mappings_are_refused() {
        let model = ModelConfig::mixtral_8x7b(DType::F16);
        let refused = |m: Mapping| m.validate(&model).unwrap_err().to_string();
        assert_eq!(
            refused(Mapping { tp_size: 4, pp_size: 1, moe_tp_size: 2, moe_ep_size: 1 }),
            "moe_tp_size 2 × moe_ep_size 1 is 2, but tp_size is 4; their product must equal it"
        );
        assert_eq!(
            refused(Mapping::tensor_parallel(3, 1)),
            "num_attention_heads 32 does not divide over 3 tp_size; choose a tp_size that divides it"
        );
        assert_eq!(
            refused(Mapping::tensor_parallel(1, 33)),
            "33 pp_size is more than the model's 32 layers; every rank needs at least one"
        );
        assert_eq!(refused(Mapping::tensor_parallel(0, 1)), "tp_size is 0; it must be at least 1");
    }

    proptest! {
        #[test]
        fn even_splits_cover_everything_once(len in 0usize..500, parts in 1usize..40) {
            let ranges: Vec<_> = (0..parts).map(|i| even_split(len, parts, i)).collect();
            prop_assert_eq!(ranges[0].start, 0);
            prop_assert_eq!(ranges[parts - 1].end, len);
            for pair in ranges.windows(2) {
                prop_assert_eq!(pair[0].end, pair[1].start);
                prop_assert!(pair[0].len() >= pair[1].len() && pair[0].len() <= pair[1].len() + 1);
            }
        }
    }
}
