//! Launches recorded once and replayed as one.

use cudarc::driver::sys::CUgraphExec;

use super::{Context, Stream, api};
use crate::CudaError;

/// `CU_STREAM_CAPTURE_MODE_THREAD_LOCAL`: other threads may go on allocating.
const THREAD_LOCAL: u32 = 1;

/// An executable graph.
pub(crate) struct Graph {
    handle: CUgraphExec,
    context: Context,
}

// SAFETY: any thread may launch a graph, one thread at a time; `launch` takes `&mut self`.
unsafe impl Send for Graph {}

impl Graph {
    /// Records the launches that `work` puts into the stream. Those that may overlap their predecessor still may in the
    /// graph.
    pub(crate) fn capture(stream: &Stream, work: impl FnOnce() -> Result<(), CudaError>) -> Result<Graph, CudaError> {
        let context = stream.context();
        context.bind()?;
        let api = api()?;
        // SAFETY: the stream is live.
        let code = unsafe { (api.cuStreamBeginCapture_v2)(stream.handle, THREAD_LOCAL) };
        api.check("cuStreamBeginCapture", code)?;
        let worked = work();
        let mut graph = std::ptr::null_mut();
        // SAFETY: the capture was begun above, and ends whatever the work did; a handle is written.
        let ended = unsafe { (api.cuStreamEndCapture)(stream.handle, &raw mut graph) };
        worked?;
        api.check("cuStreamEndCapture", ended)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the graph is live, a handle is written, and the graph is not needed after.
        let made = unsafe {
            let made = (api.cuGraphInstantiateWithFlags)(&raw mut handle, graph, 0);
            (api.cuGraphDestroy)(graph);
            made
        };
        api.check("cuGraphInstantiate", made)?;
        Ok(Graph { handle, context: context.clone() })
    }

    /// Replays it.
    ///
    /// # Safety
    /// What the recorded launches point at is still allocated.
    pub(crate) unsafe fn launch(&mut self, stream: &Stream) -> Result<(), CudaError> {
        self.context.bind()?;
        let api = api()?;
        // SAFETY: both handles are live; the rest is the caller's.
        api.check("cuGraphLaunch", unsafe { (api.cuGraphLaunch)(self.handle, stream.handle) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Some(api) = self.context.to_free() {
            // SAFETY: nothing else holds the handle.
            unsafe { (api.cuGraphExecDestroy)(self.handle) };
        }
    }
}
