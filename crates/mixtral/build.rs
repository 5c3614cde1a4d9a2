//! Tells the binary which commit it was built from, if git knows that.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let commit = git(&["rev-parse", "--short=12", "HEAD"]);
    println!("cargo::rustc-env=MIXTRAL_COMMIT={}", commit.unwrap_or_default());
    // HEAD names a branch. The branch's file changes with each commit; a packed branch has no file.
    let branch = git(&["symbolic-ref", "--quiet", "HEAD"]);
    let files = ["HEAD".to_owned(), "packed-refs".to_owned()].into_iter().chain(branch);
    for file in files.filter_map(|name| git(&["rev-parse", "--git-path", &name])) {
        if Path::new(&file).exists() {
            println!("cargo::rerun-if-changed={file}");
        }
    }
}

/// The output of git, if there is git and a repository.
fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok().filter(|output| output.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (!text.is_empty()).then_some(text)
}
