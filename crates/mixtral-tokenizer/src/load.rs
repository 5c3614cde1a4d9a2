//! Finds the tokenizer's own file in a directory, and reads it.

use std::path::{Path, PathBuf};

use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::Merges;

use crate::error::TokenizerError;
use crate::guard::guarded;
use crate::{sentencepiece, tekken};

/// A tokenizer as its own file describes it, without the files beside it.
pub(crate) struct Base {
    pub(crate) path: PathBuf,
    pub(crate) inner: tokenizers::Tokenizer,
    /// Whether a space is put before every text, as SentencePiece does.
    pub(crate) dummy_prefix: bool,
    /// The start and end tokens, if the file itself names them.
    pub(crate) start: Option<u32>,
    pub(crate) end: Option<u32>,
}

/// The file of `dir` that is its tokenizer: transformers' file, Mistral's newer one, or a SentencePiece model.
#[must_use]
pub fn find(dir: &Path) -> Option<PathBuf> {
    let known = ["tokenizer.json", "tekken.json", "tokenizer.model"].map(|name| dir.join(name));
    if let Some(path) = known.into_iter().find(|path| path.exists()) {
        return Some(path);
    }
    // Names of Mistral's SentencePiece models have a version: tokenizer.model.v3, mistral_instruct_….model.v3.
    let names = std::fs::read_dir(dir).ok()?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut models: Vec<String> = names.filter(|name| name.starts_with("tokenizer.model.v")).collect();
    models.sort();
    models.pop().map(|name| dir.join(name))
}

/// Reads the tokenizer of `dir`.
pub(crate) fn base(dir: &Path) -> Result<Base, TokenizerError> {
    let path = find(dir).ok_or_else(|| TokenizerError::Missing { dir: dir.to_owned() })?;
    let bytes = read(&path)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let parsed = match &*name {
        "tokenizer.json" => guarded(|| tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| e.to_string()))
            .flatten()
            .map(|inner| Base { path: path.clone(), inner, dummy_prefix: false, start: None, end: None }),
        "tekken.json" => tekken::read(&bytes, &path),
        _ => sentencepiece::read(&bytes, &path),
    };
    let mut base = parsed.map_err(|detail| TokenizerError::unreadable(&path, &bytes, detail))?;
    forget_training(&mut base.inner);
    Ok(base)
}

/// The bytes of a file.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, TokenizerError> {
    std::fs::read(path).map_err(|e| TokenizerError::Read { path: path.to_owned(), detail: e.to_string() })
}

/// Switches off settings of the training that a file keeps: how texts were cut, padded and varied. They must not change
/// prompts.
fn forget_training(inner: &mut tokenizers::Tokenizer) {
    // This only fails for a truncation that is not `None`.
    let _ = inner.with_truncation(None);
    inner.with_padding(None);
    if let ModelWrapper::BPE(bpe) = inner.get_model()
        && bpe.dropout.is_some()
    {
        let mut bpe = bpe.clone();
        bpe.dropout = None;
        inner.with_model(bpe);
    }
}

/// Makes the merges of a vocabulary that comes without them: every way to cut a token into two others. Tokens come in
/// the order given, best first. Of one token's cuts, the one with the longest left part comes first, because merging
/// from the left makes that one.
pub(crate) fn merges<'a>(tokens: impl Iterator<Item = &'a str>, is_token: impl Fn(&str) -> bool) -> Merges {
    let mut merges = Vec::new();
    for token in tokens {
        for (at, _) in token.char_indices().skip(1).collect::<Vec<_>>().into_iter().rev() {
            let (left, right) = token.split_at(at);
            if is_token(left) && is_token(right) {
                merges.push((left.to_owned(), right.to_owned()));
            }
        }
    }
    merges
}
