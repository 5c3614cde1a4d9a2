//! A program: its operations, the buffers between them, the weights they read, and the limits it was built for.

use mixtral_checkpoint::TensorSpec;
use mixtral_model::{CacheFormat, DType, ElemType, Piece, WeightFormat};
use serde::{Deserialize, Serialize};

use crate::Op;

/// Version of the program's text and of the engine directory. It is raised whenever an older reader would misread them.
pub const FORMAT_VERSION: u32 = 1;

/// How many rows a buffer has. The number follows from the step at run time, and from the limits when memory is
/// planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rows {
    /// One for each token.
    Tokens,
    /// `top_k` for each token: one for each assignment of a token to an expert.
    Assignments,
    /// One for each row of logits that the step wants.
    Logits,
    /// Always one.
    One,
}

/// The most tokens of prompts in a step of a pipeline. While the first of several steps is in one stage, the others have nothing to
/// do. With steps of 16 384 tokens, two H200 computed a prefill of as many at 33 300 tokens a second, with 4096 at 37 600, and with 1024 at 33 200,
/// because experts then have too few tokens (Mixtral 8x7B, bf16; `docs/perf/ranks.md`).
pub const PIPELINE_PROMPT_TOKENS: usize = 4096;

/// The most that a step of the program may hold. Larger steps are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Sequences in one step.
    pub max_batch_size: usize,
    /// Tokens in one step, prompts and decodes together.
    pub max_num_tokens: usize,
    /// Tokens of one sequence, prompt and output together.
    pub max_seq_len: usize,
    /// Rows of logits in one step.
    pub max_num_logits: usize,
    /// Tokens of a KV block.
    pub block_size: usize,
}

impl Limits {
    /// Blocks that a sequence of `num_tokens` occupies.
    #[must_use]
    pub const fn blocks_for(&self, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.block_size)
    }

    /// Width of the block table: blocks of the longest sequence.
    #[must_use]
    pub const fn max_blocks_per_seq(&self) -> usize {
        self.blocks_for(self.max_seq_len)
    }
}

/// The paged cache of one rank: per layer, K and V are each `[blocks, num_kv_heads, block_size, head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvLayout {
    /// Layers of this rank.
    pub num_layers: usize,
    /// KV heads of this rank.
    pub num_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Type of keys and values in arithmetic.
    pub dtype: DType,
    /// How they are stored.
    #[serde(default, skip_serializing_if = "CacheFormat::is_plain")]
    pub format: CacheFormat,
}

impl KvLayout {
    /// Bytes of one block, keys and values of all layers together.
    #[must_use]
    pub const fn block_bytes(&self, block_size: usize) -> usize {
        2 * self.num_layers * self.num_kv_heads * block_size * self.head_dim * self.elem().size()
    }

    /// Type of the stored elements.
    #[must_use]
    pub const fn elem(&self) -> ElemType {
        self.format.elem(self.dtype)
    }
}

/// The scales of a layer's keys and values: a stored number stands for itself times the scale.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvScale {
    /// That of the keys.
    pub key: f32,
    /// That of the values.
    pub value: f32,
}

/// A named activation buffer in the arena.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Buffer {
    /// Its name, unique in the program.
    pub name: String,
    /// Element type.
    pub dtype: ElemType,
    /// How many rows.
    pub rows: Rows,
    /// Columns; rows lie one after another without padding.
    pub cols: usize,
    /// Byte offset in the arena, a multiple of [`crate::memory::ALIGN`].
    pub offset: usize,
}

/// A weight that operations read by name. The name is the checkpoint's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Weight {
    /// Name in the rank's weight file.
    pub name: String,
    /// Type of its elements, or of what they stand for.
    pub dtype: DType,
    /// Shape.
    pub shape: Vec<usize>,
    /// How it is stored.
    pub format: WeightFormat,
    /// Where its elements come from when the engine has dummy weights; empty when it has a weight file.
    #[serde(skip)]
    pub pieces: Vec<Piece>,
    /// The dimension that is cut over the tensor-parallel ranks. Only known until the collectives are placed.
    #[serde(skip)]
    pub sharded: Option<usize>,
}

impl Weight {
    /// Columns: the last dimension.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(0)
    }

    /// Rows: the product of the other dimensions.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// The tensors of the weight file that hold it: one for each part, the values first.
    #[must_use]
    pub fn tensors(&self) -> Vec<TensorSpec> {
        mixtral_checkpoint::tensors(&self.name, self.format.parts(self.dtype, &self.shape))
    }

    /// Bytes in the weight file, all parts together. Saturates instead of overflowing.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        self.format.num_bytes(self.dtype, &self.shape)
    }
}

/// Everything one rank does in one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    /// This rank.
    pub rank: usize,
    /// Ranks of the engine.
    pub world_size: usize,
    /// Ranks of a tensor-parallel group. Groups are consecutive ranks, and this rank belongs to the group that contains
    /// its number.
    pub tp_size: usize,
    /// Data type of the activations.
    pub dtype: DType,
    /// Vocabulary entries that can be drawn.
    pub vocab_size: usize,
    /// Layers of the model, for expert statistics.
    pub num_layers: usize,
    /// Experts of the model; 0 if it has no router.
    pub num_experts: usize,
    /// Experts that a token is sent to; 0 if the model has no router.
    pub top_k: usize,
    /// What a step may hold.
    pub limits: Limits,
    /// The cache.
    pub kv: KvLayout,
    /// The scales of each layer's keys and values in an fp8 cache; none for other caches.
    pub kv_scales: Vec<KvScale>,
    /// Bytes of the arena.
    pub arena_bytes: usize,
    /// Buffers, in the order in which they are first written.
    pub buffers: Vec<Buffer>,
    /// Weights, in the order in which they are first read.
    pub weights: Vec<Weight>,
    /// Operations, in the order in which they run.
    pub ops: Vec<Op>,
}

impl Program {
    /// Lets attention see no more than a window of tokens. Layer n of the model has window n of `windows`, which begin again
    /// after the last. Where attention sees no more than that already, nothing changes. This program's first layer is the
    /// model's layer `first_layer`.
    pub fn narrow_attention(&mut self, first_layer: usize, windows: &[usize]) {
        let most = self.limits.max_seq_len;
        for op in &mut self.ops {
            if let Op::Attention { window, layer, .. } = op
                && let Some(&asked) = windows.get((first_layer + *layer) % windows.len().max(1))
                && asked < window.unwrap_or(most)
            {
                *window = Some(asked);
            }
        }
    }

    /// Computes the attention of prompts in fp8, which only programs with an fp8 cache may.
    pub fn attend_in_fp8(&mut self) {
        for op in &mut self.ops {
            if let Op::Attention { fp8_context, .. } = op {
                *fp8_context = true;
            }
        }
    }

    /// Whether the attention of prompts is computed in fp8.
    #[must_use]
    pub fn attends_in_fp8(&self) -> bool {
        self.ops.iter().any(|op| matches!(op, Op::Attention { fp8_context: true, .. }))
    }

    /// The buffer with this name.
    #[must_use]
    pub fn buffer(&self, name: &str) -> Option<&Buffer> {
        self.buffers.iter().find(|b| b.name == name)
    }

    /// The weight with this name.
    #[must_use]
    pub fn weight(&self, name: &str) -> Option<&Weight> {
        self.weights.iter().find(|w| w.name == name)
    }

    /// Rows of a buffer in a step of `num_tokens` tokens and `num_logits` logits rows.
    #[must_use]
    pub fn num_rows(&self, rows: Rows, num_tokens: usize, num_logits: usize) -> usize {
        match rows {
            Rows::Tokens => num_tokens,
            Rows::Assignments => num_tokens * self.top_k,
            Rows::Logits => num_logits,
            Rows::One => 1,
        }
    }

    /// Bytes of a buffer at the limits.
    #[must_use]
    pub fn max_bytes(&self, buffer: &Buffer) -> usize {
        let rows = self.num_rows(buffer.rows, self.limits.max_num_tokens, self.limits.max_num_logits);
        rows * buffer.cols * buffer.dtype.size()
    }

    /// Bytes of all weights. Saturates instead of overflowing.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.weights.iter().fold(0, |sum, weight| weight.num_bytes().saturating_add(sum))
    }
}
