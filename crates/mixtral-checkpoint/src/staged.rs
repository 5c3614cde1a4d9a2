//! A directory that is either whole or does not load.
//!
//! Its marker, `config.json`, is removed before anything else is touched and written last (temporary file, fsync,
//! rename). A lock file keeps a second writer out; left behind by a killed run, it marks the directory as ours to
//! clean. A run that fails removes what it wrote. Used for checkpoints and engines alike.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::names::CONFIG_FILE;

/// Held for as long as a directory is being written.
pub const LOCK_FILE: &str = ".mixtral-lock";

const TEMPORARY: &str = "config.json.partial";

/// How a directory's own files are told from a user's.
#[derive(Clone, Copy, Debug)]
pub struct Ownership {
    /// What the directory is, for messages: `checkpoint`, `engine`.
    pub what: &'static str,
    /// Whether a file of this name belongs to such a directory (the marker and the lock aside).
    pub owns: fn(&str) -> bool,
    /// Whether this text is the marker of such a directory, written by this tool.
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
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The disk is too full for what will be written.
    #[error(
        "{dir} needs {needed} bytes, but its disk has {free} free; free some space, or choose another --output-dir"
    )]
    NoSpace {
        /// The directory.
        dir: PathBuf,
        /// Bytes that will be written.
        needed: u64,
        /// Bytes there are.
        free: u64,
    },
    /// Someone else is writing there.
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

/// A directory being written. Dropped without [`StagedDir::commit`], it removes what it wrote.
#[derive(Debug)]
pub struct StagedDir {
    dir: PathBuf,
    ownership: Ownership,
    /// Held, not read: the lock goes when the file closes.
    _lock: File,
    /// Whether the directory was not there before, so that a failure removes it too.
    created: bool,
    committed: bool,
}

impl StagedDir {
    /// Locks `dir`, which is created if need be, and empties it of our own files. From here on it does not load.
    ///
    /// # Errors
    /// If it is locked, holds what is not ours, or cannot be written. Nothing of it was changed then.
    pub fn begin(dir: &Path, ownership: Ownership) -> Result<Self, StagedError> {
        if dir.exists() && !dir.is_dir() {
            return Err(StagedError::NotADirectory { dir: dir.to_owned() });
        }
        let created = !dir.exists();
        // Refused before the lock file is made, so that a directory that is not ours stays as it was.
        if !created {
            check_ours(dir, ownership)?;
        }
        fs::create_dir_all(dir).map_err(failed("create", dir))?;
        let lock = lock(dir)?;
        let staged = StagedDir { dir: dir.to_owned(), ownership, _lock: lock, created, committed: false };
        staged.remove(CONFIG_FILE)?;
        staged.sync_dir()?;
        staged.clean()?;
        Ok(staged)
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the file `name` goes. Its name must be one that the directory owns.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        debug_assert!((self.ownership.owns)(name), "{name} would not be cleaned up");
        self.dir.join(name)
    }

    /// Checks that `needed` bytes fit on the disk.
    ///
    /// # Errors
    /// If they do not. A filesystem that does not say is believed to have room.
    pub fn reserve(&self, needed: u64) -> Result<(), StagedError> {
        match free_bytes(&self.dir) {
            Some(free) if free < needed => Err(StagedError::NoSpace { dir: self.dir.clone(), needed, free }),
            _ => Ok(()),
        }
    }

    /// Writes a file into the directory, onto the disk. Gives the BLAKE3 of it.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_in(&self, name: &str, bytes: &[u8]) -> Result<blake3::Hash, StagedError> {
        let path = self.path(name);
        let write = || {
            let mut file = File::create(&path)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(failed("write", &path))?;
        Ok(blake3::hash(bytes))
    }

    /// Copies the file `from` into the directory under `name`, onto the disk. Gives the BLAKE3 of what was copied.
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
        target.sync_all().map_err(failed("write", &path))?;
        Ok(hasher.finalize())
    }

    /// Writes the marker and with it makes the directory valid. All other files must be on the disk by now.
    ///
    /// # Errors
    /// If it cannot be written; the directory is cleaned then.
    pub fn commit(mut self, marker: &[u8]) -> Result<(), StagedError> {
        self.sync_dir()?;
        let temporary = self.dir.join(TEMPORARY);
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(marker)?;
            file.sync_all()
        };
        write().map_err(failed("write", &temporary))?;
        let path = self.dir.join(CONFIG_FILE);
        fs::rename(&temporary, &path).map_err(failed("write", &path))?;
        self.sync_dir()?;
        self.committed = true;
        self.remove(LOCK_FILE)
    }

    fn sync_dir(&self) -> Result<(), StagedError> {
        File::open(&self.dir).and_then(|d| d.sync_all()).map_err(failed("write", &self.dir))
    }

    fn remove(&self, name: &str) -> Result<(), StagedError> {
        let path = self.dir.join(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path)(e)),
            _ => Ok(()),
        }
    }

    /// Removes all files of ours but the lock.
    fn clean(&self) -> Result<(), StagedError> {
        for name in names(&self.dir)? {
            if name == TEMPORARY || (self.ownership.owns)(&name) {
                self.remove(&name)?;
            }
        }
        Ok(())
    }
}

impl Drop for StagedDir {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        // A failure here cannot be reported, and the next run cleans up what is left.
        let _ = self.remove(CONFIG_FILE).and_then(|()| self.clean()).and_then(|()| self.remove(LOCK_FILE));
        if self.created {
            let _ = fs::remove_dir(&self.dir);
        }
    }
}

/// Bytes free on the disk of `path`, or of its nearest parent that exists.
#[must_use]
pub fn free_bytes(path: &Path) -> Option<u64> {
    let stat = std::path::absolute(path).ok()?.ancestors().find_map(|p| rustix::fs::statvfs(p).ok())?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}

fn names(dir: &Path) -> Result<Vec<String>, StagedError> {
    let read = || -> io::Result<Vec<String>> {
        fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    let mut names = read().map_err(failed("list", dir))?;
    names.sort();
    Ok(names)
}

/// Ours is what has our marker, what a killed run of ours left (its lock file), and what is empty.
fn check_ours(dir: &Path, ownership: Ownership) -> Result<(), StagedError> {
    let names = names(dir)?;
    if names.is_empty() || names.iter().any(|n| n == LOCK_FILE) {
        return Ok(());
    }
    let config = dir.join(CONFIG_FILE);
    let is_marker = |path: &Path| fs::read(path).is_ok_and(|text| (ownership.is_marker)(&text));
    if names.iter().any(|n| n == CONFIG_FILE) && is_marker(&config) {
        return Ok(());
    }
    let found = names.into_iter().next().unwrap_or_default();
    Err(StagedError::NotOurs { dir: dir.to_owned(), found, what: ownership.what })
}

fn lock(dir: &Path) -> Result<File, StagedError> {
    let path = dir.join(LOCK_FILE);
    loop {
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(failed("write", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StagedError::Locked { dir: dir.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(failed("lock", &path)(source)),
        }
        // The holder before us may have removed the file between our open and our lock; then we hold nothing.
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

    #[test]
    fn a_commit_leaves_the_marker_and_the_files_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("a/b");
        let staged = StagedDir::begin(&dir, TEST).unwrap();
        fs::write(staged.path("0.part"), "x").unwrap();
        assert!(!dir.join(CONFIG_FILE).exists());
        staged.commit(b"ours").unwrap();
        assert_eq!(listing(&dir), ["0.part", "config.json"]);
    }

    #[test]
    fn a_failure_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("new");
        let staged = StagedDir::begin(&dir, TEST).unwrap();
        fs::write(staged.path("0.part"), "x").unwrap();
        drop(staged);
        assert!(!dir.exists());
        fs::create_dir(&dir).unwrap();
        drop(StagedDir::begin(&dir, TEST).unwrap());
        assert!(listing(&dir).is_empty(), "a directory that was there before stays, empty");
    }

    #[test]
    fn a_second_writer_is_refused_and_disturbs_nothing() {
        let root = tempfile::tempdir().unwrap();
        let first = StagedDir::begin(root.path(), TEST).unwrap();
        fs::write(first.path("0.part"), "x").unwrap();
        let second = StagedDir::begin(root.path(), TEST).unwrap_err();
        assert!(matches!(second, StagedError::Locked { .. }));
        first.commit(b"ours").unwrap();
        assert_eq!(listing(root.path()), ["0.part", "config.json"]);
    }

    #[test]
    fn what_a_killed_run_left_is_cleaned_and_foreign_files_stay() {
        let root = tempfile::tempdir().unwrap();
        for name in [LOCK_FILE, "7.part", TEMPORARY, "notes.txt"] {
            fs::write(root.path().join(name), "x").unwrap();
        }
        StagedDir::begin(root.path(), TEST).unwrap().commit(b"ours").unwrap();
        assert_eq!(listing(root.path()), ["config.json", "notes.txt"]);
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
        let full = failed("write", &dir)(io::ErrorKind::StorageFull.into()).to_string();
        assert!(full.ends_with("; free some space, or choose another --output-dir"), "{full}");
        drop(staged);
        assert!(!dir.exists());
    }
}
