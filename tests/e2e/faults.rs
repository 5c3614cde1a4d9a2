//! Every file operation of a run is made to fail, one per run, by a library that is preloaded into the tool.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::kills::{contents, loads, outputs, small_model};
use crate::tool::{Said, binary, fast_dir, mixtral_in, root, said};

/// The library.
pub struct Faults {
    _folder: TempDir,
    library: PathBuf,
}

impl Faults {
    /// Builds the library. `None`, and a printed reason, if that is not possible.
    pub fn new() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let library = folder.path().join("faults.so");
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"]).arg(&library);
        cc.arg(root().join("tests/e2e/faults.c")).arg("-ldl");
        if !cfg!(all(target_os = "linux", target_env = "gnu")) {
            println!("skipped: failing file operations, which need Linux and glibc");
            return None;
        }
        assert!(cc.status().expect("there is a C compiler").success(), "faults.c compiles");
        Some(Faults { _folder: folder, library })
    }

    /// Runs the tool with `faults`, as faults.c describes them.
    pub fn run(&self, dir: &Path, line: &str, faults: &str) -> Said {
        let mut command = Command::new(binary());
        command.args(line.split_whitespace()).current_dir(dir).env("FAULTS", faults).env("LD_PRELOAD", &self.library);
        said(command.env_remove("RUST_BACKTRACE").output().expect("the binary starts"))
    }

    /// How many operations a run with `count` has counted.
    pub fn counted(said: &Said) -> usize {
        let line = said.err.lines().rev().find_map(|line| line.strip_prefix("operations: "));
        line.expect("the count is printed").parse().unwrap()
    }
}

/// The last line of the messages. It says what went wrong; the lines before may say what was done.
fn error(said: &Said) -> &str {
    said.err.lines().last().unwrap_or_default()
}

/// Command lines of both stages on a small model, each with the faults that all its runs have.
fn stages(at: &Path) -> Vec<(String, &'static str)> {
    small_model(at);
    let convert = "convert --model_dir model --workers 1 --tp_size 2";
    mixtral_in(at, &format!("{convert} --output_dir checkpoint"), &[]).ok();
    let build = "build --checkpoint_dir checkpoint --output_dir out";
    vec![(format!("{convert} --output_dir out"), ""), (build.to_owned(), ""), (build.to_owned(), "L:exdev:0,")]
}

#[test]
fn every_operation_that_fails_is_an_error_that_leaves_nothing() {
    let Some(faults) = Faults::new() else { return };
    let dir = fast_dir();
    let at = dir.path();
    let out = at.join("out");
    for (line, also) in stages(at) {
        for (operations, what, word) in [
            ("R", "eio", "Input/output error"),
            ("W", "enospc", "free some space, or choose another --output-dir"),
            ("W", "eio", "Input/output error"),
            ("S", "eio", "Input/output error"),
        ] {
            let count = Faults::counted(&faults.run(at, &line, &format!("{also}{operations}:count:0")));
            assert!(count > 3, "{line}: {count} operations {operations}");
            let mut failed = 0;
            for n in 1..=count {
                let _ = std::fs::remove_dir_all(&out);
                let said = faults.run(at, &line, &format!("{also}{operations}:{what}:{n}"));
                if said.code == 0 {
                    // The file that could not be read was not needed, such as the one with the machine's memory.
                    assert!(loads(&out), "{line}: done, but it does not load");
                    continue;
                }
                failed += 1;
                assert_eq!(said.code, 1, "{line}, {what} at {n}: {}", said.err);
                assert!(error(&said).starts_with("error: ") && said.err.contains(word), "{what} at {n}: {}", said.err);
                // A directory that is whole stays whole if a later operation fails: removing its lock.
                assert!(!out.exists() || loads(&out), "{line}, {what} at {n} left {:?}", contents(&out).keys());
            }
            println!("{line}: {what} at each of {count} operations {operations}, {failed} refused");
            assert!(failed * 2 > count, "{line}: {what} at {failed} of {count}");
        }
    }
}

#[test]
fn an_operation_that_fails_leaves_an_older_output_or_a_new_one_that_is_complete() {
    let Some(faults) = Faults::new() else { return };
    let dir = fast_dir();
    let at = dir.path();
    let out = at.join("out");
    for (line, also) in stages(at) {
        let _ = std::fs::remove_dir_all(&out);
        let other = if line.starts_with("convert") { "--dtype f32" } else { "--max_batch_size 2" };
        // Removes what the last run left there: a stage does not replace the output of another stage.
        let _ = std::fs::remove_dir_all(&out);
        mixtral_in(at, &format!("{line} {other}"), &[]).ok();
        let old = contents(&out);
        mixtral_in(at, &line, &[]).ok();
        let new = contents(&out);
        let prepare = || {
            let _ = std::fs::remove_dir_all(&out);
            std::fs::create_dir(&out).unwrap();
            old.iter().for_each(|(name, bytes)| std::fs::write(out.join(name), bytes).unwrap());
        };
        for (operations, what) in [("W", "enospc"), ("S", "eio"), ("R", "eio")] {
            prepare();
            let count = Faults::counted(&faults.run(at, &line, &format!("{also}{operations}:count:0")));
            let (mut stayed, mut finished) = (0, 0);
            for n in 1..=count {
                prepare();
                let said = faults.run(at, &line, &format!("{also}{operations}:{what}:{n}"));
                // If moving the files failed, the next reader finishes the move.
                assert!(loads(&out), "{line}, {what} at {n}: {}", said.err);
                let left = outputs(&out);
                assert!(left == old || left == new, "{line}, {what} at {n} left {:?}", left.keys());
                assert!(left == new || said.code == 1, "{line}, {what} at {n}: {}", said.err);
                stayed += usize::from(left == old);
                finished += usize::from(said.err.contains("the next command that uses out puts them in place"));
            }
            println!("{line}: {what} at each of {count} {operations}: older {stayed} times, {finished} finished");
            // Moving the files syncs and writes, but reads nothing. So only runs without failing reads can fail during
            // the move.
            let moves = operations != "R";
            assert!(stayed > 0 && (finished > 0) == moves, "{line}, {what}: {stayed}, {finished} of {count}");
        }
    }
}

#[test]
fn a_source_that_shrinks_while_it_is_read_is_an_error_that_leaves_nothing() {
    let Some(faults) = Faults::new() else { return };
    let dir = fast_dir();
    let at = dir.path();
    let out = at.join("out");
    for (line, also) in stages(at) {
        let count = Faults::counted(&faults.run(at, &line, &format!("{also}R:count:0")));
        for n in 1..=count {
            let _ = std::fs::remove_dir_all(&out);
            let said = faults.run(at, &line, &format!("{also}R:eof:{n}"));
            // The last read of a copy finds the end of the file anyway.
            if said.code == 0 {
                assert!(loads(&out), "{line}: done, but it does not load");
                continue;
            }
            assert_eq!(said.code, 1, "{line}, the end at {n}: {}", said.err);
            assert!(error(&said).starts_with("error: ") && !out.exists(), "{line}, the end at {n}: {}", said.err);
        }
    }
}

#[test]
fn short_reads_and_writes_and_interruptions_change_nothing() {
    let Some(faults) = Faults::new() else { return };
    let dir = fast_dir();
    let at = dir.path();
    let out = at.join("out");
    for (line, also) in stages(at) {
        let _ = std::fs::remove_dir_all(&out);
        mixtral_in(at, &line, &[]).ok();
        let undisturbed = contents(&out);
        let mut rules = vec!["RW:short:0".to_owned()];
        rules.extend((1..=20).map(|n| format!("RW:eintr:{n},RW:short:0")));
        for rule in rules {
            let _ = std::fs::remove_dir_all(&out);
            faults.run(at, &line, &format!("{also}{rule}")).ok();
            assert!(contents(&out) == undisturbed, "{line}, {rule}");
        }
    }
}
