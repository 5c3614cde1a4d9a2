//! merge(shard(x)) = x, bit for bit, over every way of cutting a model.
//!
//! The merge is written from the format's table of shapes and row orders, not from the shard plan, so that a mistake in
//! one of them shows.
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::sync::Arc;

use mixtral_checkpoint::{Checkpoint, rank_weights};
use mixtral_convert::statistics::BLOCK;
use mixtral_convert::{ConvertOptions, Input, InputStatistics, LinearInput, Statistics, convert, requantize};
use mixtral_model::fp8;
use mixtral_model::{
    Bits, CacheFormat, DType, Mapping, ModelConfig, ModelFamily, MoeConfig, MoeNormalization, Precision, Quantization,
    Rank, WeightFormat, WeightOnly,
};
use mixtral_testkit::{Layout, TinyModel};
use proptest::prelude::*;

/// A tensor that is put together. If an element is put several times, it has to be the same each time.
struct Whole {
    cols: usize,
    elements: Vec<Option<Vec<u8>>>,
}

impl Whole {
    fn put(&mut self, row: usize, col: usize, element: &[u8]) {
        let place = &mut self.elements[row * self.cols + col];
        match place {
            None => *place = Some(element.to_vec()),
            Some(before) => assert_eq!(before, element, "copies on several ranks differ"),
        }
    }
}

/// A rank's tensor, row by row.
struct Part {
    cols: usize,
    size: usize,
    bytes: Vec<u8>,
}

impl Part {
    fn rows(&self) -> usize {
        self.bytes.len() / self.size / self.cols
    }

    fn at(&self, row: usize, col: usize) -> &[u8] {
        &self.bytes[(row * self.cols + col) * self.size..][..self.size]
    }
}

/// Each element of a quantized weight as its integer, followed by its scale.
fn integers_and_scales(
    Quantization { bits, group, scale, .. }: Quantization,
    rows: usize,
    cols: usize,
    integers: &[u8],
    scales: &[u8],
) -> Vec<u8> {
    let len = group.unwrap_or(cols);
    let (row_bytes, groups) = (integers.len() / rows, cols.div_ceil(len));
    let element = |(row, col): (usize, usize)| {
        let integer = match bits {
            Bits::Eight => integers[row * row_bytes + col],
            Bits::Four => integers[row * row_bytes + col / 2] >> (4 * (col % 2)) & 15,
        };
        let scale = &scales[(row * groups + col / len) * scale.size()..][..scale.size()];
        [&[integer], scale].concat()
    };
    (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))).flat_map(element).collect()
}

/// Where the `index`-th of `parts` begins when the first `len % parts` take one more.
fn begin(len: usize, parts: usize, index: usize) -> usize {
    (0..index).map(|i| len / parts + usize::from(i < len % parts)).sum()
}

struct Merge {
    model: ModelConfig,
    mapping: Mapping,
    tied: bool,
    wholes: BTreeMap<String, Whole>,
}

impl Merge {
    fn whole(&mut self, name: &str, rows: usize, cols: usize) -> &mut Whole {
        let empty = || Whole { cols, elements: vec![None; rows * cols] };
        self.wholes.entry(name.to_owned()).or_insert_with(empty)
    }

    /// Puts the rows `from` of `part` at (`row`, `col`) of the whole tensor `name`.
    fn place(
        &mut self,
        name: &str,
        shape: [usize; 2],
        part: &Part,
        from: std::ops::Range<usize>,
        row: usize,
        col: usize,
    ) {
        let whole = self.whole(name, shape[0], shape[1]);
        for (i, r) in from.enumerate() {
            for c in 0..part.cols {
                whole.put(row + i, col + c, part.at(r, c));
            }
        }
    }

    fn rank(&mut self, checkpoint: &Checkpoint, rank: usize) {
        let (ModelConfig { hidden_size: h, intermediate_size: inner, head_dim: d, vocab_size: v, .. }, mapping) =
            (self.model.clone(), self.mapping);
        let (nh, kv) = (self.model.num_heads, self.model.num_kv_heads);
        let (t, tp, p, pp) = (rank % mapping.tp_size, mapping.tp_size, rank / mapping.tp_size, mapping.pp_size);
        let file = checkpoint.rank(Rank(rank)).unwrap();
        let mut left: Vec<String> = file.names().map(str::to_owned).collect();
        let weights = rank_weights(checkpoint.config(), Rank(rank));
        let mut part = |name: &str| {
            let weight = weights.iter().find(|weight| weight.name == name).unwrap();
            let tensors: Vec<_> = weight.tensors().iter().map(|tensor| file.tensor(&tensor.name).unwrap()).collect();
            left.retain(|n| weight.tensors().iter().all(|tensor| &tensor.name != n));
            let cols = *weight.shape.last().unwrap();
            match weight.format {
                WeightFormat::Plain => Part { cols, size: tensors[0].elem.size(), bytes: tensors[0].bytes.to_vec() },
                WeightFormat::Fp8 => {
                    // Each element, followed by the scale of its matrix and that of its input.
                    let (values, scales) = (tensors[0].bytes, tensors[1].bytes.as_chunks::<4>().0);
                    let of_matrix = values.len() / scales.len();
                    let element = |(index, byte): (usize, &u8)| {
                        [&[*byte], &scales[index / of_matrix][..], tensors[2].bytes].concat()
                    };
                    let bytes = values.iter().enumerate().flat_map(element).collect();
                    Part { cols, size: 9, bytes }
                }
                WeightFormat::Fp8Rows(_) => {
                    // Each element, followed by the scale of its row.
                    let scales = tensors[1].bytes.as_chunks::<4>().0;
                    let element = |(index, byte): (usize, &u8)| [&[*byte], &scales[index / cols][..]].concat();
                    Part { cols, size: 5, bytes: tensors[0].bytes.iter().enumerate().flat_map(element).collect() }
                }
                WeightFormat::Quantized(quantization) => {
                    let rows = weight.shape.iter().rev().skip(1).product();
                    let bytes = integers_and_scales(quantization, rows, cols, tensors[0].bytes, tensors[1].bytes);
                    Part { cols, size: 1 + quantization.scale.size(), bytes }
                }
            }
        };
        if p == 0 {
            let embedding = part("transformer.vocab_embedding.weight");
            let padded = v.div_ceil(tp) * tp;
            let config = checkpoint.config();
            let (row, col) = match (config.use_parallel_embedding && tp > 1, config.embedding_sharding_dim) {
                (false, _) => (0, 0),
                (true, 0) => (t * (padded / tp), 0),
                (true, _) => (0, t * (h / tp)),
            };
            self.place("model.embed_tokens.weight", [padded, h], &embedding, 0..embedding.rows(), row, col);
        }
        let (first, last) = (begin(self.model.num_layers, pp, p), begin(self.model.num_layers, pp, p + 1));
        for (local, layer) in (first..last).enumerate() {
            let ours = |name: &str| format!("transformer.layers.{local}.{name}.weight");
            let theirs = |name: &str| format!("model.layers.{layer}.{name}.weight");
            let norm = part(&ours("input_layernorm"));
            self.place(&theirs("input_layernorm"), [1, h], &norm, 0..1, 0, 0);
            let norm = part(&ours("post_layernorm"));
            self.place(&theirs("post_attention_layernorm"), [1, h], &norm, 0..1, 0, 0);

            let (kv_heads, kv_first) = if kv >= tp { (kv / tp, t * (kv / tp)) } else { (1, t * kv / tp) };
            if !self.model.cache.is_plain() {
                let scales = part(&format!("transformer.layers.{local}.attention.kv_cache_scaling_factor"));
                self.place(&format!("cache {layer}"), [1, 2], &scales, 0..1, 0, 0);
            }
            if self.model.key_directions {
                let directions = part(&format!("transformer.layers.{local}.attention.kv_cache_key_directions"));
                self.place(&format!("cache directions {layer}"), [kv, d], &directions, 0..kv_heads, kv_first, 0);
            }
            let qkv = part(&ours("attention.qkv"));
            let heads = nh / tp;
            assert_eq!(qkv.rows(), (heads + 2 * kv_heads) * d);
            let (q, k) = (heads * d, kv_heads * d);
            self.place(&theirs("self_attn.q_proj"), [nh * d, h], &qkv, 0..q, t * q, 0);
            self.place(&theirs("self_attn.k_proj"), [kv * d, h], &qkv, q..q + k, kv_first * d, 0);
            self.place(&theirs("self_attn.v_proj"), [kv * d, h], &qkv, q + k..q + 2 * k, kv_first * d, 0);
            let dense = part(&ours("attention.dense"));
            self.place(&theirs("self_attn.o_proj"), [h, nh * d], &dense, 0..h, 0, t * q);

            let moe = self.model.family == ModelFamily::Mixtral;
            if moe {
                let router = part(&ours("mlp.router"));
                assert_eq!(router.size, 4, "the router is f32");
                let e = self.model.moe.num_experts;
                self.place(&theirs("block_sparse_moe.gate"), [e, h], &router, 0..e, 0, 0);
            }
            let (ep_rank, mtp_rank) = (t % mapping.moe_ep_size, t / mapping.moe_ep_size);
            let width = inner / mapping.moe_tp_size;
            let e = self.model.moe.num_experts;
            let experts = begin(e, mapping.moe_ep_size, ep_rank)..begin(e, mapping.moe_ep_size, ep_rank + 1);
            let (fc, proj) = (part(&ours("mlp.fc")), part(&ours("mlp.proj")));
            assert_eq!((fc.rows(), proj.rows()), (experts.len() * 2 * width, experts.len() * h));
            for (slot, expert) in experts.enumerate() {
                let name = |w: &str, dense: &str| match moe {
                    true => theirs(&format!("block_sparse_moe.experts.{expert}.{w}")),
                    false => theirs(&format!("mlp.{dense}_proj")),
                };
                let (up, gate) = (slot * 2 * width, slot * 2 * width + width);
                let at = mtp_rank * width;
                self.place(&name("w3", "up"), [inner, h], &fc, up..up + width, at, 0);
                self.place(&name("w1", "gate"), [inner, h], &fc, gate..gate + width, at, 0);
                self.place(&name("w2", "down"), [h, inner], &proj, slot * h..(slot + 1) * h, 0, at);
            }
        }
        if p + 1 == pp {
            let norm = part("transformer.ln_f.weight");
            self.place("model.norm.weight", [1, h], &norm, 0..1, 0, 0);
            let head = part("lm_head.weight");
            let rows = v.div_ceil(tp);
            assert_eq!(head.rows(), rows);
            let name = if self.tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
            // A tied head is the embedding again, so it is put on top of the embedding. Its padding is checked
            // separately.
            for r in 0..rows {
                if t * rows + r < v {
                    self.place(name, [rows * tp, h], &head, r..r + 1, t * rows + r, 0);
                } else {
                    assert!((0..h).all(|c| head.at(r, c).iter().all(|&b| b == 0)), "padding is zero");
                }
            }
        }
        assert_eq!(left, Vec::<String>::new(), "tensors that no one asked for");
    }
}

fn merged(checkpoint: &Checkpoint, tied: bool) -> BTreeMap<String, Whole> {
    let config = checkpoint.config();
    let mut merge = Merge { model: config.model.clone(), mapping: config.mapping, tied, wholes: BTreeMap::new() };
    for rank in 0..config.mapping.world_size() {
        merge.rank(checkpoint, rank);
    }
    merge.wholes
}

/// Any precisions, and groups of 4 or whole rows.
fn weight_only() -> impl Strategy<Value = WeightOnly> {
    let precision = || {
        prop::sample::select(vec![
            Precision::Float,
            Precision::Int8,
            Precision::Int4,
            Precision::Fp8,
            Precision::Fp8Rows,
        ])
    };
    (precision(), precision(), any::<bool>()).prop_map(|(attention, feed_forward, is_row)| WeightOnly {
        attention,
        feed_forward,
        group: (!is_row).then_some(4),
    })
}

/// Statistics in which neighbouring inputs are alike, and every input and layer is different.
fn statistics(model: &ModelConfig) -> Statistics {
    let mut statistics = Statistics::default();
    let number = |n: usize| f32::from(u8::try_from(n % 251).unwrap());
    for layer in 0..model.num_layers {
        let seen = |(index, input): (usize, LinearInput)| {
            let width = input.width(model);
            let strength = |i: usize| 1.0 + number(i * 7 + layer) / 100.0;
            let block = |start: usize| start..(start + BLOCK).min(width);
            let moments = (0..width).step_by(BLOCK).flat_map(|start| {
                let row = move |i: usize| (i..block(start).end).map(move |j| (i, j));
                block(start).flat_map(row).map(|(i, j)| strength(i) * strength(j) * if i == j { 1.5 } else { 1.0 })
            });
            let moments = moments.collect();
            (input, InputStatistics { tokens: 1000, amax: 1.0 + number(index + 3 * layer), moments })
        };
        let inputs = LinearInput::of_layer(model, layer).into_iter().enumerate().map(seen).collect();
        statistics.add_layer(model, inputs, [1.0 + number(layer), 2.0 + number(layer)]);
    }
    statistics
}

#[derive(Clone, Debug)]
struct Case {
    model: TinyModel,
    layout: Layout,
    shards: usize,
    mapping: Mapping,
    embedding: Option<usize>,
    workers: usize,
}

fn case() -> impl Strategy<Value = Case> {
    let degrees = (prop::sample::select(vec![1usize, 2, 3, 4, 8]), 1usize..4, 0usize..4);
    let heads = (prop::sample::select(vec![1usize, 2, 3, 4, 6]), 1usize..4, 1usize..4);
    let sizes = (1usize..4, 1usize..5, 1usize..40, 0usize..4, 0usize..4);
    let kinds = (
        prop::sample::select(vec![DType::F32, DType::F16, DType::Bf16]),
        any::<bool>(),
        prop::bool::weighted(0.8),
        prop::sample::select(vec![Layout::V4, Layout::V5, Layout::Consolidated, Layout::ConsolidatedStacked]),
        prop::sample::select(vec![None, Some(0), Some(1)]),
    );
    (degrees, heads, sizes, kinds, any::<u64>(), 1usize..4).prop_map(
        |((tp, pp, ep), (kv, group, head), (hidden, inner, vocab, layers, experts), kinds, seed, shards)| {
            let (dtype, tied, moe, layout, embedding) = kinds;
            let layout = if !moe && layout == Layout::ConsolidatedStacked { Layout::Consolidated } else { layout };
            let degrees: Vec<usize> = (1..=tp).filter(|n| tp % n == 0 && moe).collect();
            let moe_ep_size = degrees.get(ep % degrees.len().max(1)).copied().unwrap_or(1);
            let mapping = Mapping { tp_size: tp, pp_size: pp, moe_tp_size: tp / moe_ep_size, moe_ep_size };
            let mut model = TinyModel::mixtral(dtype, seed);
            model.tied = tied;
            // If the KV heads can neither be split over the ranks nor be copied to them evenly, their number is
            // changed.
            let kv = if kv % tp != 0 && tp % kv != 0 { tp } else { kv };
            model.config = ModelConfig {
                family: if moe { ModelFamily::Mixtral } else { ModelFamily::Mistral },
                vocab_size: vocab,
                hidden_size: hidden * if embedding == Some(1) { tp } else { 1 } + usize::from(embedding != Some(1)),
                intermediate_size: inner * mapping.moe_tp_size,
                num_layers: pp + layers,
                num_heads: if (kv * group).is_multiple_of(tp) { kv * group } else { kv * group * tp },
                num_kv_heads: kv,
                head_dim: 2 * head,
                moe: MoeConfig {
                    num_experts: if moe { moe_ep_size + experts } else { 1 },
                    top_k: 1,
                    normalization: MoeNormalization::Renorm,
                },
                ..model.config
            };
            Case { model, layout, shards, mapping, embedding, workers: 1 + (seed % 3) as usize }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn merging_the_ranks_gives_the_model_back(case in case()) {
        let Case { model, layout, shards, mapping, embedding, workers } = case;
        let root = tempfile::tempdir().unwrap();
        let (from, to) = (root.path().join("model"), root.path().join("ckpt"));
        model.write(&from, layout, shards);
        let options = ConvertOptions {
            mapping,
            workers,
            use_parallel_embedding: embedding.is_some(),
            embedding_sharding_dim: embedding.unwrap_or(0),
            ..ConvertOptions::new(Input::Directory(from), to.clone())
        };
        convert(&options, &()).unwrap();
        let mut wholes = merged(&Checkpoint::open(&to).unwrap(), model.tied);
        for tensor in model.weights() {
            let whole = wholes.remove(&tensor.name).unwrap();
            let expected = match tensor.name.ends_with("block_sparse_moe.gate.weight") {
                true => tensor.values().iter().flat_map(|v| v.to_le_bytes()).collect(),
                false => tensor.data.clone(),
            };
            let len = tensor.shape.iter().product();
            let found: Vec<u8> = whole.elements[..len].iter().flat_map(|e| e.clone().expect("a hole")).collect();
            prop_assert_eq!(found, expected, "{}", tensor.name);
            // The elements behind are the padding of the vocabulary.
            prop_assert!(whole.elements[len..].iter().flatten().flatten().all(|&b| b == 0));
        }
        prop_assert!(wholes.is_empty(), "{:?}", wholes.keys());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Quantizing the model for many ranks, quantizing a checkpoint of many ranks, and cutting the quantized model give the same.
    #[test]
    fn merging_quantized_ranks_gives_the_quantized_model(
        case in case(), weight_only in weight_only(), calibrated: bool, small_cache: bool,
    ) {
        let Case { mut model, layout, shards, mapping, workers, .. } = case;
        // Ranks begin at whole groups. The hidden size stays as it is, so the last group of a row may be shorter.
        model.config.head_dim *= 2;
        model.config.intermediate_size *= 4;
        // Heads of most sizes have no directions for their keys.
        if small_cache && calibrated {
            model.config.head_dim = 16;
        }
        let has_directions = small_cache && fp8::suits_directions(model.config.head_dim);
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        model.write(&at("model"), layout, shards);
        let is_fp8 = |precision| matches!(precision, Precision::Fp8 | Precision::Fp8Rows);
        let needs = small_cache || is_fp8(weight_only.attention) || is_fp8(weight_only.feed_forward);
        let statistics = (calibrated || needs).then(|| Arc::new(statistics(&model.config)));
        let whole = ConvertOptions {
            weight_only: Some(weight_only),
            cache: small_cache.then_some(CacheFormat::Fp8),
            statistics: statistics.clone(),
            ..ConvertOptions::new(Input::Directory(at("model")), at("whole"))
        };
        convert(&whole, &()).unwrap();
        let cut = ConvertOptions { mapping, workers, output_dir: at("cut"), ..whole.clone() };
        convert(&cut, &()).unwrap();
        if statistics.is_none() {
            let floats = ConvertOptions { weight_only: None, output_dir: at("floats"), ..cut };
            convert(&floats, &()).unwrap();
            requantize(&Checkpoint::open(&at("floats")).unwrap(), weight_only, &at("again"), workers, &()).unwrap();
        }

        let elements = |name: &str| {
            let wholes = merged(&Checkpoint::open(&at(name)).unwrap(), model.tied);
            // Padding of the vocabulary is left out.
            let kept = |tensor: mixtral_testkit::Tensor| {
                let len = tensor.shape.iter().product();
                let found: Vec<u8> = wholes[&tensor.name].elements[..len].iter().flatten().flatten().copied().collect();
                (tensor.name, found)
            };
            let caches = wholes.iter().filter(|(name, _)| name.starts_with("cache "));
            let scales = |(name, whole): (&String, &Whole)| {
                (name.clone(), whole.elements.iter().flatten().flatten().copied().collect())
            };
            let scales: Vec<(String, Vec<u8>)> = caches.map(scales).collect();
            model.weights().into_iter().map(kept).chain(scales).collect::<Vec<_>>()
        };
        let expected = elements("whole");
        prop_assert_eq!(&elements("cut"), &expected);
        if statistics.is_none() {
            prop_assert_eq!(&elements("again"), &expected);
        }
        let of_layer = usize::from(small_cache) + usize::from(has_directions);
        prop_assert_eq!(expected.len(), model.weights().len() + of_layer * model.config.num_layers);
    }
}
