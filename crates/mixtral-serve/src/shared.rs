//! What all handlers share.

use std::fmt::Display;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{SystemTime, UNIX_EPOCH};

use mixtral_runtime::session::Capabilities;
use mixtral_runtime::{Refusal, Tokenizer};
use tokio::sync::{Semaphore, watch};

use crate::error::ApiError;
use crate::guide::{Form, Guide, Guides};
use crate::metrics::Metrics;
use crate::options::Options;
use crate::worker::Command;

/// What the server is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It loads the engine.
    Loading,
    /// It answers.
    Ready,
    /// It was told to stop: it finishes what runs and takes nothing new.
    Draining,
    /// The engine failed, and the process is about to end.
    Failed(Arc<str>),
}

/// What all handlers share.
pub struct Shared {
    /// What the server was started with.
    pub options: Options,
    /// What the engine takes.
    pub capabilities: Capabilities,
    /// The model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// What the server is doing.
    pub phase: watch::Sender<Phase>,
    /// Makes guides for answers of a given form.
    pub(crate) guides: Arc<Guides>,
    /// What is counted and measured.
    pub metrics: Metrics,
    /// Places for sequences: as many as run at a time, and as many as may wait.
    pub places: Arc<Semaphore>,
    /// Leads to the session's thread.
    pub(crate) commands: Sender<Command>,
    /// When the server was started, in seconds since 1970.
    pub started: u64,
}

impl Shared {
    pub(crate) fn new(
        options: Options,
        capabilities: Capabilities,
        tokenizer: Arc<Tokenizer>,
        commands: Sender<Command>,
    ) -> Self {
        let shared = Shared {
            capabilities,
            tokenizer,
            guides: Arc::default(),
            metrics: Metrics::new(&options.model_names[0]),
            phase: watch::Sender::new(Phase::Loading),
            places: Arc::new(Semaphore::new(0)),
            commands,
            started: now(),
            options,
        };
        shared.places.add_permits(shared.most_sequences());
        shared
    }

    /// How many sequences there may be, running and waiting.
    #[must_use]
    pub fn most_sequences(&self) -> usize {
        let most = self.capabilities.limits.max_batch_size.saturating_add(self.options.bounds.waiting);
        most.min(Semaphore::MAX_PERMITS >> 3)
    }

    /// Whether requests are answered now.
    ///
    /// # Errors
    /// Why they are not.
    pub fn answers(&self) -> Result<(), ApiError> {
        match &*self.phase.borrow() {
            Phase::Ready => Ok(()),
            Phase::Loading => Err(ApiError::unavailable("the engine is being loaded")),
            Phase::Draining => Err(ApiError::unavailable("the server is being stopped")),
            Phase::Failed(why) => Err(ApiError::unavailable(format!("the engine failed: {why}"))),
        }
    }

    /// The name that answers carry.
    #[must_use]
    pub fn model_name(&self) -> &str {
        &self.options.model_names[0]
    }

    /// Checks the name of the model that a client asks.
    ///
    /// # Errors
    /// If it is not served here.
    pub fn check_model(&self, name: &str) -> Result<(), ApiError> {
        let names = &self.options.model_names;
        if names.iter().any(|served| served == name) { Ok(()) } else { Err(ApiError::model(name, names)) }
    }

    /// Checks `count` sequences with prompts of these lengths, before anything is made for each of them. `field` is where the
    /// prompts came from.
    ///
    /// # Errors
    /// If there are too many, or one is too long.
    pub(crate) fn check_size(
        &self,
        prompts: impl IntoIterator<Item = usize>,
        max_tokens: usize,
        count: usize,
        field: &'static str,
    ) -> Result<(), ApiError> {
        let (most, limit) = (self.most_sequences(), self.capabilities.limits.max_seq_len);
        if count > most {
            return Err(ApiError::field(field, format!("{count} sequences at once; this server takes {most}")));
        }
        match prompts.into_iter().find(|prompt| prompt.saturating_add(max_tokens) > limit) {
            Some(prompt) => Err(ApiError::refused(&Refusal::TooLong { prompt, output: max_tokens, limit }, field)),
            None => Ok(()),
        }
    }

    /// Works with the tokenizer, on a thread that may take its time.
    pub(crate) async fn with_tokenizer<T: Send + 'static, E: Display + Send + 'static>(
        &self,
        work: impl FnOnce(&Tokenizer) -> Result<T, E> + Send + 'static,
    ) -> Result<T, ApiError> {
        let tokenizer = self.tokenizer.clone();
        let done = tokio::task::spawn_blocking(move || work(&tokenizer)).await;
        let done = done.map_err(|_| ApiError::internal("the tokenizer failed"))?;
        done.map_err(|error| ApiError::invalid(error.to_string()))
    }
}

impl Shared {
    /// A guide for each of `count` answers of a form, which came from `field`.
    ///
    /// # Errors
    /// If the form cannot be understood.
    pub(crate) async fn guides(
        &self,
        form: Form,
        count: usize,
        field: &'static str,
    ) -> Result<Vec<Arc<Guide>>, ApiError> {
        let (guides, tokenizer) = (self.guides.clone(), self.tokenizer.clone());
        let (vocab_size, end_ids) = (self.capabilities.vocab_size, self.options.end_ids.clone());
        let made = tokio::task::spawn_blocking(move || {
            let first = guides.guide(form, &tokenizer, vocab_size, &end_ids)?;
            Ok((0..count).map(|_| Arc::new(first.another())).collect())
        });
        let made: Result<_, String> = made.await.map_err(|_| ApiError::internal("the form could not be read"))?;
        made.map_err(|why| ApiError::field(field, format!("`{field}` cannot be kept to: {why}")))
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// Bits that nobody can guess: the standard library seeds its hashers with the system's random numbers.
pub(crate) fn random() -> u64 {
    RandomState::new().hash_one(0)
}
