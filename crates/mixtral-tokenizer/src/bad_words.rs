//! Texts that may not be generated, in whatever tokens they are written.

use std::collections::HashMap;

use mixtral_model::TokenId;

use crate::tokenizer::Tokenizer;

/// Words that a sequence may not contain. A word is banned as a series of tokens whose bytes are exactly the word, with
/// or without a space before it. A longer word is not affected if its tokens do not begin and end with the banned word
/// (`catalogue`, if `cat` is banned).
#[derive(Clone, Debug, Default)]
pub struct BadWords {
    /// Each word, without and with a space before it.
    words: Vec<Vec<u8>>,
    /// The bytes of all tokens that are part of a word.
    bytes: HashMap<TokenId, Vec<u8>>,
    /// The tokens that can end a word, by their bytes.
    ends: HashMap<Vec<u8>, Vec<TokenId>>,
}

impl BadWords {
    /// Finds the tokens that `words` can be written with. Empty words are ignored.
    #[must_use]
    pub fn new(words: &[String], tokenizer: &Tokenizer) -> Self {
        let mut texts: Vec<Vec<u8>> = Vec::new();
        for word in words.iter().filter(|word| !word.is_empty()) {
            // A word of only spaces stays as it is.
            let bare = word.strip_prefix(' ').filter(|rest| !rest.trim().is_empty()).unwrap_or(word);
            texts.extend([bare.as_bytes().to_vec(), format!(" {bare}").into_bytes()]);
        }
        let mut found = BadWords { words: texts, ..BadWords::default() };
        if found.words.is_empty() {
            return found;
        }
        for id in tokenizer.ids() {
            let Some(bytes) = tokenizer.token_bytes(id).filter(|bytes| !bytes.is_empty()) else { continue };
            let contains = |word: &Vec<u8>| word.windows(bytes.len()).any(|part| part == bytes);
            if !found.words.iter().any(contains) {
                continue;
            }
            if found.words.iter().any(|word| word.ends_with(&bytes)) {
                found.ends.entry(bytes.clone()).or_default().push(id);
            }
            found.bytes.insert(id, bytes);
        }
        found
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// The tokens that would complete a word after `tokens`.
    #[must_use]
    pub fn banned(&self, tokens: &[TokenId]) -> Vec<TokenId> {
        let longest = self.words.iter().map(Vec::len).max().unwrap_or(0);
        let mut banned = Vec::new();
        let mut tail: Vec<u8> = Vec::new();
        let mut earlier = tokens.iter().rev();
        while tail.len() < longest {
            for rest in self.words.iter().filter_map(|word| word.strip_prefix(&tail[..])) {
                banned.extend(self.ends.get(rest).into_iter().flatten());
            }
            let Some(bytes) = earlier.next().and_then(|id| self.bytes.get(id)) else { break };
            tail.splice(..0, bytes.iter().copied());
        }
        banned.sort_unstable();
        banned.dedup();
        banned
    }
}
