//! Prompts from the command line or a file, as token ids.

use anyhow::{Context, Result, bail};
use mixtral_model::TokenId;
use mixtral_runtime::Tokenizer;
use mixtral_tokenizer::Conversation;
use serde_json::{Map, Value};

use super::chat::Chat;
use super::prompt_files::{Record, RecordPrompt, conversation, csv_ids, npy_ids, records, text_lines};
use crate::args::run::{Prompts, extension};
use crate::say;

/// A prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// Its text, if it was given or can be decoded.
    pub text: Option<String>,
    /// Its ids.
    pub ids: Vec<TokenId>,
    /// What its request says itself, if it is a line of requests.
    pub own: Option<Own>,
}

/// What a request of a file says itself, beside its prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Own {
    /// Texts that end it; those of the command line if they are absent.
    pub stop_words: Option<Vec<String>>,
    /// Texts that may not come up in it; those of the command line if they are absent.
    pub bad_words: Option<Vec<String>>,
    /// Its flags.
    pub flags: Map<String, Value>,
}

/// Whether the prompts are texts, which need a tokenizer.
pub fn are_texts(prompts: &Prompts) -> bool {
    match prompts {
        Prompts::Texts(_) => true,
        Prompts::File(path) => ["txt", "json", "jsonl"].contains(&extension(path).as_str()),
    }
}

/// Whether the prompts are messages, which need a chat template. In a file of requests, some may be.
pub fn are_messages(prompts: &Prompts) -> Result<bool> {
    let Prompts::File(path) = prompts else { return Ok(false) };
    Ok(match extension(path).as_str() {
        "json" => true,
        "jsonl" => records(path)?.iter().any(|record| matches!(record.prompt, RecordPrompt::Conversation(_))),
        _ => false,
    })
}

/// How texts become prompts.
#[derive(Clone, Copy, Default)]
pub struct Encoder<'a> {
    /// The tokenizer, without which there are only ids.
    pub tokenizer: Option<&'a Tokenizer>,
    /// The chat template, if there are messages or turns.
    pub chat: Option<&'a Chat>,
    /// Whether texts are turns of the user in that template.
    pub turns: bool,
    /// Whether texts outside of a template get the model's special tokens.
    pub special: bool,
}

impl<'a> Encoder<'a> {
    fn text(self, text: String) -> Result<Prompt> {
        let tokenizer = self.needed()?;
        match self.chat.filter(|_| self.turns) {
            Some(chat) => chat.turn(&text, tokenizer),
            None => Ok(Prompt { ids: tokenizer.encode(&text, self.special)?, text: Some(text), own: None }),
        }
    }

    fn conversation(self, conversation: Conversation) -> Result<Prompt> {
        match self.chat {
            Some(chat) => chat.prompt(conversation, self.needed()?),
            None => bail!("messages need a chat template"),
        }
    }

    fn record(self, record: Record, from_ids: impl Fn(Vec<TokenId>) -> Prompt) -> Result<Prompt> {
        let Record { prompt, stop_words, bad_words, flags } = record;
        let prompt = match prompt {
            RecordPrompt::Text(text) => self.text(text)?,
            RecordPrompt::Ids(ids) => from_ids(ids),
            RecordPrompt::Conversation(conversation) => self.conversation(conversation)?,
        };
        Ok(Prompt { own: Some(Own { stop_words, bad_words, flags }), ..prompt })
    }

    fn needed(self) -> Result<&'a Tokenizer> {
        self.tokenizer.context("a text needs a tokenizer")
    }
}

/// Reads and encodes the prompts. Prompts longer than `max_input_length` are cut on the left.
pub fn read(source: &Prompts, encoder: Encoder<'_>, max_input_length: Option<usize>) -> Result<Vec<Prompt>> {
    let tokenizer = encoder.tokenizer;
    // Only the ids are needed. If they cannot be decoded, the prompt has no text.
    let from_ids = |ids: Vec<TokenId>| Prompt { text: tokenizer.and_then(|t| t.decode(&ids).ok()), ids, own: None };
    let pad = tokenizer.and_then(Tokenizer::pad_id);
    let unpadded = |mut ids: Vec<TokenId>| {
        ids.retain(|id| Some(*id) != pad);
        from_ids(ids)
    };
    let mut prompts = match source {
        Prompts::Texts(texts) => texts.iter().cloned().map(|text| encoder.text(text)).collect::<Result<Vec<_>>>()?,
        Prompts::File(path) => match extension(path).as_str() {
            "txt" => text_lines(path)?.into_iter().map(|text| encoder.text(text)).collect::<Result<Vec<_>>>()?,
            "json" => vec![encoder.conversation(conversation(path)?)?],
            "jsonl" => {
                records(path)?.into_iter().map(|record| encoder.record(record, from_ids)).collect::<Result<Vec<_>>>()?
            }
            "csv" => csv_ids(path)?.into_iter().map(from_ids).collect(),
            // run.py pads the rows of an array with the tokenizer's padding token, and drops that token again when it
            // reads them.
            "npy" => npy_ids(path)?.into_iter().map(unpadded).collect(),
            other => bail!(
                "{}: a prompt file ends in .txt (a prompt a line), .csv (token ids a line), .npy (2-D token ids), .json (messages) or .jsonl (a request a line), not `.{other}`",
                path.display()
            ),
        },
    };
    if encoder.special && encoder.chat.is_none() && are_texts(source) {
        warn_of_no_start(&prompts, tokenizer);
    }
    if prompts.is_empty() {
        bail!("there is no prompt in {}; give at least one", describe(source));
    }
    if let Some(limit) = max_input_length {
        for prompt in &mut prompts {
            let cut = prompt.ids.len().saturating_sub(limit);
            prompt.ids.drain(..cut);
        }
    }
    Ok(prompts)
}

/// Warns of prompts without the tokenizer's start token: a model that was trained with one writes worse without it.
fn warn_of_no_start(prompts: &[Prompt], tokenizer: Option<&Tokenizer>) {
    let Some((tokenizer, start)) = tokenizer.and_then(|t| Some((t, t.start_id()?))) else { return };
    if prompts.iter().any(|prompt| prompt.ids.first() != Some(&start)) {
        say::warning(format_args!(
            "{} puts no start token before prompts, though it has one, `{}` ({start}); if the model was trained with it, set add_bos_token to true in the tokenizer_config.json beside it",
            tokenizer.path().display(),
            tokenizer.token(start).unwrap_or_default()
        ));
    }
}

fn describe(prompts: &Prompts) -> String {
    match prompts {
        Prompts::Texts(_) => "--input-text".to_owned(),
        Prompts::File(path) => path.display().to_string(),
    }
}
