//! A schedule's written form: one record a line ([`mixtral_engine::record`]).
//!
//! ```text
//! mixtral-schedule 1
//! schedule family=hopper scratch_bytes=4096
//! step_block bytes=1664 constants={"decode_split":256,…}
//! structure name=Header bytes=64 fields={"num_tokens":["i32",0],…}
//! array name=token_ids offset=128 bytes=64
//! exchange slots=3 part_bytes=65536 stage_slots=2 stage_bytes=0
//! kernel header=norm/rms_norm.cuh symbol="rms::norm<bf16_t, …>" threads=512 shared_bytes=0 family=portable
//! pack weights=[1,5] bytes=4325376 kernel=7 …
//! probe kernel=0 …
//! regime max_tokens=1 decodes=true
//! launch op=1 kernel=3 grid={"tokens":{"per":1,"times":1}} cluster=1 overlaps=true args={"header":{"step":"header"},…}
//! repeat works=7 times=31 ops=8 buffers=12 weights=9 layers=1
//! ```
//!
//! Launches name their kernel by its number among the `kernel` lines. A `repeat` says that the last `works` works
//! repeat `times` times, with indices that grow. So only one of 32 layers that are alike is written.

use std::borrow::Cow;
use std::collections::BTreeMap;

use mixtral_engine::{Program, record};
use mixtral_model::DType;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::fold::{Repeat, fold};
use super::{Fill, Pack, Regime, Schedule};
use crate::step_block::{self, Array, Place, STRUCTURES};
use crate::{Arg, Exchange, Family, Grid, Kernel, Launch, NamedArg, Product, StepBlock, Work};

/// Version of the text. It is raised whenever an older reader would misread the text.
pub const FORMAT_VERSION: u32 = 1;

/// The most memory that the works of all regimes may take, because a short text can repeat works very often. The works
/// of a model of a hundred layers take a tenth of it.
const MAX_BYTES: usize = 1 << 28;

/// A schedule's text that cannot be carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// The first line is not a schedule's.
    #[error("not a schedule: the first line is {0:?}, expected \"mixtral-schedule {FORMAT_VERSION}\"")]
    NotASchedule(String),
    /// Written by another version.
    #[error("its schedule has format {found}, and this version of mixtral reads format {FORMAT_VERSION}")]
    Version {
        /// The version in the text.
        found: String,
    },
    /// A line that cannot be read as a record.
    #[error("line {line} of its schedule: {problem}")]
    Line {
        /// Line number, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A record that is missing.
    #[error("its schedule has no `{0}` record")]
    Missing(&'static str),
    /// The step block of the kernels is not what this version writes.
    #[error("its kernels read {what} as {found}, and this version of mixtral writes {expected}")]
    Differs {
        /// The part of the step block.
        what: String,
        /// The engine's.
        found: String,
        /// This version's.
        expected: String,
    },
    /// Work that refers to something that does not exist.
    #[error("its schedule {place}: {problem}")]
    Outside {
        /// Which part of it.
        place: String,
        /// What is wrong.
        problem: String,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HeadRecord {
    family: Family,
    scratch_bytes: usize,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BlockRecord {
    bytes: usize,
    constants: BTreeMap<String, i64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StructureRecord {
    name: String,
    bytes: usize,
    /// Type and offset of each field.
    fields: Map<String, Value>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ArrayRecord {
    name: String,
    offset: usize,
    bytes: usize,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KernelRecord {
    header: String,
    symbol: String,
    threads: u32,
    shared_bytes: u32,
    family: Family,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LaunchRecord {
    /// Of a fill of elements.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dtype: Option<DType>,
    /// Of any other fill.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fill: Option<Fill>,
    /// Of a pack.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    weights: Vec<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bytes: Option<usize>,
    op: usize,
    kernel: usize,
    grid: Grid,
    cluster: u32,
    overlaps: bool,
    args: Map<String, Value>,
}

/// The constants that host and kernels share.
fn constants() -> BTreeMap<String, i64> {
    let adjustment = [("seen", step_block::Adjustment::SEEN), ("banned", step_block::Adjustment::BANNED)];
    let sizes = [
        ("decode_split", step_block::DECODE_SPLIT),
        ("max_best", step_block::MAX_BEST),
        ("prefill_tile", step_block::PREFILL_TILE),
    ];
    let sizes = sizes.map(|(name, size)| (name.to_owned(), i64::try_from(size).unwrap_or(i64::MAX)));
    sizes.into_iter().chain(adjustment.map(|(name, bit)| (name.to_owned(), i64::from(bit)))).collect()
}

fn structures() -> Vec<StructureRecord> {
    let of = |s: &step_block::Structure| StructureRecord {
        name: s.name.to_owned(),
        bytes: s.bytes,
        fields: s.fields.iter().map(|f| (f.name.to_owned(), serde_json::json!([f.kind, f.offset]))).collect(),
    };
    STRUCTURES.iter().map(of).collect()
}

/// The name of an array in the text.
fn array_name(array: Array) -> String {
    serde_json::to_value(array).ok().and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_default()
}

impl Schedule {
    /// The schedule's text. [`Schedule::parse`] reads it back.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = format!("mixtral-schedule {FORMAT_VERSION}\n");
        let (family, scratch_bytes) = (self.family, self.scratch_bytes);
        record::write(&mut text, "schedule", &HeadRecord { family, scratch_bytes });
        record::write(&mut text, "step_block", &BlockRecord { bytes: self.block.bytes, constants: constants() });
        structures().iter().for_each(|structure| record::write(&mut text, "structure", structure));
        for &Place { array, offset, bytes } in &self.block.places {
            record::write(&mut text, "array", &ArrayRecord { name: array_name(array), offset, bytes });
        }
        if let Some(exchange) = &self.exchange {
            record::write(&mut text, "exchange", exchange);
        }
        let kernels: Vec<&Kernel> = self.kernels().into_iter().collect();
        for kernel in &kernels {
            let Kernel { header, symbol, threads, shared_bytes, family } = (*kernel).clone();
            let header = header.into_owned();
            record::write(&mut text, "kernel", &KernelRecord { header, symbol, threads, shared_bytes, family });
        }
        let launch = |launch: &Launch| LaunchRecord {
            dtype: None,
            fill: None,
            weights: Vec::new(),
            bytes: None,
            op: launch.op,
            kernel: kernels.binary_search(&&launch.kernel).unwrap_or(usize::MAX),
            grid: launch.grid,
            cluster: launch.cluster,
            overlaps: launch.overlaps,
            args: launch
                .args
                .iter()
                .map(|a| (a.name.to_string(), serde_json::to_value(&a.arg).unwrap_or_default()))
                .collect(),
        };
        for (what, fill) in &self.fills {
            let record = match what {
                Fill::Elements(dtype) => LaunchRecord { dtype: Some(*dtype), ..launch(fill) },
                _ => LaunchRecord { fill: Some(*what), ..launch(fill) },
            };
            record::write(&mut text, "fill", &record);
        }
        for pack in &self.packs {
            let (weights, bytes) = (pack.weights.clone(), Some(pack.bytes));
            record::write(&mut text, "pack", &LaunchRecord { weights, bytes, ..launch(&pack.launch) });
        }
        record::write(&mut text, "probe", &launch(&self.probe));
        for (regime, works) in &self.regimes {
            record::write(&mut text, "regime", regime);
            for run in fold(works) {
                for work in run.works {
                    match work {
                        Work::Launch(one) => record::write(&mut text, "launch", &launch(one)),
                        Work::Product(product) => record::write(&mut text, "product", product),
                    }
                }
                if let Some(repeat) = run.repeat {
                    record::write(&mut text, "repeat", &repeat);
                }
            }
        }
        text
    }

    /// Reads the text of a schedule of `program`, and checks that it asks for nothing outside of what the program has
    /// ([`Schedule::check`]) and that its step block is the one that this version writes.
    ///
    /// # Errors
    /// The first line that cannot be read, or the first rule that the schedule breaks.
    pub fn parse(text: &str, program: &Program) -> Result<Schedule, ScheduleError> {
        let mut lines = text.lines().enumerate();
        let first = lines.next().map_or("", |(_, line)| line);
        let found = first.strip_prefix("mixtral-schedule ");
        let found = found.ok_or_else(|| ScheduleError::NotASchedule(record::shorten(first)))?;
        if found.trim().parse() != Ok(FORMAT_VERSION) {
            return Err(ScheduleError::Version { found: record::shorten(found.trim()) });
        }
        let mut read = Reading::default();
        for (index, line) in lines {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (kind, rest) = line.split_once(' ').unwrap_or((line, ""));
            read.line(kind, rest).map_err(|problem| ScheduleError::Line { line: index + 1, problem })?;
        }
        let schedule = read.finish(program)?;
        schedule.check(program)?;
        Ok(schedule)
    }
}

/// What has been read so far.
#[derive(Default)]
struct Reading {
    head: Option<HeadRecord>,
    block: Option<BlockRecord>,
    structures: Vec<StructureRecord>,
    arrays: Vec<ArrayRecord>,
    exchange: Option<Exchange>,
    kernels: Vec<Kernel>,
    fills: Vec<(Fill, Launch)>,
    packs: Vec<Pack>,
    probe: Option<Launch>,
    regimes: Vec<(Regime, Vec<Work>)>,
    /// Bytes of the works of all regimes.
    bytes: usize,
}

impl Reading {
    fn line(&mut self, kind: &str, rest: &str) -> Result<(), String> {
        match kind {
            "schedule" => self.head = Some(record::read(rest)?),
            "step_block" => self.block = Some(record::read(rest)?),
            "structure" => self.structures.push(record::read(rest)?),
            "array" => self.arrays.push(record::read(rest)?),
            "exchange" => self.exchange = Some(record::read(rest)?),
            "kernel" => {
                let KernelRecord { header, symbol, threads, shared_bytes, family } = record::read(rest)?;
                self.kernels.push(Kernel { header: header.into(), symbol, threads, shared_bytes, family });
            }
            "fill" => {
                let record: LaunchRecord = record::read(rest)?;
                let what = record.dtype.map(Fill::Elements).or(record.fill);
                self.fills.push((what.ok_or("a fill without a `dtype` or a `fill`")?, self.launch(record)?));
            }
            "pack" => {
                let mut record: LaunchRecord = record::read(rest)?;
                let (weights, bytes) =
                    (std::mem::take(&mut record.weights), record.bytes.ok_or("a pack without `bytes`")?);
                self.reserve(size_of_val(&weights[..]))?;
                self.packs.push(Pack { weights, bytes, launch: self.launch(record)? });
            }
            "probe" => self.probe = Some(self.launch(record::read(rest)?)?),
            "regime" => self.regimes.push((record::read(rest)?, Vec::new())),
            "launch" => {
                let work = Work::Launch(self.launch(record::read(rest)?)?);
                self.push(work)?;
            }
            "product" => self.push(Work::Product(Box::new(record::read(rest)?)))?,
            "repeat" => {
                let repeat: Repeat = record::read(rest)?;
                let works = self.regimes.last().map_or(&[][..], |(_, works)| works);
                let start = works.len().checked_sub(repeat.works).filter(|_| repeat.works > 0);
                let start =
                    start.ok_or_else(|| format!("{} works are to be repeated, of {}", repeat.works, works.len()))?;
                let block = works[start..].to_vec();
                self.reserve(block.iter().map(bytes).sum::<usize>().saturating_mul(repeat.times))?;
                let again = (1..=repeat.times).flat_map(|time| block.iter().map(move |work| repeat.again(work, time)));
                let again = again.collect::<Option<Vec<Work>>>().ok_or("an index that grows too large")?;
                if let Some((_, works)) = self.regimes.last_mut() {
                    works.extend(again);
                }
            }
            _ => return Err(format!("unknown record `{}`", record::shorten(kind))),
        }
        Ok(())
    }

    fn push(&mut self, work: Work) -> Result<(), String> {
        self.reserve(bytes(&work))?;
        let (_, works) = self.regimes.last_mut().ok_or("work before any `regime`")?;
        works.push(work);
        Ok(())
    }

    /// Counts memory before it is allocated.
    fn reserve(&mut self, bytes: usize) -> Result<(), String> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > MAX_BYTES { Err(format!("works of more than {MAX_BYTES} bytes")) } else { Ok(()) }
    }

    fn launch(&self, record: LaunchRecord) -> Result<Launch, String> {
        let LaunchRecord { op, kernel, grid, cluster, overlaps, args, .. } = record;
        let found = self.kernels.get(kernel);
        let kernel = found.ok_or_else(|| format!("kernel {kernel} of {}", self.kernels.len()))?.clone();
        let named = |(name, value): (String, Value)| {
            let arg =
                serde_json::from_value(value).map_err(|e| format!("parameter `{}`: {e}", record::shorten(&name)))?;
            Ok(NamedArg { name: Cow::Owned(name), arg })
        };
        let args = args.into_iter().map(named).collect::<Result<_, String>>()?;
        Ok(Launch { kernel, grid, cluster, args, op, overlaps })
    }

    fn finish(self, program: &Program) -> Result<Schedule, ScheduleError> {
        let head = self.head.ok_or(ScheduleError::Missing("schedule"))?;
        let block = self.block.ok_or(ScheduleError::Missing("step_block"))?;
        same_structures(&self.structures, &block.constants)?;
        Ok(Schedule {
            family: head.family,
            regimes: self.regimes,
            fills: self.fills,
            packs: self.packs,
            probe: self.probe.ok_or(ScheduleError::Missing("probe"))?,
            scratch_bytes: head.scratch_bytes,
            exchange: self.exchange,
            block: StepBlock { places: places(&self.arrays, program)?, bytes: block.bytes },
        })
    }
}

/// About how many bytes of memory a work takes.
fn bytes(work: &Work) -> usize {
    let args = match work {
        Work::Product(_) => size_of::<Product>(),
        Work::Launch(launch) => {
            let of_map =
                |arg: &Arg| if let Arg::TensorMap(map) = arg { 24 * map.dims.len() + size_of::<Arg>() } else { 0 };
            let of_arg = |named: &NamedArg| size_of::<NamedArg>() + named.name.len() + of_map(&named.arg);
            let kernel = launch.kernel.symbol.len() + launch.kernel.header.len();
            kernel + launch.args.iter().map(of_arg).sum::<usize>()
        }
    };
    size_of::<Work>() + args
}

fn differs(what: impl Into<String>, found: impl ToString, expected: impl ToString) -> ScheduleError {
    let (found, expected) = (record::shorten(&found.to_string()), record::shorten(&expected.to_string()));
    ScheduleError::Differs { what: what.into(), found, expected }
}

/// Checks that the structures and constants are those that this version writes. The error names the first that differs.
fn same_structures(found: &[StructureRecord], constants: &BTreeMap<String, i64>) -> Result<(), ScheduleError> {
    let nothing = || "nothing".to_owned();
    for expected in structures() {
        let of = format!("`{}` of the step block", expected.name);
        let Some(found) = found.iter().find(|s| s.name == expected.name) else {
            return Err(differs(of, nothing(), format!("{} bytes", expected.bytes)));
        };
        for name in expected.fields.keys().chain(found.fields.keys()) {
            let (here, there) = (expected.fields.get(name), found.fields.get(name));
            if here != there {
                let text = |field: Option<&Value>| field.map_or_else(nothing, ToString::to_string);
                return Err(differs(format!("field `{name}` of {of}"), text(there), text(here)));
            }
        }
        if found.bytes != expected.bytes {
            return Err(differs(of, format!("{} bytes", found.bytes), format!("{} bytes", expected.bytes)));
        }
    }
    let known = self::constants();
    for name in known.keys().chain(constants.keys()) {
        let (here, there) = (known.get(name), constants.get(name));
        if here != there {
            let text = |value: Option<&i64>| value.map_or_else(nothing, ToString::to_string);
            return Err(differs(format!("the constant `{name}` of the step block"), text(there), text(here)));
        }
    }
    Ok(())
}

/// The places of the arrays. They have to be the arrays that this version writes, each with room for what any step of
/// the program needs.
fn places(found: &[ArrayRecord], program: &Program) -> Result<Vec<Place>, ScheduleError> {
    let needed = StepBlock::new(program).places;
    let name = |i: usize| found.get(i).map_or("nothing", |array| &array.name);
    for (i, expected) in needed.iter().enumerate() {
        let expected_name = array_name(expected.array);
        if name(i) != expected_name {
            return Err(differs(format!("array {i} of the step block"), name(i), expected_name));
        }
        if found[i].bytes < expected.bytes {
            let bytes = |n: usize| format!("{n} bytes");
            let what = format!("array `{expected_name}` of the step block");
            return Err(differs(what, bytes(found[i].bytes), format!("up to {}", bytes(expected.bytes))));
        }
    }
    if found.len() > needed.len() {
        return Err(differs(format!("array {} of the step block", needed.len()), name(needed.len()), "nothing"));
    }
    Ok(needed.iter().zip(found).map(|(p, f)| Place { array: p.array, offset: f.offset, bytes: f.bytes }).collect())
}
