//! Two hosts: two network namespaces, joined by a virtual cable, each with its own loopback.

use std::process::Command;

use crate::job::Job;

/// Two namespaces, removed when dropped. The job ends their processes.
struct Hosts {
    names: [String; 2],
}

/// The namespaces' addresses; rank 0 is in the first. Nothing outside the two can be reached from them.
const ADDRESSES: [&str; 2] = ["10.231.77.1", "10.231.77.2"];

fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()) }
}

impl Hosts {
    fn new(test: &str) -> Result<Self, String> {
        let names = ["a", "b"].map(|end| format!("mixtral-{}-{test}-{end}", std::process::id()));
        ip(&format!("netns add {}", names[0]))?;
        let hosts = Self { names };
        let [a, b] = &hosts.names;
        ip(&format!("netns add {b}"))?;
        ip(&format!("link add veth0 netns {a} type veth peer name veth0 netns {b}"))?;
        for (name, address) in hosts.names.iter().zip(ADDRESSES) {
            ip(&format!("-n {name} addr add {address}/24 dev veth0"))?;
            ip(&format!("-n {name} link set lo up"))?;
            ip(&format!("-n {name} link set veth0 up"))?;
        }
        Ok(hosts)
    }

    /// The namespaces, or `None` and a printed reason.
    fn or_note(test: &str) -> Option<Self> {
        match Self::new(test) {
            Ok(hosts) => Some(hosts),
            Err(reason) => {
                println!(
                    "not checked: network namespaces cannot be made here ({reason}); that takes root and iproute2"
                );
                None
            }
        }
    }

    fn start(&self, job: &mut Job, host: usize, task: &str, rank: usize, world_size: usize, env: &[(&str, &str)]) {
        job.start_in(&["ip", "netns", "exec", &self.names[host]], task, rank, world_size, env);
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

const MEET: [(&str, &str); 3] =
    [("MASTER_ADDR", ADDRESSES[0]), ("MASTER_PORT", "29500"), ("MIXTRAL_SECRET", "a secret of the test")];

#[test]
fn ranks_of_two_hosts_work_together() {
    let Some(hosts) = Hosts::or_note("work") else { return };
    for placement in [[0, 0, 1], [0, 1, 1], [0, 1, 0]] {
        let mut job = Job::new();
        for (rank, host) in placement.into_iter().enumerate() {
            hosts.start(&mut job, host, "check", rank, 3, &MEET);
        }
        job.await_output("checked");
        job.succeeds();
    }
}

#[test]
fn a_missing_address_is_noticed_and_named() {
    let Some(hosts) = Hosts::or_note("address") else { return };
    let mut job = Job::new();
    hosts.start(&mut job, 0, "check", 0, 2, &[("COMM_START_LIMIT", "2000")]);
    job.await_notice();
    hosts.start(&mut job, 1, "check", 1, 2, &[]);
    job.ranks[1].fails(&["rank 0 runs on another machine", "Set on every rank: MASTER_ADDR to an address"]);
    job.ranks[0].fails(&["rank 1 did not join within 2 s"]);
    job.leaves_nothing();
}

#[test]
fn a_death_and_a_cut_cable_are_noticed_across_hosts() {
    let Some(hosts) = Hosts::or_note("cable") else { return };
    let quick = [&MEET[..], &[("COMM_HEARTBEAT", "100"), ("COMM_STALL_LIMIT", "1500")]].concat();
    let mut job = Job::new();
    (0..3).for_each(|rank| hosts.start(&mut job, rank / 2, "gather", rank, 3, &quick));
    job.await_output("round 100");
    job.ranks[2].kill();
    job.survivors_fail(&[2], &["rank 2 on ", "died: its connection closed"]);

    let mut job = Job::new();
    (0..3).for_each(|rank| hosts.start(&mut job, rank / 2, "gather", rank, 3, &quick));
    job.await_output("round 100");
    ip(&format!("-n {} link set veth0 down", hosts.names[1])).unwrap();
    job.survivors_fail(&[2], &["rank 2 on ", "stalled: no heartbeat for 1.5 s"]);
    // On the other host, rank 0 is the silent one.
    job.ranks[2].fails(&["rank 0 on ", "stalled: no heartbeat for 1.5 s"]);
}
