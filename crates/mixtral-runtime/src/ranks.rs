//! The ranks of a job: rank 0 drives, the others follow.
//!
//! Rank 0 broadcasts every step as one packed block, computes its own part, and gets tokens and logits back from the
//! first tensor-parallel rank of the last pipeline stage. It does not wait for a step's outputs before it launches the
//! next one, so that with several stages each has a step to work on.

use std::collections::VecDeque;
use std::time::Duration;

use mixtral_comm::{CommError, Group, World};
use mixtral_engine::{Backend, BackendError, Collectives, StepInputs, StepOutputs, WireError};
use mixtral_model::{Mapping, Rank};

use crate::execute::Executor;

/// Tags of messages between two ranks.
const ACTIVATIONS: u32 = 1;
const OUTPUTS: u32 = 2;
const COUNTS: u32 = 3;

/// The first byte of a broadcast: what rank 0 tells the others to do.
const STEP: u8 = 0;
const COUNT: u8 = 1;
const FINISH: u8 = 2;

fn peer(error: CommError) -> BackendError {
    BackendError::Peer(Box::new(error))
}

fn damaged(error: WireError) -> BackendError {
    BackendError::Peer(Box::new(error))
}

/// How a rank's program communicates with the other ranks.
pub struct RankCollectives {
    world: World,
    tensor_parallel: Group,
}

impl RankCollectives {
    /// The collectives of this rank of `world`, in the groups of `mapping`.
    ///
    /// # Errors
    /// If the groups cannot be made.
    pub fn new(world: &World, mapping: &Mapping) -> Result<Self, BackendError> {
        let first = world.rank() / mapping.tp_size * mapping.tp_size;
        let members: Vec<usize> = (first..first + mapping.tp_size).collect();
        let tensor_parallel = world.group(&members).map_err(peer)?;
        Ok(RankCollectives { world: world.clone(), tensor_parallel })
    }
}

impl Collectives for RankCollectives {
    fn all_gather(&self, mine: &[u8], all: &mut [u8]) -> Result<(), BackendError> {
        self.tensor_parallel.all_gather(mine, all).map_err(peer)
    }

    fn send(&self, to: usize, bytes: &[u8]) -> Result<(), BackendError> {
        self.world.send(to, ACTIVATIONS, bytes).map_err(peer)
    }

    fn recv(&self, from: usize, bytes: &mut [u8]) -> Result<(), BackendError> {
        let received = self.world.recv(from, ACTIVATIONS).map_err(peer)?;
        if received.len() != bytes.len() {
            return Err(BackendError::Other(format!(
                "rank {from} sent {} bytes of activations, expected {}; do all ranks run the same engine?",
                received.len(),
                bytes.len()
            )));
        }
        bytes.copy_from_slice(&received);
        Ok(())
    }

    fn check(&self) -> Result<(), BackendError> {
        self.world.check().map_err(peer)
    }
}

/// The rank whose outputs are used: the first rank of the last stage.
fn output_rank(mapping: &Mapping) -> usize {
    (mapping.pp_size - 1) * mapping.tp_size
}

/// The ranks that count the tokens of their stage's experts: the first rank of each stage.
fn counting_ranks(mapping: &Mapping) -> impl Iterator<Item = usize> {
    let tp_size = mapping.tp_size;
    (0..mapping.pp_size).map(move |stage| stage * tp_size)
}

/// Rank 0's executor: launches steps on all ranks.
pub struct Driver {
    world: World,
    everyone: Group,
    mapping: Mapping,
    backend: Box<dyn Backend>,
    /// The steps under way. Steps that rank 0 itself has computed to the end are here with their outputs.
    under_way: VecDeque<Option<StepOutputs>>,
}

impl Driver {
    /// An executor that drives the other ranks. They call [`follow`].
    ///
    /// # Errors
    /// If the group of all ranks cannot be made.
    pub fn new(world: &World, mapping: Mapping, backend: Box<dyn Backend>) -> Result<Self, BackendError> {
        let everyone = world.everyone().map_err(peer)?;
        Ok(Driver { world: world.clone(), everyone, mapping, backend, under_way: VecDeque::new() })
    }

    fn say(&self, kind: u8, body: &[u8]) -> Result<(), BackendError> {
        let mut message = Vec::with_capacity(1 + body.len());
        message.push(kind);
        message.extend_from_slice(body);
        self.everyone.broadcast(0, &mut message).map_err(peer)
    }
}

impl Executor for Driver {
    fn depth(&self) -> usize {
        self.mapping.pp_size
    }

    fn launch(&mut self, inputs: &StepInputs<'_>) -> Result<(), BackendError> {
        self.say(STEP, &inputs.pack())?;
        let outputs = self.backend.step(inputs)?;
        self.under_way.push_back((output_rank(&self.mapping) == 0).then_some(outputs));
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutputs, BackendError> {
        match self.under_way.pop_front() {
            None => Err(BackendError::Other("no step is under way".to_owned())),
            Some(Some(outputs)) => Ok(outputs),
            Some(None) => {
                let block = self.world.recv(output_rank(&self.mapping), OUTPUTS).map_err(peer)?;
                StepOutputs::unpack(&block).map_err(damaged)
            }
        }
    }

    fn kv_blocks(&self) -> usize {
        self.backend.kv_blocks()
    }

    fn expert_counts(&mut self) -> Result<Vec<Vec<u64>>, BackendError> {
        self.say(COUNT, &[])?;
        let mut counts = self.backend.expert_counts();
        for rank in counting_ranks(&self.mapping).filter(|&rank| rank != 0) {
            let block = self.world.recv(rank, COUNTS).map_err(peer)?;
            let theirs = block.chunks_exact(8).map(|n| u64::from_le_bytes(n.try_into().unwrap_or_default()));
            counts.iter_mut().flatten().zip(theirs).for_each(|(count, theirs)| *count += theirs);
        }
        Ok(counts)
    }

    fn op_times(&self) -> Vec<Duration> {
        self.backend.op_times()
    }
}

impl Drop for Driver {
    /// Tells the other ranks to finish. If that fails, they notice that rank 0 is gone.
    fn drop(&mut self) {
        let _ = self.say(FINISH, &[]);
    }
}

/// Runs on every other rank: computes the steps that rank 0 launches until rank 0 tells it to finish.
///
/// # Errors
/// The first failure of this rank's backend, or of another rank.
pub fn follow(world: &World, mapping: Mapping, backend: &mut dyn Backend) -> Result<(), BackendError> {
    let everyone = world.everyone().map_err(peer)?;
    let has_outputs = world.rank() == output_rank(&mapping);
    let counts = mapping.coords(Rank(world.rank())).tp_rank == 0;
    let mut message = Vec::new();
    loop {
        everyone.broadcast(0, &mut message).map_err(peer)?;
        match message.split_first() {
            Some((&STEP, block)) => {
                let mut inputs = StepInputs::unpack(block).map_err(damaged)?;
                if !has_outputs {
                    // Only the output rank draws and returns logits.
                    inputs.samples.clear();
                    inputs.scores.clear();
                    inputs.return_logits = false;
                }
                let outputs = backend.step(&inputs)?;
                if has_outputs {
                    world.send(0, OUTPUTS, &outputs.pack()).map_err(peer)?;
                }
            }
            Some((&COUNT, _)) if counts => {
                let block: Vec<u8> = backend.expert_counts().iter().flatten().flat_map(|n| n.to_le_bytes()).collect();
                world.send(0, COUNTS, &block).map_err(peer)?;
            }
            Some((&COUNT, _)) => {}
            Some((&FINISH, _)) => return Ok(()),
            _ => return Err(BackendError::Other("rank 0 said something that this version does not know".to_owned())),
        }
    }
}
