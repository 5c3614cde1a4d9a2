//! Measures the highest rates of a GPU: read bandwidth, and the rate of large bf16 matrix products.

use std::time::Duration;

use mixtral_engine::dummy;
use mixtral_kernels::Executable;

use crate::CudaError;
use crate::driver::{Context, CublasLt, DeviceMemory, Event, Stream};
use crate::execute::{Functions, WORKSPACE, multiply_squares, read_words};

/// Bytes that a short measurement reads: far more than the GPU's caches hold.
pub const QUICK: usize = 1 << 30;

/// Bytes that a measurement reads whose figure is reported.
pub const THOROUGH: usize = 4 << 30;

/// Rounds of a measurement. The fastest counts, because other work on the machine can only slow a round down.
const ROUNDS: usize = 20;

/// Rows and columns of the matrices.
const SIDE: usize = 8192;

/// CTAs of the reading kernel on a multiprocessor. Each number is tried, and the fastest counts.
const READERS: [u32; 3] = [1, 2, 4];

/// A GPU's ceilings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Probe {
    /// Bytes read from memory in a second, in the fastest of some passes. A pass reads as much as was asked for, or
    /// half of the free memory if that is less. 0 if there is not enough memory.
    pub read_bytes_per_s: f64,
    /// Floating-point operations in a second, in the fastest of some products of 8192 × 8192 bf16 matrices by cuBLASLt.
    /// 0 without cuBLASLt, or without the memory.
    pub flops_per_s: f64,
}

impl Probe {
    /// The better of two measurements (of one before and one after something), figure by figure.
    #[must_use]
    pub fn max(self, other: Probe) -> Probe {
        Probe {
            read_bytes_per_s: self.read_bytes_per_s.max(other.read_bytes_per_s),
            flops_per_s: self.flops_per_s.max(other.flops_per_s),
        }
    }
}

/// Measures a GPU with the probe kernel of an engine, which reads at most `bytes`.
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

/// The rate of the fastest of some rounds of `work`, each of which processes `amount`; in amounts a second.
fn best(
    context: &Context,
    stream: &Stream,
    amount: f64,
    mut work: impl FnMut() -> Result<(), CudaError>,
) -> Result<f64, CudaError> {
    let (start, end) = (Event::new(context, true)?, Event::new(context, true)?);
    // The first round is slower, because code and memory are used for the first time.
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
    // Half of the free memory, in case something else needs some.
    let bytes = bytes.min(context.free_memory()? / 2) / 4096 * 4096;
    if bytes < 8 * context.device().l2_bytes.max(1) {
        return Ok(0.0);
    }
    let probe = &executable.schedule.probe;
    let function = Functions::new(&executable.images, context, 1).get(&probe.kernel)?;
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
    // The power that a product takes, and with it the clock, depends on the values of the elements. These are
    // distributed as a model's weights are.
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
    // If the product does not run, the rate is unknown, and that is no error.
    Ok(rate.unwrap_or(0.0))
}
