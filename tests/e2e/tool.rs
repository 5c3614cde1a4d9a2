//! Runs the binary.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use tempfile::TempDir;

/// What a command printed, and its exit code.
#[derive(Debug)]
pub struct Said {
    pub out: String,
    pub err: String,
    pub code: i32,
}

impl Said {
    /// Standard output of a command that must have worked.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{}{}", self.out, self.err);
        self.out
    }
}

/// The workspace's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("the package lies in crates/ of the workspace")
}

/// The binary, which cargo builds in the profile of the tests.
pub fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_mixtral"))
}

/// A temporary directory, in memory if possible: for tests that write much and would wait for the disk each time.
pub fn fast_dir() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() }.expect("a temporary directory")
}

/// Runs `mixtral` with the words of `line`, and then `more`, in `dir`.
pub fn mixtral_in(dir: &Path, line: &str, more: &[&str]) -> Said {
    mixtral_with(dir, &[], line, more)
}

/// The same, with some environment variables set.
pub fn mixtral_with(dir: &Path, variables: &[(&str, &Path)], line: &str, more: &[&str]) -> Said {
    let output = Command::new(binary())
        .args(line.split_whitespace())
        .args(more)
        .current_dir(dir)
        .env_remove("RUST_BACKTRACE")
        .envs(variables.iter().copied())
        .output()
        .expect("the binary starts");
    said(output)
}

/// Runs `mixtral` with these arguments in `dir`, and gives it an input.
pub fn mixtral_reading(dir: &Path, args: &[&str], input: &str) -> Said {
    let mut child = Command::new(binary())
        .args(args)
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(input.as_bytes()).expect("it reads its input");
    drop(stdin);
    said(child.wait_with_output().expect("it ends"))
}

/// Whether Open MPI's mpirun is installed. If not, it prints so once.
pub fn has_mpirun() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let found = Command::new("mpirun").arg("--version").output().is_ok_and(|o| o.status.success());
        if !found {
            println!("skipped: what needs mpirun, which is not installed (cargo xtask test installs it)");
        }
        found
    })
}

/// Runs `mpirun -n RANKS mixtral` with the words of `line` in `dir`.
pub fn mpirun_in(dir: &Path, ranks: usize, line: &str) -> Said {
    let output = Command::new("mpirun")
        // Tests may run more ranks than there are cores, and as root in a container.
        .args(["--oversubscribe", "--allow-run-as-root", "--bind-to", "none", "-n", &ranks.to_string()])
        .arg(binary())
        .args(line.split_whitespace())
        .current_dir(dir)
        .env_remove("RUST_BACKTRACE")
        .output()
        .expect("mpirun starts");
    said(output)
}

pub fn said(output: std::process::Output) -> Said {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("the tool prints UTF-8");
    Said { out: text(output.stdout), err: text(output.stderr), code: output.status.code().unwrap_or(-1) }
}

/// A copy of the example model in `dir/model`, which a test may change.
pub fn example_model(dir: &Path) -> PathBuf {
    let model = dir.join("model");
    std::fs::create_dir(&model).expect("a new folder");
    for entry in std::fs::read_dir(root().join("examples/tiny-mixtral")).expect("the example is there") {
        let path = entry.expect("its files can be listed").path();
        std::fs::copy(&path, model.join(path.file_name().expect("a file"))).expect("a copy");
    }
    model
}

/// An engine of the example model, built with `build_flags`, in `engine_outputs` of a temporary directory.
pub fn example_engine(convert_flags: &str, build_flags: &str) -> TempDir {
    let dir = TempDir::new().expect("a temporary directory");
    let model = root().join("examples/tiny-mixtral");
    mixtral_in(dir.path(), &format!("convert --model_dir {} {convert_flags}", model.display()), &[]).ok();
    mixtral_in(dir.path(), &format!("build {build_flags}"), &[]).ok();
    dir
}
