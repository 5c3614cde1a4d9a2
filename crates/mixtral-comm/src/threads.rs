//! Runs every rank in a thread of this process.

use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crate::endpoint::{Buffers, Endpoint, Link};
use crate::error::panic_message;
use crate::inbox::Inbox;
use crate::world::host_name;
use crate::{Cause, CommError, RankFailure, World};

/// Runs `rank_main` on `world_size` threads, one for each rank, and returns their values by rank. The first rank that
/// returns an error or panics ends the others' calls with [`CommError::Poisoned`], and this function returns that
/// rank's failure.
pub fn run<T, E>(world_size: usize, rank_main: impl Fn(&World) -> Result<T, E> + Sync) -> Result<Vec<T>, RankFailure<E>>
where
    T: Send,
    E: Display + Send,
{
    let hosts: Arc<[String]> = vec![host_name(); world_size].into();
    let inboxes: Vec<_> = (0..world_size).map(|_| Arc::new(Inbox::new(world_size))).collect();
    let first_failure = Mutex::new(None);

    let fail = |rank: usize, cause: Cause<E>| {
        let mut first = first_failure.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() {
            let failure = RankFailure { rank, host: hosts[rank].clone(), cause };
            let poison = CommError::Poisoned { rank, host: hosts[rank].clone(), reason: failure.cause.to_string() };
            *first = Some(failure);
            // This happens inside the lock, so that no rank can fail because of it and count as the first failure.
            inboxes.iter().for_each(|inbox| inbox.fail(poison.clone()));
        }
    };
    let one = |rank: usize| {
        let world = World::new(Endpoint {
            rank,
            hosts: Arc::clone(&hosts),
            inbox: Arc::clone(&inboxes[rank]),
            links: inboxes.iter().map(|inbox| Link::Memory(Arc::clone(inbox))).collect(),
            buffers: Buffers::default(),
        });
        match catch_unwind(AssertUnwindSafe(|| rank_main(&world))) {
            Ok(Ok(value)) => {
                inboxes.iter().for_each(|inbox| inbox.finish(rank));
                Some(value)
            }
            Ok(Err(error)) => {
                fail(rank, Cause::Error(error));
                None
            }
            Err(payload) => {
                fail(rank, Cause::Panic(panic_message(payload.as_ref())));
                None
            }
        }
    };

    let one = &one;
    let values: Vec<Option<T>> = thread::scope(|scope| {
        let mut threads = Vec::with_capacity(world_size);
        for rank in 0..world_size {
            match thread::Builder::new().name(format!("rank {rank}")).spawn_scoped(scope, move || one(rank)) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    fail(rank, Cause::Spawn(error.to_string()));
                    break;
                }
            }
        }
        threads.into_iter().map(|thread| thread.join().unwrap_or(None)).collect()
    });
    match first_failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(failure) => Err(failure),
        // Without a failure, every rank has returned a value.
        None => Ok(values.into_iter().flatten().collect()),
    }
}
