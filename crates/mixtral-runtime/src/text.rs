//! A sequence's output as text: decoded as it grows, and ended by stop words.

use mixtral_model::TokenId;
use mixtral_tokenizer::{TextStream, Tokenizer, TokenizerError};

use crate::session::Event;
use crate::stop::StopMatcher;

/// The text of one sequence so far. Where the tokenizer fails the text ends; the sequence does not.
#[derive(Clone, Debug)]
pub struct SequenceText {
    stream: TextStream,
    stop: StopMatcher,
    failed: bool,
}

impl SequenceText {
    /// No text yet, to be ended by the first of `stop_words`.
    #[must_use]
    pub fn new(stop_words: &[String]) -> Self {
        SequenceText { stream: TextStream::default(), stop: StopMatcher::new(stop_words), failed: false }
    }

    /// Adds a token, and to the event the text that is certain then. Whether a stop word came up.
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, token: TokenId, event: &mut Event) -> bool {
        self.guard(event, |text, event| {
            let Some(special) = tokenizer.special(token).filter(|special| text.stop.concerns(special)) else {
                let piece = text.stream.push(tokenizer, token)?;
                return Ok(text.search(event, |stop| stop.push(&piece)));
            };
            // What waits for more stands before the special token.
            let rest = text.stream.finish(tokenizer)?;
            Ok(text.search(event, |stop| stop.push(&rest)) || text.search(event, |stop| stop.push_hidden(&special)))
        })
    }

    /// Adds to the event the text that waited for more. Whether a stop word came up in it.
    pub(crate) fn finish(&mut self, tokenizer: &Tokenizer, event: &mut Event) -> bool {
        self.guard(event, |text, event| {
            let rest = text.stream.finish(tokenizer)?;
            if text.search(event, |stop| stop.push(&rest)) {
                return Ok(true);
            }
            event.text += &text.stop.finish();
            Ok(false)
        })
    }

    fn search(&mut self, event: &mut Event, push: impl FnOnce(&mut StopMatcher) -> (String, bool)) -> bool {
        let (certain, stopped) = push(&mut self.stop);
        event.text += &certain;
        stopped
    }

    fn guard(
        &mut self,
        event: &mut Event,
        work: impl FnOnce(&mut Self, &mut Event) -> Result<bool, TokenizerError>,
    ) -> bool {
        if self.failed {
            return false;
        }
        work(self, event).unwrap_or_else(|error| {
            self.failed = true;
            event.text += &self.stop.finish();
            event.text_failed = Some(error);
            false
        })
    }
}
