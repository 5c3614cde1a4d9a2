//! Beam searches, beside a naive one that keeps whole sequences and looks at all continuations.

use mixtral_engine::SamplingParams;
use mixtral_model::TokenId;
use mixtral_runtime::{Beams, EarlyStopping, Event, FinishReason, Hypothesis, Local, Refusal, Request};

use crate::harness::{Setup, alone, expected as expected_outcome, finish, next_logprobs, request, submit};

/// A sequence, the log-probabilities of its output, and their sum.
type Beam = (Vec<TokenId>, Vec<f32>, f32);

/// The answers of a beam search, best first.
pub fn expected(request: &Request) -> Vec<Hypothesis> {
    let Beams { width, length_penalty, early_stopping, diversity_rate } = request.beams.unwrap();
    let mut beams: Vec<Beam> = vec![(request.prompt.clone(), vec![], 0.0)];
    let mut answers: Vec<Hypothesis> = Vec::new();
    #[expect(clippy::cast_possible_truncation, reason = "rounded once")]
    let score = |sum: f32, len: usize| (f64::from(sum) / (len as f64).powf(f64::from(length_penalty))) as f32;
    let looked_at = (request.end_ids.len() + 1).max(2) * width;
    for len in 1.. {
        let mut next: Vec<(f32, Beam)> = Vec::new();
        for (tokens, logprobs, sum) in &beams {
            for (rank, (token, logprob)) in next_logprobs(request, tokens).into_iter().take(looked_at).enumerate() {
                let tokens = tokens.iter().copied().chain([token]).collect();
                let logprobs = logprobs.iter().copied().chain([logprob]).collect();
                next.push((sum + logprob + diversity_rate * rank as f32, (tokens, logprobs, sum + logprob)));
            }
        }
        next.sort_by(|a, b| b.0.total_cmp(&a.0));
        next.truncate(looked_at);
        let is_end = |beam: &Beam| request.end_ids.contains(beam.0.last().unwrap());
        let ends = |beam: &Beam| len == request.max_output_len || is_end(beam);
        for (_, beam) in next.iter().take(width).filter(|(_, beam)| ends(beam)) {
            answers.push(Hypothesis {
                tokens: beam.0[request.prompt.len()..].to_vec(),
                logprobs: beam.1.clone(),
                text: String::new(),
                score: score(beam.2, len),
                reason: Some(if is_end(beam) { FinishReason::EndId } else { FinishReason::Length }),
            });
        }
        answers.sort_by(|a, b| b.score.total_cmp(&a.score));
        answers.truncate(width);
        beams = next.into_iter().map(|(_, beam)| beam).filter(|beam| !ends(beam)).take(width).collect();
        let over = answers.len() == width
            && match (early_stopping, beams.first()) {
                (EarlyStopping::Yes, _) | (_, None) => true,
                (EarlyStopping::No, Some(best)) => score(best.2, len) <= answers[width - 1].score,
                (EarlyStopping::Never, Some(best)) => {
                    let len = if length_penalty > 0.0 { request.max_output_len } else { len };
                    score(best.2, len) <= answers[width - 1].score
                }
            };
        if over || beams.is_empty() {
            break;
        }
    }
    answers
}

fn asks(seed: u32, prompt: u32, output: usize, beams: Beams) -> Request {
    Request { beams: Some(beams), ..request(seed, prompt, output) }
}

#[test]
fn a_beam_search_is_the_naive_one() {
    for (seed, early_stopping) in
        (0..30).zip([EarlyStopping::Yes, EarlyStopping::No, EarlyStopping::Never].iter().cycle())
    {
        for (width, length_penalty, diversity_rate) in
            [(1, 1.0, 0.0), (2, 0.6, 0.0), (4, 1.0, 0.5), (3, 2.0, -0.25), (8, -1.0, 0.0)]
        {
            let beams = Beams { width, length_penalty, early_stopping: *early_stopping, diversity_rate };
            let end_ids = (0..seed % 6).map(|n| TokenId(5 * n)).collect();
            let request = Request { end_ids, ..asks(seed, 1 + seed % 9, 6, beams) };
            let setup = Setup { max_num_tokens: 3 + seed as usize % 7, ..Setup::default() };
            let (mut session, _) = setup.session();
            let id = submit(&mut session, &request);
            let found = finish(&mut session).remove(&id).unwrap();
            let expected = expected(&request);
            assert_eq!(found.beams, expected);
            assert_eq!((found.tokens.len(), found.reason), (0, expected[0].reason));
            assert_eq!(session.free_blocks(), setup.kv_blocks);
        }
    }
}

#[test]
fn one_beam_is_a_greedy_draw() {
    let found = alone(&Setup::default(), &asks(3, 5, 8, Beams::default()));
    assert_eq!(found.beams[0].tokens, expected_outcome(&request(3, 5, 8)).tokens);
}

#[test]
fn what_may_not_be_drawn_is_not_continued() {
    let beams = Beams { width: 3, early_stopping: EarlyStopping::Never, ..Beams::default() };
    let params = SamplingParams { repetition_penalty: 1.3, ..SamplingParams::default() };
    let request = Request {
        end_ids: vec![TokenId(3), TokenId(7)],
        min_output_len: 4,
        no_repeat_ngram_size: 2,
        logit_bias: vec![(TokenId(3), 5.0), (TokenId(9), 2.0)],
        params,
        ..asks(8, 6, 9, beams)
    };
    let found = alone(&Setup::default(), &request).beams;
    assert_eq!(found, expected(&request));
    assert!(found.iter().all(|answer| answer.tokens.len() > 4));
}

#[test]
fn blocks_are_copied_only_where_beams_differ() {
    let beams = Beams { width: 4, ..Beams::default() };
    let (mut session, _) = Setup::default().session();
    submit(&mut session, &asks(1, 8, 4, beams));
    finish(&mut session);
    let copied = session.stats().counters.copied;
    // The prompt fills two blocks. The first tokens behind it go to blocks of their own.
    assert!(copied <= 3 * 4, "{copied} blocks were copied");
    let held = |prompt, output| {
        let (mut session, _) = Setup { kv_blocks: 64, ..Setup::default() }.session();
        submit(&mut session, &asks(1, prompt, output, beams));
        let mut most = 0;
        while !session.is_idle() {
            session.step().unwrap();
            most = most.max(64 - session.free_blocks());
        }
        most
    };
    // Two full blocks of the prompt together, and at most one of each beam for three more tokens.
    let most = held(8, 4);
    assert!((3..=2 + 4).contains(&most), "{most} blocks");
}

#[test]
fn what_a_beam_search_does_not_give_is_refused() {
    let (mut session, _) = Setup { kv_blocks: 12, max_batch_size: 4, ..Setup::default() }.session();
    let beams = |width| Beams { width, ..Beams::default() };
    let refused = [
        (asks(0, 3, 3, beams(0)), Refusal::Beams { width: 0, limit: 4 }),
        (asks(0, 3, 3, beams(5)), Refusal::Beams { width: 5, limit: 4 }),
        (
            Request { stop_words: vec!["a".to_owned()], ..asks(0, 3, 3, beams(2)) },
            Refusal::NotWithBeams { what: "stop words" },
        ),
        // Blocks of four tokens: the prompt's two, and for each of the beams three more.
        (asks(0, 9, 12, beams(4)), Refusal::TooFewBlocks { needed: 2 + 4 * 4, available: 12 }),
    ];
    for (request, refusal) in refused {
        assert_eq!(session.submit(request), Err(refusal));
    }
    assert!(session.submit(asks(0, 9, 4, beams(4))).is_ok());
}

#[test]
fn a_search_whose_beams_fail_ends_once() {
    let setup = Setup::default();
    let mut mock = setup.mock();
    // The prompt is computed in the first step, and all beams in the second.
    mock.non_finite_at = Some(1);
    let mut session = setup.over(Box::new(Local::new(Box::new(mock))));
    let id = submit(&mut session, &asks(1, 5, 6, Beams { width: 3, ..Beams::default() }));
    let mut last = Vec::new();
    while !session.is_idle() {
        last.extend(session.step().unwrap().into_iter().filter(Event::is_last));
    }
    assert!(matches!(&*last, [event] if event.id == id && event.failed.is_some()), "{last:?}");
    assert_eq!(session.free_blocks(), setup.kv_blocks);
}
