//! `/v1/models`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;

use crate::error::ApiError;
use crate::shared::Shared;

/// A model that is served.
#[derive(Debug, Serialize)]
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
#[derive(Debug, Serialize)]
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
pub(crate) async fn list(State(shared): State<Arc<Shared>>) -> Json<Models> {
    let data = shared.options.model_names.iter().map(|name| model(&shared, name)).collect();
    Json(Models { object: "list", data })
}

/// Tells of one model.
pub(crate) async fn retrieve(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
) -> Result<Json<Model>, ApiError> {
    shared.check_model(&name)?;
    Ok(Json(model(&shared, &name)))
}
