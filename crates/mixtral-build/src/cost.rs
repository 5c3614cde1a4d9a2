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
    /// Those of them that multiply floats of 8 bits.
    pub fp8_flops: f64,
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        self.weight_bytes += other.weight_bytes;
        self.activation_bytes += other.activation_bytes;
        self.flops += other.flops;
        self.fp8_flops += other.fp8_flops;
    }
}

impl Cost {
    /// The cost of `n` such operations.
    #[must_use]
    pub fn times(&self, n: f64) -> Cost {
        Cost {
            weight_bytes: self.weight_bytes * n,
            activation_bytes: self.activation_bytes * n,
            flops: self.flops * n,
            fp8_flops: self.fp8_flops * n,
        }
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
        ..Cost::default()
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
        Op::Attention { num_heads, fp8_context, .. } => {
            let seen = f(shape.num_tokens * shape.context);
            cost.flops = 4.0 * seen * f(num_heads * kv.head_dim);
            // Keys and values are read once a sequence; here a sequence is one token or one prompt.
            let is_prompts = shape.num_tokens > shape.num_logits;
            let sequences = f(if is_prompts { shape.num_logits } else { shape.num_tokens });
            if *fp8_context && is_prompts {
                cost.fp8_flops = cost.flops;
            }
            cost.activation_bytes +=
                sequences * f(2 * shape.context * kv.num_kv_heads * kv.head_dim * kv.elem().size());
        }
        Op::RopeWriteKv { .. } | Op::WriteKv { .. } => {
            cost.activation_bytes += f(shape.num_tokens * 2 * kv.num_kv_heads * kv.head_dim * kv.elem().size());
        }
        _ => {}
    }
    let is_fp8 = |name: &str| program.weight(name).is_some_and(|weight| weight.format.is_fp8());
    if op.weights().into_iter().any(is_fp8) {
        cost.fp8_flops = cost.flops;
    }
    cost
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2 of 5 experts a token, three KV heads of 4 elements, and bf16.
    const HEAD: &str = "mixtral-program 1
program rank=0 world_size=1 tp_size=1 dtype=bfloat16 vocab_size=20 num_layers=1 num_experts=5 top_k=2 arena_bytes=65536
limits max_batch_size=8 max_num_tokens=8 max_seq_len=16 max_num_logits=8 block_size=4
kv num_layers=1 num_kv_heads=3 head_dim=4 dtype=bfloat16
buffer name=hidden dtype=bf16 rows=tokens cols=12 offset=0
buffer name=narrow dtype=bf16 rows=tokens cols=4 offset=4096
buffer name=heads dtype=bf16 rows=tokens cols=24 offset=8192
buffer name=attended dtype=bf16 rows=tokens cols=24 offset=12288
buffer name=qkv dtype=bf16 rows=tokens cols=48 offset=16384
buffer name=offsets dtype=i32 rows=one cols=4 offset=20480
buffer name=order dtype=i32 rows=assignments cols=1 offset=24576
buffer name=activated dtype=bf16 rows=assignments cols=7 offset=28672
buffer name=down dtype=bf16 rows=assignments cols=12 offset=32768
buffer name=last dtype=bf16 rows=logits cols=12 offset=36864
weight name=table dtype=bfloat16 shape=[20,12] format=plain
weight name=linear dtype=bfloat16 shape=[7,12] format=plain
weight name=up dtype=bfloat16 shape=[3,14,12] format=plain
weight name=down dtype=bfloat16 shape=[3,12,7] format=plain
";

    /// Bytes of weights, bytes of activations, and FLOPs.
    fn costs(op: &str, num_tokens: usize, num_logits: usize) -> [f64; 3] {
        let program = Program::parse(&format!("{HEAD}op {op}\n")).unwrap();
        let found = cost(&program, &program.ops[0], StepShape { num_tokens, num_logits, context: 10 });
        assert_eq!(found.bytes(), found.weight_bytes + found.activation_bytes);
        [found.weight_bytes, found.activation_bytes, found.flops]
    }

    #[test]
    fn costs_are_those_of_the_formulas() {
        // Of the table only the rows of the tokens.
        assert_eq!(costs("embed table=table vocab_start=0 out=hidden", 6, 2), [144.0, 144.0, 0.0]);
        // Four of seven rows, of 12 elements of 2 bytes.
        let linear = "linear input=hidden weight=linear rows=[2,6] epilogue=store out=narrow";
        assert_eq!(costs(linear, 6, 2), [96.0, 144.0 + 48.0, 2.0 * 6.0 * 12.0 * 4.0]);
        assert_eq!(costs("gather_rows input=hidden out=last", 6, 2), [0.0, 144.0 + 48.0, 0.0]);
        // Keys and values of 10 tokens: 2 · 10 · 3 heads of 4 elements of 2 bytes. Two prompts of three tokens read them
        // twice, six decodes six times.
        let attention = "attention query=heads num_heads=6 layer=0 out=attended";
        let flops = 4.0 * 6.0 * 10.0 * 24.0;
        assert_eq!(costs(attention, 6, 2), [0.0, 2.0 * 288.0 + 2.0 * 480.0, flops]);
        assert_eq!(costs(attention, 6, 6), [0.0, 2.0 * 288.0 + 6.0 * 480.0, flops]);
        // Read, written, and 2 · 3 heads of 4 elements of 2 bytes a token into the cache.
        let rope = "rope_write_kv qkv=qkv num_heads=6 theta=1000000.0 layer=0";
        assert_eq!(costs(rope, 6, 2), [0.0, 2.0 * 576.0 + 6.0 * 48.0, 0.0]);
        assert_eq!(costs("write_kv key=hidden value=hidden layer=0", 6, 2), [0.0, 2.0 * 144.0 + 6.0 * 48.0, 0.0]);
    }

    #[test]
    fn experts_are_hit_evenly() {
        // Six tokens hit an expert with probability 1 − (3/5)^6; this rank has three of the five.
        let (hit, assignments) = (1.0 - 0.6f64.powi(6), 6.0 * 2.0 * 3.0 / 5.0);
        let lists = 16.0 + 12.0 * 4.0;
        let (input, activated) = (144.0, 12.0 * 7.0 * 2.0);
        for (op, weight, activations, row) in [
            (
                "expert_gate_up input=hidden weight=up offsets=offsets order=order silu_mul=true out=activated",
                3.0 * 14.0 * 12.0 * 2.0,
                input + lists + activated,
                14.0 * 12.0,
            ),
            (
                "expert_down input=activated weight=down offsets=offsets order=order out=down",
                3.0 * 12.0 * 7.0 * 2.0,
                activated + lists + 12.0 * 12.0 * 2.0,
                12.0 * 7.0,
            ),
        ] {
            let found = costs(op, 6, 2);
            let expected = [weight * hit, activations, 2.0 * assignments * row];
            assert!(found.iter().zip(expected).all(|(f, e)| (f - e).abs() < 1e-9 * e), "{found:?} {expected:?}");
        }
    }

    #[test]
    fn costs_add_up() {
        let one = Cost { weight_bytes: 3.0, activation_bytes: 5.0, flops: 7.0, fp8_flops: 2.0 };
        let mut sum = one;
        sum += one.times(4.0);
        assert_eq!(sum, Cost { weight_bytes: 15.0, activation_bytes: 25.0, flops: 35.0, fp8_flops: 10.0 });
    }
}
