//! `kill -9` in the middle of `convert` and of `build`: at random moments, and before every one of their file operations.
//! What is left never loads and is wrong, and the next run finishes with the bytes of an undisturbed one.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{BuildHasher as _, RandomState};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use mixtral_checkpoint::Checkpoint;
use mixtral_engine::EngineDir;
use mixtral_model::DType;
use mixtral_testkit::{Layout, TinyModel};
use tempfile::TempDir;

use crate::faults::Faults;
use crate::tool::{binary, fast_dir, mixtral_in, root};

/// Kills of each stage at random moments.
const KILLS: usize = 50;

/// All files of a directory with their bytes; nothing if it is not there.
pub fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let Ok(entries) = fs::read_dir(dir) else { return BTreeMap::new() };
    let file = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.unwrap();
        (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
    };
    entries.map(file).collect()
}

/// Whether the directory is one that a later stage would take.
pub fn loads(dir: &Path) -> bool {
    let checkpoint = || Checkpoint::open(dir).ok()?.verify(1, &()).ok();
    let engine = || EngineDir::open(dir).ok()?.verify(1, &()).ok();
    checkpoint().is_some() || engine().is_some()
}

/// One stage in a directory of its own, and what it writes when nobody disturbs it.
struct Stage {
    at: TempDir,
    line: String,
    output: &'static str,
    undisturbed: BTreeMap<String, Vec<u8>>,
    /// Another output of the stage's, which may lie in the same place.
    old: BTreeMap<String, Vec<u8>>,
}

impl Stage {
    /// `prepare` lines run first; then `older` and `line`, which both write `output`.
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

    /// What must hold after a run that was killed, and that the next run mends it.
    fn check_and_mend(&self, when: &str) {
        let dir = self.at.path().join(self.output);
        if loads(&dir) {
            let mut left = contents(&dir);
            // A kill between the last rename and the lock's removal.
            left.remove(".mixtral-lock");
            assert!(left == self.undisturbed || left == self.old, "{when}: a directory that loads is not whole");
        }
        mixtral_in(self.at.path(), &self.line, &[]).ok();
        let mended = contents(&dir);
        assert!(mended.keys().eq(self.undisturbed.keys()), "{when}: the next run left {:?}", mended.keys());
        assert!(mended == self.undisturbed, "{when}: the next run wrote other bytes");
    }

    fn kill_at_random_moments(&self) {
        let random = RandomState::new();
        let time = |_| {
            self.prepare(false);
            let start = Instant::now();
            mixtral_in(self.at.path(), &self.line, &[]).ok();
            start.elapsed()
        };
        // The quickest, so that most of the moments come before the end.
        let takes = (0..5).map(time).min().unwrap();
        let takes = u64::try_from(takes.as_micros()).unwrap();
        let mut killed = 0;
        for index in 0..KILLS {
            self.prepare(index % 2 == 1);
            let moment = Duration::from_micros(random.hash_one(index) % takes);
            let mut command = Command::new(binary());
            command.args(self.line.split_whitespace()).current_dir(self.at.path()).stderr(Stdio::null());
            let mut child = command.spawn().unwrap();
            std::thread::sleep(moment);
            child.kill().unwrap();
            // One that was faster than its killer is whole.
            killed += usize::from(!child.wait().unwrap().success());
            self.check_and_mend(&format!("killed after {moment:?}"));
        }
        println!("{}: {killed} of {KILLS} died", self.line);
        assert!(killed > KILLS / 2, "{killed} of {KILLS} were killed before they ended");
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
                self.check_and_mend(&format!("killed before operation {n}"));
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
    // Where the weights cannot be linked they are copied.
    stage.kill_before_every_operation(&faults, "L:exdev:0,");
}
