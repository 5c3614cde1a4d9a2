//! The messages between processes, as bytes. Pure functions read them, and return a value or an error for any bytes.
//! They never allocate more memory than there are bytes, whatever a length claims.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};

use crate::Death;
use crate::inbox::{Key, Op};
use crate::launch::MAX_WORLD_SIZE;
use crate::world::MAX_MESSAGE_BYTES;

/// The longest control message. A roster of 4096 ranks with long host names fits into it.
const MAX_CONTROL_BYTES: usize = 2 << 20;

/// The longest text in a control message. Longer texts are cut before they are sent.
const MAX_TEXT_BYTES: usize = 8 << 10;

/// A message on the connection between rank 0 and another rank, or the first message on a connection between any two
/// ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// To rank 0: who I am.
    Join(Join),
    /// On a new connection between two ranks: this is rank `from`.
    Mesh { from: usize },
    /// From rank 0: who and where the ranks are, by rank.
    Roster(Vec<Member>),
    /// To rank 0: connected to everyone.
    Ready,
    /// From rank 0: all are connected, begin.
    Go,
    /// From rank 0: the job does not begin, for this reason.
    Refused(String),
    /// I am alive.
    Heartbeat,
    /// I have finished; from rank 0: all ranks have finished.
    Goodbye,
    /// To rank 0: I end, and all ranks should.
    Failed(Death),
    /// To rank 0: my connection to this rank broke.
    Lost { rank: usize },
    /// From rank 0: this rank is gone, the job is over.
    Dead { rank: usize, reason: Death },
    /// I have read your last message and send no more.
    Seen,
}

/// What a rank tells rank 0 about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Join {
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    pub(crate) identity: [u8; 32],
    pub(crate) pid: u32,
    pub(crate) host: String,
    /// The port where it listens for the other ranks, at the address from which it reached rank 0.
    pub(crate) port: u16,
}

/// A rank of the roster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) host: String,
    pub(crate) pid: u32,
    /// Where it listens for the other ranks. Unused for rank 0, since every rank knows the address by which it reached
    /// rank 0.
    pub(crate) address: SocketAddr,
}

/// Bytes that cannot be read as a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    #[error("a message ends inside its {0}")]
    Truncated(&'static str),
    #[error("a message has {0} bytes too many")]
    Trailing(usize),
    #[error("there is no {what} {value}")]
    Unknown { what: &'static str, value: u64 },
    #[error("a {what} of {value} is over the limit of {limit}")]
    OverLimit { what: &'static str, value: u64, limit: usize },
    #[error("a text is not UTF-8")]
    NotUtf8,
}

impl Message {
    /// The bytes that [`Message::parse`] reads.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Join(join) => {
                out.push(1);
                put_u32(&mut out, join.rank);
                put_u32(&mut out, join.world_size);
                out.extend(join.identity);
                out.extend(join.pid.to_le_bytes());
                put_text(&mut out, &join.host);
                out.extend(join.port.to_le_bytes());
            }
            Self::Mesh { from } => {
                out.push(2);
                put_u32(&mut out, *from);
            }
            Self::Roster(members) => {
                out.push(3);
                put_u32(&mut out, members.len());
                for member in members {
                    put_text(&mut out, &member.host);
                    out.extend(member.pid.to_le_bytes());
                    put_address(&mut out, member.address);
                }
            }
            Self::Ready => out.push(4),
            Self::Go => out.push(5),
            Self::Refused(text) => {
                out.push(6);
                put_text(&mut out, text);
            }
            Self::Heartbeat => out.push(7),
            Self::Goodbye => out.push(8),
            Self::Failed(reason) => {
                out.push(9);
                put_death(&mut out, reason);
            }
            Self::Lost { rank } => {
                out.push(10);
                put_u32(&mut out, *rank);
            }
            Self::Dead { rank, reason } => {
                out.push(11);
                put_u32(&mut out, *rank);
                put_death(&mut out, reason);
            }
            Self::Seen => out.push(12),
        }
        out
    }

    /// Reads bytes that hold exactly one message. Checks that ranks and counts are under [`MAX_WORLD_SIZE`]. The caller
    /// has to check that they are under this job's size.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        let mut input = Input(bytes);
        let message = match input.u8("kind")? {
            1 => Self::Join(Join {
                rank: input.rank("rank")?,
                world_size: input.rank("world size")?,
                identity: input.array("identity")?,
                pid: input.u32("process")?,
                host: input.text("host")?,
                port: u16::from_le_bytes(input.array("port")?),
            }),
            2 => Self::Mesh { from: input.rank("rank")? },
            3 => {
                let count = input.rank("number of ranks")?;
                let member = |input: &mut Input<'_>| -> Result<Member, WireError> {
                    Ok(Member { host: input.text("host")?, pid: input.u32("process")?, address: input.address()? })
                };
                Self::Roster((0..count).map(|_| member(&mut input)).collect::<Result<_, _>>()?)
            }
            4 => Self::Ready,
            5 => Self::Go,
            6 => Self::Refused(input.text("refusal")?),
            7 => Self::Heartbeat,
            8 => Self::Goodbye,
            9 => Self::Failed(input.death()?),
            10 => Self::Lost { rank: input.rank("rank")? },
            11 => Self::Dead { rank: input.rank("rank")?, reason: input.death()? },
            12 => Self::Seen,
            kind => return Err(WireError::Unknown { what: "message kind", value: kind.into() }),
        };
        if input.0.is_empty() { Ok(message) } else { Err(WireError::Trailing(input.0.len())) }
    }

    /// Writes the message with its length before it.
    pub(crate) fn write(&self, mut stream: impl Write) -> io::Result<()> {
        let body = self.encode();
        let mut framed = Vec::with_capacity(4 + body.len());
        put_u32(&mut framed, body.len());
        framed.extend(body);
        stream.write_all(&framed)
    }

    /// Reads a message with its length before it. Bytes that cannot be read as a message are
    /// [`io::ErrorKind::InvalidData`].
    pub(crate) fn read(mut stream: impl Read) -> io::Result<Self> {
        let mut length = [0; 4];
        stream.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length);
        if length as usize > MAX_CONTROL_BYTES {
            let over = WireError::OverLimit { what: "length", value: length.into(), limit: MAX_CONTROL_BYTES };
            return Err(io::Error::new(io::ErrorKind::InvalidData, over));
        }
        let mut body = Vec::new();
        stream.take(length.into()).read_to_end(&mut body)?;
        if body.len() < length as usize {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Self::parse(&body).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }
}

/// The frame before every message between two ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// This many bytes follow.
    Data { key: Key, bytes: usize },
    /// No more will follow.
    Goodbye,
}

impl Frame {
    /// Bytes of a frame.
    pub(crate) const BYTES: usize = 24;

    pub(crate) fn encode(self) -> [u8; Self::BYTES] {
        let (op, channel, tag, bytes) = match self {
            Self::Data { key, bytes } => (op_code(key.op), key.channel, key.tag, bytes as u64),
            Self::Goodbye => (0, 0, 0, 0),
        };
        let mut out = [0; Self::BYTES];
        out[..8].copy_from_slice(&channel.to_le_bytes());
        out[8..12].copy_from_slice(&tag.to_le_bytes());
        out[12..16].copy_from_slice(&op.to_le_bytes());
        out[16..].copy_from_slice(&bytes.to_le_bytes());
        out
    }

    pub(crate) fn parse(frame: &[u8; Self::BYTES]) -> Result<Self, WireError> {
        let mut input = Input(frame);
        let channel = u64::from_le_bytes(input.array("channel")?);
        let tag = input.u32("tag")?;
        let op = match input.u32("operation")? {
            0 => None,
            1 => Some(Op::Send),
            2 => Some(Op::AllGather),
            3 => Some(Op::Broadcast),
            4 => Some(Op::Barrier),
            op => return Err(WireError::Unknown { what: "operation", value: op.into() }),
        };
        let bytes = u64::from_le_bytes(input.array("length")?);
        match (op, usize::try_from(bytes)) {
            (Some(op), Ok(bytes)) if bytes <= MAX_MESSAGE_BYTES => {
                Ok(Self::Data { key: Key { channel, op, tag }, bytes })
            }
            (None, Ok(0)) => Ok(Self::Goodbye),
            _ => Err(WireError::OverLimit { what: "length", value: bytes, limit: MAX_MESSAGE_BYTES }),
        }
    }
}

fn op_code(op: Op) -> u32 {
    match op {
        Op::Send => 1,
        Op::AllGather => 2,
        Op::Broadcast => 3,
        Op::Barrier => 4,
    }
}

/// Writes a rank, count or length. All are far below the limit of u32, and the reader would refuse a larger one.
fn put_u32(out: &mut Vec<u8>, value: usize) {
    out.extend(u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes());
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    let mut end = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let text = &text[..end];
    put_u32(out, text.len());
    out.extend(text.bytes());
}

fn put_address(out: &mut Vec<u8>, address: SocketAddr) {
    match address.ip() {
        IpAddr::V4(ip) => {
            out.push(4);
            out.extend(ip.octets());
        }
        IpAddr::V6(ip) => {
            out.push(6);
            out.extend(ip.octets());
        }
    }
    out.extend(address.port().to_le_bytes());
}

fn put_death(out: &mut Vec<u8>, reason: &Death) {
    match reason {
        Death::Closed => out.push(1),
        Death::Stalled { milliseconds } => {
            out.push(2);
            out.extend(milliseconds.to_le_bytes());
        }
        Death::Failed(text) => {
            out.push(3);
            put_text(out, text);
        }
        Death::Signal(number) => {
            out.push(4);
            out.extend(number.to_le_bytes());
        }
    }
}

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], WireError> {
        let (array, rest) = self.0.split_first_chunk().ok_or(WireError::Truncated(what))?;
        self.0 = rest;
        Ok(*array)
    }

    fn u8(&mut self, what: &'static str) -> Result<u8, WireError> {
        Ok(self.array::<1>(what)?[0])
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn rank(&mut self, what: &'static str) -> Result<usize, WireError> {
        let value = self.u32(what)?;
        let limit = MAX_WORLD_SIZE;
        usize::try_from(value).ok().filter(|value| *value <= limit).ok_or(WireError::OverLimit {
            what,
            value: value.into(),
            limit,
        })
    }

    fn text(&mut self, what: &'static str) -> Result<String, WireError> {
        let length = self.u32(what)? as usize;
        if length > MAX_TEXT_BYTES {
            return Err(WireError::OverLimit { what: "text", value: length as u64, limit: MAX_TEXT_BYTES });
        }
        let (text, rest) = self.0.split_at_checked(length).ok_or(WireError::Truncated(what))?;
        self.0 = rest;
        String::from_utf8(text.to_vec()).map_err(|_| WireError::NotUtf8)
    }

    fn address(&mut self) -> Result<SocketAddr, WireError> {
        let ip = match self.u8("address family")? {
            4 => IpAddr::from(self.array::<4>("address")?),
            6 => IpAddr::from(self.array::<16>("address")?),
            family => return Err(WireError::Unknown { what: "address family", value: family.into() }),
        };
        Ok(SocketAddr::new(ip, u16::from_le_bytes(self.array("port")?)))
    }

    fn death(&mut self) -> Result<Death, WireError> {
        Ok(match self.u8("reason")? {
            1 => Death::Closed,
            2 => Death::Stalled { milliseconds: u64::from_le_bytes(self.array("stall")?) },
            3 => Death::Failed(self.text("reason")?),
            4 => Death::Signal(i32::from_le_bytes(self.array("signal")?)),
            reason => return Err(WireError::Unknown { what: "reason", value: reason.into() }),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text() -> impl Strategy<Value = String> {
        prop::collection::vec(any::<char>(), 0..40).prop_map(String::from_iter)
    }

    fn death() -> impl Strategy<Value = Death> {
        prop_oneof![
            Just(Death::Closed),
            any::<u64>().prop_map(|milliseconds| Death::Stalled { milliseconds }),
            text().prop_map(Death::Failed),
            any::<i32>().prop_map(Death::Signal),
        ]
    }

    fn member() -> impl Strategy<Value = Member> {
        let address = prop_oneof![
            any::<([u8; 4], u16)>().prop_map(|(ip, port)| SocketAddr::from((ip, port))),
            any::<([u8; 16], u16)>().prop_map(|(ip, port)| SocketAddr::from((ip, port))),
        ];
        (text(), any::<u32>(), address).prop_map(|(host, pid, address)| Member { host, pid, address })
    }

    fn message() -> impl Strategy<Value = Message> {
        let rank = 0..=MAX_WORLD_SIZE;
        let join = (rank.clone(), rank.clone(), any::<[u8; 32]>(), any::<u32>(), text(), any::<u16>());
        prop_oneof![
            join.prop_map(|(rank, world_size, identity, pid, host, port)| {
                Message::Join(Join { rank, world_size, identity, pid, host, port })
            }),
            rank.clone().prop_map(|from| Message::Mesh { from }),
            prop::collection::vec(member(), 0..5).prop_map(Message::Roster),
            Just(Message::Ready),
            Just(Message::Go),
            text().prop_map(Message::Refused),
            Just(Message::Heartbeat),
            Just(Message::Goodbye),
            death().prop_map(Message::Failed),
            rank.clone().prop_map(|rank| Message::Lost { rank }),
            (rank, death()).prop_map(|(rank, reason)| Message::Dead { rank, reason }),
            Just(Message::Seen),
        ]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(message in message()) {
            prop_assert_eq!(Message::parse(&message.encode()), Ok(message.clone()));
            let mut stream = Vec::new();
            message.write(&mut stream).unwrap();
            prop_assert_eq!(Message::read(&stream[..]).unwrap(), message);
        }

        #[test]
        fn every_truncation_and_every_addition_is_refused(message in message()) {
            let mut bytes = message.encode();
            for end in 0..bytes.len() {
                prop_assert!(matches!(Message::parse(&bytes[..end]), Err(WireError::Truncated(_))), "{}", end);
            }
            bytes.push(0);
            prop_assert_eq!(Message::parse(&bytes), Err(WireError::Trailing(1)));
        }

        #[test]
        fn any_bytes_are_a_message_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = Message::parse(&bytes) {
                prop_assert_eq!(message.encode(), bytes);
            }
        }

        #[test]
        fn damaged_messages_are_read_or_refused(message in message(), at: prop::sample::Index, to: u8) {
            let mut bytes = message.encode();
            let at = at.index(bytes.len());
            bytes[at] = to;
            if let Ok(message) = Message::parse(&bytes) {
                prop_assert_eq!(message.encode(), bytes);
            }
        }

        #[test]
        fn any_frame_is_read_or_refused(frame: [u8; Frame::BYTES], op in 0..6u8, small: bool) {
            let mut frame = frame;
            frame[12..16].copy_from_slice(&[op, 0, 0, 0]);
            if small {
                frame[20..].fill(0);
            }
            match Frame::parse(&frame) {
                Ok(Frame::Goodbye) => {}
                Ok(parsed @ Frame::Data { bytes, .. }) => {
                    prop_assert!(bytes <= MAX_MESSAGE_BYTES);
                    prop_assert_eq!(parsed.encode(), frame);
                }
                Err(_) => prop_assert!(op == 0 || op == 5 || frame[19..] != [0; 5]),
            }
        }
    }

    #[test]
    fn hostile_lengths_are_refused_before_anything_is_read() {
        let error = Message::read(&[0xFF; 64][..]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert_eq!(error.to_string(), "a length of 4294967295 is over the limit of 2097152");
        // A length within the limit, but longer than the stream.
        assert_eq!(Message::read(&[0, 0, 16, 0, 7][..]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        // A roster that claims more members than it has bytes.
        assert_eq!(Message::parse(&[3, 0, 16, 0, 0]), Err(WireError::Truncated("host")));
        assert!(matches!(Message::parse(&[3, 1, 16, 0, 0]), Err(WireError::OverLimit { value: 4097, .. })));
        assert!(matches!(Message::parse(&[6, 1, 32, 0, 0]), Err(WireError::OverLimit { what: "text", .. })));
        assert_eq!(Message::parse(&[6, 1, 0, 0, 0, 0xFF]), Err(WireError::NotUtf8));
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let text = "é".repeat(MAX_TEXT_BYTES);
        let Ok(Message::Refused(read)) = Message::parse(&Message::Refused(format!("x{text}")).encode()) else {
            panic!()
        };
        assert_eq!(read.len(), MAX_TEXT_BYTES - 1);
    }
}
