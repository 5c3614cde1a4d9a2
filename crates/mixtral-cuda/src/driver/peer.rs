//! Memory of other GPUs and of other processes, to which this process's kernels can write.

use cudarc::driver::sys::CUipcMemHandle;

use super::{Context, DeviceMemory, api};
use crate::CudaError;

/// Bytes of a handle.
pub(crate) const HANDLE_BYTES: usize = 64;

/// `CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED`.
const ALREADY_ENABLED: u32 = 704;
/// `CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`, the only flag there is.
const LAZY_ENABLE_PEER_ACCESS: u32 = 1;

impl Context {
    /// Lets kernels of this context use the memory of `other`, a context of this process on another GPU.
    pub(crate) fn reach(&self, other: &Context) -> Result<(), CudaError> {
        let api = api()?;
        self.bind()?;
        // SAFETY: both contexts are retained for as long as the process lives; the flags must be 0.
        match unsafe { (api.cuCtxEnablePeerAccess)(other.handle(), 0) } {
            ALREADY_ENABLED => Ok(()),
            code => api.check("cuCtxEnablePeerAccess", code),
        }
    }
}

impl DeviceMemory {
    /// The handle with which another process can open this memory.
    pub(crate) fn handle(&self, context: &Context) -> Result<[u8; HANDLE_BYTES], CudaError> {
        let api = api()?;
        context.bind()?;
        let mut handle = CUipcMemHandle { reserved: [0; HANDLE_BYTES] };
        // SAFETY: the address is that of an allocation; a handle is written.
        api.check("cuIpcGetMemHandle", unsafe { (api.cuIpcGetMemHandle)(&raw mut handle, self.address()) })?;
        Ok(handle.reserved.map(|byte| byte.cast_unsigned()))
    }
}

/// Another process's memory, opened in this one.
pub(crate) struct OpenedMemory {
    address: u64,
    context: Context,
}

impl OpenedMemory {
    /// Opens the memory of which `handle` was made.
    pub(crate) fn new(context: &Context, handle: [u8; HANDLE_BYTES]) -> Result<OpenedMemory, CudaError> {
        let api = api()?;
        context.bind()?;
        let handle = CUipcMemHandle { reserved: handle.map(|byte| byte.cast_signed()) };
        let mut address = 0;
        // SAFETY: an address is written. A handle that means nothing is refused.
        let code = unsafe { (api.cuIpcOpenMemHandle_v2)(&raw mut address, handle, LAZY_ENABLE_PEER_ACCESS) };
        api.check("cuIpcOpenMemHandle", code)?;
        Ok(OpenedMemory { address, context: context.clone() })
    }

    /// The address at which the memory begins in this process.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for OpenedMemory {
    fn drop(&mut self) {
        if let Ok(api) = api() {
            let _ = self.context.bind();
            // SAFETY: it was opened, and is closed once. The driver waits for work that may use it.
            unsafe { (api.cuIpcCloseMemHandle)(self.address) };
        }
    }
}
