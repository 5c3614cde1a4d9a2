//! The text of a sequence as it grows.

use mixtral_model::TokenId;

use crate::error::TokenizerError;
use crate::tokenizer::Tokenizer;

/// Decodes a sequence piece by piece. All pieces, one after the other, are the text of all ids.
///
/// A decoder can change what it made of the last tokens when more arrive: bytes become a character, or turn out to be none.
/// A piece is given out when nothing that follows can change it.
#[derive(Clone, Debug, Default)]
pub struct TextStream {
    /// The last tokens: the first of them is there for its effect on how the next one begins.
    window: Vec<u32>,
    /// Bytes of the window's text that were given out.
    given: usize,
}

impl TextStream {
    /// The text that is certain now that `id` follows. Special tokens have none.
    ///
    /// # Errors
    /// If the tokenizer cannot decode it.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: TokenId) -> Result<String, TokenizerError> {
        if !tokenizer.has_text(id) {
            return Ok(String::new());
        }
        self.window.push(id.0);
        // A run of bytes is decoded as a whole: one that is wrong makes all of them replacement characters.
        if tokenizer.byte(id).is_some() {
            return Ok(String::new());
        }
        let text = tokenizer.decode_raw(&self.window)?;
        // The start of a character at the end looks like a wrong one.
        let certain = text.strip_suffix(char::REPLACEMENT_CHARACTER).map_or(text.len(), str::len);
        let piece = text.get(self.given..certain).unwrap_or_default().to_owned();
        self.given = self.given.max(certain);
        if certain == text.len() {
            self.window = vec![id.0];
            self.given = tokenizer.decode_raw(&self.window)?.len();
        }
        Ok(piece)
    }

    /// The text that was waiting for more, at the end of the sequence.
    ///
    /// # Errors
    /// If the tokenizer cannot decode it.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String, TokenizerError> {
        let window = std::mem::take(&mut self.window);
        let text = tokenizer.decode_raw(&window)?;
        Ok(text.get(std::mem::take(&mut self.given)..).unwrap_or_default().to_owned())
    }
}
