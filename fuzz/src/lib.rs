//! Every reader of bytes that others wrote, as a function of those bytes that may refuse them and may not panic, hang or
//! take a gigabyte.
//!
//! `cargo xtask fuzz` runs them under libFuzzer, on a stable toolchain; `tests/replay.rs` reads the corpora again.
//! [`readers`] is the table, [`memory`] the limit.
#![forbid(unsafe_code)]

pub mod memory;
pub mod readers;

/// The binary's module, which is no library.
#[path = "../../crates/mixtral/src/run/prompt_files.rs"]
pub mod prompt_files;

pub use readers::{READERS, Reader, reader};
