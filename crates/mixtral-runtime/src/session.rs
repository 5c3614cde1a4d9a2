//! A session: many requests on one executor, batched in flight.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mixtral_engine::{BackendError, Limits, StepOutputs};
use mixtral_model::TokenId;
use mixtral_tokenizer::{Tokenizer, TokenizerError};

use crate::blocks::BlockPool;
use crate::execute::Executor;
use crate::request::{FinishReason, Refusal, Request, RequestId};
use crate::schedule::{self, Chunk};
use crate::sequence::Sequence;

/// What a session must know of an engine.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    /// What a step may hold.
    pub limits: Limits,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Whether the engine gathers the logits of prompt tokens.
    pub gather_context_logits: bool,
}

/// When things happened to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// From submission to the first token.
    pub first_token: Duration,
    /// From submission to the last token.
    pub total: Duration,
}

/// Something that happened to a request in a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// The request.
    pub id: RequestId,
    /// The token drawn.
    pub token: Option<TokenId>,
    /// The text that is certain now. Always empty without a tokenizer.
    pub text: String,
    /// Why the request's text ends here, if the tokenizer failed. Its tokens continue, without stop words.
    pub text_failed: Option<TokenizerError>,
    /// Logits of the prompt's tokens computed in this step, `[n, vocab_size]`, if they were asked for.
    pub context_logits: Vec<f32>,
    /// Logits that the token was drawn from, `[vocab_size]`, if they were asked for.
    pub generation_logits: Vec<f32>,
    /// Why the request ended, and when. It is the request's last event then.
    pub finished: Option<(FinishReason, Timing)>,
}

/// A step that failed. The session cannot be used afterwards.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The backend.
    #[error("step {step}: {source}")]
    Backend {
        /// Which step, from 0.
        step: u64,
        /// The backend's error.
        source: BackendError,
    },
}

/// Figures of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepStats {
    /// Tokens of prompts.
    pub prefill_tokens: usize,
    /// Tokens of decodes.
    pub decode_tokens: usize,
    /// Wall time of the step. Where steps overlap, it counts from the end of the step before.
    pub time: Duration,
}

/// A step under way.
struct Flight {
    parts: Vec<(RequestId, Chunk)>,
    stats: StepStats,
    started: Instant,
}

/// Requests on an executor.
pub struct Session {
    executor: Box<dyn Executor>,
    tokenizer: Option<Arc<Tokenizer>>,
    capabilities: Capabilities,
    pool: BlockPool,
    queue: VecDeque<Sequence>,
    running: Vec<Sequence>,
    flights: VecDeque<Flight>,
    submitted: usize,
    /// Steps done.
    steps: u64,
    last_step: StepStats,
    last_done: Option<Instant>,
}

impl Session {
    /// A session without requests. Without a tokenizer, events have no text and stop words have no effect.
    #[must_use]
    pub fn new(executor: Box<dyn Executor>, capabilities: Capabilities, tokenizer: Option<Arc<Tokenizer>>) -> Self {
        let pool = BlockPool::new(executor.kv_blocks());
        Session {
            executor,
            tokenizer,
            capabilities,
            pool,
            queue: VecDeque::new(),
            running: Vec::new(),
            flights: VecDeque::new(),
            submitted: 0,
            steps: 0,
            last_step: StepStats::default(),
            last_done: None,
        }
    }

    /// Queues a request.
    ///
    /// # Errors
    /// If this engine can never answer it.
    pub fn submit(&mut self, request: Request) -> Result<RequestId, Refusal> {
        self.refuse(&request)?;
        let id = RequestId(self.submitted);
        self.submitted += 1;
        self.queue.push_back(Sequence::new(id, request));
        Ok(id)
    }

    fn refuse(&self, request: &Request) -> Result<(), Refusal> {
        let Capabilities { limits, vocab_size, gather_context_logits } = self.capabilities;
        let (prompt, output) = (request.prompt.len(), request.max_output_len);
        if prompt == 0 {
            return Err(Refusal::EmptyPrompt);
        }
        if output == 0 {
            return Err(Refusal::NoOutput);
        }
        if prompt.saturating_add(output) > limits.max_seq_len {
            return Err(Refusal::TooLong { prompt, output, limit: limits.max_seq_len });
        }
        if let Some(position) = request.prompt.iter().position(|t| t.0 as usize >= vocab_size) {
            return Err(Refusal::UnknownToken { token: request.prompt[position], position, vocab_size });
        }
        let (needed, available) = (limits.blocks_for(prompt + output), self.pool.num_blocks());
        if needed > available {
            return Err(Refusal::TooFewBlocks { needed, available });
        }
        if request.context_logits && !gather_context_logits {
            return Err(Refusal::NoContextLogits);
        }
        Ok(())
    }

    /// Ends a request. Returns whether it was still under way. Its blocks become free as soon as no step writes to
    /// them.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        if let Some(at) = self.queue.iter().position(|s| s.id == id) {
            self.queue.remove(at);
            return true;
        }
        let Some(at) = self.running.iter().position(|s| s.id == id && !s.cancelled) else { return false };
        self.running[at].cancelled = true;
        self.remove_cancelled();
        true
    }

    fn remove_cancelled(&mut self) {
        for sequence in self.running.extract_if(.., |s| s.cancelled && s.in_flight == 0) {
            self.pool.release(sequence.blocks);
        }
    }

    /// Whether nothing is queued or running.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.running.is_empty()
    }

    /// Whether it has a tokenizer, so that events have text.
    #[must_use]
    pub fn makes_text(&self) -> bool {
        self.tokenizer.is_some()
    }

    /// Blocks that nobody holds.
    #[must_use]
    pub fn free_blocks(&self) -> usize {
        self.pool.num_free()
    }

    /// The figures of the last step.
    #[must_use]
    pub fn last_step(&self) -> StepStats {
        self.last_step
    }

    /// How many tokens each expert got, `[num_layers][num_experts]`.
    ///
    /// # Errors
    /// If a rank is gone.
    pub fn expert_counts(&mut self) -> Result<Vec<Vec<u64>>, SessionError> {
        self.executor.expert_counts().map_err(|source| SessionError::Backend { step: self.steps, source })
    }

    /// Time that this rank spent in each operation of its program. Empty unless the backend measures.
    #[must_use]
    pub fn op_times(&self) -> Vec<Duration> {
        self.executor.op_times()
    }

    /// Admits the requests that fit, launches as many steps as can be under way, waits for the oldest, and returns its
    /// events. An idle session does nothing.
    ///
    /// # Errors
    /// If the backend fails.
    pub fn step(&mut self) -> Result<Vec<Event>, SessionError> {
        let depth = self.executor.depth();
        while self.flights.len() < depth && self.launch(depth)? {}
        let Some(flight) = self.flights.pop_front() else { return Ok(Vec::new()) };
        let failed = |source| SessionError::Backend { step: self.steps, source };
        let outputs = self.executor.collect().map_err(failed)?;
        let now = Instant::now();
        let since = self.last_done.map_or(flight.started, |done| done.max(flight.started));
        self.last_step = StepStats { time: now - since, ..flight.stats };
        self.last_done = Some(now);
        self.steps += 1;
        let mut events = Vec::new();
        for (id, chunk) in &flight.parts {
            events.extend(self.land(*id, chunk, &outputs, now));
        }
        for event in events.iter().filter(|e| e.finished.is_some()) {
            self.cancel(event.id);
        }
        self.remove_cancelled();
        Ok(events)
    }

    /// Launches a step, if there is anything to compute.
    fn launch(&mut self, depth: usize) -> Result<bool, SessionError> {
        let limits = self.capabilities.limits;
        schedule::admit(&mut self.queue, &mut self.running, &mut self.pool, &limits);
        let chunks = schedule::plan(&self.running, &limits, depth);
        if chunks.is_empty() {
            return Ok(false);
        }
        let inputs = schedule::inputs(&self.running, &chunks, &limits);
        let started = Instant::now();
        let stats = StepStats {
            decode_tokens: inputs.num_decodes,
            prefill_tokens: inputs.num_tokens() - inputs.num_decodes,
            time: Duration::ZERO,
        };
        let step = self.steps + self.flights.len() as u64;
        self.executor.launch(&inputs).map_err(|source| SessionError::Backend { step, source })?;
        let mut parts = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            let sequence = &mut self.running[chunk.sequence];
            sequence.num_computed += chunk.num_tokens;
            sequence.in_flight += 1;
            parts.push((sequence.id, chunk));
        }
        self.flights.push_back(Flight { parts, stats, started });
        Ok(true)
    }

    /// Takes in the results of a step for one request.
    fn land(&mut self, id: RequestId, chunk: &Chunk, outputs: &StepOutputs, now: Instant) -> Option<Event> {
        let sequence = self.running.iter_mut().find(|s| s.id == id)?;
        sequence.in_flight -= 1;
        if sequence.cancelled {
            return None;
        }
        let vocab_size = self.capabilities.vocab_size;
        let rows = |first: usize, count: usize| outputs.logits[first * vocab_size..][..count * vocab_size].to_vec();
        let mut event = Event {
            id,
            token: None,
            text: String::new(),
            text_failed: None,
            context_logits: Vec::new(),
            generation_logits: Vec::new(),
            finished: None,
        };
        if chunk.is_prompt && sequence.request.context_logits {
            event.context_logits = rows(chunk.first_logits_row, chunk.num_logits);
        }
        if let Some(sample) = chunk.sample {
            if sequence.request.generation_logits {
                event.generation_logits = rows(chunk.first_logits_row + chunk.num_logits - 1, 1);
            }
            accept(sequence, outputs.tokens[sample], self.tokenizer.as_deref(), now, &mut event);
        }
        (event.token.is_some() || !event.context_logits.is_empty()).then_some(event)
    }
}

/// Adds a token to its sequence. Fills in the event: the token's text, and whether it was the last.
fn accept(sequence: &mut Sequence, token: TokenId, tokenizer: Option<&Tokenizer>, now: Instant, event: &mut Event) {
    sequence.tokens.push(token);
    event.token = Some(token);
    let first_token = *sequence.first_token.get_or_insert(now);
    let is_end = sequence.request.end_ids.contains(&token);
    let mut reason = is_end.then_some(FinishReason::EndId);
    if let (Some(tokenizer), false) = (tokenizer, is_end)
        && sequence.text.push(tokenizer, token, event)
    {
        reason = Some(FinishReason::StopWord);
    }
    if reason.is_none() && sequence.output().len() >= sequence.request.max_output_len {
        reason = Some(FinishReason::Length);
    }
    let Some(mut reason) = reason else { return };
    if let (Some(tokenizer), true) = (tokenizer, reason != FinishReason::StopWord)
        && sequence.text.finish(tokenizer, event)
        && reason == FinishReason::Length
    {
        reason = FinishReason::StopWord;
    }
    let since = |then: Instant| then.duration_since(sequence.submitted);
    event.finished = Some((reason, Timing { first_token: since(first_token), total: since(now) }));
}
