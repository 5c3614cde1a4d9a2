//! What a rank's process does. `COMM_WORKER` names the task.

use std::path::PathBuf;
use std::time::Duration;

use mixtral_comm::{Cause, CommError, JoinOptions, Launch, World, process};

/// Does nothing in a test run. The other tests start it with the environment of a rank.
#[test]
fn worker() {
    let Ok(task) = std::env::var("COMM_WORKER") else { return };
    let code = match run(&task) {
        Ok(()) => 0,
        Err(message) => {
            eprintln!("failed: {message}");
            1
        }
    };
    std::process::exit(code);
}

fn run(task: &str) -> Result<(), String> {
    let env = |name: &str| std::env::var(name).ok();
    let milliseconds = |name: &str| env(name).and_then(|text| text.parse().ok()).map(Duration::from_millis);
    let launch = Launch::detect(&env).map_err(|error| error.to_string())?;
    let Launch::Process(launched) = launch else { return Err("no launcher".to_owned()) };
    let mut options = JoinOptions::new([0; 32]);
    options.identity[0] = env("COMM_IDENTITY").map_or(7, |text| text.parse().unwrap_or(8));
    options.directory = env("COMM_DIR").map_or(options.directory, PathBuf::from);
    options.start_limit = milliseconds("COMM_START_LIMIT").unwrap_or(options.start_limit);
    options.heartbeat = milliseconds("COMM_HEARTBEAT").unwrap_or(options.heartbeat);
    options.stall_limit = milliseconds("COMM_STALL_LIMIT").unwrap_or(options.stall_limit);
    let outcome = process::run(&launched, &options, |world| {
        match task {
            "check" => check(world),
            "gather" => gather(world),
            "receive" => receive(world),
            "flood" => flood(world),
            "look" => look(world),
            "error" if world.rank() == 1 => return Err("no more memory".to_owned()),
            "panic" if world.rank() == 1 => panic!("index 9 out of bounds"),
            "error" | "panic" => gather(world),
            "early" => early(world),
            "wrong" => wrong(world),
            other => return Err(format!("no task {other}")),
        }
        .map_err(|error| error.to_string())
    });
    outcome.map_err(|failure| {
        if let Cause::Panic(_) = failure.cause {
            println!("panicked");
        }
        failure.to_string()
    })
}

/// Does every collective and checks its result: large and small ones, in groups and along a ring.
fn check(world: &World) -> Result<(), CommError> {
    let (rank, size) = (world.rank(), world.world_size());
    let bytes = |rank: usize, len: usize| -> Vec<u8> {
        (0..len).map(|at| ((at * 31 + rank * 7 + len) % 256).to_le_bytes()[0]).collect()
    };
    let everyone = world.everyone()?;
    let pair: Vec<usize> = (rank / 2 * 2..size.min(rank / 2 * 2 + 2)).collect();
    for group in [everyone.clone(), world.group(&pair)?] {
        for len in [0, 1, 1000, 3 << 20] {
            let mut all = vec![0; len * group.size()];
            group.all_gather(&bytes(rank, len), &mut all)?;
            let expected: Vec<u8> = group.members().iter().flat_map(|member| bytes(*member, len)).collect();
            assert!(all == expected, "all-gather of {len}");
            for root in 0..group.size() {
                let mut data = bytes(rank, len + rank);
                group.broadcast(root, &mut data)?;
                let member = group.members()[root];
                assert!(data == bytes(member, len + member), "broadcast of {len} from {root}");
            }
            group.barrier()?;
        }
    }
    let (next, previous) = ((rank + 1) % size, (rank + size - 1) % size);
    for len in [0, 5, 1 << 20] {
        // More than the sockets' buffers hold, before anyone receives.
        for tag in 0..20 {
            world.send(next, tag, &bytes(rank + tag as usize, len))?;
        }
        for tag in (0..20).rev() {
            assert!(world.recv(previous, tag)? == bytes(previous + tag as usize, len), "message {tag} of {len}");
        }
    }
    world.send(rank, 1, b"myself")?;
    assert_eq!(world.recv(rank, 1)?, b"myself");
    println!("checked on {} with {} of {size} here", world.host(), world.local_size());
    Ok(())
}

/// Does all-gathers forever.
fn gather(world: &World) -> Result<(), CommError> {
    let everyone = world.everyone()?;
    let (mine, mut all) = (vec![1; 5000], vec![0; 5000 * world.world_size()]);
    for round in 0u64.. {
        everyone.all_gather(&mine, &mut all)?;
        if round % 100 == 0 {
            println!("round {round}");
        }
    }
    Ok(())
}

/// Every rank waits for a message that never comes.
fn receive(world: &World) -> Result<(), CommError> {
    world.everyone()?.barrier()?;
    println!("waiting");
    world.recv((world.rank() + 1) % world.world_size(), 1).map(drop)
}

/// No rank waits for a message. Each checks again and again whether the job is over.
fn look(world: &World) -> Result<(), CommError> {
    world.check()?;
    world.everyone()?.barrier()?;
    println!("waiting");
    loop {
        world.check()?;
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Every rank sends to rank 1, which does not receive, until there is no more room.
fn flood(world: &World) -> Result<(), CommError> {
    world.everyone()?.barrier()?;
    println!("waiting");
    if world.rank() == 1 {
        return world.recv(0, 2).map(drop);
    }
    let chunk = vec![0; 16 << 20];
    loop {
        world.send(1, 1, &chunk)?;
    }
}

/// All ranks but rank 0 finish at once. Their messages are still there when rank 0 asks for them.
fn early(world: &World) -> Result<(), CommError> {
    if world.rank() > 0 {
        return world.send(0, 1, &[7; 100_000]);
    }
    std::thread::sleep(Duration::from_millis(700));
    for rank in 1..world.world_size() {
        assert_eq!(world.recv(rank, 1)?, [7; 100_000]);
    }
    println!("received");
    Ok(())
}

/// Rank 0 waits for a message, but rank 1 ends without sending it.
fn wrong(world: &World) -> Result<(), CommError> {
    if world.rank() == 0 { world.recv(1, 1).map(drop) } else { Ok(()) }
}
