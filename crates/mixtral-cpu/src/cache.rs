//! The paged cache of keys and values.

use std::collections::HashMap;
use std::ops::Range;

use mixtral_engine::{BackendError, BlockMove, BlockPlace, KvLayout, KvScale};
use mixtral_model::ElemType;

use crate::memory::Memory;

/// For each layer its keys, then its values, both `[blocks, num_kv_heads, block_size, head_dim]`.
pub(crate) struct KvCache {
    memory: Memory,
    layout: KvLayout,
    block_size: usize,
    blocks: usize,
    /// The scales of each layer; empty unless keys and values are e4m3.
    scales: Vec<KvScale>,
    /// Blocks that are outside the cache: of each layer its keys, then its values.
    host: HashMap<u32, Box<[u8]>>,
}

/// One layer's keys or values.
#[derive(Clone, Copy)]
pub(crate) struct KvView<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) shape: KvShape,
    /// What a stored number is multiplied with; 1 unless it is e4m3.
    pub(crate) scale: f32,
}

/// Sizes of one layer of the cache.
#[derive(Clone, Copy)]
pub(crate) struct KvShape {
    pub(crate) num_kv_heads: usize,
    pub(crate) block_size: usize,
    pub(crate) head_dim: usize,
    pub(crate) elem: ElemType,
}

impl KvShape {
    /// Where the vector of a slot and head starts, in bytes.
    pub(crate) fn offset(&self, slot: usize, head: usize) -> usize {
        let (block, offset) = (slot / self.block_size, slot % self.block_size);
        ((block * self.num_kv_heads + head) * self.block_size + offset) * self.head_dim * self.elem.size()
    }
}

impl<'a> KvView<'a> {
    /// `n` vectors of a block and head from position `start` on, `[n, head_dim]`.
    pub(crate) fn rows(&self, block: usize, head: usize, start: usize, n: usize) -> &'a [u8] {
        let first = self.shape.offset(block * self.shape.block_size + start, head);
        &self.bytes[first..first + n * self.shape.head_dim * self.shape.elem.size()]
    }
}

impl KvCache {
    pub(crate) fn new(
        layout: KvLayout,
        scales: &[KvScale],
        block_size: usize,
        blocks: usize,
    ) -> Result<KvCache, BackendError> {
        let bytes = [layout.num_layers, layout.num_kv_heads, block_size, layout.head_dim, layout.elem().size(), blocks]
            .into_iter()
            .try_fold(2usize, usize::checked_mul);
        let memory =
            Memory::new("the KV cache", bytes, "use a smaller cache (--kv-blocks) or a shorter --max-seq-len")?;
        Ok(KvCache { memory, layout, block_size, blocks, scales: scales.to_vec(), host: HashMap::new() })
    }

    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    pub(crate) fn shape(&self) -> KvShape {
        KvShape {
            num_kv_heads: self.layout.num_kv_heads,
            block_size: self.block_size,
            head_dim: self.layout.head_dim,
            elem: self.layout.elem(),
        }
    }

    /// Bytes of one layer's keys, or of its values.
    fn half(&self) -> usize {
        self.memory.bytes().len() / (2 * self.layout.num_layers)
    }

    /// The scales of a layer.
    pub(crate) fn scale(&self, layer: usize) -> KvScale {
        self.scales.get(layer).copied().unwrap_or(KvScale { key: 1.0, value: 1.0 })
    }

    /// Keys and values of a layer.
    pub(crate) fn layer(&self, layer: usize) -> (KvView<'_>, KvView<'_>) {
        let half = self.half();
        let (keys, values) = self.memory.bytes()[2 * layer * half..][..2 * half].split_at(half);
        let (shape, scale) = (self.shape(), self.scale(layer));
        (KvView { bytes: keys, shape, scale: scale.key }, KvView { bytes: values, shape, scale: scale.value })
    }

    /// Keys and values of a layer, mutable.
    pub(crate) fn layer_mut(&mut self, layer: usize) -> (&mut [u8], &mut [u8]) {
        let half = self.half();
        self.memory.bytes_mut()[2 * layer * half..][..2 * half].split_at_mut(half)
    }

    /// Copies blocks, in order.
    pub(crate) fn carry_out(&mut self, moves: &[BlockMove]) -> Result<(), BackendError> {
        for BlockMove { from, to } in moves {
            let contents = match from {
                BlockPlace::Cache(block) => {
                    self.halves(block.0).flat_map(|span| self.memory.bytes()[span].iter().copied()).collect()
                }
                BlockPlace::Host(number) => {
                    let missing = || BackendError::Other(format!("nothing was kept as block {number} of the host"));
                    self.host.get(number).ok_or_else(missing)?.clone()
                }
            };
            match to {
                BlockPlace::Cache(block) => {
                    for (half, span) in self.halves(block.0).enumerate() {
                        let bytes = span.len();
                        self.memory.bytes_mut()[span].copy_from_slice(&contents[half * bytes..][..bytes]);
                    }
                }
                BlockPlace::Host(number) => drop(self.host.insert(*number, contents)),
            }
        }
        Ok(())
    }

    /// Where a block lies in each half of each layer.
    fn halves(&self, block: u32) -> impl Iterator<Item = Range<usize>> + use<> {
        let half = self.half();
        let bytes = half / self.blocks;
        let first = block as usize * bytes;
        (0..2 * self.layout.num_layers).map(move |n| n * half + first..n * half + first + bytes)
    }
}
