//! All differences of a comparison, by operation and buffer.

use mixtral_model::ElemType;
use std::collections::BTreeMap;
use std::io::Write;

use anyhow::Result;
use serde::Serialize;

use super::difference::{Difference, Element, Tolerance};

/// A figure in a table.
fn short(x: f64) -> String {
    if x == 0.0 { "0".to_owned() } else { format!("{x:.2e}") }
}

/// What was compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
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
    /// By operation and the order in which its buffers were compared.
    rows: BTreeMap<(usize, usize), Row>,
    first: Option<First>,
    steps: usize,
}

impl Findings {
    /// No differences yet.
    pub fn new(tolerance: Tolerance) -> Self {
        Findings { tolerance, rows: BTreeMap::new(), first: None, steps: 0 }
    }

    /// Records one difference.
    pub fn add(&mut self, step: usize, place: Place, difference: Difference) {
        let limit = self.tolerance.of(place.dtype);
        let exceeds = difference.error > limit;
        if exceeds && self.first.is_none() {
            self.first = Some(First { step, place: place.clone(), difference, limit });
        }
        self.steps = self.steps.max(step + 1);
        let of_op = self.rows.range((place.op, 0)..=(place.op, usize::MAX));
        let (known, next) = of_op.fold((None, 0), |(known, _), (key, row)| {
            (if row.place.buffer == place.buffer { Some(*key) } else { known }, key.1 + 1)
        });
        let key = known.unwrap_or((place.op, next));
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

    /// Buffers whose error was above its limit.
    pub fn exceeded(&self) -> usize {
        self.rows.values().filter(|row| row.exceeded > 0).count()
    }

    /// The rows with the same operation of all layers made one row, in the order of the program.
    fn by_kind(&self) -> Vec<Row> {
        let mut rows: Vec<Row> = Vec::new();
        for row in self.rows.values() {
            let buffer = row.place.buffer.rsplit('.').next().unwrap_or_default().to_owned();
            let place = Place { buffer, ..row.place.clone() };
            match rows.iter_mut().find(|r| (r.place.kind, &r.place.buffer) == (place.kind, &place.buffer)) {
                None => rows.push(Row { place, ..row.clone() }),
                Some(sum) => {
                    // The row names the operation with the largest error.
                    if row.difference.error > sum.difference.error {
                        sum.place.op = row.place.op;
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
            "max", "mean", "rms", "error", "limit", "op", "times"
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
                place.op,
                place.kind,
                place.buffer,
                place.dtype
            )?;
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
            "exceeded": self.exceeded(),
            "first": self.first,
        })
    }

    /// The error message if any difference is above its limit: it names the first operation whose outputs are too far
    /// off.
    pub fn verdict(&self) -> Option<String> {
        let First { step, place, difference, limit } = self.first.as_ref()?;
        let Place { op, kind, buffer, dtype } = place;
        let of = if *dtype == ElemType::I32 { "a part that differs of" } else { "an error (NMSE) of" };
        let worst = difference.worst.map_or(String::new(), |Element { row, col, reference, other }| {
            format!("; furthest apart at [{row}, {col}]: {reference} in the reference, {other} in the other")
        });
        let more = match self.exceeded() - 1 {
            0 => String::new(),
            n => format!("; {n} more of the {} buffers compared are above their limits", self.rows.len()),
        };
        Some(format!(
            "operation {op} ({kind}) is wrong: `{buffer}` has {of} {:.3e} in step {step}, limit {limit:e}{worst}{more}",
            difference.error
        ))
    }
}
