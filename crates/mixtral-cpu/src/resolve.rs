//! Turns the names in a program's operations into indices, once, when the program is loaded.

use std::collections::HashMap;
use std::ops::Range;

use mixtral_engine::op::FusedNorm;
use mixtral_engine::{BackendError, Epilogue, Op, Program};
use mixtral_model::MoeNormalization;

/// Index of a buffer in the program.
pub(crate) type BufferId = usize;
/// Index of a weight in the program.
pub(crate) type WeightId = usize;

/// The directions by which keys are rounded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Directions {
    pub(crate) weight: WeightId,
    /// Index of the base of the frequencies.
    pub(crate) theta: usize,
}

/// An [`Op`] with indices for names. Its fields mean the same. An operand that may be in place is `None` if it is in
/// place.
#[derive(Clone, Debug)]
pub(crate) enum ResolvedOp {
    Embed {
        table: WeightId,
        vocab_start: usize,
        out: BufferId,
    },
    Norm(Norm),
    Add {
        a: BufferId,
        b: Option<BufferId>,
        out: BufferId,
    },
    Linear {
        input: BufferId,
        weight: WeightId,
        rows: [usize; 2],
        finish: Finish,
        out: BufferId,
    },
    Rope {
        data: BufferId,
        num_heads: usize,
        theta: usize,
    },
    WriteKv {
        key: BufferId,
        value: BufferId,
        layer: usize,
        directions: Option<Directions>,
    },
    RopeWriteKv {
        qkv: BufferId,
        num_heads: usize,
        theta: usize,
        layer: usize,
        directions: Option<Directions>,
    },
    Attention {
        query: BufferId,
        num_heads: usize,
        window: Option<usize>,
        fp8_context: bool,
        layer: usize,
        out: BufferId,
    },
    Softmax {
        logits: BufferId,
        probs: BufferId,
    },
    TopK {
        probs: BufferId,
        normalization: MoeNormalization,
        layer: usize,
        chosen: Chosen,
    },
    ExpertSort {
        expert_ids: BufferId,
        experts: Range<usize>,
        lists: Lists,
    },
    Route {
        logits: BufferId,
        normalization: MoeNormalization,
        layer: usize,
        experts: Range<usize>,
        chosen: Chosen,
        lists: Lists,
    },
    ExpertGateUp {
        input: BufferId,
        weight: WeightId,
        lists: Lists,
        silu_mul: bool,
        out: BufferId,
    },
    SiluMul {
        input: BufferId,
        out: BufferId,
    },
    ExpertDown {
        input: BufferId,
        weight: WeightId,
        lists: Lists,
        out: BufferId,
    },
    Combine {
        input: BufferId,
        chosen: Chosen,
        experts: Range<usize>,
        residual: Residual,
        out: BufferId,
        norm: Option<Norm>,
    },
    AllReduce {
        input: BufferId,
        residual: Residual,
        out: BufferId,
        norm: Option<Norm>,
    },
    AllGather {
        input: BufferId,
        out: BufferId,
    },
    Send {
        input: BufferId,
        to: usize,
    },
    Recv {
        out: BufferId,
        from: usize,
    },
    GatherRows {
        input: BufferId,
        out: BufferId,
    },
    Sample {
        logits: BufferId,
    },
}

/// What a sum is added to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Residual {
    /// Nothing.
    None,
    /// The contents of the output.
    InPlace,
    /// Another buffer.
    Buffer(BufferId),
}

/// Operands of a norm.
#[derive(Clone, Debug)]
pub(crate) struct Norm {
    pub(crate) input: BufferId,
    pub(crate) weight: WeightId,
    pub(crate) eps: f64,
    pub(crate) out: BufferId,
}

/// A linear's epilogue.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Finish {
    Store,
    Residual(Option<BufferId>),
    F32,
}

/// The buffers of the chosen experts and their weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chosen {
    pub(crate) ids: BufferId,
    pub(crate) weights: BufferId,
}

/// The buffers of the expert lists.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lists {
    pub(crate) offsets: BufferId,
    pub(crate) order: BufferId,
}

/// A whole program, resolved.
pub(crate) struct Resolved {
    pub(crate) ops: Vec<ResolvedOp>,
    /// The distinct rotary bases. Operations name them by index.
    pub(crate) thetas: Vec<f64>,
}

/// Resolves a checked program.
///
/// # Errors
/// If operands of one operation overlap without being in place. A program's text can say that.
pub(crate) fn resolve(program: &Program) -> Result<Resolved, BackendError> {
    let mut resolver = Resolver {
        buffers: program.buffers.iter().enumerate().map(|(i, b)| (b.name.as_str(), i)).collect(),
        weights: program.weights.iter().enumerate().map(|(i, w)| (w.name.as_str(), i)).collect(),
        thetas: vec![],
    };
    let mut ops = Vec::with_capacity(program.ops.len());
    for (index, op) in program.ops.iter().enumerate() {
        check_overlap(program, index, op)?;
        ops.push(resolver.op(program, op)?);
    }
    Ok(Resolved { ops, thetas: resolver.thetas })
}

/// Checks that different operands share no memory, and that only operands that may be in place are the same buffer.
fn check_overlap(program: &Program, index: usize, op: &Op) -> Result<(), BackendError> {
    let mut names: Vec<&str> = op.reads().into_iter().chain(op.writes()).collect();
    // An operand in place is listed both as read and as written.
    let in_place = match op {
        Op::Add { b, out, .. } => (b == out).then_some(out),
        Op::Linear { residual, out, .. } => (residual.as_ref() == Some(out)).then_some(out),
        Op::Combine { residual, out, .. } | Op::AllReduce { residual, out, .. } => {
            (residual.as_ref() == Some(out)).then_some(out)
        }
        Op::Rope { data, .. } => Some(data),
        Op::RopeWriteKv { qkv, .. } => Some(qkv),
        _ => None,
    };
    if let Some(first) = in_place.and_then(|name| names.iter().position(|n| n == name)) {
        names.swap_remove(first);
    }
    let mut spans: Vec<(usize, usize, &str)> = names
        .iter()
        .filter_map(|name| program.buffer(name))
        .map(|b| (b.offset, b.offset + program.max_bytes(b), b.name.as_str()))
        .collect();
    spans.sort_unstable();
    match spans.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        None => Ok(()),
        Some(pair) => Err(BackendError::Other(format!(
            "operation {index} ({}): `{}` and `{}` lie in the same memory; build the engine again",
            op.name(),
            pair[0].2,
            pair[1].2
        ))),
    }
}

struct Resolver<'a> {
    buffers: HashMap<&'a str, BufferId>,
    weights: HashMap<&'a str, WeightId>,
    thetas: Vec<f64>,
}

impl Resolver<'_> {
    fn buffer(&self, name: &str) -> Result<BufferId, BackendError> {
        let missing = || BackendError::Other(format!("there is no buffer `{name}`"));
        self.buffers.get(name).copied().ok_or_else(missing)
    }

    fn weight(&self, name: &str) -> Result<WeightId, BackendError> {
        let missing = || BackendError::Other(format!("there is no weight `{name}`"));
        self.weights.get(name).copied().ok_or_else(missing)
    }

    fn directions(&mut self, of: Option<(&str, f64)>) -> Result<Option<Directions>, BackendError> {
        let Some((weight, theta)) = of else { return Ok(None) };
        Ok(Some(Directions { weight: self.weight(weight)?, theta: self.theta(theta) }))
    }

    fn theta(&mut self, theta: f64) -> usize {
        let known = self.thetas.iter().position(|t| t.to_bits() == theta.to_bits());
        known.unwrap_or_else(|| {
            self.thetas.push(theta);
            self.thetas.len() - 1
        })
    }

    /// `None` if the operand is the output itself.
    fn unless_in_place(&self, name: &str, out: &str) -> Result<Option<BufferId>, BackendError> {
        if name == out { Ok(None) } else { self.buffer(name).map(Some) }
    }

    fn residual(&self, residual: Option<&str>, out: &str) -> Result<Residual, BackendError> {
        Ok(match residual {
            None => Residual::None,
            Some(name) if name == out => Residual::InPlace,
            Some(name) => Residual::Buffer(self.buffer(name)?),
        })
    }

    /// The norm of `out` that ends a fused operation.
    fn fused_norm(&self, norm: Option<&FusedNorm>, out: &str) -> Result<Option<Norm>, BackendError> {
        let resolve = |norm: &FusedNorm| {
            let (input, weight) = (self.buffer(out)?, self.weight(&norm.weight)?);
            Ok(Norm { input, weight, eps: norm.eps, out: self.buffer(&norm.out)? })
        };
        norm.map(resolve).transpose()
    }

    fn chosen(&self, ids: &str, weights: &str) -> Result<Chosen, BackendError> {
        Ok(Chosen { ids: self.buffer(ids)?, weights: self.buffer(weights)? })
    }

    fn lists(&self, offsets: &str, order: &str) -> Result<Lists, BackendError> {
        Ok(Lists { offsets: self.buffer(offsets)?, order: self.buffer(order)? })
    }

    fn op(&mut self, program: &Program, op: &Op) -> Result<ResolvedOp, BackendError> {
        Ok(match op {
            Op::Embed { table, vocab_start, out } => {
                ResolvedOp::Embed { table: self.weight(table)?, vocab_start: *vocab_start, out: self.buffer(out)? }
            }
            Op::Norm { input, weight, eps, out } => ResolvedOp::Norm(Norm {
                input: self.buffer(input)?,
                weight: self.weight(weight)?,
                eps: *eps,
                out: self.buffer(out)?,
            }),
            Op::Add { a, b, out } => {
                ResolvedOp::Add { a: self.buffer(a)?, b: self.unless_in_place(b, out)?, out: self.buffer(out)? }
            }
            Op::Linear { input, weight, rows, epilogue, residual, out, ladder: _ } => {
                let weight = self.weight(weight)?;
                ResolvedOp::Linear {
                    input: self.buffer(input)?,
                    weight,
                    rows: rows.unwrap_or([0, program.weights[weight].rows()]),
                    finish: match (epilogue, residual) {
                        (Epilogue::Residual, Some(residual)) => Finish::Residual(self.unless_in_place(residual, out)?),
                        (Epilogue::F32, _) => Finish::F32,
                        _ => Finish::Store,
                    },
                    out: self.buffer(out)?,
                }
            }
            Op::Rope { data, num_heads, theta } => {
                ResolvedOp::Rope { data: self.buffer(data)?, num_heads: *num_heads, theta: self.theta(*theta) }
            }
            Op::WriteKv { key, value, layer, directions } => ResolvedOp::WriteKv {
                key: self.buffer(key)?,
                value: self.buffer(value)?,
                layer: *layer,
                directions: self.directions(directions.as_ref().map(|found| (found.weight.as_str(), found.theta)))?,
            },
            Op::RopeWriteKv { qkv, num_heads, theta, layer, directions } => ResolvedOp::RopeWriteKv {
                qkv: self.buffer(qkv)?,
                num_heads: *num_heads,
                theta: self.theta(*theta),
                layer: *layer,
                directions: self.directions(directions.as_ref().map(|weight| (weight.as_str(), *theta)))?,
            },
            Op::Attention { query, num_heads, window, fp8_context, layer, out } => ResolvedOp::Attention {
                query: self.buffer(query)?,
                num_heads: *num_heads,
                window: *window,
                fp8_context: *fp8_context,
                layer: *layer,
                out: self.buffer(out)?,
            },
            Op::Softmax { logits, probs } => {
                ResolvedOp::Softmax { logits: self.buffer(logits)?, probs: self.buffer(probs)? }
            }
            Op::TopK { probs, normalization, layer, expert_ids, expert_weights } => ResolvedOp::TopK {
                probs: self.buffer(probs)?,
                normalization: *normalization,
                layer: *layer,
                chosen: self.chosen(expert_ids, expert_weights)?,
            },
            Op::ExpertSort { expert_ids, experts, offsets, order } => ResolvedOp::ExpertSort {
                expert_ids: self.buffer(expert_ids)?,
                experts: experts[0]..experts[1],
                lists: self.lists(offsets, order)?,
            },
            Op::Route { logits, normalization, layer, experts, expert_ids, expert_weights, offsets, order } => {
                ResolvedOp::Route {
                    logits: self.buffer(logits)?,
                    normalization: *normalization,
                    layer: *layer,
                    experts: experts[0]..experts[1],
                    chosen: self.chosen(expert_ids, expert_weights)?,
                    lists: self.lists(offsets, order)?,
                }
            }
            Op::ExpertGateUp { input, weight, offsets, order, silu_mul, out, ladder: _ } => ResolvedOp::ExpertGateUp {
                input: self.buffer(input)?,
                weight: self.weight(weight)?,
                lists: self.lists(offsets, order)?,
                silu_mul: *silu_mul,
                out: self.buffer(out)?,
            },
            Op::SiluMul { input, out } => ResolvedOp::SiluMul { input: self.buffer(input)?, out: self.buffer(out)? },
            Op::ExpertDown { input, weight, offsets, order, out, ladder: _ } => ResolvedOp::ExpertDown {
                input: self.buffer(input)?,
                weight: self.weight(weight)?,
                lists: self.lists(offsets, order)?,
                out: self.buffer(out)?,
            },
            Op::Combine { input, expert_ids, expert_weights, experts, residual, out, norm } => ResolvedOp::Combine {
                input: self.buffer(input)?,
                chosen: self.chosen(expert_ids, expert_weights)?,
                experts: experts[0]..experts[1],
                residual: self.residual(residual.as_deref(), out)?,
                out: self.buffer(out)?,
                norm: self.fused_norm(norm.as_ref(), out)?,
            },
            Op::AllReduce { input, residual, out, norm } => ResolvedOp::AllReduce {
                input: self.buffer(input)?,
                residual: self.residual(residual.as_deref(), out)?,
                out: self.buffer(out)?,
                norm: self.fused_norm(norm.as_ref(), out)?,
            },
            Op::AllGather { input, out } => {
                ResolvedOp::AllGather { input: self.buffer(input)?, out: self.buffer(out)? }
            }
            Op::Send { input, to } => ResolvedOp::Send { input: self.buffer(input)?, to: *to },
            Op::Recv { out, from } => ResolvedOp::Recv { out: self.buffer(out)?, from: *from },
            Op::GatherRows { input, out } => {
                ResolvedOp::GatherRows { input: self.buffer(input)?, out: self.buffer(out)? }
            }
            Op::Sample { logits } => ResolvedOp::Sample { logits: self.buffer(logits)? },
        })
    }
}
