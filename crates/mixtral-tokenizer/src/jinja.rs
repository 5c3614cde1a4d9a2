//! The Jinja that chat templates are written in: Python's, with the functions that transformers adds.
//!
//! One difference is left. If a template prints a number with an exponent without `tojson`, Python writes `1e-07`, and
//! minijinja `1e-7`.

use std::fmt::Write as _;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value as Jinja};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::Value;

/// What a template may compute, in minijinja's units (an instruction, or 64 bytes of a text). A conversation takes some
/// thousands. A template that never ends is ended after a second at most.
const FUEL: u64 = 1 << 22;

/// The source of an error that a template raised itself, with its message.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refused(pub(crate) String);

/// An environment without templates.
pub(crate) fn environment() -> Environment<'static> {
    let mut jinja = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    jinja.set_syntax(syntax.expect("these two settings do not contradict each other"));
    jinja.set_auto_escape_callback(|_| AutoEscape::None);
    jinja.set_unknown_method_callback(unknown_method_callback);
    jinja.set_fuel(Some(FUEL));
    jinja.add_filter("tojson", to_json);
    // In Python, texts and dictionaries are sequences too, and None cannot be iterated.
    jinja.add_test("sequence", |value: &Jinja| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Undefined)
    });
    jinja.add_test("iterable", |value: &Jinja| !value.is_none() && value.try_iter().is_ok());
    jinja.add_function("raise_exception", |message: &Jinja| -> Result<Jinja, Error> {
        let message = message.to_string();
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Refused(message)))
    });
    jinja.add_function("strftime_now", |format: &str| {
        let now = jiff::fmt::strtime::format(format, &jiff::ZonedDateTime::now());
        now.map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))
    });
    jinja
}

/// Replaces the tags around what a model generated. They only mark it, for training; Jinja itself does not know them.
pub(crate) fn without_generation_tags(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag)) = rest.split_once("{%") {
        let Some((inner, after)) = tag.split_once("%}") else { break };
        let inner = match inner.trim_matches(|c: char| c.is_whitespace() || matches!(c, '-' | '+')) {
            "generation" => inner.replace("generation", "with"),
            "endgeneration" => inner.replace("endgeneration", "endwith"),
            _ => inner.to_owned(),
        };
        text = text + before + "{%" + &inner + "%}";
        rest = after;
    }
    text + rest
}

/// The filter `tojson`: Python's `json.dumps`.
fn to_json(value: &Jinja, kwargs: Kwargs) -> Result<String, Error> {
    let wrong = |detail: String| Error::new(ErrorKind::InvalidOperation, detail);
    if value.is_undefined() {
        return Err(wrong("an undefined value has no JSON".to_owned()));
    }
    let indent = match kwargs.get::<Option<Jinja>>("indent")? {
        Some(indent) if indent.is_number() => Some(" ".repeat(indent.as_usize().unwrap_or(0))),
        Some(indent) => indent.as_str().map(str::to_owned),
        None => None,
    };
    let separators = match kwargs.get::<Option<Vec<String>>>("separators")?.map(<[String; 2]>::try_from) {
        Some(Ok([after_item, after_key])) => (after_item, after_key),
        Some(Err(_)) => return Err(wrong("separators are two texts".to_owned())),
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let mut value = serde_json::to_value(value).map_err(|e| wrong(e.to_string()))?;
    if sort_keys {
        value.sort_all_objects();
    }
    let mut text = String::new();
    Dumps { indent, separators, ascii }.write(&value, 0, &mut text);
    Ok(text)
}

/// How `json.dumps` writes.
struct Dumps {
    /// What a line is indented with at each level; `None` writes everything in one line.
    indent: Option<String>,
    /// What follows an item, and what follows a key.
    separators: (String, String),
    /// Whether characters outside ASCII are escaped.
    ascii: bool,
}

impl Dumps {
    fn write(&self, value: &Value, depth: usize, out: &mut String) {
        match value {
            Value::Array(items) if !items.is_empty() => {
                out.push('[');
                for (at, item) in items.iter().enumerate() {
                    self.next_item(at, depth, out);
                    self.write(item, depth + 1, out);
                }
                self.new_line(depth, out);
                out.push(']');
            }
            Value::Object(items) if !items.is_empty() => {
                out.push('{');
                for (at, (key, item)) in items.iter().enumerate() {
                    self.next_item(at, depth, out);
                    self.string(key, out);
                    *out += &self.separators.1;
                    self.write(item, depth + 1, out);
                }
                self.new_line(depth, out);
                out.push('}');
            }
            Value::String(text) => self.string(text, out),
            Value::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
                Some(float) => *out += &python_float(float),
                None => *out += &number.to_string(),
            },
            other => *out += &other.to_string(),
        }
    }

    fn next_item(&self, at: usize, depth: usize, out: &mut String) {
        if at > 0 {
            *out += &self.separators.0;
        }
        self.new_line(depth + 1, out);
    }

    fn new_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            *out += &indent.repeat(depth);
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        for character in Value::from(text).to_string().chars() {
            if character.is_ascii() || !self.ascii {
                out.push(character);
                continue;
            }
            for unit in character.encode_utf16(&mut [0; 2]) {
                // Writing to a string does not fail.
                let _ = write!(out, "\\u{unit:04x}");
            }
        }
    }
}

/// Python's text of a number. It has a sign and at least two digits in an exponent.
fn python_float(number: f64) -> String {
    let text = format!("{number:?}");
    match text.split_once('e') {
        None => text,
        Some((digits, exponent)) => {
            let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |rest| ('-', rest));
            format!("{digits}e{sign}{exponent:0>2}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        let numbers = [0.1, 1.0, -2.5, 1e15, 1e16, 1.5e-7, 1e-4, 1e100, -0.0];
        let texts = ["0.1", "1.0", "-2.5", "1000000000000000.0", "1e+16", "1.5e-07", "0.0001", "1e+100", "-0.0"];
        assert_eq!(numbers.map(python_float), texts);
    }

    #[test]
    fn the_time_is_now_and_formats_are_pythons() {
        let render = |source: &str| environment().render_str(source, ());
        let today = jiff::ZonedDateTime::now().date();
        let shown = render("{{ strftime_now('%Y-%m-%d') }}").unwrap();
        assert!(shown == today.to_string() || shown == today.tomorrow().unwrap().to_string(), "{shown}");
        assert!(render("{{ strftime_now('%') }}").is_err());
    }

    #[test]
    fn a_template_that_does_not_end_is_ended() {
        let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        assert!(environment().render_str(endless, ()).is_err());
    }
}
