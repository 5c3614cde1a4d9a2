//! The session's thread: takes what handlers submit, computes steps, and tells the handlers what came of them.
//!
//! It never waits for a client. What a client has not yet read lies in its own channel, which holds no more than the longest
//! sequence of the engine.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use mixtral_runtime::{Event, FinishReason, Refusal, Request, RequestId, Session};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedSender;

use crate::error::ApiError;
use crate::metrics::{End, Metrics};

/// How often an idle session looks whether its ranks are alive.
const PULSE: Duration = Duration::from_secs(1);

/// What handlers tell the session's thread.
#[derive(Debug)]
pub(crate) enum Command {
    /// Generate the sequences of one HTTP request. All are taken before the next step.
    Submit(Vec<Submission>),
    /// End now; what still runs is given up.
    Stop,
}

/// A sequence that a client wants.
#[derive(Debug)]
pub(crate) struct Submission {
    /// What to generate.
    pub(crate) request: Request,
    /// Its number among the sequences of one HTTP request.
    pub(crate) index: usize,
    /// Where its updates go. If nobody is there any more, the sequence is cancelled.
    pub(crate) to: UnboundedSender<(usize, Update)>,
    /// The name of that request, for the log.
    pub(crate) name: Arc<str>,
    /// When it was asked for.
    pub(crate) asked: Instant,
    /// When it must have ended.
    pub(crate) deadline: Instant,
    /// Its place among the sequences that may be there. It is given back when the sequence ends.
    pub(crate) place: OwnedSemaphorePermit,
}

/// What a handler is told of a sequence.
#[derive(Debug)]
pub(crate) enum Update {
    /// The session took it.
    Accepted,
    /// The session can never answer it.
    Refused(Refusal),
    /// Something happened to it.
    Event(Box<Event>),
    /// It ended without an answer.
    Failed(ApiError),
}

impl Submission {
    fn split(self) -> (Request, Live) {
        let Submission { request, index, name, to, asked, deadline, place } = self;
        let prompt_tokens = request.prompt.len();
        let last_token = None;
        (request, Live { index, name, to, deadline, asked, last_token, prompt_tokens, tokens: 0, place: Some(place) })
    }
}

/// A sequence under way.
struct Live {
    index: usize,
    name: Arc<str>,
    to: UnboundedSender<(usize, Update)>,
    deadline: Instant,
    asked: Instant,
    /// When its last token came.
    last_token: Option<Instant>,
    prompt_tokens: usize,
    tokens: usize,
    /// Its place, until it ends.
    place: Option<OwnedSemaphorePermit>,
}

impl Live {
    /// Whether the client is still there.
    fn tell(&self, update: Update) -> bool {
        self.to.send((self.index, update)).is_ok()
    }

    /// Measures an event.
    fn measure(&mut self, event: &Event, now: Instant, metrics: &Metrics) {
        if event.token.is_some() {
            self.tokens += 1;
            metrics.generated_tokens.increment(1);
            match self.last_token.replace(now) {
                None => metrics.first_token.record(now - self.asked),
                Some(before) => metrics.between_tokens.record(now - before),
            }
        }
    }

    /// Counts its end, and leaves a line in the log. Its place is free from now on, so that a client that is told, and asks
    /// again, finds room.
    #[expect(clippy::cast_precision_loss, reason = "no sequence has so many tokens")]
    fn end(&mut self, how: End, now: Instant, metrics: &Metrics) {
        let Live { name, index, prompt_tokens, tokens, .. } = self;
        let (why, seconds) = (how.name(), (now - self.asked).as_secs_f64());
        tracing::info!(request = &**name, index, prompt_tokens, tokens, why, seconds, "ended");
        self.place = None;
        metrics.end(how);
        metrics.whole_answer.record(now - self.asked);
        metrics.tokens_of_prompt.record(self.prompt_tokens as f64);
        metrics.tokens_of_answer.record(self.tokens as f64);
    }
}

/// Runs the session until it is told to stop. `check` says whether all of the engine's ranks are alive. Nobody takes commands
/// afterwards, so their channel is closed.
///
/// # Errors
/// Why the session cannot be used any more. All sequences were told.
pub(crate) fn run(
    session: &mut Session,
    commands: Receiver<Command>,
    metrics: &Metrics,
    check: &mut dyn FnMut() -> Result<(), String>,
) -> Result<(), String> {
    let mut live = HashMap::new();
    let ended = work(session, &commands, metrics, check, &mut live);
    let why = match &ended {
        Ok(()) => ApiError::unavailable("the server was stopped before the answer was complete"),
        Err(error) => ApiError::internal(format!("the engine failed: {error}")),
    };
    let untaken = commands.try_iter().flat_map(|command| match command {
        Command::Submit(submissions) => submissions,
        Command::Stop => Vec::new(),
    });
    for mut sequence in live.into_values().chain(untaken.map(|submission| submission.split().1)) {
        sequence.end(End::Error, Instant::now(), metrics);
        sequence.tell(Update::Failed(why.clone()));
    }
    ended
}

fn work(
    session: &mut Session,
    commands: &Receiver<Command>,
    metrics: &Metrics,
    check: &mut dyn FnMut() -> Result<(), String>,
    live: &mut HashMap<RequestId, Live>,
) -> Result<(), String> {
    loop {
        metrics.session(&session.stats());
        let mut next = commands.try_recv().ok();
        if next.is_none() && session.is_idle() {
            next = match commands.recv_timeout(PULSE) {
                Ok(command) => Some(command),
                Err(RecvTimeoutError::Timeout) => {
                    check()?;
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            };
        }
        while let Some(command) = next {
            match command {
                Command::Submit(submissions) => {
                    submissions.into_iter().for_each(|submission| submit(session, submission, metrics, live))
                }
                Command::Stop => return Ok(()),
            }
            next = commands.try_recv().ok();
        }
        let now = Instant::now();
        live.retain(|id, sequence| {
            let stays = sequence.deadline > now && !sequence.to.is_closed();
            if !stays {
                session.cancel(*id);
                sequence.end(End::Abort, now, metrics);
                // If the client is gone, nobody hears it.
                sequence.tell(Update::Failed(ApiError::late("the answer took longer than this server allows")));
            }
            stays
        });
        let events = session.step().map_err(|error| error.to_string())?;
        // Everything is counted before clients are told, so that a client that asks finds its own answer counted.
        metrics.session(&session.stats());
        let now = Instant::now();
        for event in events {
            let Some(sequence) = live.get_mut(&event.id) else { continue };
            sequence.measure(&event, now, metrics);
            let (id, finished) = (event.id, event.finished);
            let (update, end) = match event.ok() {
                Ok(Event { text_failed: Some(error), .. }) => {
                    session.cancel(id);
                    (Update::Failed(ApiError::internal(error.to_string())), Some(End::Error))
                }
                Ok(event) => {
                    let end = |(reason, _)| if reason == FinishReason::Length { End::Length } else { End::Stop };
                    (Update::Event(Box::new(event)), finished.map(end))
                }
                Err(error) => (Update::Failed(ApiError::internal(error.to_string())), Some(End::Error)),
            };
            if let Some(end) = end {
                sequence.end(end, now, metrics);
            }
            // A client that is gone is noticed before the next step.
            sequence.tell(update);
            if end.is_some() {
                live.remove(&id);
            }
        }
    }
}

fn submit(session: &mut Session, submission: Submission, metrics: &Metrics, live: &mut HashMap<RequestId, Live>) {
    let (request, mut sequence) = submission.split();
    match session.submit(request) {
        Ok(id) => {
            metrics.prompt_tokens.increment(sequence.prompt_tokens as u64);
            // A client that is gone is noticed before the next step.
            sequence.tell(Update::Accepted);
            live.insert(id, sequence);
        }
        Err(refusal) => {
            sequence.place = None;
            sequence.tell(Update::Refused(refusal));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::mpsc::channel;

    use mixtral_engine::{BackendError, DeviceIdle, Limits, StepInputs, StepOutputs};
    use mixtral_model::TokenId;
    use mixtral_runtime::session::Capabilities;
    use mixtral_runtime::{Executor, Tokenizer};
    use serde_json::json;
    use tokio::sync::Semaphore;
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;

    /// Computes nothing, and draws the same token always.
    struct Always {
        token: TokenId,
        draws: usize,
    }

    impl Executor for Always {
        fn depth(&self) -> usize {
            1
        }

        fn runs_ahead(&self) -> bool {
            false
        }

        fn launch(&mut self, inputs: &StepInputs<'_>) -> Result<(), BackendError> {
            self.draws = inputs.samples.len();
            Ok(())
        }

        fn collect(&mut self) -> Result<StepOutputs, BackendError> {
            Ok(StepOutputs { tokens: vec![self.token; self.draws], ..StepOutputs::default() })
        }

        fn kv_blocks(&self) -> usize {
            4
        }

        fn expert_counts(&mut self) -> Result<Vec<Vec<u64>>, BackendError> {
            Ok(Vec::new())
        }

        fn op_times(&self) -> Vec<Duration> {
            Vec::new()
        }

        fn device_idle(&self) -> Option<DeviceIdle> {
            None
        }
    }

    const DECODABLE: u32 = 0;
    const UNDECODABLE: u32 = 1;

    /// A session that always draws `token`, for sequences of up to 8.
    fn session(token: u32) -> Session {
        let limits = Limits { max_batch_size: 2, max_num_tokens: 8, max_seq_len: 8, max_num_logits: 8, block_size: 4 };
        let capabilities = Capabilities { limits, vocab_size: 8, gather_context_logits: false };
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "added_tokens": [],
            // The library panics where it would strip more characters than a token has.
            "decoder": { "type": "Strip", "content": "!", "start": 0, "stop": 2 },
            "model": { "type": "WordLevel", "vocab": { "a": DECODABLE, "!": UNDECODABLE }, "unk_token": "a" },
        });
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        let tokenizer = Arc::new(Tokenizer::load(dir.path()).unwrap());
        Session::new(Box::new(Always { token: TokenId(token), draws: 0 }), capabilities, Some(tokenizer))
    }

    /// A client that wants two tokens behind a prompt of so many.
    fn ask(places: &Arc<Semaphore>, prompt: u32) -> (Submission, UnboundedReceiver<(usize, Update)>) {
        let (to, updates) = unbounded_channel();
        let (name, asked) = (Arc::from("test"), Instant::now());
        let deadline = asked + Duration::from_secs(60);
        let request = Request { prompt: (0..prompt).map(TokenId).collect(), max_output_len: 2, ..Request::default() };
        let place = places.clone().try_acquire_owned().unwrap();
        (Submission { request, index: 0, to, name, asked, deadline, place }, updates)
    }

    /// Runs a session until nothing is left to do. Returns what it counted.
    fn finish(mut session: Session, submissions: Vec<Submission>) -> String {
        let ((to_session, commands), metrics) = (channel(), Metrics::new("m"));
        to_session.send(Command::Submit(submissions)).unwrap();
        drop(to_session);
        run(&mut session, commands, &metrics, &mut || Ok(())).unwrap();
        assert_eq!((session.is_idle(), session.free_blocks()), (true, 4));
        metrics.text()
    }

    fn counted(text: &str, name: &str, labels: &str) -> f64 {
        let line = format!("vllm:{name}{{model_name=\"m\"{labels}}} ");
        text.lines().find_map(|text| text.strip_prefix(&line)).unwrap().parse().unwrap()
    }

    #[test]
    fn what_is_refused_was_not_taken_and_who_left_is_counted() {
        let places = Arc::new(Semaphore::new(3));
        let ((taken, mut taken_updates), (refused, mut refused_updates)) = (ask(&places, 3), ask(&places, 7));
        let (left, left_updates) = ask(&places, 2);
        drop(left_updates);
        let text = finish(session(DECODABLE), vec![taken, refused, left]);
        assert!(matches!(taken_updates.try_recv(), Ok((0, Update::Accepted))));
        assert!(matches!(refused_updates.try_recv(), Ok((0, Update::Refused(_)))));
        assert_eq!(places.available_permits(), 3);
        assert_eq!(counted(&text, "prompt_tokens_total", ""), 5.0);
        let ended = |why| counted(&text, "request_success_total", &format!(",finished_reason=\"{why}\""));
        assert_eq!(["length", "abort", "error", "stop"].map(ended), [1.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn a_text_that_the_tokenizer_cannot_make_fails() {
        let places = Arc::new(Semaphore::new(1));
        let (asked, mut updates) = ask(&places, 3);
        let text = finish(session(UNDECODABLE), vec![asked]);
        assert!(matches!(updates.try_recv(), Ok((0, Update::Accepted))));
        assert!(matches!(updates.try_recv(), Ok((0, Update::Failed(_)))));
        assert!(updates.try_recv().is_err());
        assert_eq!(counted(&text, "request_success_total", ",finished_reason=\"error\""), 1.0);
    }

    #[test]
    fn nobody_waits_for_a_session_that_has_ended() {
        let (to_session, commands) = channel();
        let places = Arc::new(Semaphore::new(1));
        let (asked, mut updates) = ask(&places, 3);
        to_session.send(Command::Stop).unwrap();
        to_session.send(Command::Submit(vec![asked])).unwrap();
        run(&mut session(DECODABLE), commands, &Metrics::new("m"), &mut || Ok(())).unwrap();
        assert!(matches!(updates.try_recv(), Ok((0, Update::Failed(_)))));
        let (late, mut updates) = ask(&places, 3);
        assert!(to_session.send(Command::Submit(vec![late])).is_err());
        assert!(updates.blocking_recv().is_none());
    }
}
