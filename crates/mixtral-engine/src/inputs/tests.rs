//! Breaks every rule of [`StepInputs::check`], one at a time.

use mixtral_model::{DType, ElemType};

use super::*;
use crate::{Buffer, KvLayout, Rows};

/// Blocks of the cache.
const KV_BLOCKS: usize = 9;

/// A program with limits that a few tokens reach, with attention or without.
fn program(attends: bool) -> Program {
    let buffer =
        |name: &str| Buffer { name: name.to_owned(), dtype: ElemType::F32, rows: Rows::Tokens, cols: 4, offset: 0 };
    let attention = Op::Attention {
        query: "q".to_owned(),
        num_heads: 1,
        window: None,
        fp8_context: false,
        layer: 0,
        out: "out".to_owned(),
    };
    Program {
        rank: 0,
        world_size: 1,
        tp_size: 1,
        dtype: DType::F32,
        vocab_size: 20,
        num_layers: 1,
        num_experts: 0,
        top_k: 0,
        limits: Limits { max_batch_size: 3, max_num_tokens: 8, max_seq_len: 11, max_num_logits: 2, block_size: 4 },
        kv: KvLayout {
            num_layers: 1,
            num_kv_heads: 1,
            head_dim: 4,
            dtype: DType::F32,
            format: mixtral_model::CacheFormat::Plain,
        },
        kv_scales: Vec::new(),
        arena_bytes: 0,
        buffers: vec![buffer("q"), buffer("out")],
        weights: vec![],
        ops: if attends { vec![attention] } else { vec![] },
    }
}

/// A decode at position 5 in blocks 7 and 2, and tokens 3 to 8 of a prompt in blocks 0, 8 and 1.
fn inputs() -> StepInputs<'static> {
    StepInputs {
        num_decodes: 1,
        token_ids: vec![19, 0, 1, 2, 3, 4, 5],
        positions: vec![5, 3, 4, 5, 6, 7, 8],
        slot_mapping: vec![9, 3, 32, 33, 34, 35, 4],
        block_table: vec![7, 2, -1, 0, 8, 1],
        seq_lens: vec![6, 9],
        cu_query_lens: vec![0, 1, 7],
        logits_indices: vec![0, 6],
        ..StepInputs::default()
    }
}

fn draw(row: usize, tokens: usize, prompt_len: usize) -> SampleRequest<'static> {
    SampleRequest {
        row,
        params: SamplingParams::default(),
        key: RandomKey::default(),
        tokens: vec![TokenId(1); tokens].into(),
        prompt_len,
        bias: vec![],
        banned: vec![],
    }
}

/// The error for inputs after `change`.
fn refused(change: impl FnOnce(&mut StepInputs<'static>)) -> String {
    let mut inputs = inputs();
    change(&mut inputs);
    inputs.check(&program(true), KV_BLOCKS, 0).expect_err("a rule is broken").to_string()
}

#[test]
fn a_step_that_keeps_the_rules_passes() {
    let mut inputs = inputs();
    // Without penalties, the tokens so far may be left out.
    inputs.samples = vec![draw(0, 3, 3), draw(1, 0, 4)];
    inputs.check(&program(true), KV_BLOCKS, 0).unwrap();
    // Behind the blocks that a sequence needs, the table may hold blocks that it does not need yet.
    inputs.block_table[2] = 3;
    inputs.check(&program(true), KV_BLOCKS, 0).unwrap();
    // A key that nothing reads need not be kept.
    inputs.slot_mapping[4] = -1;
    inputs.check(&program(false), KV_BLOCKS, 0).unwrap();
    // The keys of a dead sequence need not be kept either.
    inputs.slot_mapping[1..].fill(-1);
    inputs.check(&program(true), KV_BLOCKS, 0).unwrap();
}

/// A prompt of two tokens from its start, in the first block of the cache.
fn prompt(slots: [i32; 2]) -> StepInputs<'static> {
    StepInputs {
        token_ids: vec![7, 8],
        positions: vec![0, 1],
        slot_mapping: slots.to_vec(),
        block_table: vec![0, -1, -1],
        seq_lens: vec![2],
        cu_query_lens: vec![0, 2],
        ..StepInputs::default()
    }
}

#[test]
fn slot_0_is_a_slot_like_any_other() {
    for attends in [true, false] {
        let check = |slots| prompt(slots).check(&program(attends), KV_BLOCKS, 0);
        check([0, 1]).unwrap();
        check([-1, -1]).unwrap();
        check([0, 0]).unwrap_err();
        // One token's key is kept, so with attention the other's has to be.
        assert_eq!(check([0, -1]).is_err(), attends);
    }
}

#[test]
fn limits_and_lengths() {
    let said = [
        refused(|i| i.token_ids.extend([1, 1])),
        refused(|i| i.seq_lens.extend([1, 1])),
        refused(|i| i.logits_indices = vec![0, 1, 2]),
        refused(|i| i.positions.truncate(6)),
        refused(|i| i.slot_mapping.push(4)),
        refused(|i| i.block_table.truncate(5)),
        refused(|i| i.cu_query_lens.push(7)),
        refused(|i| i.num_decodes = 3),
    ];
    insta::assert_snapshot!(said.join("\n"));
}

#[test]
fn values_out_of_range() {
    let said = [
        refused(|i| i.token_ids[0] = 20),
        refused(|i| i.token_ids[0] = -1),
        refused(|i| i.positions[6] = 11),
        refused(|i| i.positions[6] = -1),
        refused(|i| i.slot_mapping[6] = 36),
        refused(|i| i.slot_mapping[6] = -2),
        refused(|i| i.block_table[0] = 9),
        refused(|i| i.block_table[2] = 9),
        refused(|i| i.block_table[2] = -2),
        refused(|i| i.seq_lens[1] = 12),
        refused(|i| i.seq_lens[1] = 0),
        refused(|i| i.cu_query_lens[1] = 8),
        refused(|i| i.cu_query_lens[1] = -1),
        refused(|i| i.logits_indices[1] = 7),
        refused(|i| i.logits_indices[0] = -1),
    ];
    insta::assert_snapshot!(said.join("\n"));
}

#[test]
fn sequences_that_do_not_fit_each_other() {
    let said = [
        // Edges.
        refused(|i| i.cu_query_lens[0] = 1),
        refused(|i| i.cu_query_lens[2] = 6),
        refused(|i| i.cu_query_lens[1] = 0),
        refused(|i| i.cu_query_lens[1] = 2),
        refused(|i| i.seq_lens[1] = 5),
        refused(|i| i.num_decodes = 2),
        // Positions that are in range, but not those of the sequence's last tokens.
        refused(|i| i.positions[0] = 4),
        refused(|i| i.positions[3] = 6),
        refused(|i| i.positions.swap(1, 2)),
        // Blocks of tokens that came before, and of this step's.
        refused(|i| i.block_table[0] = -1),
        refused(|i| i.block_table[1] = -1),
        refused(|i| i.block_table[5] = -1),
        // A slot of another block; a slot of another position in the block; no slot.
        refused(|i| i.slot_mapping[0] = 10),
        refused(|i| i.slot_mapping[2] = 0),
        refused(|i| i.slot_mapping[6] = -1),
        refused(|i| i.block_table[4] = 6),
        // Rows of logits, and draws from them.
        refused(|i| i.logits_indices = vec![6, 0]),
        refused(|i| i.logits_indices = vec![6, 6]),
        refused(|i| i.samples = vec![draw(2, 0, 0)]),
    ];
    insta::assert_snapshot!(said.join("\n"));
}

#[test]
fn a_token_may_be_one_that_the_step_before_draws() {
    let sources =
        [TokenSource::Id(TokenId(0)), TokenSource::Id(TokenId(7)), TokenSource::Draw(0), TokenSource::Draw(2)];
    assert_eq!(sources.map(TokenSource::number), [0, 7, -1, -3]);
    assert_eq!(sources.map(|source| TokenSource::of(source.number())), sources);
    assert_eq!(TokenSource::of(i32::MIN), TokenSource::Draw(0x7fff_ffff));
    let mut inputs = inputs();
    assert!(matches!(inputs.known_ids(&[]), Cow::Borrowed(_)));
    inputs.token_ids[0] = TokenSource::Draw(1).number();
    let mut expected = inputs.token_ids.clone();
    expected[0] = 4;
    assert_eq!(inputs.known_ids(&[TokenId(9), TokenId(4)]), expected);
    // That step has to have so many draws.
    inputs.check(&program(true), KV_BLOCKS, 2).unwrap();
    let said = inputs.check(&program(true), KV_BLOCKS, 1).unwrap_err().to_string();
    insta::assert_snapshot!(said, @"step input `token_ids`[0] is -2, expected -1 to 19");
}
