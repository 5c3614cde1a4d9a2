//! A session: many requests on one executor, batched in flight.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mixtral_engine::{BackendError, DeviceIdle, Limits, Score, StepOutputs};
use mixtral_model::TokenId;
use mixtral_tokenizer::{Tokenizer, TokenizerError};

use crate::beams::{Answer, BeamSearch};
use crate::execute::Executor;
use crate::request::{
    FinishReason, Hypothesis, MAX_LOGPROBS, Refusal, Request, RequestError, RequestId, TokenLogprobs,
};
use crate::schedule::{self, Chunk, Counters, Schedule, SessionOptions};
use crate::sequence::Sequence;
use crate::text::SequenceText;

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

/// When things happened to a request, and what it found in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// From submission to the first token.
    pub first_token: Duration,
    /// From submission to the last token.
    pub total: Duration,
    /// How many tokens of its prompt were in the cache already.
    pub cached_tokens: usize,
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
    /// Log-probabilities where the token was drawn, if they were asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// Log-probabilities of the prompt's tokens that this step scored, in order, if they were asked for. The first is that
    /// of the prompt's second token.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// The answers of a beam search, best first, with its last event. It has no other event.
    pub beams: Vec<Hypothesis>,
    /// Why the request failed. It is the request's last event then. Others go on.
    pub failed: Option<RequestError>,
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

impl Event {
    fn new(id: RequestId) -> Self {
        Event {
            id,
            token: None,
            text: String::new(),
            text_failed: None,
            context_logits: Vec::new(),
            generation_logits: Vec::new(),
            logprobs: None,
            prompt_logprobs: Vec::new(),
            beams: Vec::new(),
            failed: None,
            finished: None,
        }
    }

    /// Whether it is its request's last.
    #[must_use]
    pub fn is_last(&self) -> bool {
        self.finished.is_some() || self.failed.is_some()
    }

    /// The event, if its request did not fail in it.
    ///
    /// # Errors
    /// Why it failed.
    pub fn ok(mut self) -> Result<Event, RequestError> {
        self.failed.take().map_or(Ok(self), Err)
    }

    fn says_something(&self) -> bool {
        self.token.is_some() || !self.context_logits.is_empty() || !self.prompt_logprobs.is_empty() || self.is_last()
    }
}

/// What a session holds, and what it has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionStats {
    /// Requests that wait to join.
    pub waiting: usize,
    /// Sequences that run; each beam is one.
    pub running: usize,
    /// Sequences whose blocks are in the host's memory.
    pub swapped: usize,
    /// Blocks of the cache.
    pub blocks: usize,
    /// Blocks that sequences hold.
    pub used_blocks: usize,
    /// Free blocks whose content another prompt could use.
    pub cached_blocks: usize,
    /// What the schedule has done so far.
    pub counters: Counters,
}

/// Figures of a step. Tokens of sequences that had ended before, or were cancelled, do not count.
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
    /// Request, beam, and the part of the step.
    parts: Vec<(RequestId, usize, Chunk)>,
    started: Instant,
}

/// Requests on an executor.
pub struct Session {
    executor: Box<dyn Executor>,
    tokenizer: Option<Arc<Tokenizer>>,
    capabilities: Capabilities,
    schedule: Schedule,
    /// Whether steps take tokens that the step before draws.
    overlaps: bool,
    /// The beam searches under way, each with tokens and log-probabilities of its answers.
    searches: HashMap<RequestId, BeamSearch<Hypothesis>>,
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
        Session::with_options(executor, capabilities, tokenizer, SessionOptions::default())
    }

    /// The same, with other options.
    #[must_use]
    pub fn with_options(
        executor: Box<dyn Executor>,
        capabilities: Capabilities,
        tokenizer: Option<Arc<Tokenizer>>,
        options: SessionOptions,
    ) -> Self {
        let overlaps = options.overlap && executor.runs_ahead();
        let options = SessionOptions { overlap: overlaps, ..options };
        let schedule = Schedule::new(capabilities.limits, options, executor.kv_blocks());
        Session {
            executor,
            tokenizer,
            capabilities,
            schedule,
            overlaps,
            searches: HashMap::new(),
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
        if let Some(beams) = request.beams {
            let search = BeamSearch::new(beams, &request.end_ids, request.max_output_len);
            self.searches.insert(id, search);
        }
        self.schedule.push(Sequence::new(id, request));
        Ok(id)
    }

    fn refuse(&self, request: &Request) -> Result<(), Refusal> {
        let Capabilities { limits, vocab_size, gather_context_logits } = self.capabilities;
        let (prompt, output) = (request.prompt.len(), request.max_output_len);
        if prompt == 0 {
            return Err(Refusal::EmptyPrompt);
        }
        if output == 0 && request.prompt_logprobs.is_none() {
            return Err(Refusal::NoOutput);
        }
        if prompt.saturating_add(output) > limits.max_seq_len {
            return Err(Refusal::TooLong { prompt, output, limit: limits.max_seq_len });
        }
        if let Some(position) = request.prompt.iter().position(|t| t.0 as usize >= vocab_size) {
            return Err(Refusal::UnknownToken { token: request.prompt[position], position, vocab_size });
        }
        if let Some(&asked) = request.logprobs.iter().chain(&request.prompt_logprobs).find(|&&n| n > MAX_LOGPROBS) {
            return Err(Refusal::TooManyLogprobs { asked });
        }
        if let Some(beams) = request.beams {
            if beams.width == 0 || beams.width > limits.max_batch_size {
                return Err(Refusal::Beams { width: beams.width, limit: limits.max_batch_size });
            }
            let also = [
                (!request.stop_words.is_empty(), "stop words"),
                (request.generation_logits, "the logits of generated tokens"),
                (request.logprobs.is_some(), "the log-probabilities of likely tokens"),
                (output == 0, "no tokens"),
            ];
            if let Some((_, what)) = also.into_iter().find(|(asked, _)| *asked) {
                return Err(Refusal::NotWithBeams { what });
            }
        }
        let available = self.schedule.pool().num_blocks();
        let needed = request.max_blocks(&limits);
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
        let found = self.end(id);
        self.schedule.remove_cancelled();
        found
    }

    /// The same, but its sequences stay until [`Schedule::remove_cancelled`].
    fn end(&mut self, id: RequestId) -> bool {
        self.searches.remove(&id);
        let Schedule { queue, running, .. } = &mut self.schedule;
        debug_assert!(queue.iter().is_sorted_by_key(|s| s.id), "as the field says");
        if let Ok(at) = queue.binary_search_by_key(&id, |s| s.id) {
            queue.remove(at);
            return true;
        }
        let mut found = false;
        for sequence in running.iter_mut().filter(|s| s.id == id && !s.cancelled) {
            sequence.cancelled = true;
            found = true;
        }
        found
    }

    /// Whether nothing is queued or running.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.schedule.queue.is_empty() && self.schedule.running.is_empty()
    }

    /// Whether it has a tokenizer, so that events have text.
    #[must_use]
    pub fn makes_text(&self) -> bool {
        self.tokenizer.is_some()
    }

    /// Blocks that nobody holds.
    #[must_use]
    pub fn free_blocks(&self) -> usize {
        self.schedule.pool().num_free()
    }

    /// What it holds now, and what it has done.
    #[must_use]
    pub fn stats(&self) -> SessionStats {
        let pool = self.schedule.pool();
        let swapped = self.schedule.running.iter().filter(|s| s.swapped.is_some()).count();
        SessionStats {
            waiting: self.schedule.queue.len(),
            running: self.schedule.running.len() - swapped,
            swapped,
            blocks: pool.num_blocks(),
            used_blocks: pool.num_blocks() - pool.num_free(),
            cached_blocks: pool.num_kept(),
            counters: self.schedule.counters,
        }
    }

    /// The figures of the last step.
    #[must_use]
    pub fn last_step(&self) -> StepStats {
        self.last_step
    }

    /// How many tokens each expert got, `[num_layers][num_experts]`. Tokens that were computed behind an end and thrown away
    /// count too.
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

    /// How long this rank's device had nothing to do between steps, if the backend can tell.
    #[must_use]
    pub fn device_idle(&self) -> Option<DeviceIdle> {
        self.executor.device_idle()
    }

    /// Admits the requests that fit, launches as many steps as can be under way, waits for the oldest, and returns its
    /// events. An idle session does nothing. A step may have no events: all sequences in it had ended when it was launched,
    /// but that was not known yet.
    ///
    /// # Errors
    /// If the backend fails.
    pub fn step(&mut self) -> Result<Vec<Event>, SessionError> {
        let most = if self.overlaps { 2 } else { self.executor.depth() };
        while self.flights.len() < most && self.launch()? {}
        let Some(flight) = self.flights.pop_front() else { return Ok(Vec::new()) };
        let failed = |source| SessionError::Backend { step: self.steps, source };
        let outputs = self.executor.collect().map_err(failed)?;
        let now = Instant::now();
        let since = self.last_done.map_or(flight.started, |done| done.max(flight.started));
        self.last_step = StepStats { time: now - since, ..StepStats::default() };
        self.last_done = Some(now);
        let mut events = Vec::with_capacity(flight.parts.len());
        let mut scores = outputs.scores.iter();
        for (id, beam, chunk) in &flight.parts {
            let Some(event) = self.land((*id, *beam), chunk, &outputs, &mut scores, now) else { continue };
            // Of several beams that fail, the first ends the request.
            if event.is_last() {
                self.end(event.id);
            }
            events.push(event);
        }
        self.steps += 1;
        events.extend(self.advance_searches(now));
        self.schedule.remove_cancelled();
        Ok(events)
    }

    /// Launches a step, if there is anything to compute.
    fn launch(&mut self) -> Result<bool, SessionError> {
        if self.overlaps && !self.flights.is_empty() && !self.schedule.may_run_ahead() {
            return Ok(false);
        }
        let chunks = self.schedule.plan(self.executor.depth());
        if chunks.is_empty() {
            return Ok(false);
        }
        let inputs = self.schedule.inputs(&chunks);
        let started = Instant::now();
        let step = self.steps + self.flights.len() as u64;
        self.executor.launch(&inputs).map_err(|source| SessionError::Backend { step, source })?;
        self.schedule.launched(&chunks);
        let of = |chunk: Chunk| {
            let sequence = &self.schedule.running[chunk.sequence];
            (sequence.id, sequence.beam, chunk)
        };
        self.flights.push_back(Flight { parts: chunks.into_iter().map(of).collect(), started });
        Ok(true)
    }

    /// Takes in the results of a step for one sequence. Takes its part of the step's scores from `scores`.
    fn land<'s>(
        &mut self,
        (id, beam): (RequestId, usize),
        chunk: &Chunk,
        outputs: &StepOutputs,
        scores: &mut impl Iterator<Item = &'s Score>,
        now: Instant,
    ) -> Option<Event> {
        let at = self.schedule.find(id, beam)?;
        let vocab_size = self.capabilities.vocab_size;
        let sequence = &mut self.schedule.running[at];
        sequence.in_flight -= 1;
        if sequence.in_flight == 0 {
            sequence.drawing = None;
        }
        let request = &sequence.request;
        let mut event = Event::new(id);
        let scored =
            |token: TokenId, score: &Score| TokenLogprobs { token, logprob: score.logprob, best: score.best.clone() };
        if request.prompt_logprobs.is_some() && chunk.is_prompt {
            let tokens = schedule::scored_tokens(&request.prompt, chunk.end - chunk.num_tokens, chunk.end);
            event.prompt_logprobs =
                tokens.iter().zip(&mut *scores).map(|(&token, score)| scored(token, score)).collect();
        }
        if let (Some(sample), Some(_)) = (chunk.sample, request.logprobs) {
            event.logprobs = scores.next().map(|score| scored(outputs.tokens[sample], score));
        }
        let candidates = chunk.sample.and(request.beams).and_then(|_| scores.next());
        if sequence.cancelled {
            return None;
        }
        let StepStats { prefill_tokens, decode_tokens, .. } = &mut self.last_step;
        *(if chunk.is_prompt { prefill_tokens } else { decode_tokens }) += chunk.num_tokens;
        let mine = chunk.first_logits_row..chunk.first_logits_row + chunk.num_logits;
        if let Some(&source) = outputs.non_finite.iter().find(|wrong| mine.contains(&wrong.row)) {
            return Some(Event {
                failed: Some(RequestError::NonFinite { step: self.steps, source }),
                ..Event::new(id)
            });
        }
        let rows = |first: usize, count: usize| outputs.logits[first * vocab_size..][..count * vocab_size].to_vec();
        if chunk.is_prompt && request.context_logits {
            event.context_logits = rows(chunk.first_logits_row, chunk.num_logits);
        }
        if let Some(candidates) = candidates {
            sequence.candidates = Some(candidates.best.clone());
            sequence.first_token.get_or_insert(now);
        } else if let Some(sample) = chunk.sample {
            if request.generation_logits {
                event.generation_logits = rows(mine.end - 1, 1);
            }
            accept(sequence, outputs.tokens[sample], self.tokenizer.as_deref(), now, &mut event);
        } else if request.max_output_len == 0 && chunk.end == sequence.prompt_len() {
            event.finished = Some((FinishReason::Length, sequence.timing(now, now)));
        }
        if chunk.is_prompt {
            self.schedule.landed(at, chunk.end);
        }
        event.says_something().then_some(event)
    }

    /// Takes every beam search on whose beams have all been computed.
    fn advance_searches(&mut self, now: Instant) -> Vec<Event> {
        let is_ready = |id: &RequestId| {
            let mut beams = self.schedule.beams(*id).peekable();
            beams.peek().is_some() && beams.all(|beam| beam.candidates.is_some())
        };
        let mut ready: Vec<RequestId> = self.searches.keys().copied().filter(is_ready).collect();
        ready.sort_unstable();
        ready.into_iter().filter_map(|id| self.advance_search(id, now)).collect()
    }

    /// Takes a beam search on by one token. Returns its last event if it ends.
    fn advance_search(&mut self, id: RequestId, now: Instant) -> Option<Event> {
        let search = self.searches.get_mut(&id)?;
        let beams: Vec<&Sequence> = self.schedule.beams(id).collect();
        let candidates: Vec<_> = beams.iter().map(|beam| beam.candidates.clone().unwrap_or_default()).collect();
        let timing = beams.first()?.timing(beams[0].first_token.unwrap_or(now), now);
        let next = search.advance(&candidates, |ended| {
            let parent = beams[ended.parent];
            let is_end = parent.request.end_ids.contains(&ended.token);
            Hypothesis {
                tokens: parent.output().iter().copied().chain([ended.token]).collect(),
                logprobs: parent.logprobs.iter().copied().chain([ended.logprob]).collect(),
                reason: Some(if is_end { FinishReason::EndId } else { FinishReason::Length }),
                ..Hypothesis::default()
            }
        });
        if !next.is_empty() {
            self.schedule.continue_beams(id, &next);
            return None;
        }
        let answers = self.searches.remove(&id)?.into_answers();
        self.end(id);
        let tokenizer = self.tokenizer.as_deref();
        let answer = |Answer { score, output }: Answer<Hypothesis>| {
            let text = tokenizer.map(|tokenizer| text_of(&output, tokenizer)).unwrap_or_default();
            Hypothesis { score, text, ..output }
        };
        let beams: Vec<Hypothesis> = answers.into_iter().map(answer).collect();
        let reason = beams.first().and_then(|best| best.reason).unwrap_or(FinishReason::Length);
        Some(Event { beams, finished: Some((reason, timing)), ..Event::new(id) })
    }
}

/// The text of an answer, without the end id that ended it.
fn text_of(answer: &Hypothesis, tokenizer: &Tokenizer) -> String {
    let (mut text, mut event) = (SequenceText::new(&[]), Event::new(RequestId(0)));
    let ended = usize::from(answer.reason == Some(FinishReason::EndId));
    for &token in &answer.tokens[..answer.tokens.len() - ended] {
        text.push(tokenizer, token, &mut event);
    }
    text.finish(tokenizer, &mut event);
    event.text
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
    event.finished = Some((reason, sequence.timing(first_token, now)));
}
