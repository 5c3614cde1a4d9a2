//! What a rank's buffer has of the reference's buffer, where the reference is an engine of one rank.

use std::ops::Range;

use mixtral_model::{ElemType, Mapping, ModelConfig, Rank};

use super::operands::Part;

/// The share that one of several ranks has of a model.
#[derive(Clone, Debug)]
pub struct Share {
    first_layer: usize,
    /// Query and KV heads, and those of the whole model.
    heads: Range<usize>,
    kv_heads: Range<usize>,
    all_heads: usize,
    all_kv_heads: usize,
    head_dim: usize,
    /// Columns of each expert's intermediate width.
    intermediate: Range<usize>,
    intermediate_size: usize,
    experts: Range<usize>,
    /// Its place among the ranks of its stage.
    tp_rank: usize,
}

/// The lists of a layer's assignments by expert, as the reference has them.
#[derive(Clone, Debug, Default)]
pub struct Lists {
    /// Where each expert's list begins, and where the last one ends.
    pub offsets: Vec<usize>,
    /// The assignments.
    pub order: Vec<usize>,
}

/// What a rank's buffer should hold.
pub struct Expected {
    /// The contents.
    pub part: Part,
    /// The rows of the rank's buffer in which they should be; `None` if these are its first rows.
    pub rows: Option<Vec<usize>>,
}

impl Share {
    /// The share of `rank`.
    pub fn new(model: &ModelConfig, mapping: &Mapping, rank: Rank) -> Self {
        Share {
            first_layer: mapping.layers(model, rank).start,
            heads: mapping.heads(model, rank),
            kv_heads: mapping.kv_heads(model, rank),
            all_heads: model.num_heads,
            all_kv_heads: model.num_kv_heads,
            head_dim: model.head_dim,
            intermediate: mapping.intermediate(model, rank),
            intermediate_size: model.intermediate_size,
            experts: mapping.experts(model, rank),
            tp_rank: mapping.coords(rank).tp_rank,
        }
    }

    /// The reference's name of a buffer. A rank counts its own layers from 0, and receives what the layer before its first
    /// one has put out.
    pub fn counterpart(&self, buffer: &str) -> String {
        let layer = |number: usize, rest: &str| format!("layer{number}.{rest}");
        let own = buffer.strip_prefix("layer").and_then(|rest| rest.split_once('.'));
        match (buffer, own.and_then(|(number, rest)| Some((number.parse::<usize>().ok()?, rest)))) {
            ("received", _) => layer(self.first_layer.saturating_sub(1), "output"),
            ("embedded.part" | "logits.part", _) => buffer.trim_end_matches(".part").to_owned(),
            (_, Some((number, rest))) => layer(self.first_layer + number, rest),
            _ => buffer.to_owned(),
        }
    }

    /// What the rank's `buffer`, in rows of `cols` elements, should hold, given the reference's contents. `None` if that
    /// cannot be said, because the buffer holds a part of a sum over ranks.
    pub fn expected(&self, buffer: &str, cols: usize, whole: &Part, lists: Option<&Lists>) -> Option<Expected> {
        let own = lists.and_then(|lists| self.rows_of_experts(lists));
        let part = match base(buffer) {
            "qkv" => {
                let (queries, keys) = (self.all_heads * self.head_dim, self.all_kv_heads * self.head_dim);
                let mut ranges = vec![self.columns_of_heads(&self.heads, 0)];
                // Where rotary embeddings were applied, only the queries are left.
                if whole.cols > queries {
                    ranges.push(self.columns_of_heads(&self.kv_heads, queries));
                    ranges.push(self.columns_of_heads(&self.kv_heads, queries + keys));
                }
                columns(whole, &ranges)
            }
            "keys" | "values" => columns(whole, &[self.columns_of_heads(&self.kv_heads, 0)]),
            "gate_up" => {
                let up = &self.intermediate;
                let gate = up.start + self.intermediate_size..up.end + self.intermediate_size;
                columns(whole, &[up.clone(), gate])
            }
            "attended" => columns(whole, &[self.summed("attended")?]),
            "activated" => {
                let rows = own.unwrap_or(0..whole.num_rows());
                columns(&rows_of(whole, rows), &[self.summed("activated")?])
            }
            "expert_output" if self.intermediate.len() < self.intermediate_size => return None,
            "expert_output" => return self.of_experts(whole, lists?),
            "expert_order" => rows_of(whole, own?),
            "expert_offsets" => {
                let (from, own) = (own?.start, self.experts.start..=self.experts.end);
                let offsets = lists?.offsets[own].iter().map(|&offset| i32::try_from(offset - from).unwrap_or(-1));
                let bytes = offsets.flat_map(i32::to_le_bytes).collect();
                Part { name: whole.name.clone(), dtype: ElemType::I32, cols, bytes }
            }
            // Columns that an `all_gather` puts together, unless every rank has all of them.
            "embedded.part" | "logits.part" if cols < whole.cols => {
                let [start, end] = [self.tp_rank, self.tp_rank + 1].map(|at| (at * cols).min(whole.cols));
                columns(whole, std::slice::from_ref(&(start..end)))
            }
            "embedded.part" => return None,
            _ => Part { name: whole.name.clone(), bytes: whole.bytes.clone(), ..*whole },
        };
        // Logits may have columns behind the vocabulary, as many as the ranks divide by.
        let is_whole = part.cols == cols || buffer.starts_with("logits") && part.cols < cols;
        is_whole.then_some(Expected { part, rows: None })
    }

    /// The columns of the reference's buffer that the rank has, if a sum over all columns is a sum over ranks.
    pub fn summed(&self, buffer: &str) -> Option<Range<usize>> {
        match base(buffer) {
            "attended" => Some(self.columns_of_heads(&self.heads, 0)),
            "activated" => Some(self.intermediate.clone()),
            _ => None,
        }
    }

    /// The rows of the assignments to the rank's experts, out of one row for each assignment.
    pub fn of_experts(&self, whole: &Part, lists: &Lists) -> Option<Expected> {
        let order = &lists.order[self.rows_of_experts(lists)?];
        let bytes = order.iter().flat_map(|&row| whole.row(row)).copied().collect();
        Some(Expected { part: Part { name: whole.name.clone(), bytes, ..*whole }, rows: Some(order.to_vec()) })
    }

    /// Where the lists of the rank's experts are among those of all.
    fn rows_of_experts(&self, lists: &Lists) -> Option<Range<usize>> {
        Some(*lists.offsets.get(self.experts.start)?..*lists.offsets.get(self.experts.end)?)
    }

    fn columns_of_heads(&self, heads: &Range<usize>, behind: usize) -> Range<usize> {
        behind + heads.start * self.head_dim..behind + heads.end * self.head_dim
    }
}

/// A buffer's name without its layer.
pub fn base(buffer: &str) -> &str {
    buffer.split_once('.').filter(|(layer, _)| layer.starts_with("layer")).map_or(buffer, |(_, name)| name)
}

/// Some rows of a part.
fn rows_of(part: &Part, rows: Range<usize>) -> Part {
    let bytes = rows.flat_map(|row| part.row(row)).copied().collect();
    Part { name: part.name.clone(), bytes, ..*part }
}

/// Some columns of a part, one range after the other.
pub fn columns(part: &Part, ranges: &[Range<usize>]) -> Part {
    let size = part.dtype.size();
    let of_row = |row: usize| {
        let row = part.row(row);
        ranges.iter().flat_map(move |range| &row[range.start * size..range.end * size])
    };
    let bytes = (0..part.num_rows()).flat_map(of_row).copied().collect();
    let cols = ranges.iter().map(Range::len).sum();
    Part { name: part.name.clone(), dtype: part.dtype, cols, bytes }
}
