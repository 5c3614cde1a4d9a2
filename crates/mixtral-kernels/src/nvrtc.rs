//! NVRTC, loaded when it is needed. This module knows nothing of kernels: it turns a text and options into code.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY};

use crate::locate::Search;

/// The oldest version that knows sm_90a.
const OLDEST: (i32, i32) = (12, 0);

/// NVRTC cannot be loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NvrtcError {
    /// No usable library was found.
    #[error(
        "NVRTC, which compiles the CUDA kernels, was not found (looked in {places}){}; install it with `pip install nvidia-cuda-nvrtc` or a CUDA toolkit (and set CUDA_HOME), name it with MIXTRAL_NVRTC, or build for the CPU with --backend cpu",
        reasons(rejected)
    )]
    Missing {
        /// Where it was looked for.
        places: String,
        /// What was there but could not be used, and why.
        rejected: Vec<(PathBuf, String)>,
    },
}

fn reasons(rejected: &[(PathBuf, String)]) -> String {
    rejected.iter().map(|(path, why)| format!("; {}: {why}", path.display())).collect()
}

/// A translation unit.
#[derive(Clone, Copy, Debug)]
pub struct Unit<'a> {
    /// Its name in messages.
    pub name: &'a str,
    /// Its text.
    pub text: &'a str,
    /// What it may include: names and texts.
    pub headers: &'a [(&'a str, &'a str)],
    /// The kernel that is wanted, as a C++ expression. It instantiates a template.
    pub expression: &'a str,
}

/// What a unit is compiled to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Machine code of a real architecture.
    Cubin,
    /// Assembly of a virtual architecture. The driver compiles it when it loads it.
    Ptx,
}

/// The result of a compilation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The code.
    pub image: Vec<u8>,
    /// The mangled name of the kernel.
    pub entry: String,
    /// The log of the compiler and the assembler.
    pub log: String,
}

/// A compilation that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// NVRTC's name of the failure.
    pub reason: String,
    /// The log of the compiler and the assembler.
    pub log: String,
}

type Program = *mut c_void;
type Status = c_int;
type SizeOf = unsafe extern "C" fn(Program, *mut usize) -> Status;
type BytesOf = unsafe extern "C" fn(Program, *mut c_char) -> Status;

/// The functions of NVRTC that are used. Their names are NVRTC's without the prefix.
struct Functions {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status,
    get_error_string: unsafe extern "C" fn(Status) -> *const c_char,
    create_program: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    destroy_program: unsafe extern "C" fn(*mut Program) -> Status,
    add_name_expression: unsafe extern "C" fn(Program, *const c_char) -> Status,
    compile_program: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status,
    get_lowered_name: unsafe extern "C" fn(Program, *const c_char, *mut *const c_char) -> Status,
    get_program_log: (SizeOf, BytesOf),
    get_cubin: (SizeOf, BytesOf),
    get_ptx: (SizeOf, BytesOf),
}

/// The loaded library. Programs of different threads are compiled at the same time.
pub struct Nvrtc {
    functions: Functions,
    version: (i32, i32),
    path: PathBuf,
}

impl std::fmt::Debug for Nvrtc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NVRTC {}.{} ({})", self.version.0, self.version.1, self.path.display())
    }
}

impl Nvrtc {
    /// Loads the first usable library that the search finds.
    ///
    /// # Errors
    /// If there is none.
    pub fn load(search: &Search) -> Result<Nvrtc, NvrtcError> {
        let mut rejected = Vec::new();
        for candidate in search.candidates() {
            match Self::open(&candidate.library, candidate.builtins.as_deref()) {
                Ok(nvrtc) => return Ok(nvrtc),
                // A plain name that the dynamic linker does not find needs no mention: the message lists all places
                // that were searched.
                Err(why) if candidate.builtins.is_none() && why.contains("No such file") => {}
                Err(why) => rejected.push((candidate.library, why)),
            }
        }
        Err(NvrtcError::Missing { places: search.places(), rejected })
    }

    /// Its version, major and minor.
    #[must_use]
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    fn open(path: &Path, builtins: Option<&Path>) -> Result<Nvrtc, String> {
        // SAFETY: the initializers of NVIDIA's libraries have no preconditions. Neither library is ever unloaded (both
        // handles are forgotten), so their functions and threads stay valid.
        let library = unsafe {
            if let Some(builtins) = builtins {
                std::mem::forget(Library::open(Some(builtins), RTLD_LAZY | RTLD_GLOBAL).map_err(said)?);
            }
            Library::open(Some(path), RTLD_LAZY).map_err(said)?
        };
        let functions = Functions::of(&library).map_err(said)?;
        std::mem::forget(library);
        let mut version = (0, 0);
        // SAFETY: both pointers are to integers that we own.
        let status = unsafe { (functions.version)(&raw mut version.0, &raw mut version.1) };
        if status != 0 {
            return Err(functions.error(status));
        }
        if version < OLDEST {
            return Err(format!(
                "version {}.{}, but {}.{} or newer is needed",
                version.0, version.1, OLDEST.0, OLDEST.1
            ));
        }
        Ok(Nvrtc { functions, version, path: path.to_owned() })
    }

    /// Compiles a unit.
    ///
    /// # Errors
    /// What NVRTC said about it.
    pub fn compile(&self, unit: &Unit<'_>, form: Form, options: &[String]) -> Result<Output, Rejected> {
        let f = &self.functions;
        let early = |reason: String| Rejected { reason, log: String::new() };
        let c = |text: &str| CString::new(text).map_err(|_| early("a text with a zero byte".to_owned()));
        let list = |texts: &mut dyn Iterator<Item = &str>| texts.map(c).collect::<Result<Vec<_>, _>>();
        let (text, name, expression) = (c(unit.text)?, c(unit.name)?, c(unit.expression)?);
        let names = list(&mut unit.headers.iter().map(|h| h.0))?;
        let texts = list(&mut unit.headers.iter().map(|h| h.1))?;
        let options = list(&mut options.iter().map(String::as_str))?;
        let pointers = |list: &[CString]| list.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
        let (names, texts, options) = (pointers(&names), pointers(&texts), (pointers(&options), options));
        let count = |n: usize| c_int::try_from(n).map_err(|e| early(e.to_string()));

        let mut program = ptr::null_mut();
        // SAFETY: every pointer is to a zero-terminated text, or to an array of as many of them as the count says. All
        // of them live until this function ends. NVRTC writes the program's handle.
        let status = unsafe {
            (f.create_program)(
                &raw mut program,
                text.as_ptr(),
                name.as_ptr(),
                count(names.len())?,
                texts.as_ptr(),
                names.as_ptr(),
            )
        };
        if status != 0 {
            return Err(early(f.error(status)));
        }
        let program = Handle { program, functions: f };
        // SAFETY: the program is live, the text zero-terminated.
        let status = unsafe { (f.add_name_expression)(program.program, expression.as_ptr()) };
        program.check(status)?;
        // SAFETY: the program is live; the array has as many zero-terminated texts as its count says.
        let status = unsafe { (f.compile_program)(program.program, count(options.0.len())?, options.0.as_ptr()) };
        program.check(status)?;
        let mut lowered = ptr::null();
        // SAFETY: the program is live and compiled; NVRTC writes a pointer to a text that lives as long as the program.
        let status = unsafe { (f.get_lowered_name)(program.program, expression.as_ptr(), &raw mut lowered) };
        program.check(status)?;
        // SAFETY: on success it points to a zero-terminated text, and the program is still live.
        let entry = unsafe { CStr::from_ptr(lowered) }.to_string_lossy().into_owned();
        let image = program.bytes(match form {
            Form::Cubin => f.get_cubin,
            Form::Ptx => f.get_ptx,
        });
        Ok(Output { image: image.map_err(|status| program.rejected(status))?, entry, log: program.log() })
    }
}

/// What the dynamic linker said.
fn said(error: libloading::Error) -> String {
    std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string)
}

impl Functions {
    fn of(library: &Library) -> Result<Self, libloading::Error> {
        // SAFETY: names and signatures are those of nvrtc.h. They have not changed since version 8 (those for cubins
        // since 11.1).
        unsafe {
            Ok(Functions {
                version: *library.get("nvrtcVersion")?,
                get_error_string: *library.get("nvrtcGetErrorString")?,
                create_program: *library.get("nvrtcCreateProgram")?,
                destroy_program: *library.get("nvrtcDestroyProgram")?,
                add_name_expression: *library.get("nvrtcAddNameExpression")?,
                compile_program: *library.get("nvrtcCompileProgram")?,
                get_lowered_name: *library.get("nvrtcGetLoweredName")?,
                get_program_log: (*library.get("nvrtcGetProgramLogSize")?, *library.get("nvrtcGetProgramLog")?),
                get_cubin: (*library.get("nvrtcGetCUBINSize")?, *library.get("nvrtcGetCUBIN")?),
                get_ptx: (*library.get("nvrtcGetPTXSize")?, *library.get("nvrtcGetPTX")?),
            })
        }
    }

    fn error(&self, status: Status) -> String {
        // SAFETY: the function takes any number, and returns a static zero-terminated text.
        unsafe { CStr::from_ptr((self.get_error_string)(status)) }.to_string_lossy().into_owned()
    }
}

/// A program in NVRTC, destroyed when dropped.
struct Handle<'a> {
    program: Program,
    functions: &'a Functions,
}

impl Handle<'_> {
    fn check(&self, status: Status) -> Result<(), Rejected> {
        if status == 0 { Ok(()) } else { Err(self.rejected(status)) }
    }

    fn rejected(&self, status: Status) -> Rejected {
        Rejected { reason: self.functions.error(status), log: self.log() }
    }

    fn log(&self) -> String {
        let bytes = self.bytes(self.functions.get_program_log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).trim_end_matches(['\0', '\n']).to_owned()
    }

    fn bytes(&self, (size_of, bytes_of): (SizeOf, BytesOf)) -> Result<Vec<u8>, Status> {
        let mut size = 0;
        // SAFETY: the program is live; NVRTC writes a size.
        let status = unsafe { size_of(self.program, &raw mut size) };
        if status != 0 {
            return Err(status);
        }
        let mut bytes = vec![0u8; size];
        // SAFETY: the program is live; NVRTC writes as many bytes as it just said.
        let status = unsafe { bytes_of(self.program, bytes.as_mut_ptr().cast()) };
        if status == 0 { Ok(bytes) } else { Err(status) }
    }
}

impl Drop for Handle<'_> {
    fn drop(&mut self) {
        // SAFETY: the program was created, and is destroyed only here. The returned status is of no use to anyone.
        unsafe { (self.functions.destroy_program)(&raw mut self.program) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_library_the_message_says_how_to_get_it() {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let search = Search { only: Some(folder.path().to_owned()), ..Search::default() };
        let error = Nvrtc::load(&search).expect_err("an empty folder").to_string();
        assert!(error.contains("pip install nvidia-cuda-nvrtc"), "{error}");
        assert!(error.contains(&format!("MIXTRAL_NVRTC={}", folder.path().display())), "{error}");

        let library = folder.path().join("libnvrtc.so.13");
        std::fs::write(&library, "not a library").expect("writable");
        let error = Nvrtc::load(&search).expect_err("not a library").to_string();
        assert!(error.contains(&format!("; {}: ", library.display())), "{error}");
    }
}
