//! `mixtral build --explain`: the program with the bytes, FLOPs and predicted time of each operation.

use std::fmt::Write as _;

use mixtral_engine::text::op_text;
use mixtral_engine::{Op, Program};
use mixtral_kernels::{KernelImages, Resources};

use crate::cost::{Cost, StepShape, cost};
use crate::fold::{alike, ranks_text, runs};

/// The highest rates that a machine can reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roof {
    /// Bytes read from memory in a second.
    pub bytes_per_s: f64,
    /// Floating-point operations in a second.
    pub flops_per_s: f64,
    /// The same of floats of 8 bits.
    pub fp8_flops_per_s: f64,
}

impl Roof {
    /// The least time an operation of `cost` can take, in seconds.
    #[must_use]
    pub fn time(&self, cost: &Cost) -> f64 {
        let computing = (cost.flops - cost.fp8_flops) / self.flops_per_s + cost.fp8_flops / self.fp8_flops_per_s;
        (cost.bytes() / self.bytes_per_s).max(computing)
    }
}

/// The step shapes that are explained: one decode, and one prompt that fills a step (at most 2048 tokens).
#[must_use]
pub fn shapes(program: &Program) -> [(&'static str, StepShape); 2] {
    let prompt = program.limits.max_num_tokens.min(program.limits.max_seq_len).min(2048);
    [
        ("decode of 1 token", StepShape { num_tokens: 1, num_logits: 1, context: program.limits.max_seq_len.min(128) }),
        ("prefill", StepShape { num_tokens: prompt, num_logits: 1, context: prompt / 2 + 1 }),
    ]
}

/// The explanation of all ranks' programs, and of their kernels if they have any. `kernels` has an entry for each rank,
/// or is empty. Operations and ranks that are alike are explained once.
#[must_use]
pub fn explain(programs: &[Program], kernels: &[Vec<KernelImages>], roof: Option<Roof>) -> String {
    let mut text = String::new();
    for members in alike(programs) {
        let program = &programs[members[0]];
        let kernels = kernels.get(members[0]).map_or(&[][..], Vec::as_slice);
        if !text.is_empty() {
            text.push('\n');
        }
        explain_rank(&mut text, &ranks_text(&members, program.world_size), program, kernels, roof);
    }
    text
}

fn explain_rank(text: &mut String, who: &str, program: &Program, kernels: &[KernelImages], roof: Option<Roof>) {
    let memory = program.memory_plan();
    let _ = writeln!(
        text,
        "{who}: {} operations, weights {}, activations {}, KV cache {} a block of {} tokens ({} for {} sequences of {} tokens){}",
        program.ops.len(),
        bytes(memory.weights),
        bytes(memory.arena),
        bytes(memory.kv_block),
        program.limits.block_size,
        bytes(memory.kv_block.saturating_mul(memory.kv_blocks_at_limits)),
        program.limits.max_batch_size,
        program.limits.max_seq_len,
        if program.attends_in_fp8() { ", attention of prompts in fp8" } else { "" },
    );
    match kernels {
        [] if has_ladders(program) => {
            let _ = writeln!(text, "kernels: not compiled; the plan of each linear is behind it");
        }
        [] => {
            let _ = writeln!(
                text,
                "kernels: the CPU backend's dot tiles for every linear; ladders are for GPUs and stay empty"
            );
        }
        _ => kernels.iter().for_each(|images| text.push_str(&kernel_table(images))),
    }
    for (name, shape) in shapes(program) {
        let _ = writeln!(text, "\n{name}: {} tokens, {} keys seen by each", shape.num_tokens, shape.context);
        let _ = writeln!(text, "{:>12} {:>12} {:>10}  operation", "MB", "MFLOP", "us at roof");
        let time = |cost: &Cost| roof.map(|r| r.time(cost) * 1e6);
        let (mut total, mut total_time) = (Cost::default(), 0.0);
        for run in runs(program) {
            let (mut once, mut once_time) = (Cost::default(), 0.0);
            let is_folded = run.times > 1;
            if is_folded {
                let _ = writeln!(text, "{:>38}{}, each as this one:", "", run.layers(program));
            }
            for op in &program.ops[run.shown()] {
                let one = cost(program, op, shape);
                let indent = if is_folded { "  " } else { "" };
                row(text, &one, time(&one), &format!("{indent}{}", op_line(op, shape.num_tokens)));
                once_time += time(&one).unwrap_or(0.0);
                once += one;
            }
            let times = count(run.times);
            let all = once.times(times);
            if is_folded {
                let predicted = roof.map(|_| once_time * times);
                row(text, &all, predicted, &format!("all {} of these", run.times));
            }
            total_time += once_time * times;
            total += all;
        }
        row(text, &total, roof.map(|_| total_time), "total");
    }
}

/// Whether the program is for GPUs: then every linear has a ladder.
fn has_ladders(program: &Program) -> bool {
    program.ops.iter().any(|op| matches!(op, Op::Linear { ladder, .. } if !ladder.is_empty()))
}

#[expect(clippy::cast_precision_loss, reason = "a few hundred at most")]
fn count(n: usize) -> f64 {
    n as f64
}

/// An operation as in the program's text, with the plan for `tokens` tokens in place of its ladder.
fn op_line(op: &Op, tokens: usize) -> String {
    let mut op = op.clone();
    let rungs = match &mut op {
        Op::Linear { ladder, .. } | Op::ExpertGateUp { ladder, .. } | Op::ExpertDown { ladder, .. } => {
            std::mem::take(ladder)
        }
        _ => Vec::new(),
    };
    let plan = rungs.into_iter().find(|rung| rung.max_tokens >= tokens);
    plan.map_or_else(|| op_text(&op), |rung| format!("{} [{}]", op_text(&op), rung.plan))
}

/// How many characters of a kernel's name are shown.
const SYMBOL_WIDTH: usize = 100;

/// A table of the resources that the kernels of one target take.
#[must_use]
pub fn kernel_table(images: &KernelImages) -> String {
    let size = images.iter().map(|kernel| kernel.code.len()).sum();
    let mut text = format!("kernels for {}: {}, {}\n", images.code, images.iter().count(), bytes(size));
    if images.iter().any(|kernel| kernel.resources.is_some()) {
        let head = ["registers", "threads", "static", "dynamic", "local", "spilled"];
        let _ = writeln!(text, "{}  kernel (bytes of shared memory a CTA, of local memory a thread)", columns(&head));
    }
    for kernel in images.iter() {
        let Some(Resources { registers, static_shared, stack, spills }) = kernel.resources else { continue };
        let numbers = [registers, kernel.threads, static_shared, kernel.shared_bytes, stack, spills.0 + spills.1];
        let cut = kernel.symbol.get(..SYMBOL_WIDTH).map_or(kernel.symbol.clone(), |start| format!("{start}…"));
        let _ = writeln!(text, "{}  {cut}", columns(&numbers));
    }
    text
}

fn columns<T: std::fmt::Display>(cells: &[T]) -> String {
    cells.iter().map(|cell| format!("{cell:>10}")).collect()
}

fn row(text: &mut String, cost: &Cost, time: Option<f64>, what: &str) {
    let time = time.map_or("-".to_owned(), |us| format!("{us:.1}"));
    let _ = writeln!(text, "{:>12.3} {:>12.2} {time:>10}  {what}", cost.bytes() / 1e6, cost.flops / 1e6);
}

/// A byte count for people: `1.50 GB`.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "for people")]
pub fn bytes(n: usize) -> String {
    let n = n as f64;
    match n {
        _ if n >= 1e9 => format!("{:.2} GB", n / 1e9),
        _ if n >= 1e6 => format!("{:.1} MB", n / 1e6),
        _ if n >= 1e3 => format!("{:.1} kB", n / 1e3),
        _ => format!("{n} B"),
    }
}
