//! Zeroed memory. The system commits a page of it when the page is first touched.

use memmap2::{Advice, MmapMut, MmapOptions};
use mixtral_engine::BackendError;

/// An anonymous mapping. It is page-aligned. Asking for more memory than there is returns an error instead of aborting.
pub(crate) struct Memory {
    map: MmapMut,
    len: usize,
}

impl Memory {
    /// Allocates `bytes` zeroed bytes. `what` and `hint` are for the error's message.
    pub(crate) fn new(what: &'static str, bytes: Option<usize>, hint: &str) -> Result<Memory, BackendError> {
        let failed = || BackendError::OutOfMemory { what, needed: bytes.unwrap_or(usize::MAX), hint: hint.to_owned() };
        let len = bytes.ok_or_else(failed)?;
        // The system refuses an empty mapping, so one byte is mapped instead.
        let map = MmapOptions::new().len(len.max(1)).map_anon().map_err(|_| failed())?;
        // Large pages read faster. A system without them refuses, which is fine.
        #[cfg(target_os = "linux")]
        if len >= 1 << 21 {
            let _ = map.advise(Advice::HugePage);
        }
        Ok(Memory { map, len })
    }

    /// An empty buffer.
    pub(crate) fn empty() -> Result<Memory, BackendError> {
        Memory::new("an empty buffer", Some(0), "free some memory")
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map[..self.len]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map[..self.len]
    }

    pub(crate) fn floats_mut(&mut self) -> &mut [f32] {
        let len = self.len / 4 * 4;
        bytemuck::cast_slice_mut(&mut self.map[..len])
    }

    /// Makes room for `floats` f32 of scratch. Growing loses the contents.
    pub(crate) fn reserve_floats(&mut self, floats: usize) -> Result<(), BackendError> {
        if self.len / 4 < floats {
            let bytes = floats.checked_mul(4).and_then(usize::checked_next_power_of_two);
            *self = Memory::new("the step's scratch", bytes, "free some memory, or use fewer tokens a step")?;
        }
        Ok(())
    }
}

/// Cuts the first `n` elements off a slice.
pub(crate) fn take<'a>(rest: &mut &'a mut [f32], n: usize) -> &'a mut [f32] {
    let (first, others) = std::mem::take(rest).split_at_mut(n);
    *rest = others;
    first
}
