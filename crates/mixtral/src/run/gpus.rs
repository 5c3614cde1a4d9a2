//! Which GPU each rank of a job gets.

use std::collections::{HashMap, HashSet};
use std::fmt;

use anyhow::{Result, bail};
use mixtral_comm::World;
use mixtral_cuda::Device;
use serde::{Deserialize, Serialize};

use crate::say;

/// A rank's GPU.
#[derive(Debug)]
pub struct Share {
    /// The GPU.
    pub device: Device,
    /// Ranks that run on it.
    pub ranks: usize,
    /// GPUs of the job.
    pub of: usize,
}

/// A GPU that a rank sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Gpu {
    uuid: [u8; 16],
    name: String,
    capability: u32,
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (sm_{})", self.name, self.capability)
    }
}

/// The GPUs that a rank sees, in its order. A launcher may show every process all GPUs of its host, or each process its
/// own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    host: String,
    gpus: Vec<Gpu>,
}

/// Chooses this rank's GPU. Without a world it is the first. Else all ranks tell each other what they see, and
/// [`assign`] chooses.
///
/// # Errors
/// If there is no GPU, or a rank is left without one: that rank says so, and the others name it.
pub fn choose(world: Option<&World>, ranks_per_gpu: usize) -> Result<Share> {
    let mut devices = mixtral_cuda::devices()?;
    let Some(world) = world else {
        return Ok(Share { device: devices.swap_remove(0), ranks: 1, of: 1 });
    };
    let gpu = |d: &Device| Gpu { uuid: d.uuid, name: d.name.clone(), capability: d.capability };
    let seen = tell(world, &Seen { host: world.host().to_owned(), gpus: devices.iter().map(gpu).collect() })?;
    let rank = world.rank();
    let indices = match assign(&seen, ranks_per_gpu) {
        Ok(indices) => indices,
        Err(none) => {
            if none.rank != rank {
                // That rank fails, which ends this wait.
                world.everyone()?.barrier()?;
            }
            bail!("{none}");
        }
    };
    let gpus: Vec<(&str, &Gpu)> =
        seen.iter().zip(&indices).map(|(Seen { host, gpus }, &index)| (host.as_str(), &gpus[index])).collect();
    if rank == 0
        && let Some(warning) = mixed(gpus.iter().map(|(_, gpu)| *gpu))
    {
        say::warning(warning);
    }
    let (host, gpu) = gpus[rank];
    let ranks = gpus.iter().filter(|other| **other == gpus[rank]).count();
    let beside = if ranks > 1 { format!(", which {ranks} ranks share") } else { String::new() };
    say::detail(format_args!("rank {rank}: GPU {} of {host}, {gpu}{beside}", indices[rank]));
    let of = gpus.iter().map(|(host, gpu)| (host, gpu.uuid)).collect::<HashSet<_>>().len();
    Ok(Share { device: devices.swap_remove(indices[rank]), ranks, of })
}

/// Sends every rank's value to all ranks; the result is by rank.
fn tell<T: Serialize + for<'a> Deserialize<'a>>(world: &World, mine: &T) -> Result<Vec<T>> {
    let everyone = world.everyone()?;
    let told = |rank| {
        let mut message = if rank == world.rank() { serde_json::to_vec(mine)? } else { Vec::new() };
        everyone.broadcast(rank, &mut message)?;
        Ok(serde_json::from_slice(&message)?)
    };
    (0..world.world_size()).map(told).collect()
}

/// Chooses, for each rank, one of the GPUs that it sees: the first on which fewer than `ranks_per_gpu` lower ranks run.
fn assign(seen: &[Seen], ranks_per_gpu: usize) -> Result<Vec<usize>, NoGpu> {
    let mut taken: HashMap<(&str, [u8; 16]), usize> = HashMap::new();
    let mut indices = Vec::with_capacity(seen.len());
    for (rank, Seen { host, gpus }) in seen.iter().enumerate() {
        let ranks_on = |gpu: &Gpu| taken.get(&(host.as_str(), gpu.uuid)).copied().unwrap_or(0);
        let Some(index) = gpus.iter().position(|gpu| ranks_on(gpu) < ranks_per_gpu) else {
            let local_ranks = seen.iter().filter(|other| other.host == *host).count();
            return Err(NoGpu { rank, host: host.clone(), local_ranks, sees: gpus.len(), ranks_per_gpu });
        };
        *taken.entry((host, gpus[index].uuid)).or_default() += 1;
        indices.push(index);
    }
    Ok(indices)
}

/// A rank that is left without a GPU.
#[derive(Debug, PartialEq, Eq)]
struct NoGpu {
    rank: usize,
    host: String,
    /// Ranks on that host.
    local_ranks: usize,
    /// GPUs that the rank sees.
    sees: usize,
    ranks_per_gpu: usize,
}

impl fmt::Display for NoGpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let NoGpu { host, local_ranks, sees, ranks_per_gpu, .. } = self;
        let gpus = match sees {
            1 => "the only GPU that this one sees has".to_owned(),
            _ => format!("the {sees} GPUs that this one sees have"),
        };
        let ranks = match ranks_per_gpu {
            1 => "a rank".to_owned(),
            _ => format!("{ranks_per_gpu} ranks"),
        };
        let each = if *sees > 1 { " each" } else { "" };
        let enough = local_ranks.div_ceil((*sees).max(1)).max(ranks_per_gpu + 1);
        write!(
            f,
            "no GPU is left: {local_ranks} ranks run on {host}, and {gpus} {ranks}{each} already; make more GPUs visible (CUDA_VISIBLE_DEVICES), let ranks share them with --ranks-per-gpu {enough}, or use --backend cpu"
        )
    }
}

/// The warning if ranks run on different kinds of GPUs.
fn mixed<'a>(gpus: impl Iterator<Item = &'a Gpu>) -> Option<String> {
    let mut kinds: Vec<(String, Vec<String>)> = Vec::new();
    for (rank, gpu) in gpus.enumerate() {
        let (kind, rank) = (gpu.to_string(), rank.to_string());
        match kinds.iter_mut().find(|(other, _)| *other == kind) {
            Some((_, ranks)) => ranks.push(rank),
            None => kinds.push((kind, vec![rank])),
        }
    }
    let of = |(kind, ranks): &(String, Vec<String>)| {
        format!("{} {} on {kind}", if ranks.len() == 1 { "rank" } else { "ranks" }, ranks.join(", "))
    };
    let list: Vec<String> = kinds.iter().map(of).collect();
    (kinds.len() > 1)
        .then(|| format!("the ranks run on different kinds of GPUs ({}); all wait for the slowest", list.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A rank on `host` that sees the GPUs of these numbers.
    fn sees(host: &str, gpus: &[u8]) -> Seen {
        let gpu = |&number: &u8| Gpu { uuid: [number; 16], name: "H100".to_owned(), capability: 90 };
        Seen { host: host.to_owned(), gpus: gpus.iter().map(gpu).collect() }
    }

    #[test]
    fn ranks_take_the_gpus_of_their_host_in_order() {
        let all = |ranks: usize, gpus: &[u8]| vec![sees("a", gpus); ranks];
        assert_eq!(assign(&all(2, &[0, 1]), 1), Ok(vec![0, 1]));
        assert_eq!(assign(&all(2, &[0, 1, 2]), 1), Ok(vec![0, 1]));
        assert_eq!(assign(&all(4, &[0, 1]), 2), Ok(vec![0, 0, 1, 1]));
        assert_eq!(assign(&all(3, &[0, 1]), 4), Ok(vec![0, 0, 0]));
        // Ranks of two hosts, in any order: every host has its own first GPU.
        let two = [("a", 0), ("b", 0), ("b", 1), ("a", 1)].map(|(host, _)| sees(host, &[0, 1]));
        assert_eq!(assign(&two, 1), Ok(vec![0, 0, 1, 1]));
    }

    #[test]
    fn launchers_may_show_each_rank_its_own() {
        let shown = |masks: &[&[u8]]| masks.iter().map(|gpus| sees("a", gpus)).collect::<Vec<_>>();
        assert_eq!(assign(&shown(&[&[0], &[1], &[2]]), 1), Ok(vec![0, 0, 0]));
        // All GPUs, each rank's own first.
        assert_eq!(assign(&shown(&[&[0, 1], &[1, 0]]), 1), Ok(vec![0, 0]));
        // All ranks see the same GPU, so they have to share it.
        assert_eq!(assign(&shown(&[&[3], &[3]]), 2), Ok(vec![0, 0]));
        assert_eq!(assign(&shown(&[&[3], &[3]]), 1).unwrap_err().rank, 1);
    }

    #[test]
    fn a_rank_without_a_gpu_says_what_would_give_it_one() {
        let message = |ranks: usize, gpus: &[u8], n| assign(&vec![sees("h", gpus); ranks], n).unwrap_err().to_string();
        insta::assert_snapshot!(message(4, &[0, 1], 1), @"no GPU is left: 4 ranks run on h, and the 2 GPUs that this one sees have a rank each already; make more GPUs visible (CUDA_VISIBLE_DEVICES), let ranks share them with --ranks-per-gpu 2, or use --backend cpu");
        insta::assert_snapshot!(message(2, &[0], 1), @"no GPU is left: 2 ranks run on h, and the only GPU that this one sees has a rank already; make more GPUs visible (CUDA_VISIBLE_DEVICES), let ranks share them with --ranks-per-gpu 2, or use --backend cpu");
        insta::assert_snapshot!(message(8, &[0, 1], 3), @"no GPU is left: 8 ranks run on h, and the 2 GPUs that this one sees have 3 ranks each already; make more GPUs visible (CUDA_VISIBLE_DEVICES), let ranks share them with --ranks-per-gpu 4, or use --backend cpu");
    }

    #[test]
    fn different_kinds_are_named_with_their_ranks() {
        let gpu = |name: &str, capability| Gpu { uuid: [0; 16], name: name.to_owned(), capability };
        let (h100, a100) = (gpu("NVIDIA H100", 90), gpu("NVIDIA A100", 80));
        assert_eq!(mixed([&h100, &h100].into_iter()), None);
        insta::assert_snapshot!(mixed([&h100, &a100, &h100].into_iter()).unwrap(), @"the ranks run on different kinds of GPUs (ranks 0, 2 on NVIDIA H100 (sm_90); rank 1 on NVIDIA A100 (sm_80)); all wait for the slowest");
    }
}
