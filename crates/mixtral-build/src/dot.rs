//! The program as a Graphviz graph: operations as boxes, buffers as edges.

use std::collections::HashMap;
use std::fmt::Write as _;

use mixtral_engine::Program;

/// Draws `program` in the DOT language.
#[must_use]
pub fn dot(program: &Program) -> String {
    let mut text = String::from("digraph program {\n  rankdir=TB;\n  node [shape=box, fontname=\"monospace\"];\n");
    let mut writer: HashMap<&str, usize> = HashMap::new();
    for (index, op) in program.ops.iter().enumerate() {
        let mut label = op.name().to_owned();
        for weight in op.weights() {
            let shape = program.weight(weight).map_or(String::new(), |w| format!("{:?}", w.shape));
            let _ = write!(label, "\\n{weight} {shape}");
        }
        let _ = writeln!(text, "  op{index} [label=\"{label}\"];");
        for buffer in op.reads() {
            if let (Some(from), Some(b)) = (writer.get(buffer), program.buffer(buffer)) {
                let rows = format!("{:?}", b.rows).to_lowercase();
                let _ =
                    writeln!(text, "  op{from} -> op{index} [label=\"{buffer}\\n{} [{rows}, {}]\"];", b.dtype, b.cols);
            }
        }
        for buffer in op.writes() {
            writer.insert(buffer, index);
        }
    }
    text.push_str("}\n");
    text
}
