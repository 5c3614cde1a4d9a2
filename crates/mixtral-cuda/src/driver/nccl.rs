//! NCCL: carries bytes between GPUs of which neither can map the other's memory.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use libloading::Library;
use mixtral_kernels::Search;

use super::{Context, DeviceMemory, Stream, library};
use crate::CudaError;

/// The names that the dynamic linker is asked for.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// `ncclInt8`.
const BYTES: c_int = 0;
/// `ncclInProgress`: not a failure.
const IN_PROGRESS: c_int = 7;

/// Bytes of a [`UniqueId`].
pub(crate) const ID_BYTES: usize = 128;

/// How long ranks may take to connect.
const PATIENCE: Duration = Duration::from_secs(120);

/// Bytes of the first transfers, which make NCCL connect.
const FIRST: usize = 1024;

type Handle = *mut c_void;

/// What the ranks of a communicator find each other by. One of them makes it and tells the others.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct UniqueId(pub(crate) [u8; ID_BYTES]);

functions_of_a_library! {
    error_string = "ncclGetErrorString": fn(c_int) -> *const c_char;
    last_error = "ncclGetLastError": fn(Handle) -> *const c_char;
    version = "ncclGetVersion": fn(*mut c_int) -> c_int;
    unique_id = "ncclGetUniqueId": fn(*mut UniqueId) -> c_int;
    init_rank = "ncclCommInitRank": fn(*mut Handle, c_int, UniqueId, c_int) -> c_int;
    async_error = "ncclCommGetAsyncError": fn(Handle, *mut c_int) -> c_int;
    abort = "ncclCommAbort": fn(Handle) -> c_int;
    destroy = "ncclCommDestroy": fn(Handle) -> c_int;
    all_gather = "ncclAllGather": fn(*const c_void, *mut c_void, usize, c_int, Handle, *mut c_void) -> c_int;
    send = "ncclSend": fn(*const c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int;
    recv = "ncclRecv": fn(*mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int;
}

impl Api {
    fn check(&self, call: &'static str, code: c_int) -> Result<(), CudaError> {
        if code == 0 || code == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: static texts are returned, for any number; a null handle asks for the last error of the process.
        let [name, detail] = unsafe { [(self.error_string)(code), (self.last_error)(ptr::null_mut())] }.map(|text| {
            if text.is_null() {
                return String::new();
            }
            // SAFETY: as above.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().replace('\n', " ")
        });
        let detail = if detail.is_empty() { name } else { format!("{name}: {detail}") };
        Err(CudaError::Nccl { call, detail })
    }
}

/// The library. A process looks for it once.
fn api() -> Result<&'static Api, CudaError> {
    static API: OnceLock<Option<Api>> = OnceLock::new();
    let search = Search::from_environment();
    let found = API.get_or_init(|| library::find(&NAMES, &search, Api::of));
    found.as_ref().ok_or_else(|| CudaError::NoNccl { places: search.places() })
}

/// NCCL's version, as `NCCL 2.28.3`.
pub(crate) fn version() -> Result<String, CudaError> {
    let api = api()?;
    let mut version = 0;
    // SAFETY: one integer is written.
    api.check("ncclGetVersion", unsafe { (api.version)(&raw mut version) })?;
    Ok(format!("NCCL {}.{}.{}", version / 10000, version / 100 % 100, version % 100))
}

impl UniqueId {
    /// # Errors
    /// NCCL cannot be found, or opens no socket.
    pub(crate) fn new() -> Result<UniqueId, CudaError> {
        let api = api()?;
        let mut id = UniqueId([0; ID_BYTES]);
        // SAFETY: one id is written.
        api.check("ncclGetUniqueId", unsafe { (api.unique_id)(&raw mut id) })?;
        Ok(id)
    }
}

/// A rank's end of the connections among some ranks.
pub(crate) struct Communicator {
    api: &'static Api,
    /// Null once it was aborted.
    handle: AtomicPtr<c_void>,
    /// This rank's place among the ranks.
    place: c_int,
    context: Context,
}

/// What tells whether to go on waiting: an error says why not.
pub(crate) trait Check: Fn() -> Result<(), CudaError> {}
impl<F: Fn() -> Result<(), CudaError>> Check for F {}

impl Communicator {
    /// Connects `size` ranks, of which this one has place `place`. All of them call this with the same id.
    ///
    /// # Errors
    /// NCCL cannot be found, or cannot connect them; what `check` says.
    pub(crate) fn connect(
        context: &Context,
        id: UniqueId,
        place: usize,
        size: usize,
        check: impl Check,
    ) -> Result<Communicator, CudaError> {
        let api = api()?;
        let [place, size] = [place, size].map(|n| c_int::try_from(n).unwrap_or(c_int::MAX));
        let (done, result) = channel();
        let context = context.clone();
        // NCCL waits for the other ranks without end, so it does that on a thread of its own, which nobody joins.
        thread::spawn(move || {
            let connected = Communicator::begin(api, context, id, place, size);
            // An error means that nobody waits any more.
            let _ = done.send(connected);
        });
        let begun = Instant::now();
        loop {
            match result.recv_timeout(Duration::from_millis(5)) {
                Ok(connected) => return connected,
                Err(RecvTimeoutError::Timeout) if begun.elapsed() < PATIENCE => check()?,
                Err(_) => {
                    let detail = format!("the ranks did not connect in {} s", PATIENCE.as_secs());
                    return Err(CudaError::Nccl { call: "ncclCommInitRank", detail });
                }
            }
        }
    }

    /// Connects, and carries the first bytes, so that everything is allocated before launches are captured.
    fn begin(
        api: &'static Api,
        context: Context,
        id: UniqueId,
        place: c_int,
        size: c_int,
    ) -> Result<Communicator, CudaError> {
        context.bind()?;
        let mut handle = ptr::null_mut();
        // SAFETY: one handle is written; the context is current.
        api.check("ncclCommInitRank", unsafe { (api.init_rank)(&raw mut handle, size, id, place) })?;
        let communicator = Communicator { api, handle: AtomicPtr::new(handle), place, context };
        let stream = Stream::new(&communicator.context)?;
        let bytes = FIRST * usize::try_from(size).unwrap_or(0);
        let memory = DeviceMemory::new(&communicator.context, bytes)?;
        // SAFETY: the memory has a part for each rank, and is freed after the stream is idle.
        unsafe {
            communicator.all_gather(&stream, memory.address(), FIRST)?;
            match (size, place) {
                (2, 0) => communicator.send(&stream, memory.address(), FIRST)?,
                (2, _) => communicator.recv(&stream, memory.address(), FIRST)?,
                _ => {}
            }
        }
        stream.synchronize()?;
        Ok(communicator)
    }

    fn handle(&self) -> Result<Handle, CudaError> {
        let handle = self.handle.load(Ordering::Acquire);
        if handle.is_null() {
            return Err(CudaError::Rank("the connections to other ranks were given up".to_owned()));
        }
        self.context.bind()?;
        Ok(handle)
    }

    /// Gives every rank the part of `bytes` bytes of each, in the order of their places. This rank's part lies at its place
    /// from `start` on.
    ///
    /// # Safety
    /// A part for each rank lies there, until the stream is idle.
    pub(crate) unsafe fn all_gather(&self, stream: &Stream, start: u64, bytes: usize) -> Result<(), CudaError> {
        let handle = self.handle()?;
        let own = start + u64::from(self.place.unsigned_abs()) * bytes as u64;
        // SAFETY: the handle is live; the rest is the caller's.
        let code = unsafe {
            (self.api.all_gather)(own as *const _, start as *mut _, bytes, BYTES, handle, stream.handle.cast())
        };
        self.api.check("ncclAllGather", code)
    }

    /// Sends to the other one of two ranks.
    ///
    /// # Safety
    /// The bytes lie there until the stream is idle.
    pub(crate) unsafe fn send(&self, stream: &Stream, from: u64, bytes: usize) -> Result<(), CudaError> {
        let handle = self.handle()?;
        // SAFETY: the handle is live; the rest is the caller's.
        let code =
            unsafe { (self.api.send)(from as *const _, bytes, BYTES, 1 - self.place, handle, stream.handle.cast()) };
        self.api.check("ncclSend", code)
    }

    /// Receives from the other one of two ranks.
    ///
    /// # Safety
    /// There is room for the bytes until the stream is idle.
    pub(crate) unsafe fn recv(&self, stream: &Stream, to: u64, bytes: usize) -> Result<(), CudaError> {
        let handle = self.handle()?;
        // SAFETY: the handle is live; the rest is the caller's.
        let code = unsafe { (self.api.recv)(to as *mut _, bytes, BYTES, 1 - self.place, handle, stream.handle.cast()) };
        self.api.check("ncclRecv", code)
    }

    /// What went wrong since the ranks were connected, without waiting.
    pub(crate) fn failure(&self) -> Option<CudaError> {
        let handle = self.handle().ok()?;
        let mut code = 0;
        // SAFETY: the handle is live; one code is written.
        let asked = unsafe { (self.api.async_error)(handle, &raw mut code) };
        self.api.check("ncclCommGetAsyncError", asked).and_then(|()| self.api.check("a transfer", code)).err()
    }

    /// Makes everything end that waits for other ranks.
    pub(crate) fn abort(&self) {
        let handle = self.handle.swap(ptr::null_mut(), Ordering::AcqRel) as usize;
        let api = self.api;
        if handle != 0 {
            // It stops the kernels at once, and then waits until no graph needs the connections. The process ends before.
            // SAFETY: nobody else has the handle any more.
            thread::spawn(move || unsafe { (api.abort)(handle as Handle) });
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        let handle = *self.handle.get_mut();
        if !handle.is_null() && self.context.to_free().is_some() {
            // SAFETY: nothing else has the handle, and the stream that used it is idle.
            unsafe { (self.api.destroy)(handle) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Loading it finds all functions, without a GPU.
    #[test]
    fn the_library_is_there_with_all_its_functions_or_it_is_missed() {
        match version() {
            Ok(version) => assert!(version.starts_with("NCCL 2."), "{version}"),
            Err(error) => assert!(matches!(error, CudaError::NoNccl { .. }), "{error}"),
        }
    }
}
