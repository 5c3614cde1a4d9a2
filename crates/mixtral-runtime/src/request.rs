//! Requests to a session, and why a session may refuse them.

use std::fmt;
use std::sync::Arc;

use mixtral_engine::SamplingParams;
use mixtral_model::TokenId;
use mixtral_tokenizer::BadWords;
use serde::Serialize;

/// A request's number in its session, in order of submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct RequestId(pub usize);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One sequence to generate.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The prompt's tokens; at least one.
    pub prompt: Vec<TokenId>,
    /// The most tokens to generate; at least one.
    pub max_output_len: usize,
    /// How tokens are drawn.
    pub params: SamplingParams,
    /// Seed of the draws.
    pub seed: u64,
    /// The prompt's number. It is part of the draws' key: equal prompts with equal number and hypothesis draw the same
    /// tokens.
    pub prompt_index: u32,
    /// Which of the prompt's sequences this is. It is part of the draws' key.
    pub hypothesis: u32,
    /// The tokens that end the sequence. The one that does is part of the output's ids but not of its text.
    pub end_ids: Vec<TokenId>,
    /// Texts that end the sequence. They are cut from the output's text but not from its ids.
    pub stop_words: Vec<String>,
    /// Texts that may not be generated.
    pub bad_words: Arc<BadWords>,
    /// Whether the logits of every generated token are wanted.
    pub generation_logits: bool,
    /// Whether the logits of every prompt token are wanted; the engine must gather them.
    pub context_logits: bool,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end id was drawn.
    EndId,
    /// A stop word was generated.
    StopWord,
    /// `max_output_len` tokens were generated.
    Length,
}

/// A request that this engine can never answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The prompt has no token.
    #[error("the prompt is empty; give at least one token (a tokenizer that adds a start token makes one of any text)")]
    EmptyPrompt,
    /// No token is to be generated.
    #[error("max_output_len is 0; ask for at least 1 token")]
    NoOutput,
    /// Prompt and output together are longer than a sequence may be.
    #[error("the prompt's {prompt} tokens and --max-output-len {output} make {}, but the engine takes sequences of at most {limit}; shorten either, cut the prompt with --max-input-length {}, or build with --max-seq-len {}", prompt + output, limit.saturating_sub(*output).max(1), prompt + output)]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens to generate.
        output: usize,
        /// Longest sequence.
        limit: usize,
    },
    /// A token that is not in the model's vocabulary.
    #[error(
        "token id {token} at position {position} is not in the model's vocabulary of {vocab_size}; is this another model's tokenizer?"
    )]
    UnknownToken {
        /// The token.
        token: TokenId,
        /// Where in the prompt.
        position: usize,
        /// Entries of the vocabulary.
        vocab_size: usize,
    },
    /// The sequence needs more blocks than the cache has.
    #[error(
        "the sequence needs {needed} KV blocks, but the cache has {available}; shorten it or give the cache more memory"
    )]
    TooFewBlocks {
        /// Blocks that prompt and output fill.
        needed: usize,
        /// Blocks of the cache.
        available: usize,
    },
    /// The engine does not gather context logits.
    #[error(
        "logits of the prompt were asked for, but the engine was built without --gather-context-logits; build it with that flag"
    )]
    NoContextLogits,
}
