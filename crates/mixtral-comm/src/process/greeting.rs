//! How two processes make sure that they belong to one job: each proves that it knows the job's secret by hashing what
//! the other made up a moment ago, so that the secret itself never travels and nothing heard can be used again.
//! Afterwards the connection is trusted; it is not encrypted.

use std::io::{self, Read, Write};

use blake3::Hash;

/// The first bytes of either side, with the protocol's version.
const MAGIC: [u8; 16] = *b"mixtral-comm 1\r\n";

/// What one job's ranks know, and no stranger.
#[derive(Clone)]
pub(crate) struct Secret([u8; 32]);

impl Secret {
    /// From text or random bytes of any length.
    pub(crate) fn new(secret: &[u8]) -> Self {
        Self(blake3::derive_key("mixtral-comm 2026-11 the ranks of one job", secret))
    }

    fn proof(&self, side: &[u8], door: &[u8; 32], caller: &[u8; 32]) -> Hash {
        blake3::keyed_hash(&self.0, &[side, &door[..], &caller[..]].concat())
    }
}

/// 32 bytes that nobody can guess.
pub(crate) fn random() -> io::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    if got == bytes.len() { Ok(bytes) } else { Err(io::Error::other("the system gave too few random bytes")) }
}

/// Why the other side is a stranger.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Stranger {
    #[error("it did not greet as a rank of this version does")]
    NotARank,
    #[error("it has another secret")]
    WrongSecret,
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
}

/// The side that listens: greets first, and tells a caller with another secret so.
pub(crate) fn greet_caller(mut stream: impl Read + Write, secret: &Secret) -> Result<(), Stranger> {
    let mine = random()?;
    stream.write_all(&[&MAGIC[..], &mine].concat())?;
    expect_magic(&mut stream)?;
    let (theirs, proof) = (read_32(&mut stream)?, read_32(&mut stream)?);
    if secret.proof(b"caller", &mine, &theirs) != proof {
        stream.write_all(&[0; 33])?;
        return Err(Stranger::WrongSecret);
    }
    stream.write_all(&[&[1], &secret.proof(b"door", &mine, &theirs).as_bytes()[..]].concat())?;
    Ok(())
}

/// The side that calls.
pub(crate) fn greet_door(mut stream: impl Read + Write, secret: &Secret) -> Result<(), Stranger> {
    expect_magic(&mut stream)?;
    let (theirs, mine) = (read_32(&mut stream)?, random()?);
    let proof = secret.proof(b"caller", &theirs, &mine);
    stream.write_all(&[&MAGIC[..], &mine, proof.as_bytes()].concat())?;
    let mut verdict = [0];
    stream.read_exact(&mut verdict)?;
    let answer = read_32(&mut stream)?;
    if verdict == [1] && secret.proof(b"door", &theirs, &mine) == answer { Ok(()) } else { Err(Stranger::WrongSecret) }
}

fn expect_magic(mut stream: impl Read) -> Result<(), Stranger> {
    let mut magic = [0; 16];
    stream.read_exact(&mut magic)?;
    if magic == MAGIC { Ok(()) } else { Err(Stranger::NotARank) }
}

fn read_32(mut stream: impl Read) -> io::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    /// Both sides' outcomes.
    fn greet(door: &str, caller: &str) -> (Result<(), Stranger>, Result<(), Stranger>) {
        let (here, there) = UnixStream::pair().unwrap();
        let secret = Secret::new(door.as_bytes());
        let other = thread::spawn(move || greet_caller(&there, &secret));
        let caller = greet_door(&here, &Secret::new(caller.as_bytes()));
        drop(here);
        (other.join().unwrap(), caller)
    }

    #[test]
    fn only_the_same_secret_opens() {
        assert!(matches!(greet("hush", "hush"), (Ok(()), Ok(()))));
        assert!(matches!(greet("hush", "hush "), (Err(Stranger::WrongSecret), Err(Stranger::WrongSecret))));
        assert!(matches!(greet("hush", ""), (Err(Stranger::WrongSecret), Err(Stranger::WrongSecret))));
    }

    #[test]
    fn another_protocol_and_an_early_end_are_strangers() {
        let say = |bytes: &[u8]| {
            let (mut here, there) = UnixStream::pair().unwrap();
            here.write_all(bytes).unwrap();
            here.shutdown(std::net::Shutdown::Write).unwrap();
            greet_caller(&there, &Secret::new(b"hush"))
        };
        assert!(matches!(say(b"GET / HTTP/1.1\r\n\r\n"), Err(Stranger::NotARank)));
        assert!(matches!(say(b""), Err(Stranger::Io(_))));
        assert!(matches!(say(&MAGIC), Err(Stranger::Io(_))));
        assert!(matches!(say(&[&MAGIC[..], &[7; 64]].concat()), Err(Stranger::WrongSecret)));
    }
}
