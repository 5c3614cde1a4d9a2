//! The text of a sequence as it grows.

use mixtral_model::TokenId;

use crate::error::TokenizerError;
use crate::tokenizer::Tokenizer;

/// Decodes a sequence piece by piece. All pieces together are the text of all ids.
///
/// The decoded text of the last tokens can change when more tokens arrive: bytes become a character, or turn out to be
/// invalid. A piece is released when no later token can change it.
#[derive(Clone, Debug, Default)]
pub struct TextStream {
    /// The last tokens. The first of them is kept because the text of the next one depends on it.
    window: Vec<u32>,
    /// How many bytes of the window's text are already released.
    given: usize,
}

impl TextStream {
    /// Takes the next id and returns the text that is now certain. Special tokens have no text.
    ///
    /// # Errors
    /// If the tokenizer cannot decode it.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: TokenId) -> Result<String, TokenizerError> {
        if !tokenizer.has_text(id) {
            return Ok(String::new());
        }
        self.window.push(id.0);
        // A run of byte tokens is decoded as a whole: one invalid byte turns all of them into replacement characters.
        if tokenizer.byte(id).is_some() {
            return Ok(String::new());
        }
        let text = tokenizer.decode_raw(&self.window)?;
        // An incomplete character at the end looks like an invalid one, so it is not certain yet.
        let certain = text.strip_suffix(char::REPLACEMENT_CHARACTER).map_or(text.len(), str::len);
        let piece = text.get(self.given..certain).unwrap_or_default().to_owned();
        self.given = self.given.max(certain);
        if certain == text.len() {
            self.window = vec![id.0];
            self.given = tokenizer.decode_raw(&self.window)?.len();
        }
        Ok(piece)
    }

    /// Returns the text that still waited for more tokens, at the end of the sequence.
    ///
    /// # Errors
    /// If the tokenizer cannot decode it.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String, TokenizerError> {
        let window = std::mem::take(&mut self.window);
        let text = tokenizer.decode_raw(&window)?;
        Ok(text.get(std::mem::take(&mut self.given)..).unwrap_or_default().to_owned())
    }
}
