//! The operations of a program, and what each computes.
//!
//! Notation: T tokens of the step, H hidden size, `round` is rounding to the model's data type (nearest, ties to
//! even), everything else is f32. `dot` is the contract's dot product: 16 strided f32 lanes, lane l accumulating
//! the products of elements l, l + 16, … by fused multiply-add in ascending order from +0, then summed by one
//! fixed tree (l with l + 8, then + 4, + 2, + 1). A trailing partial group touches only its own lanes. The result
//! therefore does not depend on how many tokens are in the step nor on the instruction set.
//!
//! Buffers are named; a field that holds a buffer's name says its shape. Operands that are not listed (token ids,
//! positions, block table …) come from [`StepInputs`](crate::StepInputs). A fused operation equals the composition
//! of its parts to the bit: every linear rounds its output once, fused or not.

use mixtral_model::MoeNormalization;
use serde::{Deserialize, Serialize};

/// What a linear does with each f32 accumulator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Epilogue {
    /// `out = round(acc)`.
    #[default]
    Store,
    /// `out = round(round(acc) + residual)`.
    Residual,
    /// `out = acc`, in f32: router and vocabulary logits.
    F32,
}

/// One rung of a linear's kernel ladder: steps of up to `max_tokens` tokens run `plan`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rung {
    /// Largest token count of the rung.
    pub max_tokens: usize,
    /// The kernel plan's stable text form.
    pub plan: String,
}

/// One operation. Field names are the keys of the program's text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Op {
    /// `out[t] = table[token_ids[t] − vocab_start]`; a token outside the table's rows gives zeros.
    Embed {
        /// Weight `[rows, H]`.
        table: String,
        /// First vocabulary id of the table.
        vocab_start: usize,
        /// Buffer `[T, H]`.
        out: String,
    },
    /// RMSNorm over each row: `inv = 1 / sqrt(dot(x, x) / H + eps)`, `out = round(round(x · inv) · weight)`.
    Norm {
        /// Buffer `[n, H]`.
        input: String,
        /// Weight `[H]`.
        weight: String,
        /// Added to the mean square, rounded to f32.
        eps: f64,
        /// Buffer `[n, H]`.
        out: String,
    },
    /// `out = round(a + b)`, element by element.
    Add {
        /// Buffer `[n, m]`.
        a: String,
        /// Buffer `[n, m]`.
        b: String,
        /// Buffer `[n, m]`; may be `b`.
        out: String,
    },
    /// `acc[t][r] = dot(input[t], weight[r])`, then the epilogue. A weight of more than two dimensions is read as
    /// the matrix `[product of the leading ones, last]`.
    ///
    /// With an fp8 weight of scale `w` and input scale `a`, `x = e4m3(input / a)`, a quotient in f32, is multiplied with the stored numbers: a dot
    /// for each block of 128 columns, then their sum in ascending order, then `acc = sum · (a · w)`. In `fp8:row` formats `w` is
    /// the row's own, and in `fp8:row:token` `a` is the token's: its largest magnitude / 448, or 1 if all of it is zero.
    Linear {
        /// Buffer `[n, K]`.
        input: String,
        /// Weight `[N, K]`.
        weight: String,
        /// Rows `[start, end)` of the weight that are used; all when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rows: Option<[usize; 2]>,
        /// What happens to the accumulator.
        epilogue: Epilogue,
        /// Buffer `[n, rows]`, for [`Epilogue::Residual`]; may be `out`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        residual: Option<String>,
        /// Buffer `[n, rows]`; f32 for [`Epilogue::F32`].
        out: String,
        /// Kernels by token count; empty on the CPU.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        ladder: Vec<Rung>,
    },
    /// Rotary embedding of the first `num_heads` heads of each row, in place, halves (i, i + d/2) paired:
    /// `a' = round(a·cos − b·sin)`, `b' = round(b·cos + a·sin)`, each a plain f32 expression without fused
    /// multiply-add. The angle is `position · inv_freq[i]` in f32 with `inv_freq[i] = 1 / theta^(2i/d)` computed in
    /// f32; its sine and cosine are taken in f64 and rounded to f32.
    Rope {
        /// Buffer `[T, ≥ num_heads · d]`.
        data: String,
        /// Heads rotated.
        num_heads: usize,
        /// Base of the frequencies.
        theta: f64,
    },
    /// `cache[layer].k[slot_mapping[t]] = key[t]`, likewise the values; a slot of −1 writes nothing. An fp8 cache gets
    /// `e4m3(key / scale)`, with the layer's scale of keys or of values; with `directions`, keys are rounded as
    /// [`KeyDirections`] says.
    WriteKv {
        /// Buffer `[T, kv_heads · d]`.
        key: String,
        /// Buffer `[T, kv_heads · d]`.
        value: String,
        /// Layer of the cache, counted over this rank's.
        layer: usize,
        /// How keys are rounded; absent is to nearest.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        directions: Option<KeyDirections>,
    },
    /// [`Op::Rope`] of the query and key heads, then [`Op::WriteKv`], on rows of `Q ‖ K ‖ V`. Only the query part
    /// of `qkv` is defined afterwards.
    RopeWriteKv {
        /// Buffer `[T, (num_heads + 2 · kv_heads) · d]`.
        qkv: String,
        /// Query heads.
        num_heads: usize,
        /// Base of the frequencies.
        theta: f64,
        /// Layer of the cache, counted over this rank's.
        layer: usize,
        /// The weight of [`KeyDirections`], if keys are rounded by it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        directions: Option<String>,
    },
    /// Causal attention of each token over its sequence's cache. The query at position i sees the keys
    /// `i − window < j ≤ i`, in ascending order: `s[j] = dot(q, k[j]) · (1/√d)`, `p[j] = exp(s[j] − max s)`,
    /// `out = round((Σ p[j]·v[j]) / Σ p[j])`; both sums ascending over j in f32, the first by fused multiply-add. With an
    /// fp8 cache k and v are the stored numbers, and the factors become `(1/√d · scale of keys)` and, before the rounding of
    /// the output, the scale of values.
    ///
    /// With `fp8_context`, tokens of sequences that are no decodes have fp8 products: q becomes `e4m3(q)`, and
    /// `p[j] = e4m3(256 · exp(s[j] − c)) / 256`, where c is `max s` rounded up to a multiple of ln 2. So a power of two relates p to
    /// what it would be relative to the maximum of some of the keys, and e4m3 rounds both alike, unless they are smaller than 2^-14:
    /// the tiles that a kernel cuts the keys into do not matter. Both sums take the rounded p, so their quotient is a mean of values.
    /// q has no scale: e4m3 has the same precision from 2^-6 to 448, where queries lie, and what is larger becomes ±448.
    Attention {
        /// Buffer `[T, ≥ num_heads · d]`; the queries are its first columns.
        query: String,
        /// Query heads; head h reads KV head `h / (num_heads / kv_heads)`.
        num_heads: usize,
        /// Sliding window; absent is full attention.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        window: Option<usize>,
        /// Whether prompts are computed in fp8; only with an fp8 cache.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        fp8_context: bool,
        /// Layer of the cache, counted over this rank's.
        layer: usize,
        /// Buffer `[T, num_heads · d]`.
        out: String,
    },
    /// `probs = softmax(logits)` over each row: `exp(x − max)`, divided by their sum in ascending order.
    Softmax {
        /// Buffer f32 `[T, E]`.
        logits: String,
        /// Buffer f32 `[T, E]`.
        probs: String,
    },
    /// The k largest of each row, ties to the lower id, listed in ascending id. With `renorm` their values are
    /// divided by their sum (taken in ascending id).
    TopK {
        /// Buffer f32 `[T, E]`.
        probs: String,
        /// How the values are scaled.
        normalization: MoeNormalization,
        /// Layer of the model, for expert statistics.
        layer: usize,
        /// Buffer i32 `[T, k]`.
        expert_ids: String,
        /// Buffer f32 `[T, k]`.
        expert_weights: String,
    },
    /// Lists the assignments `a = t·k + j` by expert, stable in a, for the local experts `[start, end)`:
    /// `order[offsets[e − start] .. offsets[e − start + 1]]` are those of expert e.
    ExpertSort {
        /// Buffer i32 `[T, k]`.
        expert_ids: String,
        /// Local experts `[start, end)`.
        experts: [usize; 2],
        /// Buffer i32 `[1, end − start + 1]`.
        offsets: String,
        /// Buffer i32 `[T·k, 1]`.
        order: String,
    },
    /// [`Op::Softmax`], [`Op::TopK`], [`Op::ExpertSort`].
    Route {
        /// Buffer f32 `[T, E]`.
        logits: String,
        /// How the values are scaled.
        normalization: MoeNormalization,
        /// Layer of the model, for expert statistics.
        layer: usize,
        /// Local experts `[start, end)`.
        experts: [usize; 2],
        /// Buffer i32 `[T, k]`.
        expert_ids: String,
        /// Buffer f32 `[T, k]`.
        expert_weights: String,
        /// Buffer i32 `[1, end − start + 1]`.
        offsets: String,
        /// Buffer i32 `[T·k, 1]`.
        order: String,
    },
    /// Linear of each token by each of its local experts. Row p of `out` belongs to assignment `order[p]`, so rows of
    /// the same expert lie together. The weight of an expert holds its up rows first, then its gate rows. With
    /// `silu_mul` the epilogue combines the two halves (see [`Op::SiluMul`]) and `out` has I columns, else 2·I.
    ExpertGateUp {
        /// Buffer `[T, H]`.
        input: String,
        /// Weight `[experts, 2·I, H]`.
        weight: String,
        /// Buffer i32 `[1, experts + 1]`.
        offsets: String,
        /// Buffer i32 `[T·k, 1]`.
        order: String,
        /// Whether the epilogue applies SiLU·mul.
        silu_mul: bool,
        /// Buffer `[T·k, 2·I or I]`.
        out: String,
        /// Kernels by token count; empty on the CPU.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        ladder: Vec<Rung>,
    },
    /// `out[c] = round(silu(gate) · up)` with `up = input[c]`, `gate = input[I + c]`, `silu(g) = g / (1 + exp(−g))`.
    /// Rows behind the last defined one are not read.
    SiluMul {
        /// Buffer `[n, 2·I]`.
        input: String,
        /// Buffer `[n, I]`.
        out: String,
    },
    /// Linear of each assignment by its expert. Row p of `input` belongs to assignment `order[p]`, and its result goes
    /// to row `order[p]` of `out`. Rows of assignments to experts of other ranks stay as they are.
    ExpertDown {
        /// Buffer `[T·k, I]`.
        input: String,
        /// Weight `[experts, H, I]`.
        weight: String,
        /// Buffer i32 `[1, experts + 1]`.
        offsets: String,
        /// Buffer i32 `[T·k, 1]`.
        order: String,
        /// Buffer `[T·k, H]`.
        out: String,
        /// Kernels by token count; empty on the CPU.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        ladder: Vec<Rung>,
    },
    /// `out[t] = round(residual[t] + Σ_j expert_weights[t][j] · input[t·k + j])`: the sum over local experts in
    /// ascending id from +0, each term by fused multiply-add, the residual (if there is one) added last. With `norm`,
    /// [`Op::Norm`] of `out` follows.
    Combine {
        /// Buffer `[T·k, H]`.
        input: String,
        /// Buffer i32 `[T, k]`.
        expert_ids: String,
        /// Buffer f32 `[T, k]`.
        expert_weights: String,
        /// Local experts `[start, end)`.
        experts: [usize; 2],
        /// Buffer `[T, H]`; may be `out`. Absent where the sum is only this rank's part of a sum over ranks.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        residual: Option<String>,
        /// Buffer `[T, H]`.
        out: String,
        /// The RMSNorm that follows.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        norm: Option<FusedNorm>,
    },
    /// The sum of a buffer over the ranks of the tensor-parallel group: `sum = round(Σ_r input_r)`, in f32 and in
    /// ascending rank. Then `out = sum`, or with a residual `out = round(sum + residual)`. With `norm`, [`Op::Norm`] of
    /// `out` follows.
    AllReduce {
        /// Buffer `[n, m]`: this rank's part, rounded.
        input: String,
        /// Buffer `[n, m]`; may be `out`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        residual: Option<String>,
        /// Buffer `[n, m]`.
        out: String,
        /// The RMSNorm that follows.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        norm: Option<FusedNorm>,
    },
    /// `out[i] = input_0[i] ‖ input_1[i] ‖ …` over the ranks of the tensor-parallel group, in ascending rank.
    AllGather {
        /// Buffer `[n, m]`: this rank's columns.
        input: String,
        /// Buffer `[n, tp_size · m]`, of the same type.
        out: String,
    },
    /// Sends a buffer's rows of this step to the same rank of the next pipeline stage.
    Send {
        /// Buffer `[n, m]`.
        input: String,
        /// The receiving rank.
        to: usize,
    },
    /// Receives a buffer's rows of this step from the same rank of the stage before.
    Recv {
        /// Buffer `[n, m]`.
        out: String,
        /// The sending rank.
        from: usize,
    },
    /// `out[l] = input[logits_indices[l]]`.
    GatherRows {
        /// Buffer `[T, H]`.
        input: String,
        /// Buffer `[L, H]`.
        out: String,
    },
    /// Draws the next token of every sequence that asks for one (see [`crate::sampling`]). Columns from `vocab_size` on
    /// are padding and are never drawn.
    Sample {
        /// Buffer f32 `[L, ≥ vocab_size]`.
        logits: String,
    },
}

/// The RMSNorm inside a fused operation; see [`Op::Norm`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FusedNorm {
    /// Weight `[H]`.
    pub weight: String,
    /// Added to the mean square.
    pub eps: f64,
    /// Buffer `[n, H]`.
    pub out: String,
}

/// Rounding of keys for an fp8 cache, so that the products with queries keep more than the keys themselves do. Most queries of a
/// head lie in one direction. Each KV head has that direction u, as keys are before their rotation; it is turned to the
/// key's position like a key, but stays in f32.
///
/// With t the key over the scale, each element is first rounded to the nearest number v of e4m3. What it loses is
/// e = t − v. Its alternative is v's neighbour on t's other side: one step away from zero if |v| ≤ |t|, else one towards zero; what
/// would be beyond the largest number, and NaN, has none. Δ is v minus the alternative. Then, twice, the element whose alternative
/// lowers `(Σ u·e)² + Σ e²` most takes it, if one does: with `ρ = Σ u·e`, the element with the least
/// `c = Δ · fma(fma(u, u, 1), Δ, 2 · fma(ρ, u, e))`, of equals the first, if c is below 0. For it e becomes e + Δ, ρ becomes
/// `fma(u, Δ, ρ)`, and Δ becomes −Δ.
///
/// All in f32. ρ begins as the sum of all `fma(u[i + d/2], e[i + d/2], u[i] · e[i])`, neighbours first, then neighbouring sums of
/// two, of four, and so on; so d is a power of two
/// ([`suits_directions`](mixtral_model::fp8::suits_directions)).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyDirections {
    /// Weight f32 `[kv_heads, d]`.
    pub weight: String,
    /// Base of the frequencies of the rotation.
    pub theta: f64,
}

impl Op {
    /// The operation's name in the program's text.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Op::Embed { .. } => "embed",
            Op::Norm { .. } => "norm",
            Op::Add { .. } => "add",
            Op::Linear { .. } => "linear",
            Op::Rope { .. } => "rope",
            Op::WriteKv { .. } => "write_kv",
            Op::RopeWriteKv { .. } => "rope_write_kv",
            Op::Attention { .. } => "attention",
            Op::Softmax { .. } => "softmax",
            Op::TopK { .. } => "top_k",
            Op::ExpertSort { .. } => "expert_sort",
            Op::Route { .. } => "route",
            Op::ExpertGateUp { .. } => "expert_gate_up",
            Op::SiluMul { .. } => "silu_mul",
            Op::ExpertDown { .. } => "expert_down",
            Op::Combine { .. } => "combine",
            Op::AllReduce { .. } => "all_reduce",
            Op::AllGather { .. } => "all_gather",
            Op::Send { .. } => "send",
            Op::Recv { .. } => "recv",
            Op::GatherRows { .. } => "gather_rows",
            Op::Sample { .. } => "sample",
        }
    }

    /// The buffers that the operation reads. An operand that it changes in place is in both `reads` and `writes`.
    #[must_use]
    pub fn reads(&self) -> Vec<&str> {
        match self {
            Op::Embed { .. } | Op::Recv { .. } => vec![],
            Op::Norm { input, .. }
            | Op::GatherRows { input, .. }
            | Op::SiluMul { input, .. }
            | Op::AllGather { input, .. }
            | Op::Send { input, .. } => vec![input],
            Op::Add { a, b, .. } => vec![a, b],
            Op::Linear { input, residual, .. } | Op::AllReduce { input, residual, .. } => {
                let mut reads = vec![input.as_str()];
                reads.extend(residual.as_deref());
                reads
            }
            Op::Rope { data, .. } => vec![data],
            Op::WriteKv { key, value, .. } => vec![key, value],
            Op::RopeWriteKv { qkv, .. } => vec![qkv],
            Op::Attention { query, .. } => vec![query],
            Op::Softmax { logits, .. } | Op::Route { logits, .. } | Op::Sample { logits, .. } => vec![logits],
            Op::TopK { probs, .. } => vec![probs],
            Op::ExpertSort { expert_ids, .. } => vec![expert_ids],
            Op::ExpertGateUp { input, offsets, order, .. } | Op::ExpertDown { input, offsets, order, .. } => {
                vec![input, offsets, order]
            }
            Op::Combine { input, expert_ids, expert_weights, residual, .. } => {
                let mut reads = vec![input.as_str(), expert_ids, expert_weights];
                reads.extend(residual.as_deref());
                reads
            }
        }
    }

    /// The buffers that the operation writes.
    #[must_use]
    pub fn writes(&self) -> Vec<&str> {
        match self {
            Op::Embed { out, .. }
            | Op::Norm { out, .. }
            | Op::Add { out, .. }
            | Op::Linear { out, .. }
            | Op::Attention { out, .. }
            | Op::ExpertGateUp { out, .. }
            | Op::SiluMul { out, .. }
            | Op::ExpertDown { out, .. }
            | Op::AllGather { out, .. }
            | Op::Recv { out, .. }
            | Op::GatherRows { out, .. } => vec![out],
            Op::Rope { data, .. } => vec![data],
            Op::WriteKv { .. } | Op::Sample { .. } | Op::Send { .. } => vec![],
            Op::RopeWriteKv { qkv, .. } => vec![qkv],
            Op::Softmax { probs, .. } => vec![probs],
            Op::TopK { expert_ids, expert_weights, .. } => vec![expert_ids, expert_weights],
            Op::ExpertSort { offsets, order, .. } => vec![offsets, order],
            Op::Route { expert_ids, expert_weights, offsets, order, .. } => {
                vec![expert_ids, expert_weights, offsets, order]
            }
            Op::Combine { out, norm, .. } | Op::AllReduce { out, norm, .. } => {
                let mut writes = vec![out.as_str()];
                writes.extend(norm.as_ref().map(|n| n.out.as_str()));
                writes
            }
        }
    }

    /// The weights that the operation reads.
    #[must_use]
    pub fn weights(&self) -> Vec<&str> {
        match self {
            Op::Embed { table, .. } => vec![table],
            Op::Norm { weight, .. }
            | Op::Linear { weight, .. }
            | Op::ExpertGateUp { weight, .. }
            | Op::ExpertDown { weight, .. } => vec![weight],
            Op::Combine { norm, .. } | Op::AllReduce { norm, .. } => norm.iter().map(|n| n.weight.as_str()).collect(),
            Op::WriteKv { directions, .. } => directions.iter().map(|d| d.weight.as_str()).collect(),
            Op::RopeWriteKv { directions, .. } => directions.iter().map(String::as_str).collect(),
            _ => vec![],
        }
    }
}
