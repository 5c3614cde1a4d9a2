//! Memory of the device, and memory of the host that the device can copy at full speed.

use std::ffi::c_void;
use std::ops::Range;

use super::{Context, Event, Stream, api};
use crate::CudaError;
use crate::budget::bytes;

/// `CUDA_ERROR_OUT_OF_MEMORY`.
const OUT_OF_MEMORY: u32 = 2;

/// An allocation on the device, at least 256-byte aligned.
pub(crate) struct DeviceMemory {
    address: u64,
    len: usize,
    context: Context,
}

impl DeviceMemory {
    /// `len` bytes of unknown contents.
    pub(crate) fn new(context: &Context, len: usize) -> Result<DeviceMemory, CudaError> {
        context.bind()?;
        let api = api()?;
        let mut address = 0;
        // The driver refuses to allocate 0 bytes, so 1 byte is allocated instead. SAFETY: an address is written.
        let code = unsafe { (api.cuMemAlloc_v2)(&raw mut address, len.max(1)) };
        if code == OUT_OF_MEMORY {
            let (len, free) = (bytes(len), context.free_memory().map_or_else(|e| e.to_string(), bytes));
            return Err(CudaError::Memory(format!(
                "{len} of GPU memory could not be allocated, though {free} are free and more were when that was planned; another program may be taking it: look at nvidia-smi"
            )));
        }
        api.check("cuMemAlloc", code)?;
        Ok(DeviceMemory { address, len, context: context.clone() })
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Where it begins.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// The address of `len` bytes from `offset` on. They must lie within the allocation.
    pub(super) fn span(&self, offset: usize, len: usize) -> Result<u64, CudaError> {
        let within = offset.checked_add(len).is_some_and(|end| end <= self.len);
        let outside = || CudaError::Unsupported(format!("bytes {offset} + {len} of an allocation of {}", self.len));
        if within { Ok(self.address + offset as u64) } else { Err(outside()) }
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if let Some(api) = self.context.to_free() {
            // SAFETY: nothing else frees it. The driver waits for work that may use it.
            unsafe { (api.cuMemFree_v2)(self.address) };
        }
    }
}

/// Pinned memory of the host, and the event of the last copy from or to it.
pub(crate) struct Pinned {
    start: *mut u8,
    len: usize,
    last: Event,
    busy: bool,
    context: Context,
}

// SAFETY: it owns its memory, which any thread may use.
unsafe impl Send for Pinned {}

impl Pinned {
    /// `len` zeroed bytes.
    pub(crate) fn new(context: &Context, len: usize) -> Result<Pinned, CudaError> {
        let last = Event::new(context, false)?;
        let api = api()?;
        let mut start: *mut c_void = std::ptr::null_mut();
        // SAFETY: the driver writes a pointer to as many bytes as asked for. They are then initialized.
        unsafe {
            let code = (api.cuMemHostAlloc)(&raw mut start, len.max(1), 0);
            if code == OUT_OF_MEMORY {
                let what = "of pinned host memory could not be allocated; free some of the host's memory, or raise the limit of a container";
                return Err(CudaError::Memory(format!("{} {what}", bytes(len))));
            }
            api.check("cuMemHostAlloc", code)?;
            start.cast::<u8>().write_bytes(0, len.max(1));
        }
        Ok(Pinned { start: start.cast(), len, last, busy: false, context: context.clone() })
    }

    /// The address at which the memory begins. Kernels may use it too.
    pub(crate) fn address(&self) -> u64 {
        self.start as u64
    }

    /// Its bytes. Waits until no copy uses them any more.
    pub(crate) fn bytes(&mut self) -> Result<&mut [u8], CudaError> {
        self.wait()?;
        // SAFETY: the memory is initialized and owned, and no copy is under way.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.start, self.len) })
    }

    fn wait(&mut self) -> Result<(), CudaError> {
        if self.busy {
            self.last.synchronize()?;
            self.busy = false;
        }
        Ok(())
    }

    /// Begins to copy its bytes `from..from + len` to the device.
    pub(crate) fn upload(
        &mut self,
        stream: &Stream,
        from: usize,
        len: usize,
        memory: &DeviceMemory,
        offset: usize,
    ) -> Result<(), CudaError> {
        let (start, address) = (self.span(from, len)?, memory.span(offset, len)?);
        if len == 0 {
            return Ok(());
        }
        self.context.bind()?;
        let api = api()?;
        // SAFETY: both spans are within their allocations; nobody writes to this one before the event has passed.
        let code = unsafe { (api.cuMemcpyHtoDAsync_v2)(address, start.cast_const().cast(), len, stream.handle) };
        api.check("cuMemcpyHtoDAsync", code)?;
        self.begun(stream)
    }

    /// Begins to copy from the device to its first `len` bytes.
    pub(crate) fn download(
        &mut self,
        stream: &Stream,
        memory: &DeviceMemory,
        offset: usize,
        len: usize,
    ) -> Result<(), CudaError> {
        self.download_spans(stream, memory, std::iter::once(offset..offset + len))
    }

    /// Begins to copy parts of the device's memory, one behind the other, to its first bytes.
    pub(crate) fn download_spans(
        &mut self,
        stream: &Stream,
        memory: &DeviceMemory,
        spans: impl Iterator<Item = Range<usize>>,
    ) -> Result<(), CudaError> {
        self.wait()?;
        let api = api()?;
        self.context.bind()?;
        let mut at = 0;
        for span in spans.filter(|span| !span.is_empty()) {
            let (start, address) = (self.span(at, span.len())?, memory.span(span.start, span.len())?);
            // SAFETY: both spans are within their allocations; nobody reads or writes this one before the event has
            // passed.
            let code = unsafe { (api.cuMemcpyDtoHAsync_v2)(start.cast(), address, span.len(), stream.handle) };
            if let Err(error) = api.check("cuMemcpyDtoHAsync", code) {
                // The copies that were begun still write to this memory.
                self.begun(stream)?;
                return Err(error);
            }
            at += span.len();
        }
        if at == 0 { Ok(()) } else { self.begun(stream) }
    }

    fn begun(&mut self, stream: &Stream) -> Result<(), CudaError> {
        self.busy = true;
        self.last.record(stream).or_else(|error| {
            // Without the event, only waiting for the whole stream shows that the copy has ended.
            stream.synchronize()?;
            self.busy = false;
            Err(error)
        })
    }

    fn span(&self, from: usize, len: usize) -> Result<*mut u8, CudaError> {
        let within = from.checked_add(len).is_some_and(|end| end <= self.len);
        if !within {
            return Err(CudaError::Unsupported(format!("bytes {from} + {len} of a pinned buffer of {}", self.len)));
        }
        // SAFETY: within the allocation.
        Ok(unsafe { self.start.add(from) })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.wait();
        if let Some(api) = self.context.to_free() {
            // SAFETY: nothing else frees it, and no copy uses it: a context that is lost runs none.
            unsafe { (api.cuMemFreeHost)(self.start.cast()) };
        }
    }
}
