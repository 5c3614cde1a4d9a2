//! A step's inputs as the device reads them: the bytes of the step block, with attention's lists of work items.

use std::mem::offset_of;

use mixtral_engine::score::{self, Found};
use mixtral_engine::{InputError, NonFinite, Program, SampleRequest, ScoreRequest, StepInputs};
use mixtral_kernels::StepBlock;
use mixtral_kernels::step_block::{
    Adjustment, Array, Asked, Best, DECODE_SPLIT, Drawn, Header, MAX_BEST, PREFILL_TILE, Sample, Scored,
};
use mixtral_model::{DType, TokenId};

/// Which parts of the block a step has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    /// Bytes from the block's start.
    pub(crate) prefix: usize,
    /// Bytes of the adjustments, from their start.
    pub(crate) adjustments: usize,
    /// Bytes of the score requests, from their start.
    pub(crate) scores: usize,
}

/// Writes inputs that passed their check into a block's bytes. `drawn` are the tokens of the step before, if the host knows
/// them. Otherwise the device takes those that it needs from its own draws.
///
/// # Errors
/// More draws, or more adjustments of logits, than the block has room for.
pub(crate) fn write(
    block: &StepBlock,
    program: &Program,
    inputs: &StepInputs<'_>,
    drawn: &[TokenId],
    bytes: &mut [u8],
) -> Result<Written, InputError> {
    let mut put = |array: Array, what: &'static str, flag: &'static str, size: usize, values: &[i32]| {
        let (start, room) = (block.offset(array), block.capacity(array));
        let len = size_of_val(values);
        if len > room {
            return Err(InputError::OverLimit { what, found: len / size, limit: room / size, flag });
        }
        let words = bytes[start..][..len].as_chunks_mut().0;
        words.iter_mut().zip(values).for_each(|(word, value)| *word = value.to_le_bytes());
        Ok(len)
    };
    let decode_items = decode_items(inputs);
    let prefill_items = prefill_items(inputs);
    let (samples, adjustments) = samples(program, inputs);
    let asked = if are_scored_by_host(block, program, inputs) { vec![] } else { asked(inputs) };
    let header = Header {
        num_tokens: int(inputs.num_tokens()),
        num_seqs: int(inputs.num_seqs()),
        num_decodes: int(inputs.num_decodes),
        num_logits: int(inputs.num_logits()),
        num_samples: int(samples.len()),
        num_decode_items: int(decode_items.len()),
        num_prefill_items: int(prefill_items.len()),
        num_scores: int(asked.len()),
        reserved: [0; 8],
    };
    let (tokens, seqs) = ("max-num-tokens", "max-batch-size");
    put(Array::Header, "counts", tokens, 4, &words_of_header(&header))?;
    put(Array::TokenIds, "tokens", tokens, 4, &inputs.known_ids(drawn))?;
    put(Array::Positions, "positions", tokens, 4, &inputs.positions)?;
    put(Array::SlotMapping, "slots", tokens, 4, &inputs.slot_mapping)?;
    put(Array::CuQueryLens, "sequences", seqs, 4, &inputs.cu_query_lens)?;
    put(Array::SeqLens, "sequences", seqs, 4, &inputs.seq_lens)?;
    put(Array::LogitsIndices, "rows of logits", tokens, 4, &inputs.logits_indices)?;
    put(Array::DecodeItems, "splits of decodes", seqs, 16, decode_items.as_flattened())?;
    put(Array::PrefillItems, "tiles of prompts", tokens, 8, prefill_items.as_flattened())?;
    let samples: Vec<_> = samples.iter().map(words_of_sample).collect();
    put(Array::Samples, "draws", seqs, size_of::<Sample>(), samples.as_flattened())?;
    let table = put(Array::BlockTable, "cache blocks", seqs, 4, &inputs.block_table)?;
    let adjustments: Vec<_> = adjustments.iter().map(|a| [a.token, a.code]).collect();
    let (what, flag) = ("penalized or banned tokens", "max-seq-len");
    let adjustments = put(Array::Adjustments, what, flag, size_of::<Adjustment>(), adjustments.as_flattened())?;
    let asked: Vec<_> = asked.iter().map(|a| [a.row, a.token, a.adjusted_by, a.best]).collect();
    let scores = put(Array::Scores, "scores", tokens, size_of::<Asked>(), asked.as_flattened())?;
    Ok(Written { prefix: block.offset(Array::BlockTable) + table, adjustments, scores })
}

/// Reads the draws out of `[samples]` of [`Drawn`].
pub(crate) fn drawn(bytes: &[u8]) -> Vec<Drawn> {
    let word = |bytes: &[u8], i: usize| [bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]];
    let one = |bytes: &[u8]| Drawn {
        token: i32::from_le_bytes(word(bytes, 0)),
        bad_token: i32::from_le_bytes(word(bytes, 1)),
        bad_value: f32::from_le_bytes(word(bytes, 2)),
        reserved: i32::from_le_bytes(word(bytes, 3)),
    };
    bytes.chunks_exact(size_of::<Drawn>()).map(one).collect()
}

/// Reads what the scores of a step are made of. Neither `scored` nor `best` holds more than the requests' parts.
pub(crate) fn found(inputs: &StepInputs<'_>, scored: &[u8], best: &[u8]) -> Vec<Result<Found, NonFinite>> {
    let u32_at = |bytes: &[u8], at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let f32_at = |bytes: &[u8], at: usize| f32::from_bits(u32_at(bytes, at));
    let lists = best.chunks_exact(MAX_BEST * size_of::<Best>());
    let one = |((request, scored), list): ((&ScoreRequest, &[u8]), &[u8])| {
        let at = |field: usize| u32_at(scored, field).cast_signed();
        if let Ok(token) = usize::try_from(at(offset_of!(Scored, bad_token))) {
            let (row, value) =
                (request.of.row(&inputs.samples).unwrap_or(0), f32_at(scored, offset_of!(Scored, bad_value)));
            return Err(NonFinite { row, token, value, dtype: DType::F32 });
        }
        let sum = offset_of!(Scored, sum);
        let count = usize::try_from(at(offset_of!(Scored, num_best))).unwrap_or(0);
        let pair = |pair: &[u8]| (TokenId(u32_at(pair, 0)), f32_at(pair, 4));
        let has_token = !matches!(request.of, score::Scored::Candidates(_));
        Ok(Found {
            max: f32_at(scored, offset_of!(Scored, max)),
            sum: u64::from(u32_at(scored, sum)) | u64::from(u32_at(scored, sum + 4)) << 32,
            logit: has_token.then(|| f32_at(scored, offset_of!(Scored, logit))),
            best: list.chunks_exact(size_of::<Best>()).take(count.min(MAX_BEST)).map(pair).collect(),
        })
    };
    inputs.scores.iter().zip(scored.chunks_exact(size_of::<Scored>())).zip(lists).map(one).collect()
}

/// Whether the host computes the step's scores from its logits: because it draws too, or because more are wanted than the
/// step block has room for.
pub(crate) fn are_scored_by_host(block: &StepBlock, program: &Program, inputs: &StepInputs<'_>) -> bool {
    host_draws(program, inputs)
        || inputs.scores.iter().any(|request| request.best > MAX_BEST)
        || inputs.scores.len() * size_of::<Asked>() > block.capacity(Array::Scores)
}

/// The score requests of a step that passed its check.
fn asked(inputs: &StepInputs<'_>) -> Vec<Asked> {
    let one = |request: &ScoreRequest| {
        let (token, adjusted_by) = match request.of {
            score::Scored::Token { token, .. } => (i32::try_from(token.0).unwrap_or(i32::MAX), -1),
            score::Scored::Draw(sample) => (-1 - int(sample), -1),
            score::Scored::Candidates(sample) => (0, int(sample)),
        };
        let row = int(request.of.row(&inputs.samples).unwrap_or(0));
        Asked { row, token, adjusted_by, best: int(request.best) }
    };
    inputs.scores.iter().map(one).collect()
}

/// The work items of decode attention, one for every split of every decode's sequence: sequence, split, tokens of the
/// sequence, 0. A sequence's lie together and ascend, with those that no window sees: the kernels count on that.
fn decode_items(inputs: &StepInputs<'_>) -> Vec<[i32; 4]> {
    let decodes = inputs.seq_lens.iter().take(inputs.num_decodes).enumerate();
    let splits = |len: i32| 0..index(len).div_ceil(DECODE_SPLIT);
    decodes.flat_map(|(seq, &len)| splits(len).map(move |s| [int(seq), int(s), len, 0])).collect()
}

/// The work items of prefill attention, one for every tile of every other sequence's new tokens: sequence, first token.
/// Tiles that see the most keys come first, so that no long one begins last.
fn prefill_items(inputs: &StepInputs<'_>) -> Vec<[i32; 2]> {
    let mut items = Vec::new();
    for (seq, edges) in inputs.cu_query_lens.windows(2).enumerate().skip(inputs.num_decodes) {
        let new = index(edges[1] - edges[0]);
        let past = index(inputs.seq_lens[seq]) - new;
        for first in (0..new).step_by(PREFILL_TILE) {
            let keys = past + (first + PREFILL_TILE).min(new);
            items.push((keys, [int(seq), int(first)]));
        }
    }
    items.sort_by_key(|&(keys, item)| (std::cmp::Reverse(keys), item));
    items.into_iter().map(|(_, item)| item).collect()
}

/// 2^40: the weight of the most likely token.
const ONE: f32 = 1_099_511_627_776.0;

/// The draws and their adjustments. The adjustments of one draw lie together, ascending by token.
fn samples(program: &Program, inputs: &StepInputs<'_>) -> (Vec<Sample>, Vec<Adjustment>) {
    let mut adjustments = Vec::new();
    let samples = inputs.samples.iter().map(|request| {
        let first = adjustments.len();
        if !is_drawn_by_host(program, request) {
            adjust(program.vocab_size, request, &mut adjustments);
        }
        Sample {
            row: int(request.row),
            bits: request.key.bits(),
            repetition_penalty: request.params.repetition_penalty,
            presence_penalty: request.params.presence_penalty,
            frequency_penalty: request.params.frequency_penalty,
            first_adjustment: int(first),
            num_adjustments: int(adjustments.len() - first),
            ..filters(program.vocab_size, request)
        }
    });
    (samples.collect(), adjustments)
}

/// Temperature, top-k, top-p and min-p in the integers of [`mixtral_engine::sampling`]. A filter that leaves no token,
/// or only the most likely one, becomes a greedy draw.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the casts of the definition, which saturate"
)]
fn filters(vocab_size: usize, request: &SampleRequest<'_>) -> Sample {
    let params = &request.params;
    let greedy = Sample { top_k: 1, temperature: 1.0, ..Sample::default() };
    if params.is_greedy() {
        return greedy;
    }
    let nucleus = params.top_p > 0.0 && params.top_p < 1.0;
    let top_p = if nucleus { (params.top_p * 16_777_216.0) as u32 } else { 0 };
    let min_weight = if params.min_p > 0.0 { (params.min_p * ONE).round_ties_even() as u64 } else { 0 };
    if nucleus && top_p == 0 || min_weight > ONE as u64 {
        return greedy;
    }
    let top_k = if params.top_k < vocab_size { int(params.top_k) } else { 0 };
    Sample { top_k, top_p, min_weight, temperature: params.temperature, ..Sample::default() }
}

/// Whether a step has to give more than what the device draws. Then it is finished before another one is launched.
pub(crate) fn is_more_than_drawn(program: &Program, inputs: &StepInputs<'_>) -> bool {
    inputs.return_logits || !inputs.scores.is_empty() || host_draws(program, inputs)
}

/// Whether the host needs a step's logits: to return them, to score them, or to draw from them.
pub(crate) fn needs_logits(block: &StepBlock, program: &Program, inputs: &StepInputs<'_>) -> bool {
    let host_scores = || !inputs.scores.is_empty() && are_scored_by_host(block, program, inputs);
    inputs.return_logits || host_draws(program, inputs) || host_scores()
}

fn host_draws(program: &Program, inputs: &StepInputs<'_>) -> bool {
    inputs.samples.iter().any(|sample| is_drawn_by_host(program, sample))
}

/// Whether the host draws, because the kernels that draw know no bias, and the step block has no room for so many banned
/// tokens.
pub(crate) fn is_drawn_by_host(program: &Program, request: &SampleRequest<'_>) -> bool {
    !request.bias.is_empty() || request.banned.len() > program.limits.max_seq_len
}

/// Appends the adjustments of a draw.
fn adjust(vocab_size: usize, request: &SampleRequest<'_>, adjustments: &mut Vec<Adjustment>) {
    let params = &request.params;
    let start = adjustments.len();
    let known = |token: u32| usize::try_from(token).is_ok_and(|t| t < vocab_size);
    let mut add = |token: u32, code: i32| {
        if let (true, Ok(token)) = (known(token), i32::try_from(token)) {
            adjustments.push(Adjustment { token, code });
        }
    };
    if params.has_penalties() {
        let (prompt, output) = request.tokens.split_at(request.prompt_len.min(request.tokens.len()));
        if params.repetition_penalty != 1.0 {
            prompt.iter().for_each(|token| add(token.0, Adjustment::SEEN));
        }
        output.iter().for_each(|token| add(token.0, Adjustment::SEEN | 1));
    }
    request.banned.iter().for_each(|token| add(token.0, Adjustment::BANNED));
    let mine = &mut adjustments[start..];
    mine.sort_unstable_by_key(|a| a.token);
    // One adjustment for each token, with all its flags and the number of its appearances in the output.
    let flags = Adjustment::SEEN | Adjustment::BANNED;
    let mut merged: Vec<Adjustment> = Vec::with_capacity(mine.len());
    for run in mine.chunk_by(|a, b| a.token == b.token) {
        let code = run.iter().fold(0, |code, a| (code | a.code & flags) + (a.code & !flags));
        merged.push(Adjustment { token: run[0].token, code });
    }
    // If the bans would leave no token, they are ignored.
    if merged.iter().filter(|a| a.code & Adjustment::BANNED != 0).count() >= vocab_size {
        merged.iter_mut().for_each(|a| a.code &= !Adjustment::BANNED);
    }
    merged.retain(|a| a.code != 0);
    adjustments.truncate(start);
    adjustments.extend(merged);
}

fn words_of_header(header: &Header) -> [i32; size_of::<Header>() / 4] {
    let Header {
        num_tokens,
        num_seqs,
        num_decodes,
        num_logits,
        num_samples,
        num_decode_items,
        num_prefill_items,
        num_scores,
        reserved,
    } = *header;
    let counts =
        [num_tokens, num_seqs, num_decodes, num_logits, num_samples, num_decode_items, num_prefill_items, num_scores];
    let mut words = [0; size_of::<Header>() / 4];
    words[..counts.len()].copy_from_slice(&counts);
    words[counts.len()..].copy_from_slice(&reserved);
    words
}

fn words_of_sample(sample: &Sample) -> [i32; size_of::<Sample>() / 4] {
    let halves = |value: u64| [0, 1].map(|i| i32::from_le_bytes(value.to_le_bytes().as_chunks().0[i]));
    let real = |value: f32| value.to_bits().cast_signed();
    let ([bits, high_bits], [min_weight, high_min_weight]) = (halves(sample.bits), halves(sample.min_weight));
    [
        bits,
        high_bits,
        min_weight,
        high_min_weight,
        sample.row,
        sample.top_k,
        sample.top_p.cast_signed(),
        real(sample.temperature),
        real(sample.repetition_penalty),
        real(sample.presence_penalty),
        real(sample.frequency_penalty),
        sample.first_adjustment,
        sample.num_adjustments,
        sample.reserved,
    ]
}

/// A count as the device reads it. Counts of a step that passed its check are below 2^31.
fn int(value: usize) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}

/// An index of a step's inputs. Those of a step that passed its check are not negative.
fn index(value: i32) -> usize {
    usize::try_from(value).unwrap_or(0)
}

#[cfg(test)]
mod tests;
