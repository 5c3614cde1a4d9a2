//! A request under way.

use std::time::Instant;

use mixtral_engine::{RandomKey, SampleRequest, SamplingParams, TokenSource};
use mixtral_model::{BlockId, TokenId};

use crate::ngrams;
use crate::prefix::Content;
use crate::request::{Request, RequestId};
use crate::session::Timing;
use crate::text::SequenceText;

/// The state of a request: its tokens so far, and how many of them the cache holds.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// Its request's number.
    pub id: RequestId,
    /// Which of its request's beams it is; 0 if it has none.
    pub beam: usize,
    /// The request.
    pub request: Request,
    /// Prompt and output.
    pub tokens: Vec<TokenId>,
    /// Tokens whose keys and values are in the cache, or will be after the steps under way.
    pub num_computed: usize,
    /// Its blocks, in order of position: those of the computed tokens, and no others between steps. None while it is
    /// swapped out.
    pub blocks: Vec<BlockId>,
    /// Where its blocks are in the host's memory, while it is swapped out.
    pub swapped: Option<Vec<u32>>,
    /// The contents of the prompt's full blocks, if it may share them.
    pub contents: Vec<Content>,
    /// Of how many of its blocks the pool knows the content.
    pub described: usize,
    /// How many tokens of its prompt it found in the cache.
    pub cached: usize,
    /// The beam's most likely next tokens, as soon as they are known.
    pub candidates: Option<Vec<(TokenId, f32)>>,
    /// The log-probabilities of the beam's tokens.
    pub logprobs: Vec<f32>,
    /// Its output as text.
    pub text: SequenceText,
    /// How many steps under way compute tokens of it.
    pub in_flight: usize,
    /// Which draw of the last step that was launched gives its next token, if the step after it may take that token.
    pub drawing: Option<usize>,
    /// Whether it was cancelled. It is removed when its last step is done.
    pub cancelled: bool,
    /// When it was submitted.
    pub submitted: Instant,
    /// When its first token was drawn.
    pub first_token: Option<Instant>,
}

impl Sequence {
    /// A sequence of which nothing is computed yet.
    #[must_use]
    pub fn new(id: RequestId, request: Request) -> Self {
        Sequence {
            id,
            tokens: request.prompt.clone(),
            num_computed: 0,
            beam: 0,
            blocks: Vec::new(),
            swapped: None,
            contents: Vec::new(),
            described: 0,
            cached: 0,
            candidates: None,
            logprobs: Vec::new(),
            text: SequenceText::new(&request.stop_words),
            in_flight: 0,
            drawing: None,
            cancelled: false,
            submitted: Instant::now(),
            first_token: None,
            request,
        }
    }

    /// Tokens of the prompt.
    #[must_use]
    pub fn prompt_len(&self) -> usize {
        self.request.prompt.len()
    }

    /// Tokens generated so far.
    #[must_use]
    pub fn output(&self) -> &[TokenId] {
        &self.tokens[self.prompt_len()..]
    }

    /// Tokens that the next step can compute. While its next token is being drawn that is none, or the one that is
    /// drawn.
    #[must_use]
    pub fn num_pending(&self) -> usize {
        let known = self.tokens.len().saturating_sub(self.num_computed);
        known + usize::from(self.runs_ahead())
    }

    /// Whether the next step can compute its next token while that is being drawn.
    #[must_use]
    pub fn runs_ahead(&self) -> bool {
        self.drawing.is_some() && !self.ends() && !self.request.looks_back()
    }

    /// Whether it needs its next token before it can go on.
    #[must_use]
    pub fn waits(&self) -> bool {
        self.in_flight > 0 && self.num_pending() == 0 && !self.ends()
    }

    /// Whether the token that is being drawn is its last one, however it is.
    #[must_use]
    pub fn ends(&self) -> bool {
        let is_drawn = self.in_flight > 0 && self.num_computed >= self.tokens.len();
        is_drawn && self.output().len() + 1 >= self.request.max_output_len
    }

    /// The token at a position of those that the next step computes.
    #[must_use]
    pub fn source(&self, position: usize) -> Option<TokenSource> {
        let drawn = || self.drawing.map(TokenSource::Draw);
        self.tokens.get(position).copied().map(TokenSource::Id).or_else(drawn)
    }

    /// Whether the next step computes one token, which an earlier step drew.
    #[must_use]
    pub fn is_decode(&self) -> bool {
        self.num_computed >= self.prompt_len()
    }

    /// Whether every prompt token's row of logits is wanted.
    #[must_use]
    pub fn wants_prompt_rows(&self) -> bool {
        self.request.context_logits || self.request.prompt_logprobs.is_some()
    }

    /// The most blocks of its prompt that it can find in the cache. The prompt's last token is always computed, because the
    /// next token is drawn from its logits.
    #[must_use]
    pub fn most_cached(&self, block_size: usize) -> usize {
        (self.prompt_len() - 1) / block_size
    }

    /// Its times, with its first token drawn at `first_token` and its last one now.
    #[must_use]
    pub fn timing(&self, first_token: Instant, now: Instant) -> Timing {
        let since = |then: Instant| then.duration_since(self.submitted);
        Timing { first_token: since(first_token), total: since(now), cached_tokens: self.cached }
    }

    /// The draw of its next token, from row `row` of the step's logits.
    #[must_use]
    pub fn sample_request(&self, row: usize) -> SampleRequest<'_> {
        let output_len = self.output().len() + usize::from(self.drawing.is_some());
        let position = u32::try_from(output_len).unwrap_or(u32::MAX);
        // Without one of them, the tokens so far are of no use.
        let tokens = if self.drawing.is_some() { &[] } else { &self.tokens[..] };
        let Request { seed, prompt_index, hypothesis, mut params, .. } = self.request;
        if self.request.beams.is_some() {
            // What is drawn does not count, so it is drawn in the quickest way. Penalties hold for beams too.
            params = SamplingParams { temperature: 1.0, top_k: 1, ..params };
        }
        SampleRequest {
            row,
            params,
            key: RandomKey { seed, prompt: prompt_index, hypothesis, position },
            tokens: tokens.into(),
            prompt_len: self.prompt_len(),
            bias: self.request.logit_bias.clone(),
            banned: self.banned(output_len),
        }
    }

    /// The tokens that may not come next, behind an output of so many.
    fn banned(&self, output_len: usize) -> Vec<TokenId> {
        let Request { bad_words, constraint, end_ids, min_output_len, no_repeat_ngram_size, .. } = &self.request;
        // A constraint bans nearly the whole vocabulary, so its list is the one that the others are added to.
        let mut banned = constraint.as_ref().map_or_else(Vec::new, |constraint| constraint.banned(self.output()));
        banned.extend(bad_words.banned(&self.tokens));
        banned.extend(ngrams::repeating(&self.tokens, *no_repeat_ngram_size));
        if output_len < *min_output_len {
            banned.extend(end_ids);
        }
        banned
    }
}
