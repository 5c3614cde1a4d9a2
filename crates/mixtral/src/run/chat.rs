//! Conversations as prompts, by the model's chat template.

use std::path::Path;

use anyhow::{Result, bail};
use mixtral_runtime::Tokenizer;
use mixtral_tokenizer::{ChatTemplate, Conversation};
use serde_json::{Value, json};

use super::prompts::Prompt;
use crate::args::template::TemplateArgs;

/// A chat template, and how each conversation begins.
pub struct Chat {
    template: ChatTemplate,
    system: Option<String>,
}

/// A message of a conversation.
pub fn message(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

impl Chat {
    /// The template that the flags name, or else that of the tokenizer in `dir`.
    pub fn load(args: &TemplateArgs, dir: &Path) -> Result<Chat> {
        let template = match &args.chat_template {
            Some(file) => ChatTemplate::from_file(file, dir)?,
            None => match ChatTemplate::load(dir)? {
                Some(template) => template,
                None => bail!(
                    "{} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); name a file with --chat-template, or a directory that has one with --tokenizer-dir",
                    dir.display()
                ),
            },
        };
        Ok(Chat { template, system: args.system_prompt.clone() })
    }

    /// The messages before the user's first.
    pub fn opening(&self) -> Vec<Value> {
        self.system.iter().map(|text| message("system", text)).collect()
    }

    /// A conversation of one turn.
    pub fn turn(&self, text: &str, tokenizer: &Tokenizer) -> Result<Prompt> {
        self.answer(vec![message("user", text)], tokenizer)
    }

    /// The prompt for the model's next answer to `messages`.
    pub fn answer(&self, messages: Vec<Value>, tokenizer: &Tokenizer) -> Result<Prompt> {
        self.prompt(Conversation { messages, add_generation_prompt: true, ..Conversation::default() }, tokenizer)
    }

    /// The prompt that a conversation is. The system prompt goes before its messages, if they do not begin with one.
    pub fn prompt(&self, mut conversation: Conversation, tokenizer: &Tokenizer) -> Result<Prompt> {
        let messages = &mut conversation.messages;
        if messages.first().is_some_and(|first| first["role"] != "system") {
            messages.splice(..0, self.opening());
        }
        let text = self.template.render(&conversation)?;
        // The template writes the special tokens, the start token too.
        let ids = tokenizer.encode(&text, false)?;
        Ok(Prompt { text: Some(text), ids, own: None })
    }
}
