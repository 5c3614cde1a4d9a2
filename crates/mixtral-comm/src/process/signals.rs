//! SIGTERM and SIGINT end the whole job, not just this process.

use std::io;
use std::sync::mpsc::Sender;
use std::sync::{Mutex, PoisonError};
use std::thread;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use super::door::Event;

/// Where signals are sent as events. Only the first signal becomes an event. A second one has its default effect, so a
/// process that does not finish can still be ended. After the job has ended well, even the first has its default
/// effect. After a job has failed, the first is ignored: its processes are about to end, and launchers often signal all
/// of them then.
static LISTENER: Mutex<Listener> = Mutex::new(Listener { started: false, events: None });

struct Listener {
    started: bool,
    events: Option<Sender<Event>>,
}

/// Sends the next signal as an event. Replaces the previous listener, if there is one.
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

/// From now on signals have their default effect.
pub(crate) fn release() {
    LISTENER.lock().unwrap_or_else(PoisonError::into_inner).events = None;
}

fn tell(signal: i32) {
    match LISTENER.lock().unwrap_or_else(PoisonError::into_inner).events.take() {
        // If the job has failed, nobody receives it.
        Some(events) => drop(events.send(Event::Signal(signal))),
        // By default both signals end the process, so this does not return.
        None => drop(emulate_default_handler(signal)),
    }
}
