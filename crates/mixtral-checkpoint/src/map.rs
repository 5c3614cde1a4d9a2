//! The one unsafe line of the crate: a read-only mapping of a file.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Deref;

/// A file's bytes, paged in as they are touched.
#[derive(Debug)]
pub struct FileMap(memmap2::Mmap);

impl FileMap {
    /// Maps all of `file`.
    ///
    /// # Errors
    /// What the system said.
    pub fn new(file: &File) -> io::Result<Self> {
        // SAFETY: the mapping is private and read-only, and only plain numbers are read through it, for which every
        // bit pattern is valid. Someone who truncates the file meanwhile makes reads fault (SIGBUS), which no
        // reader of mapped files can prevent; our own writers never shorten a committed file, they replace it.
        unsafe { memmap2::Mmap::map(file) }.map(FileMap)
    }
}

impl Deref for FileMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
