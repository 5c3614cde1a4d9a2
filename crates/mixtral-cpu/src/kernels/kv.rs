//! `write_kv`.

use mixtral_model::{ElemType, fp8};

use super::workers::Workers;
use crate::cache::KvShape;

/// Where the heads of each row lie in a buffer. Rows have `stride` bytes, and the heads begin at `start` of a row.
#[derive(Clone, Copy)]
pub(crate) struct Heads<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) start: usize,
    pub(crate) stride: usize,
}

/// `cache[slot_mapping[t]] = data[t]`, or `e4m3(data[t] / scale)` in an fp8 cache; a slot of −1 writes nothing.
pub(crate) fn write_kv(
    workers: &Workers<'_>,
    data: Heads<'_>,
    slot_mapping: &[i32],
    shape: KvShape,
    scale: f32,
    cache: &mut [u8],
) {
    let (size, stored) = (workers.row_bytes(shape.head_dim), shape.head_dim * shape.elem.size());
    for (&slot, row) in slot_mapping.iter().zip(data.bytes.chunks_exact(data.stride)) {
        let Ok(slot) = usize::try_from(slot) else { continue };
        for (head, vector) in row[data.start..].chunks_exact(size).take(shape.num_kv_heads).enumerate() {
            let place = &mut cache[shape.offset(slot, head)..][..stored];
            if shape.elem == ElemType::F8E4M3 {
                let values = workers.dtype.widen(vector);
                place.iter_mut().zip(values).for_each(|(byte, x)| *byte = fp8::to_bits(x / scale));
            } else {
                place.copy_from_slice(vector);
            }
        }
    }
}
