//! Runs two backends side by side, each operation on the reference's inputs.

use std::collections::{HashMap, HashSet};
use std::ops::{Range, RangeInclusive};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mixtral_engine::{Backend, BackendError, Inspect, Op, StepInputs, StepOutputs};
use mixtral_model::ElemType;

use super::difference::Difference;
use super::findings::{Findings, Place};
use super::operands::{Contents, Operand, label, reads, writes};

/// A backend that computes every operation on a reference backend and on another one, and records how far the other one
/// is off. Its outputs are the reference's.
///
/// Before each operation, the other backend gets a copy of what the operation reads on the reference: buffers, and a
/// layer of the cache. One of the two may compute several operations as one group, and then nothing can be copied into
/// the middle of it. In that case the backend that can runs the group's operations one by one, each on the values that
/// the first one has computed. So every operation is compared on equal inputs.
pub struct Lockstep {
    reference: Box<dyn Inspect>,
    other: Box<dyn Inspect>,
    /// Operations between two boundaries that both backends have.
    groups: Vec<Range<usize>>,
    compared: RangeInclusive<usize>,
    findings: Arc<Mutex<Findings>>,
    step: usize,
}

/// The backend that runs a group's operations one by one.
enum Apart {
    Neither,
    Reference,
    Other,
}

impl Lockstep {
    /// Compares two backends whose programs have the same operations. Differences of the operations in `compared` are
    /// recorded.
    pub fn new(
        reference: Box<dyn Inspect>,
        other: Box<dyn Inspect>,
        compared: RangeInclusive<usize>,
        findings: Arc<Mutex<Findings>>,
    ) -> Self {
        let theirs: HashSet<usize> = other.boundaries().into_iter().collect();
        let common: Vec<usize> = reference.boundaries().into_iter().filter(|b| theirs.contains(b)).collect();
        let groups = common.windows(2).map(|edge| edge[0]..edge[1]).collect();
        Lockstep { reference, other, groups, compared, findings, step: 0 }
    }

    /// Runs a group on both backends and returns the reference's outputs.
    fn group(&mut self, ops: Range<usize>, inputs: &StepInputs<'_>) -> Result<StepOutputs, BackendError> {
        let given = self.given(&ops, inputs)?;
        feed(self.other.as_mut(), &given)?;
        match self.apart(&ops) {
            Apart::Neither => {
                let expected = run(self.reference.as_mut(), "the reference", &ops, inputs)?;
                let found = run(self.other.as_mut(), "the other", &ops, inputs)?;
                self.compare(&ops, &expected, &found, inputs)?;
                Ok(expected)
            }
            Apart::Other => {
                let expected = run(self.reference.as_mut(), "the reference", &ops, inputs)?;
                self.one_by_one(&ops, given, &expected, false, inputs)?;
                Ok(expected)
            }
            Apart::Reference => {
                let found = run(self.other.as_mut(), "the other", &ops, inputs)?;
                self.one_by_one(&ops, given.clone(), &found, true, inputs)?;
                // The reference goes on from its own values.
                feed(self.reference.as_mut(), &given)?;
                run(self.reference.as_mut(), "the reference", &ops, inputs)
            }
        }
    }

    /// The contents that a group reads and does not write before, read from the reference.
    fn given(&self, ops: &Range<usize>, inputs: &StepInputs<'_>) -> Result<HashMap<Operand, Contents>, BackendError> {
        let (mut given, mut made) = (HashMap::new(), HashSet::new());
        for op in &self.reference.program().ops[ops.clone()] {
            for operand in reads(op).into_iter().filter(|operand| !made.contains(operand)) {
                let contents = operand.read(self.reference.as_ref(), inputs)?;
                given.insert(operand, contents);
            }
            // (Of a cache, an operation writes only the step's slots.)
            made.extend(writes(op).into_iter().filter(|operand| !matches!(operand, Operand::Cache(_))));
        }
        Ok(given)
    }

    fn apart(&self, ops: &Range<usize>) -> Apart {
        let steps_through = |backend: &dyn Inspect| {
            let boundaries: HashSet<usize> = backend.boundaries().into_iter().collect();
            ops.clone().all(|op| boundaries.contains(&op))
        };
        match (steps_through(self.reference.as_ref()), steps_through(self.other.as_ref())) {
            (true, false) => Apart::Reference,
            (false, true) => Apart::Other,
            _ => Apart::Neither,
        }
    }

    /// Compares what a group wrote on the two backends.
    fn compare(
        &self,
        ops: &Range<usize>,
        expected: &StepOutputs,
        found: &StepOutputs,
        inputs: &StepInputs<'_>,
    ) -> Result<(), BackendError> {
        let (a, b) = (self.reference.as_ref(), self.other.as_ref());
        for op in ops.clone() {
            for operand in writes(&a.program().ops[op]) {
                if operand.survives(a.program(), op, ops.end) && operand.survives(b.program(), op, ops.end) {
                    self.note(op, &operand, &operand.read(a, inputs)?, &operand.read(b, inputs)?, inputs);
                }
            }
            self.note_draws(op, expected, found);
        }
        Ok(())
    }

    /// Runs a group's operations one by one on the backend that can, and compares the outputs. Each operation reads the
    /// values of the other backend, which has already run the whole group.
    fn one_by_one(
        &mut self,
        ops: &Range<usize>,
        mut values: HashMap<Operand, Contents>,
        together: &StepOutputs,
        on_reference: bool,
        inputs: &StepInputs<'_>,
    ) -> Result<(), BackendError> {
        for op in ops.clone() {
            let (apart, who) =
                if on_reference { (&mut self.reference, "the reference") } else { (&mut self.other, "the other") };
            let operation = apart.program().ops[op].clone();
            for operand in reads(&operation) {
                if let Some(contents) = values.get(&operand) {
                    operand.write(apart.as_mut(), contents)?;
                }
            }
            let outputs = run(apart.as_mut(), who, &(op..op + 1), inputs)?;
            let (apart, whole) =
                if on_reference { (&self.reference, &self.other) } else { (&self.other, &self.reference) };
            for operand in writes(&operation) {
                let mut contents = operand.read(apart.as_ref(), inputs)?;
                if operand.survives(whole.program(), op, ops.end) {
                    let theirs = operand.read(whole.as_ref(), inputs)?;
                    let (expected, found) = if on_reference { (&contents, &theirs) } else { (&theirs, &contents) };
                    self.note(op, &operand, expected, found, inputs);
                    contents = theirs;
                }
                values.insert(operand, contents);
            }
            let (expected, found) = if on_reference { (&outputs, together) } else { (together, &outputs) };
            self.note_draws(op, expected, found);
        }
        Ok(())
    }

    /// Records how far an operand is off.
    fn note(&self, op: usize, operand: &Operand, expected: &Contents, found: &Contents, inputs: &StepInputs<'_>) {
        if !self.compared.contains(&op) {
            return;
        }
        let program = self.reference.program();
        let operation = &program.ops[op];
        let parts = operand.defined(expected, operation, program, inputs);
        for (a, b) in parts.iter().zip(operand.defined(found, operation, program, inputs)) {
            let difference = Difference::new(a.dtype, a.cols, &a.bytes, &b.bytes);
            self.add(op, operation, &a.name, a.dtype, difference);
        }
    }

    /// Records whether both backends drew the same tokens.
    fn note_draws(&self, op: usize, expected: &StepOutputs, found: &StepOutputs) {
        let operation = &self.reference.program().ops[op];
        if !self.compared.contains(&op) || !matches!(operation, Op::Sample { .. }) {
            return;
        }
        let bytes = |outputs: &StepOutputs| outputs.tokens.iter().flat_map(|t| t.0.to_le_bytes()).collect::<Vec<u8>>();
        let difference = Difference::new(ElemType::I32, 1, &bytes(expected), &bytes(found));
        self.add(op, operation, "tokens", ElemType::I32, difference);
    }

    fn add(&self, op: usize, operation: &Op, buffer: &str, dtype: ElemType, difference: Difference) {
        let place = Place { rank: None, op, kind: operation.name(), buffer: buffer.to_owned(), dtype };
        self.findings.lock().unwrap_or_else(PoisonError::into_inner).add(self.step, place, difference);
    }
}

fn feed(backend: &mut dyn Inspect, values: &HashMap<Operand, Contents>) -> Result<(), BackendError> {
    values.iter().try_for_each(|(operand, contents)| operand.write(backend, contents))
}

fn run(
    backend: &mut dyn Inspect,
    who: &str,
    ops: &Range<usize>,
    inputs: &StepInputs<'_>,
) -> Result<StepOutputs, BackendError> {
    let failed = |error: BackendError, backend: &dyn Inspect| {
        let first = label(&backend.program().ops[ops.start]);
        BackendError::Other(format!("{who} fails at operation {} ({first}): {error}", ops.start))
    };
    backend.run_ops(ops.clone(), inputs).map_err(|error| failed(error, backend))
}

impl Backend for Lockstep {
    fn step(&mut self, inputs: &StepInputs<'_>) -> Result<StepOutputs, BackendError> {
        // Checked first, since the inputs say which rows of the operands are read.
        inputs.check(self.reference.program(), self.kv_blocks(), 0)?;
        let mut outputs = StepOutputs::default();
        for ops in self.groups.clone() {
            // Operations before the compared ones run on both backends, since kernels leave tables for later kernels.
            let of_group = if ops.start <= *self.compared.end() {
                self.group(ops.clone(), inputs)?
            } else {
                run(self.reference.as_mut(), "the reference", &ops, inputs)?
            };
            if self.reference.program().ops[ops].iter().any(|op| matches!(op, Op::Sample { .. })) {
                outputs = of_group;
            }
        }
        self.step += 1;
        Ok(outputs)
    }

    fn kv_blocks(&self) -> usize {
        self.reference.kv_blocks().min(self.other.kv_blocks())
    }

    fn expert_counts(&self) -> Vec<Vec<u64>> {
        self.reference.expert_counts()
    }

    fn op_times(&self) -> Vec<Duration> {
        Vec::new()
    }
}
