//! Lowers a program's operations to launches, for every regime that a step can be in. There is one file for each kind
//! of operation.

mod attention;
mod collective;
pub mod dummy;
mod elementwise;
mod linear;
mod moe;
pub mod observe;
mod pack;
mod probe;
mod rounded;
mod sample;
#[cfg(test)]
mod tests;

pub(crate) use moe::CHUNK;

use std::borrow::Cow;

use mixtral_engine::{Buffer, Op, Program, Weight};
use mixtral_model::{DType, ElemType};

use crate::plan::{LAST_RUNG, RUNGS};
use crate::{Arg, Exchange, Family, Grid, Kernel, Launch, NamedArg, Regime, Schedule, Scratch, StepBlock, Work};

/// What a program is lowered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// The kernels that may be used.
    pub family: Family,
}

/// A program that has no kernels.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LowerError {
    /// An operation without a CUDA kernel.
    #[error("operation `{op}` has no CUDA kernel: {reason}")]
    Unsupported {
        /// Its name.
        op: &'static str,
        /// Why, and what to do.
        reason: String,
    },
    /// A name that the program does not define.
    #[error("operation `{op}` names `{name}`, which the program does not have")]
    Missing {
        /// The operation.
        op: &'static str,
        /// The name.
        name: String,
    },
    /// A plan that cannot be read.
    #[error(transparent)]
    Plan(#[from] crate::plan::PlanError),
}

impl Schedule {
    /// Lowers a program that passed its check.
    ///
    /// # Errors
    /// An operation that has no kernel.
    pub fn new(program: &Program, target: Target) -> Result<Schedule, LowerError> {
        let scratch = Scratch::new(program);
        let limits = program.limits;
        let batch = limits.max_batch_size.min(limits.max_num_logits).min(limits.max_num_tokens);
        let rungs_to = |most: usize| {
            let below = RUNGS.iter().copied().filter(move |&r| r < most);
            below.chain(if most <= LAST_RUNG { Some(most) } else { None })
        };
        let decodes = rungs_to(batch).map(|max_tokens| Regime { max_tokens, decodes: true });
        // Steps of up to eight tokens use the same kernels, so they share one regime.
        let mixed = rungs_to(limits.max_num_tokens).filter(|&r| r >= 8 || r == limits.max_num_tokens);
        let mixed = mixed.chain((limits.max_num_tokens > LAST_RUNG).then_some(limits.max_num_tokens));
        let mixed = mixed.map(|max_tokens| Regime { max_tokens, decodes: false });
        let regimes = decodes
            .chain(mixed)
            .map(|regime| {
                let lowering = Lowering { program, target, regime, scratch: &scratch };
                Ok((regime, lowering.work()?))
            })
            .collect::<Result<_, LowerError>>()?;
        Ok(Schedule {
            family: target.family,
            regimes,
            fills: dummy::fills(program),
            packs: pack::packs(program),
            probe: probe::read(),
            scratch_bytes: scratch.bytes,
            exchange: Exchange::new(program),
            block: StepBlock::new(program),
        })
    }
}

/// A program being lowered for one regime.
pub(crate) struct Lowering<'a> {
    pub(crate) program: &'a Program,
    pub(crate) target: Target,
    pub(crate) regime: Regime,
    pub(crate) scratch: &'a Scratch,
}

impl Lowering<'_> {
    fn work(&self) -> Result<Vec<Work>, LowerError> {
        let ops = &self.program.ops;
        let (mut all, mut index) = (Vec::new(), 0);
        if Exchange::new(self.program).is_some() {
            all.push(Work::Launch(collective::begin(self)));
        }
        while index < ops.len() {
            let (taken, mut some) = self.lower(&ops[index..])?;
            some.iter_mut().for_each(|work| work.set_op(index));
            all.extend(some);
            index += taken;
        }
        Ok(all)
    }

    /// Lowers the first operation, or the first few where one kernel computes them together. Returns how many
    /// operations these are, and their work.
    fn lower(&self, ops: &[Op]) -> Result<(usize, Vec<Work>), LowerError> {
        if let Some(launches) = moe::norm_router_route(self, ops)? {
            return Ok((3, of_launches(launches)));
        }
        if let Some(launches) = attention::rope_and_decode(self, ops)? {
            return Ok((2, of_launches(launches)));
        }
        if let Some((taken, launches)) = collective::together(self, ops)? {
            return Ok((taken, of_launches(launches)));
        }
        let launches = match &ops[0] {
            op @ (Op::Linear { .. } | Op::ExpertGateUp { .. } | Op::ExpertDown { .. }) => {
                return Ok((1, linear::lower(self, op)?));
            }
            op @ (Op::Attention { .. } | Op::Rope { .. } | Op::WriteKv { .. } | Op::RopeWriteKv { .. }) => {
                attention::lower(self, op)?
            }
            op @ (Op::Softmax { .. }
            | Op::TopK { .. }
            | Op::ExpertSort { .. }
            | Op::Route { .. }
            | Op::Combine { .. }) => moe::lower(self, op)?,
            op @ (Op::Embed { .. } | Op::Norm { .. } | Op::Add { .. } | Op::SiluMul { .. } | Op::GatherRows { .. }) => {
                elementwise::lower(self, op)?
            }
            op @ Op::Sample { .. } => sample::lower(self, op)?,
            Op::AllReduce { .. } | Op::AllGather { .. } | Op::Send { .. } | Op::Recv { .. } => {
                vec![collective::lower(self, ops)?]
            }
        };
        Ok((1, of_launches(launches)))
    }

    /// A buffer's index and description.
    pub(crate) fn buffer(&self, op: &Op, name: &str) -> Result<(usize, &Buffer), LowerError> {
        let found = self.program.buffers.iter().enumerate().find(|(_, b)| b.name == name);
        found.ok_or_else(|| LowerError::Missing { op: op.name(), name: name.to_owned() })
    }

    /// A pointer to a buffer.
    pub(crate) fn at(&self, op: &Op, name: &str) -> Result<Arg, LowerError> {
        Ok(Arg::Buffer(self.buffer(op, name)?.0))
    }

    /// A weight's index and description.
    pub(crate) fn weight(&self, op: &Op, name: &str) -> Result<(usize, &Weight), LowerError> {
        let found = self.program.weights.iter().enumerate().find(|(_, w)| w.name == name);
        found.ok_or_else(|| LowerError::Missing { op: op.name(), name: name.to_owned() })
    }
}

/// Whether what `ops` write lies apart from what any of them reads that none of them writes. Then CTAs of one launch may compute them
/// all, some ahead of others.
fn may_be_one(program: &Program, ops: &[&Op]) -> bool {
    let buffers = |names: Vec<&str>| -> Vec<&Buffer> {
        program.buffers.iter().filter(|buffer| names.contains(&buffer.name.as_str())).collect()
    };
    let written = buffers(ops.iter().flat_map(|op| op.writes()).collect());
    let read = buffers(ops.iter().flat_map(|op| op.reads()).collect());
    let end = |buffer: &Buffer| buffer.offset + program.max_bytes(buffer);
    let apart = |a: &Buffer, b: &Buffer| a.name == b.name || end(a) <= b.offset || end(b) <= a.offset;
    // Programs that are not planned yet have no places.
    program.arena_bytes == 0 || read.iter().all(|read| written.iter().all(|written| apart(read, written)))
}

fn of_launches(launches: Vec<Launch>) -> Vec<Work> {
    launches.into_iter().map(Work::Launch).collect()
}

/// A portable kernel without dynamic shared memory.
pub(crate) fn portable(header: &'static str, symbol: String, threads: usize) -> Kernel {
    Kernel { header: header.into(), symbol, threads: count(threads), shared_bytes: 0, family: Family::Portable }
}

/// A launch that may overlap its predecessor. The caller fills in the operation.
pub(crate) fn launch(kernel: Kernel, grid: Grid, args: Vec<NamedArg>) -> Launch {
    Launch { kernel, grid, cluster: 1, args, op: 0, overlaps: true }
}

/// Parameters in the kernel's order.
pub(crate) fn named<const N: usize>(args: [(&'static str, Arg); N]) -> Vec<NamedArg> {
    all_named(args)
}

/// As [`named`], of parameters that are put together.
pub(crate) fn all_named(args: impl IntoIterator<Item = (&'static str, Arg)>) -> Vec<NamedArg> {
    args.into_iter().map(|(name, arg)| NamedArg { name: Cow::Borrowed(name), arg }).collect()
}

/// A size in the type of kernels and grids. Sizes of a program that passed its check fit.
pub(crate) fn count(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}

/// A size as a parameter of a kernel.
pub(crate) fn int(size: usize) -> Arg {
    Arg::I32(i32::try_from(size).unwrap_or(i32::MAX))
}

/// The name of an element type in `kernels/base/types.cuh`.
pub(crate) fn type_name(dtype: impl Into<ElemType>) -> &'static str {
    match dtype.into() {
        ElemType::F32 => "float",
        ElemType::F16 => "f16_t",
        ElemType::Bf16 => "bf16_t",
        ElemType::I32 => "int",
        ElemType::U8 => "u8",
        ElemType::F8E4M3 => "e4m3_t",
    }
}

/// Whether a model of that type computes on tensor cores.
pub(crate) fn is_16_bit(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::Bf16)
}
