//! What operations read and write apart from weights: buffers, and layers of the cache.

use mixtral_model::ElemType;
use std::fmt;
use std::ops::Range;

use mixtral_engine::{BackendError, Inspect, Op, Program, StepInputs};

/// A buffer or a layer's keys and values.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Operand {
    /// The buffer of that name.
    Buffer(String),
    /// The keys and values of that layer, counted among this rank's layers.
    Cache(usize),
}

/// Contents of an operand: the step's rows of a buffer, or all keys and all values of a layer.
pub type Contents = Vec<Vec<u8>>;

/// A part of an operand's contents that an operation defines, and its name.
pub struct Part {
    /// The buffer's name, or that of a layer's keys or values.
    pub name: String,
    /// Element type.
    pub dtype: ElemType,
    /// Elements of a row.
    pub cols: usize,
    /// The rows, one after the other.
    pub bytes: Vec<u8>,
}

impl Part {
    /// How many rows it has.
    pub fn num_rows(&self) -> usize {
        self.bytes.len() / (self.cols * self.dtype.size()).max(1)
    }

    /// The bytes of a row; none if there is no such row.
    pub fn row(&self, row: usize) -> &[u8] {
        let len = self.cols * self.dtype.size();
        self.bytes.get(row * len..(row + 1) * len).unwrap_or_default()
    }
}

/// What an operation reads.
pub fn reads(op: &Op) -> Vec<Operand> {
    let buffers = op.reads().into_iter().map(|name| Operand::Buffer(name.to_owned()));
    let cache = if let Op::Attention { layer, .. } = op { Some(Operand::Cache(*layer)) } else { None };
    buffers.chain(cache).collect()
}

/// What an operation writes.
pub fn writes(op: &Op) -> Vec<Operand> {
    let buffers = op.writes().into_iter().map(|name| Operand::Buffer(name.to_owned()));
    let cache = match op {
        Op::WriteKv { layer, .. } | Op::RopeWriteKv { layer, .. } => Some(Operand::Cache(*layer)),
        _ => None,
    };
    buffers.chain(cache).collect()
}

/// An operation and its output, for messages.
pub fn label(op: &Op) -> String {
    writes(op).first().map_or_else(|| format!("`{}`", op.name()), |out| format!("`{}` of {out}", op.name()))
}

impl fmt::Display for Operand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Operand::Buffer(name) => write!(f, "`{name}`"),
            Operand::Cache(layer) => write!(f, "the cache of layer {layer}"),
        }
    }
}

impl Operand {
    /// The names of its parts.
    pub fn names(&self) -> Vec<String> {
        match self {
            Operand::Buffer(name) => vec![name.clone()],
            Operand::Cache(layer) => ["keys", "values"].map(|half| format!("layer{layer}.{half}")).to_vec(),
        }
    }

    /// Reads the operand from a backend.
    ///
    /// # Errors
    /// The backend's.
    pub fn read(&self, backend: &dyn Inspect, inputs: &StepInputs<'_>) -> Result<Contents, BackendError> {
        match self {
            Operand::Cache(layer) => Ok(backend.read_cache(*layer)?.to_vec()),
            Operand::Buffer(name) => {
                let program = backend.program();
                let rows =
                    |b: &mixtral_engine::Buffer| program.num_rows(b.rows, inputs.num_tokens(), inputs.num_logits());
                let len = program.buffer(name).map_or(0, |b| rows(b) * b.cols * b.dtype.size());
                Ok(vec![backend.read_buffer(name, len)?])
            }
        }
    }

    /// Writes the operand to a backend.
    ///
    /// # Errors
    /// The backend's.
    pub fn write(&self, backend: &mut dyn Inspect, contents: &Contents) -> Result<(), BackendError> {
        match (self, contents.as_slice()) {
            (Operand::Cache(layer), [keys, values]) => backend.write_cache(*layer, keys, values),
            (Operand::Buffer(name), [bytes]) => backend.write_buffer(name, bytes),
            _ => Err(BackendError::Other(format!("{self} is not of {} parts", contents.len()))),
        }
    }

    /// The operand's bytes in a program's arena, if it is a buffer.
    fn span(&self, program: &Program) -> Option<Range<usize>> {
        let Operand::Buffer(name) = self else { return None };
        let buffer = program.buffer(name)?;
        Some(buffer.offset..buffer.offset + program.max_bytes(buffer))
    }

    /// Whether the operand still holds what operation `op` wrote after all operations before `end` have run. Rotated queries need not: a kernel
    /// that does attention too may have rotated them for itself only.
    pub fn survives(&self, program: &Program, op: usize, end: usize) -> bool {
        let attends =
            |later: &Op| matches!(later, Op::Attention { query, .. } if *self == Operand::Buffer(query.clone()));
        if matches!(program.ops[op], Op::RopeWriteKv { .. }) && program.ops[op + 1..end].iter().any(attends) {
            return false;
        }
        let later = program.ops[op + 1..end].iter().flat_map(writes);
        let overlap = |a: &Range<usize>, b: &Range<usize>| a.start < b.end && b.start < a.end;
        let clobbers = |written: Operand| match (written.span(program), self.span(program)) {
            (Some(a), Some(b)) => overlap(&a, &b),
            _ => written == *self,
        };
        !later.into_iter().any(clobbers)
    }

    /// The parts of its contents that `op` has defined: of a cache, the step's slots; of rotated rows, the queries.
    pub fn defined(&self, contents: &Contents, op: &Op, program: &Program, inputs: &StepInputs<'_>) -> Vec<Part> {
        match self {
            Operand::Buffer(name) => {
                let Some(buffer) = program.buffer(name) else { return Vec::new() };
                let cols = match op {
                    Op::RopeWriteKv { num_heads, .. } => num_heads * program.kv.head_dim,
                    _ => buffer.cols,
                };
                let (row, kept) = (buffer.cols * buffer.dtype.size(), cols * buffer.dtype.size());
                let bytes = contents[0].chunks_exact(row).flat_map(|row| &row[..kept]).copied().collect();
                vec![Part { name: name.clone(), dtype: buffer.dtype, cols, bytes }]
            }
            Operand::Cache(_) => {
                let (kv, block_size) = (program.kv, program.limits.block_size);
                let vector = kv.head_dim * kv.elem().size();
                let slots = || inputs.slot_mapping.iter().filter_map(|&slot| usize::try_from(slot).ok());
                let part = |(bytes, name): (&Vec<u8>, String)| {
                    let heads = |slot: usize| {
                        let start =
                            move |head| (slot / block_size * kv.num_kv_heads + head) * block_size + slot % block_size;
                        (0..kv.num_kv_heads).flat_map(move |head| &bytes[start(head) * vector..][..vector])
                    };
                    Part {
                        name,
                        dtype: kv.elem(),
                        cols: kv.num_kv_heads * kv.head_dim,
                        bytes: slots().flat_map(heads).copied().collect(),
                    }
                };
                contents.iter().zip(self.names()).map(part).collect()
            }
        }
    }
}
