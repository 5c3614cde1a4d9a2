//! `mixtral serve`: an engine → answers over HTTP.

use std::io::Write;
use std::sync::Arc;

use anyhow::Result;
use mixtral_comm::Launch;
use mixtral_engine::EngineDir;
use mixtral_runtime::{Policy, SessionOptions};
use mixtral_serve::{Options, Server};
use mixtral_tokenizer::{ChatTemplate, Tokenizer};

use crate::args::serve::{LogFormat, ServeArgs, ServeOptions};
use crate::run::job::{self, Job};
use crate::run::load::LoadOptions;
use crate::run::tokenizer::end_ids;
use crate::{interrupt, say};

/// Runs the stage.
pub fn main(options: &ServeOptions) -> Result<()> {
    let args = &options.args;
    log(args.log_format);
    let engine = EngineDir::open(&args.engine_dir)?;
    // Whoever stops the server may tell all of its processes. Rank 0 ends the others when it has finished.
    let launch = Launch::detect(&|name| std::env::var(name).ok())?;
    if matches!(launch, Launch::Process(process) if process.rank > 0) {
        interrupt::on_first(|| true)?;
    }
    let load = LoadOptions { place: args.place, count_experts: false, time_ops: false, graphs: true, windows: &[] };
    job::run_through_signals(&engine, load, |job| lead(options, job))
}

/// The work of rank 0. It alone talks to clients.
fn lead(options: &ServeOptions, job: &Job<'_>) -> Result<()> {
    let args = &options.args;
    let tokenizer = Arc::new(Tokenizer::load(args.tokenizer_dir.as_ref().unwrap_or(&args.engine_dir))?);
    let served = Options {
        address: options.address,
        model_names: names(args),
        keys: options.keys.clone(),
        end_ids: end_ids(&args.engine_dir, args.tokenizer_dir.as_deref(), Some(&tokenizer))?,
        chat_template: chat_template(args)?.map(Arc::new),
        bounds: options.bounds,
    };
    let server = Server::start(served, job.capabilities(), tokenizer.clone())?;
    let address = server.address();
    if !address.ip().is_loopback() && options.keys.is_empty() {
        say::warning(format_args!(
            "anybody who reaches {address} can use this server; give --api-key-file, and let a proxy encrypt what is sent"
        ));
    }
    let stopper = server.stopper();
    interrupt::on_first(move || stopper.stop())?;
    // Whoever started the server reads the address, so it is printed whatever the level of messages is.
    writeln!(std::io::stdout(), "listening on http://{address}")?;
    let session = say::timed("loading", || job.largest_session(args.step.of(session_options(job)), Some(tokenizer)))?;
    say::note("ready");
    Ok(server.run(session, || job.check().map_err(|error| error.to_string()))?)
}

/// Prompts share the cache's blocks, and sequences join as soon as there are blocks for their prompts: most answers end
/// before they are as long as they may be. When blocks run out, the youngest sequence waits in the host's memory.
fn session_options(job: &Job<'_>) -> SessionOptions {
    SessionOptions {
        policy: Policy::MaxUtilization,
        block_reuse: true,
        host_blocks: job.host_blocks(),
        ..SessionOptions::default()
    }
}

/// The chat template that the flag names, or else that of the tokenizer's directory.
fn chat_template(args: &ServeArgs) -> Result<Option<ChatTemplate>> {
    let dir = args.tokenizer_dir.as_ref().unwrap_or(&args.engine_dir);
    Ok(match &args.chat_template {
        Some(file) => Some(ChatTemplate::from_file(file, dir)?),
        None => ChatTemplate::load(dir)?,
    })
}

/// The names of the model for clients.
fn names(args: &ServeArgs) -> Vec<String> {
    if !args.served_model_name.is_empty() {
        return args.served_model_name.clone();
    }
    let dir = args.engine_dir.canonicalize().unwrap_or_else(|_| args.engine_dir.clone());
    vec![dir.file_name().map_or_else(|| "engine".to_owned(), |name| name.to_string_lossy().into_owned())]
}

/// Writes the server's log to stderr, at the level of the other messages.
fn log(format: LogFormat) {
    let level = if say::shows(say::Level::Verbose) {
        tracing::Level::DEBUG
    } else if say::shows(say::Level::Normal) {
        tracing::Level::INFO
    } else {
        tracing::Level::ERROR
    };
    let lines = tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_target(false);
    // It only fails if there is a log already.
    let _ = match format {
        LogFormat::Text => lines.with_ansi(false).try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
}
