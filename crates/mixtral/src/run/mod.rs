//! The parts of `mixtral run`: it reads prompts, places, loads and leads an engine, and writes results.
//!
//! Reading order: [`job`] (all of it, as rank 0 leads it), [`ranks`] (starting them), [`place`] and [`gpus`] (where
//! each runs), [`load`] and [`cache`] (its backend, and how large the cache is), [`machine`] (what the host has and can
//! do).

pub mod cache;
pub mod gpus;
pub mod job;
pub mod load;
pub mod machine;
pub mod outputs;
pub mod per_op;
pub mod place;
pub mod prompt_files;
pub mod prompts;
pub mod ranks;
pub mod report;
pub mod throughput;
