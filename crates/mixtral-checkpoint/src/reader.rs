//! Opens a checkpoint: the directory, a rank's file, a tensor's bytes.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use mixtral_model::{ElemType, Rank};

use crate::config::{CheckpointConfig, ConfigFileError, is_unsealed};
use crate::header::{Header, HeaderError, TensorEntry, safetensors_name};
use crate::keys::read_text;
use crate::layout::{TensorSpec, rank_tensors};
use crate::map::FileMap;
use crate::names::{CONFIG_FILE, rank_file_name};
use crate::progress::Progress;
use crate::staged::{LOCK_FILE, finish, warn_if_older};
use crate::verify::{Item, Problem, Verified, verify};
use crate::writer::{HASH_PREFIX, OWNERSHIP, RUN_ID_KEY};

/// A checkpoint that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The directory is not there.
    #[error("there is no directory {dir}; `mixtral convert` writes a checkpoint (--output-dir)")]
    NoDirectory {
        /// The directory.
        dir: PathBuf,
    },
    /// A file in place of the directory.
    #[error("{path} is a file; name the directory that it is in")]
    NotADirectory {
        /// The file.
        path: PathBuf,
    },
    /// No `config.json`, so whatever else is in the directory is not a checkpoint.
    #[error("{dir} has no config.json, so it is no checkpoint; run `mixtral convert` to write one")]
    NoConfig {
        /// The directory.
        dir: PathBuf,
    },
    /// A writer is at work there, or was killed.
    #[error(
        "{dir} is unfinished: a conversion is writing it, or was stopped. Wait for it, or run `mixtral convert` again"
    )]
    Unfinished {
        /// The directory.
        dir: PathBuf,
    },
    /// `config.json` is wrong.
    #[error(transparent)]
    Config(#[from] ConfigFileError),
    /// A rank's file that is missing.
    #[error("rank {rank}: {path} is missing, but config.json describes {world_size} ranks; convert the model again")]
    NoRankFile {
        /// The rank.
        rank: Rank,
        /// Its file.
        path: PathBuf,
        /// Ranks that there should be.
        world_size: usize,
    },
    /// A rank that the mapping does not have.
    #[error("rank {rank} is not in {dir}, whose mapping has {world_size} ranks (0 to {})", world_size - 1)]
    NoSuchRank {
        /// The rank asked for.
        rank: Rank,
        /// The directory.
        dir: PathBuf,
        /// Ranks that there are.
        world_size: usize,
    },
    /// A rank's file cannot be opened or mapped.
    #[error("cannot open {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A rank's file is damaged.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// A rank's file of another conversion.
    #[error(
        "{path} was written by run {found}, but config.json names run {expected}; the directory mixes two conversions, convert again"
    )]
    RunId {
        /// The file.
        path: PathBuf,
        /// config.json's.
        expected: String,
        /// The file's.
        found: String,
    },
    /// A rank's file whose header changed after it was written.
    #[error(
        "{path}: the header has BLAKE3 {found}, but config.json names {expected}; the file is damaged or of another conversion, convert again"
    )]
    HeaderHash {
        /// The file.
        path: PathBuf,
        /// config.json's.
        expected: String,
        /// The file's.
        found: String,
    },
    /// All tensors that are missing or not as the config demands.
    #[error("{path} does not fit config.json:\n{}", lines(.problems))]
    Tensors {
        /// The file.
        path: PathBuf,
        /// One line each.
        problems: Vec<String>,
    },
    /// Bytes of a tensor that cannot be read.
    #[error("cannot read `{tensor}` of {path}: {source}")]
    Bytes {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A tensor that is not in the file.
    #[error("{path} has no tensor `{tensor}`")]
    NoTensor {
        /// The file.
        path: PathBuf,
        /// The name asked for.
        tensor: String,
    },
}

/// The first of `problems`, one on each line, and how many more there are.
#[must_use]
pub fn lines(problems: &[String]) -> String {
    const SHOWN: usize = 24;
    let mut text = problems[..problems.len().min(SHOWN)].join("\n");
    if problems.len() > SHOWN {
        text.push_str(&format!("\n  … and {} more", problems.len() - SHOWN));
    }
    text
}

/// A checkpoint directory.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: CheckpointConfig,
}

impl Checkpoint {
    /// Reads `dir/config.json`, but no rank file yet.
    ///
    /// # Errors
    /// If there is no complete checkpoint in `dir`.
    pub fn open(dir: &Path) -> Result<Self, ReadError> {
        let own = || dir.to_owned();
        if dir.is_file() {
            return Err(ReadError::NotADirectory { path: own() });
        }
        if !dir.is_dir() {
            return Err(ReadError::NoDirectory { dir: own() });
        }
        finish(dir, OWNERSHIP);
        if !dir.join(CONFIG_FILE).exists() {
            let unfinished = dir.join(LOCK_FILE).exists();
            return Err(match unfinished {
                true => ReadError::Unfinished { dir: own() },
                false => ReadError::NoConfig { dir: own() },
            });
        }
        let config = CheckpointConfig::read(dir)?;
        warn_if_older(dir, "mixtral convert");
        Ok(Checkpoint { dir: own(), config })
    }

    /// What `config.json` says.
    #[must_use]
    pub fn config(&self) -> &CheckpointConfig {
        &self.config
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether there are weights, or should be. A checkpoint that is only a `config.json` stands for random weights.
    #[must_use]
    pub fn has_weights(&self) -> bool {
        !self.config.headers.is_empty() || self.config.mapping.ranks().any(|rank| self.rank_path(rank).exists())
    }

    /// The file of `rank`.
    #[must_use]
    pub fn rank_path(&self, rank: Rank) -> PathBuf {
        self.dir.join(rank_file_name(rank))
    }

    /// Opens the file of `rank` and checks it against the config.
    ///
    /// # Errors
    /// If it is missing, damaged, of another run, or holds other tensors than the config demands.
    pub fn rank(&self, rank: Rank) -> Result<RankFile, ReadError> {
        let world_size = self.config.mapping.world_size();
        if rank.0 >= world_size {
            return Err(ReadError::NoSuchRank { rank, dir: self.dir.clone(), world_size });
        }
        let path = self.rank_path(rank);
        if !path.exists() {
            return Err(ReadError::NoRankFile { rank, path, world_size });
        }
        let file = RankFile::open(&path)?;
        file.check(&rank_tensors(&self.config, rank), self.config.run_id.as_deref())?;
        match self.config.headers.get(rank.0) {
            Some(expected) if file.header_blake3() != expected => {
                let (expected, found) = (expected.clone(), file.header_blake3().to_owned());
                Err(ReadError::HeaderHash { path, expected, found })
            }
            _ => Ok(file),
        }
    }

    /// Reads every byte of the checkpoint and checks it: the hashes of tensors and of the tokenizer's files, and that
    /// all elements are finite.
    ///
    /// # Errors
    /// If the config or a header is wrong. Damaged tensors and files are not errors; they are listed in
    /// [`Verified::problems`].
    pub fn verify(&self, workers: usize, progress: &dyn Progress) -> Result<Verified, ReadError> {
        let mut items = Vec::new();
        if self.has_weights() {
            for rank in self.config.mapping.ranks() {
                items.extend(self.rank(rank)?.items().into_iter().map(Ok));
            }
        }
        let config = self.dir.join(CONFIG_FILE);
        if is_unsealed(&read_text(&config).map_err(ConfigFileError::from)?) {
            items.push(Err(Problem::Unsealed { path: config }));
        }
        items.extend(self.config.files.iter().map(|(name, hash)| Item::file(&self.dir.join(name), hash)));
        Ok(verify(items, workers, progress))
    }
}

/// A tensor's bytes, where they lie in the mapped file.
#[derive(Clone, Debug)]
pub struct TensorView<'a> {
    /// Element type.
    pub elem: ElemType,
    /// Shape.
    pub shape: &'a [usize],
    /// Row-major little-endian elements, naturally aligned.
    pub bytes: &'a [u8],
}

/// A safetensors file of tensors of the [`ElemType`]s. Tensors of other types are ignored.
#[derive(Debug)]
pub struct RankFile {
    path: PathBuf,
    file: Arc<File>,
    /// The mapping, made when it is first needed. Reading and asking for shapes need no mapping.
    map: OnceLock<std::io::Result<FileMap>>,
    header_blake3: String,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, (ElemType, TensorEntry)>,
}

impl RankFile {
    /// Opens `path` and checks its header, but not which tensors it has (see [`RankFile::check`]).
    ///
    /// # Errors
    /// If it cannot be opened or is damaged.
    pub fn open(path: &Path) -> Result<Self, ReadError> {
        let io = |source| ReadError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        let Header { metadata, tensors, blake3, .. } = Header::read(&file, path)?;
        let tensors = tensors.into_iter().filter_map(|t| Some((t.name.clone(), (t.elem()?, t)))).collect();
        let (path, file, header_blake3) = (path.to_owned(), Arc::new(file), blake3.to_string());
        Ok(RankFile { path, file, map: OnceLock::new(), header_blake3, metadata, tensors })
    }

    /// The file's bytes, as many as the header describes.
    ///
    /// # Errors
    /// If the file can neither be mapped nor read into memory, or has become shorter.
    pub fn map(&self) -> Result<&[u8], ReadError> {
        let map = self.map.get_or_init(|| FileMap::new(&self.file, &self.path));
        let again = |e: &std::io::Error| std::io::Error::new(e.kind(), e.to_string());
        let map = map.as_ref().map_err(|e| ReadError::Io { path: self.path.clone(), source: again(e) })?;
        let (expected, found) = (self.tensors.values().map(|(_, t)| t.end).max().unwrap_or(0), map.len() as u64);
        if expected > found {
            return Err(HeaderError::FileLength { path: self.path.clone(), expected, found }.into());
        }
        Ok(map)
    }

    /// Checks that the file holds the tensors `specs`, aligned, and was written by run `run_id` (by another tool if
    /// that is `None`).
    ///
    /// # Errors
    /// Everything that does not fit, in one error.
    pub fn check(&self, specs: &[TensorSpec], run_id: Option<&str>) -> Result<(), ReadError> {
        if self.run_id() != run_id {
            let or_none = |id: Option<&str>| id.unwrap_or("none").to_owned();
            let (expected, found) = (or_none(run_id), or_none(self.run_id()));
            return Err(ReadError::RunId { path: self.path.clone(), expected, found });
        }
        let mut problems = Vec::new();
        for TensorSpec { name, elem, shape } in specs {
            let wanted = format!("{} {shape:?}", safetensors_name(*elem));
            match self.tensors.get(name) {
                None => problems.push(format!("  `{name}`: missing, expected {wanted}")),
                Some((found, t)) if found != elem || &t.shape != shape => {
                    problems.push(format!("  `{name}`: expected {wanted}, found {} {:?}", t.dtype, t.shape));
                }
                Some((_, t)) if !t.start.is_multiple_of(elem.size() as u64) => {
                    problems.push(format!("  `{name}`: its data starts at byte {}, which is not aligned", t.start));
                }
                Some(_) => {}
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(ReadError::Tensors { path: self.path.clone(), problems }) }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// BLAKE3 of the header, in hex.
    #[must_use]
    pub fn header_blake3(&self) -> &str {
        &self.header_blake3
    }

    /// The run that wrote the file, if the file names it.
    #[must_use]
    pub fn run_id(&self) -> Option<&str> {
        self.metadata.get(RUN_ID_KEY).map(String::as_str)
    }

    /// The BLAKE3 hash, in hex, that `tensor` was written with.
    #[must_use]
    pub fn hash(&self, tensor: &str) -> Option<&str> {
        self.metadata.get(&format!("{HASH_PREFIX}{tensor}")).map(String::as_str)
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Type and shape of the tensor `name`.
    ///
    /// # Errors
    /// If it is not in the file.
    pub fn shape(&self, name: &str) -> Result<(ElemType, &[usize]), ReadError> {
        self.entry(name).map(|(elem, entry)| (*elem, entry.shape.as_slice()))
    }

    /// The tensor `name`.
    ///
    /// # Errors
    /// If it is not in the file, or the file cannot be mapped.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, ReadError> {
        let (elem, entry) = self.entry(name)?;
        let at = |offset: u64| usize::try_from(offset).expect("inside the map");
        let bytes = &self.map()?[at(entry.start)..at(entry.end)];
        Ok(TensorView { elem: *elem, shape: &entry.shape, bytes })
    }

    fn entry(&self, name: &str) -> Result<&(ElemType, TensorEntry), ReadError> {
        let missing = || ReadError::NoTensor { path: self.path.clone(), tensor: name.to_owned() };
        self.tensors.get(name).ok_or_else(missing)
    }

    /// Copies bytes of the tensor `name` from the file, from its byte `offset` on. A caller that reads each byte once
    /// needs no mapping then.
    ///
    /// # Errors
    /// If it is not in the file, has fewer bytes, or cannot be read.
    pub fn read(&self, name: &str, offset: usize, into: &mut [u8]) -> Result<(), ReadError> {
        let (_, entry) = self.entry(name)?;
        let start = entry.start.checked_add(offset as u64);
        let start = start.filter(|&start| start.checked_add(into.len() as u64).is_some_and(|end| end <= entry.end));
        let read = match start {
            Some(start) => self.file.read_exact_at(into, start),
            None => Err(std::io::ErrorKind::UnexpectedEof.into()),
        };
        read.map_err(|source| ReadError::Bytes { path: self.path.clone(), tensor: name.to_owned(), source })
    }

    /// Every tensor as an item for [`crate::verify()`].
    #[must_use]
    pub fn items(&self) -> Vec<Item> {
        let item = |(name, (elem, t)): (&String, &(ElemType, TensorEntry))| {
            Item::tensor(&self.path, &self.file, name, (t.start, t.end), self.hash(name), elem.float())
        };
        self.tensors.iter().map(item).collect()
    }
}
