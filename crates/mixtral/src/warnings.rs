//! Prints the warnings of our libraries on stderr, like the binary's own.

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::say;

struct Stderr;

impl Log for Stderr {
    /// Only our own libraries' warnings: those of other libraries are about themselves.
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Warn && metadata.target().starts_with("mixtral")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            say::warning(record.args());
        }
    }

    fn flush(&self) {}
}

/// Prints warnings from now on.
pub fn print() {
    if log::set_logger(&Stderr).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}
