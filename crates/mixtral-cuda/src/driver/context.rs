//! Devices and their primary contexts.

use std::ffi::{c_char, c_int};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{CUcontext, CUdevice_attribute_enum as Attribute, CUuuid_st};

use super::api;
use super::api::Api;
use crate::CudaError;

/// A GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its number among the visible GPUs.
    pub ordinal: usize,
    /// What tells it from every other GPU, whatever number it has where it is seen.
    pub uuid: [u8; 16],
    /// Its name.
    pub name: String,
    /// Compute capability, major and minor version as one number: 90 is Hopper.
    pub capability: u32,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of its memory.
    pub memory: usize,
    /// Bytes of shared memory that a CTA can have.
    pub shared_memory: u32,
    /// Bytes of its second-level cache.
    pub l2_bytes: usize,
}

/// The GPUs of this machine.
///
/// # Errors
/// If there is no driver, or no GPU.
pub fn devices() -> Result<Vec<Device>, CudaError> {
    let api = api()?;
    let mut count: c_int = 0;
    // SAFETY: one integer is written.
    api.check("cuDeviceGetCount", unsafe { (api.cuDeviceGetCount)(&raw mut count) })?;
    if count < 1 {
        return Err(CudaError::NoDevice { detail: "cuDeviceGetCount says 0".to_owned() });
    }
    (0..count).map(describe).collect()
}

fn describe(ordinal: c_int) -> Result<Device, CudaError> {
    let api = api()?;
    let mut name = [0u8; 256];
    let (mut handle, mut memory, mut uuid) = (0, 0usize, CUuuid_st { bytes: [0; 16] });
    // SAFETY: a handle, at most 256 bytes of a terminated string, a size and 16 bytes are written.
    unsafe {
        api.check("cuDeviceGet", (api.cuDeviceGet)(&raw mut handle, ordinal))?;
        api.check("cuDeviceGetName", (api.cuDeviceGetName)(name.as_mut_ptr().cast(), 256, handle))?;
        api.check("cuDeviceTotalMem", (api.cuDeviceTotalMem_v2)(&raw mut memory, handle))?;
        api.check("cuDeviceGetUuid", (api.cuDeviceGetUuid_v2)(&raw mut uuid, handle))?;
    }
    let attribute = |attribute: Attribute| {
        let mut value: c_int = 0;
        // SAFETY: one integer is written.
        let code = unsafe { (api.cuDeviceGetAttribute)(&raw mut value, attribute as u32, handle) };
        api.check("cuDeviceGetAttribute", code)?;
        Ok(u32::try_from(value).unwrap_or(0))
    };
    let name: Vec<u8> = name.into_iter().take_while(|&b| b != 0).collect();
    Ok(Device {
        ordinal: usize::try_from(ordinal).unwrap_or(0),
        uuid: uuid.bytes.map(c_char::cast_unsigned),
        name: String::from_utf8_lossy(&name).into_owned(),
        capability: 10 * attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
            + attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory,
        shared_memory: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
    })
}

/// A device's primary context. It is retained once and kept until the process ends, because making a context takes a
/// tenth of a second, and a lost one cannot be made anew.
#[derive(Clone)]
pub(crate) struct Context(Arc<Primary>);

struct Primary {
    device: Device,
    context: CUcontext,
    /// Nothing is freed any more.
    abandoned: AtomicBool,
}

// SAFETY: any thread may make a context current and use it; the driver does the locking.
unsafe impl Send for Primary {}
// SAFETY: as above.
unsafe impl Sync for Primary {}

impl Context {
    /// The context of a device.
    pub(crate) fn new(ordinal: usize) -> Result<Context, CudaError> {
        static KEPT: Mutex<Vec<Context>> = Mutex::new(Vec::new());
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(context) = kept.iter().find(|c| c.device().ordinal == ordinal) {
            context.bind()?;
            return Ok(context.clone());
        }
        let context = Context::retain(ordinal)?;
        kept.push(context.clone());
        Ok(context)
    }

    fn retain(ordinal: usize) -> Result<Context, CudaError> {
        let mut found = devices()?;
        if ordinal >= found.len() {
            return Err(CudaError::NoSuchDevice { ordinal, count: found.len() });
        }
        let device = found.swap_remove(ordinal);
        let api = api()?;
        let mut handle = 0;
        let mut context = std::ptr::null_mut();
        // SAFETY: the ordinal is below the count; a handle and a context are written.
        unsafe {
            let ordinal = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
            api.check("cuDeviceGet", (api.cuDeviceGet)(&raw mut handle, ordinal))?;
            api.check("cuDevicePrimaryCtxRetain", (api.cuDevicePrimaryCtxRetain)(&raw mut context, handle))?;
        }
        let context = Context(Arc::new(Primary { device, context, abandoned: AtomicBool::new(false) }));
        context.bind()?;
        Ok(context)
    }

    /// Leaves what was allocated to the end of the process. The driver frees memory when all kernels of the context have
    /// ended. Kernels of another rank that shares the GPU may wait for this rank, which is gone, and kernels on other
    /// GPUs may still write to its memory.
    pub(crate) fn abandon(&self) {
        self.0.abandoned.store(true, Ordering::Relaxed);
    }

    /// The driver, for a handle to free what it owns, with this context bound. None if that is left to the end of the
    /// process.
    pub(super) fn to_free(&self) -> Option<&'static Api> {
        let api = api().ok().filter(|_| !self.0.abandoned.load(Ordering::Relaxed))?;
        let _ = self.bind();
        Some(api)
    }

    /// The driver's handle of the context.
    pub(super) fn handle(&self) -> CUcontext {
        self.0.context
    }

    /// The device.
    pub(crate) fn device(&self) -> &Device {
        &self.0.device
    }

    /// Makes it this thread's context. Every part of the `driver` module does so before it calls the driver.
    pub(crate) fn bind(&self) -> Result<(), CudaError> {
        let api = api()?;
        // SAFETY: the context is retained.
        api.check("cuCtxSetCurrent", unsafe { (api.cuCtxSetCurrent)(self.0.context) })
    }

    /// Bytes of memory that are free.
    pub(crate) fn free_memory(&self) -> Result<usize, CudaError> {
        self.bind()?;
        let api = api()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: two sizes are written.
        api.check("cuMemGetInfo", unsafe { (api.cuMemGetInfo_v2)(&raw mut free, &raw mut total) })?;
        Ok(free)
    }
}
