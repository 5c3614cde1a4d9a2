//! Ranks that die, stall or give up in the middle of the job.

use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use crate::job::Job;

const QUICK: [(&str, &str); 2] = [("COMM_HEARTBEAT", "100"), ("COMM_STALL_LIMIT", "1500")];

fn named(rank: usize, pid: u32) -> [String; 2] {
    [format!("rank {rank} on "), format!("(process {pid})")]
}

fn words<'a>(named: &'a [String; 2], what: &'a str) -> [&'a str; 3] {
    [&named[0], &named[1], what]
}

#[test]
fn a_killed_rank_is_named_by_every_survivor() {
    for (task, output) in [("gather", "round 100"), ("receive", "waiting"), ("look", "waiting"), ("flood", "waiting")] {
        for victim in 0..3 {
            let mut job = Job::started(task, 3, &[]);
            job.await_output(output);
            job.ranks[victim].kill();
            let named = named(victim, job.ranks[victim].pid());
            job.survivors_fail(&[victim], &words(&named, "died: its connection closed without a goodbye"));
            job.leaves_nothing();
        }
    }
}

#[test]
fn a_stopped_rank_is_a_stall() {
    for (task, output) in [("gather", "round 100"), ("look", "waiting"), ("flood", "waiting")] {
        for victim in 0..3 {
            let mut job = Job::started(task, 3, &QUICK);
            job.await_output(output);
            job.ranks[victim].signal(Signal::STOP);
            let named = named(victim, job.ranks[victim].pid());
            job.survivors_fail(&[victim], &words(&named, "stalled: no heartbeat for 1.5 s"));
            // When it is woken, it learns that the others have ended, and ends too.
            job.ranks[victim].signal(Signal::CONT);
            job.ranks[victim].fails(&[]);
            job.leaves_nothing();
        }
    }
}

#[test]
fn a_short_stop_is_no_stall() {
    for victim in 0..2 {
        let mut job = Job::started("gather", 2, &[("COMM_HEARTBEAT", "100"), ("COMM_STALL_LIMIT", "20000")]);
        job.await_output("round 100");
        job.ranks[victim].signal(Signal::STOP);
        thread::sleep(Duration::from_millis(1000));
        let rounds = |job: &Job| job.ranks.iter().map(|rank| rank.out().lines().count()).collect::<Vec<_>>();
        let before = rounds(&job);
        job.ranks[victim].signal(Signal::CONT);
        for (rank, before) in job.ranks.iter_mut().zip(before) {
            rank.await_that(|rank| rank.out().lines().count() > before + 2, "more rounds");
        }
        job.ranks[0].kill();
        job.survivors_fail(&[0], &["rank 0 on "]);
    }
}

#[test]
fn a_signal_ends_every_rank() {
    for (signal, name) in [(Signal::TERM, "SIGTERM"), (Signal::INT, "SIGINT")] {
        for victim in 0..3 {
            let mut job = Job::started("receive", 3, &[]);
            job.await_output("waiting");
            job.ranks[victim].signal(signal);
            let named = named(victim, job.ranks[victim].pid());
            job.survivors_fail(&[], &words(&named, &format!("was ended by {name}")));
            job.leaves_nothing();
        }
    }
}

#[test]
fn signals_to_all_ranks_at_once_end_them_all() {
    let mut job = Job::started("gather", 3, &[]);
    job.await_output("round 100");
    job.ranks.iter().for_each(|rank| rank.signal(Signal::TERM));
    job.survivors_fail(&[], &["was ended by SIGTERM"]);
    job.leaves_nothing();
}

#[test]
fn an_error_and_a_panic_end_every_rank() {
    for (task, words) in [("error", "failed: no more memory"), ("panic", "failed: panicked: index 9 out of bounds")] {
        let mut job = Job::started(task, 3, &[]);
        let named = named(1, job.ranks[1].pid());
        job.survivors_fail(&[1], &[&named[0], &named[1], words]);
        job.ranks[1].fails(&[words.split_once(": ").unwrap().1]);
        job.leaves_nothing();
    }
}
