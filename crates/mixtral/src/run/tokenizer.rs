//! The tokenizer of a run, and the ids that end its sequences.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use mixtral_model::TokenId;
use mixtral_runtime::Tokenizer;
use mixtral_tokenizer::{load, model_end_ids};

use crate::args::model::ModelArgs;
use crate::say;

/// Loads the tokenizer. If no `texts` have to be encoded and no directory was named, an engine without one is no error.
pub fn tokenizer(args: &ModelArgs, texts: bool) -> Result<Option<Arc<Tokenizer>>> {
    let dir = args.tokenizer_dir();
    if !texts && args.tokenizer_dir.is_none() && load::find(dir).is_none() {
        return Ok(None);
    }
    required_tokenizer(dir).map(Some)
}

/// Loads the tokenizer of `dir`.
pub fn required_tokenizer(dir: &Path) -> Result<Arc<Tokenizer>> {
    say::detail(format_args!("tokenizer: {}", dir.display()));
    Ok(Arc::new(Tokenizer::load(dir)?))
}

/// The ids that end a sequence: those of the model, and the token with which the tokenizer ends texts. The model is
/// that of the tokenizer's directory if it says how its sequences end, else the engine's.
pub fn end_ids(engine_dir: &Path, tokenizer_dir: Option<&Path>, tokenizer: Option<&Tokenizer>) -> Result<Vec<TokenId>> {
    let mut ids = tokenizer_dir.map(model_end_ids).transpose()?.unwrap_or_default();
    if ids.is_empty() {
        ids = model_end_ids(engine_dir)?;
    }
    ids.extend(tokenizer.and_then(Tokenizer::end_id).filter(|id| !ids.contains(id)));
    Ok(ids)
}
