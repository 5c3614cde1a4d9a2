//! Communication between the ranks of a job: how a rank learns its number from its launcher, how ranks find and trust
//! each other, their collectives, and how a rank learns that another one is gone. This crate moves bytes and knows
//! nothing of models.
//!
//! A rank is an OS thread. Either all ranks are threads of one process, which communicate over shared memory
//! ([`threads::run`]). Or each rank is the only one of its own process, and they communicate over TCP
//! ([`process::run`]). [`launch::Launch::detect`] tells which. In both cases the rank's function gets a [`World`] and
//! need not know the difference.
//!
//! Three promises hold for every call on a [`World`] or a [`Group`]:
//! - The call returns. If a rank fails, panics, dies, is stopped for long or gets a signal, every other rank's pending
//!   and later calls return an error that names it.
//! - A wait parks the thread. Between threads it polls for some microseconds before that; otherwise nothing polls.
//! - The call reduces nothing. For a sum over ranks, the caller does an all-gather and sums in the order of ranks, so
//!   the bits do not depend on the order of arrival.
//!
//! Reading order: [`launch`], [`world`], [`group`], [`error`], [`threads`], [`process`]; beneath them `inbox` (where
//! messages wait) and `endpoint` (how they get there).
#![forbid(unsafe_code)]

pub mod launch;
pub mod world;

pub mod group;

pub mod error;
pub mod process;
pub mod threads;

#[doc(hidden)]
pub mod hostile;

mod endpoint;
mod inbox;

pub use error::{Cause, CommError, Death, RankFailure};
pub use group::Group;
pub use launch::{Launch, LaunchError};
pub use process::{JoinError, JoinOptions};
pub use world::World;
