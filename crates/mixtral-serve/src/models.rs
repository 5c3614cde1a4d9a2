//! `/v1/models`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;

use utoipa::ToSchema;

use crate::error::{ApiError, ErrorBody};
use crate::shared::Shared;

/// A model that is served.
#[derive(Debug, Serialize, ToSchema)]
pub struct Model {
    /// Its name.
    pub id: String,
    /// `model`.
    pub object: &'static str,
    /// When the server was started, in seconds since 1970.
    pub created: u64,
    /// Who serves it.
    pub owned_by: &'static str,
    /// The most tokens of a prompt and its answer.
    pub max_model_len: usize,
}

/// The models that are served: one, by all its names.
#[derive(Debug, Serialize, ToSchema)]
pub struct Models {
    /// `list`.
    pub object: &'static str,
    /// The models.
    pub data: Vec<Model>,
}

fn model(shared: &Shared, name: &str) -> Model {
    Model {
        id: name.to_owned(),
        object: "model",
        created: shared.started,
        owned_by: "mixtral",
        max_model_len: shared.capabilities.limits.max_seq_len,
    }
}

/// Lists the models.
#[utoipa::path(
    get,
    path = "/v1/models",
    operation_id = "models",
    responses(
        (status = 200, description = "The answer.", body = Models),
        (status = "4XX", description = "The request is wrong.", body = ErrorBody),
        (status = "5XX", description = "The server cannot answer.", body = ErrorBody),
    )
)]
pub(crate) async fn list(State(shared): State<Arc<Shared>>) -> Json<Models> {
    let data = shared.options.model_names.iter().map(|name| model(&shared, name)).collect();
    Json(Models { object: "list", data })
}

/// Tells of one model.
#[utoipa::path(
    get,
    path = "/v1/models/{model}",
    operation_id = "model",
    params(("model" = String, Path, description = "Its name.")),
    responses(
        (status = 200, description = "The answer.", body = Model),
        (status = "4XX", description = "The request is wrong.", body = ErrorBody),
        (status = "5XX", description = "The server cannot answer.", body = ErrorBody),
    )
)]
pub(crate) async fn retrieve(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
) -> Result<Json<Model>, ApiError> {
    shared.check_model(&name)?;
    Ok(Json(model(&shared, &name)))
}
