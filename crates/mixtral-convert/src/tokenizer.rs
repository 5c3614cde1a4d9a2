//! The tokenizer's files of a model: finds them, checks that they are whole and belong to the model, and adds what is
//! missing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mixtral_checkpoint::CheckpointWriter;
use mixtral_checkpoint::names::is_tokenizer_file;
use mixtral_model::TokenId;
use mixtral_tokenizer::{Tokenizer, chat, load, model_end_ids};
use serde_json::{Map, Value, json};

use crate::error::ConvertError;

const GENERATION_CONFIG: &str = "generation_config.json";

/// The tokenizer's files that go into a checkpoint.
#[derive(Clone, Debug, Default)]
pub struct TokenizerFiles {
    /// Files that are copied as they are: their names in the checkpoint, and where they are.
    copied: BTreeMap<String, PathBuf>,
    /// The text of a generation_config.json that names the end ids, if only the model's configuration names them.
    generation_config: Option<String>,
    /// What a user should know about them.
    pub warnings: Vec<String>,
}

impl TokenizerFiles {
    /// Finds and reads the files of `dir`, for a model with `vocab_size` tokens.
    ///
    /// # Errors
    /// If the tokenizer cannot be loaded, or has a larger vocabulary than the model.
    pub fn read(dir: &Path, vocab_size: usize) -> Result<Self, ConvertError> {
        let io = |source| ConvertError::Io { path: dir.to_owned(), source };
        let mut files = TokenizerFiles::default();
        for entry in std::fs::read_dir(dir).map_err(io)? {
            let name = entry.map_err(io)?.file_name().to_string_lossy().into_owned();
            if is_tokenizer_file(&name) && dir.join(&name).is_file() {
                files.copied.insert(name.clone(), dir.join(name));
            }
        }
        for (name, path) in chat::files(dir) {
            if path.parent() != Some(dir) {
                files.copied.insert(format!("chat_template.{name}.jinja"), path);
            }
        }
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
        let mut names: Vec<String> = self.copied.keys().cloned().collect();
        names.extend(self.generation_config.iter().map(|_| GENERATION_CONFIG.to_owned()));
        names.sort();
        names
    }

    /// Writes them into the checkpoint.
    ///
    /// # Errors
    /// If one cannot be read or written.
    pub fn write(&self, writer: &mut CheckpointWriter) -> Result<(), ConvertError> {
        for (name, path) in &self.copied {
            writer.copy_in(name, path)?;
        }
        if let Some(text) = &self.generation_config {
            writer.write_in(GENERATION_CONFIG, text.as_bytes())?;
        }
        Ok(())
    }

    /// Writes the end ids into a generation_config.json, because a checkpoint's own configuration has no key for them.
    fn name_end_ids(&mut self, dir: &Path, end_ids: &[TokenId]) -> Result<(), ConvertError> {
        let path = dir.join(GENERATION_CONFIG);
        let mut config: Map<String, Value> = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_default(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Map::new(),
            Err(source) => return Err(ConvertError::Io { path, source }),
        };
        if config.get("eos_token_id").is_none_or(Value::is_null) {
            config.insert("eos_token_id".to_owned(), json!(end_ids));
            self.copied.remove(GENERATION_CONFIG);
            self.generation_config = Some(format!("{:#}\n", Value::Object(config)));
        }
        Ok(())
    }

    /// Checks that the embedding has a row for every token, because a token without a row cannot be in a prompt. For
    /// added tokens this is only a warning: some, such as padding tokens, are never in a prompt.
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
