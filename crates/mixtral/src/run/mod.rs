//! The parts of `mixtral run` and `mixtral chat`: they read prompts, place, load and lead an engine, and write results.
//!
//! Reading order: [`job`] (all of it, as rank 0 leads it), [`ranks`] (starting them), [`place`] and [`gpus`] (where
//! each runs), [`load`] and [`cache`] (its backend, and how large the cache is), [`machine`] (what the host has and can
//! do); [`tokenizer`], [`prompts`] and [`chat`] (what goes in), [`outputs`] and [`report`] (what comes out);
//! [`measured`], [`throughput`] and [`per_op`] (how fast).

pub mod cache;
pub mod chat;
pub mod gpus;
pub mod job;
pub mod lines;
pub mod load;
pub mod machine;
pub mod measured;
pub mod outputs;
pub mod per_op;
pub mod place;
pub mod prompt_files;
pub mod prompts;
pub mod ranks;
pub mod report;
pub mod throughput;
pub mod tokenizer;
