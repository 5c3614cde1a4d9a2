//! Reads what the files beside a tokenizer add: tokens, their roles, and end ids. The rules are transformers'.

use std::collections::BTreeMap;
use std::path::Path;

use mixtral_model::TokenId;
use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::error::TokenizerError;
use crate::load::read;

/// The roles that a special token can have.
const ROLES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// `tokenizer_config.json`, together with what older files beside it say.
#[derive(Debug, Default)]
pub(crate) struct Settings {
    keys: Map<String, Value>,
    /// Tokens that replace the tokenizer's own definitions, in the order of their ids.
    pub(crate) defined: Vec<AddedToken>,
    /// Tokens that must exist. If the tokenizer defines one itself, its definition counts.
    pub(crate) named: Vec<AddedToken>,
}

impl Settings {
    /// Reads the files of `dir`; each may be absent.
    pub(crate) fn read(dir: &Path) -> Result<Self, TokenizerError> {
        let mut keys = object(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
        let (mut defined, mut named) = (Vec::new(), Vec::new());
        if let Some(Value::Object(tokens)) = keys.get("added_tokens_decoder") {
            let tokens = tokens.iter().filter_map(|(id, token)| Some((id.parse().ok()?, added_token(token, false)?)));
            defined = by_id(tokens.collect());
        } else {
            // Older models keep in two files what newer ones have in `added_tokens_decoder`.
            keys.extend(object(&dir.join("special_tokens_map.json"))?.unwrap_or_default());
            let special: Vec<String> = special_tokens(&keys).into_iter().map(|token| token.content).collect();
            let tokens = object(&dir.join("added_tokens.json"))?.unwrap_or_default().into_iter();
            let tokens = tokens.filter_map(|(content, id)| {
                let is_special = special.contains(&content);
                Some((id.as_u64()?, AddedToken::from(content, is_special)))
            });
            named = by_id(tokens.collect());
        }
        let has = |tokens: &[AddedToken], token: &AddedToken| tokens.iter().any(|t| t.content == token.content);
        for token in special_tokens(&keys) {
            if !has(&defined, &token) && !has(&named, &token) {
                named.push(token);
            }
        }
        Ok(Settings { keys, defined, named })
    }

    /// Whether none of the files exists.
    pub(crate) fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.named.is_empty()
    }

    /// The content of the token with this role.
    pub(crate) fn role(&self, role: &str) -> Option<String> {
        added_token(self.keys.get(role)?, true).map(|token| token.content)
    }

    /// The tokens that have a name, by their names: those with a role, and a model's own (`image_token`).
    pub(crate) fn named_tokens(&self) -> BTreeMap<String, String> {
        let own = self.keys.get("extra_special_tokens").and_then(Value::as_object);
        let roles = ROLES.iter().filter_map(|role| Some((*role, self.keys.get(*role)?)));
        let named = roles.chain(own.into_iter().flatten().map(|(name, token)| (name.as_str(), token)));
        named.filter_map(|(name, token)| Some((name.to_owned(), added_token(token, true)?.content))).collect()
    }

    /// The chat templates by name. A single one, which has no name, is the default.
    pub(crate) fn chat_templates(&self) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        match self.keys.get("chat_template") {
            Some(Value::String(template)) => vec![("default".to_owned(), template.clone())],
            Some(Value::Array(named)) => {
                named.iter().filter_map(|t| Some((text(t.get("name")?)?, text(t.get("template")?)?))).collect()
            }
            _ => Vec::new(),
        }
    }

    /// A setting that is on or off; `None` if no file has it.
    pub(crate) fn flag(&self, key: &str) -> Option<bool> {
        self.keys.get(key)?.as_bool()
    }
}

fn by_id(mut tokens: Vec<(u64, AddedToken)>) -> Vec<AddedToken> {
    tokens.sort_by_key(|(id, _)| *id);
    tokens.into_iter().map(|(_, token)| token).collect()
}

/// The tokens with a role, and other tokens that are special too.
fn special_tokens(keys: &Map<String, Value>) -> Vec<AddedToken> {
    let mut tokens: Vec<AddedToken> =
        ROLES.iter().filter_map(|role| keys.get(*role)).filter_map(|token| added_token(token, true)).collect();
    for list in ["extra_special_tokens", "additional_special_tokens"] {
        match keys.get(list) {
            Some(Value::Array(list)) => tokens.extend(list.iter().filter_map(|token| added_token(token, true))),
            Some(Value::Object(named)) => tokens.extend(named.values().filter_map(|token| added_token(token, true))),
            _ => {}
        }
    }
    tokens
}

/// A token, which the file has as its content alone or as an object with all its properties.
fn added_token(value: &Value, role: bool) -> Option<AddedToken> {
    let Value::Object(keys) = value else {
        return Some(AddedToken::from(value.as_str()?, true)).filter(|token| !token.content.is_empty());
    };
    let flag = |key: &str| keys.get(key).and_then(Value::as_bool);
    let special = role || flag("special").unwrap_or(false);
    let token = AddedToken::from(keys.get("content")?.as_str()?, special)
        .single_word(flag("single_word").unwrap_or(false))
        .lstrip(flag("lstrip").unwrap_or(false))
        .rstrip(flag("rstrip").unwrap_or(false))
        .normalized(flag("normalized").unwrap_or(!special));
    (!token.content.is_empty()).then_some(token)
}

/// The ids that end the model's sequences: `eos_token_id` (a number or a list) of generation_config.json, or else of
/// config.json. Files that are absent name none.
///
/// # Errors
/// If a file cannot be read.
pub fn model_end_ids(dir: &Path) -> Result<Vec<TokenId>, TokenizerError> {
    for name in ["generation_config.json", "config.json"] {
        let ids = object(&dir.join(name))?.and_then(|keys| keys.get("eos_token_id").map(ids_of)).unwrap_or_default();
        if !ids.is_empty() {
            return Ok(ids);
        }
    }
    Ok(Vec::new())
}

fn ids_of(value: &Value) -> Vec<TokenId> {
    let ids = match value {
        Value::Array(ids) => ids.as_slice(),
        one => std::slice::from_ref(one),
    };
    ids.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()).map(TokenId).collect()
}

fn object(path: &Path) -> Result<Option<Map<String, Value>>, TokenizerError> {
    if !path.exists() {
        return Ok(None);
    }
    let bytes = read(path)?;
    serde_json::from_slice(&bytes).map(Some).map_err(|e| TokenizerError::unreadable(path, &bytes, e))
}
