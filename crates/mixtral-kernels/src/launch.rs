//! The work that a step is made of: launches of kernels, and products of matrices that a library computes. A launch is
//! a kernel with its grid and parameters. What is known only when a program is loaded or a step begins is symbolic in
//! it. Each [`NamedArg`] is one parameter of the `__global__` function, in its order and under its name.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::step_block::Array;
use crate::{ExchangeArg, Kernel};
use mixtral_model::ElemType;

/// What is passed for a parameter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Arg {
    /// Pointer to a buffer of the arena: index in the program's buffers.
    Buffer(usize),
    /// Pointer into a weight: index in the program's weights, and bytes from its start.
    Weight {
        /// Index in the program's weights.
        index: usize,
        /// Bytes from its start.
        offset: usize,
    },
    /// Pointer to a layer's keys `[blocks, num_kv_heads, block_size, head_dim]`.
    Keys(usize),
    /// Pointer to a layer's values, laid out as the keys.
    Values(usize),
    /// Pointer to an array of the step block.
    Step(Array),
    /// Pointer into the scratch memory: bytes from its start. The memory is zero when the program is loaded, and is
    /// never cleared afterwards.
    Scratch(usize),
    /// Pointer to a layer's `u64[num_experts]` token counts, or null when they are not counted.
    ExpertCounts(usize),
    /// An address in the memory between ranks.
    Exchange(ExchangeArg),
    /// 32 bits: the number of the step's collectives before this one.
    Ordinal(usize),
    /// A 32-bit integer.
    I32(i32),
    /// A 64-bit integer.
    U64(u64),
    /// A 32-bit float.
    F32(f32),
    /// f32: the scale of a layer's keys, times a number. Only programs with an fp8 cache have scales.
    KeyScale {
        /// The layer.
        layer: usize,
        /// The number.
        times: f32,
    },
    /// f32: the scale of a layer's values.
    ValueScale(usize),
    /// A `const __grid_constant__ TensorMap`, encoded when the program is loaded.
    TensorMap(TensorMap),
    /// A value of the piece of a dummy weight that the launch fills. The schedule has one such launch for each data
    /// type; loading makes one launch of it for each piece.
    Piece(PieceArg),
    /// A value of the matrix that the launch packs. The schedule has one such launch for each kind of quantized weight;
    /// loading makes one launch of it for each matrix.
    Pack(PackArg),
    /// Pointer into the memory in which a matrix waits to be packed: bytes from its start. Only loading knows it.
    Staged(usize),
    /// A value of the memory that the probe reads. Only the caller of the probe knows that memory.
    Probe(ProbeArg),
}

impl Arg {
    /// Bytes of the kernel's parameter.
    #[must_use]
    pub fn size(&self) -> usize {
        match self {
            Arg::I32(_) | Arg::F32(_) | Arg::KeyScale { .. } | Arg::ValueScale(_) | Arg::Ordinal(_) => 4,
            Arg::Piece(PieceArg::Scale | PieceArg::Bias) | Arg::Pack(PackArg::Expert) => 4,
            Arg::TensorMap(_) => 128,
            _ => 8,
        }
    }
}

/// A parameter of the kernels of `dummy/fill.cuh`, taken from the piece that they fill. The piece's elements are a rectangle of a source
/// tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PieceArg {
    /// Pointer to its first element in the weight.
    Out,
    /// 64 bits: the key of the source tensor's random numbers.
    Key,
    /// 64 bits: the index of its first element in the source tensor.
    First,
    /// 64 bits: its rows.
    Rows,
    /// 64 bits: its columns.
    Cols,
    /// 64 bits: columns of the source tensor.
    SourceCols,
    /// f32: the factor of a random number.
    Scale,
    /// f32: what is added to the product.
    Bias,
}

/// A parameter of `weight::pack`, taken from the matrix that it packs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PackArg {
    /// Pointer to its integers.
    Values,
    /// Pointer to its scales.
    Scales,
    /// Pointer to its zeros, if there are any.
    Zeros,
    /// Pointer to the packed weight.
    Out,
    /// 32 bits: the number of the matrix in the weight.
    Expert,
}

/// A parameter of `probe::read`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProbeArg {
    /// Pointer to the memory.
    Data,
    /// 64 bits: how many words of 16 bytes it has.
    Words,
    /// Pointer to a 32-bit integer that the kernel writes.
    Out,
}

/// A parameter: its name in the kernel's signature, and what is passed for it.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedArg {
    /// The name.
    pub name: Cow<'static, str>,
    /// What is passed.
    pub arg: Arg,
}

/// A TMA descriptor: tiled, zero fill outside, 128-byte L2 promotion.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorMap {
    /// The memory that it describes: a buffer, a weight, keys, values or scratch.
    pub base: Box<Arg>,
    /// Element type.
    pub dtype: ElemType,
    /// Elements of each dimension, innermost first.
    pub dims: Vec<u64>,
    /// Bytes between elements of each dimension but the innermost.
    pub strides: Vec<u64>,
    /// Elements of a box in each dimension.
    pub tile: Vec<u32>,
    /// Bytes of the shared-memory swizzle: 128, 64, 32, or 0 for none.
    pub swizzle: u32,
}

/// How many CTAs a launch has, as a function of a token count. It is the step's count when the launch is made by
/// itself, and the regime's `max_tokens` when it is captured. Kernels read the true counts from the step block's
/// header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Grid {
    /// Always this many.
    Fixed(u32),
    /// One for every `per` tokens, times `times`.
    Tokens {
        /// Tokens of a CTA.
        per: u32,
        /// CTAs for each.
        times: u32,
    },
    /// One for every `per` rows of logits, times `times`.
    Logits {
        /// Rows of a CTA.
        per: u32,
        /// CTAs for each.
        times: u32,
    },
    /// Persistent: `per_sm` for each multiprocessor, but at most `items`, where that is known.
    Persistent {
        /// CTAs that fit on a multiprocessor.
        per_sm: u32,
        /// Work items, if they do not depend on the step.
        items: Option<u32>,
    },
}

/// One kernel launch.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// The kernel.
    pub kernel: Kernel,
    /// How many CTAs, in x; y and z are 1.
    pub grid: Grid,
    /// CTAs of a cluster in x; 1 is none. Divides the grid.
    pub cluster: u32,
    /// Its parameters.
    pub args: Vec<NamedArg>,
    /// Index of the first operation that it computes (part of), for timing by operation.
    pub op: usize,
    /// Whether it may start while its predecessor still runs. Such a kernel waits (`griddepcontrol.wait`) on every
    /// path: before it reads what another kernel writes, before it writes, and before it exits.
    pub overlaps: bool,
}

/// A matrix product of a step's n tokens that cuBLASLt computes: `out[t][r] = Σ tokens[t][k] · weight[r][k]` over k,
/// accumulated in f32 and rounded once. Matrices are row-major and dense.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Product {
    /// Pointer to the weight `[rows, depth]`.
    pub weight: Arg,
    /// Pointer to the tokens `[n, depth]`.
    pub tokens: Arg,
    /// Pointer to the output `[n, rows]`. It overlaps neither weight nor tokens.
    pub out: Arg,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub depth: usize,
    /// Type of weight and tokens.
    pub dtype: ElemType,
    /// Type of the output.
    pub out_type: ElemType,
    /// Pointer to memory that the library may use, and the size of that memory in bytes.
    pub workspace: (Arg, usize),
    /// Index of the operation that it computes (part of).
    pub op: usize,
}

/// One piece of a step's work. They run one after another.
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    /// A launch of one of the engine's kernels.
    Launch(Launch),
    /// A library's product. Nothing may overlap it, because nobody knows whether the library's kernels wait before they
    /// end.
    Product(Box<Product>),
}

impl Work {
    /// The kernel that it launches, if it is one of the engine's.
    #[must_use]
    pub fn kernel(&self) -> Option<&Kernel> {
        match self {
            Work::Launch(launch) => Some(&launch.kernel),
            Work::Product(_) => None,
        }
    }

    /// Index of the first operation that it computes (part of).
    #[must_use]
    pub fn op(&self) -> usize {
        match self {
            Work::Launch(launch) => launch.op,
            Work::Product(product) => product.op,
        }
    }

    pub(crate) fn set_op(&mut self, op: usize) {
        match self {
            Work::Launch(launch) => launch.op = op,
            Work::Product(product) => product.op = op,
        }
    }
}
