//! `/tokenize` and `/detokenize`, as vLLM has them.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use mixtral_model::TokenId;
use serde::{Deserialize, Serialize};

use utoipa::ToSchema;

use crate::body::Fields;
use crate::error::{ApiError, ErrorBody};
use crate::shared::Shared;

/// A text whose tokens are asked for.
#[derive(Debug, Deserialize, ToSchema)]
pub struct TokenizeRequest {
    /// The name of the model.
    pub model: Option<String>,
    /// The text.
    pub prompt: String,
    /// Whether the model's start token is put in front; true if absent.
    pub add_special_tokens: Option<bool>,
    /// Whether the tokens are also told as the tokenizer writes them.
    pub return_token_strs: Option<bool>,
}

/// The tokens of a text.
#[derive(Debug, Serialize, ToSchema)]
pub struct Tokenized {
    /// How many there are.
    pub count: usize,
    /// The most tokens of a prompt and its answer.
    pub max_model_len: usize,
    /// Their ids.
    #[schema(value_type = Vec<u32>)]
    pub tokens: Vec<TokenId>,
    /// How the tokenizer writes them, if that was asked for.
    pub token_strs: Option<Vec<String>>,
}

/// Tokens whose text is asked for.
#[derive(Debug, Deserialize, ToSchema)]
pub struct DetokenizeRequest {
    /// The name of the model.
    pub model: Option<String>,
    /// Their ids.
    pub tokens: Vec<u32>,
}

/// The text of tokens.
#[derive(Debug, Serialize, ToSchema)]
pub struct Detokenized {
    /// The text, without special tokens.
    pub prompt: String,
}

/// Text to tokens.
#[utoipa::path(
    post,
    path = "/tokenize",
    operation_id = "tokenize",
    request_body = TokenizeRequest,
    responses(
        (status = 200, description = "The answer.", body = Tokenized),
        (status = "4XX", description = "The request is wrong.", body = ErrorBody),
        (status = "5XX", description = "The server cannot answer.", body = ErrorBody),
    )
)]
pub(crate) async fn tokenize(
    State(shared): State<Arc<Shared>>,
    mut fields: Fields,
) -> Result<Json<Tokenized>, ApiError> {
    let asked: TokenizeRequest = fields.read()?;
    fields.finish()?;
    asked.model.iter().try_for_each(|name| shared.check_model(name))?;
    let special = asked.add_special_tokens.unwrap_or(true);
    let tokens = shared.with_tokenizer(move |tokenizer| tokenizer.encode(&asked.prompt, special)).await?;
    let written = |id: &TokenId| shared.tokenizer.token(*id).unwrap_or_default();
    Ok(Json(Tokenized {
        count: tokens.len(),
        max_model_len: shared.capabilities.limits.max_seq_len,
        token_strs: (asked.return_token_strs == Some(true)).then(|| tokens.iter().map(written).collect()),
        tokens,
    }))
}

/// Tokens to text.
#[utoipa::path(
    post,
    path = "/detokenize",
    operation_id = "detokenize",
    request_body = DetokenizeRequest,
    responses(
        (status = 200, description = "The answer.", body = Detokenized),
        (status = "4XX", description = "The request is wrong.", body = ErrorBody),
        (status = "5XX", description = "The server cannot answer.", body = ErrorBody),
    )
)]
pub(crate) async fn detokenize(
    State(shared): State<Arc<Shared>>,
    mut fields: Fields,
) -> Result<Json<Detokenized>, ApiError> {
    let asked: DetokenizeRequest = fields.read()?;
    fields.finish()?;
    asked.model.iter().try_for_each(|name| shared.check_model(name))?;
    let vocab_size = shared.capabilities.vocab_size;
    if let Some(at) = asked.tokens.iter().position(|&id| id as usize >= vocab_size) {
        let message = format!("token id {} is not in the vocabulary of {vocab_size}", asked.tokens[at]);
        return Err(ApiError::field(format!("tokens[{at}]"), message));
    }
    let ids: Vec<TokenId> = asked.tokens.into_iter().map(TokenId).collect();
    let prompt = shared.with_tokenizer(move |tokenizer| tokenizer.decode(&ids)).await?;
    Ok(Json(Detokenized { prompt }))
}
