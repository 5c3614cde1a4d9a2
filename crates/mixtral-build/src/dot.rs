//! The program as a Graphviz graph. Operations are boxes with their bytes and times, buffers are edges. Operations and
//! ranks that are alike are drawn once.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;

use mixtral_engine::Program;

use crate::Roof;
use crate::cost::cost;
use crate::explain::shapes;
use crate::fold::{Run, alike, ranks_text, runs};

/// Draws the programs of all ranks in the DOT language.
#[must_use]
pub fn dot(programs: &[Program], roof: Option<Roof>) -> String {
    let mut text = String::from("digraph program {\n  rankdir=TB;\n  node [shape=record, fontname=\"monospace\"];\n");
    for members in alike(programs) {
        let program = &programs[members[0]];
        let who = ranks_text(&members, program.world_size);
        let _ = writeln!(text, "  subgraph cluster_rank{} {{\n    label=\"{who}\";", members[0]);
        draw(&mut text, program, roof);
        text.push_str("  }\n");
    }
    text.push_str("}\n");
    text
}

/// An edge. Edges from a layer to the next one are dashed.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Edge {
    from: usize,
    to: usize,
    label: String,
    is_to_next: bool,
}

fn draw(text: &mut String, program: &Program, roof: Option<Roof>) {
    let runs = runs(program);
    for run in &runs {
        let is_folded = run.times > 1;
        if is_folded {
            let _ = writeln!(text, "    subgraph cluster_rank{}_{} {{", program.rank, run.start);
            let _ = writeln!(text, "      label=\"{}, each as this one\";", run.layers(program));
        }
        for index in run.shown() {
            let _ = writeln!(text, "      {} [label=\"{{{}}}\"];", node(program, index), label(program, index, roof));
        }
        if is_folded {
            text.push_str("    }\n");
        }
    }
    for Edge { from, to, label, is_to_next } in edges(program, &runs) {
        let (from, to) = (node(program, from), node(program, to));
        let style = if is_to_next { ", style=dashed, constraint=false" } else { "" };
        let _ = writeln!(text, "    {from} -> {to} [label=\"{label}\"{style}];");
    }
}

fn node(program: &Program, op: usize) -> String {
    format!("r{}_op{op}", program.rank)
}

/// Kind and weights of an operation, and its bytes and time in each of the steps that `--explain` shows.
fn label(program: &Program, index: usize, roof: Option<Roof>) -> String {
    let op = &program.ops[index];
    let mut label = op.name().to_owned();
    for weight in op.weights() {
        let shape = program.weight(weight).map_or(String::new(), |w| format!("{:?}", w.shape));
        let _ = write!(label, "\\n{weight} {shape}");
    }
    for (step, shape) in shapes(program) {
        let cost = cost(program, op, shape);
        let _ = write!(label, "|{step}: {:.3} MB", cost.bytes() / 1e6);
        if let Some(roof) = roof {
            let _ = write!(label, ", {:.1} us", roof.time(&cost) * 1e6);
        }
    }
    label
}

/// The buffers that go from one drawn operation to another.
fn edges(program: &Program, runs: &[Run]) -> BTreeSet<Edge> {
    let mut edges = BTreeSet::new();
    let mut writer: HashMap<&str, usize> = HashMap::new();
    let run_of = |op: usize| runs.iter().find(|run| run.all().contains(&op));
    // The drawn operation that stands for operation `op`.
    let drawn = |op: usize| run_of(op).map_or(op, |run| run.shown().start + (op - run.start) % run.len);
    for (index, op) in program.ops.iter().enumerate() {
        for buffer in op.reads() {
            let (Some(&from), Some(b)) = (writer.get(buffer), program.buffer(buffer)) else { continue };
            let is_same_run = run_of(index).is_some_and(|run| run.all().contains(&from));
            // Inside a run, the repetition that is shown stands for all.
            if is_same_run && drawn(index) != index {
                continue;
            }
            let rows = format!("{:?}", b.rows).to_lowercase();
            edges.insert(Edge {
                from: drawn(from),
                to: drawn(index),
                label: format!("{buffer}\\n{} [{rows}, {}]", b.dtype, b.cols),
                is_to_next: is_same_run && drawn(from) != from,
            });
        }
        for buffer in op.writes() {
            writer.insert(buffer, index);
        }
    }
    edges
}
