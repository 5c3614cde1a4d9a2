//! Weights on the device: copied from where they lie, or generated there.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use mixtral_engine::{BackendError, Program, Weight, WeightSource};

use crate::CudaError;
use crate::driver::{Context, DeviceMemory, Pinned, Stream};

/// Alignment of weights, in bytes. It is the alignment of allocations, and more than any vector load or tensor map
/// needs.
const ALIGN: usize = 256;

/// Bytes of one copy. It is large enough to use the bus fully. It is small enough that all threads end at about the
/// same time, and that the driver makes the pinned buffers, one after another, in a short time.
const CHUNK: usize = 4 << 20;

/// The most threads that read. Each copies a few GB/s, and a PCIe 5 bus takes 50.
const MAX_THREADS: usize = 16;

/// The offset of each weight, and the bytes of all of them.
pub(crate) fn layout(program: &Program) -> (Vec<usize>, usize) {
    let mut end = 0;
    let place = |weight: &Weight| {
        let start = end;
        end += weight.num_bytes().next_multiple_of(ALIGN);
        start
    };
    let starts = program.weights.iter().map(place).collect();
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

/// Copies all weights to the device. Each thread reads chunks of the file into its two pinned buffers, one after the
/// other, so that one is copied over the bus while the next is read. It calls pread and does not touch the mapping,
/// because pread is faster: a page fault costs about as much as copying the page, and page faults of all threads wait
/// for one lock, that of the address space.
pub(crate) fn upload(
    program: &Program,
    source: &dyn WeightSource,
    context: &Context,
    memory: &DeviceMemory,
    starts: &[usize],
) -> Result<(), BackendError> {
    check(program, source)?;
    let chunks = chunks(program, starts);
    let next = AtomicUsize::new(0);
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(MAX_THREADS).min(chunks.len());
    let work = || -> Result<(), BackendError> {
        let stream = Stream::new(context)?;
        let mut buffers = [Pinned::new(context, CHUNK)?, Pinned::new(context, CHUNK)?];
        for turn in 0.. {
            let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            let buffer = &mut buffers[turn % 2];
            source.read(chunk.name, chunk.from, &mut buffer.bytes()?[..chunk.len])?;
            buffer.upload(&stream, 0, chunk.len, memory, chunk.to)?;
        }
        Ok(stream.synchronize()?)
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let joined = workers.into_iter().map(|worker| {
            let failed = || CudaError::Unsupported("a thread that copies weights failed".to_owned()).into();
            worker.join().unwrap_or_else(|_| Err(failed()))
        });
        joined.collect()
    })
}

/// A piece of a weight.
#[derive(Debug, PartialEq, Eq)]
struct Chunk<'a> {
    /// The weight.
    name: &'a str,
    /// Bytes before it in the weight.
    from: usize,
    len: usize,
    /// Bytes before it in the memory of all weights.
    to: usize,
}

/// The weights cut into pieces, each with its place on the device.
fn chunks<'a>(program: &'a Program, starts: &[usize]) -> Vec<Chunk<'a>> {
    let cut = |(weight, &start): (&'a Weight, &usize)| {
        let bytes = weight.num_bytes();
        let piece =
            move |from: usize| Chunk { name: &weight.name, from, len: CHUNK.min(bytes - from), to: start + from };
        (0..bytes).step_by(CHUNK).map(piece)
    };
    program.weights.iter().zip(starts).flat_map(cut).collect()
}

#[cfg(test)]
mod tests {
    use mixtral_model::DType;
    use mixtral_testkit::assembly::Assembly;

    use super::*;

    #[test]
    fn chunks_cover_every_byte_once() {
        let mut a = Assembly::new(DType::F32);
        a.declare("a", DType::F32, &[CHUNK / 4 + 5]);
        a.declare("b", DType::F32, &[3]);
        a.declare("c", DType::F32, &[2 * CHUNK / 4]);
        let (starts, _) = layout(&a.program);
        let [b, c] = [CHUNK + 256, CHUNK + 512];
        let chunk = |name, from, len, to| Chunk { name, from, len, to };
        assert_eq!(
            chunks(&a.program, &starts),
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
        assert_eq!(layout(&a.program), (vec![0, 256, 768], 1024));
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
