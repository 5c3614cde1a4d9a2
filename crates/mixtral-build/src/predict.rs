//! Predicts how long a step of a whole job takes on GPUs, so that layouts can be compared before anything runs.
//!
//! A rank's time is the sum of its operations' times at the roof, of its collectives and of its launches. With whole
//! experts on ranks, every layer ends when the rank that got most has computed it. The stages of a pipeline compute at
//! the same time, each another part of the sequences.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::ops::AddAssign;

use mixtral_engine::{Op, PIPELINE_PROMPT_TOKENS, Program};
use mixtral_kernels::{Family, LinearPlan, LowerError, Schedule, Target, shares_from};

use crate::cost::{Cost, StepShape, cost};
use crate::gpu::Gpu;
use crate::spread::Spread;

/// What a step's time is made of, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Parts {
    /// Reading weights and activations, and computing, with experts spread evenly.
    pub work: f64,
    /// Exchanging rows with other ranks.
    pub collectives: f64,
    /// Launches.
    pub launches: f64,
    /// Waiting for the rank whose experts got most.
    pub waiting: f64,
}

impl AddAssign for Parts {
    fn add_assign(&mut self, other: Parts) {
        self.work += other.work;
        self.collectives += other.collectives;
        self.launches += other.launches;
        self.waiting += other.waiting;
    }
}

impl Parts {
    /// The whole time.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.work + self.collectives + self.launches + self.waiting
    }

    fn times(&self, n: usize) -> Parts {
        let n = f(n);
        Parts {
            work: self.work * n,
            collectives: self.collectives * n,
            launches: self.launches * n,
            waiting: self.waiting * n,
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn f(n: usize) -> f64 {
    n as f64
}

/// What a job computes: one token of each of some sequences, or some prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// The next token of `sequences` sequences, each of `context` keys.
    Decode {
        /// How many.
        sequences: usize,
        /// Keys of each.
        context: usize,
    },
    /// Prompts of `len` tokens.
    Prefill {
        /// How many.
        prompts: usize,
        /// Tokens of each.
        len: usize,
    },
}

impl Task {
    fn sequences(&self) -> usize {
        match *self {
            Task::Decode { sequences, .. } => sequences,
            Task::Prefill { prompts, .. } => prompts,
        }
    }

    fn tokens_each(&self) -> usize {
        match *self {
            Task::Decode { .. } => 1,
            Task::Prefill { len, .. } => len,
        }
    }

    /// The step that computes some of the sequences.
    fn step(&self, sequences: usize) -> StepShape {
        let context = match *self {
            Task::Decode { context, .. } => context,
            Task::Prefill { len, .. } => len / 2 + 1,
        };
        StepShape { num_tokens: sequences * self.tokens_each(), num_logits: sequences, context }
    }
}

/// The prediction of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// What is computed.
    pub task: Task,
    /// The sequences of each step: as many as the task has, or with pipeline stages a share of them.
    pub micro_batch: usize,
    /// The time of a step in each pipeline stage.
    pub stages: Vec<Parts>,
    /// The time of the task.
    pub time: Parts,
}

/// An engine's ranks on GPUs, from whose programs and launches steps are predicted.
#[derive(Debug)]
pub struct Job<'a> {
    gpu: Gpu,
    world_size: usize,
    stages: Vec<Stage<'a>>,
}

/// A pipeline stage. All of its ranks take the same time: each waits for the others.
#[derive(Debug)]
struct Stage<'a> {
    /// The first rank's program.
    program: &'a Program,
    /// What it launches.
    schedule: Schedule,
    /// Ranks over which whole experts are divided.
    groups: usize,
}

impl<'a> Job<'a> {
    /// The job of an engine's programs, one for each rank, with kernels of `family` on GPUs like `gpu`.
    ///
    /// # Errors
    /// An operation that has no kernel.
    pub fn new(programs: &'a [Program], gpu: Gpu, family: Family) -> Result<Job<'a>, LowerError> {
        let tp_size = programs.first().map_or(1, |program| program.tp_size.max(1));
        let stages = programs
            .chunks(tp_size)
            .map(|ranks| {
                let groups = ranks.iter().filter_map(experts).collect::<BTreeSet<_>>().len();
                Ok(Stage { program: &ranks[0], schedule: Schedule::new(&ranks[0], Target { family })?, groups })
            })
            .collect::<Result<_, LowerError>>()?;
        Ok(Job { gpu, world_size: programs.len(), stages })
    }

    /// Predicts how long a task takes.
    #[must_use]
    pub fn predict(&self, task: Task) -> Prediction {
        // A step takes its share of the sequences, so that every stage has one to work on, and of prompts no more than the session does.
        let share = task.sequences().div_ceil(self.stages.len().max(1)).max(1);
        let micro_batch = match task {
            Task::Prefill { len, .. } if self.stages.len() > 1 => share.min(PIPELINE_PROMPT_TOKENS / len.max(1)).max(1),
            _ => share,
        };
        let decodes = matches!(task, Task::Decode { .. });
        let shape = task.step(micro_batch);
        let stages: Vec<Parts> = self.stages.iter().map(|stage| stage.step(shape, decodes, &self.gpu)).collect();
        let time = pipeline(&stages, task.sequences().div_ceil(micro_batch), decodes);
        Prediction { task, micro_batch, stages, time }
    }

    /// What is predicted for the engine: decodes of some batch sizes, one prompt, and as many as fill a step.
    #[must_use]
    pub fn predictions(&self) -> Vec<Prediction> {
        let Some(limits) = self.stages.first().map(|stage| stage.program.limits) else { return Vec::new() };
        let context = limits.max_seq_len.min(128);
        let sizes =
            [1, 8, 64, 256].into_iter().filter(|&size| size <= limits.max_batch_size.min(limits.max_num_tokens));
        let len = limits.max_num_tokens.min(limits.max_seq_len).min(2048);
        let full = (limits.max_num_tokens / len.max(1)).min(limits.max_batch_size);
        let prompts = std::iter::once(1).chain((full > 1).then_some(full));
        let decodes = sizes.map(|sequences| Task::Decode { sequences, context });
        let prefills = prompts.map(|prompts| Task::Prefill { prompts, len });
        decodes.chain(prefills).map(|task| self.predict(task)).collect()
    }

    /// A table of the predictions, for people.
    #[must_use]
    pub fn table(&self) -> String {
        let Gpu { name, roof, launch_s, link } = self.gpu;
        let mut text = format!(
            "predicted on {}, if tokens spread evenly over experts: {:.0} GB/s read, {:.0} TFLOP/s, {:.1} us a launch, {:.0} GB/s and {:.1} us to another GPU\n",
            match self.world_size {
                1 => name.to_owned(),
                ranks => format!("{ranks} GPUs like {name}"),
            },
            roof.bytes_per_s / 1e9,
            roof.flops_per_s / 1e12,
            launch_s * 1e6,
            link.bytes_per_s / 1e9,
            link.latency_s * 1e6,
        );
        let columns = ["ms", "tok/s", "work", "collectives", "launches", "fullest rank"];
        let [ms, rate, work, collectives, launches, waiting] = columns;
        let _ = write!(
            text,
            "{:>18} {ms:>9} {rate:>8}  = {work:>8} + {collectives:>11} + {launches:>8} + {waiting:>12}",
            ""
        );
        let is_pipeline = self.stages.len() > 1;
        text.push_str(if is_pipeline { "   steps and their ms in each stage\n" } else { "\n" });
        for Prediction { task, micro_batch, stages, time } in self.predictions() {
            let name = match task {
                Task::Decode { sequences, .. } => format!("decode of {sequences}"),
                Task::Prefill { prompts, len } => format!("prefill of {prompts} × {len}"),
            };
            let rate = f(task.sequences() * task.tokens_each()) / time.total();
            let [total, work, collectives, launches, waiting] =
                [time.total(), time.work, time.collectives, time.launches, time.waiting].map(|seconds| 1e3 * seconds);
            let _ = write!(
                text,
                "{name:>18} {total:>9.2} {rate:>8.0}  = {work:>8.2} + {collectives:>11.2} + {launches:>8.2} + {waiting:>12.2}"
            );
            if is_pipeline {
                let each: Vec<String> = stages.iter().map(|stage| format!("{:.2}", 1e3 * stage.total())).collect();
                let steps = task.sequences().div_ceil(micro_batch);
                let _ = write!(text, "   {steps} of {micro_batch}: {}", each.join(", "));
            }
            text.push('\n');
        }
        text
    }
}

impl Stage<'_> {
    /// The time of a step.
    fn step(&self, shape: StepShape, decodes: bool, gpu: &Gpu) -> Parts {
        let program = self.program;
        let launches = self.schedule.for_step(shape.num_tokens, decodes).map_or(0, |(_, work)| work.len());
        let mut parts = Parts { launches: gpu.launch_s * f(launches), ..Parts::default() };
        for op in &program.ops {
            let even = in_tiles(program, op, shape, cost(program, op, shape));
            let time = gpu.roof.time(&even);
            parts.work += time;
            if let (Op::ExpertGateUp { weight, .. } | Op::ExpertDown { weight, .. }, 2..) = (op, self.groups) {
                let own = program.weight(weight).map_or(0, |weight| weight.shape[0]);
                let spread = Spread { num_experts: program.num_experts, top_k: program.top_k, groups: self.groups };
                parts.waiting += (gpu.roof.time(&fullest(&even, own, &spread, shape.num_tokens)) - time).max(0.0);
            }
            parts.collectives +=
                sent(program, op, shape).map_or(0.0, |sent| sent.iter().map(|&b| gpu.link.time(b)).sum());
        }
        parts
    }
}

/// The time until all micro-batches went through all stages once. Decodes go round: when a stage has done all
/// micro-batches, the next tokens of the first one are there, or are waited for. Prompts go through once, from an empty
/// pipeline.
#[must_use]
pub fn pipeline(stages: &[Parts], micro_batches: usize, goes_round: bool) -> Parts {
    let mut through = Parts::default();
    stages.iter().for_each(|stage| through += *stage);
    let Some(slowest) = stages.iter().max_by(|a, b| a.total().total_cmp(&b.total())) else { return through };
    if goes_round {
        let busy = slowest.times(micro_batches);
        return if busy.total() > through.total() { busy } else { through };
    }
    through += slowest.times(micro_batches.saturating_sub(1));
    through
}

/// The experts of a rank, if its model has a router.
fn experts(program: &Program) -> Option<[usize; 2]> {
    program.ops.iter().find_map(|op| match op {
        Op::Route { experts, .. } | Op::ExpertSort { experts, .. } => Some(*experts),
        _ => None,
    })
}

/// The cost on the rank that got most, given that of a rank which has `own` experts and gets what is likely.
fn fullest(likely: &Cost, own: usize, spread: &Spread, tokens: usize) -> Cost {
    let hit: f64 = spread.experts_hit(tokens).iter().enumerate().map(|(hit, p)| f(hit) * p).sum();
    let share = f(own) / f(spread.num_experts);
    let more = spread.most_assignments(tokens) / (f(tokens * spread.top_k) * share);
    Cost {
        weight_bytes: likely.weight_bytes * spread.most_experts_hit(tokens) / (hit * share),
        flops: likely.flops * more,
        fp8_flops: likely.fp8_flops * more,
        ..*likely
    }
}

/// The cost with FLOPs that fill whole tiles of the plan: a tile of few tokens takes nearly as long as a full one.
fn in_tiles(program: &Program, op: &Op, shape: StepShape, mut cost: Cost) -> Cost {
    let (Op::Linear { ladder, .. } | Op::ExpertGateUp { ladder, .. } | Op::ExpertDown { ladder, .. }) = op else {
        return cost;
    };
    let tokens = shape.num_tokens;
    let plan = ladder.iter().find(|rung| rung.max_tokens >= tokens).and_then(|rung| rung.plan.parse().ok());
    let cols = match plan {
        Some(LinearPlan::Mma { cols, .. } | LinearPlan::Wgmma { cols, .. }) => cols as usize,
        _ => 1,
    };
    let filled = if let Op::Linear { .. } = op {
        f(tokens.next_multiple_of(cols)) / f(tokens.max(1))
    } else {
        let spread = Spread { num_experts: program.num_experts, top_k: program.top_k, groups: 1 };
        spread.tile_columns(tokens, cols) * f(spread.num_experts) / f((tokens * spread.top_k).max(1))
    };
    cost.flops *= filled;
    cost.fp8_flops *= filled;
    cost
}

/// Bytes that a rank sends to others in an operation, each time that all wait for what the others sent; `None` if it
/// exchanges nothing. A `recv` waits for the `send` of the stage before, which counts.
fn sent(program: &Program, op: &Op, shape: StepShape) -> Option<Vec<f64>> {
    let (input, receivers) = match op {
        Op::AllReduce { input, .. } | Op::AllGather { input, .. } => (input, program.tp_size - 1),
        Op::Send { input, .. } => (input, 1),
        _ => return None,
    };
    let buffer = program.buffer(input)?;
    let rows = program.num_rows(buffer.rows, shape.num_tokens, shape.num_logits);
    let bytes = f(rows * buffer.cols * buffer.dtype.size() * receivers);
    let in_shares = shares_from(buffer, program.tp_size).is_some_and(|from| rows >= from);
    Some(match op {
        // Each rank's parts of what others sum, and the sums of its own share.
        Op::AllReduce { .. } if in_shares => vec![bytes / f(program.tp_size); 2],
        _ => vec![bytes],
    })
}

#[cfg(test)]
mod tests {
    use mixtral_checkpoint::CheckpointConfig;
    use mixtral_engine::Limits;
    use mixtral_kernels::{Arch, Search};
    use mixtral_model::{DType, Formats, Mapping, ModelConfig, WeightFormat};

    use super::*;
    use crate::{DenseLinears, KernelOptions, lower};

    /// The engines of `benches/runs/2026-11-28-h200-x2`.
    fn programs(mapping: Mapping) -> Vec<Program> {
        programs_of(ModelConfig::mixtral_8x7b(DType::Bf16), mapping)
    }

    fn programs_of(model: ModelConfig, mapping: Mapping) -> Vec<Program> {
        let config = CheckpointConfig::new(model, mapping);
        let limits = Limits {
            max_batch_size: 512,
            max_num_tokens: 16384,
            max_seq_len: 4096,
            max_num_logits: 512,
            block_size: 64,
        };
        let kernels = KernelOptions {
            archs: vec![Arch::SM_90A],
            dense_linears: DenseLinears::Tuned,
            tuned_experts: true,
            workers: 1,
            nvrtc: Search::default(),
            cache: None,
        };
        let mut programs: Vec<Program> = mapping.ranks().map(|rank| lower(&config, rank, limits)).collect();
        programs.iter_mut().for_each(|program| kernels.fill_ladders(program));
        programs
    }

    const ONE: Mapping = Mapping { tp_size: 1, pp_size: 1, moe_tp_size: 1, moe_ep_size: 1 };
    const SLICES: Mapping = Mapping { tp_size: 2, moe_tp_size: 2, ..ONE };
    const WHOLE_EXPERTS: Mapping = Mapping { tp_size: 2, moe_ep_size: 2, ..ONE };
    const STAGES: Mapping = Mapping { pp_size: 2, ..ONE };
    const HYBRID: Mapping = Mapping { tp_size: 4, moe_tp_size: 2, moe_ep_size: 2, ..ONE };

    fn h200() -> Gpu {
        Gpu::of(Family::Hopper, DType::Bf16).unwrap()
    }

    #[test]
    fn tables_of_layouts() {
        let table = |mapping| Job::new(&programs(mapping), h200(), Family::Hopper).unwrap().table();
        insta::assert_snapshot!([ONE, SLICES, WHOLE_EXPERTS, HYBRID, STAGES].map(table).join("\n"));
    }

    /// No GPU has run these (`docs/perf/cuda.md`).
    #[test]
    fn table_of_fp8() {
        let mut model = ModelConfig::mixtral_8x7b(DType::Bf16);
        model.formats = Formats { attention: WeightFormat::Fp8, feed_forward: WeightFormat::Fp8 };
        let programs = programs_of(model, ONE);
        insta::assert_snapshot!(Job::new(&programs, h200(), Family::Hopper).unwrap().table());
    }

    /// Milliseconds that were measured (`docs/perf/ranks.md`, `docs/perf/cuda.md`).
    #[test]
    fn predictions_are_near_what_was_measured() {
        let decode = |sequences| Task::Decode { sequences, context: 128 };
        let prefill = |prompts| Task::Prefill { prompts, len: 2048 };
        let one = [(decode(1), 6.34), (decode(8), 19.1), (decode(64), 22.3), (decode(256), 25.9), (prefill(8), 663.0)];
        let slices = [
            (decode(1), 3.80),
            (decode(8), 10.43),
            (decode(64), 12.17),
            (decode(256), 14.45),
            (prefill(1), 55.4),
            (prefill(8), 372.0),
        ];
        let whole =
            [(decode(1), 4.91), (decode(8), 11.2), (decode(64), 12.12), (decode(256), 14.35), (prefill(8), 384.0)];
        let stages = [(decode(1), 6.45), (prefill(8), 437.0)];
        for (mapping, measured) in [(ONE, &one[..]), (SLICES, &slices), (WHOLE_EXPERTS, &whole), (STAGES, &stages)] {
            let programs = programs(mapping);
            let job = Job::new(&programs, h200(), Family::Hopper).unwrap();
            for (task, ms) in measured {
                let predicted = 1e3 * job.predict(*task).time.total();
                let off = predicted / ms - 1.0;
                assert!(off.abs() < 0.15, "{mapping:?} {task:?}: {predicted} ms, but {ms} were measured");
            }
        }
    }

    #[test]
    fn a_pipeline_waits_for_its_slowest_stage_or_for_the_way_round() {
        let stage = |work| Parts { work, launches: 1.0, ..Parts::default() };
        let total = |micro_batches, goes_round| pipeline(&[stage(3.0), stage(5.0)], micro_batches, goes_round).total();
        // One sequence goes through both stages. Two keep the slower one busy.
        assert_eq!((total(1, true), total(2, true)), (10.0, 12.0));
        // Prompts: through both, and the slower one once more for each further step.
        assert_eq!((total(1, false), total(3, false)), (10.0, 22.0));
        assert_eq!(pipeline(&[], 1, true), Parts::default());
    }

    #[test]
    fn collectives_send_to_every_other_rank() {
        let programs = programs(HYBRID);
        let bytes = |name: &str, num_tokens| {
            let op = programs[0].ops.iter().find(|op| op.name() == name).unwrap();
            sent(&programs[0], op, StepShape { num_tokens, num_logits: 2, context: 1 })
        };
        assert_eq!(bytes("all_reduce", 3), Some(vec![3.0 * 3.0 * 4096.0 * 2.0]));
        assert_eq!(bytes("all_gather", 3), Some(vec![3.0 * 2.0 * 8000.0 * 4.0]));
        assert_eq!(bytes("linear", 3), None);
        // From here on the ranks sum in shares: three quarters of the rows, and then the sums of a quarter to three.
        assert_eq!(bytes("all_reduce", 38), Some(vec![38.0 * 3.0 * 4096.0 * 2.0]));
        assert_eq!(bytes("all_reduce", 39), Some(vec![39.0 * 0.75 * 4096.0 * 2.0; 2]));
        let link = h200().link;
        assert_eq!(link.time(link.bytes_per_s), link.latency_s + 1.0);
    }
}
