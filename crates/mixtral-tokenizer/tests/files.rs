//! Which files count, and the messages about files that are not what they should be.

mod common;

use common::{folder, load, word_pieces};
use mixtral_model::TokenId;
use mixtral_tokenizer::{Tokenizer, model_end_ids};
use serde_json::json;

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, true).unwrap().into_iter().map(|id| id.0).collect()
}

#[test]
fn what_is_left_of_training_does_not_touch_prompts() {
    let text = "abc de abc de abc";
    let clean = ids(&load(&word_pieces(), &[]), text);
    let with = |key: &str, value| {
        let mut json = word_pieces();
        json[key] = value;
        ids(&load(&json, &[]), text)
    };
    for direction in ["Left", "Right"] {
        let truncation = json!({"direction": direction, "max_length": 3, "strategy": "LongestFirst", "stride": 0});
        assert_eq!(with("truncation", truncation), clean);
        let padding = json!({"strategy": {"Fixed": 40}, "direction": direction, "pad_to_multiple_of": 8, "pad_id": 2,
            "pad_type_id": 0, "pad_token": "</s>"});
        assert_eq!(with("padding", padding), clean);
    }
    let mut model = word_pieces()["model"].clone();
    model["dropout"] = json!(1.0);
    assert_eq!(with("model", model), clean);
}

#[test]
fn tokens_that_only_the_files_beside_it_name_are_one_id_each() {
    let num = u32::try_from(word_pieces()["model"]["vocab"].as_object().unwrap().len()).unwrap();
    let token = |content: &str, special: bool| {
        json!({"content": content, "lstrip": false, "rstrip": false,
        "single_word": false, "normalized": false, "special": special})
    };
    let decoder = [(
        "tokenizer_config.json",
        json!({"eos_token": {"content": "<|end|>", "__type": "AddedToken"},
        "added_tokens_decoder": {num.to_string(): token("<|end|>", true), (num + 1).to_string(): token("<|say|>", false)}}),
    )];
    let older = [
        ("added_tokens.json", json!({"<|say|>": num + 1, "<|end|>": num})),
        ("special_tokens_map.json", json!({"eos_token": "<|end|>"})),
    ];
    for files in [&decoder[..], &older[..]] {
        let tokenizer = load(&word_pieces(), files);
        assert_eq!(tokenizer.end_id(), Some(TokenId(num)));
        let found = tokenizer.encode("<|say|><|end|>", false).unwrap();
        assert_eq!(found, [TokenId(num + 1), TokenId(num)]);
        assert_eq!(tokenizer.decode(&found).unwrap(), "<|say|>", "of the two, one is special");
    }
    // A role makes a token even if nothing else names it. Without a padding token, the end token pads.
    let tokenizer =
        load(&word_pieces(), &[("tokenizer_config.json", json!({"eos_token": "<|end|>", "bos_token": "<s>"}))]);
    assert_eq!((tokenizer.end_id(), tokenizer.pad_id()), (Some(TokenId(num)), Some(TokenId(num))));
    let roles = json!({"eos_token": "</s>", "pad_token": {"content": "<unk>"}});
    let tokenizer = load(&word_pieces(), &[("tokenizer_config.json", roles)]);
    assert_eq!((tokenizer.end_id(), tokenizer.pad_id()), (Some(TokenId(2)), Some(TokenId(0))));
}

#[test]
fn a_token_takes_the_space_beside_it_where_it_says_so() {
    let num = word_pieces()["model"]["vocab"].as_object().unwrap().len();
    let strips = json!({"added_tokens_decoder": {num.to_string(): {"content": "<|cut|>", "lstrip": true, "rstrip": true,
        "single_word": false, "normalized": false, "special": true}}});
    let tokenizer = load(&word_pieces(), &[("tokenizer_config.json", strips)]);
    assert_eq!(tokenizer.encode("abc  <|cut|>  ", false).unwrap().len(), 2);
}

#[test]
fn the_start_token_is_put_or_left_out_as_tokenizer_config_says() {
    let config = |start: bool, end: bool| {
        let keys = json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": start, "add_eos_token": end});
        load(&word_pieces(), &[("tokenizer_config.json", keys)])
    };
    let bare = ids(&config(false, false), "abc");
    assert_eq!(ids(&config(true, false), "abc"), [&[1], &bare[..]].concat());
    assert_eq!(ids(&config(true, true), "abc"), [&[1], &bare[..], &[2]].concat());
    assert_eq!(config(false, false).start_id(), Some(TokenId(1)), "it has one all the same");
}

#[test]
fn ends_are_those_of_the_generation_or_else_of_the_model() {
    let ends = |files: &[(&str, &[u8])]| model_end_ids(folder(files).path()).unwrap();
    let config: (&str, &[u8]) = ("config.json", br#"{"eos_token_id": [7, 9]}"#);
    assert_eq!(ends(&[("generation_config.json", br#"{"eos_token_id": 5}"#), config]), [TokenId(5)]);
    assert_eq!(ends(&[("generation_config.json", br#"{"temperature": 0.7}"#), config]), [TokenId(7), TokenId(9)]);
    assert_eq!(ends(&[("generation_config.json", br#"{"eos_token_id": null}"#)]), []);
    assert_eq!(ends(&[config]), [TokenId(7), TokenId(9)]);
}

#[test]
fn what_people_have_in_place_of_a_file_is_named() {
    let said = |name: &str, bytes: &[u8]| {
        let whole = word_pieces().to_string();
        let dir = folder(&[("tokenizer.json", whole.as_bytes()), (name, bytes)]);
        let message = Tokenizer::load(dir.path()).err().expect("a refusal").to_string();
        message.replace(dir.path().to_str().unwrap(), "DIR")
    };
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 493443\n";
    let whole = word_pieces().to_string();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        assert!(said(name, pointer).contains("Git LFS pointer"), "{}", said(name, pointer));
        assert!(said(name, b"<!DOCTYPE html><html>").contains("web page"));
        assert!(said(name, b" \n").contains("empty"));
        assert!(said(name, whole.split_at(whole.len() / 2).0.as_bytes()).contains("cut off"));
    }
    for name in ["tokenizer.model", "tekken.json"] {
        let dir = folder(&[(name, pointer)]);
        let message = Tokenizer::load(dir.path()).err().expect("a refusal").to_string();
        assert!(message.contains("Git LFS pointer"), "{message}");
    }
    let none = Tokenizer::load(folder(&[]).path()).err().expect("a refusal").to_string();
    assert!(none.contains("has no tokenizer"), "{none}");
}
