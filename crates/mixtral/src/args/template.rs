//! The flags that say how a conversation becomes a prompt.

use std::path::PathBuf;

use super::spelling;

const CHAT: &str = "Chat";

/// The flags as they were typed.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct TemplateArgs {
    /// What the model is told before the conversation
    #[arg(help_heading = CHAT, long, value_name = "TEXT", value_parser = spelling::text)]
    pub system_prompt: Option<String>,
    /// Chat template to use instead of the model's own
    #[arg(help_heading = CHAT, long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
}
