//! Calls of tools in what the model writes: in Mistral's syntax and in that of ChatML's models.
//!
//! Mistral's models write the special token `[TOOL_CALLS]` and a JSON list of calls; newer ones write that token, the
//! function's name, `[ARGS]` and the arguments, for each call. ChatML's models write each call as a JSON object between
//! `<tool_call>` and `</tool_call>`.

use mixtral_model::TokenId;
use mixtral_runtime::Tokenizer;
use serde::Deserialize;
use serde_json::Value;

use crate::messages::{FunctionCall, FunctionWord, ToolCall};
use crate::shared::random;
use crate::tool_choice::ToolChoice;

const MISTRAL: &str = "[TOOL_CALLS]";
const ARGUMENTS: &str = "[ARGS]";
const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// Letters and digits of a call's name, of which Mistral's templates want nine.
const LETTERS: &[u8; 62] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
const NAME_LENGTH: usize = 9;

/// Separates calls from the text before them, while an answer grows.
#[derive(Clone, Debug, Default)]
pub(crate) struct ToolCalls {
    /// The special tokens that begin or divide calls. Decoding leaves them out of the text.
    special: Vec<(TokenId, &'static str)>,
    /// Text that may belong to a call.
    held: String,
    /// Whether a call has begun.
    begun: bool,
    /// The function that is called, if the answer has its arguments alone.
    named: Option<String>,
}

impl ToolCalls {
    /// Looks for calls in what a model with this tokenizer writes. If it must call, it writes the calls alone.
    pub(crate) fn new(tokenizer: &Tokenizer, choice: &ToolChoice) -> Self {
        let words = [MISTRAL, ARGUMENTS, OPEN, CLOSE];
        let special = words.into_iter().filter_map(|word| Some((tokenizer.special_id(word)?, word))).collect();
        let calls = ToolCalls { special, ..ToolCalls::default() };
        match choice {
            ToolChoice::Auto | ToolChoice::None => calls,
            ToolChoice::Required => ToolCalls { begun: true, ..calls },
            ToolChoice::Function(name) => ToolCalls { begun: true, named: Some(name.clone()), ..calls },
        }
    }

    /// Takes a token and the text that came with it. Returns the text that belongs to no call.
    pub(crate) fn push(&mut self, token: Option<TokenId>, text: &str) -> String {
        let word = self.special.iter().find(|(id, _)| Some(*id) == token).map_or("", |(_, word)| word);
        // Text that waited for more tokens stands before the special token.
        self.held += text;
        self.held += word;
        if self.begun {
            return String::new();
        }
        if let Some(at) = [MISTRAL, OPEN].iter().filter_map(|word| self.held.find(word)).min() {
            self.begun = true;
            let call = self.held.split_off(at);
            return std::mem::replace(&mut self.held, call);
        }
        let may_begin = |end: &str| [MISTRAL, OPEN].iter().any(|word| word.starts_with(end));
        let starts = self.held.char_indices().map(|(at, _)| at);
        let certain = starts.filter(|&at| may_begin(&self.held[at..])).min().unwrap_or(self.held.len());
        let rest = self.held.split_off(certain);
        std::mem::replace(&mut self.held, rest)
    }

    /// At the end of the answer: the calls, and the text that turned out to be none.
    pub(crate) fn finish(&mut self) -> (String, Vec<ToolCall>) {
        let held = std::mem::take(&mut self.held);
        if let Some(name) = self.named.take() {
            return (String::new(), vec![call(name, held)]);
        }
        match self.begun.then(|| parse(&held)).flatten() {
            Some(calls) if !calls.is_empty() => (String::new(), calls),
            _ => (held, Vec::new()),
        }
    }
}

/// A call as models write it.
#[derive(Deserialize)]
struct Written {
    name: String,
    #[serde(alias = "parameters")]
    arguments: Value,
}

impl Written {
    fn call(self) -> ToolCall {
        // Some models write the arguments as the text of an object.
        let arguments = match self.arguments {
            Value::String(text) => text,
            other => other.to_string(),
        };
        call(self.name, arguments)
    }
}

fn call(name: String, arguments: String) -> ToolCall {
    ToolCall { index: None, id: call_id(), kind: FunctionWord::Function, function: FunctionCall { name, arguments } }
}

fn call_id() -> String {
    let mut bits = random();
    let letter = |_| {
        let letter = usize::try_from(bits % LETTERS.len() as u64).unwrap_or(0);
        bits /= LETTERS.len() as u64;
        char::from(LETTERS[letter])
    };
    (0..NAME_LENGTH).map(letter).collect()
}

/// The calls of a text that consists of them; `None` if the text is something else.
fn parse(text: &str) -> Option<Vec<ToolCall>> {
    if text.starts_with(OPEN) {
        let mut calls = Vec::new();
        for part in text.split(OPEN).skip(1) {
            let json = part.split_once(CLOSE).map_or(part, |(json, _)| json);
            calls.push(serde_json::from_str::<Written>(json.trim()).ok()?.call());
        }
        return Some(calls);
    }
    let mut calls = Vec::new();
    // A model that must call writes the list alone.
    for part in text.strip_prefix(MISTRAL).unwrap_or(text).split(MISTRAL).map(str::trim) {
        if let Some((name, arguments)) = part.split_once(ARGUMENTS) {
            let arguments: Value = serde_json::from_str(arguments.trim()).ok()?;
            calls.push(call(name.trim().to_owned(), arguments.to_string()));
        } else {
            let list = serde_json::from_str::<Vec<Written>>(part).ok()?;
            calls.extend(list.into_iter().map(Written::call));
        }
    }
    Some(calls)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes out if the text arrives in pieces of `size` bytes.
    fn read(text: &str, size: usize) -> (String, Vec<(String, String)>) {
        let mut calls = ToolCalls::default();
        let mut out = String::new();
        let bytes: Vec<char> = text.chars().collect();
        for piece in bytes.chunks(size) {
            out += &calls.push(None, &piece.iter().collect::<String>());
        }
        let (rest, calls) = calls.finish();
        assert!(calls.iter().all(|call| call.id.len() == NAME_LENGTH));
        (out + &rest, calls.into_iter().map(|call| (call.function.name, call.function.arguments)).collect())
    }

    #[test]
    fn calls_are_found_however_they_arrive() {
        let f = || ("f".to_owned(), r#"{"x":1}"#.to_owned());
        let g = || ("g".to_owned(), "{}".to_owned());
        let texts = [
            (
                r#"Well. [TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]"#,
                "Well. ",
                vec![f(), g()],
            ),
            (r#"[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]{}"#, "", vec![f(), g()]),
            (
                "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>\n<tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>",
                "",
                vec![f(), g()],
            ),
            (r#"<tool_call>{"name": "f", "arguments": "{\"x\":1}"}"#, "", vec![f()]),
            ("a < b [TOOL", "a < b [TOOL", vec![]),
            ("no <tool_call> at all", "no <tool_call> at all", vec![]),
            (r#"[TOOL_CALLS] [{"name": "f"}]"#, r#"[TOOL_CALLS] [{"name": "f"}]"#, vec![]),
        ];
        for (text, content, calls) in texts {
            for size in [1, 2, 3, 7, 1000] {
                assert_eq!(read(text, size), (content.to_owned(), calls.clone()), "{text} in {size}");
            }
        }
    }

    #[test]
    fn calls_that_the_model_must_write_are_a_list() {
        let read = |text: &str| {
            let mut calls = ToolCalls { begun: true, ..ToolCalls::default() };
            assert_eq!(calls.push(None, text), "");
            let (rest, calls) = calls.finish();
            (rest, calls.into_iter().map(|call| call.function.name).collect::<Vec<_>>())
        };
        let f = r#"{"name": "f", "arguments": {}}"#;
        assert_eq!(read(&format!("[{f}, {f}]")), (String::new(), vec!["f".to_owned(), "f".to_owned()]));
        // One that is not complete is what the model wrote, and nothing else.
        assert_eq!(read(&format!("[{f}, ")), (format!("[{f}, "), vec![]));
    }

    #[test]
    fn a_special_token_begins_a_call() {
        let mut calls = ToolCalls { special: vec![(TokenId(9), MISTRAL)], ..ToolCalls::default() };
        assert_eq!(calls.push(Some(TokenId(5)), "I see"), "I see");
        assert_eq!(calls.push(Some(TokenId(9)), "."), ".");
        assert_eq!(calls.push(Some(TokenId(6)), r#"[{"name": "f", "arguments": {}}]"#), "");
        let (rest, calls) = calls.finish();
        assert_eq!((rest.as_str(), calls.len(), &*calls[0].function.name), ("", 1, "f"));
    }
}
