//! Measures an all-gather between threads: `cargo run -p mixtral-comm --example all_gather -- [RANKS]`. Started by a
//! launcher, it measures between processes. Rank 0 prints the median and the 90th percentile of the time per call.

use std::error::Error;
use std::time::{Duration, Instant};

use mixtral_comm::{CommError, JoinOptions, Launch, World, process, threads};

fn main() -> Result<(), Box<dyn Error>> {
    let ranks = std::env::args().nth(1).map_or(Ok(2), |text| text.parse())?;
    match Launch::detect(&|name| std::env::var(name).ok())? {
        Launch::Threads => drop(threads::run(ranks, measure)?),
        Launch::Process(process) => process::run(&process, &JoinOptions::new([0; 32]), measure)?,
    }
    Ok(())
}

fn measure(world: &World) -> Result<(), CommError> {
    let everyone = world.everyone()?;
    for (bytes, rounds) in [(8 << 10, 4000), (2 << 20, 200)] {
        let (mine, mut all) = (vec![1; bytes], vec![0; bytes * world.world_size()]);
        let mut times = Vec::with_capacity(rounds);
        for round in 0..rounds + rounds / 10 {
            let start = Instant::now();
            everyone.all_gather(&mine, &mut all)?;
            if round >= rounds / 10 {
                times.push(start.elapsed());
            }
        }
        if world.rank() == 0 {
            times.sort_unstable();
            let at = |percent: usize| times[times.len() * percent / 100].as_secs_f64() * 1e6;
            let mean = times.iter().sum::<Duration>().as_secs_f64() * 1e6 / times.len() as f64;
            println!(
                "{} ranks, {bytes} bytes each: mean {mean:.1} µs, median {:.1} µs, p90 {:.1} µs",
                world.world_size(),
                at(50),
                at(90)
            );
        }
    }
    Ok(())
}
