//! `/v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use mixtral_runtime::{Event, Request};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::answer::{Answer, Envelope, finish_reason};
use crate::body::Fields;
use crate::error::{ApiError, ErrorBody};
use crate::generation::Generation;
use crate::logprobs::CompletionLogprobs;
use crate::openapi::CompletionBody;
use crate::options::{MAX_CHOICES, MAX_LOGPROBS};
use crate::prompt::{Prompt, Prompts, PromptsSchema};
use crate::sampling::{Sampling, guided, within};
use crate::shared::Shared;
use crate::stream::{self, Chunks, Frames, ServerSentEvent};

/// Tokens of an answer, unless the client says otherwise.
const DEFAULT_TOKENS: usize = 16;

/// What answers and chunks are.
const OBJECT: &str = "text_completion";

/// The fields of a completion's request, beside those of [`Sampling`].
#[derive(Debug, Deserialize, ToSchema)]
pub struct CompletionRequest {
    /// What is continued: a text, a list of texts, token ids, or a list of lists of token ids. A text gets the model's start
    /// token in front; ids are taken as they are.
    #[schema(value_type = PromptsSchema)]
    pub prompt: Prompts,
    /// The most tokens of an answer; 16 if absent. With `echo` it may be 0.
    pub max_tokens: Option<usize>,
    /// Whether the answer's text, and its log-probabilities, begin with the prompt.
    pub echo: Option<bool>,
    /// How many answers are drawn, of which the `n` with the highest mean log-probability are given; `n` if absent. Not for
    /// streams.
    pub best_of: Option<usize>,
    /// Whether log-probabilities are told for each token of the answer, and those of how many of the likeliest tokens at its
    /// place: 0 to 20.
    pub logprobs: Option<usize>,
}

/// One answer, or a piece of it.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct CompletionChoice {
    /// Which answer.
    pub index: usize,
    /// Its text.
    pub text: String,
    /// The log-probabilities of its tokens, if they were asked for.
    pub logprobs: Option<CompletionLogprobs>,
    /// Why it ended: `stop` or `length`.
    pub finish_reason: Option<&'static str>,
}

/// Continues prompts.
#[utoipa::path(
    post,
    path = "/v1/completions",
    operation_id = "completions",
    request_body = CompletionBody,
    responses(
        (status = 200, description = "The answers; with `stream`, chunks of them.", content(
            (Answer<CompletionChoice> = "application/json"),
            (ServerSentEvent = "text/event-stream"),
        )),
        (status = "4XX", description = "The request is wrong, or there is no room for it.", body = ErrorBody),
        (status = "5XX", description = "The server cannot answer.", body = ErrorBody),
    )
)]
pub(crate) async fn answer(State(shared): State<Arc<Shared>>, mut fields: Fields) -> Result<Response, ApiError> {
    let asked: CompletionRequest = fields.read()?;
    let sampling: Sampling = fields.read()?;
    fields.finish()?;
    shared.check_model(&sampling.model)?;
    let choices = sampling.choices()?;
    let drawn = within("best_of", asked.best_of.unwrap_or(choices), choices, MAX_CHOICES)?;
    let (echo, is_stream) = (asked.echo == Some(true), sampling.stream == Some(true));
    if drawn > choices && is_stream {
        let message = "`best_of` cannot be above `n` in a stream: which answers are best is known at the end";
        return Err(ApiError::field("best_of", message));
    }
    let logprobs = asked.logprobs.map(|n| within("logprobs", n, 0, MAX_LOGPROBS)).transpose()?;
    let max_tokens = asked.max_tokens.unwrap_or(DEFAULT_TOKENS);
    let template = Request {
        max_output_len: max_tokens,
        logprobs: logprobs.or((drawn > choices).then_some(0)),
        prompt_logprobs: logprobs.filter(|_| echo),
        ..sampling.request(&shared, max_tokens)?
    };
    let form = sampling.form()?;
    let prompts = asked.prompt.read(&shared).await?;
    shared.check_size(prompts.iter().map(|prompt| prompt.ids.len()), max_tokens, prompts.len() * drawn, "prompt")?;
    let mut requests = Vec::with_capacity(prompts.len() * drawn);
    for (prompt, prompt_index) in prompts.iter().zip(0..) {
        for hypothesis in (0..).take(drawn) {
            requests.push(Request { prompt: prompt.ids.clone(), prompt_index, hypothesis, ..template.clone() });
        }
    }
    let requests = guided(&shared, form, requests).await?;
    let prompt_tokens = prompts.iter().map(|prompt| prompt.ids.len()).sum();
    // A prompt that is only echoed needs no session.
    let only_echoed = echo && max_tokens == 0 && logprobs.is_none();
    let running = if only_echoed { 0 } else { requests.len() };
    let generation = Generation::start(&shared, requests.into_iter().take(running).collect(), "prompt").await?;
    let answers = Answers {
        envelope: Envelope::new(&shared, "cmpl", sampling.stream_options, prompt_tokens),
        logprobs: logprobs.is_some(),
        echo,
        only_echoed,
        offsets: vec![0; prompts.len() * drawn],
        prompts,
        drawn,
        choices,
        shared,
    };
    if is_stream {
        return Ok(stream::respond(generation, answers));
    }
    answers.collect(generation).await
}

/// The answers to one request, as they grow.
struct Answers {
    shared: Arc<Shared>,
    envelope: Envelope,
    prompts: Vec<Prompt>,
    /// Whether answers begin with their prompts, and whether they have nothing else.
    echo: bool,
    only_echoed: bool,
    /// Whether log-probabilities are told.
    logprobs: bool,
    /// How many answers are drawn for each prompt, and how many of them are given.
    drawn: usize,
    choices: usize,
    /// The lengths of the answers so far, in characters.
    offsets: Vec<usize>,
}

impl Answers {
    /// The start of an answer.
    fn start(&mut self, index: usize) -> CompletionChoice {
        let mut start = CompletionChoice { index, ..CompletionChoice::default() };
        let tokenizer = &self.shared.tokenizer;
        if self.echo {
            let prompt = &self.prompts[index / self.drawn];
            start.text.clone_from(&prompt.text);
            if let (true, Some(&first)) = (self.logprobs, prompt.ids.first()) {
                let mut told = CompletionLogprobs::default();
                told.push_first(tokenizer, first, &mut self.offsets[index]);
                start.logprobs = Some(told);
            }
            start.finish_reason = self.only_echoed.then_some("length");
        }
        start
    }

    /// The piece of an answer that an event brings.
    fn piece(&mut self, index: usize, event: Event) -> CompletionChoice {
        self.envelope.count(&event);
        let finish_reason = finish_reason(&event);
        let logprobs = self.logprobs.then(|| {
            let mut told = CompletionLogprobs::default();
            for scored in event.prompt_logprobs.iter().chain(&event.logprobs) {
                told.push(&self.shared.tokenizer, scored, &mut self.offsets[index]);
            }
            told
        });
        CompletionChoice { index, text: event.text, logprobs, finish_reason }
    }

    /// The whole answers, after the last of them has ended.
    async fn collect(mut self, mut generation: Generation) -> Result<Response, ApiError> {
        let mut answers: Vec<CompletionChoice> = (0..self.offsets.len()).map(|index| self.start(index)).collect();
        let mut means = vec![Mean::default(); answers.len()];
        while let Some((index, event)) = generation.next().await? {
            means[index].add(&event);
            let piece = self.piece(index, event);
            let answer = &mut answers[index];
            answer.text += &piece.text;
            answer.finish_reason = piece.finish_reason;
            if let Some(more) = piece.logprobs {
                answer.logprobs.get_or_insert_default().extend(more);
            }
        }
        if self.drawn > self.choices {
            let mut best = Vec::new();
            for (answers, means) in answers.chunks(self.drawn).zip(means.chunks(self.drawn)) {
                let mut ranked: Vec<_> = answers.iter().zip(means).collect();
                // Of equally likely answers, the first comes first.
                ranked.sort_by(|a, b| b.1.value().total_cmp(&a.1.value()));
                best.extend(ranked.into_iter().take(self.choices).map(|(answer, _)| answer.clone()));
            }
            best.iter_mut().enumerate().for_each(|(index, answer)| answer.index = index);
            answers = best;
        }
        Ok(Json(self.envelope.whole(OBJECT, answers)).into_response())
    }
}

impl Chunks for Answers {
    fn begin(&mut self, frames: &mut Frames) {
        let echoed = if self.echo { self.offsets.len() } else { 0 };
        for index in 0..echoed {
            let start = self.start(index);
            frames.push(&self.envelope.chunk(OBJECT, start));
        }
    }

    fn event(&mut self, index: usize, event: Event, frames: &mut Frames) {
        let piece = self.piece(index, event);
        frames.push(&self.envelope.chunk(OBJECT, piece));
    }

    fn end(&mut self, frames: &mut Frames) {
        if let Some(last) = self.envelope.last::<CompletionChoice>(OBJECT) {
            frames.push(&last);
        }
    }
}

/// The mean log-probability of an answer's tokens.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    sum: f32,
    tokens: f32,
}

impl Mean {
    fn add(&mut self, event: &Event) {
        if let Some(scored) = &event.logprobs {
            self.sum += scored.logprob;
            self.tokens += 1.0;
        }
    }

    fn value(&self) -> f32 {
        self.sum / self.tokens.max(1.0)
    }
}
