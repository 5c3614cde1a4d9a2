//! A running server, and clients that say exactly what they are told to.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::tool::binary;

/// How long a test waits for something before it fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A server that listens on a free port, and what it has written to stderr.
pub struct Served {
    child: Child,
    pub address: SocketAddr,
    log: Option<JoinHandle<String>>,
}

impl Served {
    /// Starts `mixtral serve` in `dir`, with the words of `flags`, and waits until it answers.
    pub fn start(dir: &Path, flags: &str) -> Served {
        Served::start_with(dir, flags, &[])
    }

    /// The same, with some environment variables set.
    pub fn start_with(dir: &Path, flags: &str, variables: &[(&str, &str)]) -> Served {
        let mut child = Command::new(binary())
            .args(["serve", "--port", "0", "--served-model-name", "tiny"])
            .args(flags.split_whitespace())
            .current_dir(dir)
            .env_remove("RUST_BACKTRACE")
            .envs(variables.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut errors = child.stderr.take().expect("it is piped");
        let log = thread::spawn(move || {
            let mut text = String::new();
            let _ = errors.read_to_string(&mut text);
            text
        });
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("it is piped")).read_line(&mut line).expect("it prints a line");
        let address = line.trim().strip_prefix("listening on http://").and_then(|address| address.parse().ok());
        let Some(address) = address else {
            let _ = child.wait();
            panic!("it printed {line:?}: {}", log.join().unwrap());
        };
        let served = Served { child, address, log: Some(log) };
        wait_for("the server to be ready", || served.get("/ready").status == 200);
        served
    }

    /// Sends a request without a body.
    pub fn get(&self, path: &str) -> Answer {
        ask(self.address, &format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
    }

    /// Sends a request with a JSON body.
    pub fn post(&self, path: &str, body: &Value) -> Answer {
        ask(self.address, &post(path, &body.to_string(), ""))
    }

    /// Sends a completion's request, which must be answered, and returns the answer.
    #[track_caller]
    pub fn complete(&self, body: &Value) -> Value {
        self.post("/v1/completions", body).ok()
    }

    /// The process's number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, name: &str) {
        kill(self.id(), name);
    }

    /// Waits until the process has ended. Returns how it ended, and all that it wrote to stderr.
    pub fn ended(mut self) -> (ExitStatus, String) {
        wait_for("the server to end", || self.child.try_wait().expect("it is our child").is_some());
        let status = self.child.wait().expect("it is our child");
        (status, self.log.take().expect("it is taken once").join().expect("the log is text"))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a signal to a process.
pub fn kill(id: u32, signal: &str) {
    let status = Command::new("kill").args([signal, &id.to_string()]).status().expect("kill runs");
    assert!(status.success());
}

/// Waits until something is so.
#[track_caller]
pub fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "waited too long for {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// What a server answered.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

impl Answer {
    /// The body of an answer that is no error.
    #[track_caller]
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    /// The body.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {:?}", self.body))
    }

    /// The frames of a stream that was sent to its end.
    #[track_caller]
    pub fn frames(&self) -> Vec<Value> {
        assert_eq!((self.status, &*self.headers["content-type"]), (200, "text/event-stream; charset=utf-8"));
        let frames: Vec<&str> = self.body.split_terminator("\n\n").collect();
        let (last, frames) = frames.split_last().expect("a stream has frames");
        assert_eq!(*last, "data: [DONE]");
        let data = |frame: &&str| serde_json::from_str(frame.strip_prefix("data: ").expect("a frame")).expect("JSON");
        frames.iter().map(data).collect()
    }
}

/// The text of a request with a JSON body.
pub fn post(path: &str, body: &str, headers: &str) -> String {
    let mut text = format!("POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}");
    write!(text, "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
    text
}

/// Sends the text of a request, and reads the answer to its end.
pub fn ask(address: SocketAddr, request: &str) -> Answer {
    let mut stream = connect(address);
    // A server may answer, and close, before it has read all.
    let _ = stream.write_all(request.as_bytes());
    read_answer(stream)
}

/// A connection that does not wait forever.
pub fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("the server listens");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Reads an answer to its end.
pub fn read_answer(stream: TcpStream) -> Answer {
    let mut reader = BufReader::new(stream);
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line).expect("the server answers");
        line.trim_end().to_owned()
    };
    let status = line();
    let status = status.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.expect("the answer begins with a status");
    let mut headers = BTreeMap::new();
    loop {
        let line = line();
        let Some((name, value)) = line.split_once(": ") else { break };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let mut rest = Vec::new();
    // A server that was killed resets its connections.
    let _ = reader.read_to_end(&mut rest);
    let is_chunked = headers.get("transfer-encoding").is_some_and(|coding| coding == "chunked");
    let body = if is_chunked { unchunk(&rest) } else { rest };
    Answer { status, headers, body: String::from_utf8(body).expect("the server answers in UTF-8") }
}

/// Joins the chunks of a body.
fn unchunk(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = rest.windows(2).position(|window| window == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap(), 16).expect("a chunk's size");
        let chunk = &rest[end + 2..];
        body.extend_from_slice(&chunk[..size.min(chunk.len())]);
        rest = chunk.get(size + 2..).unwrap_or_default();
    }
    body
}
