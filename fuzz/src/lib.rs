//! Every reader of bytes that others wrote, as a function of those bytes. It may refuse them, but it may not panic,
//! hang or allocate a gigabyte.
//!
//! `cargo xtask fuzz` runs the readers under libFuzzer, on a stable toolchain. `tests/replay.rs` reads the corpora
//! again. [`readers`] is the table of readers, [`memory`] the limit of memory.
#![forbid(unsafe_code)]

pub mod memory;
pub mod readers;

/// A module of the binary `mixtral`, included here since a binary cannot be a dependency.
#[path = "../../crates/mixtral/src/run/prompt_files.rs"]
pub mod prompt_files;

pub use readers::{READERS, Reader, reader};
