//! Finds what is alike in programs, so that people see it once: operations that repeat from layer to layer, and ranks
//! that do the same with other shares of the weights.

use std::ops::Range;

use mixtral_engine::{Op, Program};

use crate::cost::cost;
use crate::explain::shapes;

/// A run of operations that come once, or in several repetitions behind each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first operation of the first repetition.
    pub start: usize,
    /// How many operations a repetition has.
    pub len: usize,
    /// How many repetitions there are.
    pub times: usize,
}

impl Run {
    /// The repetition that stands for all. It is the second, since the first also reads what comes before the layers.
    #[must_use]
    pub fn shown(&self) -> Range<usize> {
        let start = self.start + if self.times > 1 { self.len } else { 0 };
        start..start + self.len
    }

    /// All of its operations.
    #[must_use]
    pub fn all(&self) -> Range<usize> {
        self.start..self.start + self.len * self.times
    }

    /// A text such as `layers 0 to 30`, from the first operations of the first and the last repetition.
    #[must_use]
    pub fn layers(&self, program: &Program) -> String {
        let layer = |repetition: usize| layer_of(&program.ops[self.start + repetition * self.len]);
        match (layer(0), layer(self.times - 1)) {
            (Some(first), Some(last)) => format!("layers {first} to {last}"),
            _ => format!("{} times", self.times),
        }
    }
}

/// The most operations of a repetition.
const LONGEST: usize = 64;

/// Cuts a program's operations into runs, from the first operation to the last. At each place it takes the run that
/// saves the most.
#[must_use]
pub fn runs(program: &Program) -> Vec<Run> {
    let keys: Vec<String> = program.ops.iter().map(|op| key(program, op)).collect();
    let repetitions = |start: usize, len: usize| {
        let first = &keys[start..start + len];
        keys[start..].chunks_exact(len).take_while(|chunk| *chunk == first).count()
    };
    let mut runs: Vec<Run> = Vec::new();
    let mut at = 0;
    while at < keys.len() {
        let mut best = Run { start: at, len: 1, times: 1 };
        for len in 1..=LONGEST.min((keys.len() - at) / 2) {
            let times = repetitions(at, len);
            if len * times.saturating_sub(1) > best.len * (best.times - 1) {
                best = Run { start: at, len, times };
            }
        }
        at += best.len * best.times;
        match runs.last_mut() {
            Some(last) if last.times == 1 && best.times == 1 => last.len += 1,
            _ => runs.push(best),
        }
    }
    runs
}

/// Groups programs by their indices. Programs of a group have the same operations at the same costs.
#[must_use]
pub fn alike(programs: &[Program]) -> Vec<Vec<usize>> {
    let signature = |program: &Program| -> Vec<String> {
        let costs = |op| shapes(program).map(|(_, shape)| cost(program, op, shape));
        program.ops.iter().map(|op| format!("{} {:?}", key(program, op), costs(op))).collect()
    };
    let mut groups: Vec<(Vec<String>, Vec<usize>)> = Vec::new();
    for (index, program) in programs.iter().enumerate() {
        let signature = signature(program);
        match groups.iter_mut().find(|(of, _)| *of == signature) {
            Some((_, members)) => members.push(index),
            None => groups.push((signature, vec![index])),
        }
    }
    groups.into_iter().map(|(_, members)| members).collect()
}

/// `rank 3 of 8`, or `ranks 0 to 7 of 8, which are alike`.
#[must_use]
pub fn ranks_text(members: &[usize], world_size: usize) -> String {
    match members {
        [one] => format!("rank {one} of {world_size}"),
        [first, .., last] if last - first + 1 == members.len() => {
            format!("ranks {first} to {last} of {world_size}, which are alike")
        }
        _ => {
            let list: Vec<String> = members.iter().map(ToString::to_string).collect();
            format!("ranks {} of {world_size}, which are alike", list.join(", "))
        }
    }
}

/// A text that is equal for the same operation of two layers: kind, outputs and weights, without the layer's number.
fn key(program: &Program, op: &Op) -> String {
    let writes = op.writes().into_iter().map(|name| {
        let of = program.buffer(name).map(|b| (b.dtype, b.rows, b.cols));
        format!("{} {of:?}", without_layer(name))
    });
    let weights = op.weights().into_iter().map(|name| {
        let shape = program.weight(name).map(|w| w.shape.clone());
        format!("{} {shape:?}", without_layer(name))
    });
    let operands: Vec<String> = writes.chain(weights).collect();
    format!("{} {}", op.name(), operands.join(" "))
}

/// The place of a layer's number in a name: `layer3.qkv`, `transformer.layers.3.mlp.fc.weight`.
fn layer_number(name: &str) -> Option<Range<usize>> {
    let start = ["layers.", "layer"].iter().find_map(|word| name.find(word).map(|at| at + word.len()))?;
    let digits = name[start..].bytes().take_while(u8::is_ascii_digit).count();
    (digits > 0).then_some(start..start + digits)
}

fn without_layer(name: &str) -> String {
    match layer_number(name) {
        Some(at) => format!("{}#{}", &name[..at.start], &name[at.end..]),
        None => name.to_owned(),
    }
}

/// The layer that an operation belongs to, if its operands name one.
fn layer_of(op: &Op) -> Option<usize> {
    let names = op.writes().into_iter().chain(op.weights()).chain(op.reads());
    names.into_iter().find_map(|name| name[layer_number(name)?].parse().ok())
}

#[cfg(test)]
mod tests {
    use mixtral_checkpoint::CheckpointConfig;
    use mixtral_engine::Limits;
    use mixtral_model::{DType, Mapping, ModelConfig, Rank};

    use super::*;
    use crate::{dot, explain, lower};

    fn programs(mapping: Mapping) -> Vec<Program> {
        let config = CheckpointConfig::new(ModelConfig::mixtral_8x7b(DType::Bf16), mapping);
        let limits =
            Limits { max_batch_size: 4, max_num_tokens: 256, max_seq_len: 512, max_num_logits: 4, block_size: 64 };
        mapping.ranks().map(|Rank(rank)| lower(&config, Rank(rank), limits)).collect()
    }

    #[test]
    fn layers_of_a_real_model_are_one_run() {
        let programs = programs(Mapping::single());
        let program = &programs[0];
        let runs = runs(program);
        let covered: Vec<usize> = runs.iter().flat_map(Run::all).collect();
        assert_eq!(covered, (0..program.ops.len()).collect::<Vec<_>>());
        // The last layer ends in the model's final norm, so it is no repetition of the others.
        let repeated: Vec<&Run> = runs.iter().filter(|run| run.times > 1).collect();
        assert_eq!(repeated.iter().map(|run| run.times).collect::<Vec<_>>(), [31]);
        assert_eq!(repeated[0].layers(program), "layers 0 to 30");
    }

    #[test]
    fn a_layer_costs_what_the_layer_that_is_shown_costs() {
        let programs = programs(Mapping { tp_size: 2, pp_size: 1, moe_tp_size: 1, moe_ep_size: 2 });
        let program = &programs[0];
        let shape = shapes(program)[1].1;
        for run in runs(program) {
            let costs =
                |at: usize| (0..run.len).map(|i| cost(program, &program.ops[at + i], shape)).collect::<Vec<_>>();
            for repetition in 0..run.times {
                assert_eq!(costs(run.start + repetition * run.len), costs(run.shown().start));
            }
        }
    }

    #[test]
    fn ranks_that_differ_in_their_share_alone_are_alike() {
        let tensor = programs(Mapping { tp_size: 8, pp_size: 1, moe_tp_size: 2, moe_ep_size: 4 });
        assert_eq!(alike(&tensor), [(0..8).collect::<Vec<_>>()]);
        let pipeline = programs(Mapping { tp_size: 2, pp_size: 4, moe_tp_size: 2, moe_ep_size: 1 });
        assert_eq!(alike(&pipeline), [vec![0, 1], vec![2, 3, 4, 5], vec![6, 7]]);
        assert_eq!(ranks_text(&[2, 3, 4, 5], 8), "ranks 2 to 5 of 8, which are alike");
        assert_eq!(ranks_text(&[3], 8), "rank 3 of 8");
    }

    /// Eight ranks of thirty-two layers fit on a page.
    #[test]
    fn a_page_holds_eight_ranks() {
        let programs = programs(Mapping { tp_size: 8, pp_size: 1, moe_tp_size: 8, moe_ep_size: 1 });
        let roof = explain::Roof { bytes_per_s: 1e12, flops_per_s: 1e14, fp8_flops_per_s: 2e14 };
        let text = explain::explain(&programs, &[], Some(roof));
        assert!(text.lines().count() < 100, "{text}");
        let picture = dot::dot(&programs, Some(roof));
        assert!(picture.matches("[label=\"{").count() < 50, "{picture}");
        insta::assert_snapshot!("explained", text);
        insta::assert_snapshot!("drawn", picture);
    }
}
