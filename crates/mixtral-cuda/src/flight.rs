//! Steps that the device computes while the host goes on.

use mixtral_engine::{DeviceIdle, StepInputs};
use mixtral_kernels::StepBlock;
use mixtral_kernels::step_block::Array;

use crate::CudaError;
use crate::driver::{Context, DeviceMemory, Event, Pinned, Stream};
use crate::exchange::Exchange;

/// How many steps can be under way: one that the device computes, and one behind it in the stream.
pub(crate) const MOST: usize = 2;

/// A step's memory for what goes to the device and comes from it, and the events at its ends. Steps take turns. A step's turn
/// comes again after it was waited for.
pub(crate) struct Turn {
    /// The step block, as the host writes it.
    pub(crate) staging: Pinned,
    /// The block's first part on the device, until the step before needs its own no more.
    ahead: DeviceMemory,
    /// When `ahead` is there.
    uploaded: Event,
    /// What the step drew.
    pub(crate) landing: Pinned,
    begin: Event,
    end: Event,
}

/// Bytes of the step block that are uploaded while the step before runs: all but the adjustments.
pub(crate) fn ahead_bytes(block: &StepBlock) -> usize {
    block.offset(Array::Adjustments)
}

/// A step that was launched.
pub(crate) struct Flight {
    /// Whose turn it is.
    pub(crate) turn: usize,
    /// Its number.
    pub(crate) step: u64,
    /// Whether it was waited for.
    pub(crate) is_done: bool,
    /// The rows of logits that it draws from, if it draws.
    pub(crate) rows: Vec<usize>,
    /// What it computes, in words.
    pub(crate) what: String,
}

/// The turns of steps, and how long the device waited between steps.
pub(crate) struct Turns {
    turns: [Turn; MOST],
    /// The stream of uploads beside a step.
    aside: Stream,
    /// The end of the step that was waited for last.
    last_end: Event,
    idle: Option<DeviceIdle>,
}

impl Turns {
    /// Allocates them.
    pub(crate) fn new(context: &Context, block: &StepBlock) -> Result<Turns, CudaError> {
        let turn = || {
            Ok::<_, CudaError>(Turn {
                staging: Pinned::new(context, block.bytes())?,
                ahead: DeviceMemory::new(context, ahead_bytes(block))?,
                uploaded: Event::new(context, false)?,
                landing: Pinned::new(context, block.capacity(Array::Drawn))?,
                begin: Event::new(context, true)?,
                end: Event::new(context, true)?,
            })
        };
        let (turns, aside) = ([turn()?, turn()?], Stream::new(context)?);
        Ok(Turns { turns, aside, last_end: Event::new(context, true)?, idle: None })
    }

    /// Brings the first `len` bytes of a turn's step block to the device's. A step that is under way still reads that, so
    /// they are uploaded beside it, and wait for its end on the device.
    pub(crate) fn upload(
        &mut self,
        turn: usize,
        len: usize,
        step: &DeviceMemory,
        stream: &Stream,
        behind_another: bool,
    ) -> Result<(), CudaError> {
        let Turn { staging, ahead, uploaded, .. } = &mut self.turns[turn % MOST];
        if !behind_another {
            return staging.upload(stream, 0, len, step, 0);
        }
        staging.upload(&self.aside, 0, len, ahead, 0)?;
        uploaded.record(&self.aside)?;
        stream.wait_for(uploaded)?;
        stream.copy(ahead, 0..len, step, 0)
    }

    /// The turn of a step.
    pub(crate) fn of(&mut self, turn: usize) -> &mut Turn {
        &mut self.turns[turn % MOST]
    }

    /// Waits for a step, if nobody did. Steps are waited for in the order in which they were launched.
    pub(crate) fn wait(&mut self, flight: &mut Flight, exchange: Option<&mut Exchange>) -> Result<(), CudaError> {
        if flight.is_done {
            return Ok(());
        }
        let Turn { begin, end, .. } = &mut self.turns[flight.turn % MOST];
        match exchange {
            Some(exchange) => exchange.wait(end)?,
            None => end.synchronize()?,
        }
        // The first step has none before it.
        self.idle = Some(match self.idle {
            None => DeviceIdle::default(),
            Some(DeviceIdle { pauses, time }) => {
                DeviceIdle { pauses: pauses + 1, time: time + self.last_end.until(begin)? }
            }
        });
        // The step after next records its end in the other event.
        std::mem::swap(&mut self.last_end, end);
        flight.is_done = true;
        Ok(())
    }

    /// How long the device had nothing to do between steps.
    pub(crate) fn idle(&self) -> DeviceIdle {
        self.idle.unwrap_or_default()
    }
}

impl Turn {
    /// Marks where the step begins in the stream.
    pub(crate) fn begin(&self, stream: &Stream) -> Result<(), CudaError> {
        self.begin.record(stream)
    }

    /// Marks where it ends.
    pub(crate) fn end(&self, stream: &Stream) -> Result<(), CudaError> {
        self.end.record(stream)
    }
}

/// What a step computes, in words.
pub(crate) fn words(inputs: &StepInputs<'_>) -> String {
    format!("{} tokens of {} sequences, {} decodes", inputs.num_tokens(), inputs.num_seqs(), inputs.num_decodes)
}
