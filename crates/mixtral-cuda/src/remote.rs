//! Ranks whose memory cannot be mapped: they are on other hosts, or their GPUs cannot access each other. NCCL carries rows to
//! them and from them. What is a launch among ranks that map each other's memory is several steps then: this rank's rows are
//! left in its inbox, NCCL gathers those of all ranks there, and the same kernel takes them from there. So the same kernel
//! adds them, in the same order. Rows between pipeline stages go from one buffer to the other.

use std::sync::Arc;

use mixtral_engine::{Collectives, Op, Program, Rows};
use mixtral_kernels::exchange::row_bytes;
use mixtral_kernels::{Arg, Launch, Schedule};

use crate::CudaError;
use crate::driver::{Communicator, Context, ID_BYTES, UniqueId};

/// This rank's connections to ranks whose memory is not mapped.
#[derive(Clone, Default)]
pub(crate) struct Remote {
    /// To the others of its tensor-parallel group.
    pub(crate) group: Option<Arc<Communicator>>,
    /// To the pipeline stages before and after.
    pub(crate) before: Option<Arc<Communicator>>,
    pub(crate) next: Option<Arc<Communicator>>,
}

/// What NCCL does in place of a launch, or between the halves of one.
pub(crate) struct Transfer {
    pub(crate) by: Arc<Communicator>,
    pub(crate) what: What,
    size: Size,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// Gathers the rows of a group in the inbox at this address.
    Gather(u64),
    /// Sends the rows of the buffer that is this argument.
    Send(usize),
    /// Receives them.
    Recv(usize),
}

/// How many bytes of rows a step has.
#[derive(Clone, Debug)]
struct Size {
    rows: Rows,
    top_k: usize,
    row_bytes: usize,
    /// The sizes of steps that are captured.
    rungs: Vec<usize>,
}

impl Size {
    /// A captured step always has as many rows as its graph has room for. Ranks may disagree on whether they replay a graph,
    /// since only one of them draws; so each takes that many.
    fn bytes(&self, tokens: usize, logits: usize) -> usize {
        let whole = |n: usize| self.rungs.iter().copied().find(|&rung| rung >= n).unwrap_or(n);
        let rows = match self.rows {
            Rows::Tokens => whole(tokens),
            Rows::Assignments => whole(tokens) * self.top_k,
            Rows::Logits => whole(logits),
            Rows::One => 1,
        };
        rows * self.row_bytes
    }
}

impl Transfer {
    /// Bytes of a rank's part in a step.
    pub(crate) fn bytes(&self, tokens: usize, logits: usize) -> usize {
        self.size.bytes(tokens, logits)
    }
}

/// Connects this rank with others, by the id that one of them made. `place` is this rank's place among `size`.
pub(crate) fn connect(
    context: &Context,
    ranks: &dyn Collectives,
    id: [u8; ID_BYTES],
    place: usize,
    size: usize,
) -> Result<Arc<Communicator>, CudaError> {
    let check = || ranks.check().map_err(|gone| CudaError::Rank(gone.to_string()));
    Ok(Arc::new(Communicator::connect(context, UniqueId(id), place, size, check)?))
}

impl Remote {
    /// All connections.
    fn all(&self) -> impl Iterator<Item = &Arc<Communicator>> {
        [&self.group, &self.before, &self.next].into_iter().flatten()
    }

    /// What went wrong on any of them.
    pub(crate) fn failure(&self) -> Option<CudaError> {
        self.all().find_map(|communicator| communicator.failure())
    }

    /// Makes everything end that waits for other ranks.
    pub(crate) fn abort(&self) {
        self.all().for_each(|communicator| communicator.abort());
    }

    /// What NCCL does for a launch, if the ranks that it concerns are not mapped. `inbox` is where the group's inbox begins.
    pub(crate) fn transfer(
        &self,
        program: &Program,
        schedule: &Schedule,
        launch: &Launch,
        inbox: u64,
    ) -> Option<Transfer> {
        let (what, size) = plan(program, schedule, launch, inbox)?;
        let by = match what {
            What::Gather(_) => &self.group,
            What::Send(_) => &self.next,
            What::Recv(_) => &self.before,
        };
        Some(Transfer { by: Arc::clone(by.as_ref()?), what, size })
    }
}

/// What NCCL does for a launch if no memory is mapped; nothing if the launch exchanges no rows.
fn plan(program: &Program, schedule: &Schedule, launch: &Launch, inbox: u64) -> Option<(What, Size)> {
    let has = |name: &str| launch.args.iter().any(|named| named.name == name);
    let buffer_of = |name: &str| {
        let named = launch.args.iter().find(|named| named.name == name)?;
        if let Arg::Buffer(index) = named.arg { Some(index) } else { None }
    };
    let ops = program.ops.get(launch.op..)?;
    let (what, name) = match ops.first()? {
        Op::Send { input, .. } if has("inbox") => (What::Send(buffer_of("input")?), input),
        Op::Recv { out, .. } if has("inbox") => (What::Recv(buffer_of("out")?), out),
        // The launch of an all-reduce may begin with a combine.
        _ if has("inboxes") => (What::Gather(inbox), ops.iter().find_map(summed)?),
        _ => return None,
    };
    let buffer = program.buffer(name)?;
    let row_bytes = match what {
        What::Gather(_) => row_bytes(buffer),
        What::Send(_) | What::Recv(_) => buffer.cols * buffer.dtype.size(),
    };
    let rungs = schedule.regimes.iter().filter(|(regime, _)| regime.decodes).map(|(r, _)| r.max_tokens).collect();
    Some((what, Size { rows: buffer.rows, top_k: program.top_k, row_bytes, rungs }))
}

/// What a rank contributes to a collective of its group.
fn summed(op: &Op) -> Option<&String> {
    match op {
        Op::AllReduce { input, .. } | Op::AllGather { input, .. } => Some(input),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use mixtral_kernels::{Family, Target, Work};
    use mixtral_model::{DType, ElemType};
    use mixtral_testkit::assembly::Assembly;

    use super::*;

    #[test]
    fn a_step_sends_as_many_rows_as_its_graph_would() {
        let size = |rows| Size { rows, top_k: 2, row_bytes: 10, rungs: vec![1, 2, 4, 6] };
        let tokens = |n| size(Rows::Tokens).bytes(n, 0);
        assert_eq!([0, 1, 3, 5, 6, 7, 100].map(tokens), [10, 10, 40, 60, 60, 70, 1000]);
        assert_eq!(size(Rows::Assignments).bytes(3, 0), 80);
        assert_eq!(size(Rows::Logits).bytes(100, 3), 40);
        assert_eq!(size(Rows::One).bytes(100, 3), 10);
    }

    #[test]
    fn what_a_stage_exchanges_is_carried_and_nothing_else() {
        let mut a = Assembly::new(DType::Bf16);
        (a.program.rank, a.program.world_size, a.program.tp_size) = (2, 6, 2);
        (a.program.num_experts, a.program.top_k) = (4, 2);
        // Rows are sent as whole packets of eight elements to a group, and as they are to the next stage.
        for name in ["x", "share", "sum"] {
            a.activation(name, Rows::Tokens, 20);
        }
        a.activation("expert_output", Rows::Assignments, 20);
        a.activation("part", Rows::Logits, 20);
        a.activation("joined", Rows::Logits, 40);
        a.buffer("expert_ids", ElemType::I32, Rows::Tokens, 2);
        a.buffer("expert_weights", ElemType::F32, Rows::Tokens, 2);
        let name = str::to_owned;
        a.op(Op::Recv { out: name("x"), from: 0 });
        a.op(Op::Combine {
            input: name("expert_output"),
            expert_ids: name("expert_ids"),
            expert_weights: name("expert_weights"),
            experts: [2, 4],
            residual: None,
            out: name("share"),
            norm: None,
        });
        a.op(Op::AllReduce { input: name("share"), residual: Some(name("x")), out: name("sum"), norm: None });
        a.op(Op::AllGather { input: name("part"), out: name("joined") });
        a.op(Op::Add { a: name("x"), b: name("sum"), out: name("x") });
        a.op(Op::Send { input: name("x"), to: 4 });
        a.place_apart();
        let program = a.program;
        let schedule = Schedule::new(&program, Target { family: Family::Portable }).unwrap();
        let (_, works) = schedule.regimes.last().unwrap();
        let planned = works.iter().map(|work| {
            let Work::Launch(launch) = work else { panic!("no product") };
            let (what, size) = plan(&program, &schedule, launch, 7)?;
            Some((what, size.bytes(300, 200)))
        });
        let x = program.buffers.iter().position(|buffer| buffer.name == "x").unwrap();
        let expected = [
            // The launch with which a step begins.
            None,
            Some((What::Recv(x), 300 * 40)),
            Some((What::Gather(7), 300 * 48)),
            Some((What::Gather(7), 200 * 48)),
            None,
            Some((What::Send(x), 300 * 40)),
        ];
        assert_eq!(planned.collect::<Vec<_>>(), expected);
    }
}
