//! Why a model could not be calibrated.

use std::path::PathBuf;

use mixtral_build::BuildError;
use mixtral_checkpoint::ReadError;
use mixtral_convert::ConvertError;
use mixtral_engine::BackendError;
use mixtral_kernels::LowerError;
use mixtral_tokenizer::TokenizerError;

/// Why a model could not be calibrated.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    /// The model.
    #[error(transparent)]
    Model(#[from] ConvertError),
    /// A step of the model.
    #[error("calibration: {0}")]
    Backend(#[from] BackendError),
    /// Kernels for a GPU.
    #[error("calibration: {0}")]
    Kernels(#[from] BuildError),
    /// A program that has no kernels.
    #[error("calibration: {0}; run it with --backend cpu")]
    Lower(#[from] LowerError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A file that cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of statistics that would be written to a folder which is not there.
    #[error("cannot write {path}: there is no directory {dir}; create it first")]
    NoFolder {
        /// The file.
        path: PathBuf,
        /// The folder.
        dir: PathBuf,
    },
    /// A file of statistics with numbers that calibration does not write.
    #[error(
        "{path}: `{tensor}` has numbers that are not finite, so the file is damaged; remove it, and calibrate again"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A line of calibration data that cannot be used.
    #[error("{path}, line {line}: {problem}")]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// Data without a token.
    #[error(
        "{path} has no text to calibrate with; name a file with text, JSON lines with a \"text\", or lines of token ids"
    )]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Text, but no tokenizer.
    #[error(
        "the calibration data in {path} is text, and {dir} has no tokenizer; name a file with lines of token ids instead"
    )]
    NoTokenizer {
        /// The file.
        path: PathBuf,
        /// The model's directory.
        dir: PathBuf,
    },
    /// No token to begin a text with.
    #[error("{dir} has no tokenizer that says how a text starts, so the model cannot write its own; give --calib-data")]
    NoStart {
        /// The model's directory.
        dir: PathBuf,
    },
    /// Input that is not finite.
    #[error(
        "calibration: the inputs of {input} are not finite; if the model was trained in bf16, convert it with --dtype bfloat16"
    )]
    NotFinite {
        /// Which input.
        input: String,
    },
    /// A file of statistics that cannot be read.
    #[error(transparent)]
    Cache(#[from] ReadError),
    /// A file of statistics of another model.
    #[error(
        "{path} holds the statistics of another model ({found}); this one has {this}; name another file with --calib-cache, or remove it"
    )]
    OtherModel {
        /// The file.
        path: PathBuf,
        /// That model.
        found: String,
        /// The one that is calibrated.
        this: String,
    },
}
