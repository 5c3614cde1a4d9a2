#![allow(unsafe_code)]
//! The CUDA driver: a thin, checked layer over libcuda. Only this module and the launches themselves (`execute`) have
//! unsafe code. Handles own what they name and free it when dropped. Nobody can touch memory that a copy is reading or
//! writing before the copy ends.

#[macro_use]
mod library;
mod api;
mod context;
mod cublas;
mod graph;
mod memory;
mod module;
mod nccl;
mod peer;
mod stream;
mod tensor_map;

pub(crate) use api::api;
pub use api::driver_version;
pub(crate) use context::Context;
pub use context::Device;
pub use context::devices;
pub(crate) use cublas::{CublasLt, ProductOperands, ProductShape};
pub(crate) use graph::Graph;
pub(crate) use memory::{DeviceMemory, Pinned};
pub(crate) use module::{Config, Function, Module, Param};
pub(crate) use nccl::{Communicator, ID_BYTES, UniqueId, version as nccl_version};
pub(crate) use peer::{HANDLE_BYTES, OpenedMemory};
pub(crate) use stream::{Event, Stream};
pub(crate) use tensor_map::encode;
