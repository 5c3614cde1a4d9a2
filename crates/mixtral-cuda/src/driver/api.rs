//! The driver's functions. All are looked up in libcuda when the first one is needed. Return codes are plain numbers,
//! because a driver may know codes that this build does not.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdeviceptr, CUevent, CUfunction, CUgraph, CUgraphExec, CUipcMemHandle, CUlaunchConfig,
    CUmodule, CUstream, CUtensorMap, CUuuid,
};
use libloading::Library;

use crate::CudaError;

macro_rules! functions {
    ($($name:ident($($arg:ty),*);)*) => {
        /// The functions, and the library, which must stay loaded as long as they are used.
        #[expect(non_snake_case, reason = "the driver's names")]
        pub(crate) struct Api {
            $(pub(super) $name: unsafe extern "C" fn($($arg),*) -> c_uint,)*
            /// Loads a kernel ahead of its first launch; since CUDA 12.4.
            pub(super) cuFuncLoad: Option<unsafe extern "C" fn(CUfunction) -> c_uint>,
            /// Offset and size of a parameter; since CUDA 12.4.
            pub(super) cuFuncGetParamInfo:
                Option<unsafe extern "C" fn(CUfunction, usize, *mut usize, *mut usize) -> c_uint>,
            _library: Library,
        }

        impl Api {
            fn find(library: Library) -> Result<Api, CudaError> {
                // SAFETY: the types are those of cuda.h, which the driver has kept since these names exist.
                unsafe {
                    Ok(Api {
                        $($name: *library
                            .get(concat!(stringify!($name), "\0").as_bytes())
                            .map_err(|_| CudaError::NoDriver {
                                detail: format!("it has no {}, which every driver has", stringify!($name)),
                            })?,)*
                        cuFuncLoad: library.get(b"cuFuncLoad\0").ok().map(|symbol| *symbol),
                        cuFuncGetParamInfo: library.get(b"cuFuncGetParamInfo\0").ok().map(|symbol| *symbol),
                        _library: library,
                    })
                }
            }
        }
    };
}

functions! {
    cuInit(c_uint);
    cuDriverGetVersion(*mut c_int);
    cuGetErrorName(c_uint, *mut *const c_char);
    cuGetErrorString(c_uint, *mut *const c_char);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGet(*mut CUdevice, c_int);
    cuDeviceGetName(*mut c_char, c_int, CUdevice);
    cuDeviceTotalMem_v2(*mut usize, CUdevice);
    cuDeviceGetUuid_v2(*mut CUuuid, CUdevice);
    cuDeviceGetAttribute(*mut c_int, c_uint, CUdevice);
    cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice);
    cuCtxSetCurrent(CUcontext);
    cuCtxEnablePeerAccess(CUcontext, c_uint);
    cuIpcGetMemHandle(*mut CUipcMemHandle, CUdeviceptr);
    cuIpcOpenMemHandle_v2(*mut CUdeviceptr, CUipcMemHandle, c_uint);
    cuIpcCloseMemHandle(CUdeviceptr);
    cuMemGetInfo_v2(*mut usize, *mut usize);
    cuMemAlloc_v2(*mut CUdeviceptr, usize);
    cuMemFree_v2(CUdeviceptr);
    cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
    cuMemFreeHost(*mut c_void);
    cuMemcpyHtoDAsync_v2(CUdeviceptr, *const c_void, usize, CUstream);
    cuMemcpyDtoHAsync_v2(*mut c_void, CUdeviceptr, usize, CUstream);
    cuMemcpyDtoDAsync_v2(CUdeviceptr, CUdeviceptr, usize, CUstream);
    cuMemsetD8Async(CUdeviceptr, u8, usize, CUstream);
    cuStreamCreate(*mut CUstream, c_uint);
    cuStreamDestroy_v2(CUstream);
    cuStreamSynchronize(CUstream);
    cuStreamWaitEvent(CUstream, CUevent, c_uint);
    cuStreamBeginCapture_v2(CUstream, c_uint);
    cuStreamEndCapture(CUstream, *mut CUgraph);
    cuEventCreate(*mut CUevent, c_uint);
    cuEventDestroy_v2(CUevent);
    cuEventRecord(CUevent, CUstream);
    cuEventQuery(CUevent);
    cuEventSynchronize(CUevent);
    cuEventElapsedTime(*mut f32, CUevent, CUevent);
    cuModuleLoadDataEx(*mut CUmodule, *const c_void, c_uint, *mut c_uint, *mut *mut c_void);
    cuModuleUnload(CUmodule);
    cuModuleGetFunction(*mut CUfunction, CUmodule, *const c_char);
    cuFuncGetAttribute(*mut c_int, c_uint, CUfunction);
    cuFuncSetAttribute(CUfunction, c_uint, c_int);
    cuLaunchKernelEx(*const CUlaunchConfig, CUfunction, *mut *mut c_void, *mut *mut c_void);
    cuGraphInstantiateWithFlags(*mut CUgraphExec, CUgraph, c_ulonglong);
    cuGraphLaunch(CUgraphExec, CUstream);
    cuGraphExecDestroy(CUgraphExec);
    cuGraphDestroy(CUgraph);
    cuTensorMapEncodeTiled(
        *mut CUtensorMap, c_uint, c_uint, *mut c_void, *const u64, *const u64, *const u32, *const u32, c_uint, c_uint,
        c_uint, c_uint
    );
}

/// `CUDA_ERROR_NO_DEVICE`.
const NO_DEVICE: c_uint = 100;

/// The oldest driver that suffices, in the numbers of `cuDriverGetVersion`. CUDA 12.3 is the first in which a captured
/// launch may overlap its predecessor; all other functions called here are older. Kernels may need a newer driver; then
/// loading them fails.
const OLDEST: c_int = 12030;

/// The initialized driver. A process looks for it once.
pub(crate) fn api() -> Result<&'static Api, CudaError> {
    static API: OnceLock<Result<Api, CudaError>> = OnceLock::new();
    API.get_or_init(load).as_ref().map_err(Clone::clone)
}

/// The newest CUDA version that the driver of this machine knows, as `CUDA 13.0`.
///
/// # Errors
/// If there is no driver, or no GPU.
pub fn driver_version() -> Result<String, CudaError> {
    Ok(api()?.version())
}

fn load() -> Result<Api, CudaError> {
    // SAFETY: libcuda's initializers have no preconditions.
    let open = |name| unsafe { Library::new(name) };
    let library = open("libcuda.so.1").or_else(|first| open("libcuda.so").map_err(|_| first)).map_err(|error| {
        // The error's source is what the dynamic linker said.
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        CudaError::NoDriver { detail: cause.unwrap_or_else(|| error.to_string()) }
    })?;
    // An old driver may lack functions, so its version is checked before they are looked up. SAFETY: the type is that
    // of cuda.h; one integer is written.
    let version = unsafe {
        let version: Option<unsafe extern "C" fn(*mut c_int) -> c_uint> =
            library.get(b"cuDriverGetVersion\0").ok().map(|symbol| *symbol);
        version.map(|version| version_of(version))
    };
    if let Some(found) = version.filter(|&found| found < OLDEST) {
        return Err(CudaError::OldDriver { found: named(found), oldest: named(OLDEST) });
    }
    let api = Api::find(library)?;
    // SAFETY: the flags must be 0.
    match unsafe { (api.cuInit)(0) } {
        0 => Ok(api),
        code => {
            let (name, text) = api.describe(code);
            let detail = format!("{name}: {text}");
            Err(match code {
                NO_DEVICE => CudaError::NoDevice { detail },
                _ => CudaError::Start { driver: api.version(), detail, advice: advice(code) },
            })
        }
    }
}

/// What to do about a return code of `cuInit`.
fn advice(code: c_uint) -> &'static str {
    match code {
        // System not ready.
        802 => {
            "the service that joins this machine's GPUs (nvidia-fabricmanager) is not running yet: start it, or wait"
        }
        // System driver mismatch, compatibility not supported on this device.
        803 | 804 => {
            "libcuda and the kernel's NVIDIA module are of different versions: restart the machine if the driver was just updated; in a container, take the host's libcuda, and no other of LD_LIBRARY_PATH or a cuda-compat package"
        }
        // Stub library.
        34 => "this libcuda is a toolkit's, for linking alone: take it off LD_LIBRARY_PATH",
        _ => "check nvidia-smi and the kernel's log",
    }
}

/// # Safety
/// The function is `cuDriverGetVersion`.
unsafe fn version_of(function: unsafe extern "C" fn(*mut c_int) -> c_uint) -> c_int {
    let mut version = 0;
    // SAFETY: one integer is written.
    unsafe { function(&raw mut version) };
    version
}

/// A version number of `cuDriverGetVersion`, for people: `CUDA 13.0`.
fn named(version: c_int) -> String {
    format!("CUDA {}.{}", version / 1000, version % 1000 / 10)
}

impl Api {
    /// Turns a return code into an error.
    pub(super) fn check(&self, call: &'static str, code: c_uint) -> Result<(), CudaError> {
        if code == 0 {
            return Ok(());
        }
        let (name, text) = self.describe(code);
        Err(CudaError::Call { call, code, name, text })
    }

    /// Name and description of a return code.
    pub(super) fn describe(&self, code: c_uint) -> (String, String) {
        let of = |function: unsafe extern "C" fn(c_uint, *mut *const c_char) -> c_uint| {
            let mut text = std::ptr::null();
            // SAFETY: the driver writes a pointer to a static string, or leaves it null for a code that it does not know.
            unsafe {
                function(code, &raw mut text);
                (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
            }
        };
        let name = of(self.cuGetErrorName).unwrap_or_else(|| format!("error {code}"));
        (name, of(self.cuGetErrorString).unwrap_or_else(|| "unknown to this driver".to_owned()))
    }

    /// The newest CUDA version that the driver knows, as `CUDA 13.0`.
    pub(crate) fn version(&self) -> String {
        // SAFETY: the function is `cuDriverGetVersion`.
        named(unsafe { version_of(self.cuDriverGetVersion) })
    }
}
