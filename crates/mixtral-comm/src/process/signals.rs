//! SIGTERM and SIGINT end the group, not just this process.

use std::io;
use std::sync::mpsc::Sender;
use std::sync::{Mutex, PoisonError};
use std::thread;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use super::door::Event;

/// Whom to tell. A signal is told once; the second time, or after the job has ended well, it does what it does by
/// default, so that a process that does not get to its end can still be ended. A job that failed still takes one in
/// silence: its processes are on their way out, and often a launcher signals all that it sees.
static LISTENER: Mutex<Listener> = Mutex::new(Listener { started: false, events: None });

struct Listener {
    started: bool,
    events: Option<Sender<Event>>,
}

/// Sends the next signal as an event. The previous listener, if any, is forgotten.
pub(crate) fn listen(events: Sender<Event>) -> io::Result<()> {
    let mut listener = LISTENER.lock().unwrap_or_else(PoisonError::into_inner);
    if !listener.started {
        let mut signals = Signals::new([SIGTERM, SIGINT])?;
        thread::Builder::new().name("signals".to_owned()).spawn(move || signals.forever().for_each(tell))?;
        listener.started = true;
    }
    listener.events = Some(events);
    Ok(())
}

/// From now on signals do what they do by default.
pub(crate) fn release() {
    LISTENER.lock().unwrap_or_else(PoisonError::into_inner).events = None;
}

fn tell(signal: i32) {
    match LISTENER.lock().unwrap_or_else(PoisonError::into_inner).events.take() {
        // Of a job that has failed, nobody receives it.
        Some(events) => drop(events.send(Event::Signal(signal))),
        // The signals listened for have defaults that end the process, so this does not return.
        None => drop(emulate_default_handler(signal)),
    }
}
