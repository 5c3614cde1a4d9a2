//! The kernel that measures how fast a device reads its memory.

use crate::{Family, Kernel};

/// `probe::read<8>`, with parameters `const uint4* data, u64 count, u32* out`: reads `count` 16-byte words.
#[must_use]
pub fn read() -> Kernel {
    Kernel {
        header: "probe/read.cuh",
        symbol: "probe::read<8>".to_owned(),
        threads: 512,
        shared_bytes: 0,
        family: Family::Portable,
    }
}
