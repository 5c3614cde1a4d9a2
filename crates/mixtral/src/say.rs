//! Messages on stderr other than errors. `-q` leaves them out; `-v` adds how things were done and how long they took.

use std::fmt::Display;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

/// How much is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// Errors alone.
    Quiet,
    /// Warnings, progress, and a line about what was made.
    Normal,
    /// Also which files and libraries were found where, and the time of each part.
    Verbose,
}

static LEVEL: AtomicU8 = AtomicU8::new(Level::Normal as u8);

/// Sets the level of this process.
pub fn set(level: Level) {
    LEVEL.store(level as u8, Ordering::Relaxed);
}

/// Whether a level's messages are shown.
pub fn shows(level: Level) -> bool {
    LEVEL.load(Ordering::Relaxed) >= level as u8
}

/// Prints something that the user should know although the work goes on.
pub fn warning(text: impl Display) {
    if shows(Level::Normal) {
        eprintln!("warning: {text}");
    }
}

/// Prints what was done.
pub fn note(text: impl Display) {
    if shows(Level::Normal) {
        eprintln!("{text}");
    }
}

/// Prints how it was done, with what, and how long it took.
pub fn detail(text: impl Display) {
    if shows(Level::Verbose) {
        eprintln!("{text}");
    }
}

/// Does `work` and prints, as a detail, how long it took.
pub fn timed<T>(what: impl Display, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let done = work();
    detail(format_args!("{what}: {:.3} s", start.elapsed().as_secs_f64()));
    done
}
