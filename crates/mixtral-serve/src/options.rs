//! What is served, to whom, and how much anyone may ask for.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mixtral_model::TokenId;
use mixtral_tokenizer::ChatTemplate;

use crate::keys::Keys;

/// What a server is started with.
#[derive(Clone)]
pub struct Options {
    /// Where it listens; port 0 takes a free one.
    pub address: SocketAddr,
    /// The names that clients may give the model; at least one. Answers carry the first.
    pub model_names: Vec<String>,
    /// Who may use it.
    pub keys: Keys,
    /// The tokens that end the model's sequences.
    pub end_ids: Vec<TokenId>,
    /// How a conversation becomes a prompt; without it, there is no chat.
    pub chat_template: Option<Arc<ChatTemplate>>,
    /// Bounds on what clients send.
    pub bounds: Bounds,
}

/// Bounds on size, number and time.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The most bytes of a request's body.
    pub body_bytes: usize,
    /// The most sequences that wait while as many as the engine takes are running.
    pub waiting: usize,
    /// The most open connections. More have to wait until one closes.
    pub connections: usize,
    /// How long a client may take to send a request's head, or a body; and how long a connection may be idle.
    pub receive: Duration,
    /// How long a sequence may take, from its submission to its last token.
    pub answer: Duration,
    /// How long running sequences may go on after the server was told to stop.
    pub drain: Duration,
}

/// The most prompts in a request.
pub const MAX_PROMPTS: usize = 256;
/// The most answers to a prompt.
pub const MAX_CHOICES: usize = 128;
/// The most texts that end an answer, and the most bytes of one.
pub const MAX_STOPS: usize = 32;
/// The most bytes of a text that ends an answer.
pub const MAX_STOP_BYTES: usize = 1024;
pub use mixtral_runtime::request::MAX_LOGPROBS;
/// The most tokens with a bias.
pub const MAX_BIASED: usize = 1024;
