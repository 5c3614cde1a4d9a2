//! `mixtral build --explain`: the program with the bytes, FLOPs and predicted time of each operation.

use std::fmt::Write as _;

use mixtral_engine::Program;
use mixtral_engine::text::op_text;
use mixtral_kernels::{KernelImages, Resources};

use crate::cost::{Cost, StepShape, cost};

/// What a machine can do at most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roof {
    /// Bytes read from memory in a second.
    pub bytes_per_s: f64,
    /// Floating-point operations in a second.
    pub flops_per_s: f64,
}

impl Roof {
    /// The least time an operation of `cost` can take, in seconds.
    #[must_use]
    pub fn time(&self, cost: &Cost) -> f64 {
        (cost.bytes() / self.bytes_per_s).max(cost.flops / self.flops_per_s)
    }
}

/// The step shapes that are explained: one decode, and one prompt that fills a step.
#[must_use]
pub fn shapes(program: &Program) -> [(&'static str, StepShape); 2] {
    let prompt = program.limits.max_num_tokens.min(program.limits.max_seq_len).min(2048);
    [
        ("decode of 1 token", StepShape { num_tokens: 1, num_logits: 1, context: program.limits.max_seq_len.min(128) }),
        ("prefill", StepShape { num_tokens: prompt, num_logits: 1, context: prompt / 2 + 1 }),
    ]
}

/// The explanation of a rank's program, and of its kernels if it has any.
#[must_use]
pub fn explain(program: &Program, kernels: &[KernelImages], roof: Option<Roof>) -> String {
    let mut text = String::new();
    let memory = program.memory_plan();
    let _ = writeln!(
        text,
        "rank {} of {}: {} operations, weights {}, activations {}, KV cache {} a block of {} tokens ({} for {} sequences of {} tokens)",
        program.rank,
        program.world_size,
        program.ops.len(),
        bytes(memory.weights),
        bytes(memory.arena),
        bytes(memory.kv_block),
        program.limits.block_size,
        bytes(memory.kv_block.saturating_mul(memory.kv_blocks_at_limits)),
        program.limits.max_batch_size,
        program.limits.max_seq_len,
    );
    match kernels {
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
        let (mut total, mut time) = (Cost::default(), 0.0);
        for op in &program.ops {
            let one = cost(program, op, shape);
            let predicted = roof.map(|r| r.time(&one) * 1e6);
            time += predicted.unwrap_or(0.0);
            row(&mut text, &one, predicted, &op_text(op));
            total += one;
        }
        row(&mut text, &total, roof.map(|_| time), "total");
    }
    text
}

/// What the kernels of one target take.
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
        let _ = writeln!(text, "{}  {}", columns(&numbers), kernel.symbol);
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
