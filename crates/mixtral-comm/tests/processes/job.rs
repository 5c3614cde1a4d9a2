//! A job of processes that a test starts, signals and looks at. Whatever happens, it is cleared away.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// After a death, every survivor must have ended within this time.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// Variables of launchers. The tests themselves may have been started by one.
const LAUNCHERS: &[&str] = &["OMPI_", "PMI", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "MIXTRAL_", "COMM_"];

pub(crate) struct Job {
    folder: TempDir,
    name: String,
    pub(crate) ranks: Vec<Rank>,
}

pub(crate) struct Rank {
    pub(crate) rank: usize,
    child: Child,
    out: PathBuf,
    err: PathBuf,
    status: Option<ExitStatus>,
}

/// A command that runs this binary's worker.
pub(crate) fn worker(program: &[&str]) -> Command {
    let this = std::env::current_exe().unwrap();
    let mut command = match program {
        [] => Command::new(this),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments).arg(this);
            command
        }
    };
    command.args(["--exact", "worker::worker", "--nocapture", "--quiet"]);
    for (name, _) in std::env::vars() {
        if LAUNCHERS.iter().any(|launcher| name.starts_with(launcher)) {
            command.env_remove(name);
        }
    }
    command
}

impl Job {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("test-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        Self { folder: TempDir::new().unwrap(), name, ranks: Vec::new() }
    }

    /// A job with all of its ranks started.
    pub(crate) fn started(task: &str, world_size: usize, env: &[(&str, &str)]) -> Self {
        let mut job = Self::new();
        (0..world_size).for_each(|rank| job.start(task, rank, world_size, env));
        job
    }

    /// Where the ranks meet.
    pub(crate) fn meeting(&self) -> PathBuf {
        let meeting = self.folder.path().join("meeting");
        fs::create_dir_all(&meeting).unwrap();
        meeting
    }

    pub(crate) fn start(&mut self, task: &str, rank: usize, world_size: usize, env: &[(&str, &str)]) {
        self.start_in(&[], task, rank, world_size, env);
    }

    /// Starts a rank through another program, such as `ip netns exec`.
    pub(crate) fn start_in(
        &mut self,
        program: &[&str],
        task: &str,
        rank: usize,
        world_size: usize,
        env: &[(&str, &str)],
    ) {
        let mut command = worker(program);
        command.env("RANK", rank.to_string()).env("WORLD_SIZE", world_size.to_string());
        // Without an address, the port is only a name for the job.
        command.env("MASTER_PORT", &self.name);
        self.spawn(command, task, rank, env);
    }

    pub(crate) fn spawn(&mut self, mut command: Command, task: &str, rank: usize, env: &[(&str, &str)]) {
        command.env("COMM_WORKER", task).env("COMM_DIR", self.meeting());
        command.envs(env.iter().copied());
        let at = self.ranks.len();
        let out = self.folder.path().join(format!("{at}.out"));
        let err = self.folder.path().join(format!("{at}.err"));
        let child = command.stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap()).spawn().unwrap();
        self.ranks.push(Rank { rank, child, out, err, status: None });
    }

    /// Waits until every rank has printed this.
    pub(crate) fn await_output(&mut self, text: &str) {
        for rank in &mut self.ranks {
            rank.await_that(|rank| rank.out().contains(text), text);
        }
    }

    /// Waits until rank 0 has published where to meet.
    pub(crate) fn await_notice(&mut self) -> String {
        let start = Instant::now();
        loop {
            if let Some(notice) = self.notice() {
                return notice;
            }
            assert!(start.elapsed() < SOON, "no notice: {}", self.ranks[0].err());
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn notice(&self) -> Option<String> {
        let entries = fs::read_dir(self.meeting()).unwrap().flatten();
        let mut notices = entries.filter(|entry| entry.path().extension().is_some_and(|end| end == "rendezvous"));
        notices.next().and_then(|entry| fs::read_to_string(entry.path()).ok())
    }

    /// Checks that every rank ends with success.
    pub(crate) fn succeeds(mut self) {
        for rank in &mut self.ranks {
            let status = rank.ends(3 * SOON);
            assert!(status.success(), "rank {} {status}: {}", rank.rank, rank.err());
        }
        self.leaves_nothing();
    }

    /// Checks that every rank except `without` soon exits with 1, and that its messages contain all of `words`.
    pub(crate) fn survivors_fail(&mut self, without: &[usize], words: &[&str]) {
        for rank in self.ranks.iter_mut().filter(|rank| !without.contains(&rank.rank)) {
            rank.fails(words);
        }
    }

    /// Checks that nothing is left where the ranks met.
    pub(crate) fn leaves_nothing(&self) {
        let left: Vec<_> = fs::read_dir(self.meeting()).unwrap().flatten().map(|entry| entry.path()).collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }
}

impl Rank {
    pub(crate) fn out(&self) -> String {
        read(&self.out)
    }

    pub(crate) fn err(&self) -> String {
        read(&self.err)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.child.id().try_into().unwrap()).unwrap(), signal).unwrap();
    }

    /// Kills the process and collects it.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.status = Some(self.child.wait().unwrap());
    }

    pub(crate) fn await_that(&mut self, holds: impl Fn(&Self) -> bool, what: &str) {
        let start = Instant::now();
        while !holds(self) {
            assert!(start.elapsed() < 3 * SOON, "rank {} waits for {what}: {}", self.rank, self.err());
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn ends(&mut self, limit: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.status {
                return status;
            }
            self.status = self.child.try_wait().unwrap();
            assert!(start.elapsed() < limit, "rank {} still runs: {} {}", self.rank, self.out(), self.err());
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn fails(&mut self, words: &[&str]) {
        let status = self.ends(SOON);
        let err = self.err();
        assert_eq!(status.code(), Some(1), "rank {} {status}: {err}", self.rank);
        let message = err.split("failed: ").nth(1).map(|_| &err[err.find("failed: ").unwrap()..]).unwrap_or_default();
        for word in words {
            assert!(message.contains(word), "rank {}: {word:?} is not in {err:?}", self.rank);
        }
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}
