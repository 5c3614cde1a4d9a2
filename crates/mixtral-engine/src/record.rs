//! One line of a text that an engine holds: `kind key=value …`. A value is a bare word or compact JSON.
//!
//! A field's own `Serialize` writes it and its `Deserialize` reads it, so a new field needs no change here.

use std::fmt::Write as _;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Appends a line.
pub fn write<T: Serialize>(text: &mut String, kind: &str, value: &T) {
    text.push_str(kind);
    if let Ok(Value::Object(fields)) = serde_json::to_value(value) {
        write_fields(text, &fields);
    }
    text.push('\n');
}

/// Appends ` key=value` for each field.
pub fn write_fields(text: &mut String, fields: &Map<String, Value>) {
    for (key, value) in fields {
        let written = match value {
            Value::String(word) if is_bare(word) => word.clone(),
            other => other.to_string(),
        };
        // Writing to a String cannot fail.
        let _ = write!(text, " {key}={written}");
    }
}

/// Reads the fields of a line. `rest` is the line without its kind.
///
/// # Errors
/// What is wrong with the line, as a sentence.
pub fn read<T: DeserializeOwned>(rest: &str) -> Result<T, String> {
    serde_json::from_value(Value::Object(read_fields(rest)?)).map_err(|e| e.to_string())
}

/// As [`read`], into a map.
///
/// # Errors
/// What is wrong with the line, as a sentence.
pub fn read_fields(rest: &str) -> Result<Map<String, Value>, String> {
    let mut map = Map::new();
    let mut rest = rest.trim_ascii_start();
    while !rest.is_empty() {
        let (key, written) = rest
            .split_once('=')
            .filter(|(key, _)| !key.contains(|c: char| c.is_ascii_whitespace()))
            .ok_or_else(|| format!("`{}` is not key=value", shorten(word(rest))))?;
        let bare = word(written);
        let value = if is_bare(bare) {
            rest = &written[bare.len()..];
            Value::String(bare.to_owned())
        } else {
            // A text in quotes may contain blanks, so the JSON parser has to find where the value ends.
            let mut values = serde_json::Deserializer::from_str(written).into_iter::<Value>();
            let problem = |e: String| format!("`{}`: {e}", shorten(word(rest)));
            let value = values.next().ok_or_else(|| problem("a value is missing".to_owned()))?;
            let value = value.map_err(|e| problem(e.to_string()))?;
            let end = values.byte_offset();
            if !written[end..].is_empty() && !written[end..].starts_with(|c: char| c.is_ascii_whitespace()) {
                return Err(problem("trailing characters".to_owned()));
            }
            rest = &written[end..];
            value
        };
        if map.insert(key.to_owned(), value).is_some() {
            return Err(format!("`{key}` is given twice"));
        }
        rest = rest.trim_ascii_start();
    }
    Ok(map)
}

/// At most the first 60 characters, for messages.
#[must_use]
pub fn shorten(text: &str) -> String {
    text.chars().take(60).collect()
}

/// The part of a text before the first blank.
fn word(text: &str) -> &str {
    text.split_ascii_whitespace().next().filter(|word| text.starts_with(word)).unwrap_or("")
}

/// Whether a string without quotes reads back as the same string.
fn is_bare(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && word.chars().all(|c| c.is_ascii_alphanumeric() || "_.-/:".contains(c))
        && !matches!(word, "true" | "false" | "null")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_read_back_and_texts_may_hold_blanks() {
        let Value::Object(fields) = json!({"a": "word", "b": "two words, a \"quote\"", "c": [1, 2], "d": {"e": null}})
        else {
            unreachable!()
        };
        let mut text = String::new();
        write_fields(&mut text, &fields);
        assert_eq!(text, r#" a=word b="two words, a \"quote\"" c=[1,2] d={"e":null}"#);
        assert_eq!(read_fields(&text), Ok(fields));
    }

    #[test]
    fn a_line_is_its_kind_and_the_fields_of_a_value() {
        #[derive(Serialize)]
        struct Fields {
            name: &'static str,
            size: usize,
        }
        let mut text = "before\n".to_owned();
        write(&mut text, "kind", &Fields { name: "x", size: 3 });
        assert_eq!(text, "before\nkind name=x size=3\n");
        // What would read back as something else is put into quotes.
        let words = ["true", "null", "1x", "-", "a b", "", "é"];
        for word in words {
            let mut text = String::new();
            write_fields(&mut text, &Map::from_iter([("a".to_owned(), json!(word))]));
            assert_eq!(text, format!(" a={}", json!(word)));
            assert_eq!(read_fields(&text).unwrap()["a"], word);
        }
    }

    #[test]
    fn what_is_no_field_is_said() {
        let problems: Vec<String> = ["word", "a=1 b", "a=", "a= b=1", "a=1x", "a=1 a=2", "a=[1", "two words=1"]
            .iter()
            .map(|text| read_fields(text).unwrap_err())
            .collect();
        insta::assert_snapshot!(problems.join("\n"));
    }
}
