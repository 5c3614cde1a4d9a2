//! Ranks as threads: compares collectives with a plain model, and checks that a failing rank ends the others.

use std::time::Duration;

use mixtral_comm::{Cause, CommError, Group, World, threads};
use proptest::prelude::*;

/// The bytes of rank `rank` in collective `step`.
fn part(seed: u64, rank: usize, step: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("{seed} {rank} {step}").as_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

#[derive(Clone, Debug)]
enum Step {
    AllGather { len: usize },
    Broadcast { root: usize, len: usize },
    Barrier,
    Ring { len: usize },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let len = prop_oneof![Just(0usize), 1..100usize, Just(70_000)];
    let step = prop_oneof![
        len.clone().prop_map(|len| Step::AllGather { len }),
        (0..6usize, len.clone()).prop_map(|(root, len)| Step::Broadcast { root, len }),
        Just(Step::Barrier),
        len.prop_map(|len| Step::Ring { len }),
    ];
    prop::collection::vec(step, 1..12)
}

fn run_steps(world: &World, group: &Group, seed: u64, steps: &[Step]) -> Result<(), CommError> {
    let (members, me) = (group.members(), group.rank());
    for (at, step) in steps.iter().enumerate() {
        match *step {
            Step::AllGather { len } => {
                let mut all = vec![0xEE; len * group.size()];
                group.all_gather(&part(seed, members[me], at, len), &mut all)?;
                let expected: Vec<u8> = members.iter().flat_map(|rank| part(seed, *rank, at, len)).collect();
                assert!(all == expected, "all-gather {at}");
            }
            Step::Broadcast { root, len } => {
                let root = root % group.size();
                let mut data = part(seed, members[me], at, len + me);
                group.broadcast(root, &mut data)?;
                assert!(data == part(seed, members[root], at, len + root), "broadcast {at}");
            }
            Step::Barrier => group.barrier()?,
            Step::Ring { len } => {
                // Two messages to the next rank, which receives them in the other order.
                let next = members[(me + 1) % members.len()];
                let previous = members[(me + members.len() - 1) % members.len()];
                world.send(next, 1, &part(seed, members[me], at, len))?;
                world.send(next, 2, &part(seed, members[me], at + 1000, len + 1))?;
                assert!(world.recv(previous, 2)? == part(seed, previous, at + 1000, len + 1), "ring {at}");
                assert!(world.recv(previous, 1)? == part(seed, previous, at, len), "ring {at}");
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Collectives of all ranks, then of the groups of a tensor × pipeline layout, then of two groups with the same
    /// members. Each rank runs at its own pace.
    #[test]
    fn collectives_match_the_model(seed: u64, across in 1..4usize, along in 1..3usize, steps in steps()) {
        let outcome = threads::run(across * along, |world| -> Result<usize, CommError> {
            let rank = world.rank();
            run_steps(world, &world.everyone()?, seed, &steps)?;
            let row: Vec<usize> = (0..across).map(|at| rank / across * across + at).collect();
            let column: Vec<usize> = (0..along).map(|at| rank % across + at * across).collect();
            let (row, column, again) = (world.group(&row)?, world.group(&column)?, world.group(&row)?);
            run_steps(world, &row, seed ^ 1, &steps)?;
            run_steps(world, &column, seed ^ 2, &steps)?;
            run_steps(world, &again.clone(), seed ^ 3, &steps)?;
            run_steps(world, &row, seed ^ 4, &steps)?;
            Ok(rank)
        });
        prop_assert_eq!(outcome.map_err(|failure| failure.to_string()), Ok((0..across * along).collect::<Vec<_>>()));
    }
}

/// Every other rank is in a collective or a receive that cannot complete. All return, with an error that names the
/// first failure.
#[test]
fn an_error_poisons_every_rank() {
    for failing in 0..4 {
        let seen = std::sync::Mutex::new(Vec::new());
        let outcome = threads::run(4, |world| -> Result<(), String> {
            let everyone = world.everyone().map_err(|error| error.to_string())?;
            if world.rank() == failing {
                return Err("no more memory".to_owned());
            }
            let error = match world.rank() % 2 {
                0 => everyone.all_gather(&[1], &mut [0; 4]).unwrap_err(),
                _ => world.recv(failing, 7).unwrap_err(),
            };
            // Later calls return the same error, even calls that need no other rank.
            assert_eq!(world.send(world.rank(), 1, b"x").unwrap_err(), error);
            assert_eq!(everyone.barrier().unwrap_err(), error);
            seen.lock().unwrap().push(error.clone());
            Err(error.to_string())
        });
        let failure = outcome.unwrap_err();
        assert_eq!((failure.rank, &failure.cause), (failing, &Cause::Error("no more memory".to_owned())));
        let seen = seen.into_inner().unwrap();
        assert_eq!(seen.len(), 3);
        for error in seen {
            assert!(matches!(error, CommError::Poisoned { rank, .. } if rank == failing), "{error}");
            assert!(error.to_string().ends_with("failed: no more memory"), "{error}");
        }
    }
}

#[test]
fn a_panic_poisons_every_rank() {
    let outcome = threads::run(3, |world| -> Result<(), CommError> {
        if world.rank() == 1 {
            panic!("index {} out of bounds", 9);
        }
        world.everyone()?.barrier()
    });
    let failure = outcome.unwrap_err();
    assert_eq!((failure.rank, failure.cause), (1, Cause::Panic("index 9 out of bounds".to_owned())));
}

/// A rank that waits for no message learns of a failure by `check`.
#[test]
fn a_look_tells_of_a_failure() {
    let outcome = threads::run(2, |world| -> Result<(), String> {
        world.check().map_err(|error| error.to_string())?;
        world.everyone().and_then(|all| all.barrier()).map_err(|error| error.to_string())?;
        if world.rank() == 1 {
            return Err("no more memory".to_owned());
        }
        let error = loop {
            match world.check() {
                Ok(()) => std::thread::sleep(Duration::from_micros(100)),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, CommError::Poisoned { rank: 1, .. }), "{error}");
        Ok(())
    });
    assert_eq!(outcome.unwrap_err().cause, Cause::Error("no more memory".to_owned()));
}

#[test]
fn a_rank_that_has_ended_well_is_no_failure() {
    let outcome = threads::run(2, |world| match world.rank() {
        0 => {
            assert_eq!(world.recv(1, 1), Err(CommError::Finished { rank: 1 }));
            world.check()
        }
        _ => Ok(()),
    });
    assert_eq!(outcome, Ok(vec![(), ()]));
}

#[test]
fn waiting_for_a_rank_that_has_finished_is_an_error() {
    let outcome = threads::run(2, |world| match world.rank() {
        0 => world.recv(1, 1).and_then(|_| world.recv(1, 1)).map(drop),
        _ => world.send(0, 1, b"the only one"),
    });
    assert_eq!(outcome.unwrap_err().cause, Cause::Error(CommError::Finished { rank: 1 }));
}

#[test]
fn different_collectives_or_sizes_are_an_error() {
    let outcome = threads::run(2, |world| {
        let everyone = world.everyone()?;
        match world.rank() {
            0 => everyone.all_gather(&[1], &mut [0; 2]),
            _ => everyone.barrier(),
        }
    });
    let message = outcome.unwrap_err().to_string();
    assert!(message.contains("all-gather (the group's collective 0)"), "{message}");
    assert!(message.contains("barrier (the group's collective 0)"), "{message}");

    let outcome = threads::run(2, |world| {
        let mine = vec![0; 4 + world.rank()];
        world.everyone()?.all_gather(&mine, &mut vec![0; 2 * mine.len()])
    });
    let message = outcome.unwrap_err().to_string();
    assert!(message.contains("4 bytes of all-gather") && message.contains("5 bytes of all-gather"), "{message}");
}

#[test]
fn misuse_is_refused_before_anything_is_sent() {
    let outcome = threads::run(2, |world| -> Result<(), CommError> {
        let rank = world.rank();
        let bad = |members: &[usize]| world.group(members).unwrap_err();
        assert_eq!(bad(&[1 - rank]), CommError::BadGroup { rank, members: vec![1 - rank] });
        assert_eq!(bad(&[1, 0]), CommError::BadGroup { rank, members: vec![1, 0] });
        assert_eq!(bad(&[0, 1, 1]), CommError::BadGroup { rank, members: vec![0, 1, 1] });
        assert_eq!(bad(&[0, 1, 2]), CommError::NoSuchRank { rank: 2, size: 2 });
        let everyone = world.everyone()?;
        let size = everyone.all_gather(&[1, 2], &mut [0; 3]).unwrap_err();
        assert_eq!(size, CommError::Size { what: "an all-gather's result", expected: 4, found: 3 });
        assert_eq!(everyone.broadcast(2, &mut vec![]).unwrap_err(), CommError::NoSuchRank { rank: 2, size: 2 });
        assert_eq!(world.send(2, 0, b"").unwrap_err(), CommError::NoSuchRank { rank: 2, size: 2 });
        assert_eq!(world.recv(9, 0).unwrap_err(), CommError::NoSuchRank { rank: 9, size: 2 });
        assert_eq!((world.local_rank(), world.local_size()), (rank, 2));
        Ok(())
    });
    assert!(outcome.is_ok());
}

/// A sender runs ahead of its receiver by no more than the limit. A receiver that asks in another order still gets
/// everything.
#[test]
fn senders_wait_for_room_and_nobody_locks_up() {
    let chunk = vec![7u8; 32 << 20];
    let outcome = threads::run(2, |world| -> Result<(), CommError> {
        if world.rank() == 0 {
            for tag in 0..12 {
                world.send(1, tag, &chunk)?;
            }
        } else {
            // Receives the last message first. It can only come if the sender may exceed the limit for a waiting
            // receiver.
            for tag in (0..12).rev() {
                assert_eq!(world.recv(0, tag)?.len(), chunk.len());
            }
        }
        Ok(())
    });
    assert!(outcome.is_ok());
}
