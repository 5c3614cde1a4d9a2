//! Ctrl-C and SIGTERM while a directory is written: they leave what a failure leaves, and an exit code as shells give it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result};
use mixtral_checkpoint::Ownership;
use mixtral_checkpoint::staged::{abandon, note_failure};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::exit;

/// A directory that a stage writes, and what it is to be.
#[derive(Clone, Debug)]
pub struct Output {
    /// The directory.
    pub dir: PathBuf,
    /// What is written there.
    pub ownership: Ownership,
}

static PENDING: AtomicBool = AtomicBool::new(false);

/// From now on the first signal gives `output` up, cleans and ends the process; a second one ends it at once.
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

/// Waits for the end, if a signal came: what fails now fails because the work was given up, and is no news.
pub fn settle() {
    while PENDING.load(Ordering::SeqCst) {
        thread::park();
    }
}
