//! The headers of `kernels/`, as they are embedded in the binary.

use std::collections::BTreeMap;

/// Headers by their path below `kernels/`, which is also how they include each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    headers: BTreeMap<&'static str, &'static str>,
}

/// A header that is not among the sources.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("kernels/{name} is not among the embedded kernel sources{}", from.as_ref().map_or(String::new(), |f| format!(", but kernels/{f} includes it")))]
pub struct SourceError {
    /// What was asked for.
    pub name: String,
    /// The header that includes it.
    pub from: Option<&'static str>,
}

impl Sources {
    /// All of `kernels/`.
    #[must_use]
    pub fn embedded() -> Self {
        Self::of(include!(concat!(env!("OUT_DIR"), "/headers.rs")))
    }

    /// The headers with these names and texts.
    #[must_use]
    pub fn of(headers: &[(&'static str, &'static str)]) -> Self {
        Sources { headers: headers.iter().copied().collect() }
    }

    /// The same sources, with `text` for the header `name`.
    #[must_use]
    pub fn with(mut self, name: &'static str, text: &'static str) -> Self {
        self.headers.insert(name, text);
        self
    }

    /// The names of all headers.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.headers.keys().copied()
    }

    /// `header` and all that it includes, directly or not, by name.
    ///
    /// # Errors
    /// If one of them is not among the sources.
    pub fn reached(&self, header: &str) -> Result<Vec<(&'static str, &'static str)>, SourceError> {
        let mut found = BTreeMap::new();
        let mut open: Vec<(&str, Option<&'static str>)> = vec![(header, None)];
        while let Some((name, from)) = open.pop() {
            let Some((&name, &text)) = self.headers.get_key_value(name) else {
                return Err(SourceError { name: name.to_owned(), from });
            };
            if found.insert(name, text).is_none() {
                open.extend(includes(text).map(|included| (included, Some(name))));
            }
        }
        Ok(found.into_iter().collect())
    }
}

/// BLAKE3 over pairs of texts. Each text is hashed behind its length, so that different lists never give the same
/// bytes.
pub(crate) fn hash<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for part in pairs.flat_map(|(name, text)| [name, text]) {
        hasher.update(&part.len().to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize()
}

/// The headers that a text includes by `#include "…"`. Conditions around an include are ignored, since one header too
/// many does no harm.
fn includes(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| {
        let rest = line.trim_start().strip_prefix('#')?.trim_start().strip_prefix("include")?;
        rest.trim_start().strip_prefix('"')?.split('"').next()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Sources {
        Sources::of(&[
            ("a/a.cuh", "#pragma once\n#include \"b/b.cuh\"\n  # include \"c/c.cuh\"\n"),
            ("b/b.cuh", "#include \"a/a.cuh\"\n// #include \"d\"\n"),
            ("c/c.cuh", ""),
            ("d/d.cuh", "#include \"gone.cuh\"\n"),
        ])
    }

    #[test]
    fn a_header_reaches_what_it_includes_and_no_more() {
        let names = |header| three().reached(header).map(|found| found.iter().map(|f| f.0).collect::<Vec<_>>());
        assert_eq!(names("a/a.cuh"), Ok(vec!["a/a.cuh", "b/b.cuh", "c/c.cuh"]));
        assert_eq!(names("c/c.cuh"), Ok(vec!["c/c.cuh"]));
        let error = names("d/d.cuh").expect_err("it includes what is not there").to_string();
        assert_eq!(error, "kernels/gone.cuh is not among the embedded kernel sources, but kernels/d/d.cuh includes it");
    }

    #[test]
    fn every_embedded_header_reaches_only_embedded_headers() {
        let sources = Sources::embedded();
        assert!(sources.names().any(|name| name == "base/types.cuh"));
        for name in sources.names() {
            sources.reached(name).unwrap_or_else(|e| panic!("{e}"));
        }
    }

    /// Checks the rule of kernels/README.md as far as a kernel's own body shows it. Some kernels wait in a helper
    /// function.
    #[test]
    fn kernels_let_their_successor_start_and_wait_in_the_order_of_the_rule() {
        let sources = Sources::embedded();
        let mut kernels = 0;
        for header in sources.names() {
            let reached = sources.reached(header).unwrap_or_else(|e| panic!("{e}"));
            let text = reached.iter().find(|(name, _)| *name == header).expect("itself").1;
            for kernel in text.split("__global__ ").skip(1) {
                let (head, body) = kernel.split_once("{\n").expect("a body");
                let calls: Vec<&str> = body.split("pdl::").skip(1).filter_map(|rest| rest.split('(').next()).collect();
                let first = if head.contains("grouped(") { "wait" } else { "launch_dependents" };
                assert_eq!(calls.first(), Some(&first), "{header}: {head}");
                assert!(calls.contains(&"launch_dependents"), "{header}: {head}");
                kernels += 1;
            }
        }
        assert!(kernels > 25, "{kernels} kernels");
    }
}
