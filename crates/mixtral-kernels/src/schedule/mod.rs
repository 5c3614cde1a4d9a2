//! What a rank does in every kind of step: launches in order, for every regime. `mixtral build` lowers a program to a
//! schedule ([`crate::lower`]) and stores it beside the kernels. A backend carries it out as it was stored. So an
//! engine's kernels are launched with the parameters that they were compiled for, whichever build of `mixtral` loads
//! the engine.
//!
//! Reading order: this file (the value), `fold` (layers that are alike), [`text`] (its written form), [`check`] (what a
//! schedule may ask for).

pub mod check;
mod fold;
#[cfg(test)]
mod tests;
pub mod text;

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use mixtral_engine::{Op, Program};
use mixtral_model::DType;
use serde::{Deserialize, Serialize};

use crate::weight::part_offsets;
use crate::{Arg, Exchange, Family, Kernel, Launch, NamedArg, StepBlock, Work};

/// A kind of step: what launches depend on. A regime of few tokens is captured as a graph and replayed for up to
/// `max_tokens` tokens. The graph's grids are those of `max_tokens`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Regime {
    /// The most tokens of such a step.
    pub max_tokens: usize,
    /// Whether the step consists of decodes only, each with one token, one row of logits and one draw.
    pub decodes: bool,
}

/// The work of every regime in its order, and the memory and kernels that it needs.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// The kernels that it launches.
    pub family: Family,
    /// Regimes of decodes, then the others, each ascending by tokens.
    pub regimes: Vec<(Regime, Vec<Work>)>,
    /// The launches that fill a piece of a dummy weight, by what they write ([`crate::lower::dummy`]).
    pub fills: Vec<(Fill, Launch)>,
    /// The launches that pack quantized weights (`kernels/weight/pack.cuh`).
    pub packs: Vec<Pack>,
    /// The launch that reads all of a memory.
    pub probe: Launch,
    /// Bytes of the workspaces between kernels.
    pub scratch_bytes: usize,
    /// The memory between ranks, if there are other ranks.
    pub exchange: Option<Exchange>,
    /// Where a step's inputs lie.
    pub block: StepBlock,
}

/// What a launch writes into a piece of a dummy weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fill {
    /// Elements of this type.
    Elements(DType),
    /// Integers of 4 or 8 bits.
    Integers(u8),
    /// Scales of this type.
    Scales(DType),
    /// The zeros of integers of 4 or 8 bits.
    Zeros(u8),
    /// Floats of 8 bits.
    Fp8,
}

/// How weights of one kind are packed.
#[derive(Clone, Debug, PartialEq)]
pub struct Pack {
    /// Indices of the weights, ascending.
    pub weights: Vec<usize>,
    /// Bytes of each on the device.
    pub bytes: usize,
    /// The launch that packs a matrix.
    pub launch: Launch,
}

impl Schedule {
    /// All kernels, which have to be compiled.
    #[must_use]
    pub fn kernels(&self) -> BTreeSet<&Kernel> {
        let of_steps = self.regimes.iter().flat_map(|(_, work)| work).filter_map(Work::kernel);
        let of_fills = self.fills.iter().map(|(_, launch)| &launch.kernel);
        let of_packs = self.packs.iter().map(|pack| &pack.launch.kernel);
        of_steps.chain(of_fills).chain(of_packs).chain([&self.probe.kernel]).collect()
    }

    /// What packs weight `index`; `None` if it stays as it is in its file.
    #[must_use]
    pub fn pack(&self, index: usize) -> Option<&Pack> {
        self.packs.iter().find(|pack| pack.weights.contains(&index))
    }

    /// Bytes of weight `index` on the device.
    #[must_use]
    pub fn weight_bytes(&self, program: &Program, index: usize) -> usize {
        let plain = || program.weights.get(index).map_or(0, |weight| part_offsets(weight).1);
        self.pack(index).map_or_else(plain, |pack| pack.bytes)
    }

    /// The operations at which `works` cannot begin, because they read rows that a kernel of an operation before them rounded for
    /// them into a workspace.
    #[must_use]
    pub fn handed_over(works: &[Work]) -> Vec<Range<usize>> {
        let place = |launch: &Launch| {
            launch.args.iter().find(|named| named.name == "rounded").and_then(|named| match named.arg {
                Arg::Scratch(place) => Some(place),
                _ => None,
            })
        };
        let reads = |launch: &Launch, place: usize| {
            let is_it = |arg: &Arg| *arg == Arg::Scratch(place);
            launch.args.iter().any(|named| match &named.arg {
                Arg::TensorMap(map) => is_it(&map.base),
                arg => is_it(arg) && named.name != "out",
            })
        };
        let launches: Vec<&Launch> =
            works.iter().filter_map(|work| if let Work::Launch(launch) = work { Some(launch) } else { None }).collect();
        let mut ranges = Vec::new();
        for (at, launch) in launches.iter().enumerate() {
            let Some(place) = place(launch) else { continue };
            let writes = |later: &&&Launch| {
                let is_out =
                    |named: &NamedArg| matches!(&*named.name, "out" | "rounded") && named.arg == Arg::Scratch(place);
                later.args.iter().any(is_out)
            };
            let until_written = launches[at + 1..].iter().take_while(|later| !writes(later));
            if let Some(last) = until_written.filter(|later| reads(later, place)).last() {
                ranges.push(launch.op + 1..last.op + 1);
            }
        }
        ranges
    }

    /// The smallest regime that takes a step of `tokens` tokens, and its work.
    #[must_use]
    pub fn for_step(&self, tokens: usize, decodes: bool) -> Option<&(Regime, Vec<Work>)> {
        let fits = |r: &Regime| r.max_tokens >= tokens;
        let exact = self.regimes.iter().find(|(r, _)| r.decodes == decodes && fits(r));
        exact.or_else(|| self.regimes.iter().find(|(r, _)| !r.decodes && fits(r)))
    }

    /// The schedule of `short`, the [`Program::first_layers`] of the schedule's own program `whole`. It has the work of
    /// the operations that are left, on the same kernels. `None` if `short` is no such program, or if it exchanges rows
    /// with other ranks: a schedule numbers its collectives.
    #[must_use]
    pub fn first_layers(&self, whole: &Program, short: &Program) -> Option<Schedule> {
        if self.exchange.is_some() {
            return None;
        }
        let gathers = |program: &Program| program.ops.iter().position(|op| matches!(op, Op::GatherRows { .. }));
        let (behind, cut) = (gathers(whole)?, gathers(short)?);
        let removed = behind.checked_sub(cut)?;
        let index_of = |name: &str| short.buffers.iter().position(|b| b.name == name);
        let mut buffers: HashMap<usize, usize> =
            whole.buffers.iter().enumerate().filter_map(|(old, b)| Some((old, index_of(&b.name)?))).collect();
        if let (Op::GatherRows { input: old, .. }, Op::GatherRows { input: new, .. }) =
            (&whole.ops[behind], &short.ops[cut])
        {
            let old = whole.buffers.iter().position(|b| b.name == *old)?;
            buffers.entry(old).or_insert(index_of(new)?);
        }
        let index_of = |name: &str| short.weights.iter().position(|w| w.name == name);
        let weights: HashMap<usize, usize> =
            whole.weights.iter().enumerate().filter_map(|(old, w)| Some((old, index_of(&w.name)?))).collect();
        let mut schedule = self.clone();
        for pack in &mut schedule.packs {
            pack.weights = pack.weights.iter().filter_map(|index| weights.get(index).copied()).collect();
        }
        for (_, work) in &mut schedule.regimes {
            work.retain(|work| work.op() < cut || work.op() >= behind);
            for work in work {
                if work.op() >= behind {
                    work.set_op(work.op() - removed);
                }
                // The last norm may have rounded for a layer that is cut off. Nobody reads what it rounds now.
                if let Work::Launch(launch) = work
                    && let Some(own) = launch.args.iter().find(|named| named.name == "weight").cloned()
                {
                    let is_gone = |arg: &Arg| matches!(arg, Arg::Weight { index, .. } if !weights.contains_key(index));
                    let divisors =
                        launch.args.iter_mut().filter(|named| named.name == "divisor" && is_gone(&named.arg));
                    divisors.for_each(|named| named.arg = own.arg.clone());
                }
                for arg in work.args_mut() {
                    match arg {
                        Arg::Buffer(index) => *index = *buffers.get(index)?,
                        Arg::Weight { index, .. } => *index = *weights.get(index)?,
                        _ => {}
                    }
                }
            }
        }
        Some(schedule)
    }
}

impl Work {
    /// Its arguments, with the bases of tensor maps in place of the maps.
    pub(crate) fn args(&self) -> Vec<&Arg> {
        match self {
            Work::Launch(launch) => launch.args.iter().map(|named| named.arg.base()).collect(),
            Work::Product(p) => [&p.weight, &p.tokens, &p.out, &p.workspace.0].into(),
        }
    }

    /// As [`Work::args`], mutable.
    pub(crate) fn args_mut(&mut self) -> Vec<&mut Arg> {
        match self {
            Work::Launch(launch) => launch.args.iter_mut().map(|named| named.arg.base_mut()).collect(),
            Work::Product(p) => vec![&mut p.weight, &mut p.tokens, &mut p.out, &mut p.workspace.0],
        }
    }
}

impl Arg {
    /// The memory that a tensor map describes; any other argument itself.
    pub(crate) fn base(&self) -> &Arg {
        match self {
            Arg::TensorMap(map) => &map.base,
            other => other,
        }
    }

    fn base_mut(&mut self) -> &mut Arg {
        match self {
            Arg::TensorMap(map) => &mut map.base,
            other => other,
        }
    }
}
