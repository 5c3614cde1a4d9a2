//! cuBLASLt: products of 16-bit matrices, accumulated in f32. It computes the dense linears of long steps in engines
//! that were built with `--gemm-plugin cublaslt`, and its speed is what other matrix products are compared with.

use mixtral_model::ElemType;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::{Mutex, OnceLock, PoisonError};

use libloading::Library;
use mixtral_kernels::Search;

use super::{Context, Stream, library};
use crate::CudaError;

/// The names that the dynamic linker is asked for, newest first.
const NAMES: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];

/// `CUBLAS_COMPUTE_32F`, `CUDA_R_32F`, `CUBLAS_OP_T`, and `CUBLASLT_MATMUL_DESC_TRANSA`.
const COMPUTE_F32: c_int = 68;
const F32: c_int = 0;
const TRANSPOSED: c_int = 1;
const TRANSPOSE_A: c_int = 3;

/// `CUBLASLT_MATMUL_PREF_…`: the workspace's bytes, how parts of a sum are added, and the alignment of A, B, C and D.
const MAX_WORKSPACE: c_int = 1;
const REDUCTIONS: c_int = 3;
const ALIGNMENTS: [c_int; 4] = [5, 6, 7, 8];
/// `CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE`: parts are added in f32. The other schemes round each to the output's type.
const IN_F32: u32 = 2;
/// All rows of all operands begin at multiples of this many bytes.
const ALIGNMENT: u32 = 16;

/// How many chosen algorithms are kept. A step needs few of them, since an engine has few shapes and a step has one
/// number of tokens; choosing again takes some microseconds.
const KEPT: usize = 256;

type Handle = *mut c_void;
type Destroy = unsafe extern "C" fn(Handle) -> c_int;

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Choice {
    algorithm: [u64; 8],
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

functions_of_a_library! {
    status_name = "cublasLtGetStatusName": fn(c_int) -> *const c_char;
    create = "cublasLtCreate": fn(*mut Handle) -> c_int;
    destroy = "cublasLtDestroy": fn(Handle) -> c_int;
    desc_create = "cublasLtMatmulDescCreate": fn(*mut Handle, c_int, c_int) -> c_int;
    desc_set = "cublasLtMatmulDescSetAttribute": fn(Handle, c_int, *const c_void, usize) -> c_int;
    desc_destroy = "cublasLtMatmulDescDestroy": fn(Handle) -> c_int;
    layout_create = "cublasLtMatrixLayoutCreate": fn(*mut Handle, c_int, u64, u64, i64) -> c_int;
    layout_destroy = "cublasLtMatrixLayoutDestroy": fn(Handle) -> c_int;
    preference_create = "cublasLtMatmulPreferenceCreate": fn(*mut Handle) -> c_int;
    preference_set = "cublasLtMatmulPreferenceSetAttribute": fn(Handle, c_int, *const c_void, usize) -> c_int;
    preference_destroy = "cublasLtMatmulPreferenceDestroy": fn(Handle) -> c_int;
    heuristic = "cublasLtMatmulAlgoGetHeuristic":
        fn(Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut Choice, *mut c_int) -> c_int;
    matmul = "cublasLtMatmul": fn(
        Handle, Handle, *const f32, u64, Handle, u64, Handle, *const f32, u64, Handle, u64, Handle, *const [u64; 8], u64,
        usize, *mut c_void
    ) -> c_int;
}

/// What the choice of an algorithm depends on in a product `out[t][r] = Σ tokens[t][k] · weight[r][k]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ProductShape {
    /// Rows of the weight `[rows, depth]`, columns of the output `[tokens, rows]`.
    pub(crate) rows: usize,
    /// Rows of the tokens `[tokens, depth]`.
    pub(crate) tokens: usize,
    pub(crate) depth: usize,
    /// Type of weight and tokens.
    pub(crate) dtype: ElemType,
    pub(crate) out: ElemType,
    /// Bytes of workspace.
    pub(crate) workspace: usize,
}

/// Where a product's operands lie on the device. The output overlaps neither of the others.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProductOperands {
    pub(crate) weight: u64,
    pub(crate) tokens: u64,
    pub(crate) out: u64,
    pub(crate) workspace: u64,
}

/// A handle that cuBLASLt has made, destroyed when dropped.
struct Made {
    handle: Handle,
    destroy: Destroy,
}

impl Drop for Made {
    fn drop(&mut self) {
        // SAFETY: it was made, and nothing else destroys it.
        unsafe { (self.destroy)(self.handle) };
    }
}

/// A product with its algorithm. cuBLASLt's matrices are column-major, so to it the weight is A transposed.
struct Chosen {
    desc: Made,
    weight: Made,
    tokens: Made,
    out: Made,
    choice: Choice,
}

/// cuBLASLt on a context.
pub(crate) struct CublasLt {
    api: &'static Api,
    chosen: Mutex<HashMap<ProductShape, Chosen>>,
    handle: Made,
}

// SAFETY: a handle may be used from any thread, and by several at a time; what has been chosen is behind a lock.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

impl CublasLt {
    /// # Errors
    /// It cannot be found, or does not start.
    pub(crate) fn new(context: &Context) -> Result<CublasLt, CudaError> {
        context.bind()?;
        let api = api()?;
        let what = || "does not start".to_owned();
        // SAFETY: one handle is written; the context is current.
        let handle = unsafe { api.make("cublasLtCreate", what, api.destroy, |handle| (api.create)(handle)) }?;
        Ok(CublasLt { api, chosen: Mutex::default(), handle })
    }

    /// Multiplies.
    ///
    /// # Safety
    /// The operands are the device's, of the shape's sizes and of its alignment, and outlive the product.
    pub(crate) unsafe fn multiply(
        &self,
        stream: &Stream,
        shape: ProductShape,
        operands: ProductOperands,
    ) -> Result<(), CudaError> {
        stream.context().bind()?;
        let mut kept = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        if !kept.contains_key(&shape) {
            if kept.len() >= KEPT {
                kept.clear();
            }
            kept.insert(shape, self.choose(shape)?);
        }
        let Chosen { desc, weight, tokens, out, choice } = &kept[&shape];
        let (one, zero) = (1.0f32, 0.0f32);
        // SAFETY: the handles are live, the factors are read before the call returns, and the operands are as the
        // caller says.
        let status = unsafe {
            (self.api.matmul)(
                self.handle.handle,
                desc.handle,
                &raw const one,
                operands.weight,
                weight.handle,
                operands.tokens,
                tokens.handle,
                &raw const zero,
                operands.out,
                out.handle,
                operands.out,
                out.handle,
                &raw const choice.algorithm,
                operands.workspace,
                shape.workspace,
                stream.handle.cast(),
            )
        };
        self.api.check("cublasLtMatmul", status, || shape.refusal())
    }

    /// Asks which algorithm is the fastest.
    fn choose(&self, shape: ProductShape) -> Result<Chosen, CudaError> {
        let api = self.api;
        let what = || shape.refusal();
        let layout = |dtype, rows: usize, cols: usize| {
            let make = |handle: *mut Handle| {
                let stride = i64::try_from(rows).unwrap_or(i64::MAX);
                // SAFETY: one handle is written.
                unsafe { (api.layout_create)(handle, data_type(dtype), rows as u64, cols as u64, stride) }
            };
            // SAFETY: as above.
            unsafe { api.make("cublasLtMatrixLayoutCreate", what, api.layout_destroy, make) }
        };
        // SAFETY: every call writes one handle, reads an attribute of the size that is given, or fills one choice and their
        // count; handles are live.
        unsafe {
            let make = |handle| (api.desc_create)(handle, COMPUTE_F32, F32);
            let desc = api.make("cublasLtMatmulDescCreate", what, api.desc_destroy, make)?;
            let set = (api.desc_set)(desc.handle, TRANSPOSE_A, ptr::from_ref(&TRANSPOSED).cast(), size_of::<c_int>());
            api.check("cublasLtMatmulDescSetAttribute", set, what)?;
            let mut chosen = Chosen {
                desc,
                weight: layout(shape.dtype, shape.depth, shape.rows)?,
                tokens: layout(shape.dtype, shape.depth, shape.tokens)?,
                out: layout(shape.out, shape.rows, shape.tokens)?,
                choice: Choice::default(),
            };
            let make = |handle| (api.preference_create)(handle);
            let preference = api.make("cublasLtMatmulPreferenceCreate", what, api.preference_destroy, make)?;
            let prefer = |attribute, value: *const c_void, size| {
                let set = (api.preference_set)(preference.handle, attribute, value, size);
                api.check("cublasLtMatmulPreferenceSetAttribute", set, what)
            };
            prefer(MAX_WORKSPACE, ptr::from_ref(&shape.workspace).cast(), size_of::<usize>())?;
            prefer(REDUCTIONS, ptr::from_ref(&IN_F32).cast(), size_of::<u32>())?;
            for operand in ALIGNMENTS {
                prefer(operand, ptr::from_ref(&ALIGNMENT).cast(), size_of::<u32>())?;
            }
            let mut found = 0;
            let status = (api.heuristic)(
                self.handle.handle,
                chosen.desc.handle,
                chosen.weight.handle,
                chosen.tokens.handle,
                chosen.out.handle,
                chosen.out.handle,
                preference.handle,
                1,
                &raw mut chosen.choice,
                &raw mut found,
            );
            let status = if status == 0 && found < 1 { NOT_SUPPORTED } else { status };
            api.check("cublasLtMatmulAlgoGetHeuristic", status, what)?;
            Ok(chosen)
        }
    }
}

/// `CUBLAS_STATUS_NOT_SUPPORTED`.
const NOT_SUPPORTED: c_int = 15;

/// `cudaDataType_t`.
fn data_type(dtype: ElemType) -> c_int {
    match dtype {
        ElemType::F32 => F32,
        ElemType::F16 => 2,
        ElemType::Bf16 => 14,
        ElemType::I32 => 10,
        ElemType::U8 => 8,
        ElemType::F8E4M3 => 28,
    }
}

impl ProductShape {
    fn refusal(&self) -> String {
        let ProductShape { rows, tokens, depth, dtype, out, .. } = self;
        format!("does not multiply {tokens} tokens by a weight [{rows}, {depth}] ({dtype} to {out})")
    }
}

impl Api {
    fn check(&self, call: &'static str, status: c_int, what: impl FnOnce() -> String) -> Result<(), CudaError> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: a static text is returned, for any number.
        let name = unsafe {
            let name = (self.status_name)(status);
            if name.is_null() { String::new() } else { CStr::from_ptr(name).to_string_lossy().into_owned() }
        };
        Err(CudaError::CublasLt { what: what(), call, status, name })
    }

    /// What `make` makes.
    ///
    /// # Safety
    /// It writes a handle that `destroy` takes, unless it fails.
    unsafe fn make(
        &self,
        call: &'static str,
        what: impl FnOnce() -> String,
        destroy: Destroy,
        make: impl FnOnce(*mut Handle) -> c_int,
    ) -> Result<Made, CudaError> {
        let mut handle = ptr::null_mut();
        self.check(call, make(&raw mut handle), what)?;
        Ok(Made { handle, destroy })
    }
}

/// The library. A process looks for it once.
fn api() -> Result<&'static Api, CudaError> {
    static API: OnceLock<Option<Api>> = OnceLock::new();
    let search = Search::from_environment();
    let found = API.get_or_init(|| library::find(&NAMES, &search, Api::of));
    found.as_ref().ok_or_else(|| CudaError::NoCublasLt { places: search.places() })
}
