//! What a full block of a prompt contains, so that another prompt with the same beginning can use it.

use mixtral_model::TokenId;

/// A block's tokens together with all tokens before them, as a digest: keys and values depend on both. Two contents are
/// equal only if the tokens are (as far as anyone can find two texts with one BLAKE3 digest).
///
/// Only blocks that were computed as a part of a prompt have one. A prompt's keys do not depend on chunks, on other
/// sequences or on earlier steps, to the bit. A decoded token's may differ in their last bits, so the block that holds
/// it is never shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Content([u8; 32]);

impl Content {
    /// Nothing: what stands before a prompt's first block.
    pub const START: Content = Content([0; 32]);

    /// The content of the block with these tokens behind this one.
    #[must_use]
    pub fn followed_by(&self, tokens: &[TokenId]) -> Content {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.0);
        for token in tokens {
            hasher.update(&token.0.to_le_bytes());
        }
        Content(*hasher.finalize().as_bytes())
    }

    /// The contents of a prompt's full blocks.
    #[must_use]
    pub fn of_prompt(prompt: &[TokenId], block_size: usize) -> Vec<Content> {
        let mut last = Content::START;
        let next = |block: &[TokenId]| {
            last = last.followed_by(block);
            last
        };
        prompt.chunks_exact(block_size.max(1)).map(next).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_content_is_everything_up_to_its_end() {
        let of = |tokens: &[u32]| Content::of_prompt(&tokens.iter().copied().map(TokenId).collect::<Vec<_>>(), 2);
        let found = of(&[1, 2, 3, 4, 5]);
        assert_eq!((found.len(), of(&[1, 2, 3, 4])), (2, found.clone()));
        assert_eq!(of(&[1, 2, 3, 9, 5])[0], found[0]);
        assert_ne!(of(&[1, 2, 3, 9, 5])[1], found[1]);
        // The second block has the same tokens, behind others.
        assert_ne!(of(&[0, 2, 3, 4, 5])[1], found[1]);
        assert_eq!(of(&[]), []);
    }
}
