//! Just enough of Rust's lexical rules to tell code from comments, strings and tests.

/// A Rust file with parts of it replaced by spaces. Lines and columns stay where they were.
pub(super) struct Code {
    /// The file without comments.
    pub(super) with_strings: String,
    /// The file without comments and without the contents of strings and character literals.
    pub(super) bare: String,
}

impl Code {
    pub(super) fn of(text: &str) -> Self {
        let text: Vec<char> = text.chars().collect();
        let (mut with_strings, mut bare) = (text.clone(), text.clone());
        let mut at = 0;
        while at < text.len() {
            let (end, kind) = token(&text, at);
            match kind {
                Kind::Code => {}
                Kind::Comment => {
                    blank(&mut with_strings[at..end]);
                    blank(&mut bare[at..end]);
                }
                Kind::Literal => blank(&mut bare[at..end]),
            }
            at = end;
        }
        Self { with_strings: with_strings.into_iter().collect(), bare: bare.into_iter().collect() }
    }

    /// The code with strings, without the items under `#[cfg(test)]`.
    pub(super) fn without_tests(&self) -> String {
        const TEST: &str = "#[cfg(test)]";
        let bare: Vec<char> = self.bare.chars().collect();
        let mut code: Vec<char> = self.with_strings.chars().collect();
        let test: Vec<char> = TEST.chars().collect();
        let mut at = 0;
        while let Some(found) = bare[at..].windows(test.len()).position(|window| window == test) {
            let start = at + found;
            at = item_end(&bare, start + test.len());
            blank(&mut code[start..at]);
        }
        code.into_iter().collect()
    }
}

enum Kind {
    Code,
    Comment,
    Literal,
}

/// The end of the token at `at`, and its kind. A token of code is one word, or one other character.
fn token(text: &[char], at: usize) -> (usize, Kind) {
    let rest = &text[at..];
    let starts = |with: &str| with.chars().enumerate().all(|(i, c)| rest.get(i) == Some(&c));
    if starts("//") {
        let end = rest.iter().position(|&c| c == '\n').unwrap_or(rest.len());
        return (at + end, Kind::Comment);
    }
    if starts("/*") {
        return (at + block_comment(rest), Kind::Comment);
    }
    if rest[0] == '"' {
        return (at + quoted(rest, '"'), Kind::Literal);
    }
    if rest[0] == '\'' {
        // A lifetime or label has no closing quote after one character.
        let is_char = rest.get(1) == Some(&'\\') || rest.get(2) == Some(&'\'');
        return if is_char { (at + quoted(rest, '\''), Kind::Literal) } else { (at + 1, Kind::Code) };
    }
    let word = rest.iter().take_while(|c| is_word(**c)).count();
    if word == 0 {
        return (at + 1, Kind::Code);
    }
    if matches!(rest[..word], ['r'] | ['b' | 'c', 'r'])
        && let Some(length) = raw_string(&rest[word..])
    {
        return (at + word + length, Kind::Literal);
    }
    (at + word, Kind::Code)
}

/// The length of the block comment that `text` starts with. Block comments nest.
fn block_comment(text: &[char]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        match text[at..] {
            ['/', '*', ..] => (depth, at) = (depth + 1, at + 2),
            ['*', '/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

/// The length of the literal that `text` starts with, both quotes included.
fn quoted(text: &[char], quote: char) -> usize {
    let mut at = 1;
    while at < text.len() && text[at] != quote {
        at += if text[at] == '\\' { 2 } else { 1 };
    }
    text.len().min(at + 1)
}

/// The length of `#…#"…"#…#`, if `text` starts with one.
fn raw_string(text: &[char]) -> Option<usize> {
    let hashes = text.iter().take_while(|&&c| c == '#').count();
    if text.get(hashes) != Some(&'"') {
        return None;
    }
    let closes = |at: &usize| text[*at] == '"' && text[at + 1..].iter().take_while(|&&c| c == '#').count() >= hashes;
    Some((hashes + 1..text.len()).find(closes).map_or(text.len(), |at| at + 1 + hashes))
}

/// The end of the item after `at`: its closing brace, or its semicolon if it has no body.
fn item_end(bare: &[char], at: usize) -> usize {
    let mut depth = 0_usize;
    for (i, c) in bare.iter().enumerate().skip(at) {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 && matches!(c, ';' | '}') {
            return i + 1;
        }
    }
    bare.len()
}

fn blank(text: &mut [char]) {
    text.iter_mut().filter(|c| **c != '\n').for_each(|c| *c = ' ');
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether `word` stands in `line` as a word of its own.
pub(super) fn has_word(line: &str, word: &str) -> bool {
    line.split(|c| !is_word(c)).any(|w| w == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The words that remain of `text` in the code with strings, and in the bare code.
    fn words(text: &str) -> (Vec<String>, Vec<String>) {
        let code = Code::of(text);
        assert_eq!(code.bare.chars().count(), text.chars().count(), "nothing moves");
        let words = |code: &str| code.split(|c| !is_word(c)).filter(|w| !w.is_empty()).map(str::to_owned).collect();
        (words(&code.with_strings), words(&code.bare))
    }

    #[test]
    fn comments_and_strings_are_told_from_code() {
        for (text, with_strings, bare) in [
            ("a // b\nc", "a c", "a c"),
            ("a /* b /* c */ d */ e", "a e", "a e"),
            ("//! a\n/// b\nc", "c", "c"),
            (r#"a "b // c" d"#, "a b c d", "a d"),
            (r#"a "b \" c" d"#, "a b c d", "a d"),
            (r##"a r#"b " c"# d"##, "a r b c d", "a d"),
            (r#"a br"b\" c"#, "a br b c", "a c"),
            (r#"for_r "b""#, "for_r b", "for_r"),
            ("r#fn a", "r fn a", "r fn a"),
            (r"a '\'' b '/' '/' c", "a b c", "a b c"),
            ("&'a str // b", "a str", "a str"),
            ("'\"' a \"b\" c", "a b c", "a c"),
            ("a \"b", "a b", "a"),
            ("a /* b", "a", "a"),
        ] {
            let split = |words: &str| words.split(' ').map(str::to_owned).collect::<Vec<_>>();
            assert_eq!(words(text), (split(with_strings), split(bare)), "{text}");
        }
    }

    #[test]
    fn tests_are_left_out() {
        let text = "const A: &str = \"x\";\n#[cfg(test)]\nmod tests {\n    fn f() { \"}\" }\n}\nfn kept() {}\n\
                    #[cfg(test)]\nmod more;\nfn kept_too() {}\n";
        let left: String = Code::of(text).without_tests().split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(left, "const A: &str = \"x\"; fn kept() {} fn kept_too() {}");
    }

    #[test]
    fn words_stand_alone() {
        assert!(has_word("pub unsafe fn", "unsafe"));
        assert!(!has_word("#![forbid(unsafe_code)]", "unsafe"));
    }
}
