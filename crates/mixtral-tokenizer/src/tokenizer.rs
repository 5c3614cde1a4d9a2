//! A model's tokenizer: encodes and decodes.

use std::path::{Path, PathBuf};

use mixtral_model::TokenId;
use tokenizers::processors::template::TemplateProcessing;

use crate::error::TokenizerError;
use crate::guard::guarded;
use crate::load::{self, Base};
use crate::settings::Settings;

/// A model's tokenizer, made of its own file and the files beside it.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    dummy_prefix: bool,
    /// Whether tokens are written with one character for each byte.
    byte_level: bool,
    start: Option<TokenId>,
    end: Option<TokenId>,
    pad: Option<TokenId>,
}

impl Tokenizer {
    /// Loads the tokenizer of `dir` as transformers does: `tokenizer.json`, and the tokens and roles that
    /// tokenizer_config.json, special_tokens_map.json and added_tokens.json add. Without a tokenizer.json, it reads
    /// `tekken.json` or a SentencePiece model, as mistral-common does.
    ///
    /// # Errors
    /// If there is none, or a file cannot be read.
    pub fn load(dir: &Path) -> Result<Self, TokenizerError> {
        let Base { path, mut inner, dummy_prefix, start, end } = load::base(dir)?;
        let settings = Settings::read(dir)?;
        if !settings.is_empty() {
            guarded(|| apply(&settings, &mut inner))
                .flatten()
                .map_err(|detail| TokenizerError::Read { path: dir.join("tokenizer_config.json"), detail })?;
        }
        let id = |token: &str| inner.token_to_id(token).map(TokenId);
        let role = |role: &str| settings.role(role).and_then(|token| id(&token));
        let is_special = |token: &&str| inner.get_added_vocabulary().is_special_token(token);
        let end = role("eos_token").or(end.map(TokenId));
        let decoder = serde_json::to_string(&inner.get_decoder()).unwrap_or_default();
        Ok(Tokenizer {
            start: role("bos_token").or(start.map(TokenId)).or_else(|| Some("<s>").filter(is_special).and_then(id)),
            end,
            pad: role("pad_token").or(end),
            byte_level: decoder.contains("\"ByteLevel\""),
            dummy_prefix,
            path,
            inner,
        })
    }

    /// The file that it was read from.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The ids of `text`, with the model's start token in front unless `add_special_tokens` is off.
    ///
    /// # Errors
    /// If the tokenizer cannot encode it.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<TokenId>, TokenizerError> {
        let prefixed = (self.dummy_prefix && !text.is_empty()).then(|| format!(" {text}"));
        let text = prefixed.as_deref().unwrap_or(text);
        let encoding = used("encode a text", || self.inner.encode(text, add_special_tokens))?;
        Ok(encoding.get_ids().iter().copied().map(TokenId).collect())
    }

    /// The text of `ids`, without special tokens.
    ///
    /// # Errors
    /// If the tokenizer cannot decode them.
    pub fn decode(&self, ids: &[TokenId]) -> Result<String, TokenizerError> {
        let ids: Vec<u32> = ids.iter().map(|t| t.0).collect();
        self.decode_raw(&ids)
    }

    pub(crate) fn decode_raw(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        used("decode ids", || self.inner.decode(ids, true))
    }

    /// The token that texts start with.
    #[must_use]
    pub fn start_id(&self) -> Option<TokenId> {
        self.start
    }

    /// The token that ends a text (`eos_token`).
    #[must_use]
    pub fn end_id(&self) -> Option<TokenId> {
        self.end
    }

    /// The token that pads prompts to one length: `pad_token`, or else the one that ends a text.
    #[must_use]
    pub fn pad_id(&self) -> Option<TokenId> {
        self.pad
    }

    /// All ids, ascending.
    #[must_use]
    pub fn ids(&self) -> Vec<TokenId> {
        let mut ids: Vec<TokenId> = self.inner.get_vocab(true).into_values().map(TokenId).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// How a token is written in its file.
    #[must_use]
    pub fn token(&self, id: TokenId) -> Option<String> {
        self.inner.id_to_token(id.0)
    }

    /// Whether a token is an added one, which no merge makes.
    #[must_use]
    pub fn is_added(&self, id: TokenId) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id.0)
    }

    /// The content of a special token, which decoding leaves out.
    #[must_use]
    pub fn special(&self, id: TokenId) -> Option<String> {
        self.token(id).filter(|token| self.inner.get_added_vocabulary().is_special_token(token))
    }

    /// The id of a special token, by its content.
    #[must_use]
    pub fn special_id(&self, content: &str) -> Option<TokenId> {
        let id = self.inner.token_to_id(content).map(TokenId);
        id.filter(|_| self.inner.get_added_vocabulary().is_special_token(content))
    }

    /// Whether the token has text when it is decoded.
    pub(crate) fn has_text(&self, id: TokenId) -> bool {
        self.token(id).is_some_and(|token| !self.inner.get_added_vocabulary().is_special_token(&token))
    }

    /// The byte that a token stands for, if it is a byte token. Byte tokens write characters that have no token.
    pub(crate) fn byte(&self, id: TokenId) -> Option<u8> {
        let token = self.token(id)?;
        let digits = token.strip_prefix("<0x")?.strip_suffix('>').filter(|digits| digits.len() == 2)?;
        u8::from_str_radix(digits, 16).ok()
    }

    /// The bytes that a token adds in the middle of a text. Those of a special token are its content.
    #[must_use]
    pub fn token_bytes(&self, id: TokenId) -> Option<Vec<u8>> {
        let token = self.token(id)?;
        if let Some(byte) = self.byte(id) {
            return Some(vec![byte]);
        }
        if self.is_added(id) {
            return Some(token.into_bytes());
        }
        if self.byte_level {
            return token.chars().map(char_to_byte).collect();
        }
        Some(token.replace('▁', " ").into_bytes())
    }
}

/// Applies what tokenizer_config.json and the older files say, in transformers' order.
fn apply(settings: &Settings, inner: &mut tokenizers::Tokenizer) -> Result<(), String> {
    let added =
        |inner: &tokenizers::Tokenizer, content: &str| inner.get_added_vocabulary().get_vocab().contains_key(content);
    inner.add_tokens(settings.defined.iter().cloned()).map_err(|e| e.to_string())?;
    let named: Vec<_> = settings.named.iter().filter(|token| !added(inner, &token.content)).cloned().collect();
    inner.add_tokens(named).map_err(|e| e.to_string())?;
    inner.set_encode_special_tokens(settings.flag("split_special_tokens").unwrap_or(false));
    let (start, end) = (settings.flag("add_bos_token"), settings.flag("add_eos_token"));
    if start.is_none() && end.is_none() && inner.get_post_processor().is_some() {
        return Ok(());
    }
    let token = |wanted: Option<bool>, role: &str| wanted.filter(|&on| on).and_then(|_| settings.role(role));
    let (start, end) = (token(start, "bos_token"), token(end, "eos_token"));
    let template: Vec<&str> = [start.as_deref(), Some("$A"), end.as_deref()].into_iter().flatten().collect();
    let tokens = [&start, &end].into_iter().flatten();
    let tokens: Vec<(String, u32)> = tokens.filter_map(|t| Some((t.clone(), inner.token_to_id(t)?))).collect();
    let mut builder = TemplateProcessing::builder();
    builder.try_single(template).map_err(|e| e.to_string())?;
    inner.with_post_processor(Some(builder.special_tokens(tokens).build().map_err(|e| e.to_string())?));
    Ok(())
}

/// Calls the library. It panics at some tokenizers that it should refuse.
fn used<T>(action: &'static str, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, TokenizerError> {
    let answer = guarded(|| call().map_err(|e| e.to_string())).flatten();
    answer.map_err(|detail| TokenizerError::Use { action, detail })
}

/// Whether a vocabulary of byte strings writes a byte as the character with its number.
fn is_printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The character that a byte is written with: the one with its number if that is printable, else one from U+0100 on, in
/// order.
pub(crate) fn byte_to_char(byte: u8) -> char {
    if is_printable(byte) {
        return char::from(byte);
    }
    let place = (0..byte).filter(|&b| !is_printable(b)).count();
    u32::try_from(place).ok().and_then(|place| char::from_u32(0x100 + place)).unwrap_or(char::REPLACEMENT_CHARACTER)
}

fn char_to_byte(character: char) -> Option<u8> {
    match u8::try_from(character) {
        Ok(byte) => is_printable(byte).then_some(byte),
        Err(_) => (0..=u8::MAX).filter(|&b| !is_printable(b)).nth((character as usize).checked_sub(0x100)?),
    }
}
