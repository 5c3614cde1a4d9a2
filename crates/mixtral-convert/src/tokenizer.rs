//! The tokenizer's files of a model: which there are, whether they are whole and the model's, and what must be added.

use std::path::Path;

use mixtral_checkpoint::CheckpointWriter;
use mixtral_checkpoint::names::is_tokenizer_file;
use mixtral_model::TokenId;
use mixtral_tokenizer::{Tokenizer, load, model_end_ids};
use serde_json::{Map, Value, json};

use crate::error::ConvertError;

const GENERATION_CONFIG: &str = "generation_config.json";

/// What a checkpoint takes along.
#[derive(Clone, Debug, Default)]
pub struct TokenizerFiles {
    /// Files that are copied as they are.
    copied: Vec<String>,
    /// A generation_config.json that says how sequences end, where only the model's configuration does.
    generation_config: Option<String>,
    /// What a user should know about them.
    pub warnings: Vec<String>,
}

impl TokenizerFiles {
    /// Finds and reads the files of `dir`, beside a model of so many tokens.
    ///
    /// # Errors
    /// If the tokenizer cannot be loaded from them, or is that of a larger vocabulary.
    pub fn read(dir: &Path, vocab_size: usize) -> Result<Self, ConvertError> {
        let io = |source| ConvertError::Io { path: dir.to_owned(), source };
        let mut files = TokenizerFiles::default();
        for entry in std::fs::read_dir(dir).map_err(io)? {
            let name = entry.map_err(io)?.file_name().to_string_lossy().into_owned();
            if is_tokenizer_file(&name) && dir.join(&name).is_file() {
                files.copied.push(name);
            }
        }
        files.copied.sort();
        let end_ids = model_end_ids(dir)?;
        if !end_ids.is_empty() {
            files.name_end_ids(dir, &end_ids)?;
        }
        if load::find(dir).is_some() {
            files.check(&Tokenizer::load(dir)?, vocab_size)?;
        }
        Ok(files)
    }

    /// Their names.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let mut names = self.copied.clone();
        names.extend(self.generation_config.iter().map(|_| GENERATION_CONFIG.to_owned()));
        names.sort();
        names
    }

    /// Puts them beside the weights.
    ///
    /// # Errors
    /// If one cannot be read or written.
    pub fn write(&self, dir: &Path, writer: &mut CheckpointWriter) -> Result<(), ConvertError> {
        for name in &self.copied {
            writer.copy_in(name, &dir.join(name))?;
        }
        if let Some(text) = &self.generation_config {
            writer.write_in(GENERATION_CONFIG, text.as_bytes())?;
        }
        Ok(())
    }

    /// A checkpoint's own configuration has no place for the ids that end a sequence.
    fn name_end_ids(&mut self, dir: &Path, end_ids: &[TokenId]) -> Result<(), ConvertError> {
        let path = dir.join(GENERATION_CONFIG);
        let mut config: Map<String, Value> = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_default(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Map::new(),
            Err(source) => return Err(ConvertError::Io { path, source }),
        };
        if config.get("eos_token_id").is_none_or(Value::is_null) {
            config.insert("eos_token_id".to_owned(), json!(end_ids));
            self.copied.retain(|name| name != GENERATION_CONFIG);
            self.generation_config = Some(format!("{:#}\n", Value::Object(config)));
        }
        Ok(())
    }

    /// A token without a row in the embedding cannot be in a prompt. Tokens that were only added, to pad for instance,
    /// often are not meant to be.
    fn check(&mut self, tokenizer: &Tokenizer, vocab_size: usize) -> Result<(), ConvertError> {
        let past: Vec<TokenId> = tokenizer.ids().into_iter().filter(|id| id.0 as usize >= vocab_size).collect();
        let Some(last) = past.last() else { return Ok(()) };
        let path = tokenizer.path().to_owned();
        if past.iter().any(|id| !tokenizer.is_added(*id)) {
            return Err(ConvertError::TokenizerTooLarge { path, tokens: last.0 as usize + 1, vocab_size });
        }
        let shown = past.iter().take(4).map(|id| format!("`{}` ({id})", tokenizer.token(*id).unwrap_or_default()));
        let shown = shown.collect::<Vec<_>>().join(", ");
        let more = if past.len() > 4 { ", …" } else { "" };
        self.warnings.push(format!(
            "the tokenizer in {} has {} added token(s) that the model's {vocab_size} rows do not reach: {shown}{more}; a prompt with one of them will be refused; if they are used, resize the model's embeddings first",
            path.parent().unwrap_or(&path).display(),
            past.len()
        ));
        Ok(())
    }
}
