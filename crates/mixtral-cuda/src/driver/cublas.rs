//! cuBLASLt, as the yardstick of matrix products: one product of bf16 matrices, f32 accumulated. Nothing else uses it.

use std::ffi::{c_int, c_void};
use std::path::Path;
use std::ptr;

use libloading::Library;
use mixtral_kernels::Search;

use super::{DeviceMemory, Stream};
use crate::CudaError;

/// What the dynamic linker is asked for, newest first.
const NAMES: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];

/// `CUDA_R_16BF`, `CUDA_R_32F`, `CUBLAS_COMPUTE_32F`, `CUBLAS_OP_T`, and names of attributes.
const BF16: c_int = 14;
const F32: c_int = 0;
const COMPUTE_F32: c_int = 68;
const TRANSPOSED: c_int = 1;
const TRANSPOSE_A: c_int = 3;
const MAX_WORKSPACE: c_int = 1;

type Handle = *mut c_void;

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Choice {
    algorithm: [u64; 8],
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

macro_rules! functions {
    ($($field:ident = $name:literal: fn($($arg:ty),*);)*) => {
        struct Api {
            $($field: unsafe extern "C" fn($($arg),*) -> c_int,)*
            _library: Library,
        }

        impl Api {
            /// `None` if the library lacks one of them.
            fn find(library: Library) -> Option<Api> {
                // SAFETY: the types are those of cublasLt.h.
                unsafe {
                    Some(Api { $($field: *library.get(concat!($name, "\0").as_bytes()).ok()?,)* _library: library })
                }
            }
        }
    };
}

functions! {
    create = "cublasLtCreate": fn(*mut Handle);
    destroy = "cublasLtDestroy": fn(Handle);
    desc_create = "cublasLtMatmulDescCreate": fn(*mut Handle, c_int, c_int);
    desc_set = "cublasLtMatmulDescSetAttribute": fn(Handle, c_int, *const c_void, usize);
    desc_destroy = "cublasLtMatmulDescDestroy": fn(Handle);
    layout_create = "cublasLtMatrixLayoutCreate": fn(*mut Handle, c_int, u64, u64, i64);
    layout_destroy = "cublasLtMatrixLayoutDestroy": fn(Handle);
    preference_create = "cublasLtMatmulPreferenceCreate": fn(*mut Handle);
    preference_set = "cublasLtMatmulPreferenceSetAttribute": fn(Handle, c_int, *const c_void, usize);
    preference_destroy = "cublasLtMatmulPreferenceDestroy": fn(Handle);
    heuristic = "cublasLtMatmulAlgoGetHeuristic":
        fn(Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut Choice, *mut c_int);
    matmul = "cublasLtMatmul": fn(
        Handle, Handle, *const f32, u64, Handle, u64, Handle, *const f32, u64, Handle, u64, Handle, *const [u64; 8], u64,
        usize, *mut c_void
    );
}

/// A product of two `[n, n]` bf16 matrices, the first transposed, and its workspace: memory is the caller's.
pub(crate) struct Product {
    api: Api,
    handle: Handle,
    desc: Handle,
    layout: Handle,
    choice: Choice,
}

impl Product {
    /// `None` if cuBLASLt cannot be found or does not want to.
    pub(crate) fn new(n: usize, workspace: usize) -> Option<Product> {
        let api = find()?;
        let nul = ptr::null_mut;
        let (mut handle, mut desc, mut layout, mut preference): (Handle, Handle, Handle, Handle) =
            (nul(), nul(), nul(), nul());
        let mut choice = Choice { algorithm: [0; 8], workspace: 0, state: 0, waves: 0.0, reserved: [0; 4] };
        let mut found = 0;
        let size = n as u64;
        // SAFETY: every call writes one handle, reads an attribute of the size that is given, or fills one choice; a handle
        // is used only if it was made.
        unsafe {
            if (api.create)(&raw mut handle) != 0 {
                return None;
            }
            let made = (api.desc_create)(&raw mut desc, COMPUTE_F32, F32) == 0
                && (api.desc_set)(desc, TRANSPOSE_A, ptr::from_ref(&TRANSPOSED).cast(), 4) == 0
                && (api.layout_create)(&raw mut layout, BF16, size, size, i64::try_from(n).unwrap_or(0)) == 0
                && (api.preference_create)(&raw mut preference) == 0
                && (api.preference_set)(preference, MAX_WORKSPACE, (&raw const workspace).cast(), 8) == 0
                && (api.heuristic)(
                    handle,
                    desc,
                    layout,
                    layout,
                    layout,
                    layout,
                    preference,
                    1,
                    &raw mut choice,
                    &raw mut found,
                ) == 0;
            if !preference.is_null() {
                (api.preference_destroy)(preference);
            }
            let product = Product { api, handle, desc, layout, choice };
            (made && found > 0 && choice.workspace <= workspace).then_some(product)
        }
    }

    /// Multiplies the first two thirds of `matrices` into the last.
    pub(crate) fn run(
        &self,
        stream: &Stream,
        matrices: &DeviceMemory,
        workspace: &DeviceMemory,
    ) -> Result<(), CudaError> {
        stream.context().bind()?;
        let third = matrices.len() / 3;
        let [a, b, c] = [0, third, 2 * third].map(|offset| matrices.address() + offset as u64);
        let (one, zero) = (1.0f32, 0.0f32);
        let (desc, layout) = (self.desc, self.layout);
        // SAFETY: three matrices of the layout's size and the workspace of the chosen algorithm are allocated, and outlive the
        // stream's work, which the caller waits for.
        let status = unsafe {
            (self.api.matmul)(
                self.handle,
                desc,
                &raw const one,
                a,
                layout,
                b,
                layout,
                &raw const zero,
                c,
                layout,
                c,
                layout,
                &raw const self.choice.algorithm,
                workspace.address(),
                workspace.len(),
                stream.handle.cast(),
            )
        };
        let failed = || CudaError::Unsupported(format!("cublasLtMatmul failed with status {status}"));
        if status == 0 { Ok(()) } else { Err(failed()) }
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        // SAFETY: what was made is destroyed once.
        unsafe {
            if !self.layout.is_null() {
                (self.api.layout_destroy)(self.layout);
            }
            if !self.desc.is_null() {
                (self.api.desc_destroy)(self.desc);
            }
            (self.api.destroy)(self.handle);
        }
    }
}

/// On the dynamic linker's path, or beside NVRTC, with which it comes.
fn find() -> Option<Api> {
    // SAFETY: the library's initializers have no preconditions.
    let open = |path: &Path| unsafe { Library::new(path) }.ok().and_then(Api::find);
    let named = NAMES.iter().find_map(|name| open(Path::new(name)));
    named.or_else(|| {
        let search = Search::from_environment();
        let folders = search.candidates().filter_map(|c| c.library.parent().map(Path::to_owned));
        let folders: Vec<_> = folders.filter(|folder| folder.is_dir() && folder.is_absolute()).collect();
        let places = folders.iter().flat_map(|folder| [folder.clone(), folder.join("../../cublas/lib")]);
        places.into_iter().find_map(|folder| NAMES.iter().find_map(|name| open(&folder.join(name))))
    })
}
