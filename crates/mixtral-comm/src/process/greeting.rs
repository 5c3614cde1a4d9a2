//! How two processes prove to each other that they belong to one job. Each sends random bytes, and the other hashes
//! them together with the job's secret. So the secret itself never travels, and a proof that was overheard cannot be
//! used again. Afterwards the connection is trusted. It is not encrypted.

use std::io::{self, Read, Write};

use blake3::Hash;

/// The first bytes that either side sends. They contain the protocol's version.
const MAGIC: [u8; 16] = *b"mixtral-comm 1\r\n";

/// The secret that all ranks of a job know, and no stranger does.
#[derive(Clone)]
pub(crate) struct Secret([u8; 32]);

impl Secret {
    /// Makes a secret from text or random bytes of any length.
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

/// Greets from the side that listens. It greets first, and it tells a caller with another secret that it has one.
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

/// Greets from the side that calls.
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

    /// The results of both sides.
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
