//! Converts text to token ids and back, by the tokenizer files of a model.
//!
//! Reading order: [`load`] (which files of a directory are the tokenizer), [`sentencepiece`] and [`tekken`] (Mistral's own
//! forms), [`settings`] (what the files beside it add: tokens, their roles, the ends of a sequence), [`tokenizer`] (encode
//! and decode), [`stream`] (text as it grows), [`bad_words`] (texts that may not come up), [`chat`] (conversations as text).
#![forbid(unsafe_code)]

pub mod bad_words;
pub mod chat;
pub mod error;
pub mod load;
pub mod sentencepiece;
pub mod settings;
pub mod stream;
pub mod tekken;
pub mod tokenizer;

mod guard;
mod jinja;

pub use bad_words::BadWords;
pub use chat::{ChatError, ChatTemplate, Conversation};
pub use error::TokenizerError;
pub use settings::model_end_ids;
pub use stream::TextStream;
pub use tokenizer::Tokenizer;
