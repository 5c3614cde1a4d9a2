//! How long work is going: a bar on a terminal, plain lines elsewhere, both on stderr.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Seconds between two plain lines.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Progress in bytes.
pub struct Bytes {
    bar: ProgressBar,
    /// When the next plain line is due; `None` on a terminal.
    next_line: Option<Mutex<Instant>>,
}

impl Bytes {
    /// Nothing done of nothing.
    pub fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal { ProgressBar::new(0) } else { ProgressBar::hidden() };
        let template = "{bytes} of {total_bytes} [{wide_bar}] {binary_bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Bytes { bar, next_line: (!terminal).then(|| Mutex::new(Instant::now() + LINE_EVERY)) }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl mixtral_checkpoint::Progress for Bytes {
    fn start(&self, total: u64) {
        self.bar.set_length(total);
    }

    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
        let Some(next) = &self.next_line else { return };
        // Whoever has the lock prints; the others go on.
        let Ok(mut next) = next.try_lock() else { return };
        if Instant::now() >= *next {
            *next = Instant::now() + LINE_EVERY;
            let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
            let rate = self.bar.per_sec() / 1e6;
            eprintln!(
                "{} of {} MB, {rate:.0} MB/s, {} s left",
                done / 1_000_000,
                total / 1_000_000,
                self.bar.eta().as_secs()
            );
        }
    }
}

/// Progress of kernels that are compiled.
pub struct Kernels {
    bar: ProgressBar,
}

impl Kernels {
    /// None of none.
    pub fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal { ProgressBar::new(0) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{pos} of {len} kernels [{wide_bar}] {eta} left") {
            bar.set_style(style);
        }
        Kernels { bar }
    }

    /// `done` of `total` are compiled.
    pub fn advance(&self, done: usize, total: usize) {
        self.bar.set_length(total as u64);
        self.bar.set_position(done as u64);
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
