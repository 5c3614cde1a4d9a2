//! The way of quantized weights: each matrix waits in staging memory, as its parts lie in the weight file, until it is
//! packed into its place. Staging memory is a ring: matrices lie in it one behind the other, and a matrix takes the place of
//! those that have been packed.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use mixtral_engine::{BackendError, Program};
use mixtral_kernels::Schedule;

/// Alignment of parts, in bytes.
const ALIGN: usize = 256;

/// How many times the largest matrix staging memory holds: some matrices are copied while one is packed. Of int4 experts of Mixtral
/// 8x7B that is 240 MB, and the threads that copy have up to 128 MB under way.
const LARGEST: usize = 4;

/// A matrix of a quantized weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Matrix {
    /// Index of the weight.
    pub(crate) weight: usize,
    /// Number of the matrix in the weight.
    pub(crate) expert: usize,
    /// Its rows, counted over all matrices of the weight.
    pub(crate) rows: Range<usize>,
    /// Its parts: integers, scales, and zeros if there are any.
    pub(crate) parts: Vec<MatrixPart>,
}

/// A matrix's part of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MatrixPart {
    /// Bytes before it in the tensor.
    pub(crate) from: usize,
    pub(crate) bytes: usize,
    /// Bytes before it in the matrix's part of the staging memory.
    pub(crate) at: usize,
}

impl Matrix {
    /// Bytes in staging memory.
    fn bytes(&self) -> usize {
        self.parts.last().map_or(0, |part| (part.at + part.bytes).next_multiple_of(ALIGN))
    }

    /// Where its integers, scales and zeros lie, if its part of the staging memory begins at `start`. Without zeros, the
    /// third is that of the scales.
    pub(crate) fn at(&self, start: usize) -> [usize; 3] {
        [0, 1, 2].map(|i| self.parts.get(i).or(self.parts.last()).map_or(start, |part| start + part.at))
    }
}

/// The matrices of all weights that are packed.
fn matrices(program: &Program, schedule: &Schedule) -> Vec<Matrix> {
    let mut matrices = Vec::new();
    let packed = program.weights.iter().enumerate().filter(|(index, _)| schedule.pack(*index).is_some());
    for (index, weight) in packed {
        let experts = if weight.shape.len() == 3 { weight.shape[0] } else { 1 };
        let rows = weight.rows() / experts.max(1);
        let tensors = weight.format.parts(weight.dtype, &weight.shape);
        for expert in 0..experts {
            let mut at = 0;
            let part = |bytes: usize| {
                let bytes = bytes / experts;
                let part = MatrixPart { from: expert * bytes, bytes, at };
                at = (at + bytes).next_multiple_of(ALIGN);
                part
            };
            let parts = tensors.iter().map(|tensor| tensor.num_bytes()).map(part).collect();
            matrices.push(Matrix { weight: index, expert, rows: expert * rows..(expert + 1) * rows, parts });
        }
    }
    matrices
}

/// A matrix's place in staging memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    start: usize,
    end: usize,
    /// How many matrices must have been packed before the place is free.
    after: usize,
}

/// Places for matrices of so many bytes in a ring.
fn places(sizes: &[usize], ring: usize) -> Vec<Place> {
    let mut places: Vec<Place> = Vec::with_capacity(sizes.len());
    for size in sizes {
        let behind = places.last().map_or(0, |place| place.end);
        let start = if behind + size > ring { 0 } else { behind };
        let end = start + size;
        let after = places.iter().rposition(|other| start < other.end && other.start < end).map_or(0, |last| last + 1);
        places.push(Place { start, end, after });
    }
    places
}

/// The matrices that are to be packed, in their order.
pub(crate) struct Queue {
    matrices: Vec<Matrix>,
    /// The place of each.
    places: Vec<Place>,
    progress: Mutex<Progress>,
    changed: Condvar,
}

struct Progress {
    /// Bytes of each matrix that have not arrived.
    missing: Vec<usize>,
    packed: usize,
    failed: bool,
}

impl Queue {
    pub(crate) fn new(program: &Program, schedule: &Schedule) -> Queue {
        let matrices = matrices(program, schedule);
        let missing = matrices.iter().map(|matrix| matrix.parts.iter().map(|part| part.bytes).sum()).collect();
        let sizes: Vec<usize> = matrices.iter().map(Matrix::bytes).collect();
        let ring = LARGEST * sizes.iter().max().unwrap_or(&0);
        Queue {
            places: places(&sizes, ring),
            matrices,
            progress: Mutex::new(Progress { missing, packed: 0, failed: false }),
            changed: Condvar::new(),
        }
    }

    /// Bytes of staging memory.
    pub(crate) fn bytes(&self) -> usize {
        self.places.iter().map(|place| place.end).max().unwrap_or(0)
    }

    pub(crate) fn matrices(&self) -> &[Matrix] {
        &self.matrices
    }

    /// Where the matrix's part of the staging memory begins.
    pub(crate) fn start(&self, matrix: usize) -> usize {
        self.places[matrix].start
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the matrices whose place it takes have been packed.
    pub(crate) fn has_room(&self, matrix: usize) -> bool {
        self.places[matrix].after <= self.lock().packed
    }

    /// Waits for that. Returns `false` if loading has failed meanwhile.
    pub(crate) fn wait_for_room(&self, matrix: usize) -> bool {
        let full = |progress: &mut Progress| !progress.failed && self.places[matrix].after > progress.packed;
        let progress = self.changed.wait_while(self.lock(), full).unwrap_or_else(PoisonError::into_inner);
        !progress.failed
    }

    /// Notes that bytes of a matrix have arrived.
    pub(crate) fn arrived(&self, matrix: usize, bytes: usize) {
        let mut progress = self.lock();
        progress.missing[matrix] -= bytes;
        if progress.missing[matrix] == 0 {
            self.changed.notify_all();
        }
    }

    /// Makes all that wait give up.
    pub(crate) fn fail(&self) {
        self.lock().failed = true;
        self.changed.notify_all();
    }

    /// Packs all matrices, each when all of it has arrived. Stops where loading fails.
    pub(crate) fn drain(
        &self,
        pack: &mut impl FnMut(&Matrix, usize) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        for (index, matrix) in self.matrices.iter().enumerate() {
            let missing = |progress: &mut Progress| !progress.failed && progress.missing[index] > 0;
            let progress = self.changed.wait_while(self.lock(), missing).unwrap_or_else(PoisonError::into_inner);
            if progress.failed {
                break;
            }
            drop(progress);
            pack(matrix, self.start(index)).inspect_err(|_| self.fail())?;
            self.lock().packed = index + 1;
            self.changed.notify_all();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use mixtral_kernels::{Family, Target};
    use mixtral_model::DType;
    use mixtral_testkit::assembly::Assembly;

    use super::*;

    fn queue(weights: &[(&str, &[usize])]) -> Queue {
        let mut a = Assembly::new(DType::Bf16);
        a.declare("norm", DType::Bf16, &[64]);
        for (i, (format, shape)) in weights.iter().enumerate() {
            a.quantized(&format!("w{i}"), format.parse().expect("a format"), shape, 1.0);
        }
        let schedule = Schedule::new(&a.program, Target { family: Family::Portable }).expect("kernels");
        Queue::new(&a.program, &schedule)
    }

    #[test]
    fn matrices_are_parts_of_tensors() {
        let queue = queue(&[("int4:g32:f16:zeros", &[3, 10, 64]), ("int8:row:f32", &[20, 64])]);
        let of = |i: usize| {
            let matrix = &queue.matrices()[i];
            let parts = matrix.parts.iter().map(|part| (part.from, part.bytes, part.at)).collect::<Vec<_>>();
            (matrix.weight, matrix.expert, matrix.rows.clone(), parts)
        };
        assert_eq!(of(0), (1, 0, 0..10, vec![(0, 320, 0), (0, 40, 512), (0, 20, 768)]));
        assert_eq!(of(2), (1, 2, 20..30, vec![(640, 320, 0), (80, 40, 512), (40, 20, 768)]));
        assert_eq!(of(3), (2, 0, 0..20, vec![(0, 1280, 0), (0, 80, 1280)]));
        // Matrices of 1024 bytes three times, and one of 1536.
        assert_eq!((queue.bytes(), queue.start(3)), (3 * 1024 + 1536, 3 * 1024));
        assert_eq!(queue.matrices()[2].at(1024), [1024, 1536, 1792]);
        // Without zeros, the launch passes the scales in their place.
        assert_eq!(queue.matrices()[3].at(0), [0, 1280, 1280]);
    }

    #[test]
    fn small_matrices_share_the_place_of_a_large_one() {
        let all = places(&[4, 4, 4, 4, 2, 2, 1, 4, 4], 16);
        let found: Vec<_> = all.iter().map(|place| (place.start, place.after)).collect();
        assert_eq!(found, [(0, 0), (4, 0), (8, 0), (12, 0), (0, 1), (2, 1), (4, 2), (5, 3), (9, 4)]);
    }

    #[test]
    fn a_matrix_waits_until_its_place_is_free() {
        let queue = queue(&[("int8:row:f32", &[9, 16, 64])]);
        let bytes = 16 * 64 + 16 * 4;
        assert!(queue.has_room(LARGEST - 1) && !queue.has_room(LARGEST));
        let mut packed = Vec::new();
        thread::scope(|scope| {
            scope.spawn(|| {
                for matrix in 0..9 {
                    assert!(queue.wait_for_room(matrix));
                    queue.arrived(matrix, 100);
                    queue.arrived(matrix, bytes - 100);
                }
            });
            let mut pack = |matrix: &Matrix, start: usize| {
                packed.push((matrix.expert, start / 1280));
                Ok(())
            };
            queue.drain(&mut pack).expect("no failure");
        });
        assert_eq!(packed, (0..9).map(|i| (i, i % LARGEST)).collect::<Vec<_>>());
    }

    #[test]
    fn a_failure_ends_all_waiting() {
        let queue = queue(&[("int8:row:f32", &[9, 16, 64])]);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| queue.wait_for_room(LARGEST));
            let packing = scope.spawn(|| queue.drain(&mut |_, _| Ok(())));
            queue.fail();
            assert!(!waiting.join().expect("no panic"));
            assert!(packing.join().expect("no panic").is_ok());
        });
        // A matrix that cannot be packed ends it too.
        let one = self::queue(&[("int8:row:f32", &[16, 64])]);
        one.arrived(0, 16 * 64 + 16 * 4);
        let refuse = |_: &Matrix, _: usize| Err(BackendError::Other("refused".to_owned()));
        assert!(one.drain(&mut { refuse }).is_err());
        assert!(!one.wait_for_room(1));
    }
}
