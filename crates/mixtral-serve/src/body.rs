//! Bodies of requests: how they are received and read.

use std::borrow::Cow;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::{self, DeserializeOwned, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::forward_to_deserialize_any;

use crate::error::ApiError;
use crate::shared::Shared;

/// Fields of OpenAI's API, or of servers like this one, that this server does not have, and why.
const NOT_HERE: &[(&str, &str)] = &[
    ("suffix", "this server does not fill in the middle of a text"),
    ("functions", "it was replaced by `tools`"),
    ("function_call", "it was replaced by `tool_choice`"),
    ("audio", "this server answers with text alone"),
    ("prediction", "this server does not take predicted outputs"),
    ("moderation", "this server does not judge texts"),
    ("reasoning_effort", "how much a model reasons is its chat template's business; see `chat_template_kwargs`"),
    ("verbosity", "ask the model for it"),
    ("web_search_options", "this server does not search the web"),
    ("use_beam_search", "this server draws, or takes the likeliest token"),
];

/// The JSON object of a request's body, which is read field by field.
///
/// It stays text until its type is known, so a body takes no more memory than what is read of it.
#[derive(Debug)]
pub struct Fields {
    body: Bytes,
    known: Vec<&'static str>,
}

impl Fields {
    /// The fields of a body.
    #[must_use]
    pub fn new(body: Bytes) -> Self {
        Fields { body, known: Vec::new() }
    }

    /// Reads the fields that `T` has, and leaves the others.
    ///
    /// # Errors
    /// If the body is no JSON object, or a field has another type.
    pub fn read<T: DeserializeOwned>(&mut self) -> Result<T, ApiError> {
        self.known.extend(names::<T>());
        // A derived reader takes a list for a struct too.
        if self.body.trim_ascii_start().first() != Some(&b'{') {
            return Err(ApiError::invalid("the body must be a JSON object"));
        }
        let mut reader = serde_json::Deserializer::from_slice(&self.body);
        let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
            let path = error.path().to_string();
            let detail = error.into_inner();
            let text = plain(&detail);
            match text.strip_prefix("missing field `").and_then(|rest| rest.split_once('`')) {
                _ if !detail.is_data() => ApiError::invalid(format!("the body is not valid JSON: {detail}")),
                Some((name, _)) if path == "." => ApiError::field(name, format!("`{name}` is missing")),
                _ if path == "." => ApiError::invalid(format!("the body: {text}")),
                _ => ApiError::field(path.clone(), format!("`{path}`: {text}")),
            }
        })?;
        reader.end().map_err(|error| ApiError::invalid(format!("the body is not one JSON object: {error}")))?;
        Ok(value)
    }

    /// Checks that all fields were read. A field that is null counts as absent.
    ///
    /// # Errors
    /// The first field that was not.
    pub fn finish(self) -> Result<(), ApiError> {
        let Names(names) = serde_json::from_slice(&self.body)
            .map_err(|error| ApiError::invalid(format!("the body is not valid JSON: {error}")))?;
        let Some(name) = names.into_iter().find(|name| !self.known.contains(&&**name)) else { return Ok(()) };
        let name: String = name.chars().take(100).collect();
        let message = match NOT_HERE.iter().find(|(field, _)| *field == name) {
            Some((_, why)) => format!("`{name}` is not supported: {why}"),
            None => format!("`{name}` is not a field that this server knows; /openapi.json lists those it knows"),
        };
        Err(ApiError { code: Some("unsupported_parameter"), ..ApiError::field(name, message) })
    }
}

/// What is wrong with a value: without its place in the text, and in words that are not Rust's.
fn plain(error: &serde_json::Error) -> String {
    const WORDS: [(&str, &str); 6] = [
        ("expected f32", "expected a number"),
        ("expected usize", "expected a whole number that is not negative"),
        ("expected u32", "expected a whole number that is not negative"),
        ("expected i64", "expected a whole number"),
        ("expected struct ", "expected an object: "),
        ("invalid type: ", "found "),
    ];
    let text = error.to_string();
    let text = text.rfind(" at line ").map_or(&*text, |at| &text[..at]);
    WORDS.iter().fold(text.to_owned(), |text, (rust, word)| text.replace(rust, word))
}

impl FromRequest<Arc<Shared>> for Fields {
    type Rejection = ApiError;

    async fn from_request(request: Request, shared: &Arc<Shared>) -> Result<Self, ApiError> {
        let kind = request.headers().get(header::CONTENT_TYPE).map(|kind| kind.as_bytes()).unwrap_or_default();
        let kind = kind.split(|&byte| byte == b';').next().unwrap_or_default().trim_ascii();
        if !kind.eq_ignore_ascii_case(b"application/json") {
            let message = "the body must be JSON; send the header `Content-Type: application/json`";
            return Err(ApiError::status(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        let bounds = shared.options.bounds;
        let too_large = || {
            let message = format!("the body is larger than {} bytes", bounds.body_bytes);
            ApiError::status(StatusCode::PAYLOAD_TOO_LARGE, message)
        };
        let length = request.headers().get(header::CONTENT_LENGTH).and_then(|n| n.to_str().ok()?.parse::<usize>().ok());
        if length.is_some_and(|length| length > bounds.body_bytes) {
            return Err(too_large());
        }
        let body = Limited::new(request.into_body(), bounds.body_bytes).collect();
        match tokio::time::timeout(bounds.receive, body).await {
            Err(_) => Err(ApiError::status(
                StatusCode::REQUEST_TIMEOUT,
                format!("the body did not arrive within {} s", bounds.receive.as_secs()),
            )),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
            Ok(Err(error)) => Err(ApiError::invalid(format!("the body could not be received: {error}"))),
            Ok(Ok(body)) => Ok(Fields::new(body.to_bytes())),
        }
    }
}

/// The names of an object's fields that are not null.
struct Names<'a>(Vec<Cow<'a, str>>);

impl<'de> de::Deserialize<'de> for Names<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Names<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Names<'de>, A::Error> {
                let mut names = Vec::new();
                while let Some(name) = map.next_key()? {
                    if map.next_value::<Option<IgnoredAny>>()?.is_some() {
                        names.push(name);
                    }
                }
                Ok(Names(names))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

/// The names of a struct's fields in JSON, which its derived `Deserialize` tells.
fn names<T: DeserializeOwned>() -> &'static [&'static str] {
    struct Told(&'static [&'static str]);
    struct Asking<'a>(&'a mut Told);
    impl<'de> Deserializer<'de> for Asking<'_> {
        type Error = de::value::Error;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(de::Error::custom("only names are asked for"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, Self::Error> {
            self.0.0 = fields;
            self.deserialize_any(visitor)
        }

        forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
            newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }
    let mut told = Told(&[]);
    let _ = T::deserialize(Asking(&mut told));
    told.0
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    struct One {
        n: Option<u32>,
        #[serde(rename = "type")]
        kind: Option<String>,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    struct Other {
        list: Option<Vec<u8>>,
    }

    fn read(body: &'static str) -> Result<(One, Other), ApiError> {
        let mut fields = Fields::new(Bytes::from_static(body.as_bytes()));
        let read = (fields.read()?, fields.read()?);
        fields.finish()?;
        Ok(read)
    }

    #[test]
    fn fields_of_two_structs_are_read_from_one_object() {
        let both = (One { n: Some(3), kind: Some("x".into()) }, Other { list: Some(vec![1, 2]) });
        assert_eq!(read(r#"{"list": [1, 2], "type": "x", "n": 3, "else": null}"#), Ok(both));
        assert_eq!(read("{}"), Ok((One { n: None, kind: None }, Other { list: None })));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let said = |body| {
            let error = read(body).unwrap_err();
            format!("{}: {}", error.param.unwrap_or_default(), error.message)
        };
        let wrong = [
            r#"{"n": -1}"#,
            r#"{"list": [1, "a"]}"#,
            r#"{"max_token": 1}"#,
            r#"{"suffix": "x"}"#,
            r#"{"n": 1"#,
            r#"{"n": 1} {}"#,
            "[1, 2]",
            "",
        ];
        insta::assert_snapshot!(wrong.map(said).join("\n"));
    }
}
