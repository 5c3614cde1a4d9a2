//! The fields that say how an answer is drawn and where it ends. Completions and chat have the same.

use std::collections::BTreeMap;

use mixtral_model::TokenId;
use mixtral_runtime::{Request, SamplingParams};
use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::error::ApiError;
use crate::guide::Form;
use crate::options::{MAX_BIASED, MAX_CHOICES, MAX_STOP_BYTES, MAX_STOPS};
use crate::shared::{Shared, random};

/// How an answer is drawn and where it ends.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct Sampling {
    /// The name of the model: one of `/v1/models`.
    pub model: String,
    /// How many answers to give to each prompt; 1 if absent.
    #[schema(minimum = 1, maximum = 128)]
    pub n: Option<usize>,
    /// Divisor of the logits, at least 0, where 0 takes the likeliest token; 1 if absent.
    #[schema(minimum = 0)]
    pub temperature: Option<f32>,
    /// Candidates up to this cumulative probability, from 0 to 1; 1, all of them, if absent.
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f32>,
    /// Candidates by rank; -1 or 0, all of them, if absent.
    #[schema(minimum = -1)]
    pub top_k: Option<i64>,
    /// Candidates at least this likely, relative to the likeliest, from 0 to 1; 0 if absent.
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f32>,
    /// Subtracted from the logits of tokens of the answer, from -2 to 2; 0 if absent.
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f32>,
    /// Subtracted for every time a token is in the answer, from -2 to 2; 0 if absent.
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f32>,
    /// Divides (or multiplies, where negative) the logits of tokens of prompt and answer, above 0; 1 if absent.
    #[schema(exclusive_minimum = 0)]
    pub repetition_penalty: Option<f32>,
    /// Added to the logits of tokens, from -100 to 100, by token id.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// Seed of the draws. With the same seed, the same request has the same answer. Random if absent.
    pub seed: Option<i64>,
    /// A text that ends the answer, or a list of them. It is not part of the answer.
    #[schema(value_type = Option<StopSchema>)]
    pub stop: Option<Stop>,
    /// Whether the model's end tokens do not end the answer.
    pub ignore_eos: Option<bool>,
    /// As long as the answer has fewer tokens, the model's end tokens cannot be drawn.
    pub min_tokens: Option<usize>,
    /// Whether the answer is sent as it grows, by server-sent events.
    pub stream: Option<bool>,
    /// What a stream tells beside text.
    pub stream_options: Option<StreamOptions>,
    /// The form of the answer: any text, a JSON object, or JSON that fits a schema.
    pub response_format: Option<ResponseFormat>,
    /// A JSON schema that the answer fits.
    #[schema(value_type = Option<Object>)]
    pub guided_json: Option<Value>,
    /// A regular expression that matches the whole answer.
    pub guided_regex: Option<String>,
    /// A grammar of the answer, in Lark's notation.
    pub guided_grammar: Option<String>,
    /// Whom the request is for. It changes nothing.
    pub user: Option<String>,
    /// Texts of the client's own, by name. They change nothing.
    pub metadata: Option<BTreeMap<String, String>>,
}

/// The form of an answer.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ResponseFormat {
    /// Any text.
    Text,
    /// A JSON object.
    JsonObject,
    /// JSON that fits a schema.
    JsonSchema {
        /// The schema.
        json_schema: NamedSchema,
    },
}

/// A JSON schema, and what it is of.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NamedSchema {
    /// Its name, which changes nothing.
    pub name: String,
    /// What it is of, which changes nothing.
    pub description: Option<String>,
    /// The schema; any object if absent.
    #[schema(value_type = Option<Object>)]
    pub schema: Option<Value>,
    /// Answers always fit the schema, so this changes nothing.
    pub strict: Option<bool>,
}

/// What a stream tells beside text.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StreamOptions {
    /// Whether a last chunk tells how many tokens were used.
    pub include_usage: Option<bool>,
    /// Whether every chunk tells it.
    pub continuous_usage_stats: Option<bool>,
}

impl Sampling {
    /// How many answers each prompt gets.
    ///
    /// # Errors
    /// If that is none, or too many.
    pub fn choices(&self) -> Result<usize, ApiError> {
        within("n", self.n.unwrap_or(1), 1, MAX_CHOICES)
    }

    /// A request for one answer of at most `max_tokens` tokens, without its prompt.
    ///
    /// # Errors
    /// The field that is out of bounds, or that this server cannot honour.
    pub fn request(&self, shared: &Shared, max_tokens: usize) -> Result<Request, ApiError> {
        let top_p = real("top_p", self.top_p, 1.0, 0.0, 1.0)?;
        let top_k = match self.top_k.unwrap_or(0) {
            -1 | 0 => 0,
            k => usize::try_from(k).map_err(|_| ApiError::field("top_k", "`top_k` must be at least -1"))?,
        };
        let params = SamplingParams {
            temperature: real("temperature", self.temperature, 1.0, 0.0, f32::MAX)?,
            // The smallest set that reaches no probability at all has the likeliest token alone.
            top_k: if top_p == 0.0 { 1 } else { top_k },
            top_p,
            min_p: real("min_p", self.min_p, 0.0, 0.0, 1.0)?,
            repetition_penalty: real("repetition_penalty", self.repetition_penalty, 1.0, f32::MIN_POSITIVE, f32::MAX)?,
            presence_penalty: real("presence_penalty", self.presence_penalty, 0.0, -2.0, 2.0)?,
            frequency_penalty: real("frequency_penalty", self.frequency_penalty, 0.0, -2.0, 2.0)?,
        };
        if self.stream_options.is_some() && self.stream != Some(true) {
            return Err(ApiError::field("stream_options", "`stream_options` needs `stream`"));
        }
        let Stop(stop_words) = self.stop.clone().unwrap_or_default();
        Ok(Request {
            params,
            max_output_len: max_tokens,
            min_output_len: within("min_tokens", self.min_tokens.unwrap_or(0), 0, max_tokens)?,
            logit_bias: self.logit_bias(shared.capabilities.vocab_size)?,
            seed: self.seed.map_or_else(random, i64::cast_unsigned),
            end_ids: if self.ignore_eos == Some(true) { Vec::new() } else { shared.options.end_ids.clone() },
            stop_words,
            ..Request::default()
        })
    }

    /// The form that the answer must have, and the field that says so.
    ///
    /// # Errors
    /// If several fields say so, or others keep the answer from ending where its form does.
    pub(crate) fn form(&self) -> Result<Option<(Form, &'static str)>, ApiError> {
        let format = self.response_format.as_ref().and_then(|format| match format {
            ResponseFormat::Text => None,
            ResponseFormat::JsonObject => Some(json!({ "type": "object" })),
            ResponseFormat::JsonSchema { json_schema } => {
                Some(json_schema.schema.clone().unwrap_or_else(|| json!({ "type": "object" })))
            }
        });
        let forms = [
            (format.map(Form::Json), "response_format"),
            (self.guided_json.clone().map(Form::Json), "guided_json"),
            (self.guided_regex.clone().map(Form::Regex), "guided_regex"),
            (self.guided_grammar.clone().map(Form::Grammar), "guided_grammar"),
        ];
        let mut forms = forms.into_iter().filter_map(|(form, field)| Some((form?, field)));
        let Some((form, field)) = forms.next() else { return Ok(None) };
        let also = forms.next().map(|(_, other)| other);
        let also = also.or(self.min_tokens.filter(|&n| n > 0).map(|_| "min_tokens"));
        if let Some(other) = also.or(self.ignore_eos.filter(|&ignored| ignored).map(|_| "ignore_eos")) {
            return Err(ApiError::field(other, format!("`{other}` cannot be given together with `{field}`")));
        }
        Ok(Some((form, field)))
    }

    /// The bias of tokens, checked.
    fn logit_bias(&self, vocab_size: usize) -> Result<Vec<(TokenId, f32)>, ApiError> {
        let bias = self.logit_bias.iter().flatten();
        if bias.clone().count() > MAX_BIASED {
            return Err(ApiError::field("logit_bias", format!("`logit_bias` has more than {MAX_BIASED} tokens")));
        }
        let checked = bias.map(|(text, &bias)| {
            let field = || format!("logit_bias.{text}");
            let Some(id) = text.parse().ok().filter(|&id: &u32| (id as usize) < vocab_size) else {
                let message = format!("`{text}` is no token id of the vocabulary of {vocab_size}");
                return Err(ApiError::field(field(), message));
            };
            if !(-100.0..=100.0).contains(&bias) {
                return Err(ApiError::field(field(), format!("a bias must be from -100 to 100, and is {bias}")));
            }
            Ok((TokenId(id), bias))
        });
        checked.collect()
    }
}

/// Gives each request a guide of its own, if the answer must have a form.
///
/// # Errors
/// If the form cannot be understood.
pub(crate) async fn guided(
    shared: &Shared,
    form: Option<(Form, &'static str)>,
    mut requests: Vec<Request>,
) -> Result<Vec<Request>, ApiError> {
    if let Some((form, field)) = form {
        let guides = shared.guides(form, requests.len(), field).await?;
        for (request, guide) in requests.iter_mut().zip(guides) {
            request.constraint = Some(guide);
        }
    }
    Ok(requests)
}

/// Checks a whole number.
pub(crate) fn within(field: &'static str, value: usize, low: usize, high: usize) -> Result<usize, ApiError> {
    if (low..=high).contains(&value) {
        return Ok(value);
    }
    Err(ApiError::field(field, format!("`{field}` must be from {low} to {high}, and is {value}")))
}

/// Checks a real number, or takes the default.
fn real(field: &'static str, value: Option<f32>, default: f32, low: f32, high: f32) -> Result<f32, ApiError> {
    let value = value.unwrap_or(default);
    if value >= low && value <= high {
        return Ok(value);
    }
    let range = match (low, high) {
        (f32::MIN_POSITIVE, _) => "above 0".to_owned(),
        (low, f32::MAX) => format!("at least {low}"),
        (low, high) => format!("from {low} to {high}"),
    };
    Err(ApiError::field(field, format!("`{field}` must be {range}, and is {value}")))
}

/// The texts that end an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stop(pub Vec<String>);

/// How the texts that end an answer are written.
#[derive(Deserialize, ToSchema)]
#[schema(as = Stop)]
#[serde(untagged)]
#[expect(dead_code, reason = "it is only described")]
enum StopSchema {
    /// One text.
    #[schema(title = "Text")]
    Text(String),
    /// Several.
    Texts(Vec<String>),
}

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Texts;
        impl<'de> Visitor<'de> for Texts {
            type Value = Stop;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a text or a list of texts")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Stop, E> {
                check_stop(text)?;
                Ok(Stop(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Stop, A::Error> {
                let mut texts = Vec::new();
                while let Some(text) = list.next_element::<String>()? {
                    check_stop(&text)?;
                    if texts.len() == MAX_STOPS {
                        return Err(de::Error::custom(format!("more than {MAX_STOPS} texts")));
                    }
                    texts.push(text);
                }
                Ok(Stop(texts))
            }
        }
        deserializer.deserialize_any(Texts)
    }
}

fn check_stop<E: de::Error>(text: &str) -> Result<(), E> {
    match text.len() {
        0 => Err(E::custom("an empty text would end every answer at once")),
        1..=MAX_STOP_BYTES => Ok(()),
        n => Err(E::custom(format!("a text of {n} bytes; at most {MAX_STOP_BYTES} are taken"))),
    }
}
