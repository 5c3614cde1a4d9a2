//! File operations that not every file system has. On Lustre, NFS, CIFS and FUSE some are missing. Then a promise is
//! weaker; this is said once, and the work continues.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;

/// An operation that a file system may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lack {
    /// Locks (flock). Without them, nothing prevents two writers of one directory.
    Lock,
    /// Writing data to the disk on demand (fsync), mostly of directories. Without it, a power failure may lose what was
    /// written.
    Sync,
    /// Mapped files. Without them, weights take memory of their own.
    Map,
}

/// Whether `error` means that a file system does not have an operation.
#[must_use]
pub fn is_lacking(error: &io::Error) -> bool {
    const MISSING: [Errno; 11] = [
        Errno::NOSYS,
        Errno::NOLCK,
        Errno::BADF,
        Errno::INVAL,
        Errno::PERM,
        Errno::OPNOTSUPP,
        Errno::NOTTY,
        Errno::NODEV,
        Errno::ACCESS,
        Errno::MLINK,
        Errno::XDEV,
    ];
    Errno::from_io_error(error).is_some_and(|errno| MISSING.contains(&errno))
}

impl Lack {
    /// Warns, once for each kind of lack, that the file system of `path` lacks this. `error` shows it.
    pub fn warn(self, path: &Path, error: &io::Error) {
        static SAID: Mutex<BTreeSet<Lack>> = Mutex::new(BTreeSet::new());
        if !SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(self) {
            return;
        }
        let path = path.display();
        match self {
            Lack::Lock => log::warn!(
                "the file system of {path} has no locks ({error}); see to it that no two runs write there at the same time"
            ),
            Lack::Sync => log::warn!(
                "the file system of {path} does not write out on demand ({error}); after a power failure look with `mixtral verify` whether all of it is there"
            ),
            Lack::Map => log::warn!("{path} cannot be mapped ({error}); weights are read into memory instead"),
        }
    }
}

/// Waits until `file` is on the disk, if the file system can do that. `path` is the file's path.
///
/// # Errors
/// If the disk refuses.
pub fn sync(file: &File, path: &Path) -> io::Result<()> {
    match file.sync_all() {
        Err(error) if is_lacking(&error) => {
            Lack::Sync.warn(path, &error);
            Ok(())
        }
        done => done,
    }
}

/// The same for the names in the directory `dir`.
///
/// # Errors
/// If the disk refuses.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    sync(&File::open(dir)?, dir)
}

/// Gives `file` its full length. If the file system can, it also reserves the disk blocks, so that a full disk shows
/// before any work.
///
/// # Errors
/// If the disk is too full.
pub fn allocate(file: &File, len: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, len).map_err(io::Error::from) {
        Err(error) if is_lacking(&error) => file.set_len(len),
        done => done,
    }
}

/// Free bytes on the disk of `path`, or of its nearest parent that exists.
#[must_use]
pub fn free_bytes(path: &Path) -> Option<u64> {
    let stat = std::path::absolute(path).ok()?.ancestors().find_map(|p| rustix::fs::statvfs(p).ok())?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}
