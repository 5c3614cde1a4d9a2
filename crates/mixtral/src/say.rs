//! What is said on stderr besides errors, and how much of it: `-q` leaves it out, `-v` adds how and how long.

use std::fmt::Display;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

/// How much is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// Errors alone.
    Quiet,
    /// Warnings, progress, and a line of what was made.
    Normal,
    /// Also what was found where, and the time of each part.
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

/// Something that the user should know, though the work goes on.
pub fn warning(text: impl Display) {
    if shows(Level::Normal) {
        eprintln!("warning: {text}");
    }
}

/// What was done.
pub fn note(text: impl Display) {
    if shows(Level::Normal) {
        eprintln!("{text}");
    }
}

/// How, with what, and for how long.
pub fn detail(text: impl Display) {
    if shows(Level::Verbose) {
        eprintln!("{text}");
    }
}

/// `work`, with a detail of how long it took.
pub fn timed<T>(what: impl Display, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let done = work();
    detail(format_args!("{what}: {:.3} s", start.elapsed().as_secs_f64()));
    done
}
