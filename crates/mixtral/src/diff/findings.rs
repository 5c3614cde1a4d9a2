//! All differences of a comparison, by operation and buffer.

use mixtral_model::ElemType;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;

use anyhow::Result;
use serde::Serialize;

use super::difference::{Difference, Element, Tolerance};
use super::share::base;

/// A figure in a table.
fn short(x: f64) -> String {
    if x == 0.0 { "0".to_owned() } else { format!("{x:.2e}") }
}

/// What was compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// The rank, if the other engine has several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// The operation's index.
    pub op: usize,
    /// Its name.
    pub kind: &'static str,
    /// The buffer that it wrote.
    pub buffer: String,
    /// Type of the buffer's elements.
    pub dtype: ElemType,
}

/// The differences of one buffer over all steps.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    #[serde(flatten)]
    place: Place,
    /// How many operations the row stands for: more than one if those of several layers are one row.
    times: usize,
    #[serde(flatten)]
    difference: Difference,
    limit: f64,
    /// Steps in which the error was above its limit.
    exceeded: usize,
}

/// The first difference above its limit.
#[derive(Clone, Debug, Serialize)]
struct First {
    step: usize,
    #[serde(flatten)]
    place: Place,
    #[serde(flatten)]
    difference: Difference,
    limit: f64,
}

/// Differences found so far.
#[derive(Clone, Debug)]
pub struct Findings {
    tolerance: Tolerance,
    /// By rank, operation, and the order in which its buffers were compared.
    rows: BTreeMap<(Option<usize>, usize, usize), Row>,
    first: Option<First>,
    steps: usize,
    /// Buffers that have nothing to be compared with.
    left_out: BTreeSet<String>,
}

impl Findings {
    /// No differences yet.
    pub fn new(tolerance: Tolerance) -> Self {
        Findings { tolerance, rows: BTreeMap::new(), first: None, steps: 0, left_out: BTreeSet::new() }
    }

    /// Records one difference.
    pub fn add(&mut self, step: usize, place: Place, difference: Difference) {
        let limit = self.tolerance.of(place.kind, place.dtype);
        let exceeds = difference.error > limit;
        if exceeds && self.first.is_none() {
            self.first = Some(First { step, place: place.clone(), difference, limit });
        }
        self.steps = self.steps.max(step + 1);
        let (rank, op) = (place.rank, place.op);
        let of_op = self.rows.range((rank, op, 0)..=(rank, op, usize::MAX));
        let (known, next) = of_op.fold((None, 0), |(known, _), (key, row)| {
            (if row.place.buffer == place.buffer { Some(*key) } else { known }, key.2 + 1)
        });
        let key = known.unwrap_or((rank, op, next));
        match self.rows.get_mut(&key) {
            Some(row) => {
                row.difference = row.difference.and(&difference);
                row.exceeded += usize::from(exceeds);
            }
            None => {
                self.rows.insert(key, Row { place, times: 1, difference, limit, exceeded: usize::from(exceeds) });
            }
        }
    }

    /// Notes that a buffer has nothing to be compared with.
    pub fn leave_out(&mut self, buffer: &str) {
        self.left_out.insert(base(buffer).to_owned());
    }

    /// Buffers whose error was above its limit.
    pub fn exceeded(&self) -> usize {
        self.rows.values().filter(|row| row.exceeded > 0).count()
    }

    /// The rows with the same operation of all layers made one row, in the order of the program.
    fn by_kind(&self) -> Vec<Row> {
        let mut rows: Vec<Row> = Vec::new();
        for row in self.rows.values() {
            let place = Place { buffer: base(&row.place.buffer).to_owned(), ..row.place.clone() };
            match rows.iter_mut().find(|r| (r.place.kind, &r.place.buffer) == (place.kind, &place.buffer)) {
                None => rows.push(Row { place, ..row.clone() }),
                Some(sum) => {
                    // The row names the operation with the largest error.
                    if row.difference.error > sum.difference.error {
                        (sum.place.rank, sum.place.op) = (row.place.rank, row.place.op);
                    }
                    sum.difference = sum.difference.and(&row.difference);
                    (sum.times, sum.exceeded) = (sum.times + 1, sum.exceeded + row.exceeded);
                }
            }
        }
        rows
    }

    /// Prints a table with a row for each kind of operation and buffer or, if `verbose`, for each operation.
    pub fn print(&self, verbose: bool, out: &mut dyn Write) -> Result<()> {
        let rows = if verbose { self.rows.values().cloned().collect() } else { self.by_kind() };
        writeln!(
            out,
            "{:>9} {:>9} {:>9} {:>9} {:>6} {:>5} {:>5}        operation",
            "max",
            "mean",
            "rms",
            "error",
            "limit",
            if rows.iter().any(|row| row.place.rank.is_some()) { "r:op" } else { "op" },
            "times"
        )?;
        for Row { place, times, difference: d, limit, exceeded } in rows {
            let verdict = if exceeded > 0 { "FAIL" } else { "ok" };
            writeln!(
                out,
                "{:>9} {:>9} {:>9} {:>9} {:>6} {:>5} {times:>5}  {verdict:<5} {} {} ({})",
                short(d.max),
                short(d.mean),
                short(d.rms),
                short(d.error),
                format!("{limit:.0e}"),
                place.rank.map_or(place.op.to_string(), |rank| format!("{rank}:{}", place.op)),
                place.kind,
                place.buffer,
                place.dtype
            )?;
        }
        if !self.left_out.is_empty() {
            let names: Vec<&str> = self.left_out.iter().map(String::as_str).collect();
            writeln!(out, "not compared, because each rank has only its part of a sum: {}", names.join(", "))?;
        }
        Ok(())
    }

    /// The JSON of `--json`.
    pub fn to_json(&self) -> serde_json::Value {
        let rows: Vec<&Row> = self.rows.values().collect();
        serde_json::json!({
            "steps": self.steps,
            "tolerance": self.tolerance,
            "operations": rows,
            "left_out": self.left_out,
            "exceeded": self.exceeded(),
            "first": self.first,
        })
    }

    /// The error message if any difference is above its limit: it names the first operation whose outputs are too far
    /// off.
    pub fn verdict(&self) -> Option<String> {
        let First { step, place, difference, limit } = self.first.as_ref()?;
        let Place { rank, op, kind, buffer, dtype } = place;
        let of_rank = rank.map_or(String::new(), |rank| format!(" of rank {rank}"));
        let of = if *dtype == ElemType::I32 { "a part that differs of" } else { "an error (NMSE) of" };
        let worst = difference.worst.map_or(String::new(), |Element { row, col, reference, other }| {
            format!("; furthest apart at [{row}, {col}]: {reference} in the reference, {other} in the other")
        });
        let more = match self.exceeded() - 1 {
            0 => String::new(),
            n => format!("; {n} more of the {} buffers compared are above their limits", self.rows.len()),
        };
        Some(format!(
            "operation {op} ({kind}){of_rank} is wrong: `{buffer}` has {of} {:.3e} in step {step}, limit {limit:e}{worst}{more}",
            difference.error
        ))
    }
}
