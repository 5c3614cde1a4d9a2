//! A read-only mapping of a file. This is the only unsafe line of the crate.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::unix::fs::FileExt;
use std::path::Path;

use memmap2::{Mmap, MmapMut, MmapOptions};

use crate::disk::Lack;

/// A file's bytes. They are mapped, so a page is read when it is first touched. If the file cannot be mapped, it is
/// read into memory.
#[derive(Debug)]
pub struct FileMap(Mmap);

impl FileMap {
    /// Maps all of `file`, or reads it. `path` is for the warning if it cannot be mapped.
    ///
    /// # Errors
    /// If the file can neither be mapped nor read, or memory is too small for it.
    pub fn new(file: &File, path: &Path) -> io::Result<Self> {
        // SAFETY: the mapping is private and read-only, and only plain numbers are read through it, for which every bit
        // pattern is valid. If someone truncates the file meanwhile, reads fault (SIGBUS); no reader of mapped files
        // can prevent that. Our own writers never shorten a committed file but replace it.
        let mapped = unsafe { MmapOptions::new().map_copy_read_only(file) };
        mapped.map(FileMap).or_else(|error| {
            Lack::Map.warn(path, &error);
            Self::read(file)
        })
    }

    /// Reads all of `file` into anonymous memory.
    fn read(file: &File) -> io::Result<Self> {
        let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let mut memory = MmapMut::map_anon(len)?;
        file.read_exact_at(&mut memory, 0)?;
        memory.make_read_only().map(FileMap)
    }
}

impl Deref for FileMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_read_has_the_bytes_of_one_that_is_mapped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        std::fs::write(&path, [7; 5000]).unwrap();
        let file = File::open(&path).unwrap();
        assert_eq!(FileMap::new(&file, &path).unwrap()[..], FileMap::read(&file).unwrap()[..]);
    }
}
