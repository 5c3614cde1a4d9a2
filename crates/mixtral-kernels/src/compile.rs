//! Compiles one kernel for one architecture.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::arch::ArchError;
use crate::nvrtc::{Form, Nvrtc, NvrtcError, Output, Unit};
use crate::resources::{Defect, Resources, defects, warnings};
use crate::source::{SourceError, Sources, hash};
use crate::{Arch, Kernel};

/// What a kernel is compiled to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Code {
    /// Machine code of an architecture: `sm_90a`.
    Sass(Arch),
    /// Assembly of a virtual architecture: `compute_80`. The driver compiles it for that architecture or any later one.
    Ptx(Arch),
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Code::Sass(arch) => arch.fmt(f),
            Code::Ptx(arch) => write!(f, "compute_{}", arch.to_string().trim_start_matches("sm_")),
        }
    }
}

impl FromStr for Code {
    type Err = ArchError;

    fn from_str(text: &str) -> Result<Self, ArchError> {
        match text.strip_prefix("compute_") {
            Some(arch) => format!("sm_{arch}").parse().map(Code::Ptx).map_err(|_| ArchError(text.to_owned())),
            None => text.parse().map(Code::Sass),
        }
    }
}

/// A compiled kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// A cubin, or PTX with its closing zero byte.
    pub image: Vec<u8>,
    /// The mangled name of its entry in the image.
    pub entry: String,
    /// The resources that it takes; unknown for PTX.
    pub resources: Option<Resources>,
    /// What is wrong with it.
    pub defects: Vec<Defect>,
    /// The log of compiler and assembler.
    pub log: String,
}

/// A kernel that cannot be compiled.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// NVRTC cannot be loaded.
    #[error(transparent)]
    Nvrtc(#[from] NvrtcError),
    /// A source of the kernel is missing.
    #[error("cannot compile {symbol}: {source}")]
    Source {
        /// The kernel.
        symbol: String,
        /// What is missing.
        source: SourceError,
    },
    /// The compiler refuses the kernel.
    #[error("cannot compile {symbol} for {code}: {reason}\nnvrtc {options}\n{log}\n{}", match dump { Ok(path) => format!("its source is in {}", path.display()), Err(e) => format!("its source could not be written either: {e}") })]
    Rejected {
        /// The kernel.
        symbol: String,
        /// What it was compiled to.
        code: Code,
        /// The options, as on a command line.
        options: String,
        /// NVRTC's name of the failure.
        reason: String,
        /// The log of compiler and assembler.
        log: String,
        /// A folder with the translation unit and its headers.
        dump: Result<PathBuf, io::Error>,
    },
    /// The threads to compile on cannot be started.
    #[error("cannot start threads to compile kernels: {0}; use fewer --workers")]
    Threads(String),
    /// The log names neither registers nor spills.
    #[error("{symbol} for {code}: the log of NVRTC {} {} cannot be read; use another version\n{log}", version.0, version.1)]
    Log {
        /// The kernel.
        symbol: String,
        /// What it was compiled to.
        code: Code,
        /// NVRTC's version.
        version: (i32, i32),
        /// The log.
        log: String,
    },
}

/// Sources and the compiler for them.
#[derive(Debug)]
pub struct Compiler {
    nvrtc: Nvrtc,
    sources: Sources,
}

/// Name of the translation unit in messages and dumps.
const UNIT: &str = "mixtral.cu";

impl Compiler {
    /// A compiler of these sources with a loaded NVRTC.
    #[must_use]
    pub fn new(nvrtc: Nvrtc, sources: Sources) -> Self {
        Compiler { nvrtc, sources }
    }

    /// The sources.
    #[must_use]
    pub fn sources(&self) -> &Sources {
        &self.sources
    }

    /// The compiler.
    #[must_use]
    pub fn nvrtc(&self) -> &Nvrtc {
        &self.nvrtc
    }

    /// Compiles one kernel. A kernel with defects is still compiled.
    ///
    /// # Errors
    /// If its sources are incomplete or the compiler refuses them; a copy of the sources is left in the temporary folder.
    pub fn compile(&self, kernel: &Kernel, code: Code) -> Result<Compiled, CompileError> {
        self.examine(kernel, code, self.output(kernel, code)?)
    }

    /// Runs NVRTC on a kernel.
    pub(crate) fn output(&self, kernel: &Kernel, code: Code) -> Result<Output, CompileError> {
        let headers = self.reached(kernel)?;
        let text = unit_text(kernel);
        let unit = Unit { name: UNIT, text: &text, headers: &headers, expression: &kernel.symbol };
        let (form, mut options) = (form(code), options(code));
        if self.nvrtc.version() >= (13, 0) {
            // The resources are read from the assembler's log. NVRTC's own cache returns an image without that log, so
            // it is switched off.
            options.push("-no-cache".to_owned());
        }
        self.nvrtc.compile(&unit, form, &options).map_err(|rejected| CompileError::Rejected {
            symbol: kernel.symbol.clone(),
            code,
            options: options.join(" "),
            reason: rejected.reason,
            log: rejected.log,
            dump: dump(&self.key(kernel, code, &headers), &text, &headers),
        })
    }

    /// A digest of everything that the compiled kernel depends on.
    pub(crate) fn digest(&self, kernel: &Kernel, code: Code) -> Result<String, CompileError> {
        Ok(self.key(kernel, code, &self.reached(kernel)?))
    }

    /// Reads resources and defects from the log of a compiled kernel.
    pub(crate) fn examine(&self, kernel: &Kernel, code: Code, output: Output) -> Result<Compiled, CompileError> {
        let Output { image, entry, log } = output;
        let (resources, defects) = match code {
            Code::Ptx(_) => (None, warnings(&log)),
            Code::Sass(arch) => {
                let Some(resources) = Resources::from_log(&log) else {
                    let (symbol, version) = (kernel.symbol.clone(), self.nvrtc.version());
                    return Err(CompileError::Log { symbol, code, version, log });
                };
                (Some(resources), defects(kernel, arch, &resources, &log))
            }
        };
        Ok(Compiled { image, entry, resources, defects, log })
    }

    fn reached(&self, kernel: &Kernel) -> Result<Vec<(&'static str, &'static str)>, CompileError> {
        let failed = |source| CompileError::Source { symbol: kernel.symbol.clone(), source };
        self.sources.reached(&kernel.header).map_err(failed)
    }

    fn key(&self, kernel: &Kernel, code: Code, headers: &[(&'static str, &'static str)]) -> String {
        let (options, version) = (options(code).join(" "), format!("{:?}", self.nvrtc.version()));
        let unit = [(&*kernel.header, kernel.symbol.as_str()), (&options, &version)];
        hash(unit.into_iter().chain(headers.iter().copied())).to_string()
    }
}

/// The text of the translation unit. It only includes the header: NVRTC instantiates the kernel from its name
/// expression.
fn unit_text(kernel: &Kernel) -> String {
    format!("// {}\n#include \"{}\"\n", kernel.symbol, kernel.header)
}

fn form(code: Code) -> Form {
    match code {
        Code::Sass(_) => Form::Cubin,
        Code::Ptx(_) => Form::Ptx,
    }
}

fn options(code: Code) -> Vec<String> {
    let mut options = vec!["--std=c++17".to_owned(), format!("--gpu-architecture={code}")];
    if let Code::Sass(_) = code {
        options.push("--ptxas-options=-v".to_owned());
    }
    options
}

/// Writes a unit and its headers to a folder in the temporary folder, so that people can compile them by hand.
fn dump(key: &str, text: &str, headers: &[(&str, &str)]) -> io::Result<PathBuf> {
    let folder = std::env::temp_dir().join(format!("mixtral-kernel-{}", &key[..16]));
    for (name, text) in headers.iter().copied().chain([(UNIT, text)]) {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap_or(Path::new("")))?;
        fs::write(path, text)?;
    }
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_read_back() {
        for text in ["sm_80", "sm_90a", "compute_80", "compute_90a"] {
            assert_eq!(text.parse::<Code>().expect("known").to_string(), text);
        }
        for text in ["compute_", "80", "compute_sm_80", "sm_81"] {
            assert!(text.parse::<Code>().is_err(), "{text}");
        }
    }
}
