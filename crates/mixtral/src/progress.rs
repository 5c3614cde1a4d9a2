//! Shows the progress of long work on stderr: as a bar on a terminal, as plain lines elsewhere.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::say::{self, Level};

/// Seconds between two plain lines.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// A bar, or the time at which the next plain line is due.
struct Shown {
    bar: ProgressBar,
    next_line: Option<Mutex<Instant>>,
}

impl Shown {
    fn new(template: &str) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let shown = say::shows(Level::Normal);
        let bar = if terminal && shown { ProgressBar::new(0) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Shown { bar, next_line: (!terminal && shown).then(|| Mutex::new(Instant::now() + LINE_EVERY)) }
    }

    /// Whether the caller is to print a plain line now. Only the first thread that asks is told so.
    fn is_line_due(&self) -> bool {
        let Some(Ok(mut next)) = self.next_line.as_ref().map(Mutex::try_lock) else { return false };
        let due = Instant::now() >= *next;
        if due {
            *next = Instant::now() + LINE_EVERY;
        }
        due
    }
}

/// Progress in bytes.
pub struct Bytes(Shown);

impl Bytes {
    /// Progress at 0 of 0 bytes.
    pub fn new() -> Self {
        Bytes(Shown::new("{bytes} of {total_bytes} [{wide_bar}] {binary_bytes_per_sec}, {eta} left"))
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.0.bar.finish_and_clear();
    }
}

impl mixtral_checkpoint::Progress for Bytes {
    fn start(&self, total: u64) {
        self.0.bar.set_length(total);
    }

    fn advance(&self, bytes: u64) {
        let bar = &self.0.bar;
        bar.inc(bytes);
        if self.0.is_line_due() {
            let (done, total) = (bar.position(), bar.length().unwrap_or(0));
            let rate = bar.per_sec() / 1e6;
            eprintln!(
                "{} of {} MB, {rate:.0} MB/s, {} s left",
                done / 1_000_000,
                total / 1_000_000,
                bar.eta().as_secs()
            );
        }
    }
}

/// Progress in tokens.
pub struct Tokens {
    shown: Shown,
    what: &'static str,
}

impl Tokens {
    /// Progress at 0 of 0 tokens; `what` says which.
    pub fn new(what: &'static str) -> Self {
        Tokens { shown: Shown::new(&format!("{{pos}} of {{len}} {what} [{{wide_bar}}] {{eta}} left")), what }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.shown.bar.finish_and_clear();
    }
}

impl mixtral_checkpoint::Progress for Tokens {
    fn start(&self, total: u64) {
        self.shown.bar.set_length(total);
    }

    fn advance(&self, tokens: u64) {
        let bar = &self.shown.bar;
        bar.inc(tokens);
        if self.shown.is_line_due() {
            let (done, total) = (bar.position(), bar.length().unwrap_or(0));
            eprintln!("{done} of {total} {}, {} s left", self.what, bar.eta().as_secs());
        }
    }
}

/// Progress of compiling kernels.
pub struct Kernels(Shown);

impl Kernels {
    /// Progress at 0 of 0 kernels.
    pub fn new() -> Self {
        Kernels(Shown::new("{pos} of {len} kernels [{wide_bar}] {eta} left"))
    }

    /// Shows that `done` of `total` kernels are compiled.
    pub fn advance(&self, done: usize, total: usize) {
        self.0.bar.set_length(total as u64);
        self.0.bar.set_position(done as u64);
        if self.0.is_line_due() {
            eprintln!("{done} of {total} kernels, {} s left", self.0.bar.eta().as_secs());
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.0.bar.finish_and_clear();
    }
}
