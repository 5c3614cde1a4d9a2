//! Small tokenizers of the two kinds that models have.
#![allow(dead_code, unreachable_pub, reason = "a test has no outside, and not every test needs all of them")]

use std::fs;
use std::path::Path;

use mixtral_tokenizer::Tokenizer;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Mixtral's kind of tokenizer: words with a mark for the space before them, and a token for each byte. The ids of byte
/// tokens are 3 + byte.
pub fn word_pieces() -> Value {
    let mut vocab: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    vocab.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    vocab.extend("▁abcdeé".chars().map(String::from));
    let merges = [("▁", "a"), ("b", "c"), ("▁a", "bc"), ("d", "e"), ("▁", "de")];
    vocab.extend(merges.map(|(left, right)| format!("{left}{right}")));
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": (0..3).map(|id| added(id, &vocab[usize::try_from(id).unwrap()])).collect::<Vec<_>>(),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect::<serde_json::Map<_, _>>(),
            "merges": merges.map(|(left, right)| format!("{left} {right}"))},
    })
}

/// A tokenizer of byte strings: every byte is a token, and some pairs are.
pub fn byte_strings() -> Value {
    // The characters that bytes are written with: printable ones as themselves, the others from U+0100 on.
    let prints = |byte: u32| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut others = 0x100..;
    let character = |byte| char::from_u32(if prints(byte) { byte } else { others.next().unwrap() }).unwrap();
    let bytes: Vec<String> = (0..=255).map(character).map(String::from).collect();
    let pairs = [(b'a', b'b'), (0xE6, 0x97), (0x97, 0xA5), (b' ', b'a')]
        .map(|(l, r): (u8, u8)| (usize::from(l), usize::from(r)));
    let mut vocab = bytes.clone();
    vocab.extend(pairs.iter().map(|(left, right)| format!("{}{}", bytes[*left], bytes[*right])));
    vocab.push("<end>".to_owned());
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [added(260, "<end>")], "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect::<serde_json::Map<_, _>>(),
            "merges": pairs.map(|(left, right)| format!("{} {}", bytes[left], bytes[right]))},
    })
}

/// A special token of a tokenizer.json.
pub fn added(id: u32, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true})
}

/// A folder with these files.
pub fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let dir = TempDir::new().unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

/// The tokenizer of a tokenizer.json with these files beside it.
pub fn load(json: &Value, beside: &[(&str, Value)]) -> Tokenizer {
    let dir = TempDir::new().unwrap();
    let write = |name: &str, value: &Value| fs::write(Path::new(dir.path()).join(name), value.to_string()).unwrap();
    write("tokenizer.json", json);
    beside.iter().for_each(|(name, value)| write(name, value));
    Tokenizer::load(dir.path()).unwrap()
}
