//! How jobs start, and how they are refused.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use crate::job::{Job, SOON, worker};

#[test]
fn collectives_give_the_right_bytes() {
    for world_size in 2..=4 {
        let mut job = Job::started("check", world_size, &[]);
        job.await_output(&format!("with {world_size} of {world_size} here"));
        job.succeeds();
    }
}

#[test]
fn ranks_may_start_at_any_time_and_in_any_order() {
    let mut job = Job::new();
    for rank in [2, 0, 1] {
        job.start("check", rank, 3, &[]);
        thread::sleep(Duration::from_millis(600));
    }
    job.succeeds();
}

#[test]
fn finishing_at_different_times_is_no_death() {
    let mut job = Job::started("early", 3, &[("COMM_HEARTBEAT", "50"), ("COMM_STALL_LIMIT", "5000")]);
    job.ranks[0].await_that(|rank| rank.out().contains("received"), "received");
    job.succeeds();
}

#[test]
fn waiting_for_a_finished_rank_fails_on_every_rank() {
    let mut job = Job::started("wrong", 3, &[]);
    job.survivors_fail(&[], &["rank 1 has finished, but this rank still waits for it"]);
    job.leaves_nothing();
}

#[test]
fn another_world_size_is_refused_on_every_rank() {
    let mut job = Job::new();
    job.start("check", 0, 3, &[]);
    job.start("check", 1, 3, &[]);
    job.start("check", 2, 5, &[]);
    job.survivors_fail(&[], &["rank 2 on ", "was started for a world of 5, rank 0 for a world of 3"]);
    job.leaves_nothing();
}

#[test]
fn another_engine_is_refused_on_every_rank() {
    let mut job = Job::new();
    job.start("check", 0, 3, &[]);
    job.start("check", 1, 3, &[("COMM_IDENTITY", "9")]);
    job.start("check", 2, 3, &[]);
    job.survivors_fail(&[], &["rank 1 on ", "brings engine 090000000000, rank 0 engine 070000000000"]);
    job.leaves_nothing();
}

#[test]
fn a_rank_started_twice_is_refused_on_every_rank() {
    let mut job = Job::new();
    job.start("check", 0, 3, &[]);
    job.start("check", 1, 3, &[]);
    job.start("check", 1, 3, &[]);
    let pids = [1, 2].map(|at| job.ranks[at].pid().to_string());
    job.survivors_fail(&[], &["rank 1 was started twice", &pids[0], &pids[1]]);
    job.leaves_nothing();
}

#[test]
fn two_ranks_0_do_not_disturb_each_other() {
    let mut job = Job::new();
    job.start("check", 0, 2, &[]);
    job.await_notice();
    job.start("check", 0, 2, &[]);
    let first = job.ranks[0].pid().to_string();
    job.ranks[1].fails(&["is starting a job of the same name", &first]);
    job.ranks.pop();
    job.start("check", 1, 2, &[]);
    job.succeeds();
}

#[test]
fn missing_ranks_are_named() {
    let mut job = Job::new();
    job.start("check", 0, 4, &[("COMM_START_LIMIT", "1000")]);
    job.start("check", 2, 4, &[]);
    job.survivors_fail(&[], &["ranks 1 and 3 did not join within 1 s, of a world of 4"]);
    job.leaves_nothing();

    let mut job = Job::new();
    job.start("check", 1, 2, &[("COMM_START_LIMIT", "500")]);
    job.ranks[0].fails(&["rank 0 was not reached at", ".rendezvous within 0 s (nothing there)", "MASTER_ADDR"]);
}

#[test]
fn strangers_are_dropped_and_disturb_nobody() {
    let mut job = Job::new();
    job.start("check", 0, 3, &[]);
    let notice = job.await_notice();
    let port: u16 = notice.lines().find_map(|line| line.strip_prefix("port ")).unwrap().parse().unwrap();
    let call = || TcpStream::connect(("127.0.0.1", port)).unwrap();
    let silent: Vec<_> = (0..20).map(|_| call()).collect();
    let mut curious = call();
    curious.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut noisy = call();
    let _ = noisy.write_all(&vec![0xA5; 1 << 20]);
    let mut greeting = [0; 48];
    let mut liar = call();
    liar.read_exact(&mut greeting).unwrap();
    // The right greeting with a guessed proof.
    liar.write_all(&[&greeting[..16], &[1; 64]].concat()).unwrap();
    let mut verdict = [1; 33];
    liar.read_exact(&mut verdict).unwrap();
    assert_eq!(verdict, [0; 33]);
    drop(call());
    job.start("check", 1, 3, &[]);
    job.start("check", 2, 3, &[]);
    let warnings = "which is no rank of this job: it did not greet as a rank of this version does";
    job.ranks[0].await_that(|rank| rank.err().contains(warnings), warnings);
    job.ranks[0].await_that(|rank| rank.err().contains("it has another secret"), "another secret");
    job.succeeds();
    drop(silent);
}

#[test]
fn a_notice_left_behind_is_replaced() {
    let mut job = Job::new();
    job.start("check", 0, 2, &[]);
    job.await_notice();
    job.ranks[0].kill();
    assert!(job.notice().is_some());
    job.ranks.clear();
    // A rank that finds only the stale notice waits for its own rank 0.
    job.start("check", 1, 2, &[]);
    thread::sleep(Duration::from_millis(300));
    job.start("check", 0, 2, &[]);
    job.succeeds();
}

#[test]
fn a_death_at_the_start_ends_the_start() {
    // If rank 0 dies, the others remove the notice that it left.
    let mut job = Job::new();
    job.start("check", 0, 3, &[]);
    job.start("check", 1, 3, &[]);
    job.await_notice();
    thread::sleep(Duration::from_millis(300));
    job.ranks[0].kill();
    job.survivors_fail(&[0], &["rank 0 on the other end of 127.0.0.1:", "ended while the job was starting"]);
    job.leaves_nothing();

    let mut job = Job::new();
    job.start("check", 0, 3, &[]);
    job.start("check", 1, 3, &[]);
    job.await_notice();
    thread::sleep(Duration::from_millis(300));
    job.ranks[1].kill();
    job.survivors_fail(&[1], &["rank 1 on", "died: its connection closed", "while the job was starting"]);
    job.leaves_nothing();
}

#[test]
fn a_signal_at_the_start_ends_the_start() {
    for signalled in 0..2 {
        let mut job = Job::new();
        job.start("check", 0, 3, &[]);
        job.start("check", 1, 3, &[]);
        job.await_notice();
        thread::sleep(Duration::from_millis(300));
        job.ranks[signalled].signal(Signal::TERM);
        job.survivors_fail(&[], &["while the job was starting"]);
        job.leaves_nothing();
    }
}

/// Variables that tell the ranks that they are on several hosts. All use the loopback.
fn addressed(port: &str) -> [(&str, &str); 4] {
    [("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port), ("LOCAL_WORLD_SIZE", "1"), ("MIXTRAL_SECRET", "hush")]
}

fn free_port() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string()
}

#[test]
fn ranks_meet_at_an_address() {
    let port = free_port();
    let mut job = Job::started("check", 3, &addressed(&port));
    job.await_output("checked");
    job.succeeds();
}

#[test]
fn another_secret_is_refused() {
    let port = free_port();
    let mut job = Job::new();
    job.start("check", 0, 2, &[&addressed(&port)[..], &[("COMM_START_LIMIT", "2000")]].concat());
    job.start("check", 1, 2, &[&addressed(&port)[..], &[("MIXTRAL_SECRET", "hash")]].concat());
    job.ranks[1].fails(&["rank 0 at 127.0.0.1:", "has another secret; set MIXTRAL_SECRET to the same text"]);
    job.ranks[0].fails(&["rank 1 did not join within 2 s"]);
    assert!(job.ranks[0].err().contains("no rank of this job: it has another secret"), "{}", job.ranks[0].err());
    // The secret is in no message.
    assert!(job.ranks.iter().all(|rank| !rank.err().contains("hush") && !rank.err().contains("hash")));
}

#[test]
fn an_address_that_is_taken_or_elsewhere_is_an_error() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let mut job = Job::new();
    job.start("check", 0, 2, &addressed(&port));
    job.ranks[0].fails(&["rank 0 listening on 127.0.0.1:", "MASTER_PORT free there", "in use"]);
    let mut job = Job::new();
    // An address for documentation, which no host has.
    job.start("check", 0, 2, &[&addressed(&port)[..], &[("MASTER_ADDR", "192.0.2.1")]].concat());
    job.ranks[0].fails(&["rank 0 listening on 192.0.2.1:", "MASTER_ADDR must be an address of its host"]);
}

#[test]
fn several_hosts_without_an_address_are_refused() {
    let mut job = Job::new();
    job.start("check", 1, 2, &[("LOCAL_WORLD_SIZE", "1")]);
    job.ranks[0].fails(&["MASTER_ADDR is not set. Set on every rank: MASTER_ADDR to an address of rank 0's host"]);
}

#[test]
fn ranks_start_under_mpirun() {
    if std::process::Command::new("mpirun").arg("--version").output().is_err() {
        println!("not checked: there is no mpirun here (Debian: openmpi-bin)");
        return;
    }
    let mpirun = ["mpirun", "-n", "2", "--oversubscribe"];
    let root = [("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")];
    let mut job = Job::new();
    job.spawn(worker(&mpirun), "check", 0, &root);
    assert!(job.ranks[0].ends(3 * SOON).success(), "{}", job.ranks[0].err());
    assert_eq!(job.ranks[0].out().matches("with 2 of 2 here").count(), 2, "{}", job.ranks[0].out());
    job.leaves_nothing();

    // A failing rank fails the job.
    let mut job = Job::new();
    job.spawn(worker(&mpirun), "error", 0, &root);
    assert!(!job.ranks[0].ends(3 * SOON).success());
    assert!(job.ranks[0].err().contains("no more memory"), "{}", job.ranks[0].err());
    job.leaves_nothing();
    assert_eq!(fs::read_dir(job.meeting()).unwrap().count(), 0);
}
