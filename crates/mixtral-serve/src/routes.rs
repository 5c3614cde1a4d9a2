//! Who answers what, and what is checked before.

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;

use crate::error::{ApiError, ErrorBody};
use crate::generation::NAME;
use crate::shared::{Phase, Shared, random};
use crate::{chat, completions, metrics, models, openapi, tokens};

/// The header with a request's name, in requests and answers.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The most bytes of a request's name; a longer one is replaced.
const MAX_REQUEST_ID: usize = 128;

/// Paths that need no key, and are answered whatever the server is doing.
const OPEN: [&str; 5] = ["/health", "/ready", "/ping", "/metrics", "/openapi.json"];

/// All paths.
pub(crate) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/v1/completions", post(completions::answer))
        .route("/v1/chat/completions", post(chat::answer))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*name}", get(models::retrieve))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/metrics", get(metrics::render))
        .route("/openapi.json", get(openapi::document))
        .route("/health", get(health))
        .route("/ping", get(health))
        .route("/ready", get(ready))
        .fallback(async || ApiError::status(StatusCode::NOT_FOUND, "there is nothing at this path"))
        .method_not_allowed_fallback(async || {
            ApiError::status(StatusCode::METHOD_NOT_ALLOWED, "this path has another method")
        })
        .layer(CatchPanicLayer::custom(|_| ApiError::internal("the server failed at this request").into_response()))
        .layer(from_fn_with_state(shared.clone(), front))
        .with_state(shared)
}

/// Whether the server is alive: an error if the engine failed.
#[utoipa::path(
    get,
    path = "/health",
    operation_id = "health",
    responses(
        (status = 200, description = "The answer."),
        (status = "4XX", description = "The request is wrong.", body = ErrorBody),
        (status = "5XX", description = "The server cannot answer.", body = ErrorBody),
    )
)]
pub(crate) async fn health(State(shared): State<Arc<Shared>>) -> Result<(), ApiError> {
    match *shared.phase.borrow() {
        Phase::Failed(_) => shared.answers(),
        _ => Ok(()),
    }
}

/// Whether it answers requests now: an error while it loads, and when it was told to stop.
#[utoipa::path(
    get,
    path = "/ready",
    operation_id = "ready",
    responses(
        (status = 200, description = "The answer."),
        (status = "4XX", description = "The request is wrong.", body = ErrorBody),
        (status = "5XX", description = "The server cannot answer.", body = ErrorBody),
    )
)]
pub(crate) async fn ready(State(shared): State<Arc<Shared>>) -> Result<(), ApiError> {
    shared.answers()
}

/// What happens to every request: it gets a name, is let in or not, and leaves a line in the log.
async fn front(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let start = Instant::now();
    let name = request.headers().get(REQUEST_ID).filter(|name| name.len() <= MAX_REQUEST_ID && name.to_str().is_ok());
    let fresh = || HeaderValue::from_str(&format!("{:016x}", random())).unwrap_or(HeaderValue::from_static("-"));
    let name = name.cloned().unwrap_or_else(fresh);
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let admitted = if OPEN.contains(&path.as_str()) {
        Ok(())
    } else {
        shared.options.keys.check(request.headers()).and_then(|()| shared.answers())
    };
    let mut response = match admitted {
        Ok(()) => NAME.scope(name.to_str().unwrap_or_default().into(), next.run(request)).await,
        Err(error) => error.into_response(),
    };
    tracing::info!(
        request = name.to_str().unwrap_or_default(),
        %method,
        path,
        status = response.status().as_u16(),
        seconds = start.elapsed().as_secs_f64(),
        "answered"
    );
    response.headers_mut().insert(REQUEST_ID, name);
    response
}
