//! Answers of a given form: JSON that fits a schema, a regular expression, or a grammar.
//!
//! llguidance says which tokens may come next. All others are banned from the draw.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use mixtral_model::TokenId;
use mixtral_runtime::{Constraint, Tokenizer};
use serde_json::{Value, json};
use toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};

/// The form of an answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Form {
    /// JSON that fits this schema.
    Json(Value),
    /// A text that this regular expression matches as a whole.
    Regex(String),
    /// A text of this grammar, in Lark's notation.
    Grammar(String),
}

/// Makes guides for one vocabulary.
#[derive(Default)]
pub(crate) struct Guides {
    /// Made for the first request that needs it.
    factory: OnceLock<Result<ParserFactory, String>>,
}

/// Which tokens may come next in one answer.
pub(crate) struct Guide {
    state: Mutex<State>,
    vocab_size: usize,
    end_ids: Vec<TokenId>,
}

struct State {
    matcher: Matcher,
    /// How many tokens of the answer the matcher knows.
    known: usize,
}

impl Guides {
    /// A guide to answers of a form, for a model with these end ids.
    ///
    /// # Errors
    /// If the form cannot be understood, or the model cannot end its answers.
    pub(crate) fn guide(
        &self,
        form: Form,
        tokenizer: &Tokenizer,
        vocab_size: usize,
        end_ids: &[TokenId],
    ) -> Result<Guide, String> {
        // An id past the vocabulary cannot be drawn, so it ends nothing.
        let end_ids: Vec<TokenId> = end_ids.iter().copied().filter(|id| (id.0 as usize) < vocab_size).collect();
        let Some(end) = end_ids.first() else { return Err("this model has no token that ends an answer".to_owned()) };
        let factory = self.factory.get_or_init(|| factory(tokenizer, vocab_size, *end));
        let factory = factory.as_ref().map_err(Clone::clone)?;
        let grammar = match form {
            Form::Json(schema) => TopLevelGrammar::from_json_schema(compact(schema)?),
            Form::Regex(regex) => TopLevelGrammar::from_regex(&regex),
            Form::Grammar(lark) => TopLevelGrammar::from_lark(lark),
        };
        let matcher = Matcher::new(factory.create_parser(grammar));
        match matcher.get_error() {
            Some(error) => Err(error),
            None => Ok(Guide { state: Mutex::new(State { matcher, known: 0 }), vocab_size, end_ids }),
        }
    }
}

/// A schema for JSON without spaces and line ends between its parts, other than one behind a comma or a colon. A model that
/// may write any number of spaces might never stop to.
fn compact(mut schema: Value) -> Result<Value, String> {
    let Some(keys) = schema.as_object_mut() else { return Err("a schema must be a JSON object".to_owned()) };
    keys.entry("x-guidance").or_insert_with(|| json!({ "whitespace_flexible": false }));
    Ok(schema)
}

/// Describes the vocabulary to llguidance.
fn factory(tokenizer: &Tokenizer, vocab_size: usize, end: TokenId) -> Result<ParserFactory, String> {
    let size = u32::try_from(vocab_size).map_err(|error| error.to_string())?;
    let words: Vec<Vec<u8>> = (0..size)
        .map(TokenId)
        .map(|id| {
            let bytes = tokenizer.token_bytes(id).unwrap_or_default();
            // A special token is no text, whatever its name.
            let is_special = tokenizer.special(id).is_some();
            if is_special { [&[TokTrie::SPECIAL_TOKEN_MARKER], &bytes[..]].concat() } else { bytes }
        })
        .collect();
    let trie = TokTrie::from(&TokRxInfo::new(size, end.0), &words);
    let vocabulary: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let mut factory = ParserFactory::new_simple(&vocabulary).map_err(|error| error.to_string())?;
    factory.quiet();
    Ok(factory)
}

impl State {
    /// The tokens that may come after `output`; `None` if nothing may, or the matcher failed.
    fn allowed(&mut self, output: &[TokenId]) -> Option<SimpleVob> {
        let new: Vec<u32> = output.get(self.known..)?.iter().map(|id| id.0).collect();
        self.known = output.len();
        self.matcher.consume_tokens(&new).ok()?;
        self.matcher.compute_mask_or_eos().ok()
    }
}

impl Guide {
    /// Another guide to the same form, at its start.
    pub(crate) fn another(&self) -> Guide {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        Guide {
            state: Mutex::new(State { matcher: state.matcher.deep_clone(), known: state.known }),
            vocab_size: self.vocab_size,
            end_ids: self.end_ids.clone(),
        }
    }
}

impl Constraint for Guide {
    fn banned(&self, output: &[TokenId]) -> Vec<TokenId> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let allowed = state.allowed(output);
        // llguidance knows the first end token alone. Where that may come, or nothing else, all of them may.
        let may_end =
            allowed.as_ref().is_none_or(|mask| self.end_ids.first().is_some_and(|end| mask.is_allowed(end.0)));
        let mut allowed = allowed.unwrap_or_else(|| SimpleVob::alloc(self.vocab_size));
        for end in &self.end_ids {
            allowed.set(end.0 as usize, may_end);
        }
        // Before most draws this is nearly the whole vocabulary. To go through the words of the mask takes a quarter of the time
        // of asking for each id.
        let mut banned = Vec::with_capacity(self.vocab_size);
        allowed.iter_unset_entries(|id| banned.extend(u32::try_from(id).map(TokenId)));
        banned
    }
}

impl std::fmt::Debug for Guide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guide").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::messages::Tool;
    use crate::tool_choice::ToolChoice;

    const VOCAB: u32 = 2048;
    const END: TokenId = TokenId(2);

    fn guide(form: Form) -> Result<(Guide, Tokenizer), String> {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/tiny-mixtral");
        let tokenizer = Tokenizer::load(&model).unwrap();
        let end_ids = [TokenId(VOCAB + 64), END];
        Guides::default().guide(form, &tokenizer, VOCAB as usize, &end_ids).map(|guide| (guide, tokenizer))
    }

    /// Draws tokens of those that are not banned, whatever they are. Prefers to end.
    fn write(form: Form, seed: u64) -> String {
        let (guide, tokenizer) = guide(form).unwrap();
        let (mut output, mut bits) = (Vec::new(), seed);
        loop {
            let banned = guide.banned(&output);
            let allowed: Vec<TokenId> = (0..VOCAB).map(TokenId).filter(|id| !banned.contains(id)).collect();
            if allowed.contains(&END) || output.len() > 300 {
                return tokenizer.decode(&output).unwrap();
            }
            bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            output.push(allowed[usize::try_from(bits >> 33).unwrap() % allowed.len()]);
        }
    }

    #[test]
    fn json_fits_its_schema() {
        let schema = json!({
            "$defs": { "size": { "type": "integer", "minimum": 1, "maximum": 99 } },
            "type": "object",
            "properties": {
                "name": { "enum": ["Romeo", "Juliet \u{2665}"] },
                "sizes": { "type": "array", "items": { "$ref": "#/$defs/size" }, "minItems": 2, "maxItems": 4 },
                "dead": { "type": ["boolean", "null"] },
            },
            "required": ["name", "sizes", "dead"],
            "additionalProperties": false,
        });
        for seed in 0..20 {
            let text = write(Form::Json(schema.clone()), seed);
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
            assert!(["Romeo", "Juliet \u{2665}"].contains(&value["name"].as_str().unwrap()), "{text}");
            let sizes = value["sizes"].as_array().unwrap();
            assert!((2..=4).contains(&sizes.len()), "{text}");
            assert!(sizes.iter().all(|size| (1..=99).contains(&size.as_u64().unwrap())), "{text}");
            assert!(value["dead"].is_boolean() || value["dead"].is_null(), "{text}");
        }
    }

    #[test]
    fn a_call_of_one_of_several_tools_fits_that_tools_schema() {
        let of = |definitions: &str, leaf: Value| {
            let child = json!({ "anyOf": [{ "$ref": "#" }, { "$ref": format!("#/{definitions}/leaf") }] });
            json!({ definitions: { "leaf": leaf }, "type": "object", "properties": { "child": child }, "required": ["child"] })
        };
        let schemas = [of("$defs", json!({ "const": "f" })), of("definitions", json!({ "const": "g" }))];
        let tool = |(name, parameters): (&str, &Value)| json!({ "type": "function", "function": { "name": name, "parameters": parameters } });
        let tools =
            serde_json::from_value::<Vec<Tool>>(["f", "g"].into_iter().zip(&schemas).map(tool).collect()).unwrap();
        let form = ToolChoice::Required.form(&tools, false).unwrap().unwrap();
        for seed in 0..8 {
            let text = write(form.clone(), seed);
            let mut call: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
            let mut arguments = call[0]["arguments"].take();
            while let Some(child) = arguments.get_mut("child") {
                arguments = child.take();
            }
            assert_eq!(arguments, call[0]["name"], "{text}");
        }
    }

    #[test]
    fn regular_expressions_and_grammars_are_kept_to() {
        for seed in 0..10 {
            let text = write(Form::Regex("[a-c]{3}-[0-9]{2}".to_owned()), seed);
            let (letters, digits) = text.split_once('-').unwrap();
            assert!(letters.len() == 3 && letters.chars().all(|c| ('a'..='c').contains(&c)), "{text}");
            assert!(digits.len() == 2 && digits.parse::<u8>().is_ok(), "{text}");
            let text = write(Form::Grammar("start: \"yes\" | \"no, \" (\"never\" | \"not now\")".to_owned()), seed);
            assert!(["yes", "no, never", "no, not now"].contains(&text.as_str()), "{text}");
        }
    }

    #[test]
    fn forms_that_cannot_be_understood_are_refused() {
        let wrong = [
            Form::Json(json!(["object"])),
            Form::Json(json!({ "type": "objekt" })),
            Form::Json(json!({ "$ref": "https://example.com/schema" })),
            Form::Regex("(".to_owned()),
            Form::Grammar("start: missing".to_owned()),
        ];
        for form in wrong {
            assert!(guide(form.clone()).is_err(), "{form:?}");
        }
    }
}
