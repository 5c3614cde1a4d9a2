//! `write_kv`.

use crate::cache::KvShape;

/// Where the heads of each row lie in a buffer. Rows have `stride` bytes, and the heads begin at `start` of a row.
#[derive(Clone, Copy)]
pub(crate) struct Heads<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) start: usize,
    pub(crate) stride: usize,
}

/// `cache[slot_mapping[t]] = data[t]`; a slot of −1 writes nothing.
pub(crate) fn write_kv(data: Heads<'_>, slot_mapping: &[i32], shape: KvShape, cache: &mut [u8]) {
    let size = shape.head_dim * shape.dtype.size();
    for (&slot, row) in slot_mapping.iter().zip(data.bytes.chunks_exact(data.stride)) {
        let Ok(slot) = usize::try_from(slot) else { continue };
        for (head, vector) in row[data.start..].chunks_exact(size).take(shape.num_kv_heads).enumerate() {
            cache[shape.offset(slot, head)..][..size].copy_from_slice(vector);
        }
    }
}
