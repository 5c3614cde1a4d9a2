//! What strangers can send, read as the ranks of a job read it: the entrances that the `fuzz` package drives.

pub use crate::process::hostile::{frame, greeting, message, notice};
