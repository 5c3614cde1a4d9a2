//! An engine's ranks, from start to end: rank 0 leads, the others follow.

use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use mixtral_build::explain::bytes;
use mixtral_comm::World;
use mixtral_cpu::{CpuBackend, CpuOptions};
use mixtral_engine::{EngineDir, MappedWeights, Program, Weights, WeightsKind};
use mixtral_model::Rank;
use mixtral_runtime::ranks::{Driver, RankCollectives, follow};
use mixtral_runtime::session::Geometry;
use mixtral_runtime::{Executor, Local, Request, Session, Tokenizer};

use super::{machine, ranks};

/// How every rank loads its part of the engine.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadOptions {
    /// Workers of each rank; all cores of the host, shared evenly, when absent.
    pub threads: Option<usize>,
    /// Whether tokens are counted by expert.
    pub count_experts: bool,
    /// Whether operations are timed.
    pub time_ops: bool,
}

/// What rank 0 has to lead with.
pub struct Job<'a> {
    engine: &'a EngineDir,
    world: Option<&'a World>,
    options: LoadOptions,
    program: Program,
}

/// Runs the engine's ranks: `lead` on rank 0, the others follow its session until it ends.
pub fn run(engine: &EngineDir, options: LoadOptions, lead: impl Fn(&Job<'_>) -> Result<()> + Sync) -> Result<()> {
    ranks::run(engine.config(), |world| match world {
        Some(world) if world.rank() > 0 => {
            let kv_blocks = agree_on_blocks(Some(world), 0)?;
            let mut backend = load(engine, options, Some(world), kv_blocks)?;
            Ok(follow(world, engine.config().mapping, &mut backend)?)
        }
        world => lead(&Job { engine, world, options, program: engine.program(Rank(0))? }),
    })
}

impl Job<'_> {
    /// What the engine takes.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            limits: self.program.limits,
            vocab_size: self.program.vocab_size,
            gather_context_logits: self.engine.config().gather_context_logits,
        }
    }

    /// Rank 0's program.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Loads the engine on all ranks, with a cache for `requests`. Once a job.
    pub fn session(&self, requests: &[Request], tokenizer: Option<Arc<Tokenizer>>) -> Result<Session> {
        let wanted = kv_blocks(self.engine, self.world.map_or(1, World::local_size), requests)?;
        let blocks = agree_on_blocks(self.world, wanted)?;
        let backend = Box::new(load(self.engine, self.options, self.world, blocks)?);
        let executor: Box<dyn Executor> = match self.world {
            None => Box::new(Local::new(backend)),
            Some(world) => Box::new(Driver::new(world, self.engine.config().mapping, backend)?),
        };
        Ok(Session::new(executor, self.geometry(), tokenizer))
    }
}

/// What rank 0 tells the others before they load: blocks of the cache.
fn agree_on_blocks(world: Option<&World>, blocks: usize) -> Result<usize> {
    let Some(world) = world else { return Ok(blocks) };
    let mut message = (blocks as u64).to_le_bytes().to_vec();
    world.everyone()?.broadcast(0, &mut message)?;
    let bytes = message.try_into().map_err(|_| anyhow!("rank 0 did not say how large the cache is"))?;
    Ok(usize::try_from(u64::from_le_bytes(bytes))?)
}

/// Loads this rank's part of the engine.
fn load(engine: &EngineDir, options: LoadOptions, world: Option<&World>, kv_blocks: usize) -> Result<CpuBackend> {
    let rank = Rank(world.map_or(0, World::rank));
    let weights = match engine.config().weights {
        WeightsKind::File => Weights::Source(Arc::new(MappedWeights(engine.weight_file(rank)?))),
        WeightsKind::Dummy { seed } => Weights::Dummy { seed },
    };
    let local_ranks = world.map_or(1, World::local_size);
    let threads = options.threads.unwrap_or_else(|| (machine::cores() / local_ranks).max(1));
    let LoadOptions { count_experts, time_ops, .. } = options;
    let cpu = CpuOptions { kv_blocks, threads, count_experts, time_ops, isa: None };
    let backend = CpuBackend::load(engine.program(rank)?, weights, cpu)?;
    let Some(world) = world else { return Ok(backend) };
    let backend = backend.with_ranks(Arc::new(RankCollectives::new(world, &engine.config().mapping)?));
    // Whoever cannot load says so before anyone computes.
    world.everyone()?.barrier()?;
    Ok(backend)
}

/// Blocks for as many of the requests at a time as the engine's batch and the memory of this host allow; checked before
/// anything is allocated.
fn kv_blocks(engine: &EngineDir, local_ranks: usize, requests: &[Request]) -> Result<usize> {
    let limits = engine.config().limits;
    let mut needs: Vec<usize> =
        requests.iter().map(|r| limits.blocks_for(r.prompt.len().saturating_add(r.max_output_len))).collect();
    needs.sort_unstable_by(|a, b| b.cmp(a));
    let largest = needs.first().copied().unwrap_or(1).min(limits.max_blocks_per_seq()).max(1);
    let wanted = needs.iter().take(limits.max_batch_size).sum::<usize>().max(largest);
    let Some(available) = machine::available_memory() else { return Ok(wanted) };
    let is_file = engine.config().weights == WeightsKind::File;
    let (mut fixed, mut block) = (0usize, 0usize);
    for rank in engine.config().mapping.ranks().take(local_ranks) {
        let plan = engine.program(rank)?.memory_plan();
        // Mapped weights live in the page cache; dummy ones are taken.
        let weights = if is_file { 0 } else { plan.weights };
        fixed = fixed.saturating_add(plan.total(0) - plan.weights).saturating_add(weights);
        block = block.saturating_add(plan.kv_block);
    }
    let room = available.saturating_sub(fixed) / block.max(1);
    if room < largest {
        bail!(
            "the engine needs {} for {}activations and inputs and {} for the KV cache of the longest prompt, but {} of memory are available; lower --max-output-len, or build with a smaller --max-num-tokens (now {})",
            bytes(fixed),
            if is_file { "" } else { "dummy weights, " },
            bytes(largest.saturating_mul(block)),
            bytes(available),
            limits.max_num_tokens,
        );
    }
    Ok(wanted.min(room))
}
