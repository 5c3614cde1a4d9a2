//! Things that the tests use and that a machine may lack. `cargo xtask test` installs them; `cargo test` never does.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::workspace::{Workspace, run};

/// Something that a check needs besides Rust and a C compiler. To add one, add it to [`NEEDS`].
pub(crate) struct Need {
    pub(crate) name: &'static str,
    is_met: fn(&Workspace) -> Result<bool>,
    install: fn(&Workspace) -> Result<()>,
}

impl Need {
    /// Installs it if it is missing. If it is there, this takes no time.
    pub(crate) fn meet(&self, workspace: &Workspace) -> Result<()> {
        if (self.is_met)(workspace)? {
            println!("{}: there", self.name);
            return Ok(());
        }
        println!("{}: installing", self.name);
        (self.install)(workspace)
    }
}

/// All needs, in the order in which they are installed.
pub(crate) const NEEDS: &[Need] = &[
    Need {
        name: "a Python with the packages of tests/python/requirements.txt, NVRTC among them",
        is_met: |workspace| Ok(venv_is_current(&venv(workspace), &requirements(workspace)?)),
        install: |workspace| install_venv(workspace, &venv(workspace), &requirements(workspace)?),
    },
    Need {
        name: "Node.js with the packages of tests/javascript/package.json",
        is_met: |workspace| Ok(packages_are_current(&javascript(workspace), &javascript_packages(workspace)?)),
        install: |workspace| install_javascript(workspace, &javascript(workspace), &javascript_packages(workspace)?),
    },
    Need {
        name: "mpirun",
        is_met: |_| Ok(Command::new("mpirun").arg("--version").output().is_ok_and(|out| out.status.success())),
        install: |_| apt_install(&["openmpi-bin"]),
    },
    Need {
        name: "ip, which makes network namespaces",
        is_met: |_| Ok(Command::new("ip").arg("-V").output().is_ok_and(|out| out.status.success())),
        install: |_| apt_install(&["iproute2"]),
    },
];

const REQUIREMENTS: &str = "tests/python/requirements.txt";
const JAVASCRIPT_PACKAGES: &str = "tests/javascript/package.json";

/// The oldest Python for which the pinned packages have wheels.
const OLDEST_PYTHON: Version = Version(3, 11);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32);

/// The virtual environment's folder.
pub(crate) fn venv(workspace: &Workspace) -> PathBuf {
    workspace.target.join("python")
}

/// The interpreter that the checks run with.
pub(crate) fn python(workspace: &Workspace) -> PathBuf {
    interpreter(&venv(workspace))
}

fn interpreter(venv: &Path) -> PathBuf {
    if cfg!(windows) { venv.join("Scripts/python.exe") } else { venv.join("bin/python") }
}

fn requirements(workspace: &Workspace) -> Result<String> {
    let path = workspace.root.join(REQUIREMENTS);
    fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
}

/// The copy of the requirements from which an environment was made. It is written last, so an interrupted installation
/// does not have it.
fn stamp(venv: &Path) -> PathBuf {
    venv.join("requirements.txt")
}

fn venv_is_current(venv: &Path, requirements: &str) -> bool {
    interpreter(venv).exists() && fs::read_to_string(stamp(venv)).is_ok_and(|made_from| made_from == requirements)
}

fn install_venv(workspace: &Workspace, venv: &Path, requirements: &str) -> Result<()> {
    let python = match find_python() {
        Ok(python) => python,
        // On Debian and Ubuntu, venv is a package of its own.
        Err(missing) => {
            apt_install(&["python3", "python3-venv"]).with_context(|| format!("{missing:#}"))?;
            find_python()?
        }
    };
    println!("{} with {python}", workspace.shown(venv).display());
    run(Command::new(&python).args(["-m", "venv", "--clear"]).arg(venv))?;
    println!("installing {REQUIREMENTS}, which takes some gigabytes");
    let failed = || {
        format!(
            "installing {REQUIREMENTS} takes a package index and about 6 GB of disk; \
             `cargo xtask test --skip-python` does without"
        )
    };
    // uv installs the same packages in a sixth of pip's time. If it cannot reach an index that pip knows, pip installs
    // them.
    let pip = |words: &[&str]| {
        let mut pip = Command::new(interpreter(venv));
        pip.args(["-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]).args(words);
        workspace.run(&mut pip)
    };
    let uv = || {
        pip(&["uv"])?;
        let mut uv = Command::new(interpreter(venv));
        uv.args(["-m", "uv", "pip", "install", "--quiet", "--python"]).arg(interpreter(venv));
        workspace.run(uv.args(["--requirement", REQUIREMENTS]))
    };
    uv().or_else(|_| pip(&["--requirement", REQUIREMENTS])).with_context(failed)?;
    fs::write(stamp(venv), requirements).with_context(|| format!("writing {}", stamp(venv).display()))
}

/// The folder with packages for JavaScript.
pub(crate) fn javascript(workspace: &Workspace) -> PathBuf {
    workspace.target.join("javascript")
}

fn javascript_packages(workspace: &Workspace) -> Result<String> {
    let path = workspace.root.join(JAVASCRIPT_PACKAGES);
    fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
}

/// Whether a folder has these packages. npm writes its list of them last.
fn packages_are_current(folder: &Path, packages: &str) -> bool {
    let listed = folder.join("node_modules/.package-lock.json").exists();
    listed && fs::read_to_string(folder.join("package.json")).is_ok_and(|installed| installed == packages)
}

fn install_javascript(workspace: &Workspace, folder: &Path, packages: &str) -> Result<()> {
    if Command::new("npm").arg("--version").stdout(Stdio::null()).status().is_err() {
        apt_install(&["nodejs", "npm"])?;
    }
    let _ = fs::remove_dir_all(folder.join("node_modules"));
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let manifest = folder.join("package.json");
    fs::write(&manifest, packages).with_context(|| format!("writing {}", manifest.display()))?;
    println!("installing {JAVASCRIPT_PACKAGES} in {}", workspace.shown(folder).display());
    let mut npm = Command::new("npm");
    workspace.run(npm.args(["install", "--no-audit", "--no-fund", "--no-package-lock", "--prefix"]).arg(folder))
}

/// The first Python on the path that is new enough and can make virtual environments.
fn find_python() -> Result<String> {
    let names = ["python3", "python3.13", "python3.12", "python3.11", "python3.14", "python"];
    choose_python(names.map(|name| (name, ask_python(name))))
}

/// Asks a Python for its version, and whether it can make environments (then `venv` follows).
fn ask_python(name: &str) -> Option<String> {
    let script = "import sys; print(*sys.version_info[:2]); import ensurepip, venv; print('venv')";
    let out = Command::new(name).args(["-c", script]).stderr(Stdio::null()).output().ok()?;
    Some(String::from_utf8_lossy(&out.stdout).into_owned()).filter(|said| !said.is_empty())
}

fn choose_python<const N: usize>(answers: [(&str, Option<String>); N]) -> Result<String> {
    let mut found = Vec::new();
    for (name, answer) in answers {
        let Some((version, has_venv)) = answer.as_deref().and_then(parse_answer) else { continue };
        if version >= OLDEST_PYTHON && has_venv {
            return Ok(name.to_owned());
        }
        let Version(major, minor) = version;
        found.push(format!("{name} is {major}.{minor}{}", if has_venv { "" } else { " without the venv module" }));
    }
    let Version(major, minor) = OLDEST_PYTHON;
    let found = if found.is_empty() { "none".to_owned() } else { found.join(", ") };
    bail!(
        "the checks against transformers need Python {major}.{minor} or newer with its venv module on the path; \
         found: {found}; install one (Debian: apt-get install python3 python3-venv), or leave the checks out with \
         `cargo xtask test --skip-python`"
    )
}

fn parse_answer(answer: &str) -> Option<(Version, bool)> {
    let mut words = answer.split_whitespace();
    let version = Version(words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    Some((version, words.next() == Some("venv")))
}

/// Installs Debian packages, but only as root on a machine with apt-get.
fn apt_install(packages: &[&str]) -> Result<()> {
    let is_root = Command::new("id").arg("-u").output().is_ok_and(|out| out.stdout.trim_ascii() == b"0");
    if !is_root || Command::new("apt-get").arg("--version").stdout(Stdio::null()).status().is_err() {
        bail!("not root on a machine with apt-get, so nothing was installed");
    }
    run(Command::new("apt-get").args(["update", "--quiet"]))?;
    let install = ["install", "--yes", "--quiet", "--no-install-recommends"];
    run(Command::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive").args(install).args(packages))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(answer: &str) -> Option<String> {
        Some(answer.to_owned())
    }

    #[test]
    fn the_first_python_that_will_do_is_chosen() {
        let answers = [
            ("python3", said("3 9\nvenv\n")),
            ("python3.13", None),
            ("python3.12", said("3 12\n")),
            ("python3.11", said("3 11\nvenv\n")),
            ("python", said("3 13\nvenv\n")),
        ];
        assert_eq!(choose_python(answers).expect("3.11 will do"), "python3.11");
    }

    #[test]
    fn without_a_python_that_will_do_the_message_says_what_was_found() {
        let answers = [("python3", said("3 9\nvenv\n")), ("python3.12", said("3 12\n")), ("python", said("no idea"))];
        let error = choose_python(answers).expect_err("none will do").to_string();
        assert!(error.contains("found: python3 is 3.9, python3.12 is 3.12 without the venv module;"), "{error}");
        let error = choose_python([("python3", None)]).expect_err("there is none").to_string();
        assert!(error.contains("found: none;"), "{error}");
    }

    #[test]
    fn packages_are_current_only_for_their_own_manifest() {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let path = folder.path();
        fs::write(path.join("package.json"), "{}\n").expect("writable");
        assert!(!packages_are_current(path, "{}\n"), "an interrupted installation has no list");
        fs::create_dir(path.join("node_modules")).expect("creatable");
        fs::write(path.join("node_modules/.package-lock.json"), "").expect("writable");
        assert!(packages_are_current(path, "{}\n"));
        assert!(!packages_are_current(path, "{ }\n"));
    }

    #[test]
    fn an_environment_is_current_only_for_its_own_requirements() {
        let venv = tempfile::tempdir().expect("a temporary directory");
        let current = |requirements| venv_is_current(venv.path(), requirements);
        let python = interpreter(venv.path());
        fs::create_dir_all(python.parent().expect("a folder")).expect("creatable");
        fs::write(&python, "").expect("writable");
        assert!(!current("torch==1\n"), "an interrupted installation has no stamp");
        fs::write(stamp(venv.path()), "torch==1\n").expect("writable");
        assert!(current("torch==1\n"));
        assert!(!current("torch==2\n"));
        fs::remove_file(python).expect("removable");
        assert!(!current("torch==1\n"), "without an interpreter there is no environment");
    }
}
