//! The readers of foreign bytes, for fuzzing. They also check that a value they accept is written as it was read.

use std::io::{self, Read, Write};

use super::greeting::{Secret, greet_caller, greet_door};
use super::notice::Notice;
use super::wire::{Frame, Message};

/// Reads control messages, each behind its length.
///
/// # Panics
/// If a message is written differently from how it was read.
pub fn message(mut bytes: &[u8]) {
    while let Ok(message) = Message::read(&mut bytes) {
        // Writing cuts texts that are too long, but no text that long can be read.
        assert_eq!(Message::parse(&message.encode()), Ok(message));
    }
}

/// Reads the frame that stands before every message between two ranks.
///
/// # Panics
/// If a frame is written differently from how it was read.
pub fn frame(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk() else { return };
    if let Ok(frame) = Frame::parse(bytes) {
        assert_eq!(Frame::parse(&frame.encode()), Ok(frame));
    }
}

/// Reads the rendezvous file.
pub fn notice(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = Notice::parse(text);
    }
}

/// Greets a stranger that sends these bytes, once as the side that listens and once as the side that calls. The
/// stranger does not know the secret, so it must be refused.
///
/// # Panics
/// If it is not refused.
pub fn greeting(bytes: &[u8]) {
    let secret = Secret::new(b"of the job");
    assert!(greet_caller(Stranger(bytes), &secret).is_err());
    assert!(greet_door(Stranger(bytes), &secret).is_err());
}

/// Sends its bytes, whatever it receives.
struct Stranger<'a>(&'a [u8]);

impl Read for Stranger<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Stranger<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
