//! `attention`, `rope`, `write_kv`, `rope_write_kv`.

use mixtral_engine::{KvLayout, Op};
use mixtral_model::{CacheFormat, ElemType};

use super::elementwise::{VECTOR, threads_for};
use super::{LowerError, Lowering, count, int, is_16_bit, launch, named, portable, rounded, type_name};
use crate::step_block::{Array, DECODE_SPLIT, PREFILL_TILE};
use crate::{Arg, Family, Grid, Kernel, Launch, NamedArg, TensorMap};

/// Threads of a CTA of every attention kernel, not counting threads that only load.
const THREADS: usize = 128;
/// Stages of decode attention's ring. More CTAs hide latency better than more stages: three CTAs of two stages take 50
/// µs, two CTAs of three stages 57 µs.
const DECODE_STAGES: usize = 2;
/// The same of an fp8 cache, whose stages have half the bytes. A CTA then loads as many bytes ahead.
const FP8_DECODE_STAGES: usize = 3;
/// Tokens of a tile of keys and values: `attention::TILE`.
const TILE: usize = 64;
/// Tokens of a tile that a warp of `attention::decode_tma` takes.
const STRIP: usize = 16;
/// Bytes of a row that TMA swizzles: its pieces of 16 bytes change places.
const SWIZZLED: usize = 128;
/// Bytes of shared memory of a Hopper multiprocessor.
const HOPPER_SHARED: usize = 228 * 1024;
/// Whether prefill splits each probability into two 16-bit parts, as decode does, or rounds it to one. One part needs
/// half the products with the values, and has 256 (bf16) or 32 (f16) times the error.
const EXACT_PREFILL: bool = false;
/// The most threads of a rope kernel. A large model has this many vectors to rotate in a token.
const ROPE_THREADS: usize = 512;

/// The most warps of a CTA that round keys by directions.
const DIRECTED: usize = 8;

/// Up to this many decodes are rotated, written to the cache and attended to by one kernel. That saves a launch, which counts where steps are
/// short. The kernel needs more registers than three CTAs of a multiprocessor leave, so two run.
const FEW_DECODES: usize = 8;
/// The most heads of a group of which that kernel has enough registers.
const FEW_HEADS: usize = 8;

const ROPE: &str = "attention/rope.cuh";

pub(super) fn lower(lowering: &Lowering<'_>, op: &Op) -> Result<Vec<Launch>, LowerError> {
    let kv = lowering.program.kv;
    if kv.dtype != lowering.program.dtype {
        let reason =
            format!("a cache of {} for a model of {}; only equal types have kernels", kv.dtype, lowering.program.dtype);
        return Err(LowerError::Unsupported { op: op.name(), reason });
    }
    match op {
        Op::Attention { query, num_heads, window, fp8_context, layer, out } => {
            attention(lowering, op, (query, out), *num_heads, *window, *fp8_context, *layer)
        }
        Op::Rope { data, num_heads, theta } => {
            let (_, buffer) = lowering.buffer(op, data)?;
            let threads = threads_for(num_heads * (kv.head_dim / 2).div_ceil(VECTOR), ROPE_THREADS);
            let dtype = type_name(kv.dtype);
            let symbol = format!("attention::rope<{dtype}, {}, {num_heads}, {}, {threads}>", buffer.cols, kv.head_dim);
            let args = named([
                ("header", Arg::Step(Array::Header)),
                ("table", Arg::Scratch(lowering.scratch.angles)),
                ("data", lowering.at(op, data)?),
            ]);
            Ok(with_angles(lowering, op, *theta, launch(portable(ROPE, symbol, threads), TOKEN, args)))
        }
        Op::WriteKv { directions: Some(_), .. } => {
            let reason = "keys are rounded by directions only where they are rotated".to_owned();
            Err(LowerError::Unsupported { op: op.name(), reason })
        }
        Op::WriteKv { key, value, layer, directions: None } => {
            let threads = threads_for(kv.num_kv_heads * kv.head_dim.div_ceil(VECTOR), ROPE_THREADS);
            let symbol = format!(
                "attention::write_kv<{}, {}, {}, {}, {threads}>",
                types(kv),
                kv.num_kv_heads,
                kv.head_dim,
                lowering.program.limits.block_size
            );
            let args = named([
                ("header", Arg::Step(Array::Header)),
                ("slots", Arg::Step(Array::SlotMapping)),
                ("key", lowering.at(op, key)?),
                ("value", lowering.at(op, value)?),
                ("key_scale", key_scale(kv, *layer, 1.0)),
                ("value_scale", value_scale(kv, *layer)),
                ("keys", Arg::Keys(*layer)),
                ("values", Arg::Values(*layer)),
            ]);
            Ok(vec![launch(portable(ROPE, symbol, threads), TOKEN, args)])
        }
        Op::RopeWriteKv { qkv, num_heads, theta, layer, directions } => {
            // Keys that are rounded by directions have warps of their own.
            let directed = if directions.is_some() { kv.num_kv_heads.min(DIRECTED) } else { 0 };
            let heads = num_heads + if directed > 0 { 1 } else { 2 } * kv.num_kv_heads;
            let pieces = heads * (kv.head_dim / 2).div_ceil(VECTOR);
            let threads = threads_for(pieces, ROPE_THREADS) + 32 * directed;
            let symbol = format!(
                "attention::rope_write_kv<{}, {num_heads}, {}, {}, {}, {threads}, {directed}>",
                types(kv),
                kv.num_kv_heads,
                kv.head_dim,
                lowering.program.limits.block_size
            );
            let args = named([
                ("header", Arg::Step(Array::Header)),
                ("slots", Arg::Step(Array::SlotMapping)),
                ("table", Arg::Scratch(lowering.scratch.angles)),
                ("qkv", lowering.at(op, qkv)?),
                ("key_scale", key_scale(kv, *layer, 1.0)),
                ("value_scale", value_scale(kv, *layer)),
                ("keys", Arg::Keys(*layer)),
                ("values", Arg::Values(*layer)),
                ("directions", directions_of(lowering, op, directions.as_deref())?),
            ]);
            Ok(with_angles(lowering, op, *theta, launch(portable(ROPE, symbol, threads), TOKEN, args)))
        }
        _ => Err(LowerError::Unsupported { op: op.name(), reason: "not an operation of attention".to_owned() }),
    }
}

/// The weight that keys are rounded by; something that is not read if there is none.
fn directions_of(lowering: &Lowering<'_>, op: &Op, directions: Option<&str>) -> Result<Arg, LowerError> {
    let Some(name) = directions else { return Ok(Arg::Scratch(lowering.scratch.angles)) };
    Ok(Arg::Weight { index: lowering.weight(op, name)?.0, offset: 0 })
}

/// The types of queries and outputs, and of what the cache stores.
fn types(kv: KvLayout) -> String {
    format!("{}, {}", type_name(kv.dtype), type_name(kv.elem()))
}

/// A number, times the scale of a layer's keys if they have one.
fn key_scale(kv: KvLayout, layer: usize, times: f32) -> Arg {
    if kv.format.is_plain() { Arg::F32(times) } else { Arg::KeyScale { layer, times } }
}

/// The scale of a layer's values; 1 if they have none.
fn value_scale(kv: KvLayout, layer: usize) -> Arg {
    if kv.format.is_plain() { Arg::F32(1.0) } else { Arg::ValueScale(layer) }
}

/// One CTA for each token.
const TOKEN: Grid = Grid::Tokens { per: 1, times: 1 };

/// Puts the launch that computes the table of angles before the program's first rotation, and before each rotation
/// whose base differs from the last one's.
fn with_angles(lowering: &Lowering<'_>, op: &Op, theta: f64, rotation: Launch) -> Vec<Launch> {
    let base = |op: &Op| match op {
        Op::Rope { theta, .. } | Op::RopeWriteKv { theta, .. } => Some(*theta),
        _ => None,
    };
    let earlier = lowering.program.ops.iter().take_while(|other| !std::ptr::eq(*other, op));
    if earlier.filter_map(base).last() == Some(theta) {
        return vec![rotation];
    }
    let half = lowering.program.kv.head_dim / 2;
    let constants: Vec<String> =
        frequencies(theta, lowering.program.kv.head_dim).map(|f| format!("{}u", f.to_bits())).collect();
    let kernel = portable(ROPE, format!("attention::angles<{}>", constants.join(", ")), 256);
    // A CTA has 256 threads, each for one token and one frequency.
    let grid = match 256 / half {
        0 => Grid::Tokens { per: 1, times: count(half.div_ceil(256)) },
        per => Grid::Tokens { per: count(per), times: 1 },
    };
    let args = named([
        ("header", Arg::Step(Array::Header)),
        ("positions", Arg::Step(Array::Positions)),
        ("table", Arg::Scratch(lowering.scratch.angles)),
    ]);
    vec![launch(kernel, grid, args), rotation]
}

/// The contract's inverse frequencies, computed as the CPU backend does.
#[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "the contract's roundings to f32")]
fn frequencies(theta: f64, head_dim: usize) -> impl Iterator<Item = f32> {
    (0..head_dim / 2).map(move |i| 1.0 / theta.powf(f64::from((2 * i) as f32 / head_dim as f32)) as f32)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "a scale in f32")]
fn attention(
    lowering: &Lowering<'_>,
    op: &Op,
    (query, out): (&str, &str),
    heads: usize,
    window: Option<usize>,
    fp8_context: bool,
    layer: usize,
) -> Result<Vec<Launch>, LowerError> {
    let (kv, limits) = (lowering.program.kv, lowering.program.limits);
    let (_, buffer) = lowering.buffer(op, query)?;
    let KvLayout { num_kv_heads: kv_heads, head_dim, .. } = kv;
    let (query, out) = (("query", lowering.at(op, query)?), ("out", lowering.at(op, out)?));
    let (rounds, rounding) = rounded::of_producer(lowering, op, [out.1.clone(), out.1.clone()]);
    let rounding = named(rounding);
    let shape = format!(
        "{}, {}, {heads}, {kv_heads}, {head_dim}, {}, {}, {rounds}",
        types(kv),
        buffer.cols,
        limits.block_size,
        window.unwrap_or(0)
    );
    let table =
        named([("block_table", Arg::Step(Array::BlockTable)), ("table_width", int(limits.max_blocks_per_seq()))]);
    let scale = 1.0 / (head_dim as f64).sqrt();
    let (keys, values) = (("keys", Arg::Keys(layer)), ("values", Arg::Values(layer)));
    let scales = |scale: f64| [("scale", key_scale(kv, layer, scale as f32)), ("value_scale", value_scale(kv, layer))];
    let operands = |scale: f64| {
        let [scale, value_scale] = scales(scale);
        named([query.clone(), keys.clone(), values.clone(), scale, value_scale, out.clone()])
    };
    // Tensor cores take 16 elements of a head at a time, and a load of keys brings 32 bytes of each.
    let whole = (32 / kv.elem().size()).max(16);
    if !is_16_bit(kv.dtype) || !head_dim.is_multiple_of(whole) || head_dim > 128 || !buffer.cols.is_multiple_of(VECTOR)
    {
        let steps =
            steps([("header", Array::Header), ("positions", Array::Positions), ("cu_query_lens", Array::CuQueryLens)]);
        let args = [steps, table, operands(scale), rounding].concat();
        let kernel = portable("attention/simt.cuh", format!("attention::simt<{shape}, {fp8_context}>"), THREADS);
        return Ok(vec![launch(kernel, Grid::Tokens { per: 1, times: count(heads) }, args)]);
    }
    // The kernels take powers of 2 instead of e, so the scores are scaled by log2 e.
    let scale = scale * std::f64::consts::LOG2_E;
    let mut launches = vec![];
    let grid = Grid::Persistent { per_sm: 2, items: None };
    // Bytes of a row in shared memory, as in `attention::Rows`: of the queries, and of a tile as the cache stores it.
    let padded = |bytes: usize| bytes + if bytes.is_multiple_of(128) { 0 } else { 16 };
    let (row, stored_row) = (padded(2 * head_dim), padded(kv.elem().size() * head_dim));

    let group = heads / kv_heads;
    let decodes = steps([("header", Array::Header), ("items", Array::DecodeItems)]);
    let scratch = named([
        ("partials", Arg::Scratch(lowering.scratch.attention_partials)),
        ("max_splits", int(limits.max_seq_len.div_ceil(DECODE_SPLIT))),
        ("tickets", Arg::Scratch(lowering.scratch.attention_tickets)),
    ]);
    if let Some(ring) = DecodeRing::new(kv, heads, limits.block_size, lowering.target.family) {
        let newest = newest_of(lowering, op)?;
        let ring = if newest.is_some() { DecodeRing::of(2, kv, heads) } else { ring };
        let dims = [head_dim as u64, ANY_ROWS];
        let map_of = |base: &Arg, rows| map(base.clone(), kv.elem(), dims, rows);
        let maps = named([
            ("key_tiles", map_of(&keys.1, TILE)),
            ("key_strips", map_of(&keys.1, STRIP)),
            ("value_tiles", map_of(&values.1, TILE)),
            ("value_strips", map_of(&values.1, STRIP)),
        ]);
        let [scale, value_scale] = scales(scale);
        let rest = named([query.clone(), scale, value_scale, out.clone()]);
        let shared = ring.shared_bytes(kv, heads);
        let DecodeRing { per_sm, slots } = ring;
        let stream = format!("attention::DecodeStream<{shape}, {slots}, {per_sm}, {shared}>");
        let (symbol, newest) = match newest {
            Some((directed, args)) => (format!("attention::rope_decode_tma<{stream}, {directed}>"), args),
            None => (format!("attention::decode_tma<{stream}>"), vec![]),
        };
        let args = [maps, decodes, table.clone(), rest, scratch, rounding.clone(), newest].concat();
        let kernel = Kernel {
            header: "attention/decode_tma.cuh".into(),
            symbol,
            threads: count(THREADS + 32),
            shared_bytes: count(shared),
            family: Family::Hopper,
        };
        launches.push(launch(kernel, Grid::Persistent { per_sm, items: None }, args));
    } else {
        let stages = decode_stages(kv);
        let symbol = format!("attention::decode_paged<{shape}, {stages}>");
        let shared = stages * 2 * TILE * stored_row + merge_bytes(group, head_dim);
        let kernel = Kernel { shared_bytes: count(shared), ..portable("attention/decode_paged.cuh", symbol, THREADS) };
        let args = [decodes, table.clone(), operands(scale), scratch, rounding.clone()].concat();
        // With 128 elements a head, three CTAs fit on a Hopper multiprocessor and two on an older one.
        let hopper = lowering.target.family == Family::Hopper;
        let per_sm = if hopper { count(HOPPER_SHARED / (shared + 1024)).min(3) } else { 2 };
        launches.push(launch(kernel, Grid::Persistent { per_sm, items: None }, args));
    }

    if lowering.regime.decodes {
        return Ok(launches);
    }
    let prompts = steps([
        ("header", Array::Header),
        ("items", Array::PrefillItems),
        ("cu_query_lens", Array::CuQueryLens),
        ("seq_lens", Array::SeqLens),
    ]);
    let family = lowering.target.family;
    let in_fp8 = fp8_context.then(|| e4m3_kernel(kv, heads, limits.block_size, window, rounds, family)).flatten();
    let tiling = PrefillTiling::new(kv, heads, limits.block_size, family).filter(|_| !fp8_context);
    let hopper = in_fp8.map(|kernel| (kernel, 1));
    let hopper =
        hopper.or(tiling.map(|tiling| (tiling.kernel(kv, heads, limits.block_size, window, rounds), tiling.per_sm())));
    if let Some((kernel, per_sm)) = hopper {
        let tokens = limits.max_num_tokens as u64;
        let query = named([("query", map(query.1, kv.dtype.into(), [buffer.cols as u64, tokens], TILE))]);
        let [scale, value_scale] = scales(scale);
        let rest = named([scale, value_scale, out]);
        let args = if kv.format.is_plain() || fp8_context {
            let map_of = |base| map(base, kv.elem(), [head_dim as u64, ANY_ROWS], TILE);
            let maps = named([("key", map_of(keys.1)), ("value", map_of(values.1))]);
            [query, maps, prompts, table, rest, rounding].concat()
        } else {
            [query, prompts, table, named([keys, values]), rest, rounding].concat()
        };
        launches.push(launch(kernel, Grid::Persistent { per_sm, items: None }, args));
    } else {
        // How many heads of a group a CTA takes together.
        let pack = if group.is_multiple_of(2) { 2 } else { 1 };
        // Queries, two stages of keys and values, and a place for a tile of 16-bit elements if the cache's are shorter.
        let converted = if kv.format.is_plain() { 0 } else { 2 * TILE * row };
        let kernel = Kernel {
            shared_bytes: count(pack * PREFILL_TILE * row + 4 * TILE * stored_row + converted),
            ..portable(
                "attention/prefill_paged.cuh",
                format!("attention::prefill_paged<{shape}, {fp8_context}, {pack}, {EXACT_PREFILL}>"),
                THREADS,
            )
        };
        let args = [prompts, table, operands(scale), rounding].concat();
        launches.push(launch(kernel, grid, args));
    }
    Ok(launches)
}

/// Lowers `rope_write_kv` and the attention behind it together, in steps of few decodes where decodes use TMA.
pub(super) fn rope_and_decode(lowering: &Lowering<'_>, ops: &[Op]) -> Result<Option<Vec<Launch>>, LowerError> {
    let [rope @ Op::RopeWriteKv { theta, .. }, op @ Op::Attention { num_heads, .. }, ..] = ops else {
        return Ok(None);
    };
    let (kv, block_size) = (lowering.program.kv, lowering.program.limits.block_size);
    if DecodeRing::new(kv, *num_heads, block_size, lowering.target.family).is_none()
        || newest_of(lowering, op)?.is_none()
    {
        return Ok(None);
    }
    let mut launches = lower(lowering, op)?;
    let decode = launches.remove(0);
    Ok(Some(with_angles(lowering, rope, *theta, decode)))
}

/// If the kernel of `op`, an attention of few decodes, does the work of the `rope_write_kv` before it: whether keys are rounded by
/// directions, and what it takes for that. It leaves the queries as they are, so nobody else may read them.
fn newest_of(lowering: &Lowering<'_>, op: &Op) -> Result<Option<(bool, Vec<NamedArg>)>, LowerError> {
    let (ops, kv) = (&lowering.program.ops, lowering.program.kv);
    let index = ops.iter().position(|found| std::ptr::eq(found, op));
    let before = index.and_then(|index| ops.get(index.checked_sub(1)?));
    let (
        Some(index),
        Op::Attention { query, num_heads, layer, .. },
        Some(rope @ Op::RopeWriteKv { qkv, num_heads: rotated, layer: written, directions, .. }),
    ) = (index, op, before)
    else {
        return Ok(None);
    };
    let few = lowering.regime.decodes
        && lowering.regime.max_tokens <= FEW_DECODES
        && num_heads / kv.num_kv_heads <= FEW_HEADS;
    let reads_again = |op: &Op| op.reads().contains(&qkv.as_str());
    let mut until_written = ops[index + 1..].iter().take_while(|op| !op.writes().contains(&qkv.as_str()));
    if !few || (query, num_heads, layer) != (qkv, rotated, written) || until_written.any(reads_again) {
        return Ok(None);
    }
    let args = named([
        ("slots", Arg::Step(Array::SlotMapping)),
        ("table", Arg::Scratch(lowering.scratch.angles)),
        ("key_scale", key_scale(kv, *layer, 1.0)),
        ("keys", Arg::Keys(*layer)),
        ("values", Arg::Values(*layer)),
        ("directions", directions_of(lowering, rope, directions.as_deref())?),
    ]);
    Ok(Some((directions.is_some(), args)))
}

/// Parameters that point at arrays of the step block.
fn steps<const N: usize>(arrays: [(&'static str, Array); N]) -> Vec<NamedArg> {
    named(arrays.map(|(name, array)| (name, Arg::Step(array))))
}

/// More rows than a pool of blocks can have. How many rows there are is known only when a program is loaded. A map with
/// too many rows costs nothing, because kernels only name rows of blocks that a step's block table holds.
const ANY_ROWS: u64 = i32::MAX as u64;

/// A map of `rows` rows of `cols` elements, in boxes of 128 bytes of `of` rows.
fn map(base: Arg, dtype: ElemType, [cols, rows]: [u64; 2], of: usize) -> Arg {
    Arg::TensorMap(TensorMap {
        base: Box::new(base),
        dtype,
        dims: vec![cols, rows],
        strides: vec![cols * dtype.size() as u64],
        tile: vec![count(SWIZZLED / dtype.size()), count(of)],
        swizzle: count(SWIZZLED),
    })
}

/// Whether TMA can fetch tiles: a head consists of whole swizzled rows, and each tile lies in one block.
fn has_boxes(kv: KvLayout, block_size: usize, family: Family) -> bool {
    let rows = matches!(kv.head_dim, 64 | 128) && (kv.head_dim * kv.elem().size()).is_multiple_of(SWIZZLED);
    family == Family::Hopper && is_16_bit(kv.dtype) && rows && block_size.is_multiple_of(TILE)
}

/// Stages of the ring of `attention::decode_paged`.
fn decode_stages(kv: KvLayout) -> usize {
    if kv.format.is_plain() { DECODE_STAGES } else { FP8_DECODE_STAGES }
}

/// Bytes of `attention::Decode::Merge`, which holds the warps' sums, maxima and totals, two items and two flags.
fn merge_bytes(group: usize, head_dim: usize) -> usize {
    4 * group.min(16) * (head_dim + 4) * 4 + 2 * 4 * 16 * 4 + 2 * 16 + 16
}

/// How `attention::decode_tma` uses shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct DecodeRing {
    /// CTAs of a multiprocessor.
    per_sm: u32,
    /// Tiles of keys or values in shared memory.
    slots: usize,
}

impl DecodeRing {
    /// `None` where decodes use the portable kernel.
    fn new(kv: KvLayout, heads: usize, block_size: usize, family: Family) -> Option<Self> {
        if !has_boxes(kv, block_size, family) {
            return None;
        }
        let of = |per_sm| DecodeRing::of(per_sm, kv, heads);
        // Three CTAs hide each other's merges better than two. Two are used where three would leave each less than the
        // keys and values of two tiles.
        Some([3, 2].map(of).into_iter().find(|ring| ring.slots >= 4).unwrap_or(of(2)))
    }

    /// As many slots as fit when `per_sm` CTAs share a multiprocessor; the system takes 1 KiB for each CTA.
    fn of(per_sm: u32, kv: KvLayout, heads: usize) -> Self {
        let fixed = DecodeRing { per_sm, slots: 0 }.shared_bytes(kv, heads);
        let each = DecodeRing { per_sm, slots: 1 }.shared_bytes(kv, heads) - fixed;
        DecodeRing { per_sm, slots: ((HOPPER_SHARED / per_sm as usize - 1024 - fixed) / each).min(8) }
    }

    /// Bytes of shared memory. Equal to `attention::DecodeStream::SHARED`; the kernel asserts that.
    fn shared_bytes(self, kv: KvLayout, heads: usize) -> usize {
        let group = heads / kv.num_kv_heads;
        let kept = 4 * group.min(16) * kv.head_dim;
        self.slots * (TILE * kv.elem().size() * kv.head_dim + 16) + merge_bytes(group, kv.head_dim) + kept
    }
}

/// How `attention::prefill_wgmma` and `attention::prefill_fp8` divide their work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PrefillTiling {
    /// Consumer warpgroups. Each computes one head; the heads share keys and values.
    warpgroups: usize,
    /// Tokens of a tile of keys.
    keys: usize,
    /// Tiles of keys, and of values, in shared memory.
    stages: usize,
}

impl PrefillTiling {
    /// `None` where prefill uses the portable kernel. The choice depends on nothing that differs between steps, because
    /// bits may not differ between steps.
    fn new(kv: KvLayout, heads: usize, block_size: usize, family: Family) -> Option<Self> {
        // The tiles have 16 bits, whatever the cache stores.
        if !has_boxes(KvLayout { format: CacheFormat::Plain, ..kv }, block_size, family) {
            return None;
        }
        let group = heads / kv.num_kv_heads;
        // Beside one or three warpgroups that compute there is no room for one that converts.
        if !kv.format.is_plain() && !group.is_multiple_of(2) {
            return None;
        }
        // Two warpgroups have enough registers for tiles of 128 tokens, which use the tensor cores better than tiles of
        // 64.
        Some(if group.is_multiple_of(2) {
            PrefillTiling { warpgroups: 2, keys: 128, stages: 2 }
        } else if group.is_multiple_of(3) {
            PrefillTiling { warpgroups: 3, keys: 64, stages: 4 }
        } else {
            PrefillTiling { warpgroups: 1, keys: 64, stages: 2 }
        })
    }

    /// CTAs of a multiprocessor: `attention::Prefill::PER_SM`.
    fn per_sm(self) -> u32 {
        if self.warpgroups == 1 { 2 } else { 1 }
    }

    /// Bytes of shared memory. Equal to `attention::Prefill::SHARED`; the kernel asserts that.
    fn shared_bytes(self, kv: KvLayout) -> usize {
        let row = 2 * kv.head_dim;
        let queries = 2 * self.warpgroups * PREFILL_TILE * row;
        let stored = if kv.format.is_plain() { 0 } else { 2 * self.keys * kv.head_dim };
        queries + 2 * self.stages * self.keys * row + stored + (2 + 2 * self.stages) * 16 + 1024
    }

    fn kernel(self, kv: KvLayout, heads: usize, block_size: usize, window: Option<usize>, rounds: bool) -> Kernel {
        let PrefillTiling { warpgroups, keys, stages } = self;
        let shared = self.shared_bytes(kv);
        let name = if kv.format.is_plain() { "prefill_wgmma" } else { "prefill_fp8" };
        let symbol = format!(
            "attention::{name}<attention::Prefill<{}, {heads}, {}, {}, {block_size}, {}, {rounds}, {warpgroups}, {keys}, {stages}, {shared}>>",
            types(kv),
            kv.num_kv_heads,
            kv.head_dim,
            window.unwrap_or(0)
        );
        Kernel {
            header: format!("attention/{name}.cuh").into(),
            symbol,
            threads: count(warpgroups * 128 + if warpgroups == 1 { 32 } else { 128 }),
            shared_bytes: count(shared),
            family: Family::Hopper,
        }
    }
}

/// `attention::prefill_e4m3`, where it can be used: `None` where prefill in fp8 uses the portable kernel. As with
/// [`PrefillTiling::new`], nothing that differs between steps decides.
fn e4m3_kernel(
    kv: KvLayout,
    heads: usize,
    block_size: usize,
    window: Option<usize>,
    rounds: bool,
    family: Family,
) -> Option<Kernel> {
    const WARPGROUPS: usize = 2;
    const KEYS: usize = 128;
    const STAGES: usize = 3;
    if !has_boxes(kv, block_size, family) || !(heads / kv.num_kv_heads).is_multiple_of(WARPGROUPS) {
        return None;
    }
    // Equal to `attention::Fp8Prefill::SHARED`; the kernel asserts that. Queries of 16 bits, twice, and of 8, keys and values.
    let queries = (2 * 2 + 1) * WARPGROUPS * PREFILL_TILE * kv.head_dim;
    // Beside the values of a tile lie eight rows of ones.
    let shared = queries + ((2 * STAGES + 2) * kv.head_dim + STAGES * 8) * KEYS + (4 + 2 * STAGES) * 16 + 1024;
    let symbol = format!(
        "attention::prefill_e4m3<attention::Fp8Prefill<{}, {heads}, {}, {}, {block_size}, {}, {rounds}, {STAGES}, {shared}>>",
        types(kv),
        kv.num_kv_heads,
        kv.head_dim,
        window.unwrap_or(0)
    );
    Some(Kernel {
        header: "attention/prefill_e4m3.cuh".into(),
        symbol,
        threads: count((WARPGROUPS + 1) * 128),
        shared_bytes: count(shared),
        family: Family::Hopper,
    })
}

#[cfg(test)]
mod tests {
    use mixtral_model::DType;

    use super::*;

    #[test]
    fn decode_has_a_ring_where_boxes_allow() {
        let layout = |head_dim| KvLayout {
            num_layers: 1,
            num_kv_heads: 8,
            head_dim,
            dtype: DType::Bf16,
            format: CacheFormat::Plain,
        };
        let of = |head_dim, group: usize, block_size, family| {
            let kv = layout(head_dim);
            let ring = DecodeRing::new(kv, 8 * group, block_size, family)?;
            let shared = ring.shared_bytes(kv, 8 * group) + 1024;
            assert!(
                shared * ring.per_sm as usize <= HOPPER_SHARED,
                "{shared} bytes for groups of {group} heads of {head_dim}"
            );
            Some((ring.per_sm, ring.slots))
        };
        for (group, slots) in [(1, (3, 4)), (4, (3, 4)), (6, (2, 6)), (8, (2, 5)), (16, (2, 4)), (30, (2, 4))] {
            assert_eq!(of(128, group, 64, Family::Hopper), Some(slots), "groups of {group}");
        }
        for (group, slots) in [(1, (3, 8)), (4, (3, 8)), (8, (3, 7)), (16, (3, 6))] {
            assert_eq!(of(64, group, 128, Family::Hopper), Some(slots), "groups of {group}");
        }
        assert_eq!(of(128, 4, 64, Family::Portable), None);
        let fp8 = |head_dim| KvLayout { format: CacheFormat::Fp8, ..layout(head_dim) };
        assert_eq!(DecodeRing::new(fp8(128), 32, 64, Family::Hopper), Some(DecodeRing { per_sm: 3, slots: 8 }));
        assert_eq!(DecodeRing::new(fp8(64), 32, 64, Family::Hopper), None, "a row is half of a swizzled one");
        assert_eq!(of(128, 4, 32, Family::Hopper), None, "a tile may cross blocks");
        assert_eq!(of(96, 4, 64, Family::Hopper), None);
    }

    #[test]
    fn prefill_is_chosen_by_what_boxes_and_groups_allow() {
        let kv =
            |head_dim, dtype| KvLayout { num_layers: 1, num_kv_heads: 8, head_dim, dtype, format: CacheFormat::Plain };
        let of = |head_dim, dtype, group: usize, block_size, family| {
            PrefillTiling::new(kv(head_dim, dtype), 8 * group, block_size, family)
        };
        for (group, warpgroups) in [(1, 1), (2, 2), (3, 3), (4, 2), (5, 1), (6, 2), (8, 2), (9, 3)] {
            for head_dim in [64, 128] {
                let tiling = of(head_dim, DType::Bf16, group, 64, Family::Hopper).expect("a tiling");
                assert_eq!(tiling.warpgroups, warpgroups, "groups of {group}");
                let shared = tiling.shared_bytes(kv(head_dim, DType::Bf16)) * tiling.per_sm() as usize;
                assert!(shared <= 232_448 - 1024, "{shared} bytes for groups of {group} heads of {head_dim}");
            }
        }
        let fp8 = |group: usize| {
            let kv = KvLayout { format: CacheFormat::Fp8, ..kv(128, DType::Bf16) };
            PrefillTiling::new(kv, 8 * group, 64, Family::Hopper)
                .map(|tiling| (tiling.warpgroups, tiling.shared_bytes(kv)))
        };
        assert_eq!((fp8(4), fp8(3), fp8(1)), (Some((2, 230_496)), None, None));
        let in_fp8 = |head_dim, group: usize, family| {
            let kv = KvLayout { format: CacheFormat::Fp8, ..kv(head_dim, DType::Bf16) };
            e4m3_kernel(kv, 8 * group, 64, None, false, family).map(|kernel| kernel.shared_bytes)
        };
        assert_eq!(in_fp8(128, 4, Family::Hopper), Some(217_248));
        assert_eq!(
            [in_fp8(64, 4, Family::Hopper), in_fp8(128, 3, Family::Hopper), in_fp8(128, 4, Family::Portable)],
            [None; 3]
        );
        assert!(of(128, DType::F16, 4, 192, Family::Hopper).is_some());
        assert_eq!(of(128, DType::Bf16, 4, 64, Family::Portable), None);
        assert_eq!(of(128, DType::Bf16, 4, 96, Family::Hopper), None, "a tile may cross blocks");
        assert_eq!(of(128, DType::F32, 4, 64, Family::Hopper), None);
        assert_eq!(of(96, DType::Bf16, 4, 64, Family::Hopper), None);
    }
}
