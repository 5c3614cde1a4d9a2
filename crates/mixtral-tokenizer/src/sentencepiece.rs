//! Reads SentencePiece's BPE models: `tokenizer.model`, as Mistral published it up to version 7.
//!
//! Ids are SentencePiece's. Control tokens are never recognised in a text.

use std::collections::HashSet;
use std::path::Path;

use prost::Message;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::Replace;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, DecoderWrapper, decoders};

use crate::load::{Base, merges};

/// The character that SentencePiece writes for a space.
const SPACE: &str = "▁";

/// The message `ModelProto`, with the fields that are needed.
#[derive(Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<NormalizerSpec>,
}

/// A token. Its id is its place in the list.
#[derive(Message)]
struct Piece {
    #[prost(string, tag = "1")]
    text: String,
    #[prost(float, tag = "2")]
    score: f32,
    #[prost(enumeration = "Kind", default = "Normal", tag = "3")]
    kind: i32,
}

/// What a piece is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
enum Kind {
    /// Made by merging.
    Normal = 1,
    /// Stands for text that no other piece covers.
    Unknown = 2,
    /// Never made from text.
    Control = 3,
    /// Found in a text before anything is merged.
    UserDefined = 4,
    /// Not in use.
    Unused = 5,
    /// A byte of a character that has no piece.
    Byte = 6,
}

#[derive(Message)]
struct TrainerSpec {
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    treat_whitespace_as_suffix: Option<bool>,
    #[prost(bool, optional, tag = "35")]
    byte_fallback: Option<bool>,
    #[prost(int32, optional, tag = "41")]
    bos_id: Option<i32>,
    #[prost(int32, optional, tag = "42")]
    eos_id: Option<i32>,
}

#[derive(Message)]
struct NormalizerSpec {
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    remove_extra_whitespaces: Option<bool>,
}

/// The number of BPE in `TrainerSpec.model_type`.
const BPE_MODEL: i32 = 2;

/// Reads a model.
pub(crate) fn read(bytes: &[u8], path: &Path) -> Result<Base, String> {
    let ModelProto { pieces, trainer, normalizer } = ModelProto::decode(bytes).map_err(|e| e.to_string())?;
    let (Some(trainer), Some(normalizer)) = (trainer, normalizer) else {
        return Err("it ends before its last parts".to_owned());
    };
    let identity = normalizer.precompiled_charsmap.is_none_or(|map| map.is_empty());
    let plain = identity
        && trainer.model_type == Some(BPE_MODEL)
        && trainer.byte_fallback == Some(true)
        && normalizer.remove_extra_whitespaces == Some(false)
        && trainer.treat_whitespace_as_suffix != Some(true);
    if !plain {
        return Err(
            "it is no SentencePiece model of Mistral's kind (BPE with byte fallback, texts as they are); take the tokenizer.json of the model's page"
                .to_owned(),
        );
    }
    let ids: Vec<u32> = (0..).take(pieces.len()).collect();
    let vocab: Vocab = pieces.iter().map(|p| p.text.clone()).zip(ids.iter().copied()).collect();
    if vocab.len() != pieces.len() {
        return Err("two of its pieces are the same".to_owned());
    }
    let mut merged: Vec<&Piece> = pieces.iter().filter(|p| p.kind() == Kind::Normal).collect();
    // All runs of spaces have the same score. Longer ones are put later, so that a run grows from the left.
    merged.sort_by(|a, b| b.score.total_cmp(&a.score).then(b.text.len().cmp(&a.text.len())));
    let texts: HashSet<&str> = merged.iter().map(|p| p.text.as_str()).collect();
    let merges = merges(merged.iter().map(|p| p.text.as_str()), |text| texts.contains(text));
    let bpe = BPE::builder().vocab_and_merges(vocab, merges).fuse_unk(true).byte_fallback(true).build();
    let mut inner = tokenizers::Tokenizer::new(bpe.map_err(|e| e.to_string())?);

    let dummy_prefix = normalizer.add_dummy_prefix.unwrap_or(true);
    inner.with_normalizer(Some(Replace::new(" ", SPACE).map_err(|e| e.to_string())?)).map_err(|e| e.to_string())?;
    let mut decoders: Vec<DecoderWrapper> = vec![
        Replace::new(SPACE, " ").map_err(|e| e.to_string())?.into(),
        decoders::byte_fallback::ByteFallback::new().into(),
        decoders::fuse::Fuse::new().into(),
    ];
    if dummy_prefix {
        decoders.push(decoders::strip::Strip::new(' ', 1, 0).into());
    }
    inner.with_decoder(Some(decoders::sequence::Sequence::new(decoders)));

    let added = pieces.iter().filter_map(|p| match p.kind() {
        Kind::Control | Kind::Unknown => Some(AddedToken::from(p.text.clone(), true)),
        // `normalized`, so that it is looked for in the text after normalization, where the pieces are looked for too.
        Kind::UserDefined => Some(AddedToken::from(p.text.clone(), false).normalized(true)),
        Kind::Normal | Kind::Unused | Kind::Byte => None,
    });
    inner.add_tokens(added).map_err(|e| e.to_string())?;
    inner.set_encode_special_tokens(true);
    let id =
        |id: Option<i32>, usual| u32::try_from(id.unwrap_or(usual)).ok().filter(|&id| ids.get(id as usize).is_some());
    let (start, end) = (id(trainer.bos_id, 1), id(trainer.eos_id, 2));
    if let Some(start) = start {
        inner.with_post_processor(Some(starting_with(&pieces[start as usize].text, start)?));
    }
    Ok(Base { path: path.to_owned(), inner, dummy_prefix, start, end })
}

/// Puts a token before every text.
pub(crate) fn starting_with(token: &str, id: u32) -> Result<TemplateProcessing, String> {
    let mut template = TemplateProcessing::builder();
    template.try_single(vec![token, "$A"]).map_err(|e| e.to_string())?;
    template.special_tokens(vec![(token, id)]).build().map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use mixtral_model::TokenId;

    use super::*;

    fn model(change: impl Fn(&mut ModelProto)) -> Vec<u8> {
        let piece = |text: &str, score: f32, kind: Kind| Piece { text: text.to_owned(), score, kind: kind.into() };
        let mut pieces = vec![piece("<unk>", 0.0, Kind::Unknown), piece("<s>", 0.0, Kind::Control)];
        pieces.push(piece("</s>", 0.0, Kind::Control));
        pieces.extend((0..=255).map(|byte| piece(&format!("<0x{byte:02X}>"), 0.0, Kind::Byte)));
        pieces.push(piece("[REF]", 0.0, Kind::UserDefined));
        let runs = ["▁▁", "▁▁▁▁", "▁▁▁"].map(|run| piece(run, -1e9, Kind::Normal));
        pieces.extend(runs);
        pieces.extend([("▁a", -1.0), ("bc", -2.0), ("▁abc", -3.0)].map(|(t, score)| piece(t, score, Kind::Normal)));
        pieces.extend(["▁", "a", "b", "c", "<", "s", ">"].map(|t| piece(t, -1e9, Kind::Normal)));
        let trainer = TrainerSpec {
            model_type: Some(BPE_MODEL),
            treat_whitespace_as_suffix: None,
            byte_fallback: Some(true),
            bos_id: None,
            eos_id: None,
        };
        let normalizer = NormalizerSpec {
            precompiled_charsmap: None,
            add_dummy_prefix: Some(true),
            remove_extra_whitespaces: Some(false),
        };
        let mut model = ModelProto { pieces, trainer: Some(trainer), normalizer: Some(normalizer) };
        change(&mut model);
        model.encode_to_vec()
    }

    #[test]
    fn texts_are_cut_as_sentencepiece_cuts_them() {
        let dir = tempfile::TempDir::new().unwrap();
        std::fs::write(dir.path().join("tokenizer.model.v3"), model(|_| ())).unwrap();
        let tokenizer = crate::Tokenizer::load(dir.path()).unwrap();
        let tokens = |text: &str| {
            let ids = tokenizer.encode(text, true).unwrap();
            ids.into_iter().skip(1).map(|id| tokenizer.token(id).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(tokenizer.encode("", true).unwrap(), [TokenId(1)]);
        assert_eq!(tokens("abc abc"), ["▁abc", "▁abc"]);
        // A run of spaces grows from the left. The word behind it keeps its own space.
        assert_eq!(tokens("     abc"), ["▁▁▁▁", "▁", "▁abc"]);
        assert_eq!(tokens("     "), ["▁▁▁▁", "▁▁"]);
        assert_eq!(tokens("<s>"), ["▁", "<", "s", ">"], "control tokens are not read out of a text");
        assert_eq!(tokens("[REF]é"), ["▁", "[REF]", "<0xC3>", "<0xA9>"], "others are, and the space stays first");
        let ids = tokenizer.encode(" abc[REF]é", true).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), " abc[REF]é");
        assert_eq!((tokenizer.start_id(), tokenizer.end_id()), (Some(TokenId(1)), Some(TokenId(2))));
    }

    #[test]
    fn models_of_another_kind_and_cut_files_are_refused() {
        let refusal = |bytes: &[u8]| read(bytes, Path::new("tokenizer.model")).err().expect("a refusal");
        let unigram = |model: &mut ModelProto| model.trainer.as_mut().unwrap().model_type = Some(1);
        assert!(refusal(&model(unigram)).contains("no SentencePiece model of Mistral's kind"));
        let whole = model(|_| ());
        for part in 1..20 {
            refusal(&whole[..whole.len() * part / 20]);
        }
        let twice = |model: &mut ModelProto| model.pieces[5].text = "▁a".to_owned();
        assert_eq!(refusal(&model(twice)), "two of its pieces are the same");
    }
}
