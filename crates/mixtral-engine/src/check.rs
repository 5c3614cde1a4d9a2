//! Defines what a well-formed program is. Every program that was read from a file passes through [`Program::check`]
//! before a backend sees it, so backends can index by its numbers.

use mixtral_model::{CacheFormat, DType, ElemType, WeightFormat, fp8};
use std::collections::{BTreeMap, HashMap, HashSet};

use crate::memory::ALIGN;
use crate::op::FusedNorm;
use crate::{Buffer, Epilogue, Limits, Op, Program, Rows, Weight};

/// A program that cannot run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProgramError {
    /// A number outside its range.
    #[error("program: {field} is {value}; expected {expected}")]
    Range {
        /// The field.
        field: &'static str,
        /// Its value.
        value: usize,
        /// What it may be.
        expected: String,
    },
    /// Two buffers or weights with the same name.
    #[error("program: {kind} `{name}` is declared twice")]
    Duplicate {
        /// `buffer` or `weight`.
        kind: &'static str,
        /// The name.
        name: String,
    },
    /// A buffer that does not lie in the arena.
    #[error("program: buffer `{name}` ends at byte {end}, past the arena's {arena}")]
    OutsideArena {
        /// The buffer.
        name: String,
        /// One past its last byte.
        end: u128,
        /// Bytes of the arena.
        arena: usize,
    },
    /// A buffer whose offset is not aligned.
    #[error("program: buffer `{name}` starts at byte {offset}, which is not a multiple of {ALIGN}")]
    Misaligned {
        /// The buffer.
        name: String,
        /// Its offset.
        offset: usize,
    },
    /// Two buffers that hold values at the same time and share memory.
    #[error("program: buffers `{first}` and `{second}` overlap in the arena, and operation {index} ({op}) needs both")]
    Overlap {
        /// The buffer that starts first.
        first: String,
        /// The other buffer.
        second: String,
        /// The first operation that needs both.
        index: usize,
        /// Its name.
        op: &'static str,
    },
    /// An operation that does not fit its operands.
    #[error("program: operation {index} ({op}): {problem}")]
    Op {
        /// Position in the program.
        index: usize,
        /// The operation's name.
        op: &'static str,
        /// What does not fit.
        problem: String,
    },
}

/// Larger sizes are refused, so that products of a few of them cannot overflow.
const MAX: usize = 1 << 24;

/// The most elements of a weight. The largest weights of real models have far fewer.
const MAX_WEIGHT: usize = 1 << 56;

impl Limits {
    /// Checks that every limit is one that a program can be planned for.
    ///
    /// # Errors
    /// The first limit out of range.
    pub fn check(&self) -> Result<(), ProgramError> {
        in_range("max_batch_size", self.max_batch_size, 1, 1 << 20)?;
        in_range("max_num_tokens", self.max_num_tokens, 1, MAX)?;
        in_range("max_seq_len", self.max_seq_len, 1, 1 << 30)?;
        in_range("max_num_logits", self.max_num_logits, 1, MAX)?;
        in_range("block_size", self.block_size, 1, 1 << 12)
    }
}

impl Program {
    /// Checks that every operand exists and has the shape and type that its operation needs. Checks that buffers lie in
    /// the arena, and that no two buffers that hold a value at the same time overlap.
    ///
    /// # Errors
    /// The first rule that the program breaks.
    pub fn check(&self) -> Result<(), ProgramError> {
        self.check_numbers()?;
        let mut names = HashSet::new();
        for buffer in &self.buffers {
            self.check_buffer(buffer)?;
            if !names.insert(&buffer.name) {
                return Err(ProgramError::Duplicate { kind: "buffer", name: buffer.name.clone() });
            }
        }
        let mut names = HashSet::new();
        for weight in &self.weights {
            if !names.insert(&weight.name) {
                return Err(ProgramError::Duplicate { kind: "weight", name: weight.name.clone() });
            }
            if weight.shape.is_empty() || weight.shape.len() > 3 {
                return range("a weight's number of dimensions", weight.shape.len(), "1 to 3");
            }
            for &side in &weight.shape {
                in_range("a weight's side", side, 1, MAX)?;
            }
            let elements = weight.shape.iter().fold(1usize, |product, &side| product.saturating_mul(side));
            in_range("a weight's number of elements", elements, 1, MAX_WEIGHT)?;
            for piece in &weight.pieces {
                let rows_end = piece.target_row.checked_add(piece.rows.len());
                let fits = piece.rows.start <= piece.rows.end
                    && piece.rows.end <= piece.source_rows
                    && piece.cols.end <= piece.source_cols
                    && piece.cols.start <= piece.cols.end
                    && piece.cols.len() == weight.cols()
                    && rows_end.is_some_and(|end| end <= weight.rows());
                if !fits {
                    return range("a piece's row in its weight", piece.target_row, "a rectangle inside both tensors");
                }
            }
        }
        let scope = Scope {
            program: self,
            buffers: self.buffers.iter().map(|b| (b.name.as_str(), b)).collect(),
            weights: self.weights.iter().map(|w| (w.name.as_str(), w)).collect(),
        };
        for (index, op) in self.ops.iter().enumerate() {
            scope.check_op(op).map_err(|problem| ProgramError::Op { index, op: op.name(), problem })?;
        }
        self.check_overlaps()
    }

    /// Checks that at every operation the buffers that are needed do not overlap. A buffer is needed from its first use
    /// to its last. An operation that works in place names one buffer as both input and output, so that is no overlap.
    fn check_overlaps(&self) -> Result<(), ProgramError> {
        let lifetimes = self.lifetimes();
        let (mut begins, mut ends) = (vec![Vec::new(); self.ops.len()], vec![Vec::new(); self.ops.len()]);
        for buffer in self.buffers.iter().filter(|buffer| self.max_bytes(buffer) > 0) {
            if let Some(&(first, last)) = lifetimes.get(buffer.name.as_str()) {
                begins[first].push(buffer);
                ends[last].push(buffer);
            }
        }
        let mut live: BTreeMap<usize, &Buffer> = BTreeMap::new();
        for (index, op) in self.ops.iter().enumerate() {
            for buffer in &begins[index] {
                // The live buffers do not overlap, so only the new buffer's two neighbours can overlap it.
                let before = live.range(..=buffer.offset).next_back().map(|(_, other)| (*other, *buffer));
                let behind = live.range(buffer.offset..).next().map(|(_, other)| (*buffer, *other));
                let overlaps = |pair: &(&Buffer, &Buffer)| pair.0.offset + self.max_bytes(pair.0) > pair.1.offset;
                if let Some((first, second)) = before.into_iter().chain(behind).find(overlaps) {
                    let (first, second) = (first.name.clone(), second.name.clone());
                    return Err(ProgramError::Overlap { first, second, index, op: op.name() });
                }
                live.insert(buffer.offset, buffer);
            }
            for buffer in &ends[index] {
                live.remove(&buffer.offset);
            }
        }
        Ok(())
    }

    fn check_numbers(&self) -> Result<(), ProgramError> {
        in_range("world_size", self.world_size, 1, 4096)?;
        in_range("rank", self.rank, 0, self.world_size - 1)?;
        in_range("tp_size", self.tp_size, 1, self.world_size)?;
        if !self.world_size.is_multiple_of(self.tp_size) {
            return range("tp_size", self.tp_size, &format!("a divisor of world_size {}", self.world_size));
        }
        in_range("vocab_size", self.vocab_size, 1, MAX)?;
        in_range("num_layers", self.num_layers, 1, 1 << 14)?;
        in_range("num_experts", self.num_experts, 0, 1 << 14)?;
        in_range("top_k", self.top_k, 0, self.num_experts)?;
        self.limits.check()?;
        in_range("kv num_layers", self.kv.num_layers, 1, self.num_layers)?;
        in_range("kv num_kv_heads", self.kv.num_kv_heads, 1, 1 << 16)?;
        in_range("kv head_dim", self.kv.head_dim, 2, 1 << 16)?;
        let scaled = if self.kv.format == CacheFormat::Fp8 { self.kv.num_layers } else { 0 };
        in_range("the number of kv_scale records", self.kv_scales.len(), scaled, scaled)?;
        let is_scale = |scale: f32| scale.is_finite() && scale > 0.0;
        match self.kv_scales.iter().position(|scale| !is_scale(scale.key) || !is_scale(scale.value)) {
            Some(layer) => range("the layer of a kv_scale", layer, "scales that are finite and above 0"),
            None => Ok(()),
        }
    }

    fn check_buffer(&self, buffer: &Buffer) -> Result<(), ProgramError> {
        in_range("a buffer's number of columns", buffer.cols, 1, MAX)?;
        if !buffer.offset.is_multiple_of(ALIGN) {
            return Err(ProgramError::Misaligned { name: buffer.name.clone(), offset: buffer.offset });
        }
        let rows = self.num_rows(buffer.rows, self.limits.max_num_tokens, self.limits.max_num_logits);
        let end = buffer.offset as u128 + rows as u128 * buffer.cols as u128 * buffer.dtype.size() as u128;
        if end > self.arena_bytes as u128 {
            return Err(ProgramError::OutsideArena { name: buffer.name.clone(), end, arena: self.arena_bytes });
        }
        Ok(())
    }
}

fn range<T>(field: &'static str, value: usize, expected: &str) -> Result<T, ProgramError> {
    Err(ProgramError::Range { field, value, expected: expected.to_owned() })
}

fn in_range(field: &'static str, value: usize, min: usize, max: usize) -> Result<(), ProgramError> {
    if (min..=max).contains(&value) { Ok(()) } else { range(field, value, &format!("{min} to {max}")) }
}

/// The names that an operation can refer to.
struct Scope<'a> {
    program: &'a Program,
    buffers: HashMap<&'a str, &'a Buffer>,
    weights: HashMap<&'a str, &'a Weight>,
}

impl<'a> Scope<'a> {
    fn buffer(&self, name: &str) -> Result<&'a Buffer, String> {
        self.buffers.get(name).copied().ok_or_else(|| format!("there is no buffer `{name}`"))
    }

    /// A weight that an operation multiplies with. It may have any format.
    fn matrix(&self, name: &str) -> Result<&'a Weight, String> {
        self.weights.get(name).copied().ok_or_else(|| format!("there is no weight `{name}`"))
    }

    /// A weight whose elements an operation reads.
    fn weight(&self, name: &str) -> Result<&'a Weight, String> {
        let weight = self.matrix(name)?;
        same(&format!("the format of `{name}`"), weight.format, WeightFormat::Plain)?;
        Ok(weight)
    }

    /// The weight by which keys are rounded.
    fn directions(&self, name: Option<&String>) -> Result<(), String> {
        let (Some(name), kv) = (name, self.program.kv) else { return Ok(()) };
        let weight = self.weight(name)?;
        same(&format!("the shape of `{name}`"), weight.shape.clone(), vec![kv.num_kv_heads, kv.head_dim])?;
        same(&format!("the type of `{name}`"), weight.dtype, DType::F32)?;
        if kv.format != CacheFormat::Fp8 {
            return Err("directions round keys for a cache in fp8".to_owned());
        }
        match fp8::suits_directions(kv.head_dim) {
            true => Ok(()),
            false => Err(format!("directions round keys of 16, 32, … 512 elements, and these have {}", kv.head_dim)),
        }
    }

    /// A buffer in the model's data type.
    fn activation(&self, name: &str) -> Result<&'a Buffer, String> {
        self.typed(name, self.program.dtype.into())
    }

    fn typed(&self, name: &str, dtype: ElemType) -> Result<&'a Buffer, String> {
        let buffer = self.buffer(name)?;
        same(&format!("the type of `{name}`"), buffer.dtype, dtype)?;
        Ok(buffer)
    }

    /// A vector weight of `len` elements.
    fn vector(&self, name: &str, len: usize) -> Result<(), String> {
        same(&format!("the length of `{name}`"), self.weight(name)?.shape.iter().product::<usize>(), len)
    }

    /// A weight of `[experts, rows, cols]`.
    fn expert_weight(&self, name: &str, cols: usize) -> Result<(usize, usize), String> {
        let weight = self.matrix(name)?;
        let [experts, rows, found] = weight.shape[..] else {
            return Err(format!("`{name}` has {} dimensions, expected 3", weight.shape.len()));
        };
        same(&format!("the columns of `{name}`"), found, cols)?;
        Ok((experts, rows))
    }

    fn lists(&self, offsets: &str, order: &str, experts: usize) -> Result<(), String> {
        let offsets = self.typed(offsets, ElemType::I32)?;
        same("rows of the expert offsets", offsets.rows, Rows::One)?;
        same("columns of the expert offsets", offsets.cols, experts + 1)?;
        let order = self.typed(order, ElemType::I32)?;
        same("rows of the expert order", order.rows, Rows::Assignments)?;
        same("columns of the expert order", order.cols, 1)
    }

    fn experts(&self, experts: [usize; 2]) -> Result<usize, String> {
        if experts[0] < experts[1] && experts[1] <= self.program.num_experts {
            Ok(experts[1] - experts[0])
        } else {
            Err(format!("experts {experts:?} are not a range of the model's {}", self.program.num_experts))
        }
    }

    fn top_k(&self, ids: &str, weights: &str) -> Result<(), String> {
        let ids = self.typed(ids, ElemType::I32)?;
        let weights = self.typed(weights, ElemType::F32)?;
        same("columns of the expert ids", ids.cols, self.program.top_k)?;
        same("columns of the expert weights", weights.cols, self.program.top_k)?;
        same("rows of the expert ids", ids.rows, Rows::Tokens)?;
        same("rows of the expert weights", weights.rows, Rows::Tokens)
    }

    fn routing(&self, name: &str) -> Result<(), String> {
        let buffer = self.typed(name, ElemType::F32)?;
        same("rows of the router's buffer", buffer.rows, Rows::Tokens)?;
        same("columns of the router's buffer", buffer.cols, self.program.num_experts)
    }

    fn kv_layer(&self, layer: usize) -> Result<(), String> {
        if layer < self.program.kv.num_layers {
            Ok(())
        } else {
            Err(format!("layer {layer} of a cache of {}", self.program.kv.num_layers))
        }
    }

    fn stat_layer(&self, layer: usize) -> Result<(), String> {
        if layer < self.program.num_layers {
            Ok(())
        } else {
            Err(format!("layer {layer} of a model of {}", self.program.num_layers))
        }
    }

    fn heads(&self, num_heads: usize, cols: usize, exact: bool) -> Result<(), String> {
        let kv = self.program.kv;
        if num_heads == 0 || !num_heads.is_multiple_of(kv.num_kv_heads) {
            return Err(format!("{num_heads} query heads do not group over {} KV heads", kv.num_kv_heads));
        }
        let needed = num_heads.checked_mul(kv.head_dim).ok_or("head count overflows")?;
        if cols < needed || exact && cols != needed {
            return Err(format!("{cols} columns, expected {needed} for {num_heads} heads of {}", kv.head_dim));
        }
        Ok(())
    }

    /// Checks the residual and the norm that an operation ends with.
    fn finish(&self, residual: Option<&str>, out: &Buffer, norm: Option<&FusedNorm>) -> Result<(), String> {
        if let Some(residual) = residual {
            alike(self.activation(residual)?, out)?;
        }
        let Some(norm) = norm else { return Ok(()) };
        self.vector(&norm.weight, out.cols)?;
        alike(out, self.activation(&norm.out)?)
    }

    fn check_op(&self, op: &Op) -> Result<(), String> {
        let kv = self.program.kv;
        match op {
            Op::Embed { table, out, .. } => {
                let (table, out) = (self.weight(table)?, self.activation(out)?);
                same("dimensions of the table", table.shape.len(), 2)?;
                same("rows of the output", out.rows, Rows::Tokens)?;
                same("columns", out.cols, table.cols())
            }
            Op::Norm { input, weight, out, .. } => {
                let (input, out) = (self.activation(input)?, self.activation(out)?);
                self.vector(weight, input.cols)?;
                alike(input, out)
            }
            Op::Add { a, b, out } => {
                let (a, b, out) = (self.activation(a)?, self.activation(b)?, self.activation(out)?);
                alike(a, b)?;
                alike(a, out)
            }
            Op::Linear { input, weight, rows, epilogue, residual, out, .. } => {
                let (input, weight) = (self.activation(input)?, self.matrix(weight)?);
                same("columns", input.cols, weight.cols())?;
                let rows = rows.unwrap_or([0, weight.rows()]);
                if rows[0] >= rows[1] || rows[1] > weight.rows() {
                    return Err(format!("rows {rows:?} are not a range of the weight's {}", weight.rows()));
                }
                let out = match epilogue {
                    Epilogue::F32 => self.typed(out, ElemType::F32)?,
                    _ => self.activation(out)?,
                };
                same("rows of the output", out.rows, input.rows)?;
                same("columns of the output", out.cols, rows[1] - rows[0])?;
                match (epilogue, residual) {
                    (Epilogue::Residual, Some(residual)) => alike(self.activation(residual)?, out),
                    (Epilogue::Residual, None) => Err("the residual epilogue needs a residual".to_owned()),
                    (_, Some(_)) => Err("only the residual epilogue takes a residual".to_owned()),
                    (_, None) => Ok(()),
                }
            }
            Op::Rope { data, num_heads, .. } => {
                let data = self.activation(data)?;
                same("rows", data.rows, Rows::Tokens)?;
                let needed = num_heads.checked_mul(kv.head_dim).ok_or("head count overflows")?;
                if data.cols < needed {
                    return Err(format!("{} columns, expected at least {needed}", data.cols));
                }
                Ok(())
            }
            Op::WriteKv { key, value, layer, directions } => {
                self.kv_layer(*layer)?;
                self.directions(directions.as_ref().map(|directions| &directions.weight))?;
                for name in [key, value] {
                    let buffer = self.activation(name)?;
                    same("rows", buffer.rows, Rows::Tokens)?;
                    same("columns", buffer.cols, kv.num_kv_heads * kv.head_dim)?;
                }
                Ok(())
            }
            Op::RopeWriteKv { qkv, num_heads, layer, directions, .. } => {
                self.kv_layer(*layer)?;
                self.directions(directions.as_ref())?;
                let qkv = self.activation(qkv)?;
                same("rows", qkv.rows, Rows::Tokens)?;
                self.heads(*num_heads, qkv.cols, false)?;
                same("columns", qkv.cols, (num_heads + 2 * kv.num_kv_heads) * kv.head_dim)
            }
            Op::Attention { query, num_heads, window, fp8_context, layer, out } => {
                self.kv_layer(*layer)?;
                let (query, out) = (self.activation(query)?, self.activation(out)?);
                self.heads(*num_heads, query.cols, false)?;
                self.heads(*num_heads, out.cols, true)?;
                same("rows of the query", query.rows, Rows::Tokens)?;
                same("rows of the output", out.rows, Rows::Tokens)?;
                if *fp8_context && kv.format != CacheFormat::Fp8 {
                    return Err("attention in fp8 takes its keys and values from a cache in fp8".to_owned());
                }
                if *window == Some(0) { Err("a window of 0 sees no key".to_owned()) } else { Ok(()) }
            }
            Op::Softmax { logits, probs } => {
                self.routing(logits)?;
                self.routing(probs)
            }
            Op::TopK { probs, layer, expert_ids, expert_weights, .. } => {
                self.stat_layer(*layer)?;
                self.routing(probs)?;
                self.top_k(expert_ids, expert_weights)
            }
            Op::ExpertSort { expert_ids, experts, offsets, order } => {
                let ids = self.typed(expert_ids, ElemType::I32)?;
                same("columns of the expert ids", ids.cols, self.program.top_k)?;
                same("rows of the expert ids", ids.rows, Rows::Tokens)?;
                self.lists(offsets, order, self.experts(*experts)?)
            }
            Op::Route { logits, layer, experts, expert_ids, expert_weights, offsets, order, .. } => {
                self.stat_layer(*layer)?;
                self.routing(logits)?;
                self.top_k(expert_ids, expert_weights)?;
                self.lists(offsets, order, self.experts(*experts)?)
            }
            Op::ExpertGateUp { input, weight, offsets, order, silu_mul, out, .. } => {
                let (input, out) = (self.activation(input)?, self.activation(out)?);
                let (experts, rows) = self.expert_weight(weight, input.cols)?;
                same("remainder of the weight's rows by 2", rows % 2, 0)?;
                same("rows of the input", input.rows, Rows::Tokens)?;
                same("rows of the output", out.rows, Rows::Assignments)?;
                same("columns of the output", out.cols, if *silu_mul { rows / 2 } else { rows })?;
                self.lists(offsets, order, experts)
            }
            Op::SiluMul { input, out } => {
                let (input, out) = (self.activation(input)?, self.activation(out)?);
                same("rows", input.rows, out.rows)?;
                same("columns of the input", input.cols, 2 * out.cols)
            }
            Op::ExpertDown { input, weight, offsets, order, out, .. } => {
                let (input, out) = (self.activation(input)?, self.activation(out)?);
                let (experts, rows) = self.expert_weight(weight, input.cols)?;
                same("rows of the input", input.rows, Rows::Assignments)?;
                same("rows of the output", out.rows, Rows::Assignments)?;
                same("columns of the output", out.cols, rows)?;
                self.lists(offsets, order, experts)
            }
            Op::Combine { input, expert_ids, expert_weights, experts, residual, out, norm } => {
                self.experts(*experts)?;
                self.top_k(expert_ids, expert_weights)?;
                let (input, out) = (self.activation(input)?, self.activation(out)?);
                same("rows of the input", input.rows, Rows::Assignments)?;
                same("columns of the input", input.cols, out.cols)?;
                same("rows of the output", out.rows, Rows::Tokens)?;
                self.finish(residual.as_deref(), out, norm.as_ref())
            }
            Op::AllReduce { input, residual, out, norm } => {
                let (input, out) = (self.activation(input)?, self.activation(out)?);
                alike(input, out)?;
                self.finish(residual.as_deref(), out, norm.as_ref())
            }
            Op::AllGather { input, out } => {
                let (input, out) = (self.buffer(input)?, self.buffer(out)?);
                same("types", input.dtype, out.dtype)?;
                same("rows", input.rows, out.rows)?;
                same("columns of the output", out.cols, input.cols.saturating_mul(self.program.tp_size))
            }
            Op::Send { input: buffer, to: peer } | Op::Recv { out: buffer, from: peer } => {
                self.buffer(buffer)?;
                if *peer < self.program.world_size && *peer != self.program.rank {
                    Ok(())
                } else {
                    Err(format!("rank {peer} is not another rank of {}", self.program.world_size))
                }
            }
            Op::GatherRows { input, out } => {
                let (input, out) = (self.activation(input)?, self.activation(out)?);
                same("rows of the input", input.rows, Rows::Tokens)?;
                same("rows of the output", out.rows, Rows::Logits)?;
                same("columns", input.cols, out.cols)
            }
            Op::Sample { logits } => {
                let logits = self.typed(logits, ElemType::F32)?;
                same("rows", logits.rows, Rows::Logits)?;
                if logits.cols < self.program.vocab_size {
                    return Err(format!("{} columns for a vocabulary of {}", logits.cols, self.program.vocab_size));
                }
                Ok(())
            }
        }
    }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Result<(), String> {
    if found == expected { Ok(()) } else { Err(format!("{what}: found {found:?}, expected {expected:?}")) }
}

fn alike(a: &Buffer, b: &Buffer) -> Result<(), String> {
    same(&format!("columns of `{}` and `{}`", a.name, b.name), a.cols, b.cols)?;
    same(&format!("rows of `{}` and `{}`", a.name, b.name), a.rows, b.rows)
}

#[cfg(test)]
mod tests;
