//! Answers that are sent as they grow, by server-sent events.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use mixtral_runtime::Event;
use serde::Serialize;
use utoipa::ToSchema;

use crate::error::ApiError;
use crate::generation::Generation;

/// After this time without an event, a comment is sent. It keeps proxies from closing the connection, and shows whether the
/// client is still there.
const COMMENT_AFTER: Duration = Duration::from_secs(15);

/// An event of a stream.
#[derive(ToSchema)]
#[expect(dead_code, reason = "it is only described")]
pub(crate) struct ServerSentEvent {
    /// A chunk as JSON; at the end `[DONE]`.
    data: String,
}

/// Frames of a stream, as text.
#[derive(Debug, Default)]
pub(crate) struct Frames(String);

impl Frames {
    /// Adds a frame.
    pub(crate) fn push(&mut self, data: &impl Serialize) {
        self.push_text(&serde_json::to_string(data).unwrap_or_default());
    }

    fn push_text(&mut self, data: &str) {
        self.0 += "data: ";
        self.0 += data;
        self.0 += "\n\n";
    }
}

/// How one kind of answer is told in chunks. Every token has one, as in vLLM. Where the text is not certain yet, such as that of a
/// part of a character, it is empty: programs that measure servers take the times between chunks for those between tokens.
pub(crate) trait Chunks: Send + 'static {
    /// Before the first event.
    fn begin(&mut self, frames: &mut Frames);
    /// An event of the sequence with this index.
    fn event(&mut self, index: usize, event: Event, frames: &mut Frames);
    /// After the last event.
    fn end(&mut self, frames: &mut Frames);
}

/// Where a stream is.
enum State {
    Begin,
    Running,
    Ended,
}

/// Sends the events of a generation in chunks. If the client goes away, the generation is dropped, which cancels it.
pub(crate) fn respond(generation: Generation, chunks: impl Chunks) -> Response {
    let start = (generation, chunks, State::Begin);
    let body = stream::unfold(start, |(mut generation, mut chunks, state)| async move {
        let mut frames = Frames::default();
        let state = match state {
            State::Ended => return None,
            State::Begin => {
                chunks.begin(&mut frames);
                State::Running
            }
            State::Running => next(&mut generation, &mut chunks, &mut frames).await,
        };
        let Frames(text) = frames;
        Some((Ok::<_, Infallible>(Bytes::from(text)), (generation, chunks, state)))
    });
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        // Proxies of one kind collect answers unless they are told not to.
        (header::HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    (headers, Body::from_stream(body)).into_response()
}

/// Waits for events, and adds frames for all that are there.
async fn next(generation: &mut Generation, chunks: &mut impl Chunks, frames: &mut Frames) -> State {
    let Ok(first) = tokio::time::timeout(COMMENT_AFTER, generation.next()).await else {
        frames.0 += ": waiting\n\n";
        return State::Running;
    };
    let mut update = first;
    loop {
        match update {
            Ok(Some((index, event))) => chunks.event(index, event, frames),
            Ok(None) => {
                chunks.end(frames);
                frames.push_text("[DONE]");
                return State::Ended;
            }
            Err(error) => {
                fail(&error, frames);
                return State::Ended;
            }
        }
        match generation.try_next() {
            Some(next) => update = next.map(Some),
            None => return State::Running,
        }
    }
}

/// Ends a stream with an error: its status was sent long ago.
fn fail(error: &ApiError, frames: &mut Frames) {
    frames.push_text(&error.body());
    frames.push_text("[DONE]");
}
