//! `kill -9`, Ctrl-C and SIGTERM in the middle of `convert` and of `build`, at random moments; and `kill -9` before
//! every one of their file operations. What is left is right or does not load. An older output stays whole until the
//! new one is whole. The next run finishes, with the bytes of an undisturbed run.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{BuildHasher as _, RandomState};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use mixtral_checkpoint::Checkpoint;
use mixtral_engine::EngineDir;
use mixtral_model::DType;
use mixtral_testkit::{Layout, TinyModel};
use tempfile::TempDir;

use crate::faults::Faults;
use crate::tool::{binary, fast_dir, mixtral_in, root};

/// How often each stage is killed at a random moment.
const KILLS: usize = 50;

/// All files of a directory and of its folders, with their bytes; none if the directory does not exist.
pub fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let Ok(entries) = fs::read_dir(dir) else { return BTreeMap::new() };
    let mut files = BTreeMap::new();
    for entry in entries {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if entry.file_type().unwrap().is_dir() {
            files.extend(contents(&entry.path()).into_iter().map(|(inner, bytes)| (format!("{name}/{inner}"), bytes)));
        } else {
            files.insert(name, fs::read(entry.path()).unwrap());
        }
    }
    files
}

/// The same, without the files that an unfinished run leaves.
pub fn outputs(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    contents(dir).into_iter().filter(|(name, _)| !name.starts_with(".mixtral-")).collect()
}

/// Whether a later stage would take the directory.
pub fn loads(dir: &Path) -> bool {
    let checkpoint = || Checkpoint::open(dir).ok()?.verify(1, &()).ok();
    let engine = || EngineDir::open(dir).ok()?.verify(1, &()).ok();
    checkpoint().is_some() || engine().is_some()
}

/// One stage in a directory of its own, and what it writes when nothing disturbs it.
struct Stage {
    at: TempDir,
    line: String,
    output: &'static str,
    undisturbed: BTreeMap<String, Vec<u8>>,
    /// Another output of the stage, which some runs find in the output directory.
    old: BTreeMap<String, Vec<u8>>,
}

impl Stage {
    /// Runs the `prepare` lines first, then `older` and `line`, which both write `output`.
    fn new(at: TempDir, prepare: &[String], older: &str, line: &str, output: &'static str) -> Self {
        prepare.iter().for_each(|line| drop(mixtral_in(at.path(), line, &[]).ok()));
        let run = |line: &str| {
            mixtral_in(at.path(), line, &[]).ok();
            contents(&at.path().join(output))
        };
        let (old, undisturbed) = (run(older), run(line));
        assert!(old != undisturbed && undisturbed.contains_key("config.json"));
        Stage { at, line: line.to_owned(), output, undisturbed, old }
    }

    /// Empties the output, or puts the older one there.
    fn prepare(&self, with_older: bool) {
        let dir = self.at.path().join(self.output);
        let _ = fs::remove_dir_all(&dir);
        if with_older {
            fs::create_dir(&dir).unwrap();
            self.old.iter().for_each(|(name, bytes)| fs::write(dir.join(name), bytes).unwrap());
        }
    }

    /// Checks what must hold after a run was killed, and that the next run mends the directory.
    fn check_and_mend(&self, with_older: bool, when: &str) {
        let dir = self.at.path().join(self.output);
        let (loads, left) = (loads(&dir), outputs(&dir));
        assert!(loads || !with_older, "{when}: neither the older output is whole nor the new one");
        assert!(!loads || left == self.undisturbed || left == self.old, "{when}: a directory that loads is not whole");
        mixtral_in(self.at.path(), &self.line, &[]).ok();
        let mended = contents(&dir);
        assert!(mended.keys().eq(self.undisturbed.keys()), "{when}: the next run left {:?}", mended.keys());
        assert!(mended == self.undisturbed, "{when}: the next run wrote other bytes");
    }

    /// Runs the stage again and again, and ends it with one of `signals` at random moments. `check` is told whether
    /// there was an older output, how the stage ended, and when.
    fn end_at_random_moments(&self, signals: &[&str], check: impl Fn(bool, ExitStatus, &str)) {
        let random = RandomState::new();
        let time = |_| {
            self.prepare(false);
            let start = Instant::now();
            mixtral_in(self.at.path(), &self.line, &[]).ok();
            start.elapsed()
        };
        // The time of the quickest run is taken, so that most of the moments come before the end.
        let takes = (0..5).map(time).min().unwrap();
        let takes = u64::try_from(takes.as_micros()).unwrap();
        // On a busy machine a signal can come late, so the stage runs until enough runs were ended by theirs.
        let (mut runs, mut killed) = (0, 0);
        while runs < KILLS || killed <= KILLS / 2 {
            let index = runs;
            runs += 1;
            assert!(runs <= 4 * KILLS, "only {killed} of {} runs were killed before they ended", 4 * KILLS);
            let (with_older, signal) = (index % 2 == 1, signals[index / 2 % signals.len()]);
            self.prepare(with_older);
            let moment = Duration::from_micros(random.hash_one(index) % takes);
            let mut command = Command::new(binary());
            command.args(self.line.split_whitespace()).current_dir(self.at.path()).stderr(Stdio::null());
            let mut child = command.spawn().unwrap();
            std::thread::sleep(moment);
            let ended = Command::new("kill").args([signal, &child.id().to_string()]).stderr(Stdio::null()).status();
            ended.expect("there is a kill");
            let status = child.wait().unwrap();
            // A run that ended before the signal came has written a whole output.
            killed += usize::from(!status.success());
            check(with_older, status, &format!("{signal} after {moment:?}"));
        }
        println!("{}: {killed} of {runs} ended by {signals:?}", self.line);
    }

    fn kill_at_random_moments(&self) {
        self.end_at_random_moments(&["-KILL"], |with_older, _, when| self.check_and_mend(with_older, when));
    }

    fn interrupt_at_random_moments(&self) {
        let dir = self.at.path().join(self.output);
        self.end_at_random_moments(&["-INT", "-TERM"], |with_older, status, when| {
            let code = if when.starts_with("-INT") { 130 } else { 143 };
            // Until the tool listens for signals, the signal itself ends the process.
            let died = status.signal().is_some_and(|signal| 128 + signal == code);
            assert!(status.success() || status.code() == Some(code) || died, "{when}: {status}");
            let left = outputs(&dir);
            assert!(with_older || left.is_empty() || left == self.undisturbed, "{when}: left {:?}", left.keys());
            assert!(!with_older || left == self.undisturbed || left == self.old, "{when}: left {:?}", left.keys());
            assert!(contents(&dir).keys().all(|name| !name.contains('/')), "{when}: new files are left");
            assert!(left.is_empty() || loads(&dir), "{when}: it does not load");
            self.check_and_mend(with_older, when);
        });
    }

    fn kill_before_every_operation(&self, faults: &Faults, also: &str) {
        for with_older in [false, true] {
            self.prepare(with_older);
            let said = faults.run(self.at.path(), &self.line, &format!("{also}RWSL:count:0"));
            let operations = Faults::counted(&said);
            said.ok();
            assert!(operations > 20, "{operations} operations");
            for n in 1..=operations {
                self.prepare(with_older);
                let said = faults.run(self.at.path(), &self.line, &format!("{also}RWSL:kill:{n}"));
                assert_eq!(said.code, -1, "operation {n} is there: {}", said.err);
                self.check_and_mend(with_older, &format!("killed before operation {n}"));
            }
            println!("{}: killed before each of {operations} operations", self.line);
        }
    }
}

fn example() -> String {
    root().join("examples/tiny-mixtral").display().to_string()
}

#[test]
fn convert_killed_at_random_moments() {
    let line = format!("convert --model_dir {} --tp_size 2 --output_dir out", example());
    let at = tempfile::tempdir().unwrap();
    Stage::new(at, &[], &format!("{line} --dtype bf16"), &line, "out").kill_at_random_moments();
}

#[test]
fn build_killed_at_random_moments() {
    let convert = format!("convert --model_dir {} --tp_size 2 --output_dir checkpoint", example());
    let line = "build --checkpoint_dir checkpoint --output_dir out";
    let at = tempfile::tempdir().unwrap();
    Stage::new(at, &[convert], &format!("{line} --max_batch_size 2"), line, "out").kill_at_random_moments();
}

#[test]
fn convert_interrupted_at_random_moments() {
    let line = format!("convert --model_dir {} --tp_size 2 --output_dir out", example());
    let at = tempfile::tempdir().unwrap();
    Stage::new(at, &[], &format!("{line} --dtype bf16"), &line, "out").interrupt_at_random_moments();
}

#[test]
fn build_interrupted_at_random_moments() {
    let convert = format!("convert --model_dir {} --tp_size 2 --output_dir checkpoint", example());
    let line = "build --checkpoint_dir checkpoint --output_dir out";
    let at = tempfile::tempdir().unwrap();
    Stage::new(at, &[convert], &format!("{line} --max_batch_size 2"), line, "out").interrupt_at_random_moments();
}

/// A small model in `at/model`, in two files.
pub fn small_model(at: &Path) {
    TinyModel::mixtral(DType::Bf16, 7).write(&at.join("model"), Layout::V4, 2);
}

#[test]
fn stages_killed_before_every_file_operation() {
    let Some(faults) = Faults::new() else { return };
    let model = fast_dir();
    small_model(model.path());
    let model = model.path().join("model");
    let convert = |more: &str| format!("convert --model_dir {} --workers 1 --tp_size 2 {more}", model.display());
    let (older, line) = (convert("--output_dir out --dtype f32"), convert("--output_dir out"));
    let stage = Stage::new(fast_dir(), &[], &older, &line, "out");
    stage.kill_before_every_operation(&faults, "");
    let build = "build --checkpoint_dir checkpoint --output_dir out";
    let prepare = [convert("--output_dir checkpoint")];
    let stage = Stage::new(fast_dir(), &prepare, &format!("{build} --max_batch_size 2"), build, "out");
    stage.kill_before_every_operation(&faults, "");
    // If the weights cannot be linked, the stage copies them.
    stage.kill_before_every_operation(&faults, "L:exdev:0,");
}
