//! Writes a checkpoint: first the rank files, from several threads and with random access, computing hashes on the way;
//! `config.json` last.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use mixtral_model::Rank;
use serde_json::{Map, Value, json};

use crate::config::{CheckpointConfig, is_ours};
use crate::disk;
use crate::header::{LENGTH_BYTES, safetensors_name};
use crate::layout::{TensorSpec, rank_tensors};
use crate::names::{is_rank_file, is_tokenizer_file, rank_file_name};
use crate::staged::{Ownership, StagedDir, StagedError};

/// Metadata key of the run that wrote a rank file.
pub const RUN_ID_KEY: &str = "run_id";

/// Metadata key prefix of a tensor's BLAKE3 hash.
pub const HASH_PREFIX: &str = "blake3:";

/// Hex digits of a run id.
const RUN_ID_LEN: usize = 32;

/// Tensor data starts at a multiple of this many bytes.
const DATA_ALIGNMENT: usize = 64;

/// How to tell a checkpoint directory from one of the user's own.
pub const OWNERSHIP: Ownership =
    Ownership { what: "a checkpoint", owns: |name| is_rank_file(name) || is_tokenizer_file(name), is_marker: is_ours };

/// A checkpoint that cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The directory.
    #[error(transparent)]
    Staged(#[from] StagedError),
    /// A tensor that was given more or fewer bytes than its shape has: a bug of the caller.
    #[error("tensor `{tensor}` of {path} was given {found} bytes; its shape has {expected}")]
    Length {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Bytes of its shape.
        expected: u64,
        /// Bytes given.
        found: u64,
    },
}

/// A checkpoint that is being written. If it is dropped without [`CheckpointWriter::finish`], nothing is left of it.
#[derive(Debug)]
pub struct CheckpointWriter {
    staged: StagedDir,
    config: CheckpointConfig,
    ranks: Vec<RankWriter>,
}

impl CheckpointWriter {
    /// Prepares `dir`, and unless `config_only`, a file of full length for each rank.
    ///
    /// # Errors
    /// If the directory is not ours to write, or the disk is full. `config` must be valid.
    pub fn create(dir: &Path, mut config: CheckpointConfig, config_only: bool) -> Result<Self, WriteError> {
        (config.run_id, config.headers) = (None, Vec::new());
        config.files.clear();
        let staged = StagedDir::begin(dir, OWNERSHIP)?;
        let mut ranks = Vec::new();
        if !config_only {
            let tensors = config.mapping.ranks().flat_map(|rank| rank_tensors(&config, rank));
            staged.reserve(tensors.fold(0, |sum, tensor| tensor.num_bytes().saturating_add(sum)))?;
            for rank in config.mapping.ranks() {
                let path = staged.path(&rank_file_name(rank));
                ranks.push(RankWriter::create(path, rank, rank_tensors(&config, rank))?);
            }
        }
        Ok(CheckpointWriter { staged, config, ranks })
    }

    /// The file of each rank. Several threads may write them at the same time.
    #[must_use]
    pub fn ranks(&self) -> &[RankWriter] {
        &self.ranks
    }

    /// Copies one of the tokenizer's files into the checkpoint, and records its hash.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub fn copy_in(&mut self, name: &str, from: &Path) -> Result<(), WriteError> {
        let hash = self.staged.copy_in(name, from)?;
        self.config.files.insert(name.to_owned(), hash.to_string());
        Ok(())
    }

    /// Writes one of the tokenizer's files, and records its hash.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_in(&mut self, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
        let hash = self.staged.write_in(name, bytes)?;
        self.config.files.insert(name.to_owned(), hash.to_string());
        Ok(())
    }

    /// Writes the headers, then `config.json`, waits until they are on the disk, and returns the run id.
    ///
    /// The run id is a hash of all tensors and of the config without the tokenizer's files, so the same model gives the
    /// same bytes.
    ///
    /// # Errors
    /// If a file cannot be written, or a tensor was not written.
    pub fn finish(mut self) -> Result<Option<String>, WriteError> {
        if !self.ranks.is_empty() {
            let mut hasher = blake3::Hasher::new();
            let unnamed = CheckpointConfig { files: BTreeMap::new(), ..self.config.clone() };
            hasher.update(unnamed.to_json().as_bytes());
            let hashes = self.ranks.iter().map(RankWriter::hashes).collect::<Result<Vec<_>, _>>()?;
            hashes.iter().flatten().for_each(|hash| {
                hasher.update(hash.as_bytes());
            });
            let mut run_id = hasher.finalize().to_hex().to_string();
            run_id.truncate(RUN_ID_LEN);
            for (rank, hashes) in self.ranks.iter().zip(&hashes) {
                self.config.headers.push(rank.write_header(&run_id, hashes)?.to_string());
            }
            for rank in &self.ranks {
                rank.sync()?;
            }
            self.config.run_id = Some(run_id);
        }
        // Some file systems cannot move a file that is open.
        self.ranks.clear();
        self.staged.commit(self.config.to_json().as_bytes())?;
        Ok(self.config.run_id)
    }
}

/// One rank's safetensors file that is being written. The room for the header stays free until all hashes are known.
#[derive(Debug)]
pub struct RankWriter {
    file: File,
    path: PathBuf,
    rank: Rank,
    tensors: Vec<TensorSpec>,
    /// The hash of each tensor that is complete.
    hashes: Vec<OnceLock<blake3::Hash>>,
    /// First byte of each tensor, counted from the start of the file.
    starts: Vec<u64>,
    /// Bytes of the header, without the bytes of its length.
    header_len: usize,
}

impl RankWriter {
    /// Creates the file at its full length. Tensors with larger elements come first, so that all are aligned.
    ///
    /// # Errors
    /// If it cannot be created, or the disk is too full for it.
    pub fn create(path: PathBuf, rank: Rank, mut tensors: Vec<TensorSpec>) -> Result<Self, WriteError> {
        tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.elem.size()));
        let unknown = vec![blake3::Hash::from_bytes([0; 32]); tensors.len()];
        let text_len = header_text(rank, &tensors, &"0".repeat(RUN_ID_LEN), &unknown).len();
        let header_len = (8 + text_len).next_multiple_of(DATA_ALIGNMENT) - 8;
        let mut at = LENGTH_BYTES + header_len as u64;
        let mut starts = Vec::with_capacity(tensors.len());
        for tensor in &tensors {
            starts.push(at);
            at += tensor.num_bytes();
        }
        let open = || {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)?;
            disk::allocate(&file, at)?;
            Ok(file)
        };
        let file = match open() {
            Ok(file) => file,
            Err(source) => return Err(StagedError::Io { action: "create", path, source }.into()),
        };
        let hashes = tensors.iter().map(|_| OnceLock::new()).collect();
        Ok(RankWriter { file, path, rank, tensors, hashes, starts, header_len })
    }

    /// The rank.
    #[must_use]
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// The tensors, in the order of the file.
    #[must_use]
    pub fn tensors(&self) -> &[TensorSpec] {
        &self.tensors
    }

    /// Starts to write a tensor. Different tensors may be written at the same time.
    ///
    /// # Panics
    /// If the rank has no tensor of this name.
    #[must_use]
    pub fn tensor(&self, name: &str) -> TensorWriter<'_> {
        let index = self.tensors.iter().position(|tensor| tensor.name == name);
        let index = index.unwrap_or_else(|| panic!("rank {} has no tensor `{name}`", self.rank));
        TensorWriter { rank: self, index, written: 0, hasher: blake3::Hasher::new() }
    }

    /// The hashes of all tensors, in the order of the file.
    fn hashes(&self) -> Result<Vec<blake3::Hash>, WriteError> {
        let of = |(index, hash): (usize, &OnceLock<blake3::Hash>)| {
            hash.get().copied().ok_or_else(|| self.wrong_length(index, 0))
        };
        self.hashes.iter().enumerate().map(of).collect()
    }

    fn wrong_length(&self, index: usize, found: u64) -> WriteError {
        let TensorSpec { name, .. } = &self.tensors[index];
        let (path, tensor) = (self.path.clone(), name.clone());
        WriteError::Length { path, tensor, expected: self.tensors[index].num_bytes(), found }
    }

    /// Waits until everything written is on the disk.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn sync(&self) -> Result<(), WriteError> {
        Ok(disk::sync(&self.file, &self.path).map_err(|source| self.failed(source))?)
    }

    fn failed(&self, source: std::io::Error) -> StagedError {
        StagedError::Io { action: "write", path: self.path.clone(), source }
    }

    /// Writes the header and returns its BLAKE3.
    fn write_header(&self, run_id: &str, hashes: &[blake3::Hash]) -> Result<blake3::Hash, WriteError> {
        let mut text = header_text(self.rank, &self.tensors, run_id, hashes);
        debug_assert!(text.len() <= self.header_len && self.header_len - text.len() < DATA_ALIGNMENT);
        text.resize(self.header_len, b' ');
        let mut bytes = (self.header_len as u64).to_le_bytes().to_vec();
        bytes.append(&mut text);
        self.file.write_all_at(&bytes, 0).map_err(|source| self.failed(source))?;
        Ok(blake3::hash(&bytes))
    }
}

/// The header's JSON. Its length depends only on the rank and the tensors.
fn header_text(rank: Rank, tensors: &[TensorSpec], run_id: &str, hashes: &[blake3::Hash]) -> Vec<u8> {
    let mut metadata = Map::new();
    // transformers only loads files with a `format`.
    metadata.insert("format".into(), json!("pt"));
    metadata.insert("rank".into(), json!(rank.to_string()));
    metadata.insert(RUN_ID_KEY.into(), json!(run_id));
    let mut root = Map::new();
    let mut start = 0;
    let mut entries = Map::new();
    for (tensor, hash) in tensors.iter().zip(hashes) {
        let TensorSpec { name, elem, shape } = tensor;
        metadata.insert(format!("{HASH_PREFIX}{name}"), json!(hash.to_hex().as_str()));
        let end = start + tensor.num_bytes();
        let dtype = safetensors_name(*elem);
        entries.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] }));
        start = end;
    }
    root.insert("__metadata__".into(), Value::Object(metadata));
    root.append(&mut entries);
    serde_json::to_vec(&root).expect("a map with string keys serializes")
}

/// One tensor that is being written from its first byte to its last, and hashed on the way.
#[derive(Debug)]
pub struct TensorWriter<'a> {
    rank: &'a RankWriter,
    index: usize,
    written: u64,
    hasher: blake3::Hasher,
}

impl TensorWriter<'_> {
    /// Appends `bytes`.
    ///
    /// # Errors
    /// If they cannot be written, or are more bytes than the tensor has.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        let end = self.written + bytes.len() as u64;
        if end > self.rank.tensors[self.index].num_bytes() {
            return Err(self.rank.wrong_length(self.index, end));
        }
        self.hasher.update(bytes);
        let at = self.rank.starts[self.index] + self.written;
        self.rank.file.write_all_at(bytes, at).map_err(|source| self.rank.failed(source))?;
        self.written = end;
        Ok(())
    }

    /// Keeps the tensor's hash for the header, once the tensor is complete.
    ///
    /// # Errors
    /// If bytes are missing.
    pub fn finish(self) -> Result<(), WriteError> {
        if self.written != self.rank.tensors[self.index].num_bytes() {
            return Err(self.rank.wrong_length(self.index, self.written));
        }
        // A tensor that is written twice keeps the first hash; no caller writes one twice.
        let _ = self.rank.hashes[self.index].set(self.hasher.finalize());
        Ok(())
    }
}
