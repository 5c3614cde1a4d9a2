//! One file a subcommand: validated options in, the work done or an error out.

pub mod bench;
pub mod build;
pub mod convert;
pub mod diff;
pub mod inspect;
pub mod run;
pub mod shell;
pub mod verify;
