//! The text of outputs: what ends it, what is left out of it, and a tokenizer that fails.

use std::fs;
use std::sync::{Arc, LazyLock};

use mixtral_model::TokenId;
use mixtral_runtime::{BadWords, FinishReason, Request, Tokenizer, TokenizerError};
use serde_json::{Map, Value, json};

use crate::harness::{Outcome, Setup, alone, expected, finish, request, submit};
use crate::mock::VOCAB;

/// The letters, a space, the two bytes of `é`, a token that cannot be decoded, and two special ones.
static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    let mut tokens: Vec<String> = ('a'..='z').map(String::from).collect();
    tokens.extend([" ", "<0xC3>", "<0xA9>", "!", "<end>", "<pad>"].map(str::to_owned));
    assert_eq!(tokens.len(), VOCAB);
    let vocab: Map<String, Value> = tokens.into_iter().zip((0..).map(|id: u32| json!(id))).collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true})
    };
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
        "post_processor": null, "added_tokens": [special(30, "<end>"), special(31, "<pad>")],
        // The library panics where it would strip more characters than a token has.
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "ByteFallback"}, {"type": "Strip", "content": "!", "start": 0, "stop": 2}]},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"},
    });
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    Arc::new(Tokenizer::load(dir.path()).unwrap())
});

const UNDECODABLE: TokenId = TokenId(29);
const END: TokenId = TokenId(30);
const PAD: TokenId = TokenId(31);

fn setup() -> Setup {
    Setup { tokenizer: Some(TOKENIZER.clone()), ..Setup::default() }
}

/// The first request whose 8 tokens of output are as wanted.
fn drawing(wanted: impl Fn(&[TokenId]) -> bool) -> (Request, Vec<TokenId>) {
    let requests = (0..).map(|seed| request(seed, 3, 8));
    requests.map(|asks| (asks.clone(), expected(&asks).tokens)).find(|(_, tokens)| wanted(tokens)).unwrap()
}

/// Whether the text is letters alone.
fn is_plain(tokens: &[TokenId]) -> bool {
    tokens.iter().all(|token| token.0 < 26)
}

fn bytes(tokens: &[TokenId]) -> bool {
    tokens == [TokenId(27), TokenId(28)]
}

fn text(tokens: &[TokenId]) -> String {
    TOKENIZER.decode(tokens).unwrap()
}

fn stopping(asks: &Request, word: &str) -> Outcome {
    alone(&setup(), &Request { stop_words: vec![word.to_owned()], ..asks.clone() })
}

#[test]
fn the_text_is_that_of_the_ids() {
    let all = |tokens: &[TokenId]| !tokens.contains(&UNDECODABLE) && tokens.contains(&END) && bytes(&tokens[2..4]);
    let (asks, tokens) = drawing(all);
    let found = alone(&setup(), &asks);
    assert_eq!((&found.tokens, &found.text), (&tokens, &text(&tokens)));
    assert!(found.text.contains('é') && !found.text.contains("end"), "{}", found.text);
    // The token that ends a sequence is not part of the text, even if the token has a text.
    let (asks, tokens) = drawing(is_plain);
    let found = alone(&setup(), &Request { end_ids: vec![tokens[7]], ..asks.clone() });
    let end = tokens.iter().position(|token| *token == tokens[7]).unwrap();
    assert_eq!((found.text, found.tokens.len()), (text(&tokens[..end]), end + 1));
    // Without a tokenizer there is no text, and stop words have no effect.
    let (mut session, _) = Setup::default().session();
    assert!(!session.makes_text() && setup().session().0.makes_text());
    let id = submit(&mut session, &Request { stop_words: vec![text(&tokens[2..4])], ..asks });
    let found = finish(&mut session).remove(&id).unwrap();
    assert_eq!((found.text.as_str(), found.tokens), ("", tokens));
}

#[test]
fn stop_words_end_the_text_and_are_cut_from_it() {
    let (asks, tokens) = drawing(|tokens| is_plain(tokens) && tokens[..6].iter().all(|token| *token != tokens[6]));
    let whole = text(&tokens);
    let stopped = |word: &str, len: usize, text: &str| {
        let found = stopping(&asks, word);
        assert_eq!((found.tokens.as_slice(), found.text.as_str()), (&tokens[..len], text), "{word:?}");
        assert_eq!(found.reason, Some(FinishReason::StopWord), "{word:?}");
    };
    stopped(&whole[..1], 1, "");
    stopped(&whole[2..5], 5, &whole[..2]);
    stopped(&whole[6..7], 7, &whole[..6]);
    // The stop word ends with the last token that the request may have.
    stopped(&whole[5..], 8, &whole[..5]);
    // Text that only begins like a stop word comes out, even if it was held back.
    for word in [format!("{}~", &whole[6..]), format!("{}~", &whole[2..4])] {
        let found = stopping(&asks, &word);
        assert_eq!((found.text, found.reason), (whole.clone(), Some(FinishReason::Length)), "{word:?}");
    }
    // If an end id comes first, text that was held back for a stop word comes out.
    let word = format!("{}~", &whole[4..6]);
    let found = alone(&setup(), &Request { stop_words: vec![word], end_ids: vec![tokens[6]], ..asks.clone() });
    assert_eq!((found.text.as_str(), found.reason), (&whole[..6], Some(FinishReason::EndId)));
}

#[test]
fn special_tokens_and_bytes_that_wait_are_searched() {
    let (asks, tokens) = drawing(|tokens| is_plain(&tokens[..3]) && tokens[3] == END && tokens[4].0 < 26);
    let word = format!("{}<end>{}", text(&tokens[2..3]), text(&tokens[4..5]));
    let found = stopping(&asks, &word);
    assert_eq!((found.tokens.len(), found.text, found.reason), (5, text(&tokens[..2]), Some(FinishReason::StopWord)));
    // Another special token between them.
    assert_eq!(stopping(&asks, &word.replace("end", "pad")).reason, Some(FinishReason::Length));
    // A stop word whose bytes may still be part of something else is found before a special token, and at the end.
    let (asks, tokens) =
        drawing(|tokens| is_plain(&tokens[..1]) && bytes(&tokens[1..3]) && tokens[3] == PAD && tokens[4].0 < 26);
    let found = alone(&setup(), &Request { stop_words: vec!["é".to_owned(), "<pad>".to_owned()], ..asks });
    assert_eq!((found.tokens.len(), found.text, found.reason), (4, text(&tokens[..1]), Some(FinishReason::StopWord)));
    let (asks, tokens) =
        drawing(|tokens| is_plain(&tokens[..1]) && bytes(&tokens[1..3]) && !tokens[..3].contains(&tokens[3]));
    for (end_ids, max_output_len, reason) in
        [(vec![], 3, FinishReason::StopWord), (vec![tokens[3]], 8, FinishReason::EndId)]
    {
        let asks = Request { stop_words: vec!["é".to_owned()], end_ids, max_output_len, ..asks.clone() };
        let found = alone(&setup(), &asks);
        assert_eq!((found.text, found.reason), (text(&tokens[..1]), Some(reason)));
    }
}

#[test]
fn a_tokenizer_that_fails_ends_one_text_and_no_sequence() {
    let (failing, tokens) =
        drawing(|tokens| is_plain(&tokens[..4]) && tokens[4] == UNDECODABLE && is_plain(&tokens[5..]));
    let (other, other_tokens) = drawing(is_plain);
    // The last two letters before the failure wait for the rest of a stop word; what follows it stops nothing.
    let stop_words = vec![format!("{}~", text(&tokens[2..4])), text(&tokens[6..7])];
    for depth in [1, 2] {
        let (mut session, _) = Setup { depth, ..setup() }.session();
        let failing = submit(&mut session, &Request { stop_words: stop_words.clone(), ..failing.clone() });
        let other = submit(&mut session, &other);
        let mut outcomes = finish(&mut session);
        let (failed, other) = (outcomes.remove(&failing).unwrap(), outcomes.remove(&other).unwrap());
        assert_eq!((&failed.tokens, failed.text), (&tokens, text(&tokens[..4])));
        assert!(matches!(failed.text_failed, Some(TokenizerError::Use { action: "decode ids", .. })));
        assert_eq!(failed.reason, Some(FinishReason::Length));
        assert_eq!((&other.tokens, other.text, other.text_failed), (&other_tokens, text(&other_tokens), None));
    }
}

#[test]
fn bad_words_do_not_come_up() {
    let (asks, tokens) = drawing(is_plain);
    let banned = |words: &[String]| Request { bad_words: BadWords::new(words, &TOKENIZER).into(), ..asks.clone() };
    // A word of one token, and one of which only the end is banned, only after its beginning.
    for word in [text(&tokens[2..3]), text(&tokens[3..6])] {
        let asks_without = banned(std::slice::from_ref(&word));
        let (mut session, _) = setup().session();
        let ids = [&asks_without, &asks].map(|asks| submit(&mut session, asks));
        let outcomes = finish(&mut session);
        let found = &outcomes[&ids[0]];
        assert!(!found.text.contains(&word), "{word:?} in {:?}", found.text);
        assert_eq!(found.tokens, expected(&asks_without).tokens);
        assert_eq!(outcomes[&ids[1]].tokens, tokens, "of the other request");
    }
    let kept = expected(&banned(&[text(&tokens[3..6])])).tokens;
    assert_eq!((&kept[..5], kept[5] == tokens[5]), (&tokens[..5], false));
}
