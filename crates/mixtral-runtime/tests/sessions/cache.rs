//! Blocks that are shared, copied and swapped: no history of requests changes what any of them gets.

use std::collections::BTreeMap;

use mixtral_engine::SamplingParams;
use mixtral_model::TokenId;
use mixtral_runtime::{Beams, EarlyStopping, Policy, Request, RequestId, SessionOptions};
use proptest::prelude::*;

use crate::harness::{ENOUGH_STEPS, Outcome, Setup, all_written, expected, finish, request, submit};

/// A request of a history.
#[derive(Clone, Debug)]
struct Asked {
    /// Which beginning its prompt has, how much of it, and how many tokens of its own follow.
    family: u32,
    common: u32,
    own: u32,
    output: usize,
    kind: u8,
    /// Whether a step runs before the next request comes.
    steps_first: bool,
}

fn asked() -> impl Strategy<Value = Asked> {
    (0u32..3, 0u32..18, 1u32..5, 1usize..8, 0u8..8, any::<bool>()).prop_map(
        |(family, common, own, output, kind, steps_first)| Asked { family, common, own, output, kind, steps_first },
    )
}

impl Asked {
    fn request(&self, seed: u32) -> Request {
        let mut prompt = request(1000 + self.family, self.common, 0).prompt;
        prompt.extend(request(seed, self.own, 0).prompt);
        let plain = Request { prompt, max_output_len: self.output, end_ids: vec![TokenId(4)], ..Request::default() };
        match self.kind {
            0 => Request { logprobs: Some(3), ..plain },
            1 => Request { prompt_logprobs: Some(2), max_output_len: self.output - 1, ..plain },
            2 => Request { context_logits: true, generation_logits: true, ..plain },
            3 => {
                let params = SamplingParams { top_k: 0, presence_penalty: 0.5, ..SamplingParams::default() };
                Request { params, seed: 7, prompt_index: seed, no_repeat_ngram_size: 2, min_output_len: 3, ..plain }
            }
            4 | 5 => {
                let early_stopping = if self.own.is_multiple_of(2) { EarlyStopping::Yes } else { EarlyStopping::No };
                let beams = Beams { width: 1 + self.own as usize % 3, early_stopping, ..Beams::default() };
                Request { beams: Some(beams), ..plain }
            }
            6 => {
                let params = SamplingParams { top_k: 0, ..SamplingParams::default() };
                let logit_bias = vec![(TokenId(4), 3.0)];
                Request { params, seed: 7, prompt_index: seed, logit_bias, min_output_len: 3, ..plain }
            }
            _ => plain,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, ..ProptestConfig::default() })]

    /// Submits, cancels, shares, copies and swaps, with steps of several stages and with steps launched ahead. The mock finds a slot that is read and holds another sequence's token,
    /// or that is written while a step under way uses it.
    #[test]
    fn sharing_and_swapping_change_nothing(
        (depth, ahead) in prop::sample::select(vec![(1, false), (2, false), (1, true)]),
        max_batch_size in 3usize..6,
        max_num_tokens in 3usize..24,
        kv_blocks in 9usize..24,
        policy in prop::sample::select(vec![Policy::GuaranteedNoEvict, Policy::MaxUtilization]),
        block_reuse in any::<bool>(),
        host_blocks in 0usize..60,
        max_prefill_tokens in prop::option::of(1usize..8),
        requests in prop::collection::vec(asked(), 1..14),
        cancellations in prop::collection::vec(prop::option::weighted(0.1, any::<prop::sample::Index>()), 30),
    ) {
        let options = SessionOptions { policy, block_reuse, host_blocks, max_prefill_tokens, overlap: true };
        let setup = Setup { depth, ahead, max_batch_size, max_num_tokens, max_num_logits: 6, kv_blocks, options, ..Setup::default() };
        let (mut session, _) = setup.session();
        let (mut asked, mut outcomes) = (BTreeMap::new(), BTreeMap::<RequestId, Outcome>::new());
        let mut cancelled = Vec::new();
        let mut waiting = requests.iter().zip(0..);
        let mut cancellations = cancellations.into_iter();
        let (mut more, mut steps) = (true, 0);
        while more || !session.is_idle() {
            steps += 1;
            prop_assert!(steps < ENOUGH_STEPS, "the session does not come to an end");
            more = false;
            for (next, seed) in waiting.by_ref() {
                let request = next.request(seed);
                // Beams may need more blocks than there are.
                if let Ok(id) = session.submit(request.clone()) {
                    asked.insert(id, request);
                }
                if next.steps_first {
                    more = true;
                    break;
                }
            }
            if let (Some(pick), false) = (cancellations.next().flatten(), asked.is_empty()) {
                let id = *asked.keys().nth(pick.index(asked.len())).unwrap();
                if session.cancel(id) {
                    cancelled.push(id);
                }
            }
            for event in session.step().unwrap() {
                prop_assert!(!cancelled.contains(&event.id), "an event of {}, which was cancelled", event.id);
                outcomes.entry(event.id).or_default().add(event);
            }
        }
        let stats = session.stats();
        prop_assert_eq!((session.free_blocks(), stats.running, stats.swapped, stats.waiting), (kv_blocks, 0, 0, 0));
        prop_assert!(cancelled.is_empty() <= (stats.counters.swapped_in == stats.counters.swapped_out));
        for (id, request) in asked.iter().filter(|(id, _)| !cancelled.contains(id)) {
            prop_assert_eq!(outcomes.remove(id).unwrap_or_default(), expected(request), "request {}", id);
        }
    }
}

const REUSE: SessionOptions = SessionOptions {
    policy: Policy::GuaranteedNoEvict,
    block_reuse: true,
    host_blocks: 0,
    max_prefill_tokens: None,
    overlap: true,
};

#[test]
fn a_prompt_that_begins_like_another_skips_its_full_blocks() {
    let setup = Setup { options: REUSE, max_batch_size: 1, ..Setup::default() };
    let (mut session, steps) = setup.session();
    let first = request(0, 10, 2);
    let longer = Request { prompt: [&first.prompt[..], &request(1, 5, 1).prompt].concat(), ..first.clone() };
    let differs = Request { prompt: [&first.prompt[..5], &request(2, 6, 1).prompt].concat(), ..first.clone() };
    // Of a prompt that is all there, the last block is computed again, since its last token gives the next one.
    let shorter = Request { prompt: first.prompt[..8].to_vec(), ..first.clone() };
    for request in [&first, &longer, &differs, &shorter] {
        submit(&mut session, request);
    }
    finish(&mut session);
    assert_eq!(
        all_written(&steps),
        ["| 0..10", "10..11 |", "| 8..15", "15..16 |", "| 4..11", "11..12 |", "| 4..8", "8..9 |"]
    );
    let counters = session.stats().counters;
    assert_eq!((counters.prompt_tokens, counters.cached_tokens), (10 + 15 + 11 + 8, 8 + 4 + 4));
    assert_eq!(session.stats().used_blocks, 0);
    assert!(session.stats().cached_blocks >= 3);
}

#[test]
fn a_prompt_waits_for_a_beginning_that_is_being_computed() {
    let setup = Setup { options: REUSE, max_num_tokens: 8, ..Setup::default() };
    let (mut session, steps) = setup.session();
    let common = request(0, 9, 1);
    let other = |seed| Request { prompt: [&common.prompt[..], &request(seed, 2, 1).prompt].concat(), ..common.clone() };
    for request in [&common, &other(1), &other(2), &request(3, 2, 1)] {
        submit(&mut session, request);
    }
    finish(&mut session);
    // Only then is the rest of all three computed. The last request has nothing to wait for but its turn.
    assert_eq!(all_written(&steps), ["| 0..8", "| 8..9 8..11 8..11 0..1", "| 1..2"]);
}

#[test]
fn a_prompt_whose_tokens_are_all_wanted_is_computed() {
    let (mut session, steps) = Setup { options: REUSE, max_batch_size: 1, ..Setup::default() }.session();
    let plain = request(0, 10, 1);
    submit(&mut session, &plain);
    submit(&mut session, &Request { prompt_logprobs: Some(0), max_output_len: 0, ..plain.clone() });
    let outcomes = finish(&mut session);
    assert_eq!(all_written(&steps), ["| 0..10", "| 0..10"]);
    assert_eq!(outcomes[&RequestId(1)].prompt_logprobs.len(), 9);
}

#[test]
fn the_youngest_makes_room_and_comes_back() {
    let options = SessionOptions { policy: Policy::MaxUtilization, host_blocks: 8, ..SessionOptions::default() };
    let setup = Setup { kv_blocks: 4, options, ..Setup::default() };
    let (mut session, steps) = setup.session();
    let requests = [request(0, 3, 10), request(1, 3, 10)];
    requests.iter().for_each(|request| _ = submit(&mut session, request));
    let outcomes = finish(&mut session);
    for (outcome, request) in outcomes.values().zip(&requests) {
        assert_eq!(outcome, &expected(request));
    }
    let steps = all_written(&steps);
    // Blocks of four tokens. Each takes its second at position 4. At position 8 there is none for the first's third, so
    // the second goes, and comes back when the first has ended.
    assert_eq!(steps[..2], ["| 0..3 0..3", "3..4 3..4 |"]);
    assert_eq!(steps[6..8], ["8..9 |", "9..10 |"]);
    assert_eq!(steps.last().unwrap(), "11..12 |");
    let counters = session.stats().counters;
    assert_eq!((counters.swapped_out, counters.swapped_in), (2, 2));
}

#[test]
fn decodes_wait_for_no_more_of_a_prompt_than_is_allowed() {
    let options = SessionOptions { max_prefill_tokens: Some(3), ..SessionOptions::default() };
    let (mut session, steps) = Setup { options, ..Setup::default() }.session();
    submit(&mut session, &request(0, 9, 5));
    session.step().unwrap();
    submit(&mut session, &request(1, 8, 2));
    finish(&mut session);
    // A prompt alone is not bounded.
    assert_eq!(all_written(&steps)[..4], ["| 0..9", "9..10 | 0..3", "10..11 | 3..6", "11..12 | 6..8"]);
}
