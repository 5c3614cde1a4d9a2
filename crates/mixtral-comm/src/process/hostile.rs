//! The readers of foreign bytes, and that what they accept is written as it was read.

use std::io::{self, Read, Write};

use super::greeting::{Secret, greet_caller, greet_door};
use super::notice::Notice;
use super::wire::{Frame, Message};

/// A control message with its length before it.
///
/// # Panics
/// If a message that was read is written as another.
pub fn message(mut bytes: &[u8]) {
    while let Ok(message) = Message::read(&mut bytes) {
        // Texts that are too long are cut when they are written, but none that long can be read.
        assert_eq!(Message::parse(&message.encode()), Ok(message));
    }
}

/// What stands before every message between two ranks.
///
/// # Panics
/// If a frame that was read is written as another.
pub fn frame(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk() else { return };
    if let Ok(frame) = Frame::parse(bytes) {
        assert_eq!(Frame::parse(&frame.encode()), Ok(frame));
    }
}

/// The rendezvous file.
pub fn notice(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = Notice::parse(text);
    }
}

/// The other side of a greeting, to either side of ours. Nobody guesses the secret, so it must be refused.
///
/// # Panics
/// If it is not.
pub fn greeting(bytes: &[u8]) {
    let secret = Secret::new(b"of the job");
    assert!(greet_caller(Stranger(bytes), &secret).is_err());
    assert!(greet_door(Stranger(bytes), &secret).is_err());
}

/// Says its bytes, whatever it is told.
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
