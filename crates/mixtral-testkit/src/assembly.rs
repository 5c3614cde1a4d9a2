//! Programs and weights that tests write by hand.

use std::collections::HashMap;
use std::sync::Arc;

use mixtral_engine::memory::ALIGN;
use mixtral_engine::{Buffer, KvLayout, Limits, Op, Program, Rows, Weight, WeightSource, WeightView, Weights};
use mixtral_model::{DType, ElemType, WeightFormat};

use crate::elements::to_bytes;

/// Weights in memory, by name.
#[derive(Clone, Debug, Default)]
pub struct MemoryWeights {
    tensors: HashMap<String, (ElemType, Vec<usize>, Vec<u8>)>,
}

impl MemoryWeights {
    /// Adds a tensor, or replaces it.
    pub fn insert(&mut self, name: &str, elem: impl Into<ElemType>, shape: &[usize], bytes: Vec<u8>) {
        self.tensors.insert(name.to_owned(), (elem.into(), shape.to_vec(), bytes));
    }

    /// Removes a tensor.
    pub fn remove(&mut self, name: &str) {
        self.tensors.remove(name);
    }

    /// The weights in the form that a backend takes.
    #[must_use]
    pub fn into_weights(self) -> Weights {
        Weights::Source(Arc::new(self))
    }
}

impl WeightSource for MemoryWeights {
    fn weight(&self, name: &str) -> Option<WeightView<'_>> {
        let (elem, shape, bytes) = self.tensors.get(name)?;
        Some(WeightView { elem: *elem, shape, bytes })
    }
}

/// A program being written, with the values of its weights.
#[derive(Clone, Debug)]
pub struct Assembly {
    /// The program so far. Its buffers have no place yet.
    pub program: Program,
    /// Values of those weights that have values.
    pub weights: MemoryWeights,
}

impl Assembly {
    /// An empty program of one layer, with limits that are large enough for small tests.
    #[must_use]
    pub fn new(dtype: DType) -> Self {
        Assembly {
            program: Program {
                rank: 0,
                world_size: 1,
                tp_size: 1,
                dtype,
                vocab_size: 29,
                num_layers: 1,
                num_experts: 0,
                top_k: 0,
                limits: Limits {
                    max_batch_size: 48,
                    max_num_tokens: 256,
                    max_seq_len: 256,
                    max_num_logits: 64,
                    block_size: 16,
                },
                kv: KvLayout {
                    num_layers: 1,
                    num_kv_heads: 1,
                    head_dim: 16,
                    dtype,
                    format: mixtral_model::CacheFormat::Plain,
                },
                kv_scales: Vec::new(),
                arena_bytes: 0,
                buffers: vec![],
                weights: vec![],
                ops: vec![],
            },
            weights: MemoryWeights::default(),
        }
    }

    /// Adds a buffer in the model's data type.
    pub fn activation(&mut self, name: &str, rows: Rows, cols: usize) -> String {
        self.buffer(name, self.program.dtype.into(), rows, cols)
    }

    /// Adds a buffer.
    pub fn buffer(&mut self, name: &str, dtype: ElemType, rows: Rows, cols: usize) -> String {
        self.program.buffers.push(Buffer { name: name.to_owned(), dtype, rows, cols, offset: 0 });
        name.to_owned()
    }

    /// Adds a weight to the program, without values.
    pub fn declare(&mut self, name: &str, dtype: DType, shape: &[usize]) -> String {
        self.program.weights.push(Weight {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
            format: WeightFormat::Plain,
            sharded: None,
            pieces: vec![],
        });
        name.to_owned()
    }

    /// Adds a weight and its values, rounded to its type.
    pub fn weight(&mut self, name: &str, dtype: DType, shape: &[usize], values: &[f64]) -> String {
        self.weights.insert(name, dtype, shape, to_bytes(dtype, values));
        self.declare(name, dtype, shape)
    }

    /// Adds an operation.
    pub fn op(&mut self, op: Op) {
        self.program.ops.push(op);
    }

    /// Gives every buffer memory of its own, so that no operation overwrites what later ones read. Behind each buffer
    /// lies a guard: a buffer that no operation names.
    pub fn place_apart(&mut self) {
        let mut end = 0;
        let mut placed = Vec::new();
        for mut buffer in std::mem::take(&mut self.program.buffers) {
            buffer.offset = end;
            end = (end + self.program.max_bytes(&buffer)).next_multiple_of(ALIGN);
            let name = format!("guard behind {}", buffer.name);
            placed.push(buffer);
            placed.push(Buffer { name, dtype: ElemType::I32, rows: Rows::One, cols: GUARD_BYTES / 4, offset: end });
            end += GUARD_BYTES;
        }
        self.program.buffers = placed;
        self.program.arena_bytes = end;
    }
}

/// Bytes of a guard.
pub const GUARD_BYTES: usize = 4 * ALIGN;
