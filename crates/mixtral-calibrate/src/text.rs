//! The sequences of tokens that a model is calibrated with.

use std::path::{Path, PathBuf};

use mixtral_model::TokenId;
use mixtral_tokenizer::{Tokenizer, load};
use serde_json::Value;

use crate::error::CalibrateError;

/// How much text is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Text {
    /// Sequences.
    pub size: usize,
    /// The most tokens of one.
    pub max_seq_length: usize,
    /// Which sequences are taken if there are more, or which tokens the model draws if there is no text.
    pub seed: u64,
}

/// Reads the sequences of a file. It may hold lines of token ids, JSON lines with a `text` each, or text, which is cut into
/// sequences. Each sequence begins with the token that texts start with, except for those of ids.
///
/// # Errors
/// If the file cannot be read, or holds nothing that is one of these.
pub fn read(path: &Path, model_dir: &Path, vocab_size: usize, text: Text) -> Result<Vec<Vec<TokenId>>, CalibrateError> {
    let io = |source| CalibrateError::Io { path: path.to_owned(), source };
    let data = std::fs::read_to_string(path).map_err(io)?;
    // Editors of Windows begin a file with a byte order mark.
    let data = data.strip_prefix('\u{FEFF}').unwrap_or(&data);
    let is_ids = |line: &str| line.chars().all(|c| c.is_ascii_digit() || matches!(c, ',' | ' ' | '\t' | '\r'));
    let first = data.lines().find(|line| !line.trim().is_empty());
    let first = first.ok_or_else(|| CalibrateError::Empty { path: path.to_owned() })?;
    let lines = Lines { path, vocab_size, length: text.max_seq_length };
    let mut sequences = if is_ids(first) {
        lines.ids(data)?
    } else {
        let no_tokenizer = || CalibrateError::NoTokenizer { path: path.to_owned(), dir: model_dir.to_owned() };
        load::find(model_dir).ok_or_else(no_tokenizer)?;
        let tokenizer = Tokenizer::load(model_dir)?;
        if first.trim_start().starts_with('{') {
            lines.json(data, &tokenizer)?
        } else {
            lines.text(data, &tokenizer)?
        }
    };
    sequences.retain(|sequence| !sequence.is_empty());
    if sequences.is_empty() {
        return Err(CalibrateError::Empty { path: path.to_owned() });
    }
    Ok(choose(sequences, text))
}

/// Takes some of the sequences, and keeps them in their order.
fn choose(sequences: Vec<Vec<TokenId>>, text: Text) -> Vec<Vec<TokenId>> {
    let key = |index: usize| mixtral_engine::dummy::word(text.seed, index as u64);
    let mut taken: Vec<usize> = (0..sequences.len()).collect();
    taken.sort_by_key(|&index| (key(index), index));
    taken.truncate(text.size);
    taken.sort_unstable();
    taken.into_iter().map(|index| sequences[index].clone()).collect()
}

/// A file of calibration data.
struct Lines<'a> {
    path: &'a Path,
    vocab_size: usize,
    length: usize,
}

impl Lines<'_> {
    fn problem(&self, line: usize, problem: String) -> CalibrateError {
        CalibrateError::Line { path: PathBuf::from(self.path), line: line + 1, problem }
    }

    fn ids(&self, data: &str) -> Result<Vec<Vec<TokenId>>, CalibrateError> {
        let line = |(number, line): (usize, &str)| {
            let ids = line.split([',', ' ', '\t']).map(str::trim).filter(|id| !id.is_empty());
            let id = |id: &str| match id.parse() {
                Ok(id) if (id as usize) < self.vocab_size => Ok(TokenId(id)),
                _ => {
                    Err(self.problem(number, format!("`{id}` is not one of the model's {} token ids", self.vocab_size)))
                }
            };
            ids.take(self.length).map(id).collect()
        };
        data.lines().enumerate().map(line).collect()
    }

    fn json(&self, data: &str, tokenizer: &Tokenizer) -> Result<Vec<Vec<TokenId>>, CalibrateError> {
        let mut sequences = Vec::new();
        for (number, line) in data.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let value: Value = serde_json::from_str(line).map_err(|error| self.problem(number, error.to_string()))?;
            let missing = || self.problem(number, "it has no \"text\" that is a string".to_owned());
            let text = value.get("text").and_then(Value::as_str).ok_or_else(missing)?;
            let mut ids = tokenizer.encode(text, true)?;
            ids.truncate(self.length);
            sequences.push(ids);
        }
        Ok(sequences)
    }

    fn text(&self, data: &str, tokenizer: &Tokenizer) -> Result<Vec<Vec<TokenId>>, CalibrateError> {
        let start: Vec<TokenId> = tokenizer.start_id().into_iter().collect();
        let ids = tokenizer.encode(data, false)?;
        let cut = self.length.saturating_sub(start.len()).max(1);
        Ok(ids.chunks(cut).map(|ids| start.iter().chain(ids).copied().take(self.length).collect()).collect())
    }
}
