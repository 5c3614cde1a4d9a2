//! Compiled kernels and their launches.

use std::ffi::{CString, c_int, c_uint, c_void};
use std::sync::Arc;

use cudarc::driver::sys::{
    CUfunction, CUfunction_attribute_enum as Attribute, CUlaunchAttribute, CUlaunchAttributeID_enum as LaunchAttribute,
    CUlaunchAttributeValue, CUlaunchConfig, CUmodule, CUtensorMap,
};

use mixtral_kernels::schedule::check::MAX_ARGS;

use super::{Context, Stream, api};
use crate::CudaError;
use crate::error::BAD_IMAGE;
use crate::images::arch_of;

/// `CU_JIT_ERROR_LOG_BUFFER` and `CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES`.
const JIT_ERROR_LOG: [c_uint; 2] = [5, 6];

/// Bytes of shared memory that a kernel may have without asking the driver for more.
const DEFAULT_SHARED: u32 = 48 << 10;

/// An image, loaded.
pub(crate) struct Module(Arc<Loaded>);

struct Loaded {
    handle: CUmodule,
    context: Context,
}

// SAFETY: the driver's calls on modules may come from any thread.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

impl Module {
    /// Loads a cubin or PTX. The driver compiles PTX.
    pub(crate) fn load(context: &Context, image: &[u8]) -> Result<Module, CudaError> {
        context.bind()?;
        let api = api()?;
        // PTX has to end with a zero, which does no harm behind a cubin. A cubin's header has to be aligned, hence the
        // `u64`s.
        let mut words = vec![0u64; image.len() / 8 + 1];
        let mut log = vec![0u8; 4096];
        let mut handle = std::ptr::null_mut();
        let mut values = [log.as_mut_ptr().cast::<c_void>(), log.len() as *mut c_void];
        let mut options = JIT_ERROR_LOG;
        // SAFETY: the words have room for the image and a zero; the image is self-describing; the log's size is given.
        let code = unsafe {
            std::ptr::copy_nonoverlapping(image.as_ptr(), words.as_mut_ptr().cast(), image.len());
            let (options, values) = (options.as_mut_ptr(), values.as_mut_ptr());
            (api.cuModuleLoadDataEx)(&raw mut handle, words.as_ptr().cast(), 2, options, values)
        };
        if BAD_IMAGE.contains(&code) {
            let log: Vec<u8> = log.into_iter().take_while(|&b| b != 0).collect();
            let log = String::from_utf8_lossy(&log).trim().to_owned();
            let log = if log.is_empty() { log } else { format!(": {log}") };
            return Err(CudaError::Image { driver: api.version(), name: api.describe(code).0, log });
        }
        api.check("cuModuleLoadDataEx", code)?;
        Ok(Module(Arc::new(Loaded { handle, context: context.clone() })))
    }

    /// A kernel of the image, ready to be launched with `threads` threads and `shared_bytes` bytes of dynamic shared
    /// memory.
    pub(crate) fn function(
        &self,
        symbol: &str,
        entry: &str,
        threads: u32,
        shared_bytes: u32,
    ) -> Result<Function, CudaError> {
        let context = &self.0.context;
        context.bind()?;
        let api = api()?;
        let name = CString::new(entry).map_err(|_| CudaError::Unsupported(format!("a kernel named {entry:?}")))?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the module is loaded and the name terminated; a handle is written.
        let code = unsafe { (api.cuModuleGetFunction)(&raw mut handle, self.0.handle, name.as_ptr()) };
        api.check("cuModuleGetFunction", code)?;
        let attribute = |attribute: Attribute| {
            let mut value: c_int = 0;
            // SAFETY: the function is live; one integer is written.
            let code = unsafe { (api.cuFuncGetAttribute)(&raw mut value, attribute as c_uint, handle) };
            api.check("cuFuncGetAttribute", code)?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        let unfit = |problem| CudaError::Unfit { symbol: symbol.to_owned(), problem, arch: arch_of(context.device()) };
        let most = attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?;
        if threads > most {
            return Err(unfit(format!("it has {threads} threads a CTA, of which its registers allow {most}")));
        }
        let fixed = attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        let has = context.device().shared_memory;
        if fixed + shared_bytes > has {
            return Err(unfit(format!("it needs {} bytes of shared memory, of {has}", fixed + shared_bytes)));
        }
        if fixed + shared_bytes > DEFAULT_SHARED {
            let which = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as c_uint;
            let bytes = c_int::try_from(shared_bytes).unwrap_or(c_int::MAX);
            // SAFETY: the function is live.
            api.check("cuFuncSetAttribute", unsafe { (api.cuFuncSetAttribute)(handle, which, bytes) })?;
        }
        // All kernels ask for the same division of a multiprocessor's memory between L1 and shared memory. A kernel
        // with another division could only start after its predecessor, not beside it.
        let which = Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT as c_uint;
        // SAFETY: the function is live.
        api.check("cuFuncSetAttribute", unsafe { (api.cuFuncSetAttribute)(handle, which, 100) })?;
        if let Some(load) = api.cuFuncLoad {
            // The first launch of a kernel would load it, and a launch that loads cannot be captured in a graph.
            // SAFETY: the function is live.
            api.check("cuFuncLoad", unsafe { load(handle) })?;
        }
        Ok(Function { handle, parameters: parameters(handle)?, _module: Arc::clone(&self.0) })
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if let Some(api) = self.context.to_free() {
            // SAFETY: functions hold the module, so none is left.
            unsafe { (api.cuModuleUnload)(self.handle) };
        }
    }
}

/// A kernel.
#[derive(Clone)]
pub(crate) struct Function {
    handle: CUfunction,
    /// Bytes of each of its parameters, if the driver tells them.
    parameters: Option<Arc<[usize]>>,
    /// Keeps the module loaded while one of its functions lives.
    _module: Arc<Loaded>,
}

// SAFETY: the driver's calls on functions may come from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// A parameter's value.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Param {
    /// A pointer, an integer or a float, in the low bytes.
    Word(u64),
    /// A TMA descriptor.
    Map(CUtensorMap),
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    /// CTAs.
    pub(crate) grid: u32,
    /// Threads of a CTA.
    pub(crate) threads: u32,
    /// Bytes of dynamic shared memory.
    pub(crate) shared_bytes: u32,
    /// CTAs of a cluster; 1 is none.
    pub(crate) cluster: u32,
    /// Whether it may start before its predecessor in the stream has ended.
    pub(crate) overlaps: bool,
}

/// Bytes of each parameter of a kernel; `None` if the driver does not tell them.
fn parameters(function: CUfunction) -> Result<Option<Arc<[usize]>>, CudaError> {
    let Some(info) = api()?.cuFuncGetParamInfo else { return Ok(None) };
    let size = |index| {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the function is live; two sizes are written. An index past the last parameter is an error.
        let code = unsafe { info(function, index, &raw mut offset, &raw mut size) };
        (code == 0).then_some(size)
    };
    let sizes: Arc<[usize]> = (0..=MAX_ARGS).map_while(size).collect();
    // Every kernel of an engine has parameters, so a driver that names none does not know them.
    Ok((!sizes.is_empty()).then_some(sizes))
}

impl Function {
    /// Checks that the kernel takes parameters of these sizes. The schedule was made by the parameters' names; this is
    /// a second check. It passes if the driver does not know the sizes.
    pub(crate) fn takes(&self, symbol: &str, sizes: &[usize]) -> Result<(), CudaError> {
        match &self.parameters {
            Some(known) if **known != *sizes => {
                Err(CudaError::Parameters { symbol: symbol.to_owned(), passed: sizes.to_vec(), taken: known.to_vec() })
            }
            _ => Ok(()),
        }
    }

    /// Launches it.
    ///
    /// # Safety
    /// The parameters are those of the kernel, in its order, at most [`MAX_ARGS`]; what they point at is the device's, is
    /// large enough for what the kernel does with it, and outlives the launch.
    pub(crate) unsafe fn launch(&self, stream: &Stream, config: Config, params: &[Param]) -> Result<(), CudaError> {
        let api = api()?;
        let mut pointers = [std::ptr::null_mut::<c_void>(); MAX_ARGS];
        for (pointer, param) in pointers.iter_mut().zip(params) {
            let value: *const c_void = match param {
                Param::Word(word) => std::ptr::from_ref(word).cast(),
                Param::Map(map) => std::ptr::from_ref(map).cast(),
            };
            *pointer = value.cast_mut();
        }
        let mut attributes = Vec::with_capacity(2);
        if config.cluster > 1 {
            let mut cluster = attribute(LaunchAttribute::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
            cluster.value.clusterDim.x = config.cluster;
            cluster.value.clusterDim.y = 1;
            cluster.value.clusterDim.z = 1;
            attributes.push(cluster);
        }
        if config.overlaps {
            let mut overlaps = attribute(LaunchAttribute::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
            overlaps.value.programmaticStreamSerializationAllowed = 1;
            attributes.push(overlaps);
        }
        let launch = CUlaunchConfig {
            gridDimX: config.grid,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: config.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: config.shared_bytes,
            hStream: stream.handle,
            attrs: attributes.as_mut_ptr(),
            numAttrs: u32::try_from(attributes.len()).unwrap_or(0),
        };
        // SAFETY: the configuration and the values live until the call returns, which copies them; the rest is the caller's.
        let code = unsafe {
            (api.cuLaunchKernelEx)(&raw const launch, self.handle, pointers.as_mut_ptr(), std::ptr::null_mut())
        };
        api.check("cuLaunchKernelEx", code)
    }
}

fn attribute(id: LaunchAttribute) -> CUlaunchAttribute {
    CUlaunchAttribute { id, pad: [0; 4], value: CUlaunchAttributeValue { pad: [0; 64] } }
}
