//! `/v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use mixtral_runtime::{Event, FinishReason};
use serde::{Deserialize, Serialize};

use crate::body::Fields;
use crate::error::ApiError;
use crate::generation::Generation;
use crate::options::MAX_CHOICES;
use crate::prompt::{Prompt, Prompts};
use crate::sampling::{Sampling, StreamOptions, within};
use crate::shared::{Shared, now, random};
use crate::stream::{self, Chunks, Frames};

/// Tokens of an answer, unless the client says otherwise.
const DEFAULT_TOKENS: usize = 16;

/// The fields of a completion's request, beside those of [`Sampling`].
#[derive(Debug, Deserialize)]
pub struct CompletionRequest {
    /// What is continued: a text, a list of texts, token ids, or a list of lists of token ids. A text gets the model's start
    /// token in front; ids are taken as they are.
    pub prompt: Prompts,
    /// The most tokens of an answer; 16 if absent.
    pub max_tokens: Option<usize>,
    /// Whether the answer's text begins with the prompt.
    pub echo: Option<bool>,
    /// How many answers are drawn, of which the likeliest `n` are given; `n` if absent.
    pub best_of: Option<usize>,
    /// How many of the likeliest tokens are told, with their log-probabilities, for each token of the answer.
    pub logprobs: Option<usize>,
}

/// An answer, or a chunk of one.
#[derive(Debug, Serialize)]
pub struct Completion {
    /// Its name.
    pub id: String,
    /// `text_completion`.
    pub object: &'static str,
    /// When it was asked for, in seconds since 1970.
    pub created: u64,
    /// The model.
    pub model: String,
    /// The answers: first those to the first prompt.
    pub choices: Vec<CompletionChoice>,
    /// How many tokens were used.
    pub usage: Option<Usage>,
}

/// One answer, or a piece of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CompletionChoice {
    /// Which answer.
    pub index: usize,
    /// Its text.
    pub text: String,
    /// The log-probabilities of its tokens, if they were asked for.
    pub logprobs: Option<()>,
    /// Why it ended: `stop` or `length`.
    pub finish_reason: Option<&'static str>,
}

/// How many tokens a request used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Tokens of the prompts.
    pub prompt_tokens: usize,
    /// Tokens that were generated, in all answers.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
}

impl Usage {
    pub(crate) fn new(prompt_tokens: usize) -> Self {
        Usage { prompt_tokens, completion_tokens: 0, total_tokens: prompt_tokens }
    }

    /// Counts an event's token.
    pub(crate) fn count(&mut self, event: &Event) {
        self.completion_tokens += usize::from(event.token.is_some());
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}

/// OpenAI's word for why an answer ended.
pub(crate) fn finish_reason(event: &Event) -> Option<&'static str> {
    event.finished.map(|(reason, _)| match reason {
        FinishReason::EndId | FinishReason::StopWord => "stop",
        FinishReason::Length => "length",
    })
}

/// Answers a request.
pub(crate) async fn answer(State(shared): State<Arc<Shared>>, mut fields: Fields) -> Result<Response, ApiError> {
    let asked: CompletionRequest = fields.read()?;
    let sampling: Sampling = fields.read()?;
    fields.finish()?;
    shared.check_model(&sampling.model)?;
    let choices = sampling.choices()?;
    let drawn = within("best_of", asked.best_of.unwrap_or(choices), choices, MAX_CHOICES)?;
    if drawn != choices {
        return Err(ApiError::field("best_of", "`best_of` is not supported, unless it equals `n`"));
    }
    if asked.logprobs.is_some() {
        return Err(ApiError::field("logprobs", "`logprobs` is not supported"));
    }
    let template = sampling.request(&shared)?;
    let echo = asked.echo == Some(true);
    let max_tokens = asked.max_tokens.unwrap_or(DEFAULT_TOKENS);
    let prompts = asked.prompt.read(&shared).await?;
    let mut requests = Vec::with_capacity(prompts.len() * drawn);
    for (prompt, number) in prompts.iter().zip(0..) {
        for hypothesis in (0..).take(drawn) {
            requests.push(mixtral_runtime::Request {
                prompt: prompt.ids.clone(),
                max_output_len: max_tokens,
                prompt_index: number,
                hypothesis,
                ..template.clone()
            });
        }
    }
    let usage = Usage::new(prompts.iter().map(|prompt| prompt.ids.len()).sum());
    let generation = Generation::start(&shared, requests, "prompt").await?;
    let answers = Answers {
        id: format!("cmpl-{:016x}{:016x}", random(), random()),
        created: now(),
        model: shared.model_name().into(),
        echoed: if echo { prompts } else { Vec::new() },
        choices,
        usage,
        options: sampling.stream_options.unwrap_or_default(),
    };
    if sampling.stream == Some(true) {
        return Ok(stream::respond(generation, answers));
    }
    Ok(answers.collect(generation, drawn).await?.into_response())
}

/// The answers to one request, as they grow.
struct Answers {
    id: String,
    created: u64,
    model: String,
    /// The prompts, if answers begin with them.
    echoed: Vec<Prompt>,
    /// Answers to each prompt.
    choices: usize,
    usage: Usage,
    options: StreamOptions,
}

impl Answers {
    fn completion(&self, choices: Vec<CompletionChoice>, usage: Option<Usage>) -> Completion {
        Completion {
            id: self.id.clone(),
            object: "text_completion",
            created: self.created,
            model: self.model.clone(),
            choices,
            usage,
        }
    }

    /// The start of each answer.
    fn starts(&self) -> impl Iterator<Item = CompletionChoice> {
        let texts = self.echoed.iter().flat_map(|prompt| std::iter::repeat_n(prompt.text.clone(), self.choices));
        texts.enumerate().map(|(index, text)| CompletionChoice { index, text, ..CompletionChoice::default() })
    }

    /// The whole answers, after the last of them has ended.
    async fn collect(mut self, mut generation: Generation, count: usize) -> Result<Json<Completion>, ApiError> {
        let mut choices: Vec<CompletionChoice> = self.starts().collect();
        while let Some((index, event)) = generation.next().await? {
            self.usage.count(&event);
            while choices.len() <= index {
                choices.push(CompletionChoice { index: choices.len(), ..CompletionChoice::default() });
            }
            choices[index].text += &event.text;
            choices[index].finish_reason = finish_reason(&event);
        }
        debug_assert!(choices.len() >= count);
        Ok(Json(self.completion(choices, Some(self.usage))))
    }

    fn usage_so_far(&self) -> Option<Usage> {
        self.options.continuous_usage_stats.unwrap_or(false).then_some(self.usage)
    }
}

impl Chunks for Answers {
    fn begin(&mut self, frames: &mut Frames) {
        for start in self.starts() {
            frames.push(&self.completion(vec![start], self.usage_so_far()));
        }
    }

    fn event(&mut self, index: usize, event: Event, frames: &mut Frames) {
        self.usage.count(&event);
        let finish_reason = finish_reason(&event);
        if event.text.is_empty() && finish_reason.is_none() && self.usage_so_far().is_none() {
            return;
        }
        let choice = CompletionChoice { index, text: event.text, logprobs: None, finish_reason };
        frames.push(&self.completion(vec![choice], self.usage_so_far()));
    }

    fn end(&mut self, frames: &mut Frames) {
        if self.options.include_usage == Some(true) {
            frames.push(&self.completion(Vec::new(), Some(self.usage)));
        }
    }
}
