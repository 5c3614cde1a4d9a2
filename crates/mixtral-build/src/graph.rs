//! The naive graph of a rank. It has one operation per mathematical operation, and every intermediate has a buffer of
//! its own.
//!
//! Weights are the rank's own. Where ranks hold parts of a sum or of a row, the graph is written as if the part were
//! the whole. The first pass places the collectives that make the whole out of the parts. A pipeline stage begins with
//! `recv` and ends with `send`.
//!
//! The graph is itself a [`Program`] whose arena is not planned yet. Passes rewrite it, and between any two passes it
//! can be planned and run. Tests use that to show that fused programs equal unfused ones.

use mixtral_checkpoint::{CheckpointConfig, TensorId, rank_weights};
use mixtral_engine::{Buffer, Epilogue, KeyDirections, KvLayout, KvScale, Limits, Op, Program, Rows, Weight};
use mixtral_model::{CacheFormat, ElemType, Mapping, ModelConfig, Rank};

/// Builds the naive graph of `rank`.
#[must_use]
pub fn naive(config: &CheckpointConfig, rank: Rank, limits: Limits) -> Program {
    let (model, mapping) = (&config.model, &config.mapping);
    let whole = rank_weights(&CheckpointConfig { mapping: Mapping::single(), ..config.clone() }, Rank(0));
    let sharded = |name: &str, shape: &[usize]| {
        let whole = whole.iter().find(|whole| whole.name == name)?;
        shape.iter().zip(&whole.shape).position(|(part, whole)| part != whole)
    };
    let weights = rank_weights(config, rank)
        .into_iter()
        // The scales of the cache are numbers of the program.
        .filter(|t| !matches!(t.id, TensorId::CacheScales(_)))
        .map(|t| Weight {
            sharded: sharded(&t.name, &t.shape),
            name: t.name,
            dtype: t.dtype,
            shape: t.shape,
            format: t.format,
            pieces: Vec::new(),
        })
        .collect();
    let program = Program {
        rank: rank.0,
        world_size: mapping.world_size(),
        tp_size: mapping.tp_size,
        dtype: model.dtype,
        vocab_size: model.vocab_size,
        num_layers: model.num_layers,
        num_experts: if model.has_router() { model.moe.num_experts } else { 0 },
        top_k: if model.has_router() { model.moe.top_k } else { 0 },
        limits,
        kv: KvLayout {
            num_layers: mapping.layers(model, rank).len(),
            num_kv_heads: mapping.kv_heads(model, rank).len(),
            head_dim: model.head_dim,
            dtype: model.dtype,
            format: model.cache,
        },
        kv_scales: match model.cache {
            CacheFormat::Plain => Vec::new(),
            CacheFormat::Fp8 => vec![KvScale { key: 1.0, value: 1.0 }; mapping.layers(model, rank).len()],
        },
        arena_bytes: 0,
        buffers: Vec::new(),
        weights,
        ops: Vec::new(),
    };
    let mut graph = Graph { model, program, num_heads: mapping.heads(model, rank).len() };
    let experts = mapping.experts(model, rank);
    let mut hidden = if mapping.is_first_stage(rank) {
        graph.embed(match config.embedding_shards() {
            Some(0) => mapping.vocab(model, rank).start,
            _ => 0,
        })
    } else {
        let out = graph.activation("received", Rows::Tokens, model.hidden_size);
        graph.push(Op::Recv { out: out.clone(), from: rank.0 - mapping.tp_size });
        out
    };
    for (layer, model_layer) in mapping.layers(model, rank).enumerate() {
        hidden = graph.attention(layer, &hidden);
        hidden = if model.has_router() {
            graph.experts(layer, model_layer, [experts.start, experts.end], &hidden)
        } else {
            graph.dense(layer, &hidden)
        };
    }
    if mapping.is_last_stage(rank) {
        graph.logits(&hidden);
    } else {
        graph.push(Op::Send { input: hidden, to: rank.0 + mapping.tp_size });
    }
    graph.program
}

/// The program under construction.
struct Graph<'a> {
    model: &'a ModelConfig,
    program: Program,
    num_heads: usize,
}

impl Graph<'_> {
    fn push(&mut self, op: Op) {
        self.program.ops.push(op);
    }

    fn buffer(&mut self, name: impl Into<String>, dtype: ElemType, rows: Rows, cols: usize) -> String {
        let name = name.into();
        self.program.buffers.push(Buffer { name: name.clone(), dtype, rows, cols, offset: 0 });
        name
    }

    fn activation(&mut self, name: impl Into<String>, rows: Rows, cols: usize) -> String {
        self.buffer(name, self.program.dtype.into(), rows, cols)
    }

    /// Rows of a weight seen as a matrix.
    fn weight_rows(&self, id: TensorId) -> usize {
        self.program.weight(&id.to_string()).map_or(0, Weight::rows)
    }

    fn embed(&mut self, vocab_start: usize) -> String {
        let table = TensorId::Embedding.to_string();
        let out = self.activation("embedded", Rows::Tokens, self.model.hidden_size);
        self.push(Op::Embed { table, vocab_start, out: out.clone() });
        out
    }

    fn norm(&mut self, id: TensorId, input: &str, name: String, rows: Rows) -> String {
        let out = self.activation(name, rows, self.model.hidden_size);
        let eps = self.model.norm_eps;
        self.push(Op::Norm { input: input.to_owned(), weight: id.to_string(), eps, out: out.clone() });
        out
    }

    fn linear(&mut self, id: TensorId, rows: Option<[usize; 2]>, input: &str, name: String) -> String {
        let cols = rows.map_or_else(|| self.weight_rows(id), |[start, end]| end - start);
        let out = self.activation(name, Rows::Tokens, cols);
        self.push(Op::Linear {
            input: input.to_owned(),
            weight: id.to_string(),
            rows,
            epilogue: Epilogue::Store,
            residual: None,
            out: out.clone(),
            ladder: Vec::new(),
        });
        out
    }

    fn add(&mut self, a: String, b: &str, name: String) -> String {
        let out = self.activation(name, Rows::Tokens, self.model.hidden_size);
        self.push(Op::Add { a, b: b.to_owned(), out: out.clone() });
        out
    }

    fn attention(&mut self, layer: usize, hidden: &str) -> String {
        let at = |name: &str| format!("layer{layer}.{name}");
        let kv = self.program.kv;
        let (q, k) = (self.num_heads * kv.head_dim, kv.num_kv_heads * kv.head_dim);
        let normed = self.norm(TensorId::InputNorm(layer), hidden, at("attention_input"), Rows::Tokens);
        let query = self.linear(TensorId::Qkv(layer), Some([0, q]), &normed, at("query"));
        let key = self.linear(TensorId::Qkv(layer), Some([q, q + k]), &normed, at("key"));
        let value = self.linear(TensorId::Qkv(layer), Some([q + k, q + 2 * k]), &normed, at("value"));
        let theta = self.model.rope_theta;
        self.push(Op::Rope { data: query.clone(), num_heads: self.num_heads, theta });
        self.push(Op::Rope { data: key.clone(), num_heads: kv.num_kv_heads, theta });
        let directions = self
            .model
            .key_directions
            .then(|| KeyDirections { weight: TensorId::KeyDirections(layer).to_string(), theta });
        self.push(Op::WriteKv { key, value, layer, directions });
        let attended = self.activation(at("attended"), Rows::Tokens, q);
        self.push(Op::Attention {
            query,
            num_heads: self.num_heads,
            window: self.model.sliding_window,
            fp8_context: false,
            layer,
            out: attended.clone(),
        });
        let projected = self.linear(TensorId::Dense(layer), None, &attended, at("attention_output"));
        self.add(projected, hidden, at("after_attention"))
    }

    fn experts(&mut self, layer: usize, model_layer: usize, experts: [usize; 2], hidden: &str) -> String {
        let at = |name: &str| format!("layer{layer}.{name}");
        let (num_experts, top_k) = (self.program.num_experts, self.program.top_k);
        let local = experts[1] - experts[0];
        let intermediate = self.weight_rows(TensorId::Fc(layer)) / local / 2;
        let normed = self.norm(TensorId::PostNorm(layer), hidden, at("moe_input"), Rows::Tokens);
        let logits = self.buffer(at("router_logits"), ElemType::F32, Rows::Tokens, num_experts);
        self.push(Op::Linear {
            input: normed.clone(),
            weight: TensorId::Router(layer).to_string(),
            rows: None,
            epilogue: Epilogue::F32,
            residual: None,
            out: logits.clone(),
            ladder: Vec::new(),
        });
        let probs = self.buffer(at("router_probs"), ElemType::F32, Rows::Tokens, num_experts);
        self.push(Op::Softmax { logits, probs: probs.clone() });
        let expert_ids = self.buffer(at("expert_ids"), ElemType::I32, Rows::Tokens, top_k);
        let expert_weights = self.buffer(at("expert_weights"), ElemType::F32, Rows::Tokens, top_k);
        self.push(Op::TopK {
            probs,
            normalization: self.model.moe.normalization,
            layer: model_layer,
            expert_ids: expert_ids.clone(),
            expert_weights: expert_weights.clone(),
        });
        let offsets = self.buffer(at("expert_offsets"), ElemType::I32, Rows::One, local + 1);
        let order = self.buffer(at("expert_order"), ElemType::I32, Rows::Assignments, 1);
        self.push(Op::ExpertSort {
            expert_ids: expert_ids.clone(),
            experts,
            offsets: offsets.clone(),
            order: order.clone(),
        });
        let gate_up = self.activation(at("gate_up"), Rows::Assignments, 2 * intermediate);
        self.push(Op::ExpertGateUp {
            input: normed,
            weight: TensorId::Fc(layer).to_string(),
            offsets: offsets.clone(),
            order: order.clone(),
            silu_mul: false,
            out: gate_up.clone(),
            ladder: Vec::new(),
        });
        let activated = self.activation(at("activated"), Rows::Assignments, intermediate);
        self.push(Op::SiluMul { input: gate_up, out: activated.clone() });
        let expert_out = self.activation(at("expert_output"), Rows::Assignments, self.model.hidden_size);
        self.push(Op::ExpertDown {
            input: activated,
            weight: TensorId::Proj(layer).to_string(),
            offsets,
            order,
            out: expert_out.clone(),
            ladder: Vec::new(),
        });
        let out = self.activation(at("output"), Rows::Tokens, self.model.hidden_size);
        self.push(Op::Combine {
            input: expert_out,
            expert_ids,
            expert_weights,
            experts,
            residual: Some(hidden.to_owned()),
            out: out.clone(),
            norm: None,
        });
        out
    }

    /// The feed-forward of a dense layer. The checkpoint stores it as its only expert; it needs no routing.
    fn dense(&mut self, layer: usize, hidden: &str) -> String {
        let at = |name: &str| format!("layer{layer}.{name}");
        let normed = self.norm(TensorId::PostNorm(layer), hidden, at("ffn_input"), Rows::Tokens);
        let gate_up = self.linear(TensorId::Fc(layer), None, &normed, at("gate_up"));
        let activated = self.activation(at("activated"), Rows::Tokens, self.weight_rows(TensorId::Fc(layer)) / 2);
        self.push(Op::SiluMul { input: gate_up, out: activated.clone() });
        let down = self.linear(TensorId::Proj(layer), None, &activated, at("ffn_output"));
        self.add(down, hidden, at("output"))
    }

    fn logits(&mut self, hidden: &str) {
        let last = self.activation("last_hidden", Rows::Logits, self.model.hidden_size);
        self.push(Op::GatherRows { input: hidden.to_owned(), out: last.clone() });
        let normed = self.norm(TensorId::FinalNorm, &last, "final_hidden".to_owned(), Rows::Logits);
        let cols = self.program.tp_size * self.weight_rows(TensorId::LmHead);
        let logits = self.buffer("logits", ElemType::F32, Rows::Logits, cols);
        self.push(Op::Linear {
            input: normed,
            weight: TensorId::LmHead.to_string(),
            rows: None,
            epilogue: Epilogue::F32,
            residual: None,
            out: logits.clone(),
            ladder: Vec::new(),
        });
        self.push(Op::Sample { logits });
    }
}
