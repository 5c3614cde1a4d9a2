//! How much the tool prints.

use crate::say::Level;

/// The flags as they were typed. Every command has them.
#[derive(Clone, Copy, Debug, clap::Args)]
#[command(next_help_heading = "Messages")]
pub struct Loudness {
    /// Say more: what was found where, and how long each part took
    #[arg(short, long, global = true, overrides_with = "quiet")]
    pub verbose: bool,
    /// Say less: no warnings, no progress, errors alone
    #[arg(short, long, global = true, overrides_with = "verbose")]
    pub quiet: bool,
    /// The old commands' word for it
    #[arg(long, global = true, hide = true)]
    pub log_level: Option<LogLevel>,
}

/// The old commands' levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum LogLevel {
    /// Errors of the tool itself.
    InternalError,
    /// Errors.
    Error,
    /// Warnings.
    Warning,
    /// What is done.
    Info,
    /// How.
    Verbose,
    /// The same.
    Debug,
    /// The same.
    Trace,
}

impl Loudness {
    /// The level that the flags ask for.
    pub fn level(self) -> Level {
        match self.log_level {
            _ if self.quiet => Level::Quiet,
            _ if self.verbose => Level::Verbose,
            Some(LogLevel::InternalError | LogLevel::Error) => Level::Quiet,
            Some(LogLevel::Verbose | LogLevel::Debug | LogLevel::Trace) => Level::Verbose,
            Some(LogLevel::Warning | LogLevel::Info) | None => Level::Normal,
        }
    }
}
