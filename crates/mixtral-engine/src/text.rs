//! A program's written form: one record a line ([`record`]).
//!
//! ```text
//! mixtral-program 1
//! program rank=0 world_size=1 dtype=float32 vocab_size=64 …
//! buffer name=x dtype=f32 rows=tokens cols=16 offset=0
//! weight name=transformer.ln_f.weight dtype=float32 shape=[16] format=plain
//! op norm input=x weight=transformer.ln_f.weight eps=1e-5 out=y
//! ```
//!
//! Blank lines and lines that start with `#` are skipped.

use mixtral_model::{DType, Piece};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::check::ProgramError;
use crate::program::FORMAT_VERSION;
use crate::record::{self, shorten};
use crate::{Buffer, KvLayout, Limits, Op, Program, Weight};

/// A program text that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The first line is not a program's.
    #[error("not a program: the first line is {0:?}, expected \"mixtral-program {FORMAT_VERSION}\"")]
    NotAProgram(String),
    /// Written by another version.
    #[error(
        "program format {found} cannot be read by this version, which reads format {FORMAT_VERSION}; build the engine again with this version of mixtral"
    )]
    Version {
        /// The version in the file.
        found: String,
    },
    /// A line that cannot be read as a record.
    #[error("line {line}: {problem}")]
    Line {
        /// Line number, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A record that is missing.
    #[error("the program has no `{0}` record")]
    Missing(&'static str),
    /// A program that can be read but cannot run.
    #[error(transparent)]
    Invalid(#[from] ProgramError),
}

/// The scalar fields of a [`Program`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    rank: usize,
    world_size: usize,
    tp_size: usize,
    dtype: DType,
    vocab_size: usize,
    num_layers: usize,
    num_experts: usize,
    top_k: usize,
    arena_bytes: usize,
}

impl Program {
    /// The program's text. [`Program::parse`] reads it back.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = format!("mixtral-program {FORMAT_VERSION}\n");
        let header = Header {
            rank: self.rank,
            world_size: self.world_size,
            tp_size: self.tp_size,
            dtype: self.dtype,
            vocab_size: self.vocab_size,
            num_layers: self.num_layers,
            num_experts: self.num_experts,
            top_k: self.top_k,
            arena_bytes: self.arena_bytes,
        };
        record::write(&mut text, "program", &header);
        record::write(&mut text, "limits", &self.limits);
        record::write(&mut text, "kv", &self.kv);
        for scale in &self.kv_scales {
            record::write(&mut text, "kv_scale", scale);
        }
        for buffer in &self.buffers {
            record::write(&mut text, "buffer", buffer);
        }
        for weight in &self.weights {
            record::write(&mut text, "weight", weight);
            for piece in &weight.pieces {
                record::write(&mut text, "piece", piece);
            }
        }
        for op in &self.ops {
            text.push_str(&op_text(op));
            text.push('\n');
        }
        text
    }

    /// Reads a program's text and checks it ([`Program::check`]).
    ///
    /// # Errors
    /// The first line that cannot be read, or the first rule that the program breaks.
    pub fn parse(text: &str) -> Result<Program, TextError> {
        let mut lines = text.lines().enumerate();
        let first = lines.next().map_or("", |(_, line)| line);
        let found = first.strip_prefix("mixtral-program ").ok_or_else(|| TextError::NotAProgram(shorten(first)))?;
        if found.trim().parse() != Ok(FORMAT_VERSION) {
            return Err(TextError::Version { found: shorten(found.trim()) });
        }
        let (mut header, mut limits, mut kv) = (None::<Header>, None::<Limits>, None::<KvLayout>);
        let mut kv_scales = Vec::new();
        let (mut buffers, mut weights, mut ops) = (Vec::<Buffer>::new(), Vec::<Weight>::new(), Vec::<Op>::new());
        for (index, line) in lines {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let at = |problem: String| TextError::Line { line: index + 1, problem };
            let (kind, rest) = line.split_once(' ').unwrap_or((line, ""));
            match kind {
                "program" => header = Some(record::read(rest).map_err(at)?),
                "limits" => limits = Some(record::read(rest).map_err(at)?),
                "kv" => kv = Some(record::read(rest).map_err(at)?),
                "kv_scale" => kv_scales.push(record::read(rest).map_err(at)?),
                "buffer" => buffers.push(record::read(rest).map_err(at)?),
                "weight" => weights.push(record::read(rest).map_err(at)?),
                "piece" => {
                    let piece: Piece = record::read(rest).map_err(at)?;
                    let weight = weights.last_mut().ok_or_else(|| at("a `piece` before any `weight`".to_owned()))?;
                    weight.pieces.push(piece);
                }
                "op" => {
                    let (name, rest) = rest.split_once(' ').unwrap_or((rest, ""));
                    let fields = record::read_fields(rest).map_err(at)?;
                    let tagged = Value::Object(Map::from_iter([(name.to_owned(), Value::Object(fields))]));
                    ops.push(serde_json::from_value(tagged).map_err(|e| at(format!("operation `{name}`: {e}")))?);
                }
                _ => return Err(at(format!("unknown record `{}`", shorten(kind)))),
            }
        }
        let header = header.ok_or(TextError::Missing("program"))?;
        let program = Program {
            rank: header.rank,
            world_size: header.world_size,
            tp_size: header.tp_size,
            dtype: header.dtype,
            vocab_size: header.vocab_size,
            num_layers: header.num_layers,
            num_experts: header.num_experts,
            top_k: header.top_k,
            arena_bytes: header.arena_bytes,
            limits: limits.ok_or(TextError::Missing("limits"))?,
            kv: kv.ok_or(TextError::Missing("kv"))?,
            kv_scales,
            buffers,
            weights,
            ops,
        };
        program.check()?;
        Ok(program)
    }
}

/// One operation as a line of the program's text, without the line feed.
#[must_use]
pub fn op_text(op: &Op) -> String {
    let value = serde_json::to_value(op).unwrap_or_default();
    let mut text = format!("op {}", op.name());
    if let Some(Value::Object(fields)) = value.get(op.name()) {
        record::write_fields(&mut text, fields);
    }
    text
}
