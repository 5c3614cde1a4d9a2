//! Requests to a session, and why a session may refuse them.

use std::fmt;
use std::sync::Arc;

use mixtral_engine::{Limits, NonFinite, SamplingParams};
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

/// The most tokens whose log-probabilities a request may ask for at each position.
pub const MAX_LOGPROBS: usize = 20;

/// Says which tokens may come next, by those that were generated.
pub trait Constraint: fmt::Debug + Send + Sync {
    /// The tokens that may not follow `output`. A sequence asks before each of its draws, so `output` grows by one token from
    /// one call to the next.
    fn banned(&self, output: &[TokenId]) -> Vec<TokenId>;
}

/// One sequence to generate.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The prompt's tokens; at least one.
    pub prompt: Vec<TokenId>,
    /// The most tokens to generate; at least one, or none if only the prompt's log-probabilities are wanted.
    pub max_output_len: usize,
    /// As long as the output has fewer tokens, its end ids cannot be drawn.
    pub min_output_len: usize,
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
    /// What else says which tokens may be generated. It belongs to this request alone.
    pub constraint: Option<Arc<dyn Constraint>>,
    /// No sequence of so many tokens appears twice in prompt and output; 0 is off.
    pub no_repeat_ngram_size: usize,
    /// What is added to the logits of some tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// If it is to be answered by a beam search, how. Nothing is drawn then.
    pub beams: Option<Beams>,
    /// Whether the log-probability of every generated token is wanted, and those of how many of the most likely tokens.
    pub logprobs: Option<usize>,
    /// The same of every token of the prompt but the first.
    pub prompt_logprobs: Option<usize>,
    /// Whether the logits of every generated token are wanted.
    pub generation_logits: bool,
    /// Whether the logits of every prompt token are wanted; the engine must gather them.
    pub context_logits: bool,
}

impl Request {
    /// How many sequences of a step it may become.
    #[must_use]
    pub fn width(&self) -> usize {
        self.beams.map_or(1, |beams| beams.width)
    }

    /// Whether a draw needs to know the tokens that were drawn before, and not only their logits.
    #[must_use]
    pub fn looks_back(&self) -> bool {
        let Request { params, bad_words, constraint, no_repeat_ngram_size, beams, .. } = self;
        let bans = !bad_words.is_empty() || constraint.is_some() || *no_repeat_ngram_size > 0;
        bans || params.has_penalties() || beams.is_some()
    }

    /// The most blocks that it can hold at a time. Beams share the full blocks of the prompt.
    #[must_use]
    pub fn max_blocks(&self, limits: &Limits) -> usize {
        let blocks = limits.blocks_for(self.prompt.len().saturating_add(self.max_output_len));
        let shared = if self.width() > 1 { self.prompt.len() / limits.block_size } else { 0 };
        shared.saturating_add(self.width().saturating_mul(blocks - shared))
    }
}

/// A beam search.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Beams {
    /// How many beams, and how many answers.
    pub width: usize,
    /// An answer's score is the sum of its log-probabilities over its length to this power: above 0 it favours long
    /// answers, below 0 short ones.
    pub length_penalty: f32,
    /// When the search ends.
    pub early_stopping: EarlyStopping,
    /// Added to a continuation's sum in a round, times its rank among its beam's continuations; 0 is off.
    pub diversity_rate: f32,
}

impl Beams {
    /// How many continuations are looked at in a round, among which so many end ids may be. No beam needs to offer more.
    #[must_use]
    pub fn candidates(&self, end_ids: usize) -> usize {
        (1 + end_ids).max(2) * self.width
    }
}

impl Default for Beams {
    /// One beam.
    fn default() -> Self {
        Beams { width: 1, length_penalty: 1.0, early_stopping: EarlyStopping::No, diversity_rate: 0.0 }
    }
}

/// When a beam search ends, before its beams are as long as they may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EarlyStopping {
    /// When there are as many answers as beams.
    Yes,
    /// When the best beam, scored as long as it is, is worse than the worst answer.
    No,
    /// When the best beam cannot become better than the worst answer, however long it grows.
    Never,
}

/// Log-probabilities at one position, by the model's own distribution: before bias, penalties, bans and temperature.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TokenLogprobs {
    /// The token there.
    pub token: TokenId,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The most likely tokens there, most likely first.
    pub best: Vec<(TokenId, f32)>,
}

/// An answer of a beam search.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Hypothesis {
    /// Its tokens, with the end id if one ended it.
    pub tokens: Vec<TokenId>,
    /// The log-probability of each of them, after bias, penalties and bans.
    pub logprobs: Vec<f32>,
    /// Their text, without the end id. Empty without a tokenizer.
    pub text: String,
    /// Its score.
    pub score: f32,
    /// Why it ended.
    pub reason: Option<FinishReason>,
}

/// Why a request failed, while others go on.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// A row of logits that it needs is not finite.
    #[error("step {step}: {source}")]
    NonFinite {
        /// Which step, from 0.
        step: u64,
        /// The row.
        source: NonFinite,
    },
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
    /// More log-probabilities than there may be.
    #[error("log-probabilities of {asked} tokens at each position were asked for; there may be {MAX_LOGPROBS}")]
    TooManyLogprobs {
        /// How many.
        asked: usize,
    },
    /// More beams than a step has places, or none.
    #[error(
        "{width} beams were asked for, but the engine computes 1 to {limit} sequences at a time; build it with a larger --max-batch-size"
    )]
    Beams {
        /// How many.
        width: usize,
        /// Sequences of a step.
        limit: usize,
    },
    /// Something that a beam search does not give.
    #[error("{what} were asked for together with beams; leave either out")]
    NotWithBeams {
        /// What.
        what: &'static str,
    },
    /// The engine does not gather context logits.
    #[error(
        "logits of the prompt were asked for, but the engine was built without --gather-context-logits; build it with that flag"
    )]
    NoContextLogits,
}
