//! A request under way.

use std::time::Instant;

use mixtral_engine::{RandomKey, SampleRequest};
use mixtral_model::{BlockId, TokenId};

use crate::request::{Request, RequestId};
use crate::text::SequenceText;

/// The state of a request: its tokens so far, and how many of them the cache holds.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// Its number.
    pub id: RequestId,
    /// The request.
    pub request: Request,
    /// Prompt and output.
    pub tokens: Vec<TokenId>,
    /// Tokens whose keys and values are in the cache, or will be after the steps under way.
    pub num_computed: usize,
    /// Its blocks, in order of position.
    pub blocks: Vec<BlockId>,
    /// Its output as text.
    pub text: SequenceText,
    /// How many steps under way compute tokens of it.
    pub in_flight: usize,
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
            blocks: Vec::new(),
            text: SequenceText::new(&request.stop_words),
            in_flight: 0,
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

    /// Tokens that no step has computed yet; none while its next token is being drawn.
    #[must_use]
    pub fn num_pending(&self) -> usize {
        self.tokens.len() - self.num_computed
    }

    /// Whether the next step computes one token, which an earlier step drew.
    #[must_use]
    pub fn is_decode(&self) -> bool {
        self.num_computed >= self.prompt_len()
    }

    /// The most tokens that the finished sequence can have.
    #[must_use]
    pub fn max_len(&self) -> usize {
        self.prompt_len() + self.request.max_output_len
    }

    /// The draw of its next token, from row `row` of the step's logits.
    #[must_use]
    pub fn sample_request(&self, row: usize) -> SampleRequest<'_> {
        let position = u32::try_from(self.output().len()).unwrap_or(u32::MAX);
        let Request { seed, prompt_index, hypothesis, params, .. } = self.request;
        SampleRequest {
            row,
            params,
            key: RandomKey { seed, prompt: prompt_index, hypothesis, position },
            tokens: (&self.tokens[..]).into(),
            prompt_len: self.prompt_len(),
            banned: self.request.bad_words.banned(&self.tokens),
        }
    }
}
