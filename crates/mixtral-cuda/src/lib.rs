//! The CUDA interpreter of a program.
//!
//! [`CudaBackend`] implements [`mixtral_engine::Backend`] by carrying out the schedule that an engine holds. When it is
//! loaded, it resolves the schedule's launches to functions, pointers and tensor maps, and captures steps of decodes as
//! graphs. A step then uploads one block of inputs, launches, and waits once. The next step can be launched before that. The driver is looked for at run time; on
//! a machine without one, loading returns an error and does not panic.
//!
//! Reading order: [`load`] (a program onto a GPU), [`backend`] (its steps), [`images`] (which compiled kernels a GPU
//! runs), [`budget`] (memory, before any is allocated), `inputs` (a step as the device reads it), `weights` (onto the
//! device), `moves` (blocks of the cache), `execute` (launches and graphs), `flight` (steps under way), `exchange` (memory between ranks),
//! `peers` (whose memory that is), `remote` (ranks whose memory cannot be mapped), [`probe`] (a GPU's ceilings), `calibrate` (what calibration asks of a GPU), and
//! underneath `driver` (libcuda) and [`error`].
#![deny(unsafe_code)]

pub mod backend;
pub mod budget;
mod calibrate;
mod driver;
pub mod error;
mod exchange;
mod execute;
mod flight;
pub mod images;
mod inputs;
pub mod load;
mod moves;
mod peers;
pub mod probe;
mod remote;
mod staging;
mod weights;

pub use backend::CudaBackend;
pub use budget::KvBlocks;
pub use driver::{Device, devices, driver_version};
pub use error::CudaError;
pub use images::choose;
pub use load::{CudaOptions, Loading};
