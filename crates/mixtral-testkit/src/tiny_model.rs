//! A small random model. It can be written in any of the layouts in which models are published.
//!
//! The tensor names are written here a second time on purpose: if the tests took them from the code under test, they
//! would agree with any mistake in it.

use std::fs;
use std::path::Path;

use half::{bf16, f16};
use mixtral_model::{CacheFormat, DType, Formats, ModelConfig, ModelFamily, MoeConfig, MoeNormalization};
use serde_json::{Value, json};

/// How a model is laid out on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// transformers 4: one tensor for each expert and matrix.
    V4,
    /// transformers 5: the experts of a layer fused.
    V5,
    /// Mistral's own layout: `params.json`, interleaved rotary rows.
    Consolidated,
    /// Mistral's own layout as first published for Mixtral 8x7B: experts stacked, w2 transposed, other keys in
    /// `params.json`.
    ConsolidatedStacked,
}

/// A named tensor, as raw little-endian elements.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements, row-major.
    pub data: Vec<u8>,
}

impl Tensor {
    /// `values` rounded to `dtype`.
    #[must_use]
    pub fn new(name: impl Into<String>, dtype: DType, shape: &[usize], values: &[f32]) -> Self {
        assert_eq!(values.len(), shape.iter().product::<usize>());
        let data = match dtype {
            DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            DType::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        };
        Tensor { name: name.into(), dtype, shape: shape.to_vec(), data }
    }

    /// The elements as f32, which is exact.
    #[must_use]
    pub fn values(&self) -> Vec<f32> {
        match self.dtype {
            DType::F32 => self.data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            DType::F16 => self.data.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
            DType::Bf16 => self.data.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
        }
    }

    /// Bytes of a row of the tensor, seen as a matrix.
    fn row_bytes(&self) -> usize {
        self.shape[self.shape.len() - 1] * self.dtype.size()
    }

    fn renamed(&self, name: String) -> Tensor {
        Tensor { name, ..self.clone() }
    }

    /// This matrix with its rows in another order: row `i` becomes the old row `from(i)`.
    fn rows_from(&self, from: impl Fn(usize) -> usize) -> Tensor {
        let n = self.row_bytes();
        let data = (0..self.shape[0]).flat_map(|i| self.data[from(i) * n..][..n].to_vec()).collect();
        Tensor { data, ..self.clone() }
    }

    fn transposed(&self) -> Tensor {
        let (rows, cols, size) = (self.shape[0], self.shape[1], self.dtype.size());
        let mut data = Vec::with_capacity(self.data.len());
        for c in 0..cols {
            for r in 0..rows {
                data.extend_from_slice(&self.data[(r * cols + c) * size..][..size]);
            }
        }
        Tensor { shape: vec![cols, rows], data, ..self.clone() }
    }
}

/// A model with seeded random weights.
#[derive(Clone, Debug)]
pub struct TinyModel {
    /// Its geometry.
    pub config: ModelConfig,
    /// Whether lm_head is the embedding.
    pub tied: bool,
    /// Seed of the weights.
    pub seed: u64,
}

impl TinyModel {
    /// Two layers, four experts of which two are active, grouped-query attention, and a head_dim that is not
    /// hidden_size / num_heads.
    #[must_use]
    pub fn mixtral(dtype: DType, seed: u64) -> Self {
        let config = ModelConfig {
            family: ModelFamily::Mixtral,
            dtype,
            vocab_size: 97,
            hidden_size: 32,
            intermediate_size: 48,
            num_layers: 2,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 12,
            moe: MoeConfig { num_experts: 4, top_k: 2, normalization: MoeNormalization::Renorm },
            max_position_embeddings: 512,
            rope_theta: 1e6,
            norm_eps: 1e-5,
            sliding_window: None,
            formats: Formats::default(),
            cache: CacheFormat::Plain,
            key_directions: false,
        };
        TinyModel { config, tied: false, seed }
    }

    /// The same model without experts.
    #[must_use]
    pub fn mistral(dtype: DType, seed: u64) -> Self {
        let mut model = TinyModel::mixtral(dtype, seed);
        model.config.family = ModelFamily::Mistral;
        model.config.moe = MoeConfig { num_experts: 1, top_k: 1, normalization: MoeNormalization::Renorm };
        model.config.rope_theta = 1e4;
        model
    }

    /// All tensors, with transformers 4's names.
    #[must_use]
    pub fn weights(&self) -> Vec<Tensor> {
        let c = &self.config;
        let (hidden, inner, head) = (c.hidden_size, c.intermediate_size, c.head_dim);
        let mut tensors = vec![self.random("model.embed_tokens.weight".into(), &[c.vocab_size, hidden])];
        for l in 0..c.num_layers {
            let mut add = |name: &str, shape: &[usize]| {
                tensors.push(self.random(format!("model.layers.{l}.{name}.weight"), shape));
            };
            add("input_layernorm", &[hidden]);
            add("self_attn.q_proj", &[c.num_heads * head, hidden]);
            add("self_attn.k_proj", &[c.num_kv_heads * head, hidden]);
            add("self_attn.v_proj", &[c.num_kv_heads * head, hidden]);
            add("self_attn.o_proj", &[hidden, c.num_heads * head]);
            add("post_attention_layernorm", &[hidden]);
            if c.has_router() {
                add("block_sparse_moe.gate", &[c.moe.num_experts, hidden]);
                for e in 0..c.moe.num_experts {
                    add(&format!("block_sparse_moe.experts.{e}.w1"), &[inner, hidden]);
                    add(&format!("block_sparse_moe.experts.{e}.w2"), &[hidden, inner]);
                    add(&format!("block_sparse_moe.experts.{e}.w3"), &[inner, hidden]);
                }
            } else {
                add("mlp.gate_proj", &[inner, hidden]);
                add("mlp.up_proj", &[inner, hidden]);
                add("mlp.down_proj", &[hidden, inner]);
            }
        }
        tensors.push(self.random("model.norm.weight".into(), &[hidden]));
        if !self.tied {
            tensors.push(self.random("lm_head.weight".into(), &[c.vocab_size, hidden]));
        }
        tensors
    }

    /// The tensors as `layout` names and arranges them.
    #[must_use]
    pub fn weights_in(&self, layout: Layout) -> Vec<Tensor> {
        match layout {
            Layout::V4 => self.weights(),
            Layout::V5 => self.fused(),
            Layout::Consolidated | Layout::ConsolidatedStacked => self.consolidated(layout),
        }
    }

    /// Writes the model into `dir`, its weights in `shards` files. The directory is created.
    pub fn write(&self, dir: &Path, layout: Layout, shards: usize) {
        self.write_tensors(dir, layout, shards, &self.weights_in(layout));
    }

    /// The same as [`TinyModel::write`], with tensors that a test has changed.
    pub fn write_tensors(&self, dir: &Path, layout: Layout, shards: usize, tensors: &[Tensor]) {
        fs::create_dir_all(dir).unwrap();
        let (config, stem) = match layout {
            Layout::V4 | Layout::V5 => ("config.json", "model"),
            Layout::Consolidated | Layout::ConsolidatedStacked => ("params.json", "consolidated"),
        };
        let text = serde_json::to_string_pretty(&self.config_json(layout)).unwrap();
        fs::write(dir.join(config), text).unwrap();
        fs::write(dir.join("added_tokens.json"), "{}").unwrap();
        if shards == 1 {
            return write_safetensors(&dir.join(format!("{stem}.safetensors")), tensors);
        }
        let mut weight_map = serde_json::Map::new();
        for (index, part) in tensors.chunks(tensors.len().div_ceil(shards)).enumerate() {
            let file = format!("{stem}-{:05}-of-{shards:05}.safetensors", index + 1);
            write_safetensors(&dir.join(&file), part);
            weight_map.extend(part.iter().map(|t| (t.name.clone(), json!(file))));
        }
        let index = json!({ "metadata": {}, "weight_map": weight_map });
        fs::write(dir.join(format!("{stem}.safetensors.index.json")), index.to_string()).unwrap();
    }

    /// The configuration file of `layout`: old keys with [`Layout::V4`], new ones with [`Layout::V5`].
    #[must_use]
    pub fn config_json(&self, layout: Layout) -> Value {
        let c = &self.config;
        let moe = c.has_router();
        let mut json = match layout {
            Layout::V4 | Layout::V5 => json!({
                "architectures": [if moe { "MixtralForCausalLM" } else { "MistralForCausalLM" }],
                "model_type": if moe { "mixtral" } else { "mistral" },
                "hidden_act": "silu",
                "hidden_size": c.hidden_size,
                "intermediate_size": c.intermediate_size,
                "num_hidden_layers": c.num_layers,
                "num_attention_heads": c.num_heads,
                "num_key_value_heads": c.num_kv_heads,
                "head_dim": c.head_dim,
                "vocab_size": c.vocab_size,
                "max_position_embeddings": c.max_position_embeddings,
                "rms_norm_eps": c.norm_eps,
                "sliding_window": c.sliding_window,
                "tie_word_embeddings": self.tied,
            }),
            Layout::Consolidated => json!({
                "dim": c.hidden_size,
                "hidden_dim": c.intermediate_size,
                "n_layers": c.num_layers,
                "n_heads": c.num_heads,
                "n_kv_heads": c.num_kv_heads,
                "head_dim": c.head_dim,
                "vocab_size": c.vocab_size,
                "max_seq_len": c.max_position_embeddings,
                "norm_eps": c.norm_eps,
                "rope_theta": c.rope_theta,
                "sliding_window": c.sliding_window,
                "tied_embeddings": self.tied,
            }),
            // In that layout, sliding_window was a string.
            Layout::ConsolidatedStacked => json!({
                "hidden_size": c.hidden_size,
                "intermediate_size": c.intermediate_size,
                "num_hidden_layers": c.num_layers,
                "num_attention_heads": c.num_heads,
                "num_key_value_heads": c.num_kv_heads,
                "head_dim": c.head_dim,
                "vocab_size": c.vocab_size,
                "max_position_embeddings": c.max_position_embeddings,
                "rms_norm_eps": c.norm_eps,
                "rope_theta": c.rope_theta,
                "sliding_window": c.sliding_window.map(|w| w.to_string()),
                "tied_embeddings": self.tied,
                "num_local_experts": c.moe.num_experts,
                "num_experts_per_tok": c.moe.top_k,
            }),
        };
        match layout {
            Layout::V4 => {
                json["torch_dtype"] = json!(c.dtype);
                json["rope_theta"] = json!(c.rope_theta);
            }
            Layout::V5 => {
                json["dtype"] = json!(c.dtype);
                json["rope_parameters"] = json!({ "rope_type": "default", "rope_theta": c.rope_theta });
            }
            Layout::Consolidated if moe => {
                json["moe"] = json!({ "num_experts": c.moe.num_experts, "num_experts_per_tok": c.moe.top_k });
            }
            Layout::Consolidated | Layout::ConsolidatedStacked => {}
        }
        if moe && matches!(layout, Layout::V4 | Layout::V5) {
            json["num_local_experts"] = json!(c.moe.num_experts);
            json["num_experts_per_tok"] = json!(c.moe.top_k);
        }
        json
    }

    /// The tensors of transformers 5: `[gate; up]` of all experts of a layer in one tensor, down_proj in another.
    fn fused(&self) -> Vec<Tensor> {
        let c = &self.config;
        let (experts, hidden, inner) = (c.moe.num_experts, c.hidden_size, c.intermediate_size);
        let all = self.weights();
        if !c.has_router() {
            return all;
        }
        let expert = |l: usize, e: usize, w: &str| {
            let name = format!("model.layers.{l}.block_sparse_moe.experts.{e}.{w}.weight");
            all.iter().find(|t| t.name == name).unwrap().data.clone()
        };
        let mut fused: Vec<Tensor> = all
            .iter()
            .filter(|t| !t.name.contains(".experts."))
            .map(|t| t.renamed(t.name.replace("block_sparse_moe.gate", "mlp.gate")))
            .collect();
        for l in 0..c.num_layers {
            let gate_up = (0..experts).flat_map(|e| [expert(l, e, "w1"), expert(l, e, "w3")]).flatten().collect();
            let down = (0..experts).flat_map(|e| expert(l, e, "w2")).collect();
            let prefix = format!("model.layers.{l}.mlp.experts");
            let tensor =
                |name: String, shape: [usize; 3], data| Tensor { name, dtype: c.dtype, shape: shape.to_vec(), data };
            fused.push(tensor(format!("{prefix}.gate_up_proj"), [experts, 2 * inner, hidden], gate_up));
            fused.push(tensor(format!("{prefix}.down_proj"), [experts, hidden, inner], down));
        }
        fused
    }

    fn consolidated(&self, layout: Layout) -> Vec<Tensor> {
        let c = &self.config;
        let half = c.head_dim / 2;
        // Rotary pairs lie beside each other here, and half a head apart in transformers.
        let interleaved = |i: usize| {
            let (head, within) = (i / c.head_dim, i % c.head_dim);
            head * c.head_dim + (within % 2) * half + within / 2
        };
        let mut tensors = Vec::new();
        let mut stacks: Vec<(String, Vec<Tensor>)> = Vec::new();
        for t in self.weights() {
            let name = t
                .name
                .trim_start_matches("model.")
                .replace("embed_tokens", "tok_embeddings")
                .replace("lm_head", "output")
                .replace("input_layernorm", "attention_norm")
                .replace("post_attention_layernorm", "ffn_norm")
                .replace("self_attn.q_proj", "attention.wq")
                .replace("self_attn.k_proj", "attention.wk")
                .replace("self_attn.v_proj", "attention.wv")
                .replace("self_attn.o_proj", "attention.wo")
                .replace("mlp.gate_proj", "feed_forward.w1")
                .replace("mlp.down_proj", "feed_forward.w2")
                .replace("mlp.up_proj", "feed_forward.w3");
            let t = if name.contains(".wq.") || name.contains(".wk.") { t.rows_from(interleaved) } else { t };
            if layout == Layout::Consolidated {
                tensors.push(t.renamed(name.replace("block_sparse_moe", "feed_forward")));
            } else if let Some((prefix, expert)) = name.split_once(".experts.") {
                let matrix = expert.split('.').nth(1).unwrap();
                let stacked = format!("{prefix}.{matrix}");
                let part = if matrix == "w2" { t.transposed() } else { t };
                match stacks.iter_mut().find(|(n, _)| *n == stacked) {
                    Some((_, parts)) => parts.push(part),
                    None => stacks.push((stacked, vec![part])),
                }
            } else {
                tensors.push(t.renamed(name));
            }
        }
        tensors.extend(stacks.into_iter().map(|(name, parts)| Tensor {
            name,
            dtype: parts[0].dtype,
            shape: vec![parts.iter().map(|p| p.shape[0]).sum(), parts[0].shape[1]],
            data: parts.iter().flat_map(|p| p.data.clone()).collect(),
        }));
        tensors
    }

    /// A tensor of standard deviation 1/√(its columns). Weights of norms lie around 1.
    fn random(&self, name: String, shape: &[usize]) -> Tensor {
        let mut state = name.bytes().fold(self.seed, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let (scale, centre) = match shape {
            [_] => (0.1, 1.0),
            _ => (1.0 / (shape[shape.len() - 1] as f32).sqrt(), 0.0),
        };
        let len = shape.iter().product();
        let values: Vec<f32> = (0..len).map(|_| centre + scale * bell(&mut state)).collect();
        Tensor::new(name, self.config.dtype, shape, &values)
    }
}

/// A draw of mean 0 and standard deviation 1: the sum of four bytes of a splitmix64 step.
fn bell(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let [a, b, c, d, ..] = (z ^ (z >> 31)).to_le_bytes().map(f32::from);
    // A byte has mean 127.5 and variance (256² − 1) / 12.
    (a + b + c + d - 510.0) / 147.8
}

/// Writes `tensors` as one safetensors file.
pub fn write_safetensors(path: &Path, tensors: &[Tensor]) {
    let views = tensors.iter().map(|t| {
        let dtype = match t.dtype {
            DType::F32 => safetensors::Dtype::F32,
            DType::F16 => safetensors::Dtype::F16,
            DType::Bf16 => safetensors::Dtype::BF16,
        };
        (t.name.as_str(), safetensors::tensor::TensorView::new(dtype, t.shape.clone(), &t.data).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}
