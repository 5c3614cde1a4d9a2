//! Bytes and FLOPs of an operation: the two numbers that bound its time from below.

use std::ops::AddAssign;

use mixtral_engine::{Op, Program, Rows};
use serde::Serialize;

/// What an operation moves and computes in one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Cost {
    /// Bytes of weights read, each once.
    pub weight_bytes: f64,
    /// Bytes of activations and cache read and written, each once.
    pub activation_bytes: f64,
    /// Floating-point operations, a multiply-add being two.
    pub flops: f64,
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        self.weight_bytes += other.weight_bytes;
        self.activation_bytes += other.activation_bytes;
        self.flops += other.flops;
    }
}

impl Cost {
    /// The cost of `n` such operations.
    #[must_use]
    pub fn times(&self, n: f64) -> Cost {
        Cost { weight_bytes: self.weight_bytes * n, activation_bytes: self.activation_bytes * n, flops: self.flops * n }
    }

    /// All bytes.
    #[must_use]
    pub fn bytes(&self) -> f64 {
        self.weight_bytes + self.activation_bytes
    }
}

/// A step to cost a program for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StepShape {
    /// Tokens.
    pub num_tokens: usize,
    /// Rows of logits.
    pub num_logits: usize,
    /// How many keys a token sees on average.
    pub context: usize,
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn f(n: usize) -> f64 {
    n as f64
}

/// What `op` costs in a step of `shape`. Tokens are assumed to hit experts evenly: with E experts of which each token
/// takes k, T tokens touch E · (1 − (1 − k/E)^T) experts.
#[must_use]
pub fn cost(program: &Program, op: &Op, shape: StepShape) -> Cost {
    let rows = |rows: Rows| f(program.num_rows(rows, shape.num_tokens, shape.num_logits));
    let buffer_bytes = |name: &str| program.buffer(name).map_or(0.0, |b| rows(b.rows) * f(b.cols * b.dtype.size()));
    let weight_bytes = |name: &str| program.weight(name).map_or(0.0, |w| f(w.num_bytes()));
    let size = |name: &str| program.buffer(name).map_or((0.0, 0.0), |b| (rows(b.rows), f(b.cols)));
    let mut cost = Cost {
        weight_bytes: op.weights().into_iter().map(weight_bytes).sum(),
        activation_bytes: op.reads().into_iter().chain(op.writes()).map(buffer_bytes).sum(),
        flops: 0.0,
    };
    let kv = program.kv;
    match op {
        Op::Embed { out, .. } => {
            cost.weight_bytes = buffer_bytes(out);
        }
        Op::Linear { input, weight, rows: range, out, .. } => {
            let ((n, k), (_, m)) = (size(input), size(out));
            cost.flops = 2.0 * n * k * m;
            if let (Some([start, end]), Some(w)) = (range, program.weight(weight)) {
                cost.weight_bytes *= f(end - start) / f(w.rows());
            }
        }
        Op::ExpertGateUp { input, weight, .. } | Op::ExpertDown { input, weight, .. } => {
            let Some(w) = program.weight(weight) else { return cost };
            let (experts, local) = (f(program.num_experts), f(w.shape[0]));
            let assignments = f(shape.num_tokens * program.top_k) * local / experts;
            let hit = 1.0 - (1.0 - f(program.top_k) / experts).powf(f(shape.num_tokens));
            cost.weight_bytes *= hit;
            cost.flops = 2.0 * assignments * f(w.rows() / w.shape[0]) * size(input).1;
        }
        Op::Attention { num_heads, .. } => {
            let seen = f(shape.num_tokens * shape.context);
            cost.flops = 4.0 * seen * f(num_heads * kv.head_dim);
            // Keys and values are read once a sequence; here a sequence is one token or one prompt.
            let sequences = if shape.num_tokens > shape.num_logits { f(shape.num_logits) } else { f(shape.num_tokens) };
            cost.activation_bytes += sequences * f(2 * shape.context * kv.num_kv_heads * kv.head_dim * kv.dtype.size());
        }
        Op::RopeWriteKv { .. } | Op::WriteKv { .. } => {
            cost.activation_bytes += f(shape.num_tokens * 2 * kv.num_kv_heads * kv.head_dim * kv.dtype.size());
        }
        _ => {}
    }
    cost
}
