//! Text as it grows, and texts that may not be generated.

mod common;

use common::{byte_strings, load, word_pieces};
use mixtral_model::TokenId;
use mixtral_tokenizer::{BadWords, TextStream, Tokenizer};
use proptest::prelude::*;
use serde_json::json;

/// The pieces of a stream.
fn pieces(tokenizer: &Tokenizer, ids: &[TokenId]) -> Vec<String> {
    let mut stream = TextStream::default();
    let mut pieces: Vec<String> = ids.iter().map(|id| stream.push(tokenizer, *id).unwrap()).collect();
    pieces.push(stream.finish(tokenizer).unwrap());
    pieces
}

fn bytes(bytes: &[u8]) -> Vec<TokenId> {
    bytes.iter().map(|byte| TokenId(3 + u32::from(*byte))).collect()
}

#[test]
fn a_wrong_byte_replaces_its_whole_run_as_in_transformers() {
    let tokenizer = load(&word_pieces(), &[]);
    let word = tokenizer.encode("abc", false).unwrap();
    let text = |ids: &[&[TokenId]]| {
        let ids = ids.concat();
        let pieces = pieces(&tokenizer, &ids);
        assert_eq!(pieces.concat(), tokenizer.decode(&ids).unwrap());
        pieces.concat()
    };
    assert_eq!(text(&[&bytes("ö".as_bytes()), &word]), "ö abc");
    assert_eq!(text(&[&bytes(b"\xC3\xB6\xF0"), &word]), "\u{FFFD}\u{FFFD}\u{FFFD} abc");
    assert_eq!(text(&[&word, &bytes(b"\xF0\x9F")]), "abc\u{FFFD}\u{FFFD}");
    // Special tokens are left out, so the bytes on both sides are one run.
    assert_eq!(text(&[&bytes(b"\xC3"), &[TokenId(2)], &bytes(b"\xB6"), &word]), "ö abc");
    assert_eq!(text(&[&[TokenId(1)], &word, &word]), "abc abc");
}

#[test]
fn pieces_come_out_as_soon_as_they_are_certain() {
    let tokenizer = load(&byte_strings(), &[]);
    let ids: Vec<TokenId> = b"ab\xE6\x97\xA5c".iter().map(|b| TokenId(u32::from(*b))).collect();
    assert_eq!(pieces(&tokenizer, &ids), ["a", "b", "", "", "日", "c", ""]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// All pieces together are the text of all ids, whatever the ids are. Unknown ids count too.
    #[test]
    fn pieces_are_the_whole(words in any::<bool>(), few in any::<bool>(), ids in prop::collection::vec(0u32..280, 0..24)) {
        thread_local! {
            static TOKENIZERS: [Tokenizer; 2] = [load(&word_pieces(), &[]), load(&byte_strings(), &[])];
        }
        TOKENIZERS.with(|tokenizers| {
            let tokenizer = &tokenizers[usize::from(words)];
            // Ids of a few bytes make many characters, complete and incomplete ones.
            let among = [0, 2, 198, 153, 168, 230, 151, 165, 258, 262, 267, 269, 270, 256];
            let id = |id: u32| if few { among[id as usize % among.len()] } else { id };
            let ids: Vec<TokenId> = ids.into_iter().map(id).map(TokenId).collect();
            prop_assert_eq!(pieces(tokenizer, &ids).concat(), tokenizer.decode(&ids).unwrap());
            Ok(())
        })?;
    }
}

#[test]
fn a_word_is_banned_in_whichever_tokens_it_is_written() {
    let end = json!({"additional_special_tokens": ["<|end|>"]});
    let tokenizer = load(&word_pieces(), &[("tokenizer_config.json", end)]);
    let id = |token: &str| *tokenizer.ids().iter().find(|id| tokenizer.token(**id).as_deref() == Some(token)).unwrap();
    let bans = |word: &str, before: &[&str], token: &str| {
        let before: Vec<TokenId> = before.iter().map(|token| id(token)).collect();
        BadWords::new(&[word.to_owned()], &tokenizer).banned(&before).contains(&id(token))
    };
    for word in ["abc", " abc"] {
        // After a space that is part of the token, after a space that is a token, or without a space, as after a
        // newline.
        assert!(bans(word, &["d"], "▁abc"));
        assert!(bans(word, &["▁a"], "bc"));
        assert!(bans(word, &["<0x0A>", "a"], "bc"));
        assert!(bans(word, &["a", "b"], "c") && bans(word, &["a", "b"], "<0x63>"));
        assert!(bans(word, &["▁a", "<0x62>"], "c"));
        assert!(!bans(word, &["▁a"], "b") && !bans(word, &["d"], "bc"));
    }
    assert!(bans("abc de", &["▁abc"], "▁de") && !bans("abc de", &[], "▁de"));
    assert!(bans("abc de", &["▁a", "bc", "▁", "d"], "e"));
    assert!(bans("é", &["<0xC3>"], "<0xA9>") && bans("é", &[], "é") && !bans("é", &[], "<0xA9>"));
    assert!(bans("<|end|>", &["▁abc"], "<|end|>"));
    assert!(BadWords::new(&[String::new()], &tokenizer).banned(&[TokenId(3)]).is_empty());
}

#[test]
fn byte_strings_are_banned_by_their_bytes() {
    let tokenizer = load(&byte_strings(), &[]);
    let banned = |before: &[u32]| {
        let before: Vec<TokenId> = before.iter().copied().map(TokenId).collect();
        BadWords::new(&["日".to_owned()], &tokenizer).banned(&before)
    };
    // 257 is E6 97, 258 is 97 A5.
    assert_eq!(banned(&[257]), [TokenId(0xA5)]);
    assert_eq!(banned(&[0xE6]), [TokenId(258)]);
    assert_eq!(banned(&[0xE6, 0x97]), [TokenId(0xA5)]);
}
