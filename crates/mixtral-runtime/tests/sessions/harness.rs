//! Sessions over mocks, requests for them, and the expected outcomes.

use std::collections::BTreeMap;
use std::sync::Arc;

use mixtral_engine::sampling::sample;
use mixtral_engine::score::score;
use mixtral_engine::{Limits, RandomKey, SampleRequest, SamplingParams, ScoreRequest, Scored, StepInputs};
use mixtral_model::TokenId;
use mixtral_runtime::session::Capabilities;
use mixtral_runtime::{
    Event, Executor, FinishReason, Hypothesis, Local, Request, RequestId, Session, SessionOptions, TokenLogprobs,
    Tokenizer, TokenizerError,
};

use crate::beams;
use crate::mock::{Mock, Pipeline, Steps, VOCAB, digest_of, logits, parts};

/// The parts of a session.
#[derive(Clone)]
pub struct Setup {
    pub depth: usize,
    /// Whether the executor takes a step before the tokens of the step before are known.
    pub ahead: bool,
    pub max_batch_size: usize,
    pub max_num_tokens: usize,
    pub max_num_logits: usize,
    pub kv_blocks: usize,
    pub gather_context_logits: bool,
    pub fails_at: Option<usize>,
    pub tokenizer: Option<Arc<Tokenizer>>,
    pub options: SessionOptions,
}

impl Default for Setup {
    /// Limits that are large enough, unless a test sets smaller ones. Blocks have 4 tokens, and sequences at most 30.
    fn default() -> Self {
        Setup {
            depth: 1,
            ahead: false,
            max_batch_size: 8,
            max_num_tokens: 64,
            max_num_logits: 64,
            kv_blocks: 64,
            gather_context_logits: true,
            fails_at: None,
            tokenizer: None,
            options: SessionOptions::default(),
        }
    }
}

impl Setup {
    pub fn limits(&self) -> Limits {
        let Setup { max_batch_size, max_num_tokens, max_num_logits, .. } = *self;
        Limits { max_batch_size, max_num_tokens, max_num_logits, max_seq_len: 30, block_size: 4 }
    }

    pub fn mock(&self) -> Mock {
        let mut mock = Mock::new(self.limits(), self.kv_blocks);
        mock.fails_at = self.fails_at;
        mock.ahead = self.ahead;
        mock
    }

    /// A session over `executor`.
    pub fn over(&self, executor: Box<dyn Executor>) -> Session {
        let gather_context_logits = self.gather_context_logits;
        let capabilities = Capabilities { limits: self.limits(), vocab_size: VOCAB, gather_context_logits };
        Session::with_options(executor, capabilities, self.tokenizer.clone(), self.options)
    }

    /// A session over a mock, and the steps that the mock gets.
    pub fn session(&self) -> (Session, Steps) {
        let mock = self.mock();
        let steps = Steps::clone(&mock.steps);
        let executor: Box<dyn Executor> = if self.depth == 1 && !self.ahead {
            Box::new(Local::new(Box::new(mock)))
        } else {
            Box::new(Pipeline::new(mock, self.depth))
        };
        (self.over(executor), steps)
    }
}

/// A request of random tokens. Every seed gives other tokens.
pub fn request(seed: u32, prompt_len: u32, max_output_len: usize) -> Request {
    let token = |position| {
        let bits = RandomKey { seed: 1, prompt: seed, hypothesis: 0, position }.bits();
        TokenId(u32::try_from(bits % VOCAB as u64).unwrap())
    };
    Request { prompt: (0..prompt_len).map(token).collect(), max_output_len, ..Request::default() }
}

/// A request that draws its tokens at random, and asks for all logits.
pub fn curious(seed: u32, prompt_len: u32, max_output_len: usize) -> Request {
    Request {
        params: SamplingParams { top_k: 0, frequency_penalty: 0.5, ..SamplingParams::default() },
        seed: 5,
        prompt_index: seed,
        hypothesis: seed % 3,
        generation_logits: true,
        context_logits: true,
        ..request(seed, prompt_len, max_output_len)
    }
}

/// The outcome of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    pub tokens: Vec<TokenId>,
    pub text: String,
    pub context_logits: Vec<f32>,
    pub generation_logits: Vec<f32>,
    pub text_failed: Option<TokenizerError>,
    pub reason: Option<FinishReason>,
    pub logprobs: Vec<TokenLogprobs>,
    pub prompt_logprobs: Vec<TokenLogprobs>,
    pub beams: Vec<Hypothesis>,
}

impl Outcome {
    /// Adds the request's next event.
    pub fn add(&mut self, event: Event) {
        assert_eq!(self.reason, None, "an event of request {}, which ended", event.id);
        assert!(self.text_failed.is_none() || event.text_failed.is_none(), "a text fails once");
        self.tokens.extend(event.token);
        self.text += &event.text;
        self.context_logits.extend(event.context_logits);
        self.generation_logits.extend(event.generation_logits);
        self.logprobs.extend(event.logprobs);
        self.prompt_logprobs.extend(event.prompt_logprobs);
        self.beams.extend(event.beams);
        self.text_failed = self.text_failed.take().or(event.text_failed);
        if let Some((reason, timing)) = event.finished {
            assert!(timing.first_token <= timing.total);
            self.reason = Some(reason);
        }
    }
}

/// The expected outcome of a request without a tokenizer. It does not depend on other requests.
pub fn expected(request: &Request) -> Outcome {
    let row = |tokens: &[TokenId]| logits(digest_of(tokens));
    let prompt_len = request.prompt.len();
    let (mut tokens, mut outcome) = (request.prompt.clone(), Outcome::default());
    if request.context_logits {
        outcome.context_logits = (1..=prompt_len).flat_map(|len| row(&tokens[..len])).collect();
    }
    if let Some(best) = request.prompt_logprobs {
        let scored = |len: usize| logprobs(&row(&tokens[..len]), tokens[len], best);
        outcome.prompt_logprobs = (1..prompt_len).map(scored).collect();
    }
    if request.beams.is_some() {
        outcome.beams = beams::expected(request);
        outcome.reason = outcome.beams[0].reason;
    }
    if request.max_output_len == 0 {
        outcome.reason = Some(FinishReason::Length);
    }
    while outcome.reason.is_none() {
        let token = sample(&mut row(&tokens), &draw(request, &tokens));
        outcome.logprobs.extend(request.logprobs.map(|best| logprobs(&row(&tokens), token, best)));
        if request.generation_logits {
            outcome.generation_logits.extend(row(&tokens));
        }
        tokens.push(token);
        outcome.reason = if request.end_ids.contains(&token) {
            Some(FinishReason::EndId)
        } else {
            (tokens.len() - prompt_len == request.max_output_len).then_some(FinishReason::Length)
        };
    }
    outcome.tokens = tokens.split_off(prompt_len);
    outcome
}

/// The draw after these tokens.
fn draw<'a>(request: &Request, tokens: &'a [TokenId]) -> SampleRequest<'a> {
    let Request { seed, prompt_index, hypothesis, params, no_repeat_ngram_size: n, .. } = *request;
    let prompt_len = request.prompt.len();
    let position = u32::try_from(tokens.len() - prompt_len).unwrap();
    let mut banned = request.bad_words.banned(tokens);
    if (tokens.len() - prompt_len) < request.min_output_len {
        banned.extend(&request.end_ids);
    }
    let repeats = |token: &u32| {
        let before = tokens.len().checked_sub(n.wrapping_sub(1));
        n > 0 && before.is_some_and(|at| tokens.windows(n).any(|w| w == [&tokens[at..], &[TokenId(*token)]].concat()))
    };
    banned.extend((0..u32::try_from(VOCAB).unwrap()).filter(repeats).map(TokenId));
    SampleRequest {
        row: 0,
        params,
        key: RandomKey { seed, prompt: prompt_index, hypothesis, position },
        tokens: tokens.into(),
        prompt_len,
        bias: request.logit_bias.clone(),
        banned,
    }
}

/// The log-probability of a token in a row of logits, and those of the best.
fn logprobs(row: &[f32], token: TokenId, best: usize) -> TokenLogprobs {
    let of = Scored::Token { row: 0, token };
    let scored = score(&ScoreRequest { of, best }, &StepInputs::default(), |_| row, &[]).unwrap();
    TokenLogprobs { token, logprob: scored.logprob, best: scored.best }
}

/// The tokens that may come next, after bias, penalties and bans, and their log-probabilities, most likely first.
pub fn next_logprobs(request: &Request, tokens: &[TokenId]) -> Vec<(TokenId, f32)> {
    let row = logits(digest_of(tokens));
    let inputs = StepInputs { samples: vec![draw(request, tokens)], ..StepInputs::default() };
    let asked = ScoreRequest { of: Scored::Candidates(0), best: VOCAB };
    score(&asked, &inputs, |_| &row, &[]).unwrap().best
}

/// More steps than any test's requests need.
pub const ENOUGH_STEPS: usize = 1000;

/// Runs steps until nothing is left to do. Returns the outcome of each request.
pub fn finish(session: &mut Session) -> BTreeMap<RequestId, Outcome> {
    let mut outcomes: BTreeMap<RequestId, Outcome> = BTreeMap::new();
    for _ in 0..ENOUGH_STEPS {
        if session.is_idle() {
            return outcomes;
        }
        for event in session.step().unwrap() {
            outcomes.entry(event.id).or_default().add(event);
        }
    }
    panic!("the session does not come to an end")
}

/// Submits a request that is not refused.
pub fn submit(session: &mut Session, request: &Request) -> RequestId {
    session.submit(request.clone()).unwrap()
}

/// The outcome of one request alone.
pub fn alone(setup: &Setup, request: &Request) -> Outcome {
    let (mut session, _) = setup.session();
    let id = submit(&mut session, request);
    finish(&mut session).remove(&id).unwrap()
}

/// A step in words: each sequence's positions, those of decodes (one each, at the front) before the bar.
pub fn written(step: &StepInputs<'_>) -> String {
    let positions: Vec<String> = parts(step).map(|part| format!("{:?}", part.positions)).collect();
    let (decodes, prompts) = positions.split_at(step.num_decodes);
    format!("{} | {}", decodes.join(" "), prompts.join(" ")).trim().to_owned()
}

/// The steps so far, in words.
pub fn all_written(steps: &Steps) -> Vec<String> {
    steps.lock().unwrap().iter().map(written).collect()
}
