//! Reads keys of a configuration file. Every error names the file, the key, what was expected and what was found.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mixtral_model::DType;
use serde_json::{Map, Value};

/// A file larger than this is no configuration file.
const MAX_BYTES: u64 = 16 << 20;

/// A configuration file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that is far larger than any configuration.
    #[error("{path} is {len} bytes; a configuration has at most {MAX_BYTES}. Is it another file?")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
    /// A pointer that Git LFS leaves in place of a file.
    #[error("{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its directory")]
    LfsPointer {
        /// The file.
        path: PathBuf,
    },
    /// A file that is not JSON, or not a JSON object.
    #[error("{path} is not a JSON object: {detail}. Restore it from where it came")]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        detail: String,
    },
    /// A key that must be there is missing.
    #[error("{path}: the key `{key}` is missing; it must be {expected}")]
    Missing {
        /// The file.
        path: PathBuf,
        /// The key, dotted.
        key: String,
        /// What belongs there.
        expected: &'static str,
    },
    /// A key with a value of the wrong kind.
    #[error("{path}: `{key}` is {found}; it must be {expected}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The key, dotted.
        key: String,
        /// What belongs there.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// A valid value that is not supported here.
    #[error("{path}: `{key}` is {found}, which is not supported; supported: {supported}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key, dotted.
        key: String,
        /// What is there.
        found: String,
        /// What is supported.
        supported: &'static str,
    },
}

/// The bytes of the configuration file `path`.
///
/// # Errors
/// If it cannot be read, is far too large, or is a Git LFS pointer.
pub fn read_text(path: &Path) -> Result<Vec<u8>, KeyError> {
    let io = |source| KeyError::Io { path: path.to_owned(), source };
    let len = std::fs::metadata(path).map_err(io)?.len();
    if len > MAX_BYTES {
        return Err(KeyError::TooLarge { path: path.to_owned(), len });
    }
    let text = std::fs::read(path).map_err(io)?;
    if text.starts_with(b"version https://git-lfs") {
        return Err(KeyError::LfsPointer { path: path.to_owned() });
    }
    Ok(text)
}

/// Parses `text` as a JSON object. `path` is for messages.
///
/// # Errors
/// If it is not one.
pub fn parse_object(text: &[u8], path: &Path) -> Result<Map<String, Value>, KeyError> {
    let json = |detail| KeyError::Json { path: path.to_owned(), detail };
    match serde_json::from_slice(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(json("the top level is not an object".to_owned())),
        Err(e) => Err(json(e.to_string())),
    }
}

/// An object of a file, with the names that messages need. A missing object reads as an object without keys. A null
/// value reads as a missing key.
#[derive(Clone, Copy, Debug)]
pub struct Keys<'a> {
    path: &'a Path,
    prefix: &'static str,
    map: Option<&'a Map<String, Value>>,
}

impl<'a> Keys<'a> {
    /// The top level of the file `path`.
    #[must_use]
    pub fn new(path: &'a Path, map: &'a Map<String, Value>) -> Self {
        Keys { path, prefix: "", map: Some(map) }
    }

    /// The object under `key`, whose own keys are called `prefix` + key in messages.
    ///
    /// # Errors
    /// If something else is there.
    pub fn object(&self, key: &str, prefix: &'static str) -> Result<Keys<'a>, KeyError> {
        let map = match self.get(key) {
            None => None,
            Some(Value::Object(map)) => Some(map),
            Some(other) => return Err(self.invalid(key, "an object", other)),
        };
        Ok(Keys { path: self.path, prefix, map })
    }

    /// Whether the key is there, even if it is null.
    #[must_use]
    pub fn contains(&self, key: &str) -> bool {
        self.map.is_some_and(|map| map.contains_key(key))
    }

    /// The value of `key`, unless it is null.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map?.get(key).filter(|v| !v.is_null())
    }

    /// A whole number.
    ///
    /// # Errors
    /// If something else is there.
    pub fn size(&self, key: &str) -> Result<Option<usize>, KeyError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|n| usize::try_from(n).ok());
        size.map(Some).ok_or_else(|| self.invalid(key, "a whole number", value))
    }

    /// A whole number that must be there.
    ///
    /// # Errors
    /// If it is not.
    pub fn required_size(&self, key: &str) -> Result<usize, KeyError> {
        self.size(key)?.ok_or_else(|| self.missing(key, "a whole number"))
    }

    /// A real number.
    ///
    /// # Errors
    /// If something else is there.
    pub fn number(&self, key: &str) -> Result<Option<f64>, KeyError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.invalid(key, "a number", value))
    }

    /// A string.
    ///
    /// # Errors
    /// If something else is there.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>, KeyError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.invalid(key, "a string", value))
    }

    /// A list of strings, empty if missing.
    ///
    /// # Errors
    /// If something else is there.
    pub fn texts(&self, key: &str) -> Result<Vec<String>, KeyError> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let list = value.as_array().and_then(|list| list.iter().map(|v| v.as_str().map(str::to_owned)).collect());
        list.ok_or_else(|| self.invalid(key, "a list of strings", value))
    }

    /// An object of strings, empty if missing.
    ///
    /// # Errors
    /// If something else is there.
    pub fn named_texts(&self, key: &str) -> Result<BTreeMap<String, String>, KeyError> {
        let Some(value) = self.get(key) else { return Ok(BTreeMap::new()) };
        let entry = |(name, text): (&String, &Value)| Some((name.clone(), text.as_str()?.to_owned()));
        let map = value.as_object().and_then(|map| map.iter().map(entry).collect());
        map.ok_or_else(|| self.invalid(key, "an object of strings", value))
    }

    /// A boolean, false if missing.
    ///
    /// # Errors
    /// If something else is there.
    pub fn flag(&self, key: &str) -> Result<bool, KeyError> {
        let Some(value) = self.get(key) else { return Ok(false) };
        value.as_bool().ok_or_else(|| self.invalid(key, "true or false", value))
    }

    /// A data type.
    ///
    /// # Errors
    /// If something else is there, or a type that is not supported.
    pub fn dtype(&self, key: &str) -> Result<Option<DType>, KeyError> {
        let Some(text) = self.text(key)? else { return Ok(None) };
        text.parse().map(Some).map_err(|_| self.unsupported(key, "float32, float16, bfloat16", text))
    }

    /// Refuses a string that is not in `values`. A missing key is fine.
    ///
    /// # Errors
    /// If another string is there, or something else.
    pub fn one_of(&self, key: &str, values: &[&str], supported: &'static str) -> Result<(), KeyError> {
        match self.text(key)? {
            Some(found) if !values.contains(&found) => Err(self.unsupported(key, supported, found)),
            _ => Ok(()),
        }
    }

    /// The error for a missing `key`.
    #[must_use]
    pub fn missing(&self, key: &str, expected: &'static str) -> KeyError {
        KeyError::Missing { path: self.path.to_owned(), key: self.dotted(key), expected }
    }

    /// The error for a value `found` of the wrong kind.
    #[must_use]
    pub fn invalid(&self, key: &str, expected: &'static str, found: impl ToString) -> KeyError {
        let (path, key, found) = (self.path.to_owned(), self.dotted(key), found.to_string());
        KeyError::Invalid { path, key, expected, found }
    }

    /// The error for a value `found` that is not supported.
    #[must_use]
    pub fn unsupported(&self, key: &str, supported: &'static str, found: impl ToString) -> KeyError {
        let (path, key, found) = (self.path.to_owned(), self.dotted(key), found.to_string());
        KeyError::Unsupported { path, key, found, supported }
    }

    fn dotted(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }
}
