//! Linears, dense and by expert.

use mixtral_engine::{Epilogue, Op, Rows};
use mixtral_model::ElemType;

use super::{LowerError, Lowering, all_named, count, elementwise, moe, named, of_launches, rounded, type_name};
use crate::plan::{Stream, Strip};
use crate::scratch::PRODUCT_WORKSPACE;
use crate::select::{self, LinearShape};
use crate::step_block::Array;
use crate::weight::{Packing, WeightRows};
use crate::{Arg, Family, Grid, Kernel, Launch, LinearPlan, NamedArg, Product, TensorMap, Work};

pub(super) fn lower(lowering: &Lowering<'_>, op: &Op) -> Result<Vec<Work>, LowerError> {
    let linear = Linear::new(lowering, op)?;
    let rounding = linear.rounding();
    let launches = match linear.plan()? {
        LinearPlan::Simt => linear.simt(),
        LinearPlan::Mma { rows, cols } => linear.mma(rows, cols),
        LinearPlan::Wgmma { rows, cols, depth, stages, warpgroups, cluster, dynamic } => {
            linear.wgmma(&Tiling { rows, cols, depth, stages, warpgroups, cluster, dynamic })
        }
        LinearPlan::Stream(stream) => linear.stream(&stream),
        LinearPlan::Strip(strip) => linear.strip(strip),
        LinearPlan::CublasLt => return Ok(linear.cublaslt()),
    };
    Ok(of_launches(rounding.into_iter().chain(launches?).collect()))
}

/// `epilogue::Kind`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Store = 0,
    Residual = 1,
    F32 = 2,
    SiluMul = 3,
}

/// The numbers of [`LinearPlan::Wgmma`].
struct Tiling {
    rows: u32,
    cols: u32,
    depth: u32,
    stages: u32,
    warpgroups: u32,
    cluster: u32,
    dynamic: bool,
}

impl Tiling {
    /// Bytes of shared memory. Equal to `linear::Config::SHARED`; the kernel asserts that.
    fn shared_bytes(&self, kind: Kind, weight: WeightRows) -> u32 {
        let Tiling { rows, cols, depth, stages, warpgroups, .. } = *self;
        let blocks = rows.div_ceil(64 * warpgroups);
        let token_bytes = select::token_bytes(weight, cols, depth);
        let ring = stages * select::stage_bytes(weight, rows, cols, depth);
        let moved_cols = match cols {
            0..=64 => cols,
            cols if cols.is_multiple_of(64) => 64,
            _ => 48,
        };
        let moved = match kind {
            Kind::F32 => 0,
            Kind::SiluMul => 32 * blocks * moved_cols * 2,
            _ => 64 * moved_cols * 2,
        };
        let overread = if rows < 64 && !weight.is_packed() { (64 - rows) * 128 } else { 0 };
        let skipped = if overread > warpgroups * moved + token_bytes { overread } else { 0 };
        ring + skipped + warpgroups * moved + warpgroups * cols * 4 + 2 * stages * 8 + 64 + 1024
    }
}

/// A linear being lowered: what all its kernels need.
pub(super) struct Linear<'a> {
    lowering: &'a Lowering<'a>,
    op: &'a Op,
    shape: LinearShape,
    kind: Kind,
    /// Columns of the output.
    outputs: usize,
    input: usize,
    /// The token rows that kernels read: the input, or what it is rounded to.
    tokens: Arg,
    /// The scales of these rows, if they have scales of their own.
    token_scales: Option<Arg>,
    out: usize,
    residual: usize,
    weight: usize,
    packing: Packing,
    /// First row of the weight, and where it lies.
    first_row: usize,
    first_byte: usize,
    /// Whether its columns are the step's rows of logits, and not the step's tokens.
    logits: bool,
    /// The buffers of the expert lists: offsets and order.
    lists: Option<(usize, usize)>,
}

impl<'a> Linear<'a> {
    pub(super) fn new(lowering: &'a Lowering<'a>, op: &'a Op) -> Result<Self, LowerError> {
        let missing = |name: &str| LowerError::Missing { op: op.name(), name: name.to_owned() };
        let unsupported = |reason| LowerError::Unsupported { op: op.name(), reason };
        for name in op.weights() {
            let format = lowering.weight(op, name)?.1.format;
            if WeightRows::of(lowering.weight(op, name)?.1).is_none() {
                return Err(unsupported(format!(
                    "weights of format {format}, expected groups of 32, 64, 128 or a whole row; run with --backend cpu"
                )));
            }
        }
        let shape = LinearShape::of(lowering.program, op).ok_or_else(|| missing("its input or weight"))?;
        let buffer = |name: &str| Ok::<usize, LowerError>(lowering.buffer(op, name)?.0);
        let (input, weight, out) = match op {
            Op::Linear { input, weight, out, .. }
            | Op::ExpertGateUp { input, weight, out, .. }
            | Op::ExpertDown { input, weight, out, .. } => (input, weight, out),
            _ => return Err(missing("a linear")),
        };
        let (kind, residual, first_row) = match op {
            Op::Linear { epilogue: Epilogue::Residual, residual, rows, .. } => {
                (Kind::Residual, residual.as_ref().unwrap_or(out), rows.map_or(0, |[start, _]| start))
            }
            Op::Linear { epilogue: Epilogue::F32, rows, .. } => (Kind::F32, out, rows.map_or(0, |[start, _]| start)),
            Op::Linear { rows, .. } => (Kind::Store, out, rows.map_or(0, |[start, _]| start)),
            Op::ExpertGateUp { silu_mul: true, .. } => (Kind::SiluMul, out, 0),
            _ => (Kind::Store, out, 0),
        };
        let lists = match op {
            Op::ExpertGateUp { offsets, order, .. } | Op::ExpertDown { offsets, order, .. } => {
                Some((buffer(offsets)?, buffer(order)?))
            }
            _ => None,
        };
        let weight = lowering.weight(op, weight)?.0;
        let packing = Packing::of(lowering.program, weight).ok_or_else(|| missing("its weight"))?;
        if packing.format.is_packed() && packing.interleaved != shape.silu_mul {
            return Err(unsupported("a quantized weight that is read with silu·mul and without it".to_owned()));
        }
        if packing.format.is_fp8() && packing.experts > 1 && lists.is_none() {
            return Err(unsupported(format!("an fp8 weight of {} matrices, expected one", packing.experts)));
        }
        let tokens = match op {
            _ if !packing.format.is_fp8() => Arg::Buffer(buffer(input)?),
            Op::ExpertDown { .. } => Arg::Scratch(lowering.scratch.rounded_by_expert),
            _ => Arg::Scratch(lowering.scratch.rounded),
        };
        let scales = match op {
            Op::ExpertDown { .. } => lowering.scratch.token_scales_by_expert,
            _ => lowering.scratch.token_scales,
        };
        let token_scales = packing.format.scales_tokens().then_some(Arg::Scratch(scales));
        let divided = || unsupported(format!("rows of a quantized weight from {first_row}, expected a multiple of 16"));
        let first_byte = packing.offset(first_row).ok_or_else(divided)?;
        Ok(Linear {
            lowering,
            op,
            kind,
            outputs: if shape.silu_mul { shape.rows / 2 } else { shape.rows },
            input: buffer(input)?,
            tokens,
            token_scales,
            out: buffer(out)?,
            residual: buffer(residual)?,
            weight,
            packing,
            first_row,
            first_byte,
            logits: lowering.buffer(op, input)?.1.rows == Rows::Logits,
            lists,
            shape,
        })
    }

    /// How it is computed in this regime.
    pub(super) fn plan(&self) -> Result<LinearPlan, LowerError> {
        let ladder = match self.op {
            Op::Linear { ladder, .. } | Op::ExpertGateUp { ladder, .. } | Op::ExpertDown { ladder, .. } => &ladder[..],
            _ => &[],
        };
        let tokens = self.lowering.regime.max_tokens;
        let chosen = ladder.iter().find(|rung| rung.max_tokens >= tokens).map(|rung| rung.plan.parse()).transpose()?;
        let plan = match chosen {
            // A ladder holds plans for the fastest family that the engine was built for. A slower family chooses a plan of
            // its own here.
            Some(LinearPlan::Wgmma { .. } | LinearPlan::Stream(_))
                if self.lowering.target.family == Family::Portable =>
            {
                None
            }
            // A library's product gets the step's size from the host. A captured product could not, so a step of decodes
            // alone chooses another plan.
            Some(LinearPlan::CublasLt)
                if self.lowering.regime.decodes || !select::takes_cublaslt(self.lowering.program, self.op, tokens) =>
            {
                None
            }
            chosen => chosen,
        };
        let columns = LinearShape::columns(self.lowering.program, self.op, tokens);
        Ok(plan.unwrap_or_else(|| select::plan(&self.shape, columns, self.lowering.target.family)))
    }

    /// The launch that rounds the input, if the weight is of fp8 and no kernel before it did.
    fn rounding(&self) -> Option<Launch> {
        let program = self.lowering.program;
        let index = program.ops.iter().position(|op| std::ptr::eq(op, self.op));
        let by_producer = || index.is_some_and(|index| rounded::producer(program, index).is_some());
        if !self.packing.format.is_fp8() || by_producer() || rounded::by_gate_up(self.lowering, self.op) {
            return None;
        }
        let scale = match &self.token_scales {
            Some(scales) => elementwise::RoundedBy::Own(scales.clone()),
            None => elementwise::RoundedBy::One(Arg::Weight { index: self.weight, offset: self.packing.input_scale() }),
        };
        Some(elementwise::round(self.lowering, self.input, scale, self.tokens.clone()))
    }

    fn is_down(&self) -> bool {
        matches!(self.op, Op::ExpertDown { .. })
    }

    /// The type of the token rows that kernels read.
    fn token_type(&self) -> ElemType {
        self.shape.weight.tokens(self.shape.tokens)
    }

    fn experts(&self) -> usize {
        self.lowering.program.weights[self.weight].shape[0]
    }

    fn out_type(&self) -> &'static str {
        type_name(self.lowering.program.buffers[self.out].dtype)
    }

    fn weight_at_first_row(&self) -> Arg {
        Arg::Weight { index: self.weight, offset: self.first_byte }
    }

    /// The parameter for the scales of tokens. A kernel that has no use for it gets the weight.
    fn scales_of_tokens(&self) -> (&'static str, Arg) {
        ("token_scales", self.token_scales.clone().unwrap_or_else(|| self.weight_at_first_row()))
    }

    /// Number of tiles of a dense linear in this regime; `None` for a grouped one, where it depends on the step.
    fn items(&self, out_rows: u32, cols: u32) -> Option<u32> {
        let tokens = LinearShape::columns(self.lowering.program, self.op, self.lowering.regime.max_tokens);
        let tiles = self.outputs.div_ceil(out_rows as usize) * tokens.div_ceil(cols as usize);
        self.lists.is_none().then(|| u32::try_from(tiles).unwrap_or(u32::MAX))
    }

    fn launch(&self, kernel: Kernel, per_sm: u32, items: Option<u32>, args: Vec<NamedArg>) -> Launch {
        Launch { kernel, grid: Grid::Persistent { per_sm, items }, cluster: 1, args, op: 0, overlaps: true }
    }

    /// A kernel that takes pointers to its operands, and its parameters without the scales of tokens.
    fn simple(&self, kernel: &'static str, header: &'static str, config: &str) -> (Kernel, Vec<NamedArg>) {
        let (symbol, args) = match self.lists {
            None => (
                format!("linear::{kernel}_dense<{config}, {}, {}>", self.logits, self.out_type()),
                named([
                    ("weight", self.weight_at_first_row()),
                    ("tokens", self.tokens.clone()),
                    ("header", Arg::Step(Array::Header)),
                    ("out", Arg::Buffer(self.out)),
                    ("residual", Arg::Buffer(self.residual)),
                ]),
            ),
            Some((offsets, order)) => (
                format!(
                    "linear::{kernel}_grouped<{config}, {}, {}, {}>",
                    self.experts(),
                    self.lowering.program.top_k,
                    self.is_down()
                ),
                named([
                    ("weight", self.weight_at_first_row()),
                    ("tokens", self.tokens.clone()),
                    ("header", Arg::Step(Array::Header)),
                    ("offsets", Arg::Buffer(offsets)),
                    ("order", Arg::Buffer(order)),
                    ("out", Arg::Buffer(self.out)),
                ]),
            ),
        };
        (Kernel { header: header.into(), symbol, threads: 128, shared_bytes: 0, family: Family::Portable }, args)
    }

    /// A launch of a kernel that runs on any architecture, with its threads and bytes of shared memory.
    fn portable(
        &self,
        kernel: &'static str,
        header: &'static str,
        config: &str,
        [threads, shared]: [u32; 2],
        tile: [u32; 2],
    ) -> Launch {
        let (kernel, mut args) = self.simple(kernel, header, config);
        args.extend(named([self.scales_of_tokens()]));
        let kernel = Kernel { threads, shared_bytes: shared, ..kernel };
        // As many CTAs as 100 KB of shared memory, the least that an architecture has, hold. Eight suffice to hide the
        // memory's latency.
        let per_sm = ((100 << 10) / (shared + 1024)).clamp(1, 8);
        let out_rows = if self.kind == Kind::SiluMul { tile[0] / 2 } else { tile[0] };
        let items = self.items(out_rows, tile[1]);
        // CTAs that started early would go where there happens to be room: several on one multiprocessor and none on
        // others. They would gain nothing, because they wait for their predecessor before they read weights too.
        Launch { overlaps: false, ..self.launch(kernel, per_sm, items, args) }
    }

    fn simt(&self) -> Result<Vec<Launch>, LowerError> {
        let config = format!(
            "linear::SimtConfig<{}, {}, {}, {}, {}>",
            self.packing.symbol(self.first_row),
            type_name(self.shape.tokens),
            self.outputs,
            self.shape.depth,
            self.kind as u32
        );
        Ok(vec![self.portable("simt", "linear/simt.cuh", &config, [128, 0], [64, 32])])
    }

    fn mma(&self, rows: u32, cols: u32) -> Result<Vec<Launch>, LowerError> {
        let format = self.shape.weight;
        let stage =
            count(format.stage_bytes(rows as usize)) + select::token_bytes(format, cols, count(format.stage_depth()));
        let shared = 3 * stage + 2 * cols * 4;
        let config = format!(
            "linear::MmaConfig<{}, {rows}, {cols}, {}, {}, {}, {shared}>",
            self.packing.symbol(self.first_row),
            self.outputs,
            self.shape.depth,
            self.kind as u32
        );
        Ok(vec![self.portable("mma", "linear/mma.cuh", &config, [128, shared], [rows, cols])])
    }

    fn strip(&self, strip: Strip) -> Result<Vec<Launch>, LowerError> {
        let Strip { warps, cols, stages } = strip;
        let shared = strip.shared_bytes(&self.shape);
        let config = format!(
            "linear::StripConfig<{}, {warps}, {cols}, {stages}, {}, {}, {}, {shared}>",
            self.packing.symbol(self.first_row),
            self.outputs,
            self.shape.depth,
            self.kind as u32
        );
        Ok(vec![self.portable("strip", "linear/strip.cuh", &config, [32 * warps, shared], [16, cols])])
    }

    fn stream(&self, stream: &Stream) -> Result<Vec<Launch>, LowerError> {
        let Stream { cols, rows, warps, split, blocks, stages, token_blocks, token_stages } = *stream;
        let shared = stream.shared_bytes(&self.shape);
        let config = format!(
            "linear::StreamConfig<{}, {cols}, {rows}, {warps}, {split}, {blocks}, {stages}, {token_blocks}, {token_stages}, {}, {}, {}, {shared}>",
            self.packing.symbol(self.first_row),
            self.outputs,
            self.shape.depth,
            self.kind as u32
        );
        let (kernel, args) = self.simple("stream", "linear/stream.cuh", &config);
        let kernel = Kernel { threads: 32 * (warps + 1), shared_bytes: shared, family: Family::Hopper, ..kernel };
        Ok(vec![self.launch(kernel, 1, None, args)])
    }

    fn wgmma(&self, tiling: &Tiling) -> Result<Vec<Launch>, LowerError> {
        let Tiling { rows, cols, depth, stages, warpgroups, cluster, dynamic } = *tiling;
        let shared = tiling.shared_bytes(self.kind, self.shape.weight);
        // Beside the bytes of a plain weight it costs nothing to multiply every expert's weights with every token. A packed
        // weight has fewer bytes.
        let packed = self.packing.format.is_packed();
        let every = !packed && !self.is_down() && cols <= 64 && self.lowering.regime.max_tokens <= cols as usize;
        // An expert's tiles are seldom full, so each is loaded in quarters, as many as it needs, or in thirds where a quarter
        // is not whole eights. Full tiles are loaded in one box, which is the least work for the producer, unless the box
        // is so large that other loads have to wait for it.
        let full = self.lists.is_none() || every;
        let part = match cols {
            0..32 => cols,
            _ if full && cols <= 64 && cluster == 1 => cols,
            _ if cols.is_multiple_of(32) => cols / 4,
            _ => cols / 3,
        };
        let config = format!(
            "linear::Config<{}, {rows}, {cols}, {part}, {depth}, {stages}, {warpgroups}, {cluster}, {dynamic}, {}, {}, {}, {shared}>",
            self.packing.symbol(self.first_row),
            self.outputs,
            self.shape.depth,
            self.kind as u32
        );
        let threads = 128 * warpgroups + if warpgroups == 1 { 32 } else { 128 };
        let kernel = |symbol| Kernel {
            header: "linear/wgmma.cuh".into(),
            symbol,
            threads,
            shared_bytes: shared,
            family: Family::Hopper,
        };
        let weight = ("weight", if packed { self.slab_map(tiling) } else { self.weight_map(rows) });
        let stored = ("stored", self.weight_at_first_row());
        let header = ("header", Arg::Step(Array::Header));
        let out = ("out", Arg::Buffer(self.out));
        let turns = ("counter", Arg::Scratch(self.lowering.scratch.turns));
        let Some((offsets, order)) = self.lists else {
            let symbol = format!("linear::dense<{config}, {}, {}>", self.logits, self.out_type());
            let tokens = self.token_map(self.tokens.clone(), self.lowering.program.buffers[self.input].rows, part);
            let residual = ("residual", Arg::Buffer(self.residual));
            let args =
                named([weight, ("tokens", tokens), stored, header, out, residual, turns, self.scales_of_tokens()]);
            let launch = self.launch(kernel(symbol), 1, self.items(rows * cluster, cols).map(|n| n * cluster), args);
            return Ok(vec![Launch { cluster, ..launch }]);
        };
        let mut launches = Vec::new();
        let (source, tokens) = if self.is_down() {
            (2, self.token_map(self.tokens.clone(), Rows::Assignments, part))
        } else if every {
            (0, self.token_map(self.tokens.clone(), Rows::Tokens, part))
        } else {
            let (dtype, cols) = match self.token_type() {
                // Two bytes are copied as one element.
                ElemType::F8E4M3 => (ElemType::F16, self.shape.depth / 2),
                dtype => (dtype, self.shape.depth),
            };
            let lists = (self.experts(), Arg::Buffer(offsets), Arg::Buffer(order));
            launches.push(moe::permute(self.lowering, (self.tokens.clone(), dtype, cols), lists));
            (1, self.token_map(Arg::Scratch(self.lowering.scratch.permuted), Rows::Assignments, part))
        };
        let (experts, top_k) = (self.experts(), self.lowering.program.top_k);
        let (rounds, rest) = rounded::of_gate_up(self.lowering, self.op, [stored.1.clone(), out.1.clone()]);
        let symbol =
            format!("linear::grouped<{config}, {experts}, {top_k}, {source}{}>", if rounds { ", true" } else { "" });
        let (offsets, order) = (("offsets", Arg::Buffer(offsets)), ("order", Arg::Buffer(order)));
        let own = [weight, ("tokens", tokens), stored, header, offsets, order, out, turns, self.scales_of_tokens()];
        let args = all_named(own.into_iter().chain(rest));
        launches.push(Launch { cluster, ..self.launch(kernel(symbol), 1, None, args) });
        Ok(launches)
    }

    /// The product, then an addition of the residual if there is one. It rounds the rounded product again, as the
    /// epilogue does. With a residual the product goes to a workspace, because the residual often is the output.
    fn cublaslt(&self) -> Vec<Work> {
        let out = &self.lowering.program.buffers[self.out];
        let scratch = self.lowering.scratch;
        let place = match self.kind {
            Kind::Residual => Arg::Scratch(scratch.product),
            _ => Arg::Buffer(self.out),
        };
        let product = Product {
            weight: self.weight_at_first_row(),
            tokens: Arg::Buffer(self.input),
            out: place.clone(),
            rows: self.outputs,
            depth: self.shape.depth,
            dtype: self.shape.weight.dtype().into(),
            out_type: out.dtype,
            workspace: (Arg::Scratch(scratch.workspace), PRODUCT_WORKSPACE),
            op: 0,
        };
        let added = (self.kind == Kind::Residual)
            .then(|| elementwise::add(self.lowering, out, [place, Arg::Buffer(self.residual), Arg::Buffer(self.out)]));
        std::iter::once(Work::Product(Box::new(product))).chain(added.map(Work::Launch)).collect()
    }

    /// The map of the weight, in boxes of 128 bytes of `rows` rows.
    fn weight_map(&self, rows: u32) -> Arg {
        let dtype = self.shape.weight.element();
        let (depth, row) = (self.shape.depth as u64, (self.shape.depth * dtype.size()) as u64);
        let atom = count(128 / dtype.size());
        let (outputs, experts) = (self.outputs as u64, self.experts() as u64);
        let (dims, strides, tile) = match (self.lists, self.kind) {
            (None, _) => (vec![depth, outputs], vec![row], vec![atom, rows]),
            // A box holds eight up rows and eight gate rows in turn.
            (Some(_), Kind::SiluMul) => (
                vec![depth, 8, 2, outputs / 8, experts],
                vec![row, outputs * row, 8 * row, 2 * outputs * row],
                vec![atom, 8, 2, rows / 16, 1],
            ),
            (Some(_), _) => (vec![depth, outputs, experts], vec![row, outputs * row], vec![atom, rows, 1]),
        };
        let base = Box::new(self.weight_at_first_row());
        Arg::TensorMap(TensorMap { base, dtype, dims, strides, tile, swizzle: 128 })
    }

    /// The map of a packed weight: words of a part of a block, parts of a slab, slabs. A box is a stage of a tile.
    fn slab_map(&self, tiling: &Tiling) -> Arg {
        let (format, parts) = (self.packing.format, self.packing.format.parts());
        let (block, dtype) = (format.block_bytes(), ElemType::I32);
        let words = block / parts / dtype.size();
        let slabs = self.packing.experts * self.packing.slabs() - self.first_row / 16;
        Arg::TensorMap(TensorMap {
            base: Box::new(self.weight_at_first_row()),
            dtype,
            dims: [words, self.packing.blocks() * parts, slabs].map(|n| n as u64).to_vec(),
            strides: [block / parts, self.packing.blocks() * block].map(|n| n as u64).to_vec(),
            tile: vec![count(words), tiling.depth / count(format.stage_depth()) * count(parts), tiling.rows / 16],
            swizzle: 0,
        })
    }

    /// The map of the token rows, in boxes of 128 bytes of `tokens` tokens.
    fn token_map(&self, base: Arg, rows: Rows, tokens: u32) -> Arg {
        let limits = self.lowering.program.limits;
        let rows = self.lowering.program.num_rows(rows, limits.max_num_tokens, limits.max_num_logits) as u64;
        let (depth, size) = (self.shape.depth as u64, self.token_type().size());
        Arg::TensorMap(TensorMap {
            base: Box::new(base),
            dtype: self.token_type(),
            dims: vec![depth, rows],
            strides: vec![depth * size as u64],
            tile: vec![count(128 / size), tokens],
            swizzle: 128,
        })
    }
}
