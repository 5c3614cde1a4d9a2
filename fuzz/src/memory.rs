//! The most that a reader may allocate. Beyond it an allocation fails, which ends the process.

use std::alloc::System;

use cap::Cap;

/// One GiB over all live allocations.
pub const LIMIT: usize = 1 << 30;

#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, LIMIT);
