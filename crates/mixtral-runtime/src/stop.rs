//! Stop words in a stream of text.

use std::ops::Range;

/// Finds the first stop word in text that arrives piece by piece. It holds back text that may be the start of a stop
/// word.
///
/// Special tokens can be part of a stop word, so they are in the text that is searched, but not in the text that is
/// released. Decoding drops a space at the beginning of a text, so a word that begins with a space is also found at the
/// beginning without the space.
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    words: Vec<Word>,
    held: String,
    /// The parts of `held` that are not released, as ranges of bytes.
    hidden: Vec<Range<usize>>,
}

/// Marks the start of the text that is searched. It is a noncharacter of Unicode, reserved for internal use.
const START: &str = "\u{FDD0}";

/// A text to look for, and how many bytes of it stay in the output.
#[derive(Clone, Debug)]
struct Word {
    text: String,
    kept: usize,
}

impl StopMatcher {
    /// A matcher of `words`. Empty words are ignored. A word that starts with a space is also found at the start of a
    /// line.
    #[must_use]
    pub fn new(words: &[String]) -> Self {
        let mut matcher = StopMatcher::default();
        for word in words.iter().filter(|word| !word.is_empty()) {
            matcher.words.push(Word { text: word.clone(), kept: 0 });
            if let Some(rest) = word.strip_prefix(' ').filter(|rest| !rest.trim().is_empty()) {
                for before in ["\n", START] {
                    matcher.words.push(Word { text: format!("{before}{rest}"), kept: before.len() });
                }
            }
        }
        matcher.push_hidden(START);
        matcher
    }

    /// Takes the next piece. Returns the text that is now certain, and whether a stop word follows it. If several words
    /// match, the one that starts first counts.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        let found = self.words.iter().filter_map(|word| Some(self.held.find(&word.text)? + word.kept)).min();
        match found {
            Some(at) => (self.release(at), true),
            None => (self.release(self.held.len() - self.longest_start()), false),
        }
    }

    /// As [`StopMatcher::push`], for the content of a special token, which is not released.
    pub fn push_hidden(&mut self, token: &str) -> (String, bool) {
        self.hidden.push(self.held.len()..self.held.len() + token.len());
        self.push(token)
    }

    /// Whether a special token may be part of a stop word.
    #[must_use]
    pub fn concerns(&self, special: &str) -> bool {
        self.words.iter().any(|word| word.text.contains(special))
    }

    /// Returns the text that was held back, at the end of the stream.
    pub fn finish(&mut self) -> String {
        self.release(self.held.len())
    }

    /// Removes the first bytes from the held text, and returns those of them that are not hidden.
    fn release(&mut self, bytes: usize) -> String {
        let rest = self.held.split_off(bytes);
        let released = std::mem::replace(&mut self.held, rest);
        let mut text = String::new();
        let mut from = 0;
        for part in &self.hidden {
            text += released.get(from..part.start).unwrap_or_default();
            from = from.max(part.end);
        }
        text += released.get(from..).unwrap_or_default();
        self.hidden.retain(|part| part.end > bytes);
        for part in &mut self.hidden {
            *part = part.start.saturating_sub(bytes)..part.end - bytes;
        }
        text
    }

    /// Length in bytes of the longest suffix of the held text that is a prefix of a stop word.
    fn longest_start(&self) -> usize {
        let starts = self.held.char_indices().map(|(at, _)| &self.held[at..]);
        starts.filter(|end| self.words.iter().any(|word| word.text.starts_with(end))).map(str::len).max().unwrap_or(0)
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

    #[test]
    fn a_special_token_is_searched_and_does_not_come_out() {
        let mut matcher = StopMatcher::new(&words(&["<end>\nUser", "fin"]));
        assert!(matcher.concerns("<end>") && !matcher.concerns("<pad>"));
        assert_eq!(matcher.push("yes"), ("yes".to_owned(), false));
        assert_eq!(matcher.push_hidden("<end>"), (String::new(), false));
        assert_eq!(matcher.push("\nNo f"), ("\nNo ".to_owned(), false));
        assert_eq!(matcher.push_hidden("<end>"), ("f".to_owned(), false));
        assert_eq!(matcher.push("\nUsers"), (String::new(), true));
    }

    #[test]
    fn a_special_token_hides_itself_alone_when_text_before_it_comes_out() {
        let mut matcher = StopMatcher::new(&words(&["ab~", "<end>fin"]));
        assert_eq!(matcher.push("ab"), (String::new(), false));
        assert_eq!(matcher.push_hidden("<end>"), ("ab".to_owned(), false));
        assert_eq!(matcher.push("done"), ("done".to_owned(), false));
    }

    #[test]
    fn a_word_after_a_space_is_also_found_at_the_start_of_a_line() {
        let stop = words(&[" dog", "\n\n"]);
        assert_eq!(StopMatcher::new(&stop).push("dog"), (String::new(), true));
        assert_eq!(StopMatcher::new(&stop).push("a\ndog"), ("a\n".to_owned(), true));
        assert_eq!(StopMatcher::new(&stop).push("hot dog"), ("hot".to_owned(), true));
        assert_eq!(StopMatcher::new(&stop).push("hotdog\nx"), ("hotdog\nx".to_owned(), false));
        assert_eq!(StopMatcher::new(&stop).push("\nx"), ("\nx".to_owned(), false));
        assert_eq!(StopMatcher::new(&words(&[" "])).push("a b"), ("a".to_owned(), true));
    }

    proptest! {
        /// However the text is cut into pieces, the output is the text before the first stop word.
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
