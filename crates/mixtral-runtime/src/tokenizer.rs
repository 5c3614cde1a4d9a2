//! Text ↔ token ids, by the model's own `tokenizer.json`.

use std::path::{Path, PathBuf};

use mixtral_model::TokenId;
use serde_json::Value;

use crate::guard::guarded;

/// A tokenizer that cannot be loaded or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// No tokenizer.json.
    #[error(
        "{dir} has no tokenizer.json; name the model's directory with --tokenizer-dir, or give token ids (--input-file ids.csv) and take them (--output-csv)"
    )]
    Missing {
        /// The directory.
        dir: PathBuf,
    },
    /// Only a SentencePiece model.
    #[error(
        "{dir} has tokenizer.model but no tokenizer.json; make one with transformers: `AutoTokenizer.from_pretrained(\"{dir}\").save_pretrained(\"{dir}\")`, or take the tokenizer.json of the model's page, and name its directory with --tokenizer-dir"
    )]
    OnlySentencePiece {
        /// The directory.
        dir: PathBuf,
    },
    /// A file that cannot be read.
    #[error("cannot read {path}: {detail}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What is wrong.
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

/// A model's tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    end_ids: Vec<TokenId>,
}

/// The state of a stream being decoded.
#[derive(Clone, Debug, Default)]
pub struct DecodeState {
    ids: Vec<u32>,
    prefix: String,
    prefix_index: usize,
}

impl Tokenizer {
    /// Loads `dir/tokenizer.json`, and the end ids that the files beside it name.
    ///
    /// # Errors
    /// If there is none, or it cannot be read.
    pub fn load(dir: &Path) -> Result<Self, TokenizerError> {
        let path = dir.join("tokenizer.json");
        if !path.exists() {
            let dir = dir.to_owned();
            return Err(if dir.join("tokenizer.model").exists() {
                TokenizerError::OnlySentencePiece { dir }
            } else {
                TokenizerError::Missing { dir }
            });
        }
        let inner = guarded(|| tokenizers::Tokenizer::from_file(&path).map_err(|e| e.to_string()))
            .flatten()
            .map_err(|detail| TokenizerError::Read { path: path.clone(), detail })?;
        let end_ids = end_ids(dir, &inner)?;
        Ok(Tokenizer { inner, end_ids })
    }

    /// The ids of `text`, with the model's start token in front unless `add_special_tokens` is off.
    ///
    /// # Errors
    /// If the tokenizer cannot encode it.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<TokenId>, TokenizerError> {
        let encoding = used("encode a text", || self.inner.encode(text, add_special_tokens))?;
        Ok(encoding.get_ids().iter().copied().map(TokenId).collect())
    }

    /// The text of `ids`, special tokens left out.
    ///
    /// # Errors
    /// If the tokenizer cannot decode them.
    pub fn decode(&self, ids: &[TokenId]) -> Result<String, TokenizerError> {
        let ids: Vec<u32> = ids.iter().map(|t| t.0).collect();
        used("decode ids", || self.inner.decode(&ids, true))
    }

    /// The text that `id` adds to a stream; empty while a character is incomplete.
    ///
    /// # Errors
    /// If the tokenizer cannot decode it.
    pub fn decode_next(&self, state: &mut DecodeState, id: TokenId) -> Result<String, TokenizerError> {
        let DecodeState { ids, prefix, prefix_index } = state;
        let next = || tokenizers::step_decode_stream(&self.inner, vec![id.0], true, ids, prefix, prefix_index);
        used("decode ids", next).map(Option::unwrap_or_default)
    }

    /// The text of an incomplete character at the end of a stream: replacement characters, or nothing.
    ///
    /// # Errors
    /// If the tokenizer cannot decode it.
    pub fn decode_rest(&self, state: &DecodeState) -> Result<String, TokenizerError> {
        let ids: Vec<TokenId> = state.ids.iter().copied().map(TokenId).collect();
        let text = self.decode(&ids)?;
        Ok(text.get(state.prefix.len()..).unwrap_or_default().to_owned())
    }

    /// The ids that end a sequence, as generation_config.json or tokenizer_config.json name them.
    #[must_use]
    pub fn end_ids(&self) -> &[TokenId] {
        &self.end_ids
    }
}

/// The library's answer. It panics at some tokenizers that it should refuse.
fn used<T>(action: &'static str, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, TokenizerError> {
    let answer = guarded(|| call().map_err(|e| e.to_string())).flatten();
    answer.map_err(|detail| TokenizerError::Use { action, detail })
}

fn json(path: &Path) -> Result<Option<Value>, TokenizerError> {
    let failed = |detail: String| TokenizerError::Read { path: path.to_owned(), detail };
    if !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read(path).map_err(|e| failed(e.to_string()))?;
    serde_json::from_slice(&text).map(Some).map_err(|e| failed(e.to_string()))
}

/// `eos_token_id` of generation_config.json (a number or a list), else the id of `eos_token` of
/// tokenizer_config.json (a text, or an object with one).
fn end_ids(dir: &Path, tokenizer: &tokenizers::Tokenizer) -> Result<Vec<TokenId>, TokenizerError> {
    if let Some(config) = json(&dir.join("generation_config.json"))? {
        let ids = match &config["eos_token_id"] {
            Value::Array(ids) => ids.clone(),
            one => vec![one.clone()],
        };
        let ids: Vec<TokenId> =
            ids.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()).map(TokenId).collect();
        if !ids.is_empty() {
            return Ok(ids);
        }
    }
    let config = json(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
    let token = config["eos_token"].as_str().or_else(|| config["eos_token"]["content"].as_str());
    Ok(token.and_then(|token| tokenizer.token_to_id(token)).map(TokenId).into_iter().collect())
}
