//! How long work goes on telling how far it is.

/// Someone who wants to know how far the work is. Called from several threads.
pub trait Progress: Sync {
    /// `total` bytes will be read or written.
    fn start(&self, total: u64) {
        let _ = total;
    }

    /// `bytes` more have been.
    fn advance(&self, bytes: u64) {
        let _ = bytes;
    }
}

/// Nobody.
impl Progress for () {}
