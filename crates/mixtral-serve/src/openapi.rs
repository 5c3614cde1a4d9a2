//! `/openapi.json`: the description of all of this, for programs.

use axum::http::header;
use axum::response::IntoResponse;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{AdditionalProperties, Schema};
use utoipa::{OpenApi, PartialSchema, ToSchema};

use crate::chat::{ChatPiece, ChatRequest};
use crate::completions::CompletionRequest;
use crate::sampling::Sampling;
use crate::{chat, completions, models, routes, tokens};

/// The document.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "mixtral serve",
        description = "Answers of a model, as OpenAI's API gives them. Fields that are not here are refused.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    paths(
        completions::answer,
        chat::answer,
        models::list,
        models::retrieve,
        tokens::tokenize,
        tokens::detokenize,
        routes::health,
        routes::ready,
    ),
    components(schemas(ChatPiece))
)]
struct Document;

/// The body of a completion's request.
pub(crate) struct CompletionBody;

/// The body of a chat's request.
pub(crate) struct ChatBody;

impl PartialSchema for CompletionBody {
    fn schema() -> RefOr<Schema> {
        both(CompletionRequest::schema(), Sampling::schema())
    }
}

impl ToSchema for CompletionBody {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        CompletionRequest::schemas(schemas);
        Sampling::schemas(schemas);
    }
}

impl PartialSchema for ChatBody {
    fn schema() -> RefOr<Schema> {
        both(ChatRequest::schema(), Sampling::schema())
    }
}

impl ToSchema for ChatBody {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        ChatRequest::schemas(schemas);
        Sampling::schemas(schemas);
    }
}

/// An object with the fields of two, and no others.
fn both(one: RefOr<Schema>, other: RefOr<Schema>) -> RefOr<Schema> {
    let (RefOr::T(Schema::Object(mut all)), RefOr::T(Schema::Object(more))) = (one, other) else {
        return RefOr::T(Schema::default());
    };
    all.properties.extend(more.properties);
    all.required.extend(more.required);
    all.additional_properties = Some(Box::new(AdditionalProperties::FreeForm(false)));
    all.description = None;
    RefOr::T(Schema::Object(all))
}

/// Answers with the document.
pub(crate) async fn document() -> impl IntoResponse {
    let text = Document::openapi().to_pretty_json().unwrap_or_default();
    ([(header::CONTENT_TYPE, "application/json")], text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_is_this() {
        insta::assert_snapshot!(Document::openapi().to_pretty_json().unwrap());
    }
}
