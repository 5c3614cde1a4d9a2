//! Runs all ranks of an engine beside an engine of one rank, each operation on the reference's inputs.

use std::collections::{HashMap, VecDeque};
use std::ops::{Range, RangeInclusive};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mixtral_engine::{Backend, BackendError, Collectives, Inspect, Op, StepInputs, StepOutputs};
use mixtral_model::ElemType;

use super::difference::Difference;
use super::findings::{Findings, Place};
use super::operands::{Operand, Part, writes};
use super::share::{Expected, Lists, Share, columns};

/// A rank of the other engine.
pub struct Member {
    /// Its backend, whose collectives are the rank's [`Exchange::seat`].
    pub backend: Box<dyn Inspect>,
    /// What it has of the model.
    pub share: Share,
}

/// A backend that computes every step on a reference of one rank and then on all ranks of another engine, and records how
/// far these are off. Its outputs are the reference's.
///
/// The ranks run in one thread, one operation after the other, so that nothing waits: before a collective, its inputs are
/// read from all ranks ([`Exchange`]). Before each operation, a rank gets the reference's contents of what it reads, or its
/// slice of them; only rotated queries, the cache, experts' outputs and parts of sums are its own. Where a rank computes a
/// part of a sum over ranks, the reference computes the same part: it runs its operation again, on the rank's columns alone.
pub struct Ranks {
    reference: Box<dyn Inspect>,
    /// By stage, and in a stage by tensor-parallel rank.
    stages: Vec<Vec<Member>>,
    exchange: Arc<Exchange>,
    /// Operations of the reference.
    compared: RangeInclusive<usize>,
    findings: Arc<Mutex<Findings>>,
    step: usize,
}

/// What the reference wrote, and in which operation.
struct Written {
    op: usize,
    part: Part,
}

/// The contents of the reference's buffers in a step, each as often as it was written.
type Known = HashMap<String, Vec<Written>>;

impl Ranks {
    /// Compares the ranks of an engine, `tp_size` of them in every stage, with a reference of the same model.
    pub fn new(
        reference: Box<dyn Inspect>,
        ranks: Vec<Member>,
        tp_size: usize,
        exchange: Arc<Exchange>,
        compared: RangeInclusive<usize>,
        findings: Arc<Mutex<Findings>>,
    ) -> Self {
        let mut stages: Vec<Vec<Member>> = Vec::new();
        for (rank, member) in ranks.into_iter().enumerate() {
            if rank % tp_size == 0 {
                stages.push(Vec::new());
            }
            stages.last_mut().expect("rank 0 begins a stage").push(member);
        }
        Ranks { reference, stages, exchange, compared, findings, step: 0 }
    }

    /// Runs the reference's step, and returns what each of its operations wrote.
    fn reference_step(&mut self, inputs: &StepInputs<'_>) -> Result<(Known, StepOutputs), BackendError> {
        let (mut known, mut outputs) = (Known::new(), StepOutputs::default());
        for op in 0..self.reference.program().ops.len() {
            let of_op = self.reference.run_ops(op..op + 1, inputs).map_err(|e| failed("the reference", op, &e))?;
            let program = self.reference.program();
            let operation = &program.ops[op];
            if let Op::Sample { .. } = operation {
                outputs = of_op;
            }
            for operand in writes(operation) {
                let contents = operand.read(self.reference.as_ref(), inputs)?;
                for part in operand.defined(&contents, operation, program, inputs) {
                    known.entry(part.name.clone()).or_default().push(Written { op, part });
                }
            }
        }
        Ok((known, outputs))
    }

    /// Runs a step of a stage: an operation on all of its ranks, then the next one.
    fn stage(
        &mut self,
        stage: usize,
        inputs: &StepInputs<'_>,
        known: &Known,
        outputs: &StepOutputs,
    ) -> Result<(), BackendError> {
        // How often each buffer was written.
        let mut times: HashMap<String, usize> = HashMap::new();
        let members = &mut self.stages[stage];
        let ops = members.first().map_or(0, |member| member.backend.program().ops.len());
        for op in 0..ops {
            for member in members.iter_mut() {
                feed(member, op, &times, known)?;
            }
            if let Op::AllReduce { input, .. } | Op::AllGather { input, .. } = &members[0].backend.program().ops[op] {
                let input = Operand::Buffer(input.clone());
                let parts = members.iter().map(|member| input.read(member.backend.as_ref(), inputs));
                *self.exchange.parts() =
                    parts.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().flatten().collect();
            }
            for operand in writes(&members[0].backend.program().ops[op]) {
                for name in operand.names() {
                    *times.entry(name).or_default() += 1;
                }
            }
            for member in members.iter_mut() {
                let rank = member.backend.program().rank;
                let ran = member.backend.run_ops(op..op + 1, inputs);
                let found = ran.map_err(|e| failed(&format!("rank {rank}"), op, &e))?;
                let part = part_of_sum(self.reference.as_mut(), member, op, known, inputs)?;
                let compared =
                    Compared { member, op, step: self.step, wanted: &self.compared, findings: &self.findings };
                compared.outputs(&times, known, part, inputs)?;
                compared.draws(outputs, &found);
            }
        }
        Ok(())
    }
}

fn failed(who: &str, op: usize, error: &BackendError) -> BackendError {
    BackendError::Other(format!("{who} fails at operation {op}: {error}"))
}

/// The lists of the layer that a buffer of the reference belongs to, if the layer has a router.
fn lists(known: &Known, buffer: &str) -> Option<Lists> {
    let (layer, _) = buffer.split_once('.')?;
    let list = |name: &str| -> Option<Vec<usize>> {
        let numbers =
            last(known, &format!("{layer}.{name}"))?.bytes.as_chunks().0.iter().map(|bytes| i32::from_le_bytes(*bytes));
        Some(numbers.map(|number| usize::try_from(number).unwrap_or(0)).collect())
    };
    Some(Lists { offsets: list("expert_offsets")?, order: list("expert_order")? })
}

/// What a rank's buffer should hold after it was written `times` times, and the operation of the reference that wrote it.
fn expected(share: &Share, buffer: &str, cols: usize, times: usize, known: &Known) -> Option<(usize, Expected)> {
    let name = share.counterpart(buffer);
    let written = known.get(&name)?.get(times.checked_sub(1)?)?;
    let expected = share.expected(buffer, cols, &written.part, lists(known, &name).as_ref())?;
    Some((written.op, expected))
}

/// Gives a rank the reference's contents of the buffers that an operation reads, as far as they are known in whole.
fn feed(member: &mut Member, op: usize, times: &HashMap<String, usize>, known: &Known) -> Result<(), BackendError> {
    let program = member.backend.program();
    let buffers: Vec<_> =
        program.ops[op].reads().into_iter().filter_map(|name| program.buffer(name)).cloned().collect();
    for buffer in buffers {
        let times = times.get(&buffer.name).copied().unwrap_or(0);
        let Some((_, Expected { part, rows: None })) = expected(&member.share, &buffer.name, buffer.cols, times, known)
        else {
            continue;
        };
        if part.cols == buffer.cols && part.dtype == buffer.dtype {
            Operand::Buffer(buffer.name).write(member.backend.as_mut(), &vec![part.bytes])?;
        }
    }
    Ok(())
}

/// What a rank's linear should give if it sums over some columns of its input, and other ranks over the others. The
/// reference, which has computed its step, runs its linear again with zeros in the other columns and in the residual.
fn part_of_sum(
    reference: &mut dyn Inspect,
    member: &Member,
    op: usize,
    known: &Known,
    inputs: &StepInputs<'_>,
) -> Result<Option<(usize, Expected)>, BackendError> {
    let (share, operation) = (&member.share, &member.backend.program().ops[op]);
    let (Op::Linear { input, .. } | Op::ExpertDown { input, .. }) = operation else { return Ok(None) };
    let name = share.counterpart(input);
    let is_same = |of: &Op| of.name() == operation.name() && of.reads().first() == Some(&name.as_str());
    let (Some(own), Some(whole)) = (share.summed(input), last(known, &name)) else { return Ok(None) };
    let Some(op) = reference.program().ops.iter().position(is_same).filter(|_| own.len() < whole.cols) else {
        return Ok(None);
    };
    let again = reference.program().ops[op].clone();
    for read in again.reads() {
        let Some(part) = last(known, read) else { return Ok(None) };
        let bytes = match &again {
            _ if read == name => masked(part, &own),
            Op::Linear { .. } => vec![0; part.bytes.len()],
            _ => part.bytes.clone(),
        };
        reference.write_buffer(read, &bytes)?;
    }
    reference.run_ops(op..op + 1, inputs).map_err(|e| failed("the reference", op, &e))?;
    let Some(out) = writes(&again).into_iter().next() else { return Ok(None) };
    let contents = out.read(reference, inputs)?;
    let Some(part) = out.defined(&contents, &again, reference.program(), inputs).into_iter().next() else {
        return Ok(None);
    };
    let expected = match &again {
        Op::ExpertDown { .. } => lists(known, &name).and_then(|lists| share.of_experts(&part, &lists)),
        _ => Some(Expected { part, rows: None }),
    };
    Ok(expected.map(|expected| (op, expected)))
}

/// What the reference wrote last to a buffer.
fn last<'a>(known: &'a Known, buffer: &str) -> Option<&'a Part> {
    known.get(buffer)?.last().map(|written| &written.part)
}

/// The part's bytes, with zeros outside of some columns.
fn masked(part: &Part, own: &Range<usize>) -> Vec<u8> {
    let size = part.dtype.size();
    let mut bytes = vec![0; part.bytes.len()];
    for (row, masked) in bytes.chunks_exact_mut((part.cols * size).max(1)).enumerate() {
        let own = own.start * size..own.end * size;
        masked[own.clone()].copy_from_slice(&part.row(row)[own]);
    }
    bytes
}

/// An operation of a rank that has run, and where its differences go.
struct Compared<'a> {
    member: &'a Member,
    op: usize,
    step: usize,
    wanted: &'a RangeInclusive<usize>,
    findings: &'a Mutex<Findings>,
}

impl Compared<'_> {
    /// Compares what the operation wrote. If it is a part of a sum, that should be `part_of_sum`.
    fn outputs(
        &self,
        times: &HashMap<String, usize>,
        known: &Known,
        mut part_of_sum: Option<(usize, Expected)>,
        inputs: &StepInputs<'_>,
    ) -> Result<(), BackendError> {
        let program = self.member.backend.program();
        let operation = &program.ops[self.op];
        for operand in writes(operation) {
            let contents = operand.read(self.member.backend.as_ref(), inputs)?;
            for part in operand.defined(&contents, operation, program, inputs) {
                let times = times.get(&part.name).copied().unwrap_or(0);
                let expected = expected(&self.member.share, &part.name, part.cols, times, known);
                match expected.or_else(|| part_of_sum.take()) {
                    Some((op, expected)) if self.wanted.contains(&op) => {
                        let found = same_rows(&part, &expected);
                        let Part { dtype, cols, bytes, .. } = &expected.part;
                        self.add(&part.name, *dtype, Difference::new(*dtype, *cols, bytes, &found.bytes));
                    }
                    Some(_) => {}
                    None => self.findings().leave_out(&part.name),
                }
            }
        }
        Ok(())
    }

    /// Compares the tokens that the operation drew.
    fn draws(&self, expected: &StepOutputs, found: &StepOutputs) {
        if let Op::Sample { .. } = self.member.backend.program().ops[self.op] {
            let bytes =
                |outputs: &StepOutputs| outputs.tokens.iter().flat_map(|t| t.0.to_le_bytes()).collect::<Vec<u8>>();
            self.add("tokens", ElemType::I32, Difference::new(ElemType::I32, 1, &bytes(expected), &bytes(found)));
        }
    }

    fn add(&self, buffer: &str, dtype: ElemType, difference: Difference) {
        let program = self.member.backend.program();
        let kind = program.ops[self.op].name();
        let place = Place { rank: Some(program.rank), op: self.op, kind, buffer: buffer.to_owned(), dtype };
        self.findings().add(self.step, place, difference);
    }

    fn findings(&self) -> MutexGuard<'_, Findings> {
        self.findings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The rows and columns of a rank's buffer that are to be compared.
fn same_rows(found: &Part, expected: &Expected) -> Part {
    let rows = match &expected.rows {
        Some(rows) => rows.clone(),
        None => (0..expected.part.num_rows().min(found.num_rows())).collect(),
    };
    let bytes = rows.into_iter().flat_map(|row| found.row(row)).copied().collect();
    let own = 0..expected.part.cols;
    columns(&Part { name: found.name.clone(), bytes, ..*found }, std::slice::from_ref(&own))
}

impl Backend for Ranks {
    fn step(&mut self, inputs: &StepInputs<'_>) -> Result<StepOutputs, BackendError> {
        // Checked first, since the inputs say which rows of the operands are read.
        inputs.check(self.reference.program(), self.kv_blocks(), 0)?;
        let (known, outputs) = self.reference_step(inputs)?;
        for stage in 0..self.stages.len() {
            self.stage(stage, inputs, &known, &outputs)?;
        }
        self.step += 1;
        Ok(outputs)
    }

    fn kv_blocks(&self) -> usize {
        let of_ranks = self.stages.iter().flatten().map(|member| member.backend.kv_blocks());
        of_ranks.fold(self.reference.kv_blocks(), usize::min)
    }

    fn expert_counts(&self) -> Vec<Vec<u64>> {
        self.reference.expert_counts()
    }

    fn op_times(&self) -> Vec<Duration> {
        Vec::new()
    }
}

/// The collectives of ranks that run one after another: what they exchange is there before they ask for it.
#[derive(Default)]
pub struct Exchange {
    /// The inputs of the collective that runs, in the order of ranks.
    parts: Mutex<Vec<u8>>,
    /// What was sent and not yet received.
    sent: Mutex<Sent>,
}

/// Messages by sender and receiver.
type Sent = HashMap<(usize, usize), VecDeque<Vec<u8>>>;

impl Exchange {
    /// The collectives of one rank.
    pub fn seat(self: &Arc<Self>, rank: usize) -> Arc<dyn Collectives> {
        Arc::new(Seat { exchange: Arc::clone(self), rank })
    }

    fn parts(&self) -> MutexGuard<'_, Vec<u8>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sent(&self) -> MutexGuard<'_, Sent> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Seat {
    exchange: Arc<Exchange>,
    rank: usize,
}

impl Seat {
    fn copied(&self, from: &[u8], to: &mut [u8]) -> Result<(), BackendError> {
        if from.len() != to.len() {
            let (found, expected) = (from.len(), to.len());
            return Err(BackendError::Other(format!("rank {} gets {found} bytes, expected {expected}", self.rank)));
        }
        to.copy_from_slice(from);
        Ok(())
    }
}

impl Collectives for Seat {
    fn all_gather(&self, _: &[u8], all: &mut [u8]) -> Result<(), BackendError> {
        self.copied(&self.exchange.parts(), all)
    }

    fn send(&self, to: usize, bytes: &[u8]) -> Result<(), BackendError> {
        self.exchange.sent().entry((self.rank, to)).or_default().push_back(bytes.to_vec());
        Ok(())
    }

    fn recv(&self, from: usize, bytes: &mut [u8]) -> Result<(), BackendError> {
        let sent = self.exchange.sent().get_mut(&(from, self.rank)).and_then(VecDeque::pop_front);
        self.copied(&sent.unwrap_or_default(), bytes)
    }

    fn check(&self) -> Result<(), BackendError> {
        Ok(())
    }
}
