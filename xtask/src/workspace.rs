//! Where the workspace is, which packages it has, and how to run programs in it.

use std::env::consts::EXE_SUFFIX;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The workspace as `cargo metadata` describes it.
pub(crate) struct Workspace {
    /// The folder of the root manifest; every program runs here.
    pub(crate) root: PathBuf,
    /// Cargo's target directory, wherever the environment puts it.
    pub(crate) target: PathBuf,
    pub(crate) packages: Vec<Package>,
}

/// One member of the workspace.
pub(crate) struct Package {
    pub(crate) name: String,
    /// The manifest's folder, relative to the root, with `/` between its parts.
    pub(crate) folder: String,
    pub(crate) description: Option<String>,
    pub(crate) features: Vec<String>,
    /// Names of its normal and build dependencies, without those of its tests.
    pub(crate) dependencies: Vec<String>,
}

impl Workspace {
    pub(crate) fn load() -> Result<Self> {
        let mut command = cargo();
        command.args(["metadata", "--no-deps", "--format-version", "1"]);
        let json: Value =
            serde_json::from_str(&output(&mut command)?).context("reading the output of cargo metadata")?;
        let root = PathBuf::from(text(&json, "workspace_root")?);
        let packages = array(&json, "packages")?.iter().map(|p| Package::of(p, &root)).collect::<Result<_>>()?;
        Ok(Self { target: PathBuf::from(text(&json, "target_directory")?), root, packages })
    }

    /// The binary that `cargo build -p mixtral` makes. The workspace's commands use only the dev profile.
    pub(crate) fn mixtral(&self) -> PathBuf {
        self.target.join("debug").join(format!("mixtral{EXE_SUFFIX}"))
    }

    pub(crate) fn has_package(&self, name: &str) -> bool {
        self.packages.iter().any(|p| p.name == name)
    }

    /// `path` as someone at the root would type it.
    pub(crate) fn shown<'a>(&self, path: &'a Path) -> &'a Path {
        path.strip_prefix(&self.root).unwrap_or(path)
    }

    /// Runs a program at the root with this process's streams.
    pub(crate) fn run(&self, command: &mut Command) -> Result<()> {
        run(command.current_dir(&self.root))
    }

    /// Runs `cargo` with the given arguments.
    pub(crate) fn cargo(&self, args: &[&str]) -> Result<()> {
        self.run(cargo().args(args))
    }
}

impl Package {
    fn of(json: &Value, root: &Path) -> Result<Self> {
        let manifest = Path::new(text(json, "manifest_path")?);
        let folder =
            manifest.parent().unwrap_or(manifest).strip_prefix(root).context("a member outside the workspace")?;
        let built_of = |d: &&Value| d["kind"].as_str() != Some("dev");
        let dependencies = array(json, "dependencies")?.iter().filter(built_of);
        Ok(Self {
            name: text(json, "name")?.to_owned(),
            folder: folder.to_string_lossy().replace('\\', "/"),
            description: json["description"].as_str().map(str::to_owned),
            features: json["features"].as_object().into_iter().flat_map(|f| f.keys().cloned()).collect(),
            dependencies: dependencies.map(|d| text(d, "name").map(str::to_owned)).collect::<Result<_>>()?,
        })
    }
}

fn text<'a>(json: &'a Value, key: &str) -> Result<&'a str> {
    json[key].as_str().with_context(|| format!("cargo metadata has no string `{key}`"))
}

fn array<'a>(json: &'a Value, key: &str) -> Result<&'a Vec<Value>> {
    json[key].as_array().with_context(|| format!("cargo metadata has no array `{key}`"))
}

/// The cargo that runs this program.
pub(crate) fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Runs a program with this process's streams. If it fails, the error shows the command.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting `{}`", typed(command)))?;
    if !status.success() {
        bail!("`{}` failed with {status}", typed(command));
    }
    Ok(())
}

/// Runs a program and returns its standard output. Its standard error goes to this process's.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let out = command.stderr(std::process::Stdio::inherit()).output();
    let out = out.with_context(|| format!("starting `{}`", typed(command)))?;
    if !out.status.success() {
        bail!("`{}` failed with {}", typed(command), out.status);
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

fn typed(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|w| shell_word(&OsStr::to_string_lossy(w))).collect::<Vec<_>>().join(" ")
}

/// A word, quoted for bash if necessary.
pub(crate) fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else if word.contains(['\n', '\t', '\r']) {
        let escaped = word.replace('\\', r"\\").replace('\'', r"\'");
        format!("$'{}'", escaped.replace('\n', r"\n").replace('\t', r"\t").replace('\r', r"\r"))
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_as_bash_reads_them() {
        assert_eq!(shell_word("target/demo/engine"), "target/demo/engine");
        assert_eq!(shell_word(""), "''");
        assert_eq!(shell_word("it's late"), r"'it'\''s late'");
        assert_eq!(shell_word("ROMEO:\nit's"), r"$'ROMEO:\nit\'s'");
    }

    #[test]
    fn a_failing_program_is_named() {
        let error = run(Command::new("false").arg("a;b")).expect_err("false fails").to_string();
        assert!(error.starts_with("`false 'a;b'` failed with exit status: 1"), "{error}");
        let error = run(&mut Command::new("no-such-program")).expect_err("it does not exist").to_string();
        assert_eq!(error, "starting `no-such-program`");
    }

    #[test]
    fn dependencies_of_tests_are_not_what_a_package_is_built_of() {
        let json = serde_json::json!({
            "name": "a", "manifest_path": "/w/crates/a/Cargo.toml", "description": null, "features": {"cuda": []},
            "dependencies": [{"name": "b", "kind": null}, {"name": "c", "kind": "dev"}, {"name": "d", "kind": "build"}],
        });
        let package = Package::of(&json, Path::new("/w")).expect("a whole description");
        assert_eq!((package.folder.as_str(), package.dependencies), ("crates/a", vec!["b".to_owned(), "d".to_owned()]));
        assert_eq!(package.features, ["cuda"]);
    }
}
