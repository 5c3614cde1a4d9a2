//! Conversations as the text that a model was trained on. The rules are those of transformers' `apply_chat_template`.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::path::{Path, PathBuf};

use minijinja::Environment;
use minijinja::value::Serde;
use serde_json::{Map, Value, json};

use crate::error::{GIT_LFS_POINTER, TokenizerError};
use crate::jinja::{self, Refused};
use crate::load::read;
use crate::settings::Settings;

/// The name of the template that is used if none is named, and that of the one for conversations with tools.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// Stands for the end of the message that is to be continued, while a conversation is rendered.
const END_OF_MESSAGE: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// A model's chat template, or several with names.
#[derive(Debug)]
pub struct ChatTemplate {
    /// The templates by name.
    templates: Environment<'static>,
    /// The special tokens that templates may use: `bos_token`, `eos_token` …
    tokens: BTreeMap<String, String>,
}

/// A conversation, and how it is to be rendered.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// Its messages: objects with `role`, `content`, and what else the template knows; at least one.
    pub messages: Vec<Value>,
    /// The tools that the model may call, as JSON schemas.
    pub tools: Option<Vec<Value>>,
    /// The documents that the model may read, as objects with `title` and `text`.
    pub documents: Option<Vec<Value>>,
    /// Whether the text ends with what begins an answer of the model.
    pub add_generation_prompt: bool,
    /// Whether the text ends in the last message, so that the model continues it.
    pub continue_final_message: bool,
    /// Which of several templates to use. If it is `None`, conversations with tools use `tool_use`, if there is one, and
    /// all others `default`.
    pub template: Option<String>,
    /// Other variables that the template may use.
    pub variables: Map<String, Value>,
}

/// A conversation that cannot be rendered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChatError {
    /// The template refuses it, as its author wrote.
    #[error("the model's chat template refuses this conversation: {message}")]
    Refused {
        /// What the template says.
        message: String,
    },
    /// The template failed.
    #[error(
        "the model's chat template failed on this conversation: {detail}; are the messages what it expects (`role`, `content`)?"
    )]
    Failed {
        /// What failed, and in which line of the template.
        detail: String,
    },
    /// There is no template of this name, or no name was given and none of the templates is the default.
    #[error("there is no chat template `{name}` in this model; it has {}", names.join(", "))]
    NoSuchTemplate {
        /// The name.
        name: String,
        /// The names that there are.
        names: Vec<String>,
    },
    /// It has no message.
    #[error("the conversation has no message; give at least one")]
    NoMessages,
    /// An answer cannot be begun and the last message continued.
    #[error("a conversation either continues its last message or begins an answer; ask for one of the two")]
    BothEnds,
    /// The last message cannot be continued.
    #[error("the last message cannot be continued: {why}")]
    NotContinued {
        /// Why.
        why: &'static str,
    },
}

impl ChatTemplate {
    /// Loads the chat template of the tokenizer in `dir`: `chat_template.jinja` with the files of
    /// `additional_chat_templates`, or else what `tokenizer_config.json` has. `None` if there is none.
    ///
    /// # Errors
    /// If a file cannot be read, or is not a template.
    pub fn load(dir: &Path) -> Result<Option<Self>, TokenizerError> {
        let settings = Settings::read(dir)?;
        let mut sources = Vec::new();
        for (name, path) in files(dir) {
            sources.push((name, text(&path)?, path));
        }
        if sources.is_empty() {
            let path = dir.join("tokenizer_config.json");
            sources.extend(settings.chat_templates().into_iter().map(|(name, source)| (name, source, path.clone())));
        }
        if sources.is_empty() {
            return Ok(None);
        }
        Self::new(sources, &settings).map(Some)
    }

    /// The template in `file`, for the tokenizer in `dir`.
    ///
    /// # Errors
    /// As [`ChatTemplate::load`].
    pub fn from_file(file: &Path, dir: &Path) -> Result<Self, TokenizerError> {
        Self::new(vec![(DEFAULT.to_owned(), text(file)?, file.to_owned())], &Settings::read(dir)?)
    }

    fn new(sources: Vec<(String, String, PathBuf)>, settings: &Settings) -> Result<Self, TokenizerError> {
        let mut templates = jinja::environment();
        for (name, source, path) in sources {
            let added = templates.add_template_owned(name, jinja::without_generation_tags(&source));
            added.map_err(|e| TokenizerError::Read { path, detail: format!("its chat template is wrong: {e}") })?;
        }
        Ok(ChatTemplate { templates, tokens: settings.named_tokens() })
    }

    /// The names of the templates, in alphabetical order.
    #[must_use]
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.templates.templates().map(|(name, _)| name).collect();
        names.sort_unstable();
        names
    }

    /// The text of a conversation. It contains the special tokens that the template writes, the start token too. So it is
    /// encoded without adding any: `tokenizer.encode(&text, false)`.
    ///
    /// # Errors
    /// If the template refuses the conversation or fails on it.
    pub fn render(&self, conversation: &Conversation) -> Result<String, ChatError> {
        let Conversation { messages, tools, documents, add_generation_prompt, continue_final_message, .. } =
            conversation;
        if messages.is_empty() {
            return Err(ChatError::NoMessages);
        }
        let name = self.name_for(conversation)?;
        let mut messages = messages.clone();
        let continued = match continue_final_message {
            true if *add_generation_prompt => return Err(ChatError::BothEnds),
            true => Some(mark_end(messages.last_mut())?),
            false => None,
        };
        let mut variables: Map<String, Value> = self.tokens.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
        variables.extend(conversation.variables.clone());
        variables.insert("messages".to_owned(), messages.into());
        variables.insert("tools".to_owned(), json!(tools));
        variables.insert("documents".to_owned(), json!(documents));
        variables.insert("add_generation_prompt".to_owned(), json!(add_generation_prompt));
        let template = self.templates.get_template(&name).map_err(failed)?;
        let rendered = template.render(Serde(&variables)).map_err(failed)?;
        match continued {
            Some(message) => cut_at_end(&rendered, &message),
            None => Ok(rendered),
        }
    }

    /// The name of the template that renders a conversation.
    fn name_for(&self, conversation: &Conversation) -> Result<String, ChatError> {
        let names = self.names();
        let name = match &conversation.template {
            Some(name) => name,
            None if conversation.tools.is_some() && names.contains(&TOOL_USE) => TOOL_USE,
            None => DEFAULT,
        };
        if !names.contains(&name) {
            let names = names.into_iter().map(str::to_owned).collect();
            return Err(ChatError::NoSuchTemplate { name: name.to_owned(), names });
        }
        Ok(name.to_owned())
    }
}

/// The template files of `dir` and the names of the templates. `mixtral convert` writes `additional_chat_templates/X.jinja`
/// as `chat_template.X.jinja`, since its directories have no folders.
#[must_use]
pub fn files(dir: &Path) -> Vec<(String, PathBuf)> {
    let entries = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let name = |path: &Path| {
        let name = path.file_name()?.to_str()?.strip_suffix(".jinja")?.to_owned();
        path.is_file().then_some(name)
    };
    let mut files: Vec<(String, PathBuf)> = Vec::new();
    for path in entries(dir) {
        match name(&path).as_deref().and_then(|name| name.strip_prefix("chat_template")) {
            Some("") => files.push((DEFAULT.to_owned(), path)),
            Some(rest) if rest.starts_with('.') => files.push((rest[1..].to_owned(), path)),
            _ => {}
        }
    }
    for path in entries(&dir.join("additional_chat_templates")) {
        files.extend(name(&path).map(|name| (name, path)));
    }
    files.sort();
    files
}

fn text(path: &Path) -> Result<String, TokenizerError> {
    let bytes = read(path)?;
    if bytes.starts_with(GIT_LFS_POINTER) {
        return Err(TokenizerError::unreadable(path, &bytes, ""));
    }
    String::from_utf8(bytes).map_err(|e| TokenizerError::unreadable(path, e.as_bytes(), "it is not UTF-8 text"))
}

fn failed(error: minijinja::Error) -> ChatError {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(Refused(message)) = error.downcast_ref() {
            return ChatError::Refused { message: message.clone() };
        }
        cause = error.source();
    }
    ChatError::Failed { detail: error.to_string() }
}

/// Marks the end of a message's text, which is its content or the last part of it that is text. Returns the text.
fn mark_end(message: Option<&mut Value>) -> Result<String, ChatError> {
    let missing = ChatError::NotContinued { why: "it has no text (`content`)" };
    let content = message.and_then(|message| message.get_mut("content")).ok_or_else(|| missing.clone())?;
    let text = match content {
        Value::Array(parts) => {
            parts.iter_mut().rev().find_map(|part| part.get_mut("text")).ok_or_else(|| missing.clone())?
        }
        content => content,
    };
    let Value::String(text) = text else { return Err(missing) };
    let unmarked = text.clone();
    text.push_str(END_OF_MESSAGE);
    Ok(unmarked)
}

/// The rendered text up to the mark. If the template removed the space at the end of the mark, it would remove it from the
/// message too.
fn cut_at_end(rendered: &str, message: &str) -> Result<String, ChatError> {
    let lost = ChatError::NotContinued { why: "the template changes or leaves out its text" };
    let at = rendered.rfind(END_OF_MESSAGE.trim_end()).filter(|_| rendered.contains(message.trim())).ok_or(lost)?;
    let (text, rest) = rendered.split_at(at);
    Ok(if rest.starts_with(END_OF_MESSAGE) { text } else { text.trim_end() }.to_owned())
}
