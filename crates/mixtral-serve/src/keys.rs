//! The keys with which clients may use the server.

use axum::http::{HeaderMap, header};

use crate::error::ApiError;

/// The keys that are accepted; with none, everybody is.
///
/// Only digests are kept and compared. The time of a comparison does not depend on where keys differ, nor on their
/// lengths.
#[derive(Clone, Debug, Default)]
pub struct Keys {
    digests: Vec<blake3::Hash>,
}

impl Keys {
    /// These keys.
    #[must_use]
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a str>) -> Self {
        Keys { digests: keys.into_iter().map(|key| blake3::hash(key.as_bytes())).collect() }
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }

    /// Checks the key of a request.
    ///
    /// # Errors
    /// If there are keys, and the request has none of them.
    pub fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.is_empty() {
            return Ok(());
        }
        let Some(value) = headers.get(header::AUTHORIZATION) else {
            return Err(ApiError::key("no API key; send it in the header `Authorization: Bearer KEY`"));
        };
        let value = value.as_bytes();
        let is_bearer = value.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"bearer "));
        let digest = blake3::hash(value.get(7..).unwrap_or_default().trim_ascii());
        // `blake3::Hash` compares in constant time; all keys are compared.
        let known = self.digests.iter().fold(false, |known, key| known | (*key == digest));
        if is_bearer && known { Ok(()) } else { Err(ApiError::key("the API key is not one of this server's")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(keys: &Keys, value: Option<&str>) -> bool {
        let mut headers = HeaderMap::new();
        headers.extend(value.map(|value| (header::AUTHORIZATION, value.parse().unwrap())));
        keys.check(&headers).is_ok()
    }

    #[test]
    fn only_the_servers_keys_are_accepted() {
        let keys = Keys::new(["one", "other"]);
        for value in ["Bearer one", "bearer other", "Bearer  one "] {
            assert!(check(&keys, Some(value)), "{value}");
        }
        for value in ["Bearer", "Bearer ", "Bearer on", "Bearer one2", "one", "Basic one", "Bearer ONE"] {
            assert!(!check(&keys, Some(value)), "{value}");
        }
        assert!(!check(&keys, None));
        assert!(check(&Keys::default(), None) && check(&Keys::default(), Some("Bearer any")));
    }
}
