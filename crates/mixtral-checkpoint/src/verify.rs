//! Reads every byte of a directory's files, compares hashes with the recorded ones, and checks that elements are
//! finite.
//!
//! Files are read and not mapped. So a file that shrinks meanwhile, or a disk that fails, is a problem to report and
//! not a fault. Each worker needs only one buffer of memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use mixtral_model::DType;

use crate::progress::Progress;
use crate::scan;

/// Bytes of a worker's buffer. It is a multiple of every element's size, and small enough for the cache.
const PIECE: usize = 1 << 18;

/// Something to read and check: a tensor, or a whole file.
#[derive(Clone, Debug)]
pub struct Item {
    path: PathBuf,
    file: Arc<File>,
    /// The tensor's name; `None` for a whole file.
    tensor: Option<String>,
    /// Its first byte in the file, and how many bytes it has.
    start: u64,
    len: u64,
    /// Hex digits of its BLAKE3 when it was written, if that is recorded.
    expected: Option<String>,
    /// Its element type, if its elements must be finite.
    float: Option<DType>,
}

impl Item {
    /// The bytes `start..end` of `file`, which are the tensor `tensor`. `expected` is their hash; `float` is the type
    /// of their elements.
    #[must_use]
    pub fn tensor(
        path: &Path,
        file: &Arc<File>,
        tensor: &str,
        (start, end): (u64, u64),
        expected: Option<&str>,
        float: Option<DType>,
    ) -> Self {
        let (path, file) = (path.to_owned(), Arc::clone(file));
        let (tensor, expected) = (Some(tensor.to_owned()), expected.map(str::to_owned));
        Item { path, file, tensor, start, len: end.saturating_sub(start), expected, float }
    }

    /// All of the file `path`, whose hash should be `expected`.
    ///
    /// # Errors
    /// If it cannot be opened, as a problem to list among others.
    pub fn file(path: &Path, expected: &str) -> Result<Self, Problem> {
        let open = || {
            let file = File::open(path)?;
            let len = file.metadata()?.len();
            Ok((Arc::new(file), len))
        };
        let unreadable =
            |e: io::Error| Problem::Unreadable { path: path.to_owned(), tensor: None, detail: e.to_string() };
        let (file, len) = open().map_err(unreadable)?;
        let (path, expected) = (path.to_owned(), Some(expected.to_owned()));
        Ok(Item { path, file, tensor: None, start: 0, len, expected, float: None })
    }

    fn check(&self, buffer: &mut [u8], progress: &dyn Progress) -> Result<(), Problem> {
        let mut hasher = blake3::Hasher::new();
        let mut bad: Option<(u64, u64)> = None;
        let mut at = 0;
        while at < self.len {
            let n = usize::try_from(self.len - at).unwrap_or(PIECE).min(PIECE);
            let piece = &mut buffer[..n];
            self.file.read_exact_at(piece, self.start + at).map_err(|e| self.unreadable(&e))?;
            hasher.update(piece);
            if let Some(dtype) = self.float
                && scan::max_magnitude(dtype, piece) >= scan::infinity_bits(dtype)
                && let Some((count, first)) = scan::count_from(dtype, piece, scan::infinity_bits(dtype))
            {
                let (so_far, index) = bad.unwrap_or((0, at / dtype.size() as u64 + first));
                bad = Some((so_far + count, index));
            }
            at += n as u64;
            progress.advance(n as u64);
        }
        let (path, tensor) = (self.path.clone(), self.tensor.clone());
        let found = hasher.finalize().to_hex();
        match &self.expected {
            Some(expected) if found.as_str() != expected => {
                Err(Problem::Hash { path, tensor, expected: expected.clone(), found: found.to_string() })
            }
            _ => match bad {
                Some((count, first)) => Err(Problem::NotFinite { path, tensor, count, first }),
                None => Ok(()),
            },
        }
    }

    fn unreadable(&self, error: &io::Error) -> Problem {
        let detail = match error.kind() {
            io::ErrorKind::UnexpectedEof => "it ends early; is someone writing it?".to_owned(),
            _ => error.to_string(),
        };
        Problem::Unreadable { path: self.path.clone(), tensor: self.tensor.clone(), detail }
    }
}

/// Something that is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The bytes are not those that were written.
    #[error(
        "{}has BLAKE3 {found}, but was written with {expected}; copy the file again, or make it again",
        subject(path, tensor)
    )]
    Hash {
        /// The file.
        path: PathBuf,
        /// The tensor, if it is about one.
        tensor: Option<String>,
        /// The recorded hash.
        expected: String,
        /// The data's.
        found: String,
    },
    /// Elements that are infinite or not a number.
    #[error("{}has {count} elements that are not finite, the first at index {first}", subject(path, tensor))]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: Option<String>,
        /// How many.
        count: u64,
        /// Index of the first, in row-major order.
        first: u64,
    },
    /// A configuration without the seal that we write.
    #[error("{path} has lost its `seal`, so it was changed after it was written; make it again")]
    Unsealed {
        /// The file.
        path: PathBuf,
    },
    /// Bytes that cannot be read.
    #[error("{}cannot be read: {detail}", subject(path, tensor))]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The tensor, if it is about one.
        tensor: Option<String>,
        /// What the system said.
        detail: String,
    },
}

fn subject(path: &Path, tensor: &Option<String>) -> String {
    match tensor {
        Some(tensor) => format!("{}: tensor `{tensor}` ", path.display()),
        None => format!("{} ", path.display()),
    }
}

/// What was read, and what is wrong with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Tensors read.
    pub tensors: usize,
    /// Whole files read.
    pub files: usize,
    /// Bytes of both.
    pub bytes: u64,
    /// How many tensors have no recorded hash (in files of other tools).
    pub unhashed: usize,
    /// What is damaged, in the order of the items.
    pub problems: Vec<Problem>,
}

/// Reads and checks all `items` on `workers` threads (at least one). An item that could not be opened is already a
/// problem.
pub fn verify(items: Vec<Result<Item, Problem>>, workers: usize, progress: &dyn Progress) -> Verified {
    let mut verified = Verified::default();
    for item in items.iter().flatten() {
        verified.bytes += item.len;
        verified.unhashed += usize::from(item.expected.is_none());
    }
    for item in &items {
        let is_file = match item {
            Ok(item) => item.tensor.is_none(),
            Err(_) => true,
        };
        *(if is_file { &mut verified.files } else { &mut verified.tensors }) += 1;
    }
    progress.start(verified.bytes);
    // The largest come first, so that no worker has a large one left at the end.
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(items[i].as_ref().map_or(0, |item| item.len)));
    let next = AtomicUsize::new(0);
    let found: Mutex<Vec<(usize, Problem)>> = Mutex::default();
    let work = || {
        let mut buffer = vec![0; PIECE];
        while let Some(&index) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            let checked =
                items[index].as_ref().map_err(Clone::clone).and_then(|item| item.check(&mut buffer, progress));
            if let Err(problem) = checked {
                found.lock().unwrap_or_else(PoisonError::into_inner).push((index, problem));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..workers.clamp(1, items.len().max(1)) {
            scope.spawn(work);
        }
        work();
    });
    let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    found.sort_by_key(|(index, _)| *index);
    verified.problems = found.into_iter().map(|(_, problem)| problem).collect();
    verified
}
