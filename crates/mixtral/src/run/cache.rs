//! How many blocks the cache gets: as many as the requests ask for, if every rank has room for them.

use anyhow::{Result, anyhow, bail};
use mixtral_build::explain::bytes;
use mixtral_comm::World;
use mixtral_engine::memory::MemoryPlan;
use mixtral_engine::{Limits, WeightsKind};
use mixtral_runtime::Request;

/// What requests ask of the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Enough for as many requests at a time as the engine's batch allows.
    pub most: usize,
    /// Enough for the longest request.
    pub least: usize,
    /// The most tokens that a sequence may have.
    pub longest: usize,
}

impl Wanted {
    /// What requests ask of an engine with these limits.
    pub fn by(limits: &Limits, requests: &[Request]) -> Wanted {
        // A request that is longer than the engine's sequences, or has more beams than a step has places, is refused later,
        // when it is submitted.
        let blocks = |r: &Request| {
            let width = r.width().min(limits.max_batch_size);
            r.max_blocks(limits).min(width.saturating_mul(limits.max_blocks_per_seq()))
        };
        let mut needs: Vec<usize> = requests.iter().map(blocks).collect();
        needs.sort_unstable_by(|a, b| b.cmp(a));
        let least = needs.first().copied().unwrap_or(1).max(1);
        let tokens = |r: &Request| r.prompt.len().saturating_add(r.max_output_len).min(limits.max_seq_len);
        let longest = requests.iter().map(tokens).max().unwrap_or(0);
        Wanted { most: needs.iter().take(limits.max_batch_size).sum::<usize>().max(least), least, longest }
    }

    /// What an engine with these limits can use at most.
    pub fn any(limits: &Limits) -> Wanted {
        let least = limits.max_blocks_per_seq();
        Wanted { most: least.saturating_mul(limits.max_batch_size), least, longest: limits.max_seq_len }
    }

    /// What rank 0 wants, which alone knows. Every rank calls this.
    pub fn of_leader(self, world: Option<&World>) -> Result<Wanted> {
        let Some(world) = world else { return Ok(self) };
        let mut message = [self.most, self.least, self.longest].map(|n| (n as u64).to_le_bytes()).concat();
        world.everyone()?.broadcast(0, &mut message)?;
        let [most, least, longest] = numbers(&message)?[..] else { bail!("rank 0 did not say what it wants") };
        Ok(Wanted { most, least, longest })
    }
}

/// The blocks that all ranks allocate: the smallest number for which a rank has `room`. Every rank calls this when it
/// has everything but weights, buffers and cache, and allocates those afterwards.
pub fn agree(world: Option<&World>, room: impl FnOnce() -> Result<usize>) -> Result<usize> {
    let Some(world) = world else { return room() };
    let everyone = world.everyone()?;
    // Ranks may share a GPU or a host, so all measure what is free before any of them takes some.
    everyone.barrier()?;
    let mine = room()? as u64;
    let mut all = vec![0; size_of::<u64>() * world.world_size()];
    everyone.all_gather(&mine.to_le_bytes(), &mut all)?;
    numbers(&all)?.into_iter().min().ok_or_else(|| anyhow!("no rank said what it has room for"))
}

fn numbers(bytes: &[u8]) -> Result<Vec<usize>> {
    let number = |word: &[u8]| Ok(usize::try_from(u64::from_le_bytes(word.try_into()?))?);
    bytes.chunks(size_of::<u64>()).map(number).collect()
}

/// As many of the wanted blocks as a host with `available` bytes has room for, if ranks with these plans run there on
/// the CPU.
pub fn room_on_host(
    available: usize,
    plans: &[MemoryPlan],
    weights: WeightsKind,
    limits: &Limits,
    Wanted { most, least, .. }: Wanted,
) -> Result<usize> {
    let is_file = weights == WeightsKind::File;
    let (mut fixed, mut block, mut dummies) = (0usize, 0usize, 0usize);
    for plan in plans {
        // Mapped weights lie in the page cache, which the system can free. Dummy weights are allocated.
        let weights = if is_file { 0 } else { plan.weights };
        fixed = fixed.saturating_add(plan.total(0) - plan.weights).saturating_add(weights);
        block = block.saturating_add(plan.kv_block);
        dummies = dummies.saturating_add(weights);
    }
    let room = available.saturating_sub(fixed) / block.max(1);
    if dummies > available {
        bail!(
            "the dummy weights alone need {}, but {} of memory are available, and they cannot be paged out; use a machine with more memory, or build a smaller model (--model-config)",
            bytes(dummies),
            bytes(available)
        );
    }
    if room < least {
        bail!(
            "the engine needs {} for {}activations and inputs and {} for the KV cache of the longest prompt, but {} of memory are available; lower --max-output-len, or build with a smaller --max-num-tokens (now {})",
            bytes(fixed),
            if is_file { "" } else { "dummy weights, " },
            bytes(least.saturating_mul(block)),
            bytes(available),
            limits.max_num_tokens,
        );
    }
    Ok(most.min(room))
}

#[cfg(test)]
mod tests {
    use mixtral_comm::threads;
    use mixtral_model::TokenId;

    use super::*;

    const LIMITS: Limits =
        Limits { max_batch_size: 2, max_num_tokens: 512, max_seq_len: 128, max_num_logits: 2, block_size: 16 };

    #[test]
    fn requests_want_what_a_batch_of_the_longest_needs() {
        let request = |input: usize, output: usize| Request {
            prompt: vec![TokenId(0); input],
            max_output_len: output,
            ..Request::default()
        };
        let wanted = |requests: &[Request]| Wanted::by(&LIMITS, requests);
        assert_eq!(wanted(&[]), Wanted { most: 1, least: 1, longest: 0 });
        let requests = [request(1, 1), request(20, 20), request(16, 1)];
        assert_eq!(wanted(&requests), Wanted { most: 5, least: 3, longest: 40 });
        // No request has more than the engine's sequences.
        assert_eq!(wanted(&[request(1000, usize::MAX)]), Wanted { most: 8, least: 8, longest: 128 });
    }

    /// Rank 0 alone knows what is wanted, and the rank with the least room decides.
    #[test]
    fn all_ranks_take_what_the_fullest_has_room_for() {
        let loaded = threads::run(3, |world| {
            let wanted = if world.rank() == 0 { Wanted { most: 90, least: 5, longest: 70 } } else { Wanted::default() };
            let of_leader = wanted.of_leader(Some(world)).map_err(|error| error.to_string())?;
            assert_eq!(of_leader, Wanted { most: 90, least: 5, longest: 70 });
            let room = || Ok(if world.rank() == 2 { of_leader.least + 7 } else { of_leader.most });
            agree(Some(world), room).map_err(|error| error.to_string())
        });
        assert_eq!(loaded.unwrap(), [12, 12, 12]);
    }

    #[test]
    fn a_rank_without_room_ends_the_others() {
        let loaded = threads::run(3, |world| {
            let room = || if world.rank() == 1 { bail!("the GPU is full") } else { Ok(9) };
            agree(Some(world), room).map_err(|error| error.to_string())
        });
        let failure = loaded.unwrap_err();
        assert_eq!((failure.rank, failure.cause.to_string().as_str()), (1, "the GPU is full"));
    }

    #[test]
    fn a_host_holds_what_its_ranks_allocate() {
        const MB: usize = 1_000_000;
        let plan = MemoryPlan { weights: 100 * MB, arena: 2 * MB, kv_block: MB, kv_blocks_at_limits: 8, inputs: MB };
        let (two, dummy, file) = ([plan; 2], WeightsKind::Dummy { seed: 0 }, WeightsKind::File);
        let wanted = Wanted { most: 30, least: 10, longest: 0 };
        let room = |available: usize, weights| room_on_host(available * MB, &two, weights, &LIMITS, wanted);
        // Both ranks' buffers and inputs, and a block of each: mapped weights take nothing.
        assert_eq!(room(6 + 2 * 40, file).unwrap(), 30);
        assert_eq!(room(6 + 2 * 12, file).unwrap(), 12);
        assert_eq!(room(206 + 2 * 12, dummy).unwrap(), 12);
        let message = |available, weights| room(available, weights).unwrap_err().to_string();
        insta::assert_snapshot!(message(20, file), @"the engine needs 6.0 MB for activations and inputs and 20.0 MB for the KV cache of the longest prompt, but 20.0 MB of memory are available; lower --max-output-len, or build with a smaller --max-num-tokens (now 512)");
        insta::assert_snapshot!(message(210, dummy), @"the engine needs 206.0 MB for dummy weights, activations and inputs and 20.0 MB for the KV cache of the longest prompt, but 210.0 MB of memory are available; lower --max-output-len, or build with a smaller --max-num-tokens (now 512)");
        insta::assert_snapshot!(message(199, dummy), @"the dummy weights alone need 200.0 MB, but 199.0 MB of memory are available, and they cannot be paged out; use a machine with more memory, or build a smaller model (--model-config)");
    }
}
