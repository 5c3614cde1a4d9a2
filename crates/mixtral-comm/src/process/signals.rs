//! SIGTERM and SIGINT end the group, not just this process.

use std::io;
use std::sync::mpsc::Sender;
use std::sync::{Mutex, PoisonError};
use std::thread;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use super::door::Event;

/// Whom to tell. A signal is told once; without anyone to tell, or the second time, it does what it does by default, so
/// that a process that does not get to its end can still be ended.
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
pub(crate) fn ignore() {
    LISTENER.lock().unwrap_or_else(PoisonError::into_inner).events = None;
}

fn tell(signal: i32) {
    let events = LISTENER.lock().unwrap_or_else(PoisonError::into_inner).events.take();
    if events.is_none_or(|events| events.send(Event::Signal(signal)).is_err()) {
        // The signals listened for have defaults that end the process, so this does not return.
        let _ = emulate_default_handler(signal);
    }
}
