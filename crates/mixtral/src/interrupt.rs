//! Ctrl-C and SIGTERM. While a directory is written, it is left as after a failure, and the exit code is the one that
//! shells use. A server finishes what it answers.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result};
use mixtral_checkpoint::Ownership;
use mixtral_checkpoint::staged::{abandon, note_failure};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::exit;

/// A directory that a stage writes, and what kind of directory it becomes.
#[derive(Clone, Debug)]
pub struct Output {
    /// The directory.
    pub dir: PathBuf,
    /// The kind of output, and so the files that the stage may replace.
    pub ownership: Ownership,
}

static PENDING: AtomicBool = AtomicBool::new(false);

/// From now on the first signal gives `output` up, cleans up and ends the process. A second signal ends the process at
/// once.
pub fn watch(output: Output) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot listen for signals")?;
    let listen = move || {
        for signal in signals.forever() {
            if PENDING.swap(true, Ordering::SeqCst) {
                exit(128 + signal);
            }
            let output = output.clone();
            thread::spawn(move || give_up(&output, signal));
        }
    };
    thread::Builder::new().name("signals".to_owned()).spawn(listen).context("cannot listen for signals")?;
    Ok(())
}

/// From now on the first signal calls `stop`. If that says that there is nothing to stop, and at the second signal, the
/// process ends at once.
pub fn on_first(stop: impl Fn() -> bool + Send + 'static) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot listen for signals")?;
    let listen = move || {
        let mut was_told = false;
        for signal in signals.forever() {
            if was_told || !stop() {
                exit(128 + signal);
            }
            was_told = true;
        }
    };
    thread::Builder::new().name("signals".to_owned()).spawn(listen).context("cannot listen for signals")?;
    Ok(())
}

fn give_up(Output { dir, ownership }: &Output, signal: i32) -> ! {
    let why = match signal {
        SIGINT => "interrupted (SIGINT)",
        _ => "ended (SIGTERM)",
    };
    if !abandon(why) {
        note_failure(dir, *ownership, why);
    }
    eprintln!("error: {why}; nothing half-made is left in {}", dir.display());
    exit(128 + signal)
}

/// If a signal came, waits for the end of the process. Errors from now on come from giving the work up, so nobody needs
/// to see them.
pub fn settle() {
    while PENDING.load(Ordering::SeqCst) {
        thread::park();
    }
}
