//! The outputs of sessions: tokens, logits, ends, refusals, figures and failures.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mixtral_engine::BackendError;
use mixtral_model::TokenId;
use mixtral_runtime::session::SessionError;
use mixtral_runtime::{FinishReason, Refusal, Request, RequestId};
use proptest::prelude::*;

use crate::harness::{ENOUGH_STEPS, Outcome, Setup, alone, curious, expected, finish, request, submit};
use crate::mock::VOCAB;

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Requests come at any time, and some are cancelled at any time. The others get the same as alone, the cancelled
    /// ones get the beginning of that, and no block stays allocated.
    #[test]
    fn company_chunks_and_cancellations_change_nothing(
        depth in 1usize..4,
        max_batch_size in 1usize..6,
        max_num_tokens in 1usize..20,
        max_num_logits in 1usize..8,
        kv_blocks in 8usize..20,
        requests in prop::collection::vec((1u32..20, 1usize..10, any::<bool>(), any::<bool>()), 1..20),
        cancellations in prop::collection::vec(prop::option::weighted(0.2, any::<prop::sample::Index>()), 40),
    ) {
        let setup = Setup { depth, max_batch_size, max_num_tokens, max_num_logits, kv_blocks, ..Setup::default() };
        let (mut session, _) = setup.session();
        let (mut asked, mut outcomes) = (BTreeMap::new(), BTreeMap::<RequestId, Outcome>::new());
        let mut cancelled = Vec::new();
        let mut waiting = requests.into_iter().enumerate();
        let mut cancellations = cancellations.into_iter();
        let (mut more, mut steps) = (true, 0);
        while more || !session.is_idle() {
            steps += 1;
            prop_assert!(steps < ENOUGH_STEPS, "the session does not come to an end");
            more = false;
            for (seed, (prompt, output, wants_all, steps_first)) in waiting.by_ref() {
                let make = if wants_all { curious } else { request };
                let asks = make(u32::try_from(seed).unwrap(), prompt, output);
                asked.insert(submit(&mut session, &asks), asks);
                if steps_first {
                    more = true;
                    break;
                }
            }
            if let Some(pick) = cancellations.next().flatten() {
                let id = *asked.keys().nth(pick.index(asked.len())).unwrap();
                let ended = cancelled.contains(&id) || outcomes.get(&id).is_some_and(|outcome| outcome.reason.is_some());
                prop_assert_eq!(session.cancel(id), !ended);
                prop_assert!(!session.cancel(id));
                cancelled.extend((!ended).then_some(id));
            }
            for event in session.step().unwrap() {
                prop_assert!(!cancelled.contains(&event.id), "an event of {}, which was cancelled", event.id);
                outcomes.entry(event.id).or_default().add(event);
            }
        }
        prop_assert_eq!(session.free_blocks(), kv_blocks);
        for (id, asks) in &asked {
            let (expected, found) = (expected(asks), outcomes.remove(id).unwrap_or_default());
            if cancelled.contains(id) {
                prop_assert!(expected.tokens.starts_with(&found.tokens));
                prop_assert!(expected.context_logits.starts_with(&found.context_logits));
                prop_assert!(expected.generation_logits.starts_with(&found.generation_logits));
            } else {
                prop_assert_eq!(found, expected, "request {}", id);
            }
        }
    }
}

#[test]
fn a_sequence_ends_with_an_end_id_or_at_its_length() {
    let asks = request(0, 3, 6);
    let tokens = expected(&asks).tokens;
    let at = |token| 1 + tokens.iter().position(|&t| t == token).unwrap();
    for (end_ids, len, reason) in [
        (vec![], 6, FinishReason::Length),
        (vec![tokens[2]], at(tokens[2]), FinishReason::EndId),
        (vec![tokens[4], tokens[1]], at(tokens[1]), FinishReason::EndId),
        // The end id is the last token that the request may have.
        (vec![tokens[5]], at(tokens[5]), FinishReason::EndId),
        (vec![TokenId(32)], 6, FinishReason::Length),
    ] {
        let found = alone(&Setup::default(), &Request { end_ids, ..asks.clone() });
        assert_eq!((found.tokens.as_slice(), found.reason), (&tokens[..len], Some(reason)));
    }
}

#[test]
fn logits_come_to_those_who_asked() {
    for (generation_logits, context_logits) in [(false, false), (true, false), (false, true), (true, true)] {
        let asks = Request { generation_logits, context_logits, ..request(0, 7, 3) };
        // Another request asks for the logits that this one does not ask for.
        let other = Request { generation_logits: !generation_logits, context_logits: true, ..request(1, 6, 4) };
        let (mut session, _) = Setup { max_num_tokens: 5, ..Setup::default() }.session();
        let ids = [&asks, &other].map(|asks| submit(&mut session, asks));
        let outcomes = finish(&mut session);
        assert_eq!([&outcomes[&ids[0]], &outcomes[&ids[1]]], [&expected(&asks), &expected(&other)]);
        assert_eq!(outcomes[&ids[0]].context_logits.len(), if context_logits { 7 * VOCAB } else { 0 });
        assert_eq!(outcomes[&ids[0]].generation_logits.len(), if generation_logits { 3 * VOCAB } else { 0 });
    }
}

#[test]
fn requests_are_refused_that_can_never_be_answered() {
    let setup = Setup { kv_blocks: 6, gather_context_logits: false, ..Setup::default() };
    let (mut session, _) = setup.session();
    let with_token = |token: u32| {
        let mut asks = request(0, 5, 1);
        asks.prompt[3] = TokenId(token);
        asks
    };
    let vocab = u32::try_from(VOCAB).unwrap();
    let refusals = [
        (request(0, 0, 3), Refusal::EmptyPrompt),
        (request(0, 3, 0), Refusal::NoOutput),
        (request(0, 27, 4), Refusal::TooLong { prompt: 27, output: 4, limit: 30 }),
        (request(0, 1, usize::MAX), Refusal::TooLong { prompt: 1, output: usize::MAX, limit: 30 }),
        (with_token(vocab), Refusal::UnknownToken { token: TokenId(vocab), position: 3, vocab_size: VOCAB }),
        (request(0, 20, 5), Refusal::TooFewBlocks { needed: 7, available: 6 }),
        (Request { context_logits: true, ..request(0, 3, 3) }, Refusal::NoContextLogits),
    ];
    for (asks, refusal) in refusals {
        assert_eq!(session.submit(asks), Err(refusal));
    }
    assert!(session.is_idle(), "what is refused is not queued");
    // Requests exactly at these limits are accepted, and refused requests have taken no numbers.
    for (asks, id) in [with_token(vocab - 1), request(0, 20, 4)].iter().zip(0..) {
        assert_eq!(session.submit(asks.clone()), Ok(RequestId(id)));
    }
    assert_eq!(finish(&mut session).len(), 2);
    assert_eq!(alone(&Setup::default(), &request(0, 27, 3)).tokens.len(), 3);
    assert_eq!(RequestId(7).to_string(), "7");
}

#[test]
fn a_request_is_cancelled_in_every_state() {
    // One sequence at a time, of 3 blocks, of which the prompt fills two. The prompt takes two steps, of which the second
    // draws, and its decodes two more.
    let setup = Setup { max_batch_size: 1, max_num_tokens: 4, kv_blocks: 4, ..Setup::default() };
    for depth in 1..4 {
        for steps in 0..=4 {
            let (mut session, _) = Setup { depth, ..setup.clone() }.session();
            let [first, second] = [0, 1].map(|seed| submit(&mut session, &request(seed, 8, 3)));
            (0..steps).for_each(|_| _ = session.step().unwrap());
            assert_eq!(session.cancel(first), steps < 4, "depth {depth}, after {steps} steps");
            assert!(!session.cancel(first), "twice");
            // The second half of the prompt is written while the first is waited for.
            let under_way = depth > 1 && steps == 1;
            assert_eq!(session.free_blocks(), if under_way { 2 } else { 4 }, "depth {depth}, after {steps} steps");
            let outcomes = finish(&mut session);
            assert_eq!(outcomes, BTreeMap::from([(second, expected(&request(1, 8, 3)))]));
            assert_eq!(session.free_blocks(), 4);
        }
    }
    // Cancels a request in the queue, while another one runs.
    let (mut session, _) = setup.session();
    let [first, second, third] = [0, 1, 2].map(|seed| submit(&mut session, &request(seed, 8, 3)));
    session.step().unwrap();
    assert!(session.cancel(second) && !session.cancel(second));
    assert_eq!(finish(&mut session).into_keys().collect::<Vec<_>>(), [first, third]);
    assert!(!session.cancel(RequestId(3)), "never submitted");
}

#[test]
fn a_step_says_what_it_was_made_of() {
    for depth in [1, 2] {
        let (mut session, steps) = Setup { depth, max_num_tokens: 6, ..Setup::default() }.session();
        assert!(session.is_idle() && session.step().unwrap().is_empty(), "an idle session does nothing");
        assert_eq!(steps.lock().unwrap().len(), 0);
        for (seed, prompt) in [(0, 4), (1, 7)] {
            submit(&mut session, &request(seed, prompt, 3));
        }
        let (started, mut sum, mut done) = (Instant::now(), Duration::ZERO, 0);
        while !session.is_idle() {
            assert!(session.step().is_ok() && done < ENOUGH_STEPS);
            let (stats, steps) = (session.last_step(), steps.lock().unwrap());
            let made_of = (stats.decode_tokens, stats.prefill_tokens);
            assert_eq!(made_of, (steps[done].num_decodes, steps[done].num_tokens() - steps[done].num_decodes));
            assert!(stats.time > Duration::ZERO);
            sum += stats.time;
            done += 1;
        }
        // If steps overlap, no time is counted twice.
        assert!(sum <= started.elapsed(), "{sum:?}");
        assert_eq!(done, steps.lock().unwrap().len());
        assert_eq!(session.expert_counts().unwrap(), [[3, 4], [5, 6]]);
        assert_eq!(session.op_times(), [Duration::from_secs(done as u64)]);
    }
}

#[test]
fn a_step_that_fails_is_named() {
    for depth in [1, 2, 3] {
        for fails_at in [0, 1, 4] {
            let (mut session, _) = Setup { depth, fails_at: Some(fails_at), ..Setup::default() }.session();
            submit(&mut session, &request(0, 4, 9));
            submit(&mut session, &request(1, 4, 9));
            (0..fails_at).for_each(|_| _ = session.step().unwrap());
            let SessionError::Backend { step, source } = session.step().unwrap_err();
            assert_eq!(step, fails_at as u64);
            assert!(matches!(&source, BackendError::Other(_)), "{source}");
            assert_eq!(source.to_string(), format!("the mock fails at step {fails_at}"));
        }
    }
}
