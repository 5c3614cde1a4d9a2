//! What calibration asks of a loaded program beside steps.

use std::ops::Range;

use mixtral_engine::BackendError;

use crate::backend::CudaBackend;

impl CudaBackend {
    /// Bytes of the workspaces, which are zero afterwards.
    ///
    /// # Errors
    /// A device failure.
    pub fn take_workspace(&mut self, bytes: Range<usize>) -> Result<Vec<u8>, BackendError> {
        let mut found = vec![0; bytes.len()];
        self.stream.download(&self.memory.scratch, bytes.start, &mut found)?;
        self.stream.fill(&self.memory.scratch, bytes.start, bytes.len(), 0)?;
        self.stream.synchronize()?;
        Ok(found)
    }
}
