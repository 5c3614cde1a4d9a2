//! Streams and events.

use std::ops::Range;
use std::time::Duration;

use cudarc::driver::sys::{CUevent, CUstream};

use super::{Context, DeviceMemory, api};
use crate::CudaError;

/// `CU_STREAM_NON_BLOCKING`: it does not wait for the default stream.
const NON_BLOCKING: u32 = 1;
/// `CU_EVENT_DISABLE_TIMING`.
const DISABLE_TIMING: u32 = 2;
/// `CUDA_ERROR_NOT_READY`.
const NOT_READY: u32 = 600;

/// A queue of work.
pub(crate) struct Stream {
    pub(super) handle: CUstream,
    context: Context,
}

// SAFETY: the driver's calls on streams may come from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub(crate) fn new(context: &Context) -> Result<Stream, CudaError> {
        context.bind()?;
        let api = api()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: a handle is written.
        api.check("cuStreamCreate", unsafe { (api.cuStreamCreate)(&raw mut handle, NON_BLOCKING) })?;
        Ok(Stream { handle, context: context.clone() })
    }

    pub(crate) fn context(&self) -> &Context {
        &self.context
    }

    /// Waits until everything in it is done.
    pub(crate) fn synchronize(&self) -> Result<(), CudaError> {
        self.context.bind()?;
        let api = api()?;
        // SAFETY: the handle is live.
        api.check("cuStreamSynchronize", unsafe { (api.cuStreamSynchronize)(self.handle) })
    }

    /// Lets what comes into it from now on wait until another stream has passed `event`.
    pub(crate) fn wait_for(&self, event: &Event) -> Result<(), CudaError> {
        self.context.bind()?;
        let api = api()?;
        // SAFETY: both handles are live. The flags must be 0.
        api.check("cuStreamWaitEvent", unsafe { (api.cuStreamWaitEvent)(self.handle, event.handle, 0) })
    }

    /// Fills `len` bytes of `memory` from `offset` on.
    pub(crate) fn fill(&self, memory: &DeviceMemory, offset: usize, len: usize, byte: u8) -> Result<(), CudaError> {
        let address = memory.span(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        self.context.bind()?;
        let api = api()?;
        // SAFETY: the span is within the allocation.
        api.check("cuMemsetD8Async", unsafe { (api.cuMemsetD8Async)(address, byte, len, self.handle) })
    }

    /// Copies the span `span` of `from` to the bytes of `to` from `at` on. The two do not overlap.
    pub(crate) fn copy(
        &self,
        from: &DeviceMemory,
        span: Range<usize>,
        to: &DeviceMemory,
        at: usize,
    ) -> Result<(), CudaError> {
        let (source, target) = (from.span(span.start, span.len())?, to.span(at, span.len())?);
        if span.is_empty() || source == target {
            return Ok(());
        }
        self.context.bind()?;
        let api = api()?;
        // SAFETY: both spans are within their allocations.
        let code = unsafe { (api.cuMemcpyDtoDAsync_v2)(target, source, span.len(), self.handle) };
        api.check("cuMemcpyDtoDAsync", code)
    }

    /// Copies to the device, and waits for it.
    pub(crate) fn upload(&self, bytes: &[u8], memory: &DeviceMemory, offset: usize) -> Result<(), CudaError> {
        let address = memory.span(offset, bytes.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        self.context.bind()?;
        let api = api()?;
        // SAFETY: the span is within the allocation, and the bytes outlive the copy, which is waited for, if it was begun.
        let begun = unsafe { (api.cuMemcpyHtoDAsync_v2)(address, bytes.as_ptr().cast(), bytes.len(), self.handle) };
        self.synchronize()?;
        api.check("cuMemcpyHtoDAsync", begun)
    }

    /// Copies from the device, and waits for it.
    pub(crate) fn download(&self, memory: &DeviceMemory, offset: usize, bytes: &mut [u8]) -> Result<(), CudaError> {
        let address = memory.span(offset, bytes.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        self.context.bind()?;
        let api = api()?;
        // SAFETY: as above, the other way round.
        let begun = unsafe { (api.cuMemcpyDtoHAsync_v2)(bytes.as_mut_ptr().cast(), address, bytes.len(), self.handle) };
        self.synchronize()?;
        api.check("cuMemcpyDtoHAsync", begun)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(api) = self.context.to_free() {
            // SAFETY: nothing else holds the handle.
            unsafe { (api.cuStreamDestroy_v2)(self.handle) };
        }
    }
}

/// A point in a stream.
pub(crate) struct Event {
    handle: CUevent,
    context: Context,
}

// SAFETY: the driver's calls on events may come from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// An event that can be waited for. With `timed` it can measure time too.
    pub(crate) fn new(context: &Context, timed: bool) -> Result<Event, CudaError> {
        context.bind()?;
        let api = api()?;
        let mut handle = std::ptr::null_mut();
        let flags = if timed { 0 } else { DISABLE_TIMING };
        // SAFETY: a handle is written.
        api.check("cuEventCreate", unsafe { (api.cuEventCreate)(&raw mut handle, flags) })?;
        Ok(Event { handle, context: context.clone() })
    }

    /// Puts it into the stream, behind the work that is there now.
    pub(crate) fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        self.context.bind()?;
        let api = api()?;
        // SAFETY: both handles are live.
        api.check("cuEventRecord", unsafe { (api.cuEventRecord)(self.handle, stream.handle) })
    }

    /// Whether the stream has passed it. One that was never recorded counts as passed.
    pub(crate) fn is_passed(&self) -> Result<bool, CudaError> {
        self.context.bind()?;
        let api = api()?;
        // SAFETY: the handle is live.
        match unsafe { (api.cuEventQuery)(self.handle) } {
            NOT_READY => Ok(false),
            code => api.check("cuEventQuery", code).map(|()| true),
        }
    }

    /// Waits until the stream has passed it. Does not wait if it was never recorded.
    pub(crate) fn synchronize(&self) -> Result<(), CudaError> {
        self.context.bind()?;
        let api = api()?;
        // SAFETY: the handle is live.
        api.check("cuEventSynchronize", unsafe { (api.cuEventSynchronize)(self.handle) })
    }

    /// Time from this one to a later one, both timed and passed. Resolution: about half a microsecond.
    pub(crate) fn until(&self, later: &Event) -> Result<Duration, CudaError> {
        self.context.bind()?;
        let api = api()?;
        let mut ms = 0.0f32;
        // SAFETY: both handles are live; one float is written.
        let code = unsafe { (api.cuEventElapsedTime)(&raw mut ms, self.handle, later.handle) };
        api.check("cuEventElapsedTime", code)?;
        Ok(Duration::from_secs_f64(f64::from(ms.max(0.0)) / 1e3))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Some(api) = self.context.to_free() {
            // SAFETY: nothing else holds the handle.
            unsafe { (api.cuEventDestroy_v2)(self.handle) };
        }
    }
}
