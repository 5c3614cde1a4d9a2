//! `mixtral serve`.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use mixtral_serve::{Bounds, Keys};

use super::numbers;
use super::place::{ENGINE, PlaceArgs};
use super::steps::StepArgs;
use super::{Usage, usage};

const SERVER: &str = "Server";
const BOUNDS: &str = "Bounds on what clients ask for";

/// The flags as they were typed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  mixtral serve --engine-dir ./engine
  mixtral serve --engine-dir ./engine --host 0.0.0.0 --api-key-file keys.txt --served-model-name mixtral-8x7b
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{\"model\": \"engine\", \"prompt\": \"Once\"}'")]
pub struct ServeArgs {
    /// Engine to serve
    #[arg(help_heading = ENGINE, long, default_value = "engine_outputs")]
    pub engine_dir: PathBuf,
    /// Directory of tokenizer.json [default: the engine's, which carries the model's]
    #[arg(help_heading = ENGINE, long)]
    pub tokenizer_dir: Option<PathBuf>,
    /// Chat template to use instead of the model's own
    #[arg(help_heading = ENGINE, long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    /// Where it runs.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// What a step holds, and when it is launched.
    #[command(flatten)]
    pub step: StepArgs,
    /// Address to listen on; 0.0.0.0 is all of this host's
    #[arg(help_heading = SERVER, long, default_value = "127.0.0.1")]
    pub host: String,
    /// Port to listen on; 0 is a free one, which is printed
    #[arg(help_heading = SERVER, long, default_value_t = 8000)]
    pub port: u16,
    /// Names of the model for clients; answers carry the first [default: the name of the engine's directory]
    #[arg(help_heading = SERVER, long, num_args = 1.., action = clap::ArgAction::Set, value_name = "NAME")]
    pub served_model_name: Vec<String>,
    /// Keys, one of which clients must send; the command line can be seen by others on this host
    #[arg(help_heading = SERVER, long, num_args = 1.., action = clap::ArgAction::Set, value_name = "KEY")]
    pub api_key: Vec<String>,
    /// File of such keys, one a line
    #[arg(help_heading = SERVER, long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// What the log's lines are
    #[arg(help_heading = SERVER, long, default_value = "text")]
    pub log_format: LogFormat,
    /// Sequences that may wait while as many as the engine takes are running; more are turned away
    #[arg(help_heading = BOUNDS, long, default_value_t = 1024, value_parser = numbers::waiting)]
    pub max_waiting: usize,
    /// Open connections; more have to wait
    #[arg(help_heading = BOUNDS, long, default_value_t = 16384, value_parser = numbers::connections)]
    pub max_connections: usize,
    /// Bytes of a request
    #[arg(help_heading = BOUNDS, long, default_value_t = 4 << 20, value_parser = numbers::body_bytes)]
    pub max_body_bytes: usize,
    /// Seconds that a client may take to send a request, or be silent between two
    #[arg(help_heading = BOUNDS, long, default_value_t = 30, value_name = "SECONDS", value_parser = numbers::seconds)]
    pub receive_timeout: usize,
    /// Seconds that an answer may take, waiting included
    #[arg(help_heading = BOUNDS, long, default_value_t = 3600, value_name = "SECONDS", value_parser = numbers::seconds)]
    pub answer_timeout: usize,
    /// Seconds that running answers may go on after SIGTERM
    #[arg(help_heading = BOUNDS, long, default_value_t = 60, value_name = "SECONDS", value_parser = numbers::seconds)]
    pub drain_timeout: usize,
}

/// What the log's lines are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Text to be read.
    Text,
    /// JSON objects.
    Json,
}

/// The validated options.
#[derive(Debug)]
pub struct ServeOptions {
    /// Everything that needs no check of its own.
    pub args: ServeArgs,
    /// Where to listen.
    pub address: SocketAddr,
    /// Who may use the server.
    pub keys: Keys,
    /// Bounds on what clients ask for.
    pub bounds: Bounds,
}

impl ServeArgs {
    /// Reads the address and the keys.
    pub fn validate(self) -> Result<ServeOptions, Usage> {
        let addresses = (self.host.as_str(), self.port).to_socket_addrs().map(|mut all| all.next());
        let address = match addresses {
            Ok(Some(address)) => address,
            Ok(None) => usage!("--host {}: it has no address", self.host),
            Err(error) => usage!("--host {}: {error}; give an address of this host, such as 127.0.0.1", self.host),
        };
        let mut keys = self.api_key.clone();
        if let Some(path) = &self.api_key_file {
            match std::fs::read_to_string(path) {
                Ok(text) => keys.extend(text.lines().map(|line| line.trim().to_owned()).filter(|key| !key.is_empty())),
                Err(error) => usage!("--api-key-file {}: {error}", path.display()),
            }
            if keys.is_empty() {
                usage!("--api-key-file {} has no key; write one a line", path.display());
            }
        }
        if keys.iter().any(|key| key.is_empty()) {
            usage!("--api-key is empty; leave it out to serve everybody");
        }
        let keys = Keys::new(keys.iter().map(String::as_str));
        let seconds = |n: usize| Duration::from_secs(n as u64);
        let bounds = Bounds {
            body_bytes: self.max_body_bytes,
            waiting: self.max_waiting,
            connections: self.max_connections,
            receive: seconds(self.receive_timeout),
            answer: seconds(self.answer_timeout),
            drain: seconds(self.drain_timeout),
        };
        Ok(ServeOptions { args: self, address, keys, bounds })
    }
}
