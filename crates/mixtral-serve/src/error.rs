//! What a client is told when its request is not answered: OpenAI's error body.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use mixtral_runtime::Refusal;
use serde::Serialize;
use utoipa::ToSchema;

/// Seconds after which a client that was turned away may try again.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct ApiError {
    /// The HTTP status.
    #[serde(skip)]
    #[schema(ignore)]
    pub status: StatusCode,
    /// What is wrong, and what to do.
    pub message: String,
    /// Whose fault it is: `invalid_request_error`, `authentication_error`, `rate_limit_error` or `server_error`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The field that is wrong.
    pub param: Option<String>,
    /// A word for programs, for some errors.
    pub code: Option<&'static str>,
}

/// The body of an answer that is an error.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: ApiError,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        ApiError { status, message: message.into(), kind, param: None, code }
    }

    /// A request that is wrong as a whole.
    #[must_use]
    pub fn invalid(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message)
    }

    /// A field that is wrong.
    #[must_use]
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        ApiError { param: Some(param.into()), ..ApiError::invalid(message) }
    }

    /// A request with this status, for which the client is to blame.
    #[must_use]
    pub fn status(status: StatusCode, message: impl Into<String>) -> Self {
        ApiError::new(status, "invalid_request_error", None, message)
    }

    /// A request without one of the server's keys.
    #[must_use]
    pub fn key(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", Some("invalid_api_key"), message)
    }

    /// A model that is not served here.
    #[must_use]
    pub fn model(name: &str, served: &[String]) -> Self {
        let message = format!("the model `{name}` is not served here; served: {}", served.join(", "));
        let code = Some("model_not_found");
        ApiError {
            param: Some("model".to_owned()),
            ..ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", code, message)
        }
    }

    /// More is waiting than the server lets wait.
    #[must_use]
    pub fn busy(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("queue_full"), message)
    }

    /// The server cannot answer now.
    #[must_use]
    pub fn unavailable(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", None, message)
    }

    /// The request took longer than it may.
    #[must_use]
    pub fn late(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::GATEWAY_TIMEOUT, "server_error", Some("timeout"), message)
    }

    /// The server failed at this request.
    #[must_use]
    pub fn internal(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, message)
    }

    /// What a client is told of a request that the session refuses. `prompt` is the field of the prompt.
    #[must_use]
    pub fn refused(refusal: &Refusal, prompt: &str) -> Self {
        match refusal {
            Refusal::EmptyPrompt => {
                ApiError::field(prompt, format!("`{prompt}` has no token; give a text or at least one id"))
            }
            Refusal::NoOutput => ApiError::field("max_tokens", "`max_tokens` must be at least 1"),
            Refusal::TooLong { prompt: tokens, output, limit } => ApiError {
                code: Some("context_length_exceeded"),
                ..ApiError::field(
                    prompt,
                    format!(
                        "the prompt's {tokens} tokens and `max_tokens` {output} make {}, but a sequence of this engine has at most {limit} tokens; shorten either",
                        tokens.saturating_add(*output)
                    ),
                )
            },
            Refusal::UnknownToken { token, position, vocab_size } => ApiError::field(
                prompt,
                format!("token id {token} at position {position} is not in the vocabulary of {vocab_size}"),
            ),
            other => ApiError::invalid(other.to_string()),
        }
    }

    /// The body, as JSON.
    #[must_use]
    pub fn body(&self) -> String {
        serde_json::to_string(&ErrorBody { error: self.clone() }).unwrap_or_default()
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = self.status;
        let mut response = (status, Json(ErrorBody { error: self })).into_response();
        let headers = response.headers_mut();
        match status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, RETRY_AFTER);
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}
