//! One file a subcommand (and one for `build --from-engine`): validated options in, the work done or an error out.

pub mod bench;
pub mod build;
pub mod convert;
pub mod diff;
pub mod inspect;
pub mod rebuild;
pub mod run;
pub mod shell;
pub mod verify;
