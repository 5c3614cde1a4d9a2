//! A sequence's output as text. It is decoded as it grows, and stop words end it.

use mixtral_model::TokenId;
use mixtral_tokenizer::{TextStream, Tokenizer, TokenizerError};

use crate::session::Event;
use crate::stop::StopMatcher;

/// The text of one sequence so far. If the tokenizer fails, the text ends but the sequence does not.
#[derive(Clone, Debug)]
pub struct SequenceText {
    stream: TextStream,
    stop: StopMatcher,
    failed: bool,
}

impl SequenceText {
    /// An empty text, which the first of `stop_words` will end.
    #[must_use]
    pub fn new(stop_words: &[String]) -> Self {
        SequenceText { stream: TextStream::default(), stop: StopMatcher::new(stop_words), failed: false }
    }

    /// Adds a token, and adds the text that is now certain to the event. Returns whether a stop word was found.
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, token: TokenId, event: &mut Event) -> bool {
        self.guard(event, |text, event| {
            let Some(special) = tokenizer.special(token).filter(|special| text.stop.concerns(special)) else {
                let piece = text.stream.push(tokenizer, token)?;
                return Ok(text.search(event, |stop| stop.push(&piece)));
            };
            // Text that still waits for more tokens stands before the special token.
            let rest = text.stream.finish(tokenizer)?;
            Ok(text.search(event, |stop| stop.push(&rest)) || text.search(event, |stop| stop.push_hidden(&special)))
        })
    }

    /// Adds the text that waited for more tokens to the event. Returns whether a stop word was found in it.
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
