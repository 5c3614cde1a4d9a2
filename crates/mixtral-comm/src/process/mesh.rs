//! The data connections, one between any two ranks. The rank's thread writes to them. A separate thread reads each, so
//! that a sender need not wait for the receiver.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use super::door::Event;
use super::wire::Frame;
use crate::CommError;
use crate::endpoint::Buffers;
use crate::inbox::{Inbox, Key, Op};

/// Messages up to this size are sent in one write with their frame.
const ONE_WRITE_BYTES: usize = 64 << 10;

/// The writing end of a data connection.
#[derive(Debug)]
pub(crate) struct Wire {
    rank: usize,
    writer: Mutex<Writer>,
    events: Sender<Event>,
}

#[derive(Debug)]
struct Writer {
    stream: TcpStream,
    /// Holds frame and bytes of a small message.
    scratch: Vec<u8>,
}

impl Wire {
    pub(crate) fn new(rank: usize, stream: TcpStream, events: Sender<Event>) -> Self {
        Self { rank, writer: Mutex::new(Writer { stream, scratch: Vec::new() }), events }
    }

    /// Sends a message. If the connection is broken, waits until the reason for the job's end is known, and returns
    /// that.
    pub(crate) fn send(&self, key: Key, bytes: &[u8], inbox: &Inbox) -> Result<(), CommError> {
        if let Some(failure) = inbox.failure() {
            return Err(failure);
        }
        if inbox.is_finished(self.rank) {
            return Err(CommError::Finished { rank: self.rank });
        }
        let sent = self.lock().send(Frame::Data { key, bytes: bytes.len() }, bytes);
        if sent.is_ok() {
            return Ok(());
        }
        // The watch finds out which rank failed. It may not have noticed yet that the connection broke, so it is told.
        let _ = self.events.send(Event::MeshBroken { rank: self.rank });
        inbox.await_end()?;
        Err(CommError::Finished { rank: self.rank })
    }

    /// Tells the other side that nothing more will come. If the other side is gone already, that is no failure.
    pub(crate) fn goodbye(&self) {
        let _ = self.lock().send(Frame::Goodbye, &[]);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Writer {
    fn send(&mut self, frame: Frame, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() <= ONE_WRITE_BYTES {
            self.scratch.clear();
            self.scratch.extend(frame.encode());
            self.scratch.extend_from_slice(bytes);
            return self.stream.write_all(&self.scratch);
        }
        self.stream.write_all(&frame.encode())?;
        self.stream.write_all(bytes)
    }
}

/// Puts the messages of `rank` into the inbox until it says goodbye or the connection breaks.
pub(crate) fn read(mut stream: TcpStream, rank: usize, inbox: &Inbox, events: &Sender<Event>) {
    let buffers = Buffers::default();
    let broken = loop {
        let mut frame = [0; Frame::BYTES];
        if stream.read_exact(&mut frame).is_err() {
            break true;
        }
        let (key, bytes) = match Frame::parse(&frame) {
            Ok(Frame::Data { key, bytes }) => (key, bytes),
            Ok(Frame::Goodbye) => break false,
            Err(_) => break true,
        };
        // The caller keeps a received message, so it gets a new buffer. Parts of collectives are copied out, so their
        // buffers are used again.
        let mut body = if key.op == Op::Send { Vec::new() } else { buffers.take() };
        // The buffer grows with the bytes that arrive, whatever length the frame claims.
        match (&mut stream).take(bytes as u64).read_to_end(&mut body) {
            Ok(read) if read == bytes => {}
            _ => break true,
        }
        let body = if key.op == Op::Send { Arc::new(body) } else { buffers.share(body) };
        if inbox.push(rank, key, body).is_err() {
            return;
        }
    };
    if broken {
        let _ = events.send(Event::MeshBroken { rank });
    } else {
        inbox.finish(rank);
    }
}
