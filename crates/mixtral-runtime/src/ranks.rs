//! The ranks of a job: rank 0 drives, the others follow.
//!
//! Rank 0 broadcasts every step as one packed block, computes its own part, and gets tokens and logits back from the
//! first tensor-parallel rank of the last pipeline stage. It does not wait for a step's outputs before it launches the
//! next one, so that with several stages each has a step to work on.
//!
//! With one stage, a step may take tokens that the step before draws. Every rank has the whole rows of logits then, and
//! every rank draws: all draw the same tokens, so none has to be told. With several stages the ranks that draw are not
//! those that need the token, so no step is launched ahead of a draw that it depends on.
//!
//! No rank listens for the next message while a step runs on its device, unless rank 0 has said that there is a next one:
//! a rank that listens would not notice that its device failed, and others wait for that device.

use std::collections::VecDeque;
use std::time::Duration;

use mixtral_comm::{CommError, Group, World};
use mixtral_engine::{Backend, BackendError, Collectives, DeviceIdle, Launched, StepInputs, StepOutputs, WireError};
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
const WAIT: u8 = 3;

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
    /// The steps under way.
    under_way: VecDeque<Launched>,
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

    fn runs_ahead(&self) -> bool {
        self.mapping.pp_size == 1 && self.backend.runs_ahead()
    }

    fn launch(&mut self, inputs: &StepInputs<'_>) -> Result<(), BackendError> {
        self.say(STEP, &inputs.pack())?;
        self.under_way.push_back(launch(self.mapping, &mut *self.backend, inputs)?);
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutputs, BackendError> {
        if self.runs_ahead() && self.under_way.len() == 1 {
            // There is no other step by which the ranks would learn that they have to wait for this one.
            self.say(WAIT, &[])?;
        }
        let outputs = match self.under_way.pop_front() {
            None => return Err(BackendError::Other("no step is under way".to_owned())),
            Some(Launched::Done(outputs)) => outputs,
            Some(Launched::UnderWay) => self.backend.collect()?,
        };
        if output_rank(&self.mapping) == 0 {
            return Ok(outputs);
        }
        let block = self.world.recv(output_rank(&self.mapping), OUTPUTS).map_err(peer)?;
        StepOutputs::unpack(&block).map_err(damaged)
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

    fn device_idle(&self) -> Option<DeviceIdle> {
        self.backend.device_idle()
    }
}

impl Drop for Driver {
    /// Tells the other ranks to finish. If that fails, they notice that rank 0 is gone.
    fn drop(&mut self) {
        let _ = self.say(FINISH, &[]);
    }
}

/// Begins this rank's part of a step, or computes it: with several stages, each stage has one step at a time.
fn launch(mapping: Mapping, backend: &mut dyn Backend, inputs: &StepInputs<'_>) -> Result<Launched, BackendError> {
    if mapping.pp_size == 1 { backend.launch(inputs) } else { backend.step(inputs).map(Launched::Done) }
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
    let mut is_under_way = false;
    loop {
        everyone.broadcast(0, &mut message).map_err(peer)?;
        match message.split_first() {
            Some((&STEP, block)) => {
                let mut inputs = StepInputs::unpack(block).map_err(damaged)?;
                if !has_outputs && mapping.pp_size > 1 {
                    // Only the output rank draws and returns logits.
                    inputs.samples.clear();
                    inputs.scores.clear();
                    inputs.return_logits = false;
                }
                let launched = launch(mapping, backend, &inputs)?;
                if std::mem::take(&mut is_under_way) {
                    backend.collect()?;
                }
                match launched {
                    Launched::UnderWay => is_under_way = true,
                    Launched::Done(outputs) if has_outputs => {
                        world.send(0, OUTPUTS, &outputs.pack()).map_err(peer)?;
                    }
                    Launched::Done(_) => {}
                }
            }
            Some((&WAIT, _)) => {
                if std::mem::take(&mut is_under_way) {
                    backend.collect()?;
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
