//! Stop words in a stream of text.

/// Finds the first stop word in text that arrives piece by piece, and holds back what may be the start of one.
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    words: Vec<String>,
    held: String,
}

impl StopMatcher {
    /// A matcher of `words`; empty ones are ignored.
    #[must_use]
    pub fn new(words: &[String]) -> Self {
        StopMatcher { words: words.iter().filter(|w| !w.is_empty()).cloned().collect(), held: String::new() }
    }

    /// Takes the next piece; gives back the text that is now certain, and whether a stop word followed it. Of several
    /// words the one that starts first counts.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        if let Some(at) = self.words.iter().filter_map(|word| self.held.find(word.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let certain = self.held.len() - self.longest_start();
        let rest = self.held.split_off(certain);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// The text held back, at the end of the stream.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes of the longest end of the held text that is the start of a stop word.
    fn longest_start(&self) -> usize {
        let starts = self.held.char_indices().map(|(at, _)| &self.held[at..]);
        starts.filter(|end| self.words.iter().any(|word| word.starts_with(end))).map(str::len).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|w| (*w).to_owned()).collect()
    }

    #[test]
    fn a_word_across_pieces_is_found_and_cut() {
        let mut matcher = StopMatcher::new(&words(&["\n\nUser:", ""]));
        assert_eq!(matcher.push("Hello\n"), ("Hello".to_owned(), false));
        assert_eq!(matcher.push("\nUs"), (String::new(), false));
        assert_eq!(matcher.push("er: x"), (String::new(), true));
    }

    #[test]
    fn held_text_comes_out_when_it_is_no_stop_word() {
        let mut matcher = StopMatcher::new(&words(&["abc"]));
        assert_eq!(matcher.push("xab"), ("x".to_owned(), false));
        assert_eq!(matcher.push("ab"), ("ab".to_owned(), false));
        assert_eq!(matcher.finish(), "ab");
    }

    proptest! {
        /// However the text is cut into pieces, what comes out is the text before the first stop word.
        #[test]
        fn the_cuts_do_not_matter(text in "[ab]{0,20}", cuts in prop::collection::vec(0usize..4, 20)) {
            let stop = words(&["aab", "bba"]);
            let mut matcher = StopMatcher::new(&stop);
            let (mut rest, mut out, mut hit) = (text.as_str(), String::new(), false);
            for cut in cuts {
                let (piece, tail) = rest.split_at(cut.min(rest.len()));
                rest = tail;
                let (text, stopped) = matcher.push(piece);
                out += &text;
                hit |= stopped;
                if stopped { break; }
            }
            if !hit {
                let (text, stopped) = matcher.push(rest);
                out += &text;
                hit = stopped;
            }
            if !hit { out += &matcher.finish(); }
            let first = stop.iter().filter_map(|w| text.find(w.as_str())).min();
            prop_assert_eq!(hit, first.is_some());
            prop_assert_eq!(out, &text[..first.unwrap_or(text.len())]);
        }
    }
}
