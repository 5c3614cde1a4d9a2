//! `cargo xtask tidy`: the workspace's rules that no compiler checks. The tables of this file are the rules;
//! [`manifests`], [`sources`] and [`guides`] check them.

mod guides;
mod lexer;
mod manifests;
mod sources;

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::workspace::Workspace;

/// Every package, and the packages of the workspace that it may depend on. Its tests may use any. The reasons are in
/// ARCHITECTURE.md: `mixtral-build` and `mixtral-runtime` share only `mixtral-engine`, backends never depend on each
/// other, only the binary depends on everything, and no build contains packages for tests.
const CRATES: &[(&str, &[&str])] = &[
    ("mixtral-model", &[]),
    ("mixtral-checkpoint", &["mixtral-model"]),
    ("mixtral-tokenizer", &["mixtral-model"]),
    ("mixtral-convert", &["mixtral-model", "mixtral-checkpoint", "mixtral-tokenizer"]),
    ("mixtral-engine", &["mixtral-model", "mixtral-checkpoint"]),
    ("mixtral-build", &["mixtral-model", "mixtral-checkpoint", "mixtral-engine", "mixtral-kernels"]),
    ("mixtral-cpu", &["mixtral-model", "mixtral-engine"]),
    ("mixtral-cuda", &["mixtral-model", "mixtral-engine", "mixtral-kernels"]),
    ("mixtral-kernels", &["mixtral-model", "mixtral-engine"]),
    (
        "mixtral-calibrate",
        &[
            "mixtral-model",
            "mixtral-checkpoint",
            "mixtral-tokenizer",
            "mixtral-convert",
            "mixtral-engine",
            "mixtral-build",
            "mixtral-cpu",
            "mixtral-kernels",
            "mixtral-cuda",
        ],
    ),
    ("mixtral-comm", &[]),
    ("mixtral-runtime", &["mixtral-model", "mixtral-tokenizer", "mixtral-engine", "mixtral-comm"]),
    ("mixtral-serve", &["mixtral-model", "mixtral-tokenizer", "mixtral-runtime"]),
    ("mixtral", PRODUCT),
    ("mixtral-testkit", &["mixtral-model", "mixtral-checkpoint", "mixtral-engine"]),
    ("benches", PRODUCT),
    ("fuzz", PRODUCT),
    ("xtask", &[]),
];

/// All packages that a user's build contains.
const PRODUCT: &[&str] = &[
    "mixtral-model",
    "mixtral-checkpoint",
    "mixtral-tokenizer",
    "mixtral-convert",
    "mixtral-calibrate",
    "mixtral-engine",
    "mixtral-build",
    "mixtral-cpu",
    "mixtral-cuda",
    "mixtral-kernels",
    "mixtral-runtime",
    "mixtral-serve",
    "mixtral-comm",
];

/// Dependencies from outside that only some packages may have. `anyhow` is not for libraries, since those have typed
/// errors.
const RESTRICTED: &[(&str, &[&str])] = &[("anyhow", &["mixtral", "fuzz", "xtask"])];

/// The files and folders that may contain unsafe code. Their crates deny it elsewhere; all other crates forbid it.
const UNSAFE: &[&str] = &[
    "crates/mixtral-checkpoint/src/map.rs",
    "crates/mixtral-cpu/src/simd/",
    "crates/mixtral-cuda/src/driver/",
    "crates/mixtral-cuda/src/execute.rs",
    "crates/mixtral-kernels/src/nvrtc.rs",
];

/// Parts of Hugging Face's tensor names, and the crates whose code may contain them. Tests may contain them too.
const HUGGING_FACE: &[&str] = &["model.layers.", "block_sparse_moe", "self_attn"];
const KNOWS_HUGGING_FACE: &[&str] = &["crates/mixtral-convert/", "crates/mixtral-testkit/"];

/// Texts that no Rust file may contain, not even tests, and what to do instead.
const BANNED: &[(&str, &str)] = &[
    ("todo!", "write it, or return a typed error"),
    ("unimplemented!", "write it, or return a typed error"),
    ("dbg!", "remove it"),
    ("#[ignore", "a test runs or does not exist"),
    ("cfg(feature", "there is one feature set"),
];

/// Words that a `lib.rs` may not contain: it has documentation, modules and re-exports only.
const NOT_IN_LIB: &[&str] = &["fn", "impl", "macro_rules"];

/// The most lines that a source file may have.
const MAX_FILE_LINES: usize = 800;

/// The code map, and the number of lines that it must stay below.
const CODE_MAP: &str = "ARCHITECTURE.md";
const MAX_CODE_MAP_LINES: usize = 300;

/// The folders of the workspace. Files outside of them are not checked, so that a stray file in a working copy is no
/// error.
const FOLDERS: &[&str] = &["crates", "kernels", "xtask", "examples", "fuzz", "tests", "benches", "docs"];

/// Folders inside those that contain generated files.
const GENERATED: &[&str] = &["target", "corpus", "__pycache__", "tllm_checkpoint", "engine_outputs"];

/// Extensions of source files.
const SOURCES: &[&str] = &["rs", "py", "c", "cu", "cuh", "h", "toml"];

/// A broken rule: where, and what to do.
#[derive(Debug, PartialEq, Eq)]
struct Problem {
    file: String,
    /// Counted from 1; `None` if the problem is about the whole file.
    line: Option<usize>,
    message: String,
}

impl Problem {
    fn new(file: &str, line: impl Into<Option<usize>>, message: impl Into<String>) -> Self {
        Self { file: file.to_owned(), line: line.into(), message: message.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file, self.message),
            None => write!(f, "{}: {}", self.file, self.message),
        }
    }
}

/// Checks every rule and prints every broken one.
pub(crate) fn tidy(workspace: &Workspace) -> Result<()> {
    let files = files(&workspace.root)?;
    let read = |file: &str| fs::read_to_string(workspace.root.join(file)).with_context(|| format!("reading {file}"));
    let exists = |path: &str| workspace.root.join(path).exists();

    let mut problems = Vec::new();
    for package in &workspace.packages {
        let manifest = read(&format!("{}/Cargo.toml", package.folder))?;
        problems.extend(manifests::check(package, &manifest));
    }
    for file in &files {
        let extension = Path::new(file).extension().unwrap_or_default().to_string_lossy();
        if SOURCES.contains(&&*extension) {
            problems.extend(sources::check(file, &read(file)?));
        } else if extension == "md" {
            problems.extend(guides::check(file, &read(file)?, exists));
        }
    }
    if problems.is_empty() {
        println!("tidy: {} packages, {} files", workspace.packages.len(), files.len());
        return Ok(());
    }
    for problem in &problems {
        eprintln!("{problem}");
    }
    bail!("{} of the workspace's rules are broken; xtask/src/tidy/mod.rs says what they are", problems.len())
}

/// The workspace's files, relative to `root` with `/` between the parts, in order.
fn files(root: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for name in entries(root)? {
        if root.join(&name).is_file() {
            files.push(name);
        } else if FOLDERS.contains(&name.as_str()) {
            walk(root, &name, &mut files)?;
        }
    }
    Ok(files)
}

fn walk(root: &Path, folder: &str, files: &mut Vec<String>) -> Result<()> {
    for name in entries(&root.join(folder))? {
        let path = format!("{folder}/{name}");
        if !root.join(&path).is_dir() {
            files.push(path);
        } else if !name.starts_with('.') && !GENERATED.contains(&name.as_str()) {
            walk(root, &path, files)?;
        }
    }
    Ok(())
}

fn entries(folder: &Path) -> Result<Vec<String>> {
    let listing = || -> std::io::Result<Vec<String>> {
        let names = fs::read_dir(folder)?.map(|e| Ok(e?.file_name().to_string_lossy().into_owned()));
        names.collect()
    };
    let mut names = listing().with_context(|| format!("listing {}", folder.display()))?;
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_those_of_the_workspaces_folders() {
        let root = tempfile::tempdir().expect("a temporary directory");
        for file in ["README.md", "crates/a/src/lib.rs", "crates/a/target/x.rs", "venv/x.md", "examples/.cache/x.md"] {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().expect("a folder")).expect("creatable");
            fs::write(path, "").expect("writable");
        }
        assert_eq!(files(root.path()).expect("readable"), ["README.md", "crates/a/src/lib.rs"]);
    }

    #[test]
    fn a_problem_says_where() {
        assert_eq!(Problem::new("a.rs", 3, "no").to_string(), "a.rs:3: no");
        assert_eq!(Problem::new("a.rs", None, "no").to_string(), "a.rs: no");
    }
}
