//! File operations that not every file system has. On Lustre, NFS, CIFS and FUSE some are missing: then a promise is weaker,
//! which is said once, and the work goes on.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;

/// What a file system may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lack {
    /// Locks (flock): two writers of one directory are not kept apart.
    Lock,
    /// Writing out on demand (fsync), mostly of directories: a power failure may take what was written.
    Sync,
    /// Mapped files: weights take memory of their own.
    Map,
}

/// Whether `error` is how a file system says that it does not have an operation.
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
    /// Says once that the file system of `path` lacks this, as `error` shows.
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

/// Waits until `file` is on the disk, where the file system can say so; `path` is its path.
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

/// Gives `file` its full length, and takes the blocks for it where the file system can, so that a full disk is known before any
/// work.
///
/// # Errors
/// If the disk is too full.
pub fn allocate(file: &File, len: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, len).map_err(io::Error::from) {
        Err(error) if is_lacking(&error) => file.set_len(len),
        done => done,
    }
}

/// Bytes free on the disk of `path`, or of its nearest parent that exists.
#[must_use]
pub fn free_bytes(path: &Path) -> Option<u64> {
    let stat = std::path::absolute(path).ok()?.ancestors().find_map(|p| rustix::fs::statvfs(p).ok())?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}
