//! The most that a reader may allocate. A larger allocation fails, and that ends the process.

use std::alloc::System;

use cap::Cap;

/// One GiB for all live allocations together.
pub const LIMIT: usize = 1 << 30;

#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, LIMIT);
