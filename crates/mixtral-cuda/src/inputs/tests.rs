use std::mem::offset_of;

use mixtral_engine::{Limits, RandomKey, SamplingParams};
use mixtral_model::{DType, TokenId};
use mixtral_testkit::assembly::Assembly;

use super::*;

fn program() -> Program {
    let mut program = Assembly::new(DType::Bf16).program;
    program.vocab_size = 29;
    program.limits =
        Limits { max_batch_size: 4, max_num_tokens: 200, max_seq_len: 600, max_num_logits: 4, block_size: 16 };
    program
}

/// Two decodes, of sequences of 257 tokens and of 1, and two chunks of prompts: 68 tokens after 32, and 130 after none.
/// Three draws.
fn inputs() -> StepInputs<'static> {
    let lens = [257, 1, 100, 130];
    let news = [1, 1, 68, 130];
    let mut edges = vec![0];
    let mut positions = Vec::new();
    for (len, new) in lens.into_iter().zip(news) {
        edges.push(edges[edges.len() - 1] + new);
        positions.extend(len - new..len);
    }
    let n = positions.len();
    let limits = program().limits;
    let (width, block_size) = (limits.max_blocks_per_seq(), int(limits.block_size));
    let block_table: Vec<i32> = (0..int(4 * width)).map(|i| i % 40).collect();
    let slot = |seq: usize, position: i32| {
        let block = block_table[seq * width + usize::try_from(position / block_size).unwrap()];
        block * block_size + position % block_size
    };
    let sequences = news.into_iter().enumerate().flat_map(|(seq, new)| (0..new).map(move |_| seq));
    StepInputs {
        num_decodes: 2,
        token_ids: (0..int(n)).map(|i| i % 29).collect(),
        slot_mapping: sequences.zip(&positions).map(|(seq, &position)| slot(seq, position)).collect(),
        positions,
        block_table,
        seq_lens: lens.to_vec(),
        cu_query_lens: edges,
        logits_indices: vec![0, 1, 69],
        ..StepInputs::default()
    }
}

fn request(params: SamplingParams) -> SampleRequest<'static> {
    let key = RandomKey { seed: 1, prompt: 2, hypothesis: 3, position: 4 };
    SampleRequest { row: 1, params, key, tokens: (&[]).into(), prompt_len: 0, bias: vec![], banned: vec![] }
}

fn drawn_freely() -> SamplingParams {
    SamplingParams { top_k: 0, ..SamplingParams::default() }
}

fn read(block: &StepBlock, bytes: &[u8], array: Array, n: usize) -> Vec<i32> {
    let words = bytes[block.offset(array)..][..4 * n].chunks_exact(4);
    words.map(|word| i32::from_le_bytes(word.try_into().unwrap())).collect()
}

#[test]
fn every_array_lies_where_the_block_says() {
    let (program, inputs) = (program(), inputs());
    inputs.check(&program, 40, 0).unwrap();
    let block = StepBlock::new(&program);
    let mut bytes = vec![0xee; block.bytes()];
    let written = write(&block, &program, &inputs, &[], &mut bytes).unwrap();
    let n = inputs.num_tokens();
    // tokens, sequences, decodes, logits, samples, splits (2 + 1), tiles (2 + 3)
    assert_eq!(read(&block, &bytes, Array::Header, 16), [200, 4, 2, 3, 0, 3, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(read(&block, &bytes, Array::TokenIds, n), inputs.token_ids);
    assert_eq!(read(&block, &bytes, Array::Positions, n), inputs.positions);
    assert_eq!(read(&block, &bytes, Array::SlotMapping, n), inputs.slot_mapping);
    assert_eq!(read(&block, &bytes, Array::CuQueryLens, 5), inputs.cu_query_lens);
    assert_eq!(read(&block, &bytes, Array::SeqLens, 4), inputs.seq_lens);
    assert_eq!(read(&block, &bytes, Array::LogitsIndices, 3), inputs.logits_indices);
    let table = inputs.block_table.len();
    assert_eq!(read(&block, &bytes, Array::BlockTable, table), inputs.block_table);
    assert_eq!(written, Written { prefix: block.offset(Array::BlockTable) + 4 * table, adjustments: 0, scores: 0 });
    // No upload reaches what the device has drawn.
    assert!(written.prefix <= block.offset(Array::Adjustments));
    assert!(block.offset(Array::Drawn) >= block.offset(Array::Adjustments) + block.capacity(Array::Adjustments));
}

#[test]
fn the_device_takes_its_own_draws_unless_the_host_knows_them() {
    let (program, mut inputs) = (program(), inputs());
    let block = StepBlock::new(&program);
    let mut bytes = vec![0; block.bytes()];
    inputs.token_ids[..2].copy_from_slice(&[-2, -1]);
    write(&block, &program, &inputs, &[], &mut bytes).unwrap();
    assert_eq!(read(&block, &bytes, Array::TokenIds, 3), [-2, -1, 2]);
    write(&block, &program, &inputs, &[TokenId(7), TokenId(8)], &mut bytes).unwrap();
    assert_eq!(read(&block, &bytes, Array::TokenIds, 3), [8, 7, 2]);
}

#[test]
fn the_host_needs_logits_for_what_the_device_does_not_make() {
    let program = program();
    let asks = |change: &dyn Fn(&mut StepInputs<'static>)| {
        let mut inputs = StepInputs { samples: vec![request(drawn_freely())], ..inputs() };
        change(&mut inputs);
        (needs_logits(&StepBlock::new(&program), &program, &inputs), is_more_than_drawn(&program, &inputs))
    };
    let scores = |best| vec![ScoreRequest { of: score::Scored::Draw(0), best }];
    assert_eq!(asks(&|_| {}), (false, false));
    assert_eq!(asks(&|inputs| inputs.samples[0].banned = vec![TokenId(3)]), (false, false));
    assert_eq!(asks(&|inputs| inputs.return_logits = true), (true, true));
    assert_eq!(asks(&|inputs| inputs.scores = scores(MAX_BEST)), (false, true));
    assert_eq!(asks(&|inputs| inputs.scores = scores(MAX_BEST + 1)), (true, true));
    assert_eq!(asks(&|inputs| inputs.samples[0].bias = vec![(TokenId(3), 1.0)]), (true, true));
}

#[test]
fn attention_has_every_split_in_order_and_the_longest_tile_first() {
    let (program, inputs) = (program(), inputs());
    let block = StepBlock::new(&program);
    let mut bytes = vec![0; block.bytes()];
    write(&block, &program, &inputs, &[], &mut bytes).unwrap();
    // 257 tokens are two splits; a decode of one token is one.
    assert_eq!(read(&block, &bytes, Array::DecodeItems, 12), [0, 0, 257, 0, 0, 1, 257, 0, 1, 0, 1, 0]);
    // Keys seen: 3/128 → 130, 3/64 → 128, 2/64 → 100, 2/0 → 96, 3/0 → 64.
    assert_eq!(read(&block, &bytes, Array::PrefillItems, 10), [3, 128, 3, 64, 2, 64, 2, 0, 3, 0]);
}

#[test]
fn the_fullest_step_fits() {
    let program = program();
    let block = StepBlock::new(&program);
    let (limits, width) = (program.limits, program.limits.max_blocks_per_seq());
    // Every sequence a decode of the greatest length.
    let n = limits.max_batch_size;
    let decodes = StepInputs {
        num_decodes: n,
        token_ids: vec![0; n],
        positions: vec![599; n],
        slot_mapping: vec![0; n],
        block_table: vec![0; n * width],
        seq_lens: vec![600; n],
        cu_query_lens: (0..=int(n)).collect(),
        logits_indices: (0..int(n)).collect(),
        samples: vec![request(drawn_freely()); n],
        ..StepInputs::default()
    };
    // Chunks whose last tiles are nearly empty.
    let edges = vec![0, 65, 130, 195, 200];
    let prompts = StepInputs {
        num_decodes: 0,
        token_ids: vec![0; 200],
        positions: vec![0; 200],
        slot_mapping: vec![0; 200],
        seq_lens: vec![65, 65, 65, 5],
        cu_query_lens: edges,
        ..decodes.clone()
    };
    for inputs in [decodes, prompts] {
        write(&block, &program, &inputs, &[], &mut vec![0; block.bytes()]).unwrap();
    }
}

#[test]
fn a_sample_has_the_layout_of_the_kernels() {
    assert_eq!((size_of::<Sample>(), size_of::<Header>(), size_of::<Drawn>()), (56, 64, 16));
    let sample = Sample {
        bits: 1 << 40 | 1,
        min_weight: 1 << 41 | 2,
        row: 3,
        top_k: 4,
        top_p: 5,
        temperature: 6.0,
        repetition_penalty: 7.0,
        presence_penalty: 8.0,
        frequency_penalty: 9.0,
        first_adjustment: 10,
        num_adjustments: 11,
        reserved: 12,
    };
    let words = words_of_sample(&sample);
    assert_eq!(size_of_val(&words), size_of::<Sample>());
    let word = |at: usize| words[at / 4].cast_unsigned();
    let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
    assert_eq!(long(offset_of!(Sample, bits)), sample.bits);
    assert_eq!(long(offset_of!(Sample, min_weight)), sample.min_weight);
    assert_eq!(word(offset_of!(Sample, row)), 3);
    assert_eq!(word(offset_of!(Sample, top_k)), 4);
    assert_eq!(word(offset_of!(Sample, top_p)), 5);
    assert_eq!(word(offset_of!(Sample, temperature)), 6.0f32.to_bits());
    assert_eq!(word(offset_of!(Sample, repetition_penalty)), 7.0f32.to_bits());
    assert_eq!(word(offset_of!(Sample, presence_penalty)), 8.0f32.to_bits());
    assert_eq!(word(offset_of!(Sample, frequency_penalty)), 9.0f32.to_bits());
    assert_eq!(word(offset_of!(Sample, first_adjustment)), 10);
    assert_eq!(word(offset_of!(Sample, num_adjustments)), 11);
    assert_eq!(word(offset_of!(Sample, reserved)), 12);
}

#[test]
fn filters_are_the_definitions_integers() {
    let of = |params: SamplingParams| {
        let Sample { top_k, top_p, min_weight, temperature, .. } = filters(29, &request(params));
        (top_k, top_p, min_weight, temperature)
    };
    let free = drawn_freely();
    assert_eq!(of(SamplingParams::default()), (1, 0, 0, 1.0));
    assert_eq!(of(SamplingParams { temperature: 0.0, ..free }), (1, 0, 0, 1.0));
    assert_eq!(of(SamplingParams { temperature: 0.7, ..free }), (0, 0, 0, 0.7));
    assert_eq!(of(SamplingParams { top_k: 28, ..free }), (28, 0, 0, 1.0));
    // A top-k of the whole vocabulary and a top-p of 1 filter nothing.
    assert_eq!(of(SamplingParams { top_k: 29, top_p: 1.0, ..free }), (0, 0, 0, 1.0));
    assert_eq!(of(SamplingParams { top_p: 0.75, ..free }), (0, 3 << 22, 0, 1.0));
    assert_eq!(of(SamplingParams { min_p: 0.5, ..free }), (0, 0, 1 << 39, 1.0));
    // The smallest nucleus holds only the most likely token.
    assert_eq!(of(SamplingParams { top_p: 1e-9, ..free }), (1, 0, 0, 1.0));
}

#[test]
fn adjustments_are_one_a_token_with_its_count() {
    let tokens = [3, 5, 7, 5, 5, 100].map(TokenId).to_vec();
    let all = |params: SamplingParams, banned: &[u32]| {
        let mut adjustments = vec![Adjustment { token: 9, code: 9 }];
        let banned = banned.iter().map(|&t| TokenId(t)).collect();
        let request =
            SampleRequest { tokens: tokens.clone().into(), prompt_len: 2, bias: vec![], banned, ..request(params) };
        adjust(29, &request, &mut adjustments);
        assert_eq!(adjustments.remove(0), Adjustment { token: 9, code: 9 });
        adjustments.into_iter().map(|a| (a.token, a.code)).collect::<Vec<_>>()
    };
    let (seen, banned) = (Adjustment::SEEN, Adjustment::BANNED);
    let repetition = SamplingParams { repetition_penalty: 1.2, ..drawn_freely() };
    assert_eq!(all(repetition, &[]), [(3, seen), (5, seen | 2), (7, seen | 1)]);
    // Only the repetition penalty looks at tokens of the prompt.
    let presence = SamplingParams { presence_penalty: 0.5, ..drawn_freely() };
    assert_eq!(all(presence, &[3, 7, 7, 400]), [(3, banned), (5, seen | 2), (7, seen | banned | 1)]);
    assert_eq!(all(drawn_freely(), &[4]), [(4, banned)]);
    // A ban of every token is ignored.
    let everything: Vec<u32> = (0..29).collect();
    assert_eq!(all(drawn_freely(), &everything), []);
    assert_eq!(all(repetition, &everything), [(3, seen), (5, seen | 2), (7, seen | 1)]);
}

/// A constraint may ban nearly the whole vocabulary, for which the step block has no room in every engine.
#[test]
fn a_draw_with_many_bans_is_the_hosts() {
    let program = program();
    let most = program.limits.max_seq_len;
    let with = |bans: usize, bias: &[(TokenId, f32)]| {
        let banned = (0..bans).map(|_| TokenId(1)).collect();
        let request = SampleRequest { banned, bias: bias.to_vec(), ..request(drawn_freely()) };
        let inputs = StepInputs { samples: vec![request.clone()], ..StepInputs::default() };
        (is_drawn_by_host(&program, &request), samples(&program, &inputs).1.len())
    };
    assert_eq!(with(most, &[]), (false, 1));
    assert_eq!(with(most + 1, &[]), (true, 0));
    assert_eq!(with(1, &[(TokenId(2), 1.0)]), (true, 0));
}

#[test]
fn more_draws_than_the_block_holds_are_refused() {
    let program = program();
    let block = StepBlock::new(&program);
    let samples = vec![request(drawn_freely()); 5];
    let inputs = StepInputs { samples, ..inputs() };
    let error = write(&block, &program, &inputs, &[], &mut vec![0; block.bytes()]).unwrap_err();
    assert_eq!(error, InputError::OverLimit { what: "draws", found: 5, limit: 4, flag: "max-batch-size" });
}

#[test]
fn draws_are_read_back() {
    let infinite = f32::INFINITY.to_bits().cast_signed();
    let bytes = [17, -1, 0, 0, 0, 3, infinite, 0].map(i32::to_le_bytes).concat();
    let expected = [
        Drawn { token: 17, bad_token: -1, bad_value: 0.0, reserved: 0 },
        Drawn { token: 0, bad_token: 3, bad_value: f32::INFINITY, reserved: 0 },
    ];
    assert_eq!(drawn(&bytes), expected);
}

#[test]
fn scores_are_asked_for_and_read_as_they_are_defined() {
    let program = program();
    let block = StepBlock::new(&program);
    let mut bytes = vec![0; block.bytes()];
    let asked = |of, best| ScoreRequest { of, best };
    let scores = vec![
        asked(score::Scored::Token { row: 2, token: TokenId(28) }, 0),
        asked(score::Scored::Draw(1), 20),
        asked(score::Scored::Candidates(1), 4),
    ];
    let samples = vec![request(SamplingParams::default()); 2];
    let mut inputs = StepInputs { scores, samples, ..inputs() };
    let written = write(&block, &program, &inputs, &[], &mut bytes).unwrap();
    assert_eq!(written.scores, 48);
    assert_eq!(read(&block, &bytes, Array::Scores, 12), [2, 28, -1, 0, 1, -2, -1, 20, 1, 0, 1, 4]);
    let counts = read(&block, &bytes, Array::Header, 16);
    assert_eq!(counts[offset_of!(Header, num_scores) / 4], 3);

    // What a device would answer: the first row's sum has more than 32 bits, and the last row is not finite.
    let scored = |sum: u64, [max, logit]: [f32; 2], bad: (i32, f32), count: i32| {
        let words = [max.to_bits(), logit.to_bits(), bad.0.cast_unsigned(), bad.1.to_bits(), count.cast_unsigned(), 0];
        [&sum.to_le_bytes()[..], &words.map(u32::to_le_bytes).concat()].concat()
    };
    let answers = [
        scored(3 << 40, [2.0, 1.5], (-1, 0.0), 0),
        scored(1 << 40, [2.0, 2.0], (-1, 0.0), 2),
        scored(0, [0.0, 0.0], (7, f32::INFINITY), 0),
    ];
    let mut best = vec![0; 3 * MAX_BEST * size_of::<Best>()];
    let list = &mut best[MAX_BEST * size_of::<Best>()..];
    for (i, (token, logit)) in [(5i32, 2.0f32), (3, -1.0)].into_iter().enumerate() {
        list[8 * i..][..8].copy_from_slice(&[token.to_le_bytes(), logit.to_le_bytes()].concat());
    }
    let found = found(&inputs, &answers.concat(), &best);
    assert_eq!(found[0], Ok(Found { max: 2.0, sum: 3 << 40, logit: Some(1.5), best: vec![] }));
    let likely = vec![(TokenId(5), 2.0), (TokenId(3), -1.0)];
    assert_eq!(found[1], Ok(Found { max: 2.0, sum: 1 << 40, logit: Some(2.0), best: likely }));
    assert_eq!(found[2].as_ref().map_err(|wrong| (wrong.row, wrong.token)), Err((1, 7)));

    // Draws with a bias are the host's, and scores beside them; so are lists that are too long for the block.
    assert!(!are_scored_by_host(&block, &program, &inputs));
    inputs.scores[1].best = MAX_BEST + 1;
    assert!(are_scored_by_host(&block, &program, &inputs));
    inputs.scores[1].best = 1;
    inputs.samples[0].bias = vec![(TokenId(1), 1.0)];
    assert!(are_scored_by_host(&block, &program, &inputs));
    assert_eq!(write(&block, &program, &inputs, &[], &mut bytes).unwrap().scores, 0);
}
