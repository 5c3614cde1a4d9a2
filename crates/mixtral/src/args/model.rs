//! The flags of every command that generates: which engine, which tokenizer, and where it runs.

use std::path::{Path, PathBuf};

use super::place::{ENGINE, PlaceArgs};
use crate::say;

/// The flags as they were typed.
#[derive(Clone, Debug, clap::Args)]
pub struct ModelArgs {
    /// Engine to run
    #[arg(help_heading = ENGINE, long, default_value = "engine_outputs")]
    pub engine_dir: PathBuf,
    /// Directory of tokenizer.json [default: the engine's, which carries the model's]
    #[arg(help_heading = ENGINE, long)]
    pub tokenizer_dir: Option<PathBuf>,
    /// The old commands' model directory, whose tokenizer is used if no other is named
    #[arg(long, hide = true, alias = "model-dir")]
    pub hf_model_dir: Option<PathBuf>,
    /// Where it runs.
    #[command(flatten)]
    pub place: PlaceArgs,
}

impl ModelArgs {
    /// Makes one flag of the two that name a tokenizer.
    pub fn settle(&mut self) {
        if self.tokenizer_dir.is_some() && self.hf_model_dir.is_some() {
            say::warning("--hf-model-dir changes nothing beside --tokenizer-dir: no Hugging Face model is run");
        }
        self.tokenizer_dir = self.tokenizer_dir.take().or(self.hf_model_dir.take());
    }

    /// The directory of the tokenizer's files.
    pub fn tokenizer_dir(&self) -> &Path {
        self.tokenizer_dir.as_ref().unwrap_or(&self.engine_dir)
    }
}
