//! Readers of bytes that strangers can send, for the `fuzz` package.

pub use crate::process::hostile::{frame, greeting, message, notice};
