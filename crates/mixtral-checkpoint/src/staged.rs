//! A directory that is either whole or does not load, and that is replaced as a whole. Checkpoints and engines use it.
//!
//! New files are written into a folder inside the directory, so an older output stays as it was until they are complete
//! and on the disk. Then the older marker, `config.json`, is removed, then the older files; the new files are moved in,
//! and the new marker comes last. A run that fails or is interrupted before that removes what it wrote. If a run is
//! killed while it moves files, the next run that reads or writes the directory finishes the move. A lock file keeps a
//! second writer out. A lock file that is left behind marks the directory as ours and says that the last run did not
//! finish.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use crate::disk::{self, Lack};
use crate::names::CONFIG_FILE;

/// This file is locked while a directory is being written. If a run fails to replace an older output, the file stays
/// beside that output and holds the reason.
pub const LOCK_FILE: &str = ".mixtral-lock";

/// The folder that new files are written into.
const NEW: &str = ".mixtral-new";

/// The text of the lock file once a new output is in place, in case the file does not get removed.
const DONE: &str = "done";

/// This file exists from when that folder is complete and the older files are gone, until all new files are in place.
const MOVING: &str = ".mixtral-moving";

const TEMPORARY: &str = "config.json.partial";

/// How to tell a directory's own files from the user's files.
#[derive(Clone, Copy, Debug)]
pub struct Ownership {
    /// What the directory is, for messages: `a checkpoint`, `an engine`.
    pub what: &'static str,
    /// Whether a file of this name belongs to such a directory. The marker and the lock file do not count.
    pub owns: fn(&str) -> bool,
    /// Whether this text is a marker of such a directory that this tool wrote.
    pub is_marker: fn(&[u8]) -> bool,
}

/// An output directory that cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum StagedError {
    /// A file operation failed.
    #[error("cannot {action} {path}: {source}{}", hint(.source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The disk is too full for what will be written.
    #[error(
        "{dir} needs {needed} bytes, but its disk has {free} free; free some space, or choose another --output-dir{}",
        .older.map(|what| format!(" ({what} is there, which stays until the new one is complete; remove it first if it may go)")).unwrap_or_default()
    )]
    NoSpace {
        /// The directory.
        dir: PathBuf,
        /// Bytes that will be written.
        needed: u64,
        /// Bytes that are free.
        free: u64,
        /// What is there and stays until the new output is complete, with its article.
        older: Option<&'static str>,
    },
    /// New files could not take the places of older ones.
    #[error("{source}; the new files are complete, and the next command that uses {dir} puts them in place")]
    Moving {
        /// The directory.
        dir: PathBuf,
        /// What failed.
        source: Box<StagedError>,
    },
    /// The work was given up by [`abandon`].
    #[error("{dir} is not written: the work was interrupted")]
    Abandoned {
        /// The directory.
        dir: PathBuf,
    },
    /// Another process is writing there.
    #[error("another process is writing {dir}; wait for it, or choose another --output-dir")]
    Locked {
        /// The directory.
        dir: PathBuf,
    },
    /// Files in it that we did not write.
    #[error("{dir} holds `{found}` and is not {what} of ours; choose another --output-dir, or empty it yourself")]
    NotOurs {
        /// The directory.
        dir: PathBuf,
        /// A file that is there.
        found: String,
        /// What would be ours, with its article.
        what: &'static str,
    },
    /// The path is a file.
    #[error("{dir} is not a directory; choose another --output-dir")]
    NotADirectory {
        /// The path.
        dir: PathBuf,
    },
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some space, or choose another --output-dir"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => "; choose an --output-dir you may write",
        _ => "",
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StagedError {
    let path = path.to_owned();
    move |source| StagedError::Io { action, path, source }
}

/// A directory that is being written. If this is dropped without [`StagedDir::commit`], the directory is again as it
/// was.
#[derive(Debug)]
pub struct StagedDir {
    dir: PathBuf,
    ownership: Ownership,
    state: Arc<Mutex<State>>,
}

/// How far the writing of a directory is. [`abandon`], which another thread may call, shares it.
#[derive(Debug)]
struct State {
    dir: PathBuf,
    ownership: Ownership,
    /// The lock is released when this file closes.
    lock: File,
    /// Whether this run created the directory. If so, a failure removes it too.
    created: bool,
    /// Whether it held an output of ours before.
    replaces: bool,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// New files are written; the older output is untouched.
    Writing,
    /// New files take the places of older ones.
    Moving,
    /// Committed, or given up and cleaned up.
    Over,
}

/// The directories that this process is writing.
static ACTIVE: Mutex<Vec<Weak<Mutex<State>>>> = Mutex::new(Vec::new());

fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl StagedDir {
    /// Locks `dir`, and creates it if need be. Finishes or removes what an earlier run of this tool left unfinished. An
    /// output that is there stays as it is until [`StagedDir::commit`].
    ///
    /// # Errors
    /// If it is locked, holds files that are not ours, or cannot be written. Nothing in it is changed then.
    pub fn begin(dir: &Path, ownership: Ownership) -> Result<Self, StagedError> {
        if dir.exists() && !dir.is_dir() {
            return Err(StagedError::NotADirectory { dir: dir.to_owned() });
        }
        let created = !dir.exists();
        // This check comes before the lock file is made, so that a directory that is not ours stays as it was.
        if !created {
            check_ours(dir, ownership)?;
        }
        // Held until the directory is in the list, so that a thread that abandons the work does not miss it.
        let mut active = hold(&ACTIVE);
        fs::create_dir_all(dir).map_err(failed("create", dir))?;
        let lock = lock(dir).inspect_err(|_| {
            if created {
                // This run has just created the directory, so nobody else uses it.
                let _ = remove(&dir.join(LOCK_FILE)).map(|()| fs::remove_dir(dir));
            }
        })?;
        let (own, phase) = (dir.to_owned(), Phase::Writing);
        let state = State { dir: own, ownership, lock, created, replaces: false, phase };
        let state = Arc::new(Mutex::new(state));
        let staged = StagedDir { dir: dir.to_owned(), ownership, state };
        recover(dir, ownership)?;
        {
            let mut state = hold(&staged.state);
            state.replaces = dir.join(CONFIG_FILE).exists();
            // A note of an earlier run is not true for this run.
            state.lock.set_len(0).map_err(failed("write", &dir.join(LOCK_FILE)))?;
        }
        let new = dir.join(NEW);
        fs::create_dir(&new).map_err(failed("create", &new))?;
        active.retain(|state| state.strong_count() > 0);
        active.push(Arc::downgrade(&staged.state));
        Ok(staged)
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The path where the file `name` is to be written. The directory must own files of this name.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        debug_assert!((self.ownership.owns)(name), "{name} would not be cleaned up");
        self.dir.join(NEW).join(name)
    }

    /// Checks that `needed` bytes fit on the disk, beside the older output.
    ///
    /// # Errors
    /// If they do not fit. If the file system does not tell its free space, this assumes that there is room.
    pub fn reserve(&self, needed: u64) -> Result<(), StagedError> {
        let older = hold(&self.state).replaces.then_some(self.ownership.what);
        match disk::free_bytes(&self.dir) {
            Some(free) if free < needed => Err(StagedError::NoSpace { dir: self.dir.clone(), needed, free, older }),
            _ => Ok(()),
        }
    }

    /// Writes a file into the directory, waits until it is on the disk, and returns its BLAKE3.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_in(&self, name: &str, bytes: &[u8]) -> Result<blake3::Hash, StagedError> {
        let path = self.path(name);
        let write = || {
            let mut file = File::create(&path)?;
            file.write_all(bytes)?;
            disk::sync(&file, &path)
        };
        write().map_err(failed("write", &path))?;
        Ok(blake3::hash(bytes))
    }

    /// Copies the file `from` into the directory under `name`, waits until it is on the disk, and returns its BLAKE3.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub fn copy_in(&self, name: &str, from: &Path) -> Result<blake3::Hash, StagedError> {
        let path = self.path(name);
        let mut source = File::open(from).map_err(failed("read", from))?;
        let mut target = File::create(&path).map_err(failed("create", &path))?;
        let expected = source.metadata().map_err(failed("read", from))?.len();
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match source.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    hasher.update(&buffer[..n]);
                    target.write_all(&buffer[..n]).map_err(failed("write", &path))?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed("read", from)(error)),
            }
        }
        if hasher.count() != expected {
            let what = format!("it had {expected} bytes when it was opened, and {} were read", hasher.count());
            return Err(failed("read", from)(io::Error::other(what)));
        }
        disk::sync(&target, &path).map_err(failed("write", &path))?;
        Ok(hasher.finalize())
    }

    /// Writes the marker, and replaces the older output by all that was written. All other files must be on the disk by
    /// now.
    ///
    /// # Errors
    /// If the marker cannot be written; the older output then stays. If the new files cannot be put in place, see
    /// [`StagedError::Moving`].
    pub fn commit(self, marker: &[u8]) -> Result<(), StagedError> {
        let mut state = hold(&self.state);
        if state.phase == Phase::Over {
            return Err(StagedError::Abandoned { dir: self.dir.clone() });
        }
        let new = self.dir.join(NEW);
        let temporary = new.join(TEMPORARY);
        let write = || {
            disk::sync_dir(&new)?;
            let mut file = File::create(&temporary)?;
            file.write_all(marker)?;
            disk::sync(&file, &temporary)
        };
        write().map_err(failed("write", &temporary))?;
        let path = new.join(CONFIG_FILE);
        fs::rename(&temporary, &path).map_err(failed("write", &path))?;
        disk::sync_dir(&new).map_err(failed("write", &new))?;
        state.phase = Phase::Moving;
        put_in_place(&self.dir, self.ownership).map_err(|source| match state.replaces {
            true => StagedError::Moving { dir: self.dir.clone(), source: Box::new(source) },
            false => source,
        })?;
        state.phase = Phase::Over;
        remove(&self.dir.join(LOCK_FILE))
    }
}

impl Drop for StagedDir {
    fn drop(&mut self) {
        hold(&self.state).give_up("it failed");
    }
}

impl State {
    /// Removes what was written, and notes `why` beside an older output. A failure here cannot be reported; the next
    /// run cleans up what is left.
    fn give_up(&mut self, why: &str) {
        let phase = std::mem::replace(&mut self.phase, Phase::Over);
        // While files are moved, a part of the older output is already gone. The next run finishes the move.
        if phase == Phase::Over || phase == Phase::Moving && self.replaces {
            return;
        }
        let dir = &self.dir;
        if phase == Phase::Moving {
            let _ = remove(&dir.join(CONFIG_FILE)).and_then(|()| remove_owned(dir, self.ownership));
            let _ = remove(&dir.join(MOVING));
        }
        // Tries again, because other threads may still be making files there.
        for _ in 0..100 {
            match fs::remove_dir_all(dir.join(NEW)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => thread::sleep(Duration::from_millis(1)),
                _ => break,
            }
        }
        let lock = dir.join(LOCK_FILE);
        if self.replaces {
            let _ = fs::write(lock, why);
            return;
        }
        let _ = remove(&lock);
        if self.created {
            let _ = fs::remove_dir(dir);
        }
    }
}

/// Gives up every directory that this process is writing, as a failure would, because the process is about to end.
/// `why` is the reason. Waits for a directory that is just being committed. Returns whether there was any directory.
pub fn abandon(why: &str) -> bool {
    let states: Vec<_> = hold(&ACTIVE).iter().filter_map(Weak::upgrade).collect();
    states.iter().for_each(|state| hold(state).give_up(why));
    !states.is_empty()
}

/// Notes in `dir` that a run failed to replace our output there, and `why`. Does nothing if there is no output of ours,
/// or if another run is at work there.
pub fn note_failure(dir: &Path, ownership: Ownership, why: &str) {
    if (ownership.is_marker)(&fs::read(dir.join(CONFIG_FILE)).unwrap_or_default())
        && let Ok(_lock) = lock(dir)
    {
        // If this cannot be written, the output could not have been replaced either.
        let _ = fs::write(dir.join(LOCK_FILE), why);
    }
}

/// Warns if the output in `dir` is older than it should be: because a run is replacing it, or because the last run did
/// not finish. `command` is the command that writes such directories.
pub fn warn_if_older(dir: &Path, command: &str) {
    let path = dir.join(LOCK_FILE);
    let Ok(file) = File::open(&path) else { return };
    if hold(&ACTIVE).iter().filter_map(Weak::upgrade).any(|state| hold(&state).dir == dir) {
        return;
    }
    let dir = dir.display();
    if matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)) {
        log::warn!("`{command}` is replacing {dir} just now; what was there before is used");
        return;
    }
    let why = fs::read_to_string(&path).unwrap_or_default();
    let why = if why.is_empty() { "it was stopped" } else { &why };
    log::warn!("the last `{command}` into {dir} did not finish ({why}); what was there before is used");
}

/// Finishes a move in `dir` that a killed run had begun, unless another run is at work there. Readers call this before
/// they open the directory. If the move cannot be finished, the directory does not load.
pub fn finish(dir: &Path, ownership: Ownership) {
    let path = dir.join(LOCK_FILE);
    let Ok(file) = File::open(&path) else { return };
    let is_done = || fs::read_to_string(&path).is_ok_and(|text| text == DONE);
    if (is_done() || is_moving(dir)) && file.try_lock().is_ok() {
        // Checked again under the lock, because another reader may have been faster.
        if !is_moving(dir) || put_in_place(dir, ownership).is_ok() {
            let _ = remove(&path);
        }
    }
}

/// Whether new files in `dir` are complete but not all in place.
fn is_moving(dir: &Path) -> bool {
    dir.join(MOVING).exists() || dir.join(NEW).join(CONFIG_FILE).exists() && !dir.join(CONFIG_FILE).exists()
}

/// Moves all new files, which are complete, into place. If it is interrupted at any point, calling it again finishes
/// the move. The old marker is removed first and the new one comes last, so that nothing loads meanwhile.
fn put_in_place(dir: &Path, ownership: Ownership) -> Result<(), StagedError> {
    let (new, moving) = (dir.join(NEW), dir.join(MOVING));
    if !moving.exists() {
        remove(&dir.join(CONFIG_FILE))?;
        disk::sync_dir(dir).map_err(failed("write", dir))?;
        remove_owned(dir, ownership)?;
        // From here on, our files in the directory are new ones.
        File::create(&moving).map_err(failed("create", &moving))?;
        disk::sync_dir(dir).map_err(failed("write", dir))?;
    }
    let move_in = |name: &str| {
        let (from, to) = (new.join(name), dir.join(name));
        fs::rename(from, &to).map_err(failed("write", &to))
    };
    let names = if new.exists() { names(&new)? } else { Vec::new() };
    names.iter().filter(|name| *name != CONFIG_FILE).try_for_each(|name| move_in(name))?;
    disk::sync_dir(dir).map_err(failed("write", dir))?;
    if names.iter().any(|name| name == CONFIG_FILE) {
        move_in(CONFIG_FILE)?;
        disk::sync_dir(dir).map_err(failed("write", dir))?;
    }
    let lock = dir.join(LOCK_FILE);
    fs::write(&lock, DONE).map_err(failed("write", &lock))?;
    remove_folder(&new)?;
    remove(&moving)
}

/// Finishes a move that a killed run began, or removes files that it did not finish writing.
fn recover(dir: &Path, ownership: Ownership) -> Result<(), StagedError> {
    match is_moving(dir) {
        true => put_in_place(dir, ownership),
        false => remove_folder(&dir.join(NEW)),
    }
}

fn remove_folder(path: &Path) -> Result<(), StagedError> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(e)),
        _ => Ok(()),
    }
}

fn remove(path: &Path) -> Result<(), StagedError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(e)),
        _ => Ok(()),
    }
}

/// Removes all our files except the marker and the lock file.
fn remove_owned(dir: &Path, ownership: Ownership) -> Result<(), StagedError> {
    let is_owned = |name: &String| name == TEMPORARY || (ownership.owns)(name);
    names(dir)?.iter().filter(|name| is_owned(name)).try_for_each(|name| remove(&dir.join(name)))
}

fn names(dir: &Path) -> Result<Vec<String>, StagedError> {
    let read = || -> io::Result<Vec<String>> {
        fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    let mut names = read().map_err(failed("list", dir))?;
    names.sort();
    Ok(names)
}

/// Checks that a directory is ours. It is if it has our marker, if a killed run of this tool left it (with a lock file
/// and no marker), or if it is empty.
fn check_ours(dir: &Path, ownership: Ownership) -> Result<(), StagedError> {
    let names = names(dir)?;
    let has = |name: &str| names.iter().any(|n| n == name);
    let is_marker = || fs::read(dir.join(CONFIG_FILE)).is_ok_and(|text| (ownership.is_marker)(&text));
    if names.is_empty() || if has(CONFIG_FILE) { is_marker() } else { has(LOCK_FILE) } {
        return Ok(());
    }
    let found = names.into_iter().find(|name| name != LOCK_FILE).unwrap_or_default();
    Err(StagedError::NotOurs { dir: dir.to_owned(), found, what: ownership.what })
}

/// Takes the lock of `dir`. If the lock is taken, waits for a moment, because a reader holds the lock for a moment too.
fn lock(dir: &Path) -> Result<File, StagedError> {
    const TRIES: usize = 10;
    let path = dir.join(LOCK_FILE);
    let mut taken = 0;
    loop {
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(failed("write", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) if taken < TRIES => {
                taken += 1;
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
            Err(TryLockError::WouldBlock) => return Err(StagedError::Locked { dir: dir.to_owned() }),
            Err(TryLockError::Error(error)) if disk::is_lacking(&error) => Lack::Lock.warn(dir, &error),
            Err(TryLockError::Error(source)) => return Err(failed("lock", &path)(source)),
        }
        // The previous holder may have removed the file after we opened it and before we locked it. Then our lock is
        // worth nothing.
        let held = file.metadata().map_err(failed("lock", &path))?.ino();
        if fs::metadata(&path).is_ok_and(|now| now.ino() == held) {
            return Ok(file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEST: Ownership = Ownership {
        what: "a test directory",
        owns: |name| name.ends_with(".part"),
        is_marker: |text| text.starts_with(b"ours"),
    };

    fn listing(dir: &Path) -> Vec<String> {
        names(dir).unwrap()
    }

    fn write(staged: &StagedDir, names: &[&str]) {
        names.iter().for_each(|name| fs::write(staged.path(name), "new").unwrap());
    }

    /// A directory with an output of ours and a file of the user.
    fn older() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let staged = StagedDir::begin(root.path(), TEST).unwrap();
        ["0.part", "1.part"].iter().for_each(|name| fs::write(staged.path(name), "old").unwrap());
        staged.commit(b"ours, old").unwrap();
        fs::write(root.path().join("notes.txt"), "theirs").unwrap();
        root
    }

    fn is_older(dir: &Path) -> bool {
        let text = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
        text("config.json") == "ours, old" && ["0.part", "1.part"].iter().all(|name| text(name) == "old")
    }

    #[test]
    fn a_commit_leaves_the_marker_and_the_files_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("a/b");
        let staged = StagedDir::begin(&dir, TEST).unwrap();
        write(&staged, &["0.part"]);
        assert!(!dir.join(CONFIG_FILE).exists());
        staged.commit(b"ours").unwrap();
        assert_eq!(listing(&dir), ["0.part", "config.json"]);
    }

    #[test]
    fn an_older_output_is_whole_until_the_new_one_is() {
        let root = older();
        let staged = StagedDir::begin(root.path(), TEST).unwrap();
        write(&staged, &["0.part", "2.part"]);
        assert!(is_older(root.path()));
        staged.commit(b"ours, new").unwrap();
        assert_eq!(listing(root.path()), ["0.part", "2.part", "config.json", "notes.txt"]);
        assert_eq!(fs::read_to_string(root.path().join("0.part")).unwrap(), "new");
    }

    #[test]
    fn a_failure_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("new");
        let staged = StagedDir::begin(&dir, TEST).unwrap();
        write(&staged, &["0.part"]);
        drop(staged);
        assert!(!dir.exists());
        fs::create_dir(&dir).unwrap();
        drop(StagedDir::begin(&dir, TEST).unwrap());
        assert!(listing(&dir).is_empty(), "a directory that was there before stays, empty");
    }

    #[test]
    fn a_failure_leaves_an_older_output_with_a_note() {
        let root = older();
        let staged = StagedDir::begin(root.path(), TEST).unwrap();
        write(&staged, &["0.part"]);
        drop(staged);
        assert!(is_older(root.path()));
        assert_eq!(listing(root.path()), [LOCK_FILE, "0.part", "1.part", "config.json", "notes.txt"]);
        note_failure(root.path(), TEST, "the disk is full");
        assert_eq!(fs::read_to_string(root.path().join(LOCK_FILE)).unwrap(), "the disk is full");
        StagedDir::begin(root.path(), TEST).unwrap().commit(b"ours").unwrap();
        assert_eq!(listing(root.path()), ["config.json", "notes.txt"]);
        // There is no output of ours that someone could take for the new one.
        let empty = tempfile::tempdir().unwrap();
        note_failure(empty.path(), TEST, "the disk is full");
        assert!(listing(empty.path()).is_empty());
    }

    #[test]
    fn what_is_abandoned_is_cleaned_and_cannot_be_committed() {
        let root = older();
        let staged = StagedDir::begin(root.path(), TEST).unwrap();
        write(&staged, &["0.part"]);
        hold(&staged.state).give_up("interrupted");
        assert!(matches!(staged.commit(b"ours, new"), Err(StagedError::Abandoned { .. })));
        assert!(is_older(root.path()));
        assert_eq!(fs::read_to_string(root.path().join(LOCK_FILE)).unwrap(), "interrupted");
    }

    #[test]
    fn a_second_writer_is_refused_and_disturbs_nothing() {
        let root = tempfile::tempdir().unwrap();
        let first = StagedDir::begin(root.path(), TEST).unwrap();
        write(&first, &["0.part"]);
        let second = StagedDir::begin(root.path(), TEST).unwrap_err();
        assert!(matches!(second, StagedError::Locked { .. }));
        note_failure(root.path(), TEST, "the second");
        first.commit(b"ours").unwrap();
        assert_eq!(listing(root.path()), ["0.part", "config.json"]);
    }

    #[test]
    fn what_a_killed_run_left_is_cleaned_and_foreign_files_stay() {
        let root = tempfile::tempdir().unwrap();
        for name in [LOCK_FILE, "7.part", TEMPORARY, "notes.txt"] {
            fs::write(root.path().join(name), "x").unwrap();
        }
        fs::create_dir(root.path().join(NEW)).unwrap();
        fs::write(root.path().join(NEW).join("8.part"), "half").unwrap();
        StagedDir::begin(root.path(), TEST).unwrap().commit(b"ours").unwrap();
        assert_eq!(listing(root.path()), ["config.json", "notes.txt"]);
    }

    /// Makes every state that a kill can leave, by doing only the first `steps` steps of a move.
    #[test]
    fn a_move_that_was_killed_is_finished_by_who_comes_next_to_read_or_to_write() {
        for steps in 0..8 {
            let root = older();
            let (dir, new) = (root.path(), root.path().join(NEW));
            fs::write(dir.join(LOCK_FILE), "").unwrap();
            fs::create_dir(&new).unwrap();
            ["0.part", "2.part", "config.json"].iter().for_each(|name| fs::write(new.join(name), "ours, new").unwrap());
            let step: [&dyn Fn() -> io::Result<()>; 7] = [
                &|| fs::remove_file(dir.join("config.json")),
                &|| fs::remove_file(dir.join("0.part")),
                &|| fs::remove_file(dir.join("1.part")).and_then(|()| fs::write(dir.join(MOVING), "")),
                &|| fs::rename(new.join("0.part"), dir.join("0.part")),
                &|| fs::rename(new.join("2.part"), dir.join("2.part")),
                &|| fs::rename(new.join("config.json"), dir.join("config.json")),
                &|| fs::remove_dir(&new),
            ];
            step[..steps].iter().for_each(|step| step().unwrap());
            // While a writer is at work, a reader touches nothing.
            let writer = File::open(dir.join(LOCK_FILE)).unwrap();
            writer.lock().unwrap();
            let before = listing(dir);
            finish(dir, TEST);
            assert_eq!(listing(dir), before);
            drop(writer);
            let reader = steps % 2 == 0;
            if reader {
                finish(dir, TEST);
            }
            if steps > 0 && reader {
                assert_eq!(listing(dir), ["0.part", "2.part", "config.json", "notes.txt"], "{steps} steps");
            }
            // A writer that fails leaves a note of its own.
            drop(StagedDir::begin(dir, TEST).unwrap());
            if steps == 0 {
                assert!(is_older(dir), "nothing was replaced yet");
                continue;
            }
            assert_eq!(listing(dir), [LOCK_FILE, "0.part", "2.part", "config.json", "notes.txt"], "{steps} steps");
            assert_eq!(fs::read_to_string(dir.join("0.part")).unwrap(), "ours, new");
        }
    }

    #[test]
    fn only_what_is_ours_is_replaced() {
        let root = tempfile::tempdir().unwrap();
        StagedDir::begin(root.path(), TEST).unwrap().commit(b"ours 1").unwrap();
        StagedDir::begin(root.path(), TEST).unwrap().commit(b"ours 2").unwrap();
        fs::write(root.path().join(CONFIG_FILE), "theirs").unwrap();
        fs::write(root.path().join("0.part"), "theirs").unwrap();
        let refused =
            StagedDir::begin(root.path(), TEST).unwrap_err().to_string().replace(root.path().to_str().unwrap(), "DIR");
        assert_eq!(
            refused,
            "DIR holds `0.part` and is not a test directory of ours; choose another --output-dir, or empty it yourself"
        );
        assert_eq!(listing(root.path()), ["0.part", "config.json"]);
        // A note that a failed run of another stage left does not make the directory ours either.
        fs::write(root.path().join(LOCK_FILE), "it failed").unwrap();
        assert!(matches!(StagedDir::begin(root.path(), TEST), Err(StagedError::NotOurs { .. })));
        fs::remove_file(root.path().join(LOCK_FILE)).unwrap();
        let file = root.path().join("0.part");
        assert!(matches!(StagedDir::begin(&file, TEST), Err(StagedError::NotADirectory { .. })));
    }

    #[test]
    fn a_disk_too_full_is_known_before_anything_is_written() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("new");
        let staged = StagedDir::begin(&dir, TEST).unwrap();
        staged.reserve(1).unwrap();
        let refused = staged.reserve(u64::MAX).unwrap_err().to_string();
        assert!(refused.contains("needs 18446744073709551615 bytes, but its disk has "), "{refused}");
        let root = older();
        let staged_over = StagedDir::begin(root.path(), TEST).unwrap();
        let refused = staged_over.reserve(u64::MAX).unwrap_err().to_string();
        assert!(
            refused.ends_with(
                "(a test directory is there, which stays until the new one is complete; remove it first if it may go)"
            ),
            "{refused}"
        );
        let full = failed("write", &dir)(io::ErrorKind::StorageFull.into()).to_string();
        assert!(full.ends_with("; free some space, or choose another --output-dir"), "{full}");
        drop(staged);
        assert!(!dir.exists());
    }
}
