//! What a rank's file must hold: the table of weights, their shapes and formats, and the tensors that they are stored in.

use mixtral_model::{CacheFormat, DType, ElemType, Part, Rank, WeightFormat};

use crate::names::part_name;
use crate::{CheckpointConfig, TensorId};

/// One weight of a rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightSpec {
    /// Which weight it is.
    pub id: TensorId,
    /// Its name: `id` written out.
    pub name: String,
    /// Type of its elements, or of what they stand for: the model's, except for the router and the cache's scales and
    /// directions, which are f32.
    pub dtype: DType,
    /// How it is stored.
    pub format: WeightFormat,
    /// Its shape on this rank.
    pub shape: Vec<usize>,
}

impl WeightSpec {
    /// The tensors that it is stored in.
    #[must_use]
    pub fn tensors(&self) -> Vec<TensorSpec> {
        tensors(&self.name, self.format.parts(self.dtype, &self.shape))
    }

    /// Bytes of its tensors. Saturates instead of overflowing.
    #[must_use]
    pub fn num_bytes(&self) -> u64 {
        self.format.num_bytes(self.dtype, &self.shape) as u64
    }
}

/// One tensor of a rank's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the file.
    pub name: String,
    /// Its element type.
    pub elem: ElemType,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Bytes of the tensor.
    #[must_use]
    pub fn num_bytes(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product::<u64>() * self.elem.size() as u64
    }
}

/// The tensors that hold the parts of the weight with the name `weight`.
#[must_use]
pub fn tensors(weight: &str, parts: Vec<Part>) -> Vec<TensorSpec> {
    let tensor = |part: Part| TensorSpec { name: part_name(weight, part.kind), elem: part.elem, shape: part.shape };
    parts.into_iter().map(tensor).collect()
}

/// The tensors of `rank`'s file, in the order of the computation.
///
/// # Panics
/// As [`rank_weights`].
#[must_use]
pub fn rank_tensors(config: &CheckpointConfig, rank: Rank) -> Vec<TensorSpec> {
    rank_weights(config, rank).iter().flat_map(WeightSpec::tensors).collect()
}

/// The weights of `rank`, in the order of the computation.
///
/// # Panics
/// If `rank` is not in the mapping. `config` must be valid (see [`CheckpointConfig::validate`]).
#[must_use]
pub fn rank_weights(config: &CheckpointConfig, rank: Rank) -> Vec<WeightSpec> {
    let (model, mapping) = (&config.model, &config.mapping);
    let hidden = model.hidden_size;
    let heads = mapping.heads(model, rank).len();
    let kv_heads = mapping.kv_heads(model, rank).len();
    let experts = mapping.experts(model, rank).len();
    let intermediate = mapping.intermediate(model, rank).len();
    let vocab = mapping.vocab(model, rank).len();

    let mut weights = Vec::new();
    let mut add = |id: TensorId, dtype, shape: &[usize]| {
        let format = match id {
            TensorId::Qkv(_) | TensorId::Dense(_) => model.formats.attention,
            TensorId::Fc(_) | TensorId::Proj(_) => model.formats.feed_forward,
            _ => WeightFormat::Plain,
        };
        weights.push(WeightSpec { id, name: id.to_string(), dtype, format, shape: shape.to_vec() });
    };
    if mapping.is_first_stage(rank) {
        let shape = match config.embedding_shards() {
            None => [model.vocab_size, hidden],
            Some(0) => [vocab, hidden],
            Some(_) => [model.vocab_size, hidden / mapping.tp_size],
        };
        add(TensorId::Embedding, model.dtype, &shape);
    }
    for layer in 0..mapping.layers(model, rank).len() {
        add(TensorId::InputNorm(layer), model.dtype, &[hidden]);
        add(TensorId::Qkv(layer), model.dtype, &[(heads + 2 * kv_heads) * model.head_dim, hidden]);
        add(TensorId::Dense(layer), model.dtype, &[hidden, heads * model.head_dim]);
        if model.cache == CacheFormat::Fp8 {
            // In other tools' files one scale is for keys and values.
            add(TensorId::CacheScales(layer), DType::F32, &[if config.tool_version.is_some() { 2 } else { 1 }]);
            if model.key_directions {
                add(TensorId::KeyDirections(layer), DType::F32, &[kv_heads, model.head_dim]);
            }
        }
        add(TensorId::PostNorm(layer), model.dtype, &[hidden]);
        if model.has_router() {
            add(TensorId::Router(layer), DType::F32, &[model.moe.num_experts, hidden]);
        }
        add(TensorId::Fc(layer), model.dtype, &[experts, 2 * intermediate, hidden]);
        add(TensorId::Proj(layer), model.dtype, &[experts, hidden, intermediate]);
    }
    if mapping.is_last_stage(rank) {
        add(TensorId::FinalNorm, model.dtype, &[hidden]);
        add(TensorId::LmHead, model.dtype, &[vocab, hidden]);
    }
    weights
}

#[cfg(test)]
mod tests {
    use mixtral_model::{Mapping, ModelConfig};

    use super::*;

    fn shapes(mapping: Mapping, rank: usize) -> Vec<(String, Vec<usize>)> {
        let config = CheckpointConfig::new(ModelConfig::mixtral_8x7b(DType::F16), mapping);
        config.validate().unwrap();
        let wanted = ["qkv", "dense", "router", "fc", "proj", "lm_head", "vocab"];
        rank_weights(&config, Rank(rank))
            .into_iter()
            .filter(|t| t.id.layer().is_none_or(|l| l == 0) && wanted.iter().any(|w| t.name.contains(w)))
            .map(|t| (t.name, t.shape))
            .collect()
    }

    #[test]
    fn two_ranks_have_the_documented_shapes() {
        let tp: Vec<_> = shapes(Mapping::tensor_parallel(2, 1), 1).into_iter().map(|(_, s)| s).collect();
        assert_eq!(
            tp,
            [
                vec![32000, 4096],
                vec![3072, 4096],
                vec![4096, 2048],
                vec![8, 4096],
                vec![8, 14336, 4096],
                vec![8, 4096, 7168],
                vec![16000, 4096]
            ]
        );
        let ep: Vec<_> = shapes(Mapping::expert_parallel(2, 1), 1).into_iter().map(|(_, s)| s).collect();
        assert_eq!(ep[4], [4, 28672, 4096]);
        assert_eq!(ep[5], [4, 4096, 14336]);
    }

    #[test]
    fn only_an_fp8_cache_has_directions_and_a_rank_those_of_its_kv_heads() {
        let directions = |edit: fn(&mut ModelConfig), tp_size| -> Vec<(String, DType, Vec<usize>)> {
            let mut model = ModelConfig { num_layers: 2, ..ModelConfig::mixtral_8x7b(DType::F16) };
            edit(&mut model);
            let config = CheckpointConfig::new(model, Mapping::tensor_parallel(tp_size, 1));
            config.validate().unwrap();
            let weights = rank_weights(&config, Rank(1)).into_iter();
            let of_cache = weights.filter(|weight| weight.name.contains("kv_cache_key_directions"));
            of_cache.map(|weight| (weight.name, weight.dtype, weight.shape)).collect()
        };
        let both: fn(&mut ModelConfig) = |model| (model.cache, model.key_directions) = (CacheFormat::Fp8, true);
        // 16 ranks have copies of 8 KV heads.
        for (tp_size, kv_heads) in [(2, 4), (16, 1)] {
            let names = [0, 1].map(|layer| format!("transformer.layers.{layer}.attention.kv_cache_key_directions"));
            assert_eq!(directions(both, tp_size), names.map(|name| (name, DType::F32, vec![kv_heads, 128])));
        }
        assert_eq!(directions(|model| model.cache = CacheFormat::Fp8, 2), []);
        assert_eq!(directions(|model| model.key_directions = true, 2), []);
    }

    #[test]
    fn each_stage_counts_its_layers_from_zero() {
        let config = CheckpointConfig::new(ModelConfig::mixtral_8x7b(DType::F16), Mapping::tensor_parallel(1, 3));
        let layers: Vec<_> = (0..3)
            .map(|r| rank_weights(&config, Rank(r)).iter().filter_map(|t| t.id.layer()).max().unwrap() + 1)
            .collect();
        assert_eq!(layers, [11, 11, 10]);
        assert!(rank_weights(&config, Rank(1)).iter().all(|t| t.id.layer().is_some()));
    }
}
