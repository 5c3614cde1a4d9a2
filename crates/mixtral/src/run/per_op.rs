//! `--per-op`: where the time of a kind of step goes. The same operation of all layers is one row.

use std::io::Write;
use std::time::Duration;

use anyhow::Result;
use mixtral_build::Roof;
use mixtral_build::cost::{Cost, StepShape, cost};
use mixtral_engine::{Op, Program};
use serde::Serialize;

use super::report::ratio;

/// One operation, all layers together.
#[derive(Debug, Serialize)]
pub struct OpTime {
    /// Kind and output, without the layer. Several operations where one kernel computes them together.
    pub op: String,
    /// How often it is in the program.
    pub count: usize,
    /// Time that it takes in a step, in ms, all layers together.
    pub ms: f64,
    /// Its part of the step's time.
    pub percent: f64,
    /// MB that it reads and writes in a step, if tokens hit experts evenly.
    pub mb: f64,
    /// GFLOP that it computes in a step.
    pub gflop: f64,
    /// The least time in which the machine can move these bytes and compute these FLOPs, as a part of the time taken; 0
    /// where the machine's rates are unknown.
    pub roof_percent: f64,
}

/// The operations of one kind of step.
#[derive(Debug, Serialize)]
pub struct OpTable {
    /// Which steps.
    pub step: String,
    /// Time of all operations of one step, in ms.
    pub ms: f64,
    /// In the program's order.
    pub ops: Vec<OpTime>,
}

impl OpTable {
    /// Makes the table from the times of all operations, summed over `steps` steps of one shape.
    pub fn new(
        program: &Program,
        roof: Roof,
        step: String,
        shape: StepShape,
        times: &[Duration],
        steps: usize,
    ) -> Self {
        let mut groups: Vec<(String, usize, f64, Cost)> = Vec::new();
        let (mut label, mut seconds, mut costs) = (String::new(), 0.0, Cost::default());
        let mut ops = program.ops.iter().zip(times).peekable();
        while let Some((op, time)) = ops.next() {
            label += &name(op);
            seconds += time.as_secs_f64();
            costs += cost(program, op, shape);
            // An operation without a time of its own is computed together with the one before it.
            if ops.peek().is_some_and(|(_, next)| next.is_zero()) {
                label += " + ";
                continue;
            }
            let (label, costs) = (std::mem::take(&mut label), std::mem::take(&mut costs));
            match groups.iter_mut().find(|group| group.0 == label) {
                None => groups.push((label, 1, seconds, costs)),
                Some((_, count, total, cost)) => {
                    *count += 1;
                    *total += seconds;
                    *cost += costs;
                }
            }
            seconds = 0.0;
        }
        let all = times.iter().map(Duration::as_secs_f64).sum::<f64>();
        let each = |seconds: f64| ratio(seconds, super::report::f(steps));
        let ops = groups.into_iter().map(|(op, count, seconds, cost)| OpTime {
            op,
            count,
            ms: 1e3 * each(seconds),
            percent: 100.0 * ratio(seconds, all),
            mb: cost.bytes() / 1e6,
            gflop: cost.flops / 1e9,
            roof_percent: 100.0 * ratio(least(roof, &cost), each(seconds)),
        });
        OpTable { step, ms: 1e3 * each(all), ops: ops.collect() }
    }

    /// As a table.
    pub fn print(&self, out: &mut dyn Write) -> Result<()> {
        writeln!(out, "\n{}: {:.3} ms a step, operations one after another", self.step, self.ms)?;
        writeln!(
            out,
            "{:>10} {:>6} {:>12} {:>12} {:>7}  {:>5}  operation",
            "ms", "%", "MB", "GFLOP", "% roof", "times"
        )?;
        for OpTime { op, count, ms, percent, mb, gflop, roof_percent } in &self.ops {
            writeln!(out, "{ms:>10.4} {percent:>6.1} {mb:>12.2} {gflop:>12.3} {roof_percent:>7.0}  {count:>5}  {op}")?;
        }
        Ok(())
    }
}

/// The least seconds that the machine needs, as far as its rates are known.
fn least(roof: Roof, cost: &Cost) -> f64 {
    ratio(cost.bytes(), roof.bytes_per_s).max(ratio(cost.flops, roof.flops_per_s))
}

/// Kind and output of an operation. The layer stands before the output's last dot, and is left out.
fn name(op: &Op) -> String {
    let last = |name: &&str| (*name).rsplit('.').next().unwrap_or_default().to_owned();
    op.writes().first().map_or_else(|| op.name().to_owned(), |out| format!("{} {}", op.name(), last(out)))
}

#[cfg(test)]
mod tests {
    use mixtral_engine::{Buffer, KvLayout, Limits, Rows};
    use mixtral_model::{DType, ElemType};

    use super::*;

    /// Two layers, each a norm and a sum.
    fn program() -> Program {
        let buffer = |name: &str| Buffer {
            name: name.to_owned(),
            dtype: ElemType::F32,
            rows: Rows::Tokens,
            cols: 1000,
            offset: 0,
        };
        let ops = (0..2).flat_map(|layer| {
            let named = |what: &str| format!("layer{layer}.{what}");
            let norm = Op::Norm { input: "x".to_owned(), weight: "w".to_owned(), eps: 1e-5, out: named("y") };
            [norm, Op::Add { a: "x".to_owned(), b: "x".to_owned(), out: named("z") }]
        });
        Program {
            rank: 0,
            world_size: 1,
            tp_size: 1,
            dtype: DType::F32,
            vocab_size: 10,
            num_layers: 2,
            num_experts: 0,
            top_k: 0,
            limits: Limits { max_batch_size: 1, max_num_tokens: 1, max_seq_len: 1, max_num_logits: 1, block_size: 16 },
            kv: KvLayout {
                num_layers: 2,
                num_kv_heads: 1,
                head_dim: 1,
                dtype: DType::F32,
                format: mixtral_model::CacheFormat::Plain,
            },
            kv_scales: Vec::new(),
            arena_bytes: 0,
            buffers: ["x", "layer0.y", "layer0.z", "layer1.y", "layer1.z"].map(buffer).to_vec(),
            weights: vec![],
            ops: ops.collect(),
        }
    }

    fn rows(times: [u64; 4]) -> Vec<(String, usize, f64, f64)> {
        let times = times.map(Duration::from_millis);
        let roof = Roof { bytes_per_s: 1e9, flops_per_s: 0.0, fp8_flops_per_s: 0.0 };
        let shape = StepShape { num_tokens: 1, num_logits: 1, context: 1 };
        let table = OpTable::new(&program(), roof, "decode".to_owned(), shape, &times, 2);
        let percent: f64 = table.ops.iter().map(|op| op.percent).sum();
        assert!((percent - 100.0).abs() < 1e-9);
        table.ops.into_iter().map(|op| (op.op, op.count, op.ms, op.mb)).collect()
    }

    #[test]
    fn layers_are_summed_and_what_one_kernel_computes_is_one_row() {
        let row = |op: &str, count, ms, mb| (op.to_owned(), count, ms, mb);
        // A norm reads and writes 4 kB and 4 kB, a sum 12 kB in all. Times are sums over two steps.
        assert_eq!(rows([2, 4, 6, 8]), [row("norm y", 2, 4.0, 0.016), row("add z", 2, 6.0, 0.024)]);
        assert_eq!(rows([2, 0, 6, 0]), [row("norm y + add z", 2, 4.0, 0.04)]);
    }
}
