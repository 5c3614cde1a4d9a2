//! Log-probabilities, as completions and as chat tell them.

use std::collections::BTreeMap;

use mixtral_model::TokenId;
use mixtral_runtime::{TokenLogprobs, Tokenizer};
use serde::Serialize;
use utoipa::ToSchema;

/// Stands for the logarithm of 0, which JSON cannot write.
const IMPOSSIBLE: f32 = -9999.0;

/// Log-probabilities of a completion's tokens. Each list has an entry for each token.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    /// The tokens' texts.
    pub tokens: Vec<String>,
    /// The log-probability of each token; null for the first token of a prompt, before which there is nothing.
    pub token_logprobs: Vec<Option<f32>>,
    /// The likeliest tokens at its place, and the token itself, by their texts.
    pub top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Where each token begins in the answer's text, in characters.
    pub text_offset: Vec<usize>,
}

/// Log-probabilities of a chat answer's tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct ChatLogprobs {
    /// Those of the answer's text.
    pub content: Vec<ChatLogprob>,
    /// Always null: this server does not refuse.
    pub refusal: Option<Vec<ChatLogprob>>,
}

/// The log-probability of a token of a chat answer.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct ChatLogprob {
    /// The token, and its log-probability.
    #[serde(flatten)]
    pub token: TokenLogprob,
    /// The likeliest tokens at its place, likeliest first.
    pub top_logprobs: Vec<TokenLogprob>,
}

/// A token and its log-probability.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct TokenLogprob {
    /// The token's text. Bytes that are no text are replaced.
    pub token: String,
    /// Natural logarithm of its probability, or -9999 if that is 0.
    pub logprob: f32,
    /// The token's bytes.
    pub bytes: Vec<u8>,
}

/// The bytes that a token adds to a text; those of a special token are its name.
fn bytes(tokenizer: &Tokenizer, id: TokenId) -> Vec<u8> {
    tokenizer.token_bytes(id).unwrap_or_default()
}

fn text(tokenizer: &Tokenizer, id: TokenId) -> String {
    String::from_utf8_lossy(&bytes(tokenizer, id)).into_owned()
}

impl CompletionLogprobs {
    /// Adds the first token of a prompt.
    pub(crate) fn push_first(&mut self, tokenizer: &Tokenizer, id: TokenId, offset: &mut usize) {
        self.push_token(text(tokenizer, id), None, None, offset);
    }

    /// Adds a token. `offset` is where it begins, and is moved to where it ends.
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, scored: &TokenLogprobs, offset: &mut usize) {
        let mut top = BTreeMap::new();
        let token = text(tokenizer, scored.token);
        // Tokens may have the same text. The likeliest of them stands for it.
        for &(id, logprob) in &scored.best {
            top.entry(text(tokenizer, id)).or_insert(logprob.max(IMPOSSIBLE));
        }
        let logprob = scored.logprob.max(IMPOSSIBLE);
        top.entry(token.clone()).or_insert(logprob);
        self.push_token(token, Some(logprob), Some(top), offset);
    }

    fn push_token(
        &mut self,
        token: String,
        logprob: Option<f32>,
        top: Option<BTreeMap<String, f32>>,
        offset: &mut usize,
    ) {
        self.text_offset.push(*offset);
        *offset += token.chars().count();
        self.tokens.push(token);
        self.token_logprobs.push(logprob);
        self.top_logprobs.push(top);
    }

    /// Adds the tokens of `more`.
    pub(crate) fn extend(&mut self, more: CompletionLogprobs) {
        self.tokens.extend(more.tokens);
        self.token_logprobs.extend(more.token_logprobs);
        self.top_logprobs.extend(more.top_logprobs);
        self.text_offset.extend(more.text_offset);
    }
}

impl ChatLogprob {
    /// What chat tells of a token.
    pub(crate) fn new(tokenizer: &Tokenizer, scored: &TokenLogprobs) -> Self {
        let told = |id: TokenId, logprob: f32| {
            let bytes = bytes(tokenizer, id);
            let token = String::from_utf8_lossy(&bytes).into_owned();
            TokenLogprob { token, logprob: logprob.max(IMPOSSIBLE), bytes }
        };
        ChatLogprob {
            token: told(scored.token, scored.logprob),
            top_logprobs: scored.best.iter().map(|&(id, logprob)| told(id, logprob)).collect(),
        }
    }
}
