//! Reads `tekken.json`, Mistral's tokenizers since 2024. Tokens are byte strings in the order in which they were
//! merged.
//!
//! Ids are mistral-common's. Control tokens are never recognised in a text.

use std::collections::HashSet;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::load::{Base, merges};
use crate::sentencepiece::starting_with;
use crate::tokenizer::byte_to_char;

#[derive(Deserialize)]
struct Tekken {
    config: Config,
    vocab: Vec<Token>,
    special_tokens: Option<Vec<Special>>,
}

#[derive(Deserialize)]
struct Config {
    pattern: String,
    default_vocab_size: usize,
    default_num_special_tokens: usize,
}

#[derive(Deserialize)]
struct Token {
    rank: usize,
    token_bytes: String,
}

#[derive(Deserialize)]
struct Special {
    rank: usize,
    token_str: String,
}

/// The names of control tokens, for files that do not name them.
const UNNAMED: [&str; 20] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
];

/// A file with more control tokens is damaged.
const MAX_CONTROL_TOKENS: usize = 1 << 16;

/// Reads the file.
pub(crate) fn read(bytes: &[u8], path: &Path) -> Result<Base, String> {
    let Tekken { config, mut vocab, special_tokens } = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let num_special = config.default_num_special_tokens;
    let num_tokens = config
        .default_vocab_size
        .checked_sub(num_special)
        .filter(|&n| n <= vocab.len())
        .ok_or("its vocabulary is smaller than its configuration says")?;
    let control = control_tokens(special_tokens, num_special)?;

    vocab.retain(|token| token.rank < num_tokens);
    vocab.sort_by_key(|token| token.rank);
    if vocab.len() != num_tokens || vocab.iter().enumerate().any(|(at, token)| token.rank != at) {
        return Err("the ranks of its tokens are not 0, 1, 2 …".to_owned());
    }
    let mut tokens = Vec::with_capacity(num_tokens);
    for token in vocab {
        let bytes = STANDARD.decode(&token.token_bytes).map_err(|e| e.to_string())?;
        tokens.push(bytes.into_iter().map(byte_to_char).collect::<String>());
    }
    let texts: HashSet<&str> = tokens.iter().map(String::as_str).collect();
    let merges = merges(tokens.iter().map(String::as_str), |text| texts.contains(text));
    let ids: Vec<u32> = (0..).take(num_special + num_tokens).collect();
    let vocab: Vocab = control.iter().chain(&tokens).cloned().zip(ids.iter().copied()).collect();
    if vocab.len() != ids.len() {
        return Err("two of its tokens are the same".to_owned());
    }
    // A whole word that is a token becomes that token, even if merging would not make it. No word becomes a control
    // token, because the pattern's words contain letters or brackets but not both.
    let bpe = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(true).build();
    let mut inner = tokenizers::Tokenizer::new(bpe.map_err(|e| e.to_string())?);
    let split = Split::new(SplitPattern::Regex(config.pattern), SplitDelimiterBehavior::Isolated, false);
    let steps: Vec<PreTokenizerWrapper> =
        vec![split.map_err(|e| e.to_string())?.into(), ByteLevel::new(false, true, false).into()];
    inner.with_pre_tokenizer(Some(Sequence::new(steps)));
    inner.with_decoder(Some(ByteLevel::new(false, true, false)));
    let find = |token: &str| control.iter().position(|t| t == token).and_then(|at| ids.get(at).copied());
    let (start, end) = (find("<s>"), find("</s>"));
    inner.add_tokens(control.into_iter().map(|token| AddedToken::from(token, true))).map_err(|e| e.to_string())?;
    inner.set_encode_special_tokens(true);
    if let Some(start) = start {
        inner.with_post_processor(Some(starting_with("<s>", start)?));
    }
    Ok(Base { path: path.to_owned(), inner, dummy_prefix: false, start, end })
}

/// The control tokens by id. Those without a name get a name made of their number.
fn control_tokens(named: Option<Vec<Special>>, count: usize) -> Result<Vec<String>, String> {
    if count > MAX_CONTROL_TOKENS {
        return Err(format!("its configuration says that {count} tokens are control tokens"));
    }
    let named = named.unwrap_or_else(|| {
        let unnamed = UNNAMED.iter().enumerate().map(|(rank, token)| Special { rank, token_str: (*token).to_owned() });
        unnamed.take(count).collect()
    });
    let mut tokens: Vec<String> = (0..count).map(|id| format!("<SPECIAL_{id}>")).collect();
    for Special { rank, token_str } in named {
        *tokens.get_mut(rank).ok_or("it has more control tokens than its configuration says")? = token_str;
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use mixtral_model::TokenId;
    use serde_json::json;

    use super::*;

    fn tekken(merged: &[&[u8]]) -> serde_json::Value {
        let bytes = (0..=255u8).map(|byte| vec![byte]).chain(merged.iter().map(|token| token.to_vec()));
        let vocab: Vec<_> = bytes
            .enumerate()
            .map(|(rank, token)| json!({"rank": rank, "token_bytes": STANDARD.encode(token)}))
            .collect();
        let config = json!({"pattern": r"\s*\p{L}+|\s*[^\s\p{L}]+|\s+", "default_vocab_size": vocab.len() + 30 - 1,
            "default_num_special_tokens": 30});
        json!({"config": config, "vocab": vocab})
    }

    #[test]
    fn ids_follow_the_control_tokens_and_the_last_ranks_are_left_out() {
        let dir = tempfile::TempDir::new().unwrap();
        let file = tekken(&[b"ab", b" ab", "\u{65e5}".as_bytes(), b"unused"]);
        std::fs::write(dir.path().join("tekken.json"), file.to_string()).unwrap();
        let tokenizer = crate::Tokenizer::load(dir.path()).unwrap();
        let ids = |text: &str| tokenizer.encode(text, true).unwrap().into_iter().map(|id| id.0).collect::<Vec<_>>();
        assert_eq!(ids("ab ab"), [1, 30 + 256, 30 + 257]);
        assert_eq!(ids("\u{65e5}"), [1, 30 + 258], "a whole word that is a token needs no merges");
        assert_eq!(ids("</s>").len(), 5, "control tokens are not read out of a text");
        assert_eq!(ids(""), [1]);
        assert_eq!((tokenizer.start_id(), tokenizer.end_id()), (Some(TokenId(1)), Some(TokenId(2))));
        assert_eq!(tokenizer.token(TokenId(25)).as_deref(), Some("<SPECIAL_25>"));
        assert_eq!(tokenizer.ids().len(), 30 + 259);
    }

    #[test]
    fn files_that_contradict_themselves_are_refused() {
        let refusal = |change: fn(&mut serde_json::Value)| {
            let mut file = tekken(&[b"ab"]);
            change(&mut file);
            read(file.to_string().as_bytes(), Path::new("tekken.json")).err().expect("a refusal")
        };
        assert!(refusal(|f| f["vocab"][3]["rank"] = json!(4)).contains("ranks"));
        assert!(refusal(|f| f["config"]["default_vocab_size"] = json!(1_u64 << 40)).contains("smaller than"));
        assert!(refusal(|f| f["vocab"][3]["token_bytes"] = json!("%")).contains("symbol"));
        assert!(refusal(|f| f["vocab"][3]["token_bytes"] = json!("BA==")).contains("the same"));
        assert!(refusal(|f| f["special_tokens"] = json!([{"rank": 30, "token_str": "<s>"}])).contains("more control"));
    }
}
