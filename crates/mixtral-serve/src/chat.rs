//! `/v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use mixtral_runtime::{Event, Request};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::answer::{Answer, Envelope, finish_reason};
use crate::body::Fields;
use crate::error::{ApiError, ErrorBody};
use crate::generation::Generation;
use crate::logprobs::{ChatLogprob, ChatLogprobs};
use crate::messages::{Message, Tool, ToolCall, conversation};
use crate::openapi::ChatBody;
use crate::options::MAX_LOGPROBS;
use crate::sampling::{Sampling, guided, within};
use crate::shared::Shared;
use crate::stream::{self, Chunks, Frames, ServerSentEvent};
use crate::tool_choice::{ToolChoice, ToolChoiceSchema};
use crate::tools::ToolCalls;

const OBJECT: &str = "chat.completion";
const CHUNK: &str = "chat.completion.chunk";

/// The fields of a chat's request, beside those of [`Sampling`].
#[derive(Debug, Deserialize, ToSchema)]
pub struct ChatRequest {
    /// The conversation so far.
    #[schema(min_items = 1)]
    pub messages: Vec<Message>,
    /// The most tokens of an answer; as many as a sequence has room for if absent.
    pub max_completion_tokens: Option<usize>,
    /// The same, by its older name.
    pub max_tokens: Option<usize>,
    /// Whether the log-probability of each token of the answer is told.
    pub logprobs: Option<bool>,
    /// The log-probabilities of how many of the likeliest tokens are told too: 0 to 20.
    pub top_logprobs: Option<usize>,
    /// The tools that the model may call.
    pub tools: Option<Vec<Tool>>,
    /// Whether it does: `auto` leaves it to the model, with `none` it is not told of them, with `required` it calls one or
    /// more, and with a function's name it calls that one. What it must call fits its parameters.
    #[schema(value_type = Option<ToolChoiceSchema>)]
    pub tool_choice: Option<ToolChoice>,
    /// Whether an answer may have several calls; true if absent. False needs a `tool_choice` other than `auto`.
    pub parallel_tool_calls: Option<bool>,
    /// Other variables of the model's chat template.
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// What an answer is: text, and nothing else.
    pub modalities: Option<Vec<Modality>>,
    /// How fast it is wanted: all requests are served alike.
    pub service_tier: Option<ServiceTier>,
    /// Whether the answer is kept: it is not, so true is refused.
    pub store: Option<bool>,
    /// Whom the request is for. It changes nothing.
    pub safety_identifier: Option<String>,
    /// Which requests have a beginning in common. It changes nothing: all beginnings are looked up.
    pub prompt_cache_key: Option<String>,
}

/// A kind of answer.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Modality {
    /// Text.
    Text,
}

/// How fast an answer is wanted.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ServiceTier {
    /// As the server likes.
    Auto,
    /// As all others.
    Default,
}

/// One answer.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct ChatChoice {
    /// Which answer.
    pub index: usize,
    /// The answer.
    pub message: AnswerMessage,
    /// The log-probabilities of its tokens, if they were asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended: `stop`, `length` or `tool_calls`.
    pub finish_reason: Option<&'static str>,
}

/// What the model says.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct AnswerMessage {
    /// `assistant`.
    pub role: &'static str,
    /// The text; null if it only calls tools.
    pub content: Option<String>,
    /// Always null: this server does not refuse.
    pub refusal: Option<String>,
    /// The tools that it calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

/// A piece of an answer.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct ChatPiece {
    /// Which answer.
    pub index: usize,
    /// What is added to it.
    pub delta: Delta,
    /// The log-probabilities of the piece's tokens, if they were asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Why the answer ended, with its last piece.
    pub finish_reason: Option<&'static str>,
}

/// What is added to an answer.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct Delta {
    /// `assistant`, with the first piece.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// Text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// Calls, each of them whole.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

/// Continues a conversation.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    operation_id = "chat",
    request_body = ChatBody,
    responses(
        (status = 200, description = "The answers; with `stream`, chunks of them.", content(
            (Answer<ChatChoice> = "application/json"),
            (ServerSentEvent = "text/event-stream"),
        )),
        (status = "4XX", description = "The request is wrong, or there is no room for it.", body = ErrorBody),
        (status = "5XX", description = "The server cannot answer.", body = ErrorBody),
    )
)]
pub(crate) async fn answer(State(shared): State<Arc<Shared>>, mut fields: Fields) -> Result<Response, ApiError> {
    let asked: ChatRequest = fields.read()?;
    let sampling: Sampling = fields.read()?;
    fields.finish()?;
    shared.check_model(&sampling.model)?;
    let choices = sampling.choices()?;
    if asked.top_logprobs.is_some() && asked.logprobs != Some(true) {
        return Err(ApiError::field("top_logprobs", "`top_logprobs` needs `logprobs`"));
    }
    if asked.store == Some(true) {
        return Err(ApiError::field("store", "`store` cannot be true: this server stores nothing"));
    }
    let top = asked.top_logprobs.map(|n| within("top_logprobs", n, 0, MAX_LOGPROBS)).transpose()?.unwrap_or(0);
    let logprobs = (asked.logprobs == Some(true)).then_some(top);
    let mut form = sampling.form()?;
    let offered = asked.tools.as_deref().unwrap_or_default();
    let choice = asked.tool_choice.unwrap_or(ToolChoice::Auto);
    let several = asked.parallel_tool_calls.unwrap_or(true);
    if !several && !offered.is_empty() && choice == ToolChoice::Auto {
        let message = "`parallel_tool_calls` false needs a `tool_choice` other than `auto`, with which the model decides how many calls it writes";
        return Err(ApiError::field("parallel_tool_calls", message));
    }
    if let Some(forced) = choice.form(offered, several)? {
        if let Some((_, field)) = form {
            return Err(ApiError::field(
                field,
                format!("`{field}` cannot be given together with a `tool_choice` that calls"),
            ));
        }
        form = Some((forced, "tools"));
    }
    let tools = Some(offered).filter(|tools| !tools.is_empty() && choice != ToolChoice::None);
    let calls = tools.map(|_| ToolCalls::new(&shared.tokenizer, &choice));
    let conversation = conversation(&asked.messages, tools, asked.chat_template_kwargs.unwrap_or_default())?;
    let Some(template) = shared.options.chat_template.clone() else {
        let message = "this model has no chat template; use /v1/completions, or start the server with --chat-template";
        return Err(ApiError::field("messages", message));
    };
    let encoded = shared.with_tokenizer(move |tokenizer| {
        let text = template.render(&conversation).map_err(|error| error.to_string())?;
        // The template writes the special tokens, the start token too.
        tokenizer.encode(&text, false).map_err(|error| error.to_string())
    });
    let field = |error| ApiError { param: Some("messages".to_owned()), ..error };
    let prompt = encoded.await.map_err(field)?;
    let room = shared.capabilities.limits.max_seq_len.saturating_sub(prompt.len()).max(1);
    let max_tokens = match (asked.max_completion_tokens, asked.max_tokens) {
        (Some(new), Some(old)) if new != old => {
            let message = "`max_tokens` is an older name of `max_completion_tokens`; give one of them";
            return Err(ApiError::field("max_tokens", message));
        }
        (new, old) => new.or(old).unwrap_or(room),
    };
    shared.check_size([prompt.len()], max_tokens, choices, "messages")?;
    let request = Request { max_output_len: max_tokens, logprobs, ..sampling.request(&shared, max_tokens)? };
    let prompt_tokens = prompt.len();
    let requests =
        (0..).take(choices).map(|hypothesis| Request { prompt: prompt.clone(), hypothesis, ..request.clone() });
    let requests = guided(&shared, form, requests.collect()).await?;
    let generation = Generation::start(&shared, requests, "messages").await?;
    let answers = Answers {
        envelope: Envelope::new(&shared, "chatcmpl", sampling.stream_options, prompt_tokens),
        calls: vec![calls; choices],
        logprobs: logprobs.is_some(),
        shared,
    };
    if sampling.stream == Some(true) {
        return Ok(stream::respond(generation, answers));
    }
    answers.collect(generation).await
}

/// The answers to one request, as they grow.
struct Answers {
    shared: Arc<Shared>,
    envelope: Envelope,
    /// Finds calls in each answer, if the model may call tools.
    calls: Vec<Option<ToolCalls>>,
    logprobs: bool,
}

impl Answers {
    /// The piece of an answer that an event brings.
    fn piece(&mut self, index: usize, event: Event) -> ChatPiece {
        self.envelope.count(&event);
        let mut piece = ChatPiece { index, finish_reason: finish_reason(&event), ..ChatPiece::default() };
        if self.logprobs {
            let content =
                event.logprobs.iter().map(|scored| ChatLogprob::new(&self.shared.tokenizer, scored)).collect();
            piece.logprobs = Some(ChatLogprobs { content, refusal: None });
        }
        let mut text = event.text;
        if let Some(calls) = &mut self.calls[index] {
            text = calls.push(event.token, &text);
            if piece.finish_reason.is_some() {
                let (rest, mut found) = calls.finish();
                text += &rest;
                found.iter_mut().enumerate().for_each(|(at, call)| call.index = Some(at));
                if !found.is_empty() && piece.finish_reason == Some("stop") {
                    piece.finish_reason = Some("tool_calls");
                }
                piece.delta.tool_calls = found;
            }
        }
        // Text that may belong to a call is held, and its tokens have no content.
        piece.delta.content = (self.calls[index].is_none() || !text.is_empty()).then_some(text);
        piece
    }

    /// The whole answers, after the last of them has ended.
    async fn collect(mut self, mut generation: Generation) -> Result<Response, ApiError> {
        let message = AnswerMessage { role: "assistant", ..AnswerMessage::default() };
        let empty = |index| ChatChoice { index, message: message.clone(), ..ChatChoice::default() };
        let mut answers: Vec<ChatChoice> = (0..self.calls.len()).map(empty).collect();
        while let Some((index, event)) = generation.next().await? {
            let piece = self.piece(index, event);
            let answer = &mut answers[index];
            if let Some(text) = piece.delta.content {
                *answer.message.content.get_or_insert_default() += &text;
            }
            answer.message.tool_calls.extend(piece.delta.tool_calls);
            answer.finish_reason = piece.finish_reason;
            if let Some(more) = piece.logprobs {
                answer.logprobs.get_or_insert_default().content.extend(more.content);
            }
        }
        for AnswerMessage { content, tool_calls, .. } in answers.iter_mut().map(|answer| &mut answer.message) {
            tool_calls.iter_mut().for_each(|call| call.index = None);
            if tool_calls.is_empty() {
                content.get_or_insert_default();
            }
        }
        Ok(Json(self.envelope.whole(OBJECT, answers)).into_response())
    }
}

impl Chunks for Answers {
    fn begin(&mut self, frames: &mut Frames) {
        for index in 0..self.calls.len() {
            let delta = Delta { role: Some("assistant"), content: Some(String::new()), tool_calls: Vec::new() };
            frames.push(&self.envelope.chunk(CHUNK, ChatPiece { index, delta, ..ChatPiece::default() }));
        }
    }

    fn event(&mut self, index: usize, event: Event, frames: &mut Frames) {
        let piece = self.piece(index, event);
        let says_something = piece.delta.content.is_some() || piece.logprobs.is_some() || piece.finish_reason.is_some();
        if says_something || self.envelope.tells_usage() {
            frames.push(&self.envelope.chunk(CHUNK, piece));
        }
    }

    fn end(&mut self, frames: &mut Frames) {
        if let Some(last) = self.envelope.last::<ChatPiece>(CHUNK) {
            frames.push(&last);
        }
    }
}
