//! Steps of a session, and how long they took.

use std::time::Duration;

use anyhow::{Context, Result};
use mixtral_engine::DeviceIdle;
use mixtral_runtime::session::StepStats;
use mixtral_runtime::{Request, Session};

/// A step, and the time of each of its operations if operations are timed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MeasuredStep {
    pub stats: StepStats,
    pub ops: Vec<Duration>,
    /// How long the device had nothing to do before it, if the backend can tell.
    pub idle: Option<Duration>,
}

impl MeasuredStep {
    /// Adds the step behind this one.
    fn add(&mut self, next: MeasuredStep) {
        self.stats.decode_tokens += next.stats.decode_tokens;
        self.stats.time += next.stats.time;
        self.ops.iter_mut().zip(next.ops).for_each(|(sum, time)| *sum += time);
        self.idle = self.idle.zip(next.idle).map(|(sum, idle)| sum + idle);
    }
}

/// How long a device had nothing to do between two looks at it.
pub fn idle_between(before: Option<DeviceIdle>, after: Option<DeviceIdle>) -> Option<Duration> {
    Some(after?.time.saturating_sub(before?.time))
}

/// Answers requests together, and returns the steps that this took.
///
/// # Errors
/// If the session does not take one, or a step fails.
pub fn run_batch(session: &mut Session, requests: &[Request]) -> Result<Vec<MeasuredStep>> {
    for request in requests {
        session.submit(request.clone()).context("the engine does not take what is to be measured")?;
    }
    let mut steps = Vec::new();
    let mut before = (session.op_times(), session.device_idle());
    while !session.is_idle() {
        for event in session.step()? {
            event.ok()?;
        }
        let after = (session.op_times(), session.device_idle());
        let ops = after.0.iter().zip(&before.0).map(|(after, before)| after.saturating_sub(*before)).collect();
        let idle = idle_between(before.1, after.1);
        steps.push(MeasuredStep { stats: session.last_step(), ops, idle });
        before = after;
    }
    Ok(steps)
}

/// The rounds of steps in which each of `batch_size` sequences decodes a token, and nothing else is computed. In a pipeline of
/// `stages` that work at the same time, a round has up to as many steps, each with its share of the sequences.
pub fn decodes(steps: Vec<MeasuredStep>, batch_size: usize, stages: usize) -> Vec<MeasuredStep> {
    let mut rounds = Vec::new();
    let mut round: Option<(usize, MeasuredStep)> = None;
    for step in steps {
        if step.stats.prefill_tokens > 0 || step.stats.decode_tokens == 0 {
            round = None;
            continue;
        }
        let (count, sum) = match round.take() {
            None => (1, step),
            Some((count, mut sum)) => {
                sum.add(step);
                (count + 1, sum)
            }
        };
        if sum.stats.decode_tokens == batch_size {
            rounds.push(sum);
        } else if sum.stats.decode_tokens < batch_size && count < stages {
            round = Some((count, sum));
        }
    }
    rounds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_has_a_token_of_each_sequence() {
        let ms = Duration::from_millis;
        let step = |prefill_tokens, decode_tokens, time| MeasuredStep {
            stats: StepStats { prefill_tokens, decode_tokens, time: ms(time) },
            ops: vec![ms(time), ms(1)],
            idle: Some(ms(2)),
        };
        let times = |steps: &[MeasuredStep], batch_size, stages| -> Vec<Duration> {
            decodes(steps.to_vec(), batch_size, stages).iter().map(|round| round.stats.time).collect()
        };
        // Two stages: one half's prompts, then the other's, then the halves in turn.
        let steps = [step(9, 0, 50), step(9, 4, 60), step(0, 4, 10), step(0, 3, 11), step(0, 4, 12), step(0, 3, 13)];
        assert_eq!(times(&steps, 7, 2), [ms(21), ms(25)]);
        assert_eq!(times(&steps, 7, 1), []);
        assert_eq!(times(&steps, 4, 1), [ms(10), ms(12)]);
        let round = &decodes(steps.to_vec(), 7, 2)[0];
        assert_eq!((&round.ops[..], round.idle), (&[ms(21), ms(2)][..], Some(ms(4))));
        // A prompt in between begins a round anew, and so does the end of one half.
        let steps = [step(0, 4, 10), step(1, 3, 11), step(0, 3, 12), step(0, 4, 13), step(0, 3, 14), step(0, 3, 15)];
        assert_eq!(times(&steps, 7, 2), [ms(25)]);
        // A single sequence is in one step of a pipeline at a time.
        assert_eq!(times(&[step(0, 1, 3), step(0, 1, 4)], 1, 2), [ms(3), ms(4)]);
    }
}
