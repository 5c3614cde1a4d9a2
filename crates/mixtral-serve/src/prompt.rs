//! Prompts of completions: a text, a list of texts, token ids, or a list of lists of token ids.

use mixtral_model::TokenId;
use mixtral_runtime::TokenizerError;
use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};

use utoipa::ToSchema;

use crate::error::ApiError;
use crate::options::MAX_PROMPTS;
use crate::shared::Shared;

/// The prompts of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompts {
    /// Texts.
    Texts(Vec<String>),
    /// Lists of token ids.
    Ids(Vec<Vec<u32>>),
}

/// How prompts are written.
#[derive(Deserialize, ToSchema)]
#[schema(as = Prompts)]
#[serde(untagged)]
#[expect(dead_code, reason = "it is only described")]
pub(crate) enum PromptsSchema {
    /// A text.
    #[schema(title = "Text")]
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// Token ids.
    Ids(Vec<u32>),
    /// Lists of token ids.
    IdLists(Vec<Vec<u32>>),
}

/// A prompt as the session takes it, and as a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Prompt {
    pub(crate) ids: Vec<TokenId>,
    pub(crate) text: String,
}

impl Prompts {
    /// The ids of texts, and the texts of ids.
    ///
    /// # Errors
    /// If the tokenizer cannot read one of them.
    pub(crate) async fn read(self, shared: &Shared) -> Result<Vec<Prompt>, ApiError> {
        let read = shared.with_tokenizer(move |tokenizer| -> Result<Vec<Prompt>, TokenizerError> {
            match self {
                Prompts::Texts(texts) => {
                    texts.into_iter().map(|text| Ok(Prompt { ids: tokenizer.encode(&text, true)?, text })).collect()
                }
                Prompts::Ids(lists) => lists
                    .into_iter()
                    .map(|ids| {
                        let ids: Vec<TokenId> = ids.into_iter().map(TokenId).collect();
                        Ok(Prompt { text: tokenizer.decode(&ids)?, ids })
                    })
                    .collect(),
            }
        });
        read.await.map_err(|error| ApiError { param: Some("prompt".to_owned()), ..error })
    }
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Reader)
    }
}

struct Reader;

impl<'de> Visitor<'de> for Reader {
    type Value = Prompts;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a text, a list of texts, a list of token ids, or a list of lists of token ids")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Prompts, E> {
        Ok(Prompts::Texts(vec![text.to_owned()]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Prompts, A::Error> {
        match list.next_element::<First>()? {
            None => Err(de::Error::custom("the list is empty")),
            Some(First::Text(text)) => Ok(Prompts::Texts(rest(text, &mut list, MAX_PROMPTS)?)),
            Some(First::Ids(ids)) => Ok(Prompts::Ids(rest(ids, &mut list, MAX_PROMPTS)?)),
            // An engine refuses a prompt that is longer than its sequences.
            Some(First::Id(id)) => Ok(Prompts::Ids(vec![rest(id, &mut list, usize::MAX)?])),
        }
    }
}

/// The whole list, of which the first element was read.
fn rest<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(first: T, list: &mut A, most: usize) -> Result<Vec<T>, A::Error> {
    let mut all = vec![first];
    while let Some(next) = list.next_element()? {
        if all.len() == most {
            return Err(de::Error::custom(format!("more than {most} prompts")));
        }
        all.push(next);
    }
    Ok(all)
}

/// The first element of a list, which says what the list is of.
enum First {
    Text(String),
    Id(u32),
    Ids(Vec<u32>),
}

impl<'de> Deserialize<'de> for First {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Element;
        impl<'de> Visitor<'de> for Element {
            type Value = First;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a text, a token id or a list of token ids")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<First, E> {
                Ok(First::Text(text.to_owned()))
            }

            fn visit_u64<E: de::Error>(self, id: u64) -> Result<First, E> {
                let id = u32::try_from(id).map_err(|_| E::invalid_value(de::Unexpected::Unsigned(id), &self))?;
                Ok(First::Id(id))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<First, A::Error> {
                let mut ids = Vec::new();
                while let Some(id) = list.next_element()? {
                    ids.push(id);
                }
                Ok(First::Ids(ids))
            }
        }
        deserializer.deserialize_any(Element)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Prompts, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn all_four_kinds_are_read() {
        let texts = |texts: &[&str]| Ok(Prompts::Texts(texts.iter().map(|t| (*t).to_owned()).collect()));
        assert_eq!(read(r#""a""#), texts(&["a"]));
        assert_eq!(read(r#"["a", ""]"#), texts(&["a", ""]));
        assert_eq!(read("[1, 2]"), Ok(Prompts::Ids(vec![vec![1, 2]])));
        assert_eq!(read("[[1], [], [2, 3]]"), Ok(Prompts::Ids(vec![vec![1], vec![], vec![2, 3]])));
    }

    #[test]
    fn mixed_lists_and_other_kinds_are_not() {
        for json in [
            "[]",
            "[1, \"a\"]",
            "[\"a\", 1]",
            "[[1], 2]",
            "[[\"a\"]]",
            "[-1]",
            "[4294967296]",
            "[1.5]",
            "1",
            "{}",
            "[[[1]]]",
        ] {
            assert!(read(json).is_err(), "{json}");
        }
        let many = format!("[{}]", vec!["\"a\""; MAX_PROMPTS + 1].join(","));
        assert!(read(&many).unwrap_err().starts_with("more than 256 prompts"));
    }
}
