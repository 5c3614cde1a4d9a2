//! Where NVRTC, cuBLASLt and NCCL may be. A CUDA toolkit or pip installs them, and neither puts them on the dynamic linker's
//! path for certain.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The environment variable that names NVRTC: a library file, or a folder that holds one. No other is used then.
pub const NVRTC_VARIABLE: &str = "MIXTRAL_NVRTC";

/// The names that the dynamic linker is asked for, newest first.
const NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];

/// The folders of a toolkit that hold its libraries.
const TOOLKIT_FOLDERS: [&str; 3] = ["lib64", "lib", "targets/x86_64-linux/lib"];

/// The folders in which pip's packages of CUDA 13 and of CUDA 12 keep their libraries.
const PIP_FOLDERS: [&str; 4] = ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "nvidia/cublas/lib", "nvidia/nccl/lib"];

/// A library that may exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// What to load: a path, or a name for the dynamic linker to find.
    pub library: PathBuf,
    /// Its `libnvrtc-builtins`. NVRTC opens that by name alone, so it has to be loaded first.
    pub builtins: Option<PathBuf>,
}

/// What the search depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Search {
    /// [`NVRTC_VARIABLE`]'s value.
    pub only: Option<PathBuf>,
    /// Toolkits.
    pub toolkits: Vec<PathBuf>,
    /// A Python environment.
    pub venv: Option<PathBuf>,
}

impl Search {
    /// Reads it from the environment: `MIXTRAL_NVRTC`, `CUDA_HOME`, `CUDA_PATH`, `VIRTUAL_ENV`.
    #[must_use]
    pub fn from_environment() -> Self {
        let path = |name| env::var_os(name).filter(|value: &OsString| !value.is_empty()).map(PathBuf::from);
        let toolkits = [path("CUDA_HOME"), path("CUDA_PATH"), Some("/usr/local/cuda".into())];
        Search {
            only: path(NVRTC_VARIABLE),
            toolkits: toolkits.into_iter().flatten().collect(),
            venv: path("VIRTUAL_ENV"),
        }
    }

    /// The places that are searched, in their order, for messages.
    #[must_use]
    pub fn places(&self) -> String {
        if let Some(only) = &self.only {
            return format!("{NVRTC_VARIABLE}={}", only.display());
        }
        let mut places = vec!["the dynamic linker's path".to_owned()];
        places.extend(self.toolkits.iter().map(|toolkit| toolkit.display().to_string()));
        places.extend(self.venv.iter().map(|venv| venv.display().to_string()));
        places.push("python3's packages".to_owned());
        places.join(", ")
    }

    /// All candidates, best first. The iterator is lazy, because the last candidates need a run of Python.
    pub fn candidates(&self) -> Box<dyn Iterator<Item = Candidate> + '_> {
        if let Some(only) = &self.only {
            return Box::new(if only.is_dir() { in_folder(only) } else { beside(only) }.into_iter());
        }
        let named = NAMES.iter().map(|name| Candidate { library: name.into(), builtins: None });
        Box::new(named.chain(self.folders().filter_map(|folder| in_folder(&folder))))
    }

    /// Folders where CUDA's libraries may lie besides the dynamic linker's path, best first. Some may not exist. Lazy
    /// as well.
    pub fn folders(&self) -> Box<dyn Iterator<Item = PathBuf> + '_> {
        if let Some(only) = &self.only {
            let folder = if only.is_dir() { Some(only.as_path()) } else { only.parent() };
            return Box::new(folder.map(Path::to_owned).into_iter());
        }
        let toolkits = self.toolkits.iter().flat_map(|t| TOOLKIT_FOLDERS.iter().map(|folder| t.join(folder)));
        let venv = self.venv.iter().flat_map(|venv| site_packages(venv));
        let packages = venv.chain(std::iter::once_with(python_packages).flatten());
        Box::new(toolkits.chain(packages.flat_map(|site| PIP_FOLDERS.map(|folder| site.join(folder)))))
    }
}

/// The newest NVRTC of a folder.
fn in_folder(folder: &Path) -> Option<Candidate> {
    let names = file_names(folder);
    let newest = names.iter().rev().find(|name| is_nvrtc(name))?;
    beside(&folder.join(newest))
}

/// A library with the builtins that lie beside it.
fn beside(library: &Path) -> Option<Candidate> {
    let folder = library.parent()?;
    let names = file_names(folder);
    let builtins = names.iter().rev().find(|name| name.starts_with("libnvrtc-builtins.so"));
    Some(Candidate { library: library.to_owned(), builtins: builtins.map(|name| folder.join(name)) })
}

/// Whether a file is NVRTC: `libnvrtc.so` or `libnvrtc.so.13`, but not `libnvrtc.alt.so.13`, which is for machines with
/// little stack.
fn is_nvrtc(name: &str) -> bool {
    name.strip_prefix("libnvrtc.so").is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

fn file_names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// The package folders of a virtual environment.
fn site_packages(venv: &Path) -> Vec<PathBuf> {
    let lib = venv.join("lib");
    let pythons = file_names(&lib).into_iter().filter(|name| name.starts_with("python"));
    pythons.map(|python| lib.join(python).join("site-packages")).collect()
}

/// The package folders of the `python3` on the path.
fn python_packages() -> Vec<PathBuf> {
    let script = "import site; print(*site.getsitepackages(), site.getusersitepackages(), sep='\\n')";
    let python = Command::new("python3").args(["-c", script]).stdin(Stdio::null()).stderr(Stdio::null()).output();
    let said = python.map(|out| String::from_utf8_lossy(&out.stdout).into_owned()).unwrap_or_default();
    said.lines().map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path) {
        fs::create_dir_all(path.parent().expect("a folder")).expect("creatable");
        fs::write(path, "").expect("writable");
    }

    #[test]
    fn libraries_are_found_in_toolkits_then_in_pips_packages_with_their_builtins() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let toolkit = root.path().join("cuda/lib64");
        let pip = root.path().join("venv/lib/python3.12/site-packages/nvidia/cu13/lib");
        for folder in [&toolkit, &pip] {
            for name in ["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.alt.so.13", "libnvrtc-builtins.so.13.0"] {
                touch(&folder.join(name));
            }
        }
        let search = Search {
            only: None,
            toolkits: vec![root.path().join("gone"), root.path().join("cuda")],
            venv: Some(root.path().join("venv")),
        };
        let found: Vec<_> = search.candidates().filter(|c| c.library.starts_with(root.path())).collect();
        let of = |folder: &Path| Candidate {
            library: folder.join("libnvrtc.so.13"),
            builtins: Some(folder.join("libnvrtc-builtins.so.13.0")),
        };
        assert_eq!(found, [of(&toolkit), of(&pip)]);
    }

    #[test]
    fn a_named_place_is_the_only_one() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let only = |path: &Path| Search { only: Some(path.to_owned()), ..Search::default() };
        assert_eq!(only(root.path()).candidates().count(), 0);
        let library = root.path().join("libnvrtc.so.13");
        touch(&library);
        for path in [root.path(), &library] {
            let found: Vec<_> = only(path).candidates().collect();
            assert_eq!(found, [Candidate { library: library.clone(), builtins: None }]);
        }
    }
}
