//! The engine directory: `config.json`, and for each rank `rank{r}.engine` and `rank{r}.weights.safetensors`.
//!
//! `rank{r}.engine` is a safetensors file of U8 tensors. `program` is the program's text. The other tensors are images:
//! bytes that only some backend understands, such as compiled kernels. The weight file is the checkpoint's rank file: a
//! hard link to it where the filesystem allows that, else a copy.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mixtral_checkpoint::names::{CONFIG_FILE, is_tokenizer_file};
use mixtral_checkpoint::seal::{UNSEALED, is_intact, seal};
use mixtral_checkpoint::staged::{LOCK_FILE, finish, warn_if_older};
use mixtral_checkpoint::{
    Header, HeaderError, Item, Ownership, Progress, RankFile, ReadError, StagedDir, StagedError, TensorSpec, Verified,
    disk, verify,
};
use mixtral_model::{ElemType, Mapping, ModelConfig, Rank};
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use crate::program::FORMAT_VERSION;
use crate::{BackendError, Limits, Program, TextError, Weight, WeightSource, WeightView};

/// Where an engine's weights are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum WeightsKind {
    /// In `rank{r}.weights.safetensors`.
    File,
    /// In no file: they are generated from a seed when the engine is loaded.
    Dummy {
        /// The seed.
        seed: u64,
    },
}

/// What `config.json` says of one rank's files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankRecord {
    /// BLAKE3 of the header of `rank{r}.engine` (the length and the JSON).
    pub engine_header_blake3: String,
    /// BLAKE3 of each of its tensors: of the program's text and of each image.
    pub engine_blake3: BTreeMap<String, String>,
    /// Bytes of the weight file; 0 with dummy weights.
    pub weights_bytes: u64,
    /// BLAKE3 of the weight file's header (the length and the JSON); empty with dummy weights.
    pub weights_header_blake3: String,
}

/// `config.json` of an engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EngineConfig {
    /// Version of the directory's format. This key also tells an engine from other directories.
    pub mixtral_engine_format: u32,
    /// Version of the tool that built it.
    pub tool_version: String,
    /// The file's seal ([`mixtral_checkpoint::seal`]) over everything else in it. Engines with the same id compute the
    /// same.
    pub run_id: String,
    /// Geometry of the whole model.
    pub model: ModelConfig,
    /// How it is cut into ranks.
    pub mapping: Mapping,
    /// The targets that the engine can run on: architectures that it has kernels for, and `cpu`.
    pub targets: Vec<String>,
    /// What a step may hold.
    pub limits: Limits,
    /// Whether steps can return the logits of every prompt token.
    pub gather_context_logits: bool,
    /// The build's other options, as given.
    pub options: BTreeMap<String, String>,
    /// Where the weights are.
    pub weights: WeightsKind,
    /// BLAKE3 of each of the tokenizer's files, in hex.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
    /// One record for each rank.
    pub ranks: Vec<RankRecord>,
}

/// An engine that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// No such directory.
    #[error("{dir} is not a directory; build an engine first (`mixtral build`), or name another --engine-dir")]
    NoDirectory {
        /// The path.
        dir: PathBuf,
    },
    /// A directory without `config.json`.
    #[error("{dir} has no {CONFIG_FILE}{}; build the engine first (`mixtral build --output-dir {dir}`)", if *unfinished { ": a build of it was interrupted" } else { "" })]
    NoConfig {
        /// The directory.
        dir: PathBuf,
        /// Whether a lock file says that a build died there.
        unfinished: bool,
    },
    /// A file operation failed.
    #[error("cannot read {path}: {source}{}", if source.kind() == std::io::ErrorKind::NotFound { "; the engine is incomplete, build it again" } else { "" })]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A `config.json` that is not an engine's.
    #[error("{path} is not an engine's: {hint}")]
    NotAnEngine {
        /// The file.
        path: PathBuf,
        /// What the file seems to be, and what to do.
        hint: &'static str,
    },
    /// A `config.json` that cannot be read.
    #[error("{path}: {detail}; the engine is damaged, build it again")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// An engine of another format.
    #[error(
        "{path} has engine format {found}, but this version of mixtral reads format {FORMAT_VERSION}; build the engine again from its checkpoint (`mixtral build`)"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u64,
    },
    /// A rank that the engine does not have.
    #[error(
        "rank {rank} of an engine of {world_size} ranks; start {world_size} processes, or build for another mapping"
    )]
    NoSuchRank {
        /// The rank.
        rank: Rank,
        /// Ranks of the engine.
        world_size: usize,
    },
    /// A file whose bytes changed after it was written.
    #[error(
        "{path}: {what} has BLAKE3 {found}, but {CONFIG_FILE} names {expected}; the files are damaged or of different runs, make the directory again"
    )]
    Hash {
        /// The file.
        path: PathBuf,
        /// Which part of it.
        what: &'static str,
        /// The config's.
        expected: String,
        /// The file's.
        found: String,
    },
    /// A config that was edited or damaged.
    #[error("{path} was changed after it was written; build the engine again")]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A weight file of another length.
    #[error("{path} is {found} bytes, but {CONFIG_FILE} names {expected}; the file is damaged, build the engine again")]
    Length {
        /// The file.
        path: PathBuf,
        /// The config's.
        expected: u64,
        /// The file's.
        found: u64,
    },
    /// A weight whose type or shape is not what the program reads.
    #[error("{path}: tensor `{tensor}` is {found}, but the program reads {expected}; build the engine again")]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The program's type and shape.
        expected: String,
        /// The file's.
        found: String,
    },
    /// A damaged safetensors file.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// A damaged weight file.
    #[error(transparent)]
    Weights(#[from] ReadError),
    /// A program that cannot be read.
    #[error("{path}: {source}")]
    Program {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: TextError,
    },
    /// The directory cannot be written.
    #[error(transparent)]
    Write(#[from] StagedError),
    /// A program that does not match the config.
    #[error("{path}: the program is for rank {found}, expected {expected}; build the engine again")]
    Mixed {
        /// The file.
        path: PathBuf,
        /// What the config says.
        expected: String,
        /// What the program says.
        found: String,
    },
}

/// `rank{r}.engine`.
#[must_use]
pub fn engine_file_name(rank: Rank) -> String {
    format!("rank{rank}.engine")
}

/// `rank{r}.weights.safetensors`.
#[must_use]
pub fn weights_file_name(rank: Rank) -> String {
    format!("rank{rank}.weights.safetensors")
}

fn is_engine_file(name: &str) -> bool {
    let middle = name
        .strip_prefix("rank")
        .and_then(|rest| rest.strip_suffix(".engine").or_else(|| rest.strip_suffix(".weights.safetensors")));
    middle.is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
}

/// How to tell an engine directory from one of the user's own.
pub const OWNERSHIP: Ownership = Ownership {
    what: "an engine",
    owns: |name| is_engine_file(name) || is_tokenizer_file(name),
    is_marker: |text| {
        serde_json::from_slice::<serde_json::Value>(text).is_ok_and(|v| v.get("mixtral_engine_format").is_some())
    },
};

/// The name of the tensor that holds the program's text.
const PROGRAM: &str = "program";

/// An engine config, program text or image larger than this is refused.
const MAX_TENSOR_BYTES: u64 = 256 << 20;

/// An engine directory.
#[derive(Clone, Debug)]
pub struct EngineDir {
    dir: PathBuf,
    config: EngineConfig,
}

impl EngineDir {
    /// Reads `dir/config.json`.
    ///
    /// # Errors
    /// If there is no complete engine of this version in `dir`.
    pub fn open(dir: &Path) -> Result<Self, EngineError> {
        if !dir.is_dir() {
            return Err(EngineError::NoDirectory { dir: dir.to_owned() });
        }
        finish(dir, OWNERSHIP);
        let path = dir.join(CONFIG_FILE);
        if !path.exists() {
            return Err(EngineError::NoConfig { dir: dir.to_owned(), unfinished: dir.join(LOCK_FILE).exists() });
        }
        let io = |source| EngineError::Io { path: path.clone(), source };
        let damaged = |detail: String| EngineError::Config { path: path.clone(), detail };
        let len = fs::metadata(&path).map_err(io)?.len();
        if len > MAX_TENSOR_BYTES {
            return Err(damaged(format!("{len} bytes, expected at most {MAX_TENSOR_BYTES}")));
        }
        let text = fs::read(&path).map_err(io)?;
        let value: serde_json::Value = serde_json::from_slice(&text).map_err(|e| damaged(e.to_string()))?;
        let hint = if value.get("architecture").is_some() {
            Some("it is a checkpoint's; build an engine from it (`mixtral build --checkpoint-dir`)")
        } else if value.get("model_type").is_some() {
            Some("it is a Hugging Face model's; run `mixtral convert` and `mixtral build` first")
        } else if value.get("mixtral_engine_format").is_none() {
            Some("it has no `mixtral_engine_format`; name a directory that `mixtral build` wrote")
        } else {
            None
        };
        if let Some(hint) = hint {
            return Err(EngineError::NotAnEngine { path, hint });
        }
        let found = value["mixtral_engine_format"].as_u64().unwrap_or(0);
        if found != u64::from(FORMAT_VERSION) {
            return Err(EngineError::Version { path, found });
        }
        let config: EngineConfig = serde_json::from_value(value).map_err(|e| damaged(e.to_string()))?;
        config.model.validate().map_err(|e| damaged(e.to_string()))?;
        config.mapping.validate(&config.model).map_err(|e| damaged(e.to_string()))?;
        if config.ranks.len() != config.mapping.world_size() {
            let (found, expected) = (config.ranks.len(), config.mapping.world_size());
            return Err(damaged(format!("`ranks` has {found} entries, expected {expected}")));
        }
        config.limits.check().map_err(|e| damaged(e.to_string()))?;
        // The seal is checked last, because a message about one wrong key is better than this one.
        if !is_intact(&text, &config.run_id) {
            return Err(EngineError::Changed { path });
        }
        warn_if_older(dir, "mixtral build");
        Ok(EngineDir { dir: dir.to_owned(), config })
    }

    /// What `config.json` says.
    #[must_use]
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn record(&self, rank: Rank) -> Result<&RankRecord, EngineError> {
        let world_size = self.config.ranks.len();
        self.config.ranks.get(rank.0).ok_or(EngineError::NoSuchRank { rank, world_size })
    }

    /// Reads and checks the program of `rank`.
    ///
    /// # Errors
    /// If its file is missing, damaged, or of another engine.
    pub fn program(&self, rank: Rank) -> Result<Program, EngineError> {
        let (path, text) = self.tensor(rank, PROGRAM, "the program")?;
        let damaged = |detail: String| EngineError::Config { path: path.clone(), detail };
        let text = String::from_utf8(text).map_err(|e| damaged(e.to_string()))?;
        let program = Program::parse(&text).map_err(|source| EngineError::Program { path: path.clone(), source })?;
        if (program.rank, program.world_size) != (rank.0, self.config.ranks.len()) {
            return Err(EngineError::Mixed {
                path,
                expected: format!("{rank} of {}", self.config.ranks.len()),
                found: format!("{} of {}", program.rank, program.world_size),
            });
        }
        Ok(program)
    }

    /// Checks that the weight file of a rank has every weight that its program reads, with that type and shape.
    ///
    /// # Errors
    /// If the file is missing, damaged, or of another engine, or if it lacks a weight.
    pub fn check_weights(&self, program: &Program) -> Result<(), EngineError> {
        check_weights(program, &self.weight_file(Rank(program.rank))?)
    }

    /// The names of the images that the engine of `rank` holds beside its program. Backends know what they mean.
    ///
    /// # Errors
    /// If the engine has no such rank.
    pub fn images(&self, rank: Rank) -> Result<Vec<&str>, EngineError> {
        Ok(self.record(rank)?.engine_blake3.keys().map(String::as_str).filter(|name| *name != PROGRAM).collect())
    }

    /// Reads an image and checks its hash.
    ///
    /// # Errors
    /// If its file is missing, damaged, or of another engine, or has no such image.
    pub fn image(&self, rank: Rank, name: &str) -> Result<Vec<u8>, EngineError> {
        Ok(self.tensor(rank, name, "an image")?.1)
    }

    /// The bytes of a tensor of `rank{r}.engine`, and the file's path.
    fn tensor(&self, rank: Rank, name: &str, what: &'static str) -> Result<(PathBuf, Vec<u8>), EngineError> {
        let record = self.record(rank)?;
        let path = self.dir.join(engine_file_name(rank));
        let io = |source| EngineError::Io { path: path.clone(), source };
        let damaged = |detail: String| EngineError::Config { path: path.clone(), detail };
        let file = File::open(&path).map_err(io)?;
        let header = Header::read(&file, &path)?;
        same_hash(&path, "the header", &record.engine_header_blake3, header.blake3)?;
        let entry = header.tensors.iter().find(|t| t.name == name);
        let entry = entry.ok_or_else(|| damaged(format!("it has no `{name}` tensor")))?;
        let len = entry.num_bytes();
        if len > MAX_TENSOR_BYTES {
            return Err(damaged(format!("`{name}` has {len} bytes, expected at most {MAX_TENSOR_BYTES}")));
        }
        let mut bytes = vec![0; usize::try_from(len).map_err(|e| damaged(e.to_string()))?];
        file.read_exact_at(&mut bytes, entry.start).map_err(io)?;
        let expected = record.engine_blake3.get(name).map_or("none", String::as_str);
        same_hash(&path, what, expected, blake3::hash(&bytes))?;
        Ok((path, bytes))
    }

    /// Opens the weight file of `rank`, and checks its length and header against the config.
    ///
    /// # Errors
    /// If it is missing, damaged, or of another engine.
    pub fn weight_file(&self, rank: Rank) -> Result<RankFile, EngineError> {
        let record = self.record(rank)?;
        let path = self.dir.join(weights_file_name(rank));
        let (found, hash) = weight_file_identity(&path)?;
        if found != record.weights_bytes {
            return Err(EngineError::Length { path, expected: record.weights_bytes, found });
        }
        same_hash(&path, "the header", &record.weights_header_blake3, hash)?;
        Ok(RankFile::open(&path)?)
    }

    /// Reads every byte of the engine and checks it: the hashes of programs, images, weights and the tokenizer's files,
    /// that all weights are finite, and that they are the weights that the programs read.
    ///
    /// # Errors
    /// If the config, a header or a program is wrong. Other damage is not an error; it is listed in
    /// [`Verified::problems`].
    pub fn verify(&self, workers: usize, progress: &dyn Progress) -> Result<Verified, EngineError> {
        let mut items = Vec::new();
        for (rank, record) in self.config.mapping.ranks().zip(&self.config.ranks) {
            let program = self.program(rank)?;
            let path = self.dir.join(engine_file_name(rank));
            let file = File::open(&path).map_err(|source| EngineError::Io { path: path.clone(), source })?;
            let header = Header::read(&file, &path)?;
            let file = Arc::new(file);
            for t in &header.tensors {
                let hash = record.engine_blake3.get(&t.name).map(String::as_str);
                items.push(Ok(Item::tensor(&path, &file, &t.name, (t.start, t.end), hash, None)));
            }
            if self.config.weights == WeightsKind::File {
                let weights = self.weight_file(rank)?;
                check_weights(&program, &weights)?;
                items.extend(weights.items().into_iter().map(Ok));
            }
        }
        items.extend(self.config.files.iter().map(|(name, hash)| Item::file(&self.dir.join(name), hash)));
        Ok(verify(items, workers, progress))
    }
}

fn same_hash(path: &Path, what: &'static str, expected: &str, found: blake3::Hash) -> Result<(), EngineError> {
    let found = found.to_string();
    if found == expected {
        return Ok(());
    }
    Err(EngineError::Hash { path: path.to_owned(), what, expected: expected.to_owned(), found })
}

/// Checks that the file has every weight that the program reads, with that type and shape.
fn check_weights(program: &Program, file: &RankFile) -> Result<(), EngineError> {
    for TensorSpec { name, elem, shape } in program.weights.iter().flat_map(Weight::tensors) {
        let found = file.shape(&name)?;
        if found != (elem, shape.as_slice()) {
            return Err(EngineError::Shape {
                path: file.path().to_owned(),
                tensor: name,
                expected: format!("{elem} {shape:?}"),
                found: format!("{} {:?}", found.0, found.1),
            });
        }
    }
    Ok(())
}

/// Length of a weight file and BLAKE3 of its header.
fn weight_file_identity(path: &Path) -> Result<(u64, blake3::Hash), EngineError> {
    let io = |source| EngineError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    let header = Header::read(&file, path)?;
    Ok((file.metadata().map_err(io)?.len(), header.blake3))
}

/// A rank file as a source of weights. It is mapped when a weight is first asked for.
pub struct MappedWeights(pub RankFile);

impl WeightSource for MappedWeights {
    fn weight(&self, name: &str) -> Option<WeightView<'_>> {
        let tensor = self.0.tensor(name).ok()?;
        Some(WeightView { elem: tensor.elem, shape: tensor.shape, bytes: tensor.bytes })
    }

    fn shape(&self, name: &str) -> Option<(ElemType, &[usize])> {
        self.0.shape(name).ok()
    }

    fn read(&self, name: &str, offset: usize, into: &mut [u8]) -> Result<(), BackendError> {
        self.0.read(name, offset, into).map_err(|error| BackendError::Other(error.to_string()))
    }
}

/// An engine that is being written. If it is dropped without [`EngineWriter::finish`], nothing is left of it.
pub struct EngineWriter {
    staged: StagedDir,
}

impl EngineWriter {
    /// Locks `dir`. An engine that is already in it stays until [`EngineWriter::finish`].
    ///
    /// # Errors
    /// If the directory is locked, holds files that are not an engine's, or cannot be written.
    pub fn create(dir: &Path) -> Result<Self, EngineError> {
        Ok(EngineWriter { staged: StagedDir::begin(dir, OWNERSHIP)? })
    }

    /// Writes the program of a rank and its images, and links or copies its weight file, if there is one.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn rank(
        &self,
        program: &Program,
        images: &BTreeMap<String, Vec<u8>>,
        weights: Option<&Path>,
    ) -> Result<RankRecord, EngineError> {
        let rank = Rank(program.rank);
        let text = program.to_text();
        let path = self.staged.path(&engine_file_name(rank));
        let failed = |source| EngineError::Write(StagedError::Io { action: "write", path: path.clone(), source });
        let other = |e| failed(std::io::Error::other(e));
        let images = images.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()));
        let tensors: Vec<(&str, &[u8])> = images.chain([(PROGRAM, text.as_bytes())]).collect();
        let views =
            tensors.iter().map(|(name, bytes)| Ok((*name, TensorView::new(Dtype::U8, vec![bytes.len()], bytes)?)));
        let views: Vec<_> = views.collect::<Result<_, _>>().map_err(other)?;
        let bytes = safetensors::serialize(views, None).map_err(other)?;
        let write = || {
            fs::write(&path, &bytes)?;
            let file = File::open(&path)?;
            disk::sync(&file, &path).map(|()| file)
        };
        let file = write().map_err(failed)?;
        let hashes = tensors.iter().map(|(name, bytes)| ((*name).to_owned(), blake3::hash(bytes).to_string()));
        let mut record = RankRecord {
            engine_header_blake3: Header::read(&file, &path)?.blake3.to_string(),
            engine_blake3: hashes.collect(),
            weights_bytes: 0,
            weights_header_blake3: String::new(),
        };
        if let Some(from) = weights {
            let name = weights_file_name(rank);
            if fs::hard_link(from, self.staged.path(&name)).is_err() {
                self.staged.copy_in(&name, from)?;
            }
            let (len, hash) = weight_file_identity(&self.staged.path(&name))?;
            (record.weights_bytes, record.weights_header_blake3) = (len, hash.to_string());
        }
        Ok(record)
    }

    /// Copies a file of the tokenizer into the engine and returns its hash. `expected` is the hash that it should have,
    /// if that is known.
    ///
    /// # Errors
    /// If it cannot be read or written, or has another hash.
    pub fn copy_in(&self, name: &str, from: &Path, expected: Option<&String>) -> Result<blake3::Hash, EngineError> {
        let found = self.staged.copy_in(name, from)?;
        expected.map_or(Ok(()), |expected| same_hash(from, "the file", expected, found))?;
        Ok(found)
    }

    /// Sets the run id and writes `config.json`, which makes the engine valid.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn finish(self, mut config: EngineConfig) -> Result<EngineConfig, EngineError> {
        config.run_id = UNSEALED.to_owned();
        let path = self.staged.dir().join(CONFIG_FILE);
        let damaged = |e: serde_json::Error| EngineError::Config { path: path.clone(), detail: e.to_string() };
        let text = seal(&(serde_json::to_string_pretty(&config).map_err(damaged)? + "\n"));
        config = serde_json::from_str(&text).map_err(damaged)?;
        self.staged.commit(text.as_bytes())?;
        Ok(config)
    }
}
