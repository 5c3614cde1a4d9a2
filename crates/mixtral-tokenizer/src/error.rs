//! Why a tokenizer cannot be loaded or used.

use std::path::{Path, PathBuf};

/// A tokenizer that cannot be loaded or used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenizerError {
    /// The directory has none of the files that can be a tokenizer.
    #[error(
        "{dir} has no tokenizer (tokenizer.json, tekken.json or tokenizer.model); name the model's directory with --tokenizer-dir, or give token ids (--input-file ids.csv) and take them (--output-csv)"
    )]
    Missing {
        /// The directory.
        dir: PathBuf,
    },
    /// A file that cannot be read.
    #[error("cannot read {path}: {detail}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        detail: String,
    },
    /// A text that cannot be encoded, or ids that cannot be decoded.
    #[error("the tokenizer failed to {action}: {detail}")]
    Use {
        /// `encode a text` or `decode ids`.
        action: &'static str,
        /// What it said.
        detail: String,
    },
}

/// How the files begin that Git LFS puts in the place of large ones.
pub(crate) const GIT_LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

impl TokenizerError {
    /// The error for a file that is not what its name says. It names what people most often have in its place.
    pub(crate) fn unreadable(path: &Path, bytes: &[u8], detail: impl ToString) -> Self {
        let start = bytes.trim_ascii_start();
        let detail = if start.is_empty() {
            "the file is empty; download it again".to_owned()
        } else if start.starts_with(GIT_LFS_POINTER) {
            "it is a Git LFS pointer, not the file itself; run `git lfs pull` in the model's repository, or download the file".to_owned()
        } else if start.starts_with(b"<!") || start.starts_with(b"<html") {
            "it is a web page, not the file itself; download the file again, by its raw address".to_owned()
        } else {
            format!("{}; it is damaged or was cut off: download it again", detail.to_string())
        };
        TokenizerError::Read { path: path.to_owned(), detail }
    }
}
