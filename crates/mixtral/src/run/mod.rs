//! The parts of `mixtral run`: prompts in, results out, and what the machine can do.

pub mod job;
pub mod machine;
pub mod outputs;
pub mod per_op;
pub mod prompt_files;
pub mod prompts;
pub mod ranks;
pub mod report;
