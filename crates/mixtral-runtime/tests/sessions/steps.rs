//! What steps consist of: which requests are admitted, and what each step computes of them.

use mixtral_engine::{SamplingParams, TokenSource};
use mixtral_runtime::{Event, Request, SessionOptions};

use crate::harness::{Setup, all_written, expected, finish, request, submit};
use crate::mock::Steps;

/// The steps of these requests, `(tokens of the prompt, tokens of the output)`, in words.
fn steps_of(setup: &Setup, requests: &[(u32, usize)]) -> Vec<String> {
    let requests = requests.iter().zip(0..).map(|(&(prompt, output), seed)| request(seed, prompt, output));
    all_written(&steps(setup, requests))
}

fn steps(setup: &Setup, requests: impl IntoIterator<Item = Request>) -> Steps {
    let (mut session, steps) = setup.session();
    requests.into_iter().for_each(|request| _ = submit(&mut session, &request));
    finish(&mut session);
    assert_eq!(session.free_blocks(), setup.kv_blocks);
    steps
}

#[test]
fn decodes_come_first_and_prompts_fill_the_rest_in_chunks() {
    let setup = Setup { max_num_tokens: 5, ..Setup::default() };
    assert_eq!(
        steps_of(&setup, &[(3, 4), (7, 2), (2, 1)]),
        [
            // All of the first prompt and what fits of the second, which draws nothing yet.
            "| 0..3 0..2",
            "3..4 | 2..6",
            // The second prompt's last token leaves room for the third's two.
            "4..5 | 6..7 0..2",
            "5..6 7..8 |",
        ]
    );
}

#[test]
fn decodes_alone_can_fill_a_step() {
    let setup = Setup { max_num_tokens: 2, ..Setup::default() };
    assert_eq!(
        steps_of(&setup, &[(1, 2), (1, 3), (1, 2)]),
        [
            "| 0..1 0..1",
            "1..2 1..2 |",
            // The first is done. The second, which came before the third, goes on.
            "2..3 | 0..1",
            "1..2 |",
        ]
    );
}

#[test]
fn requests_are_admitted_in_their_order_as_places_are_free() {
    let setup = Setup { max_batch_size: 2, ..Setup::default() };
    assert_eq!(
        steps_of(&setup, &[(3, 3), (4, 1), (5, 2), (1, 1)]),
        ["| 0..3 0..4", "3..4 | 0..5", "4..5 5..6 |", "| 0..1"]
    );
}

#[test]
fn blocks_are_reserved_for_prompt_and_output_and_nobody_overtakes() {
    let setup = Setup { kv_blocks: 5, ..Setup::default() };
    // Blocks of 4 tokens: 3 of them for the first, 2 + 1 tokens. The second needs 4; the third 1, and waits behind it.
    assert_eq!(
        steps_of(&setup, &[(7, 3), (14, 2), (3, 1)]),
        ["| 0..7", "7..8 |", "8..9 |", "| 0..14 0..3", "14..15 |"]
    );
    // One token more than a block is two blocks: five such requests do not fit at once, four tokens each do.
    assert_eq!(steps_of(&setup, &[(3, 2); 3])[0], "| 0..3 0..3");
    assert_eq!(steps_of(&setup, &[(3, 1); 6])[0], "| 0..3 0..3 0..3 0..3 0..3");
}

#[test]
fn prompts_whose_logits_are_all_wanted_take_as_many_rows_as_there_are() {
    let setup = Setup { max_num_logits: 3, ..Setup::default() };
    let wants_all = |seed, prompt| Request { context_logits: true, ..request(seed, prompt, 2) };
    let steps = steps(&setup, [request(0, 2, 3), wants_all(1, 5), request(2, 4, 1)]);
    assert_eq!(
        all_written(&steps),
        [
            // One row for the first; the second takes the other two. The third would need one, too.
            "| 0..2 0..2",
            "2..3 | 2..4",
            "3..4 | 4..5 0..4",
            "5..6 |",
        ]
    );
    let rows: Vec<_> = steps.lock().unwrap().iter().map(|step| step.logits_indices.clone()).collect();
    assert_eq!(rows, [vec![1, 2, 3], vec![0, 1, 2], vec![0, 1, 5], vec![0]]);
}

#[test]
fn logits_are_asked_for_where_somebody_wants_them() {
    // The steps in which logits are returned: first those of a prompt of two chunks and two decodes, then those of a
    // request that does not ask for any.
    let setup = Setup { max_num_tokens: 4, max_batch_size: 1, ..Setup::default() };
    let returned = |generation_logits, context_logits| {
        let asks = Request { generation_logits, context_logits, ..request(0, 7, 3) };
        let steps = steps(&setup, [asks, request(1, 3, 2)]);
        let steps = steps.lock().unwrap();
        steps.iter().map(|step| step.return_logits).collect::<Vec<_>>()
    };
    assert_eq!(returned(false, false), [false; 6]);
    assert_eq!(returned(true, false), [false, true, true, true, false, false]);
    assert_eq!(returned(false, true), [true, true, false, false, false, false]);
    assert_eq!(returned(true, true), [true, true, true, true, false, false]);
    // It is enough if one request of a step asks.
    let asks = Request { generation_logits: true, ..request(0, 3, 1) };
    let steps = steps(&Setup::default(), [request(1, 3, 2), asks, request(2, 3, 2)]);
    assert_eq!(steps.lock().unwrap().iter().map(|step| step.return_logits).collect::<Vec<_>>(), [true, false]);
}

#[test]
fn each_of_the_steps_under_way_has_its_share_of_the_sequences() {
    let setup = Setup { depth: 2, ..Setup::default() };
    assert_eq!(
        steps_of(&setup, &[(3, 2), (4, 2), (5, 3)]),
        [
            // Two of three in the first step, the other in the second.
            "| 0..3 0..4",
            "| 0..5",
            "3..4 4..5 |",
            "5..6 |",
            "6..7 |",
        ]
    );
    // The chunks of one prompt follow each other without waiting; what is drawn at its end is waited for.
    let setup = Setup { max_num_tokens: 4, ..setup };
    let (mut session, steps) = setup.session();
    submit(&mut session, &request(0, 10, 2));
    session.step().unwrap();
    assert_eq!(all_written(&steps), ["| 0..4", "| 4..8"]);
    session.step().unwrap();
    session.step().unwrap();
    assert_eq!(all_written(&steps), ["| 0..4", "| 4..8", "| 8..10"]);
    finish(&mut session);
    assert_eq!(all_written(&steps)[3..], ["10..11 |"]);
    // Nothing more is computed of a request that was cancelled.
    let (mut session, steps) = setup.session();
    let id = submit(&mut session, &request(0, 14, 2));
    session.step().unwrap();
    session.cancel(id);
    finish(&mut session);
    assert_eq!(all_written(&steps), ["| 0..4", "| 4..8"]);
}

#[test]
fn a_pipeline_computes_many_prompts_in_steps_of_4096_tokens() {
    let tokens = |depth| {
        let setup = Setup {
            depth,
            max_batch_size: 400,
            max_num_tokens: 16_384,
            max_num_logits: 400,
            kv_blocks: 4000,
            ..Setup::default()
        };
        let steps = steps(&setup, (0..400).map(|seed| request(seed, 25, 1)));
        steps.lock().unwrap().iter().map(|step| step.token_ids.len()).collect::<Vec<_>>()
    };
    assert_eq!(tokens(1), [10_000]);
    assert_eq!(tokens(2), [4096, 4096, 1808]);
}

#[test]
fn a_step_is_launched_before_the_tokens_of_the_step_before_are_known() {
    let setup = Setup { ahead: true, ..Setup::default() };
    let (mut session, steps) = setup.session();
    submit(&mut session, &request(0, 3, 4));
    assert_eq!(session.step().unwrap().len(), 1);
    assert_eq!(all_written(&steps), ["| 0..3", "3..4 |"]);
    assert_eq!(steps.lock().unwrap()[1].token_ids, [TokenSource::Draw(0).number()]);
    assert_eq!(session.last_step().prefill_tokens, 3);
    finish(&mut session);
    // That its last token is the last one is known, so nothing is thrown away.
    assert_eq!(all_written(&steps), ["| 0..3", "3..4 |", "4..5 |", "5..6 |"]);
    // Without overlap there is a step at a time.
    let options = SessionOptions { overlap: false, ..SessionOptions::default() };
    let (mut session, steps) = Setup { options, ..setup }.session();
    submit(&mut session, &request(0, 3, 4));
    session.step().unwrap();
    assert_eq!(all_written(&steps), ["| 0..3"]);
}

#[test]
fn what_is_computed_behind_an_end_is_thrown_away() {
    let setup = Setup { ahead: true, ..Setup::default() };
    let whole = expected(&request(0, 3, 6));
    let asked = Request { end_ids: vec![whole.tokens[1]], logprobs: Some(1), ..request(0, 3, 6) };
    let (mut session, steps) = setup.session();
    submit(&mut session, &asked);
    let first: Vec<Event> = session.step().unwrap().into_iter().chain(session.step().unwrap()).collect();
    assert!(first[1].is_last());
    // Its place is free already. Its blocks are not, because a step still writes to them.
    let other = submit(&mut session, &request(1, 4, 1));
    assert_eq!((session.free_blocks(), session.is_idle()), (62, false));
    assert_eq!(session.step().unwrap(), []);
    assert_eq!(session.last_step().decode_tokens, 0);
    // The other's prompt has one block.
    assert_eq!(session.free_blocks(), 63);
    let outcomes = finish(&mut session);
    assert_eq!(outcomes[&other], expected(&request(1, 4, 1)));
    assert_eq!(all_written(&steps), ["| 0..3", "3..4 |", "4..5 |", "| 0..4"]);
    assert_eq!(session.free_blocks(), 64);
}

#[test]
fn a_draw_that_looks_back_waits_for_the_tokens() {
    let setup = Setup { ahead: true, ..Setup::default() };
    let params = SamplingParams { presence_penalty: 0.5, ..SamplingParams::default() };
    let looks_back = Request { params, ..request(1, 4, 4) };
    // Alone, it goes on when its token is there.
    let alone = steps(&setup, [looks_back.clone()]);
    assert_eq!(all_written(&alone), ["| 0..4", "4..5 |", "5..6 |", "6..7 |"]);
    assert!(alone.lock().unwrap().iter().all(|step| step.token_ids.iter().all(|&id| id >= 0)));
    // Others go on without it, and it takes part in every second step.
    let both = steps(&setup, [request(0, 3, 6), looks_back.clone()]);
    assert_eq!(
        all_written(&both),
        ["| 0..3 0..4", "3..4 |", "4..5 4..5 |", "5..6 |", "6..7 5..6 |", "7..8 |", "6..7 |"]
    );
    // A prompt does not leave it behind.
    let (mut session, steps) = setup.session();
    submit(&mut session, &looks_back);
    session.step().unwrap();
    submit(&mut session, &request(2, 5, 1));
    finish(&mut session);
    assert_eq!(all_written(&steps), ["| 0..4", "4..5 | 0..5", "5..6 |", "6..7 |"]);
}

#[test]
fn who_ends_for_certain_leaves_its_place_to_the_next() {
    let setup = Setup { ahead: true, max_batch_size: 1, ..Setup::default() };
    assert_eq!(steps_of(&setup, &[(3, 2), (4, 1), (5, 2)]), ["| 0..3", "3..4 |", "| 0..4", "| 0..5", "5..6 |"]);
    let (mut session, steps) = setup.session();
    submit(&mut session, &request(0, 3, 1));
    submit(&mut session, &request(1, 4, 1));
    session.step().unwrap();
    assert_eq!(all_written(&steps), ["| 0..3", "| 0..4"]);
}
