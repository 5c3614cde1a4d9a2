//! A client that measures a server: this one, or another with OpenAI's API.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, Uri, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::runtime::Builder;
use tokio::sync::Semaphore;

/// The most bytes of an answer that is no stream.
const MAX_ANSWER: usize = 1 << 20;

/// Threads that send requests and read answers.
const THREADS: usize = 2;

/// Why a server was not measured, or a request not answered.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server's address is not one.
    #[error("{url} is not the address of a server: expected http://HOST:PORT{}", if *https { "; HTTPS is not spoken here" } else { "" })]
    Url {
        /// The text.
        url: String,
        /// Whether it asks for encryption.
        https: bool,
    },
    /// The server cannot be reached, or closed the connection.
    #[error("{address}: {detail}")]
    Connection {
        /// The server.
        address: String,
        /// What happened.
        detail: String,
    },
    /// The server answered with an error.
    #[error("{path} was answered with status {status}: {message}")]
    Status {
        /// What was asked.
        path: String,
        /// The status.
        status: u16,
        /// The error's message.
        message: String,
    },
    /// The answer is not what OpenAI's API has.
    #[error("{path} was answered with something else than expected: {detail}")]
    Answer {
        /// What was asked.
        path: String,
        /// What is wrong.
        detail: String,
    },
}

/// A server, and how it is asked.
#[derive(Clone, Debug)]
pub struct Target {
    address: String,
    prefix: String,
    key: Option<String>,
}

/// A prompt to be continued, and when it is sent.
#[derive(Clone, Debug)]
pub struct Ask {
    /// From the start of the measurement.
    pub at: Duration,
    /// Token ids.
    pub prompt: Vec<u32>,
    /// How many tokens the answer is to have.
    pub max_tokens: usize,
}

/// When an answer came. All times are from the start of the measurement.
#[derive(Clone, Debug, Default)]
pub struct Answered {
    /// When the request was sent.
    pub sent: Duration,
    /// When its tokens came. Of a server, when each chunk came that brought one or more of them.
    pub came: Times,
    /// How many tokens it has, by the server's count.
    pub tokens: usize,
}

impl Answered {
    /// The time from sending the request to the first token.
    #[must_use]
    pub fn first_token(&self) -> Duration {
        self.came.first().map_or(Duration::ZERO, |first| first - self.sent)
    }

    /// The mean time between its tokens; an answer of one token has none.
    #[must_use]
    pub fn per_token(&self) -> Option<Duration> {
        let between = u32::try_from(self.tokens.checked_sub(1)?).ok().filter(|&n| n > 0)?;
        Some((self.came.last()? - self.came.first()?) / between)
    }
}

/// Times in ascending order, to a tenth of a microsecond. Each takes four bytes: of many requests there are millions.
#[derive(Clone, Debug, Default)]
pub struct Times {
    first: Option<Duration>,
    last: Duration,
    /// The times between two, in units.
    gaps: Vec<u32>,
}

impl Times {
    const UNIT: Duration = Duration::from_nanos(100);

    /// Adds a time, which is not before the last one.
    pub fn push(&mut self, time: Duration) {
        if self.first.is_none() {
            (self.first, self.last) = (Some(time), time);
            return;
        }
        // What is longer than seven minutes is taken for that.
        let units = time.saturating_sub(self.last).as_nanos() / Times::UNIT.as_nanos();
        let gap = u32::try_from(units).unwrap_or(u32::MAX);
        self.gaps.push(gap);
        self.last += Times::UNIT * gap;
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.gaps.len() + usize::from(self.first.is_some())
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    /// The first one.
    #[must_use]
    pub fn first(&self) -> Option<Duration> {
        self.first
    }

    /// The last one.
    #[must_use]
    pub fn last(&self) -> Option<Duration> {
        self.first.map(|_| self.last)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = Duration> {
        let mut time = self.first.unwrap_or_default();
        let later = self.gaps.iter().map(move |&gap| {
            time += Times::UNIT * gap;
            time
        });
        self.first.into_iter().chain(later)
    }
}

impl FromIterator<Duration> for Times {
    fn from_iter<I: IntoIterator<Item = Duration>>(times: I) -> Self {
        let mut all = Times::default();
        times.into_iter().for_each(|time| all.push(time));
        all
    }
}

impl Target {
    /// The server at `url`, with or without `/v1` at its end.
    ///
    /// # Errors
    /// If that is not the address of a server, or asks for encryption.
    pub fn new(url: &str, key: Option<String>) -> Result<Self, ClientError> {
        let wrong = |https| ClientError::Url { url: url.to_owned(), https };
        let uri: Uri = url.parse().map_err(|_| wrong(false))?;
        if uri.scheme_str() != Some("http") {
            return Err(wrong(uri.scheme_str() == Some("https")));
        }
        let host = uri.host().ok_or_else(|| wrong(false))?;
        let path = uri.path().trim_end_matches('/');
        let prefix = path.strip_suffix("/v1").unwrap_or(path).to_owned();
        Ok(Target { address: format!("{host}:{}", uri.port_u16().unwrap_or(80)), prefix, key })
    }

    /// The name of the first model that the server has.
    ///
    /// # Errors
    /// If it does not say.
    pub fn model(&self) -> Result<String, ClientError> {
        let path = "/v1/models";
        let models = runtime(self)?.block_on(async {
            let response = self.send(Method::GET, path, None).await?;
            self.json(path, response).await
        })?;
        let name = models["data"][0]["id"].as_str().map(str::to_owned);
        name.ok_or_else(|| ClientError::Answer { path: path.to_owned(), detail: format!("no model in {models}") })
    }

    /// Sends requests, each at its time but at most `concurrency` at once, and waits for all answers. They come in the order
    /// of the requests.
    ///
    /// # Errors
    /// If no thread can be started. The error of a request that was not answered is in the list.
    pub fn measure(
        &self,
        model: &str,
        asks: Vec<Ask>,
        concurrency: usize,
    ) -> Result<Vec<Result<Answered, ClientError>>, ClientError> {
        let places = Arc::new(Semaphore::new(concurrency.min(Semaphore::MAX_PERMITS)));
        runtime(self)?.block_on(async {
            let start = Instant::now();
            let mut answers = Vec::with_capacity(asks.len());
            for ask in asks {
                tokio::time::sleep_until((start + ask.at).into()).await;
                let (target, model, places) = (self.clone(), model.to_owned(), places.clone());
                answers.push(tokio::spawn(async move {
                    let _place = places.acquire().await;
                    target.complete(&model, &ask, start).await
                }));
            }
            let mut all = Vec::with_capacity(answers.len());
            for answer in answers {
                all.push(answer.await.map_err(|error| self.broken(&error))?);
            }
            Ok(all)
        })
    }

    /// Asks for one completion as a stream, and notes when its tokens come. A chunk brings tokens if the server counts more
    /// than before it, or if the server counts them only at the end and the chunk has text.
    async fn complete(&self, model: &str, ask: &Ask, start: Instant) -> Result<Answered, ClientError> {
        let path = "/v1/completions";
        let body = json!({
            "model": model, "prompt": ask.prompt, "max_tokens": ask.max_tokens, "temperature": 0, "ignore_eos": true,
            "stream": true, "stream_options": { "include_usage": true, "continuous_usage_stats": true },
        });
        let sent = start.elapsed();
        let mut response = self.send(Method::POST, path, Some(body)).await?;
        if !response.status().is_success() {
            return Err(self.refused(path, response).await);
        }
        let wrong = |detail: String| ClientError::Answer { path: path.to_owned(), detail };
        let mut answered = Answered { sent, ..Answered::default() };
        let (mut rest, mut is_whole, mut counts) = (Vec::new(), false, false);
        while let Some(frame) = response.body_mut().frame().await {
            let frame = frame.map_err(|error| self.broken(&error))?;
            let now = start.elapsed();
            rest.extend_from_slice(frame.data_ref().map(AsRef::as_ref).unwrap_or_default());
            while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                let Some(data) = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii) else { continue };
                if data == b"[DONE]" {
                    is_whole = true;
                    continue;
                }
                let chunk: Value = serde_json::from_slice(data).map_err(|error| wrong(error.to_string()))?;
                if let Some(error) = chunk.get("error") {
                    return Err(wrong(error["message"].as_str().unwrap_or("an error").to_owned()));
                }
                let counted = chunk["usage"]["completion_tokens"].as_u64();
                let counted = counted.map(|tokens| usize::try_from(tokens).unwrap_or(usize::MAX));
                // A first count in the last chunk is of the whole answer, not of what came with it.
                let is_last = chunk["choices"][0]["finish_reason"].is_string();
                counts |= counted.is_some() && !is_last;
                let brings_tokens = chunk["choices"][0]["text"].as_str().is_some_and(|text| match counted {
                    Some(tokens) if counts || answered.came.is_empty() => tokens > answered.tokens,
                    _ => !text.is_empty(),
                });
                if brings_tokens {
                    answered.came.push(now);
                }
                answered.tokens = counted.unwrap_or(answered.tokens);
            }
        }
        if !is_whole || answered.came.is_empty() {
            return Err(wrong("the stream ended before the answer was complete".to_owned()));
        }
        Ok(answered)
    }

    /// Sends a request over a connection of its own.
    async fn send(&self, method: Method, path: &str, body: Option<Value>) -> Result<Response<Incoming>, ClientError> {
        let stream = TcpStream::connect(&self.address).await.map_err(|error| self.broken(&error))?;
        stream.set_nodelay(true).map_err(|error| self.broken(&error))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.broken(&error))?;
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.prefix));
        request = request.header(header::HOST, &self.address).header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let request = request.body(Full::new(Bytes::from(body))).map_err(|error| self.broken(&error))?;
        sender.send_request(request).await.map_err(|error| self.broken(&error))
    }

    /// Reads a JSON body.
    async fn json(&self, path: &str, response: Response<Incoming>) -> Result<Value, ClientError> {
        if !response.status().is_success() {
            return Err(self.refused(path, response).await);
        }
        let body = self.text(response).await?;
        serde_json::from_str(&body)
            .map_err(|error| ClientError::Answer { path: path.to_owned(), detail: error.to_string() })
    }

    /// The error that an answer is.
    async fn refused(&self, path: &str, response: Response<Incoming>) -> ClientError {
        let status = response.status().as_u16();
        let body = self.text(response).await.unwrap_or_default();
        let said = serde_json::from_str::<Value>(&body).ok();
        let message = said.as_ref().and_then(|body| body["error"]["message"].as_str()).unwrap_or(&body).to_owned();
        ClientError::Status { path: path.to_owned(), status, message }
    }

    async fn text(&self, response: Response<Incoming>) -> Result<String, ClientError> {
        let body = http_body_util::Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        let body = body.map_err(|error| self.broken(&error))?;
        Ok(String::from_utf8_lossy(&body.to_bytes()).into_owned())
    }

    fn broken(&self, error: &dyn std::fmt::Display) -> ClientError {
        ClientError::Connection { address: self.address.clone(), detail: error.to_string() }
    }
}

fn runtime(target: &Target) -> Result<tokio::runtime::Runtime, ClientError> {
    let runtime = Builder::new_multi_thread().worker_threads(THREADS).enable_all().build();
    runtime.map_err(|error| target.broken(&error))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    /// What is measured of a server that streams these chunks.
    fn measured(chunks: &[Value]) -> Answered {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let target = Target::new(&format!("http://{}", listener.local_addr().unwrap()), None).unwrap();
        let ask = Ask { at: Duration::ZERO, prompt: vec![1], max_tokens: 4 };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                let (mut asked, mut some) = (String::new(), [0; 4096]);
                while !asked.ends_with("}") {
                    let read = stream.read(&mut some).unwrap();
                    asked += std::str::from_utf8(&some[..read]).unwrap();
                }
                let mut answer = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n".to_owned();
                chunks.iter().for_each(|chunk| answer += &format!("data: {chunk}\n\n"));
                stream.write_all((answer + "data: [DONE]\n\n").as_bytes()).unwrap();
            });
            target.measure("m", vec![ask], 1).unwrap().remove(0).unwrap()
        })
    }

    #[test]
    fn times_are_kept_to_a_tenth_of_a_microsecond() {
        let times = [50_000_049, 50_000_099, 50_000_251, 600_000_000_000].map(Duration::from_nanos);
        let kept: Times = times.into_iter().collect();
        assert_eq!((kept.len(), kept.is_empty(), Times::default().is_empty()), (4, false, true));
        let all: Vec<u128> = kept.iter().map(|time| time.as_nanos()).collect();
        // Gaps end at 2^32 units.
        assert_eq!(all, [50_000_049, 50_000_049, 50_000_249, 429_546_729_749]);
        let ends = [kept.first(), kept.last()].map(|time| time.map_or(0, |time| time.as_nanos()));
        assert_eq!(ends, [all[0], all[3]]);
    }

    #[test]
    fn what_brings_tokens_is_the_servers_count_or_else_text() {
        let text = |text: &str, usage: Value| json!({"choices": [{"text": text}], "usage": usage});
        let used = |tokens: usize| json!({"completion_tokens": tokens});
        let counted =
            [text("", used(0)), text("a", used(1)), text("", used(2)), text("bc", used(4)), text("", used(4))];
        let answered = measured(&counted);
        assert_eq!((answered.came.len(), answered.tokens), (3, 4));
        let at_the_end = json!({"choices": [], "usage": used(3)});
        let answered = measured(&[text("a", Value::Null), text("", Value::Null), text("b", Value::Null), at_the_end]);
        assert_eq!((answered.came.len(), answered.tokens), (2, 3));
        let last = json!({"choices": [{"text": "", "finish_reason": "stop"}], "usage": used(2)});
        let answered = measured(&[text("a", Value::Null), text("b", Value::Null), last]);
        assert_eq!((answered.came.len(), answered.tokens), (2, 2));
    }

    #[test]
    fn addresses_are_read_and_others_refused() {
        let read = |url: &str| Target::new(url, None).map(|target| (target.address, target.prefix));
        let at = |address: &str, prefix: &str| (address.to_owned(), prefix.to_owned());
        assert_eq!(read("http://localhost:8000").unwrap(), at("localhost:8000", ""));
        assert_eq!(read("http://localhost:8000/v1/").unwrap(), at("localhost:8000", ""));
        assert_eq!(read("http://[::1]/model/v1").unwrap(), at("[::1]:80", "/model"));
        let said = |url| read(url).unwrap_err().to_string();
        insta::assert_snapshot!(said("https://localhost"), @"https://localhost is not the address of a server: expected http://HOST:PORT; HTTPS is not spoken here");
        insta::assert_snapshot!(said("localhost:8000"), @"localhost:8000 is not the address of a server: expected http://HOST:PORT");
        insta::assert_snapshot!(said(""), @" is not the address of a server: expected http://HOST:PORT");
    }
}
