//! Runs two engines in lockstep and compares what each operation computes from the same inputs.
//!
//! Reading order: [`matching`] (whether two programs can be compared), [`operands`] (what operations read and write),
//! [`lockstep`] (running two backends of one rank), [`ranks`] (running all ranks of an engine beside one of one rank) and
//! [`share`] (what a rank has of a buffer), [`difference`] (how far two contents are apart), [`findings`] (all differences,
//! and how they are printed).

pub mod difference;
pub mod findings;
pub mod lockstep;
pub mod matching;
pub mod operands;
pub mod ranks;
pub mod share;
#[cfg(test)]
mod tests;

pub use findings::Findings;
pub use lockstep::Lockstep;
pub use matching::{find, same_model, same_operations};
pub use ranks::{Exchange, Member, Ranks};
pub use share::Share;
