//! Who am I, and how do I talk: how a rank learns its place from its launcher, how the ranks of a job find and trust
//! each other, the collectives between them, and how one of them learns that another is gone. This crate knows no
//! models; what it moves are bytes.
//!
//! A rank is an OS thread. All ranks are threads of one process ([`threads::run`], over shared memory), or each is the
//! one rank of its own process ([`process::run`], over TCP); [`launch::Launch::detect`] says which. Either way the
//! rank's function is given a [`World`] and cannot tell the difference.
//!
//! Three promises hold for every call on a [`World`] or a [`Group`]:
//! - It returns. A rank that fails, panics, dies, is stopped for long or gets a signal ends every other rank's pending
//!   and later calls with an error that names it.
//! - Waits park the thread; nothing polls, beyond some microseconds before a wait between threads.
//! - Nothing is reduced here. A sum over ranks is an all-gather and then the caller's sum in rank order, so that its bits
//!   do not depend on arrival.
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
