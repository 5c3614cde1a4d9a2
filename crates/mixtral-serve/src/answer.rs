//! What completions and chat answer alike.

use mixtral_runtime::{Event, FinishReason};
use serde::Serialize;
use utoipa::ToSchema;

use crate::sampling::StreamOptions;
use crate::shared::{Shared, now, random};

/// An answer, or a chunk of one.
#[derive(Debug, Serialize, ToSchema)]
pub struct Answer<C> {
    /// Its name.
    pub id: String,
    /// What it is.
    pub object: &'static str,
    /// When it was asked for, in seconds since 1970.
    pub created: u64,
    /// The model.
    pub model: String,
    /// The answers: first those to the first prompt.
    pub choices: Vec<C>,
    /// How many tokens were used.
    pub usage: Option<Usage>,
}

/// How many tokens a request used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Usage {
    /// Tokens of the prompts.
    pub prompt_tokens: usize,
    /// Tokens that were generated, in all answers.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
}

/// What every chunk of an answer repeats.
pub(crate) struct Envelope {
    id: String,
    created: u64,
    model: String,
    options: StreamOptions,
    pub(crate) usage: Usage,
}

impl Envelope {
    /// The envelope of an answer to prompts of `prompt_tokens` tokens in all. Its name begins with `prefix`.
    pub(crate) fn new(shared: &Shared, prefix: &str, options: Option<StreamOptions>, prompt_tokens: usize) -> Self {
        Envelope {
            id: format!("{prefix}-{:016x}{:016x}", random(), random()),
            created: now(),
            model: shared.model_name().to_owned(),
            options: options.unwrap_or_default(),
            usage: Usage { prompt_tokens, completion_tokens: 0, total_tokens: prompt_tokens },
        }
    }

    /// Counts an event's token.
    pub(crate) fn count(&mut self, event: &Event) {
        self.usage.completion_tokens += usize::from(event.token.is_some());
        self.usage.total_tokens = self.usage.prompt_tokens + self.usage.completion_tokens;
    }

    fn with<C>(&self, object: &'static str, choices: Vec<C>, usage: Option<Usage>) -> Answer<C> {
        Answer { id: self.id.clone(), object, created: self.created, model: self.model.clone(), choices, usage }
    }

    /// A whole answer.
    pub(crate) fn whole<C>(&self, object: &'static str, choices: Vec<C>) -> Answer<C> {
        self.with(object, choices, Some(self.usage))
    }

    /// A chunk of a stream.
    pub(crate) fn chunk<C>(&self, object: &'static str, choice: C) -> Answer<C> {
        self.with(object, vec![choice], self.tells_usage().then_some(self.usage))
    }

    /// The last chunk of a stream, if there is to be one that tells how many tokens were used.
    pub(crate) fn last<C>(&self, object: &'static str) -> Option<Answer<C>> {
        let wanted = self.options.include_usage == Some(true);
        wanted.then(|| self.with(object, Vec::new(), Some(self.usage)))
    }

    /// Whether every chunk tells how many tokens were used so far.
    pub(crate) fn tells_usage(&self) -> bool {
        self.options.continuous_usage_stats == Some(true)
    }
}

/// OpenAI's word for why an answer ended.
pub(crate) fn finish_reason(event: &Event) -> Option<&'static str> {
    event.finished.map(|(reason, _)| match reason {
        FinishReason::EndId | FinishReason::StopWord => "stop",
        FinishReason::Length => "length",
    })
}
