//! How long-running work reports its progress.

/// Receives the progress of some work. Several threads call it.
pub trait Progress: Sync {
    /// The work begins; `total` bytes will be read or written.
    fn start(&self, total: u64) {
        let _ = total;
    }

    /// `bytes` more bytes are done.
    fn advance(&self, bytes: u64) {
        let _ = bytes;
    }
}

/// Ignores the progress.
impl Progress for () {}
