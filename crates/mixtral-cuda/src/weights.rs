//! Weights on the device: copied from where they lie, or generated there.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use mixtral_engine::{BackendError, Program, Weight, WeightSource};
use mixtral_kernels::Schedule;
use mixtral_kernels::weight::part_offsets;
use mixtral_model::WeightFormat;

use crate::CudaError;
use crate::driver::{Context, DeviceMemory, Pinned, Stream};
use crate::staging::{Matrix, Queue};

/// Alignment of weights, in bytes. It is the alignment of allocations, and more than any vector load or tensor map
/// needs.
const ALIGN: usize = 256;

/// Bytes of one copy. It is large enough to use the bus fully. It is small enough that all threads end at about the
/// same time, and that the driver makes the pinned buffers, one after another, in a short time.
const CHUNK: usize = 4 << 20;

/// The most threads that read. Each copies a few GB/s, and a PCIe 5 bus takes 50.
const MAX_THREADS: usize = 16;

/// The offset of each weight, and the bytes of all of them.
pub(crate) fn layout(program: &Program, schedule: &Schedule) -> (Vec<usize>, usize) {
    let mut end = 0;
    let place = |index| {
        let start = end;
        end += schedule.weight_bytes(program, index).next_multiple_of(ALIGN);
        start
    };
    let starts = (0..program.weights.len()).map(place).collect();
    (starts, end)
}

/// Checks that the source has what the program expects.
fn check(program: &Program, source: &dyn WeightSource) -> Result<(), BackendError> {
    program.weights.iter().flat_map(Weight::tensors).try_for_each(|tensor| {
        let missing = || BackendError::MissingWeight { name: tensor.name.clone() };
        let (elem, shape) = source.shape(&tensor.name).ok_or_else(missing)?;
        if elem != tensor.elem || shape != tensor.shape {
            return Err(BackendError::WrongWeight {
                found: format!("{elem} {shape:?}"),
                expected: format!("{} {:?}", tensor.elem, tensor.shape),
                name: tensor.name,
            });
        }
        Ok(())
    })
}

/// Where weights are copied to.
pub(crate) struct Targets<'a> {
    pub(crate) weights: &'a DeviceMemory,
    /// Offsets of weights.
    pub(crate) starts: &'a [usize],
    /// The memory in which matrices wait to be packed.
    pub(crate) staging: &'a DeviceMemory,
    pub(crate) queue: &'a Queue,
}

/// Copies all weights to the device. Each thread reads chunks of the file into its two pinned buffers, one after the
/// other, so that one is copied over the bus while the next is read. It calls pread and does not touch the mapping,
/// because pread is faster: a page fault costs about as much as copying the page, and page faults of all threads wait
/// for one lock, that of the address space.
///
/// Matrices that have to be packed are copied to the staging memory. `pack` packs the next one, in their order, from a
/// place in that memory, and returns when that is done.
pub(crate) fn upload(
    program: &Program,
    source: &dyn WeightSource,
    context: &Context,
    targets: &Targets<'_>,
    mut pack: impl FnMut(&Matrix, usize) -> Result<(), BackendError>,
) -> Result<(), BackendError> {
    check(program, source)?;
    let chunks = chunks(program, targets.starts, targets.queue.matrices());
    let next = AtomicUsize::new(0);
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(MAX_THREADS).min(chunks.len());
    let copy = || -> Result<(), BackendError> {
        let stream = Stream::new(context)?;
        let mut buffers = [Pinned::new(context, CHUNK)?, Pinned::new(context, CHUNK)?];
        // The matrix that the last copy from each buffer brought bytes of, and how many.
        let mut under_way = [None, None];
        let arrived = |brought: &mut Option<(usize, usize)>| {
            if let Some((matrix, bytes)) = brought.take() {
                targets.queue.arrived(matrix, bytes);
            }
        };
        for turn in 0.. {
            let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            let (buffer, brought) = (&mut buffers[turn % 2], &mut under_way[turn % 2]);
            buffer.bytes()?;
            arrived(brought);
            if let Place::Staged { matrix, .. } = chunk.to
                && !targets.queue.has_room(matrix)
            {
                // What this thread still copies may be what the queue waits for.
                stream.synchronize()?;
                under_way.iter_mut().for_each(arrived);
                if !targets.queue.wait_for_room(matrix) {
                    return Ok(());
                }
            }
            source.read(&chunk.name, chunk.from, &mut buffers[turn % 2].bytes()?[..chunk.len])?;
            let (memory, to, brought) = match chunk.to {
                Place::Weight(to) => (targets.weights, to, None),
                Place::Staged { matrix, at } => {
                    (targets.staging, targets.queue.start(matrix) + at, Some((matrix, chunk.len)))
                }
            };
            buffers[turn % 2].upload(&stream, 0, chunk.len, memory, to)?;
            under_way[turn % 2] = brought;
        }
        stream.synchronize()?;
        under_way.iter_mut().for_each(arrived);
        Ok(())
    };
    let failed = || BackendError::from(CudaError::Unsupported("a thread that copies weights failed".to_owned()));
    let work = || {
        // The queue waits for what a thread copies, so it must hear of a panic too.
        let copied = std::panic::catch_unwind(std::panic::AssertUnwindSafe(copy)).unwrap_or_else(|_| Err(failed()));
        copied.inspect_err(|_| targets.queue.fail())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let packed = targets.queue.drain(&mut pack);
        let joined = workers.into_iter().map(|worker| worker.join().unwrap_or_else(|_| Err(failed())));
        joined.collect::<Result<(), BackendError>>().and(packed)
    })
}

/// Where a chunk goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Bytes before it in the memory of all weights.
    Weight(usize),
    /// A matrix that is to be packed, and the bytes before the chunk in the matrix's part of the staging memory.
    Staged {
        /// Number of the matrix in the queue.
        matrix: usize,
        at: usize,
    },
}

/// A piece of a tensor.
#[derive(Debug, PartialEq, Eq)]
struct Chunk {
    /// The tensor.
    name: String,
    /// Bytes before it in the tensor.
    from: usize,
    len: usize,
    to: Place,
}

/// The weights cut into pieces, each with its place on the device.
fn chunks(program: &Program, starts: &[usize], matrices: &[Matrix]) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    let mut cut = |name: &str, from: usize, bytes: usize, place: &dyn Fn(usize) -> Place| {
        for done in (0..bytes).step_by(CHUNK) {
            let len = CHUNK.min(bytes - done);
            chunks.push(Chunk { name: name.to_owned(), from: from + done, len, to: place(done) });
        }
    };
    let packed = |weight: &Weight| matches!(weight.format, WeightFormat::Quantized(_));
    for (weight, &start) in program.weights.iter().zip(starts).filter(|(weight, _)| !packed(weight)) {
        let (offsets, _) = part_offsets(weight);
        for (tensor, offset) in weight.tensors().iter().zip(offsets) {
            let bytes = usize::try_from(tensor.num_bytes()).unwrap_or(usize::MAX);
            cut(&tensor.name, 0, bytes, &|done| Place::Weight(start + offset + done));
        }
    }
    for (index, matrix) in matrices.iter().enumerate() {
        for (tensor, part) in program.weights[matrix.weight].tensors().iter().zip(&matrix.parts) {
            cut(&tensor.name, part.from, part.bytes, &|done| Place::Staged { matrix: index, at: part.at + done });
        }
    }
    chunks
}

#[cfg(test)]
mod tests {
    use mixtral_kernels::{Family, Target};
    use mixtral_model::DType;
    use mixtral_testkit::assembly::Assembly;

    use super::*;

    fn schedule(program: &Program) -> Schedule {
        Schedule::new(program, Target { family: Family::Portable }).expect("kernels")
    }

    #[test]
    fn chunks_cover_every_byte_once() {
        let mut a = Assembly::new(DType::F32);
        a.declare("a", DType::F32, &[CHUNK / 4 + 5]);
        a.declare("b", DType::F32, &[3]);
        a.declare("c", DType::F32, &[2 * CHUNK / 4]);
        let (starts, _) = layout(&a.program, &schedule(&a.program));
        let [b, c] = [CHUNK + 256, CHUNK + 512];
        let chunk = |name: &str, from, len, to| Chunk { name: name.to_owned(), from, len, to: Place::Weight(to) };
        assert_eq!(
            chunks(&a.program, &starts, &[]),
            [
                chunk("a", 0, CHUNK, 0),
                chunk("a", CHUNK, 20, CHUNK),
                chunk("b", 0, 12, b),
                chunk("c", 0, CHUNK, c),
                chunk("c", CHUNK, CHUNK, c + CHUNK),
            ]
        );
    }

    #[test]
    fn weights_are_aligned_and_checked() {
        let mut a = Assembly::new(DType::Bf16);
        a.weight("a", DType::Bf16, &[3, 5], &[1.0; 15]);
        a.weight("b", DType::F32, &[100], &[1.0; 100]);
        a.weight("c", DType::F32, &[1], &[1.0]);
        assert_eq!(layout(&a.program, &schedule(&a.program)), (vec![0, 256, 768], 1024));
        check(&a.program, &a.weights).unwrap();
        let mut bytes = [0; 8];
        a.weights.read("b", 392, &mut bytes).unwrap();
        assert_eq!(bytes, [0, 0, 128, 63, 0, 0, 128, 63]);
        insta::assert_snapshot!(a.weights.read("b", 396, &mut bytes).unwrap_err(), @"bytes 396 + 8 of the 400 of weight `b`");
        a.weights.insert("b", DType::F16, &[100], vec![0; 200]);
        insta::assert_snapshot!(check(&a.program, &a.weights).unwrap_err(), @"weight `b` is f16 [100], but the program expects f32 [100]; the engine's files do not belong together, build it again");
        a.weights.remove("b");
        insta::assert_snapshot!(check(&a.program, &a.weights).unwrap_err(), @"the weight file has no tensor `b`; the engine is incomplete, build it again");
    }
}
