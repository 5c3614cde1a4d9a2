//! One file for each subcommand, and one for `build --from-engine`. Each takes validated options and does the work.

pub mod bench;
pub mod bench_server;
pub mod build;
pub mod chat;
pub mod convert;
pub mod diff;
pub mod eval;
pub mod inspect;
pub mod rebuild;
pub mod run;
pub mod serve;
pub mod shell;
pub mod verify;
