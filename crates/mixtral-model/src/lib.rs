//! The types that all crates of the workspace share: the shape of a Mixtral-family model, how its numbers are stored,
//! and which part of it a rank owns. This crate does no I/O and knows no file format, tensor name or device.
//!
//! Reading order: [`ids`], [`dtype`], [`fp8`], [`mod@format`], [`config`], [`mapping`], [`recipe`].
#![forbid(unsafe_code)]

pub mod config;
pub mod dtype;
pub mod format;
pub mod fp8;
pub mod ids;
pub mod mapping;
pub mod recipe;

pub use config::{ConfigError, ModelConfig, ModelFamily, MoeConfig, MoeNormalization};
pub use dtype::DType;
pub use format::{
    Bits, CacheFormat, ElemType, Formats, Fp8Input, Part, PartKind, Precision, Quantization, WeightFormat, WeightOnly,
};
pub use ids::{BlockId, ExpertId, LayerIdx, Rank, TokenId};
pub use mapping::{Mapping, MappingError, RankCoords, even_split};
pub use recipe::{Piece, Recipe};
