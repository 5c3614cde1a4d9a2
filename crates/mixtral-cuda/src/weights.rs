//! Weights on the device: copied from where they lie, or generated there.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use mixtral_engine::{BackendError, Program, Weight, WeightSource};

use crate::CudaError;
use crate::driver::{Context, DeviceMemory, Pinned, Stream};

/// Alignment of weights, in bytes: that of allocations, more than any vector load or tensor map wants.
const ALIGN: usize = 256;

/// Bytes of one copy. Large enough for the bus, small enough that all threads end together.
const CHUNK: usize = 8 << 20;

/// Threads that copy out of the mapping at most: a few saturate a PCIe 5 bus.
const MAX_THREADS: usize = 12;

/// Where each weight begins, and the bytes of all.
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

/// The bytes of each weight of the program, if the source has what the program expects.
fn views<'a>(program: &Program, source: &'a dyn WeightSource) -> Result<Vec<&'a [u8]>, BackendError> {
    let view = |weight: &Weight| {
        let missing = || BackendError::MissingWeight { name: weight.name.clone() };
        let found = source.weight(&weight.name).ok_or_else(missing)?;
        if found.dtype != weight.dtype || found.shape != weight.shape || found.bytes.len() != weight.num_bytes() {
            return Err(BackendError::WrongWeight {
                name: weight.name.clone(),
                found: format!("{} {:?} of {} bytes", found.dtype, found.shape, found.bytes.len()),
                expected: format!("{} {:?} of {} bytes", weight.dtype, weight.shape, weight.num_bytes()),
            });
        }
        Ok(found.bytes)
    };
    program.weights.iter().map(view).collect()
}

/// Copies all weights. Threads take turns at copying chunks out of the mapping into pinned memory, each having two such
/// buffers, so that the bus is busy while the next chunk is read.
pub(crate) fn upload(
    program: &Program,
    source: &dyn WeightSource,
    context: &Context,
    memory: &DeviceMemory,
    starts: &[usize],
) -> Result<(), BackendError> {
    let views = views(program, source)?;
    let chunks = chunks(&views, starts);
    let next = AtomicUsize::new(0);
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(MAX_THREADS).min(chunks.len());
    let work = || -> Result<(), CudaError> {
        let stream = Stream::new(context)?;
        let mut buffers = [Pinned::new(context, CHUNK)?, Pinned::new(context, CHUNK)?];
        for turn in 0.. {
            let Some(&(bytes, offset)) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            let buffer = &mut buffers[turn % 2];
            buffer.bytes()?[..bytes.len()].copy_from_slice(bytes);
            buffer.upload(&stream, 0, bytes.len(), memory, offset)?;
        }
        stream.synchronize()
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let joined = workers.into_iter().map(|worker| {
            worker
                .join()
                .unwrap_or_else(|_| Err(CudaError::Unsupported("a thread that copies weights failed".to_owned())))
        });
        joined.collect::<Result<(), CudaError>>()
    })?;
    Ok(())
}

/// The weights cut into pieces, each with its place on the device.
fn chunks<'a>(views: &[&'a [u8]], starts: &[usize]) -> Vec<(&'a [u8], usize)> {
    let cut = |(view, &start): (&&'a [u8], &usize)| {
        let pieces: Vec<_> = view.chunks(CHUNK).enumerate().map(|(i, piece)| (piece, start + i * CHUNK)).collect();
        pieces
    };
    views.iter().zip(starts).flat_map(cut).collect()
}

#[cfg(test)]
mod tests {
    use mixtral_model::DType;
    use mixtral_testkit::assembly::Assembly;

    use super::*;

    #[test]
    fn chunks_cover_every_byte_once() {
        let (a, b) = (vec![1u8; CHUNK + 5], vec![2u8; 3]);
        let chunks = chunks(&[&a, &[], &b], &[0, 2 * CHUNK, 2 * CHUNK + 256]);
        let places: Vec<_> = chunks.iter().map(|(bytes, at)| (bytes.len(), bytes[0], *at)).collect();
        assert_eq!(places, [(CHUNK, 1, 0), (5, 1, CHUNK), (3, 2, 2 * CHUNK + 256)]);
    }

    #[test]
    fn weights_are_aligned_and_checked() {
        let mut a = Assembly::new(DType::Bf16);
        a.weight("a", DType::Bf16, &[3, 5], &[1.0; 15]);
        a.weight("b", DType::F32, &[100], &[1.0; 100]);
        a.weight("c", DType::F32, &[1], &[1.0]);
        assert_eq!(layout(&a.program), (vec![0, 256, 768], 1024));
        assert_eq!(views(&a.program, &a.weights).unwrap().iter().map(|v| v.len()).collect::<Vec<_>>(), [30, 400, 4]);
        a.weights.insert("b", DType::F16, &[100], vec![0; 200]);
        insta::assert_snapshot!(views(&a.program, &a.weights).unwrap_err(), @"weight `b` is f16 [100] of 200 bytes, but the program expects f32 [100] of 400 bytes; the engine's files do not belong together, build it again");
        a.weights.remove("b");
        insta::assert_snapshot!(views(&a.program, &a.weights).unwrap_err(), @"the weight file has no tensor `b`; the engine is incomplete, build it again");
    }
}
