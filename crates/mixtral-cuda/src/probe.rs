//! What a GPU can do at most, measured: read bandwidth, and the rate of large bf16 matrix products.

use std::time::Duration;

use mixtral_engine::dummy;
use mixtral_kernels::Executable;

use crate::CudaError;
use crate::driver::{Context, CublasLt, DeviceMemory, Event, Stream};
use crate::execute::{Functions, WORKSPACE, multiply_squares, read_words};

/// Bytes that are enough to look at a GPU in passing: far more than its caches hold.
pub const QUICK: usize = 1 << 30;

/// Bytes for a figure to be reported.
pub const THOROUGH: usize = 4 << 30;

/// Rounds; the best counts, since whatever else the machine does only ever slows one down.
const ROUNDS: usize = 20;

/// Rows and columns of the matrices.
const SIDE: usize = 8192;

/// CTAs of the reading kernel on a multiprocessor: the best of these.
const READERS: [u32; 3] = [1, 2, 4];

/// A GPU's ceilings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Probe {
    /// Bytes read from memory in a second: the best of some passes over as much as was asked for, or as there is. 0 if there
    /// is not enough memory.
    pub read_bytes_per_s: f64,
    /// Floating-point operations in a second of a product of square bf16 matrices of 8192 rows by cuBLASLt, the best of some.
    /// 0 without cuBLASLt, or without the memory.
    pub flops_per_s: f64,
}

impl Probe {
    /// The better of two, figure by figure: of measurements before and after something.
    #[must_use]
    pub fn max(self, other: Probe) -> Probe {
        Probe {
            read_bytes_per_s: self.read_bytes_per_s.max(other.read_bytes_per_s),
            flops_per_s: self.flops_per_s.max(other.flops_per_s),
        }
    }
}

/// Measures a GPU with what it runs of an engine, reading at most `bytes`.
///
/// # Errors
/// A device failure, or an engine without the kernel that reads.
pub fn measure(device: usize, executable: &Executable, bytes: usize) -> Result<Probe, CudaError> {
    let context = Context::new(device)?;
    let stream = Stream::new(&context)?;
    Ok(Probe {
        read_bytes_per_s: read(&context, &stream, executable, bytes)?,
        flops_per_s: multiply(&context, &stream)?,
    })
}

/// The best of some rounds of `work`, as amounts a second.
fn best(
    context: &Context,
    stream: &Stream,
    amount: f64,
    mut work: impl FnMut() -> Result<(), CudaError>,
) -> Result<f64, CudaError> {
    let (start, end) = (Event::new(context, true)?, Event::new(context, true)?);
    // The first round is slower: its code and its memory are new.
    work()?;
    let mut shortest = Duration::MAX;
    for _ in 0..ROUNDS {
        start.record(stream)?;
        work()?;
        end.record(stream)?;
        stream.synchronize()?;
        shortest = shortest.min(start.until(&end)?);
    }
    Ok(if shortest.is_zero() { 0.0 } else { amount / shortest.as_secs_f64() })
}

#[expect(clippy::cast_precision_loss, reason = "a rate")]
fn read(context: &Context, stream: &Stream, executable: &Executable, bytes: usize) -> Result<f64, CudaError> {
    // Half of what is free, in case someone else wants some.
    let bytes = bytes.min(context.free_memory()? / 2) / 4096 * 4096;
    if bytes < 8 * context.device().l2_bytes.max(1) {
        return Ok(0.0);
    }
    let probe = &executable.schedule.probe;
    let function = Functions::new(&executable.images, context).get(&probe.kernel)?;
    let (memory, out) = (DeviceMemory::new(context, bytes)?, DeviceMemory::new(context, 256)?);
    stream.fill(&memory, 0, bytes, 0x5a)?;
    let mut rate = 0.0f64;
    for per_sm in READERS {
        let ctas = context.device().multiprocessors * per_sm;
        let pass = || read_words(probe, &function, stream, ctas, &memory, &out);
        rate = rate.max(best(context, stream, bytes as f64, pass)?);
    }
    stream.synchronize()?;
    Ok(rate)
}

#[expect(clippy::cast_precision_loss, reason = "a rate")]
fn multiply(context: &Context, stream: &Stream) -> Result<f64, CudaError> {
    let each = SIDE * SIDE * 2;
    let Ok(cublaslt) = CublasLt::new(context) else { return Ok(0.0) };
    if context.free_memory()? < 3 * each + WORKSPACE + (64 << 20) {
        return Ok(0.0);
    }
    let memory = DeviceMemory::new(context, 3 * each + WORKSPACE)?;
    // The power that a product takes, and with it the clock, depends on the numbers: these are spread as a model's are.
    let key = dummy::key(0, "probe");
    let tile: Vec<u8> = (0..1u64 << 22)
        .flat_map(|i| {
            let [_, _, low, high] = dummy::element(key, i, dummy::scale(SIDE)).to_le_bytes();
            [low, high]
        })
        .collect();
    for offset in (0..2 * each).step_by(tile.len()) {
        stream.upload(&tile, &memory, offset)?;
    }
    let flops = 2.0 * (SIDE as f64).powi(3);
    let rate = best(context, stream, flops, || multiply_squares(&cublaslt, stream, SIDE, &memory));
    stream.synchronize()?;
    // A product that does not run is no reason to fail: the ceiling is then unknown.
    Ok(rate.unwrap_or(0.0))
}
