//! The seal: a hash of a configuration file inside that file. It is 32 hex digits, computed over the text with zeros in
//! their place.

/// The digits in the text while it is hashed.
pub const UNSEALED: &str = "00000000000000000000000000000000";

fn hash(text: &[u8]) -> String {
    let mut hash = blake3::hash(text).to_hex().to_string();
    hash.truncate(UNSEALED.len());
    hash
}

/// Puts the seal into `text`, in place of the first [`UNSEALED`].
#[must_use]
pub fn seal(text: &str) -> String {
    text.replacen(UNSEALED, &hash(text.as_bytes()), 1)
}

/// Whether `text` is unchanged since `seal` was put into it.
#[must_use]
pub fn is_intact(text: &[u8], seal: &str) -> bool {
    let Ok(text) = std::str::from_utf8(text) else { return false };
    seal.len() == UNSEALED.len() && hash(text.replacen(seal, UNSEALED, 1).as_bytes()) == seal
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_changed_byte_breaks_a_seal() {
        let text = seal(&format!(r#"{{"a": 1, "seal": "{UNSEALED}", "b": "x"}}"#));
        let at = text.find("seal\": \"").unwrap() + 8;
        let id = &text[at..at + UNSEALED.len()];
        assert!(is_intact(text.as_bytes(), id));
        for i in 0..text.len() {
            for bit in 0..8 {
                let mut changed = text.clone().into_bytes();
                changed[i] ^= 1 << bit;
                let found = changed.get(at..at + UNSEALED.len()).and_then(|id| std::str::from_utf8(id).ok());
                assert!(!is_intact(&changed, found.unwrap_or("none")), "bit {bit} of byte {i}");
            }
        }
        assert!(!is_intact(text.as_bytes(), ""));
        assert!(!is_intact(&text.as_bytes()[1..], id));
    }
}
