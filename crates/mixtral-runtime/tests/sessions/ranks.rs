//! The ranks of a job, as threads: the others compute what rank 0 launches, and all learn of failures.

use std::sync::Mutex;
use std::time::Duration;

use mixtral_comm::{Cause, World, threads};
use mixtral_engine::{BackendError, Collectives, StepInputs};
use mixtral_model::{Mapping, TokenId};
use mixtral_runtime::ranks::{Driver, RankCollectives, follow};
use mixtral_runtime::{Executor, Local, Request};

use crate::harness::{ENOUGH_STEPS, Outcome, Setup, curious, expected, finish, request, submit};
use crate::mock::{Mock, Steps};

/// Tensor-parallel ranks and pipeline stages.
const LAYOUTS: [(usize, usize); 5] = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)];

/// A mock for a rank of `mapping`, whose experts were given tokens in its stage's layer alone.
fn mock(setup: &Setup, world: &World, mapping: &Mapping) -> Mock {
    let mut mock = setup.mock();
    let stage = world.rank() / mapping.tp_size;
    mock.expert_counts = vec![vec![0, 0]; mapping.pp_size];
    mock.expert_counts[stage] = vec![stage as u64 + 1, 10 + world.rank() as u64];
    mock
}

/// Requests of which one half may run ahead.
fn asked(seed: u32) -> Request {
    let plain = Request { logprobs: Some(2), end_ids: vec![TokenId(seed)], ..request(seed, 2 + seed, 6) };
    if seed.is_multiple_of(2) { curious(seed, 2 + seed, 4) } else { plain }
}

/// What one rank of a job returns: the outcomes at rank 0, and the steps of all.
fn rank_main(
    world: &World,
    mapping: Mapping,
    setup: &Setup,
) -> Result<(Vec<Outcome>, Vec<StepInputs<'static>>), BackendError> {
    let mut mock = mock(setup, world, &mapping);
    let steps = Steps::clone(&mock.steps);
    let mut outcomes = Vec::new();
    if world.rank() == 0 {
        let driver = Driver::new(world, mapping, Box::new(mock))?;
        assert_eq!((driver.depth(), driver.kv_blocks()), (mapping.pp_size, setup.kv_blocks));
        assert_eq!(driver.runs_ahead(), setup.ahead && mapping.pp_size == 1);
        let mut session = setup.over(Box::new(driver));
        for seed in 0..6 {
            submit(&mut session, &asked(seed));
        }
        outcomes.extend(finish(&mut session).into_values());
        // The counts are those of the first rank of each stage.
        let stages = 0..mapping.pp_size as u64;
        let counts: Vec<_> = stages.map(|stage| vec![stage + 1, 10 + stage * mapping.tp_size as u64]).collect();
        assert_eq!(session.expert_counts().unwrap(), counts);
        assert_eq!(session.op_times(), [Duration::from_secs(steps.lock().unwrap().len() as u64)]);
        drop(session);
        // Rank 0 has received all other messages: the next one from each rank is its goodbye.
        for (rank, tag) in (1..world.world_size()).flat_map(|rank| [(rank, 2), (rank, 3)]) {
            assert_eq!(world.recv(rank, tag).unwrap(), b"goodbye", "rank {rank}, tag {tag}");
        }
    } else {
        follow(world, mapping, &mut mock)?;
        [2, 3].iter().for_each(|&tag| world.send(0, tag, b"goodbye").unwrap());
    }
    let steps = steps.lock().unwrap().clone();
    Ok((outcomes, steps))
}

#[test]
fn all_ranks_compute_the_same_steps_and_the_tokens_of_one() {
    for (ahead, (tp_size, pp_size)) in [false, true].into_iter().flat_map(|ahead| LAYOUTS.map(|layout| (ahead, layout)))
    {
        let setup = Setup { ahead, max_num_tokens: 9, ..Setup::default() };
        let mapping = Mapping::tensor_parallel(tp_size, pp_size);
        let mut ranks = threads::run(tp_size * pp_size, |world| rank_main(world, mapping, &setup)).unwrap();
        let expected: Vec<_> = (0..6).map(|seed| expected(&asked(seed))).collect();
        assert!(ranks[0].0 == expected, "{tp_size} × {pp_size}");
        let launched = ranks.remove(0).1;
        let fed = launched.iter().filter(|step| step.token_ids.iter().any(|&id| id < 0)).count();
        assert_eq!(fed > 4, ahead && pp_size == 1, "{tp_size} × {pp_size}: {fed} steps took tokens of the step before");
        for (rank, (_, steps)) in (1..).zip(ranks) {
            let draws = pp_size == 1 || rank == (pp_size - 1) * tp_size;
            let expected = launched.iter().cloned().map(|step| {
                // With several stages, only one rank draws.
                let quiet = |step| StepInputs { samples: vec![], scores: vec![], return_logits: false, ..step };
                if draws { step } else { quiet(step) }
            });
            assert!(expected.eq(steps), "rank {rank} of {tp_size} × {pp_size}");
        }
    }
}

#[test]
fn a_rank_that_fails_is_named_to_all() {
    for (ahead, (tp_size, pp_size)) in [false, true].into_iter().flat_map(|ahead| LAYOUTS.map(|layout| (ahead, layout)))
    {
        for failing in 0..tp_size * pp_size {
            let mapping = Mapping::tensor_parallel(tp_size, pp_size);
            // Dropping a driver tells the others to end, so this one is kept until all have ended.
            let (said, kept) = (Mutex::new(Vec::new()), Mutex::new(None));
            let result = threads::run(tp_size * pp_size, |world| {
                let fails_at = (world.rank() == failing).then_some(2);
                let setup = Setup { ahead, fails_at, max_num_tokens: 9, ..Setup::default() };
                let mut mock = mock(&setup, world, &mapping);
                let error = if world.rank() == 0 {
                    let mut session = setup.over(Box::new(Driver::new(world, mapping, Box::new(mock))?));
                    let mut quiet = 0;
                    let error = loop {
                        // The session always has work, so it must notice the failure.
                        if session.is_idle() {
                            submit(&mut session, &request(0, 6, 20));
                        }
                        match session.step() {
                            Ok(events) => quiet = if events.is_empty() { quiet + 1 } else { 0 },
                            Err(error) => break error,
                        }
                        assert!(quiet < ENOUGH_STEPS, "nothing comes of the steps");
                    };
                    if failing == 0 {
                        assert_eq!(error.to_string(), "step 2: the mock fails at step 2");
                    }
                    *kept.lock().unwrap() = Some(session);
                    BackendError::Other(error.to_string())
                } else {
                    follow(world, mapping, &mut mock).unwrap_err()
                };
                said.lock().unwrap().push((world.rank(), error.to_string()));
                Err::<(), _>(error)
            });
            let failure = result.unwrap_err();
            assert_eq!(failure.rank, failing, "{tp_size} × {pp_size}: {failure}");
            assert!(matches!(failure.cause, Cause::Error(BackendError::Other(_))), "{failure}");
            let named = format!("rank {failing} on");
            for (rank, error) in said.into_inner().unwrap() {
                assert!(rank == failing || error.contains(&named), "rank {rank} said: {error}");
            }
        }
    }
}

#[test]
fn steps_are_collected_in_their_order_and_only_if_there_are_any() {
    let setup = Setup::default();
    let none = "no step is under way";
    assert_eq!(Local::new(Box::new(setup.mock())).collect().unwrap_err().to_string(), none);
    let said = threads::run(2, |world| {
        let mapping = Mapping::tensor_parallel(1, 2);
        if world.rank() == 1 {
            return follow(world, mapping, &mut setup.mock()).map(|()| String::new());
        }
        let mut driver = Driver::new(world, mapping, Box::new(setup.mock()))?;
        Ok::<_, BackendError>(driver.collect().unwrap_err().to_string())
    });
    assert_eq!(said.unwrap()[0], none);
}

/// The result of `follow` at rank 1, for what rank 0 does.
fn followed(lead: impl Fn(&World) + Sync) -> Result<(), String> {
    let result = threads::run(2, |world| {
        if world.rank() == 0 {
            lead(world);
            return Ok(());
        }
        follow(world, Mapping::tensor_parallel(1, 2), &mut Setup::default().mock())
    });
    result.map(drop).map_err(|failure| failure.cause.to_string())
}

#[test]
fn messages_that_make_no_sense_are_refused() {
    let say = |message: &[u8]| followed(|world| world.everyone().unwrap().broadcast(0, &mut message.to_vec()).unwrap());
    assert_eq!(say(&[2]), Ok(()), "the end");
    for message in [&[] as &[u8], &[4], &[9, 9]] {
        assert_eq!(say(message).unwrap_err(), "rank 0 said something that this version does not know");
    }
    assert!(say(&[0, 1, 2]).unwrap_err().starts_with("a message between ranks is damaged: the number of decodes"));
    // A message that should be outputs, but is not.
    let said = threads::run(2, |world| {
        if world.rank() == 1 {
            return world.send(0, 2, &[7]).map(|()| String::new()).map_err(|error| BackendError::Peer(error.into()));
        }
        let mut driver = Driver::new(world, Mapping::tensor_parallel(1, 2), Box::new(Setup::default().mock()))?;
        driver.launch(&StepInputs { cu_query_lens: vec![0], ..StepInputs::default() })?;
        Ok::<_, BackendError>(driver.collect().unwrap_err().to_string())
    });
    assert!(said.as_ref().unwrap()[0].starts_with("a message between ranks is damaged: tokens"), "{said:?}");
}

#[test]
fn a_rank_speaks_to_its_tensor_parallel_group_and_to_other_stages() {
    // Two stages of two: 0 and 1, 2 and 3.
    let mapping = Mapping::tensor_parallel(2, 2);
    let said = threads::run(4, |world| {
        let (rank, me) = (world.rank(), u8::try_from(world.rank()).unwrap());
        let collectives = RankCollectives::new(world, &mapping)?;
        let mut all = [0; 4];
        collectives.all_gather(&[10 + me, me], &mut all)?;
        let first = me / 2 * 2;
        assert_eq!(all, [10 + first, first, 11 + first, first + 1]);
        let mut received = [0; 3];
        if rank < 2 {
            collectives.send(rank + 2, &[me; 3])?;
            collectives.send(rank + 2, &[me; 2])?;
        } else {
            collectives.recv(rank - 2, &mut received)?;
            assert_eq!(received, [me - 2; 3]);
            return Ok(collectives.recv(rank - 2, &mut received).unwrap_err().to_string());
        }
        Ok::<_, BackendError>(String::new())
    });
    let expected =
        |from| format!("rank {from} sent 2 bytes of activations, expected 3; do all ranks run the same engine?");
    assert_eq!(said.unwrap()[2..], [expected(0), expected(1)]);
}

#[test]
fn a_rank_that_waits_for_memory_learns_of_a_failure() {
    let mapping = Mapping::tensor_parallel(2, 1);
    let said = Mutex::new(String::new());
    let result = threads::run(2, |world| {
        let collectives = RankCollectives::new(world, &mapping)?;
        if world.rank() == 1 {
            collectives.recv(0, &mut [0])?;
            return Err::<(), _>(BackendError::Other("no power".to_owned()));
        }
        collectives.check()?;
        collectives.send(1, &[0])?;
        let error = loop {
            if let Err(error) = collectives.check() {
                break error;
            }
        };
        *said.lock().unwrap() = error.to_string();
        Err(error)
    });
    assert_eq!(result.unwrap_err().rank, 1);
    let said = said.into_inner().unwrap();
    assert!(said.starts_with("rank 1 on") && said.ends_with("no power"), "{said}");
}
