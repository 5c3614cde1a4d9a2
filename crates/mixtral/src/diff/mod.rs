//! Runs two backends in lockstep and compares what each operation computes from the same inputs.
//!
//! Reading order: [`matching`] (whether two programs can be compared), [`operands`] (what operations read and write),
//! [`lockstep`] (running them), [`difference`] (how far two contents are apart), [`findings`] (all differences, and how
//! they are printed).

pub mod difference;
pub mod findings;
pub mod lockstep;
pub mod matching;
pub mod operands;
#[cfg(test)]
mod tests;

pub use findings::Findings;
pub use lockstep::Lockstep;
pub use matching::{find, same_operations};
