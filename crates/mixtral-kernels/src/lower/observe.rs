//! Launches that sum up the rows which come to an operation: what calibration asks of a program. No engine has them. They are
//! added to a schedule before it is loaded.

use mixtral_engine::{Buffer, Op, Program};
use mixtral_model::ElemType;

use super::{LowerError, all_named, count, launch, portable, type_name};
use crate::step_block::Array;
use crate::{Arg, Grid, Regime, Schedule, Work};

/// Neighbouring elements whose products are kept, each with each: `observe::BLOCK` of the kernels. mixtral-calibrate, which makes
/// statistics of them, compares it with the statistics' own.
pub const BLOCK: usize = 128;
/// `observe::THREADS`.
const THREADS: usize = 160;

/// Rows that are looked at before an operation runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observation<'a> {
    /// The operation's index.
    pub op: usize,
    /// The buffer with the rows.
    pub input: &'a str,
    /// The experts' lists, if each expert's rows are summed up alone.
    pub lists: Option<Lists<'a>>,
    /// Whether products of elements are summed up, or only magnitudes are compared.
    pub products: bool,
}

/// Which rows belong to which expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lists<'a> {
    /// The buffer that says where each expert's list begins and ends.
    pub offsets: &'a str,
    /// The buffer with the lists.
    pub order: &'a str,
    /// Whether the rows lie in the order of the lists. Else they are those of the tokens.
    pub in_order: bool,
}

/// Where the sums lie in the workspaces. They are zero when the schedule is loaded, and every step adds to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sums {
    /// Elements of a row.
    pub width: usize,
    /// How many lists are summed up, each alone: one, or one for each expert.
    pub lists: usize,
    /// How many rows were seen: u64 `[lists]`.
    pub counts: usize,
    /// The bits of the largest magnitude: f32 `[lists]`; NaN if an element was NaN.
    pub amax: usize,
    /// For each element its products with those of its block of [`BLOCK`], if they are wanted: f64 `[lists, width, BLOCK]`. Only those
    /// with itself and with elements behind it are summed up.
    pub products: Option<usize>,
}

impl Schedule {
    /// Adds launches to all regimes but those of decodes, so that each step sums up the rows of an observation before the observation's
    /// operation runs.
    ///
    /// # Errors
    /// A buffer that the program does not have, or an operation that is computed together with the one before it.
    pub fn observe(&mut self, program: &Program, observation: &Observation<'_>) -> Result<Sums, LowerError> {
        let Observation { op, input, lists, products } = *observation;
        let name = program.ops.get(op).map_or("", Op::name);
        let find = |wanted: &str| -> Result<(usize, &Buffer), LowerError> {
            let found = program.buffers.iter().enumerate().find(|(_, buffer)| buffer.name == wanted);
            found.ok_or_else(|| LowerError::Missing { op: name, name: wanted.to_owned() })
        };
        let (rows, buffer) = find(input)?;
        let (width, dtype) = (buffer.cols, type_name(buffer.dtype));
        let lists = match lists {
            Some(lists) => Some((find(lists.offsets)?.0, find(lists.order)?.0, lists.in_order)),
            None => None,
        };
        let experts = if lists.is_some() { program.num_experts } else { 1 };
        let mut place = |bytes: usize| {
            let start = self.scratch_bytes.next_multiple_of(256);
            self.scratch_bytes = start + bytes;
            start
        };
        let sums = Sums {
            width,
            lists: experts,
            counts: place(8 * experts),
            amax: place(ElemType::F32.size() * experts),
            products: products.then(|| place(8 * experts * width * BLOCK)),
        };
        let symbol = match lists {
            None => format!("observe::tokens<{dtype}, {width}, {products}>"),
            Some((.., in_order)) => {
                format!("observe::experts<{dtype}, {width}, {}, {in_order}, {products}>", program.top_k)
            }
        };
        let kernel = portable("observe/rows.cuh", symbol, THREADS);
        let header = [("header", Arg::Step(Array::Header)), ("cu_query_lens", Arg::Step(Array::CuQueryLens))];
        let lists = lists.map(|(offsets, order, _)| [("offsets", Arg::Buffer(offsets)), ("order", Arg::Buffer(order))]);
        let rest = [
            ("input", Arg::Buffer(rows)),
            ("count", Arg::Scratch(sums.counts)),
            ("amax", Arg::Scratch(sums.amax)),
            // Without products, the kernel does not touch them.
            ("sums", Arg::Scratch(sums.products.unwrap_or(sums.amax))),
        ];
        let args = all_named(header.into_iter().chain(lists.into_iter().flatten()).chain(rest));
        let grid = Grid::Fixed(count(experts * width.div_ceil(BLOCK)));
        for (_, works) in self.regimes.iter_mut().filter(|(Regime { decodes, .. }, _)| !decodes) {
            let begins = |work: &Work| work.op() == op;
            let at = works.iter().position(begins).ok_or_else(|| LowerError::Unsupported {
                op: name,
                reason: "it is computed together with the operation before it, so nothing can be observed".to_owned(),
            })?;
            let mut launch = launch(kernel.clone(), grid, args.clone());
            launch.op = op;
            works.insert(at, Work::Launch(launch));
        }
        Ok(sums)
    }

    /// Keeps only the largest regime of any steps, which takes every step, and with `decodes` the largest one of decodes too.
    pub fn keep_largest(&mut self, decodes: bool) {
        let most = |of: bool| self.regimes.iter().map(|(regime, _)| *regime).filter(|r| r.decodes == of).max();
        let kept = [most(false), most(true).filter(|_| decodes)];
        self.regimes.retain(|(regime, _)| kept.contains(&Some(*regime)));
    }
}

#[cfg(test)]
mod tests {
    use mixtral_model::DType;
    use mixtral_testkit::decoder::{self, Geometry};

    use super::*;
    use crate::{Family, Target};

    #[test]
    fn rows_are_summed_up_before_their_operation_and_in_places_of_their_own() {
        let program = decoder::program(&Geometry::small(DType::Bf16), false);
        let mut schedule = Schedule::new(&program, Target { family: Family::Hopper }).unwrap();
        let (workspaces, before) = (schedule.scratch_bytes, schedule.clone());
        let (mut seen, mut end) = (Vec::new(), workspaces);
        for (op, operation) in program.ops.iter().enumerate() {
            let (input, lists) = match operation {
                Op::Linear { input, .. } => (input, None),
                Op::ExpertDown { input, offsets, order, .. } => (input, Some(Lists { offsets, order, in_order: true })),
                _ => continue,
            };
            let sums = schedule.observe(&program, &Observation { op, input, lists, products: true }).unwrap();
            let products = sums.products.unwrap();
            assert!(end <= sums.counts && sums.counts + 8 * sums.lists <= sums.amax && sums.amax < products);
            end = products + 8 * sums.lists * sums.width * BLOCK;
            assert_eq!(
                (end, sums.lists),
                (schedule.scratch_bytes, if lists.is_some() { program.num_experts } else { 1 })
            );
            seen.push(op);
        }
        schedule.check(&program).unwrap();
        for ((regime, works), (_, before)) in schedule.regimes.iter().zip(&before.regimes) {
            let is_added = |work: &&Work| work.kernel().is_some_and(|kernel| kernel.header == "observe/rows.cuh");
            let added: Vec<usize> = works.iter().filter(is_added).map(Work::op).collect();
            assert_eq!(added, if regime.decodes { vec![] } else { seen.clone() });
            // Each comes before all other work of its operation.
            let first = |op: &usize| works.iter().find(|work| work.op() == *op);
            assert!(added.iter().all(|op| first(op).as_ref().is_some_and(is_added)));
            assert!(works.iter().filter(|work| !is_added(work)).eq(before));
        }
        schedule.keep_largest(false);
        let max_tokens = program.limits.max_num_tokens;
        assert!(schedule.regimes.iter().map(|(regime, _)| *regime).eq([Regime { max_tokens, decodes: false }]));
        schedule.check(&program).unwrap();
    }

    #[test]
    fn what_does_not_begin_with_an_operation_is_refused() {
        let program = decoder::program(&Geometry::small(DType::F32), true);
        let mut schedule = Schedule::new(&program, Target { family: Family::Portable }).unwrap();
        let is_router = |op: &Op| matches!(op, Op::Route { .. });
        let op = program.ops.iter().position(is_router).unwrap();
        let Op::Linear { input, .. } = &program.ops[op - 1] else { panic!("a router before its choice") };
        let mut observe = |input| {
            let observation = Observation { op: op - 1, input, lists: None, products: false };
            schedule.observe(&program, &observation).unwrap_err().to_string()
        };
        insta::assert_snapshot!(observe(input), @"operation `linear` has no CUDA kernel: it is computed together with the operation before it, so nothing can be observed");
        insta::assert_snapshot!(observe("nothing"), @"operation `linear` names `nothing`, which the program does not have");
    }
}
