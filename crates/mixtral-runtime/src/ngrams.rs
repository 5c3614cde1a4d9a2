//! Sequences of n tokens that may not appear twice.

use mixtral_model::TokenId;

/// The tokens that would end a sequence of `n` tokens which is in `tokens` already. None if `n` is 0.
#[must_use]
pub fn repeating(tokens: &[TokenId], n: usize) -> Vec<TokenId> {
    let Some(last) = n.checked_sub(1).and_then(|before| tokens.len().checked_sub(before)) else { return Vec::new() };
    let begun = &tokens[last..];
    tokens.windows(n).filter(|window| window.starts_with(begun)).map(|window| window[n - 1]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_after_the_same_tokens_repeats() {
        let repeating = |tokens: &[u32], n| {
            let tokens: Vec<_> = tokens.iter().copied().map(TokenId).collect();
            repeating(&tokens, n).into_iter().map(|token| token.0).collect::<Vec<_>>()
        };
        assert_eq!(repeating(&[1, 2, 3, 1, 2, 4, 1, 2], 3), [3, 4]);
        assert_eq!(repeating(&[1, 1, 1], 2), [1, 1]);
        // Of single tokens, each that was there.
        assert_eq!(repeating(&[5, 6], 1), [5, 6]);
        assert_eq!(repeating(&[5, 6], 0), [0; 0]);
        assert_eq!(repeating(&[5, 6], 4), [0; 0]);
        assert_eq!(repeating(&[], 1), [0; 0]);
    }
}
