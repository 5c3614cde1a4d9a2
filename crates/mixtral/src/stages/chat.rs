//! `mixtral chat`: a conversation with a model, turn by turn.

use std::io::{Write, stdout};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mixtral_engine::EngineDir;
use mixtral_runtime::{BadWords, Request, RequestId, Session, SessionOptions, Tokenizer};
use serde_json::Value;
use signal_hook::consts::SIGINT;
use signal_hook::flag;

use crate::args::chat::ChatOptions;
use crate::args::{Usage, chain};
use crate::run::cache::Wanted;
use crate::run::chat::{Chat, message};
use crate::run::job::{self, Job};
use crate::run::lines::{Line, Lines};
use crate::run::load::LoadOptions;
use crate::run::report::{f, ratio};
use crate::run::tokenizer::{end_ids, required_tokenizer};
use crate::say;

/// Runs the stage.
pub fn main(options: &ChatOptions) -> Result<()> {
    let model = &options.args.model;
    let engine = EngineDir::open(&model.engine_dir)?;
    let load = LoadOptions { place: model.place, count_experts: false, time_ops: false, graphs: true, windows: &[] };
    job::run(&engine, load, |job| lead(options, job))
}

/// The work of rank 0. It alone talks to the user.
fn lead(options: &ChatOptions, job: &Job<'_>) -> Result<()> {
    let args = &options.args;
    let dir = args.model.tokenizer_dir();
    let chat = Chat::load(&args.template, dir)?;
    let tokenizer = required_tokenizer(dir)?;
    let limits = job.capabilities().limits;
    let request = request(options, &tokenizer)?;
    let blocks = limits.max_blocks_per_seq();
    // The blocks of the conversation so far stay in the cache, so that a turn computes only what is new.
    let options = args.step.of(SessionOptions { block_reuse: true, ..SessionOptions::default() });
    let session = job.session_with(
        Wanted { most: blocks, least: 1, longest: limits.max_seq_len },
        options,
        Some(tokenizer.clone()),
    )?;
    let mut lines = Lines::open()?;
    let on_terminal = matches!(lines, Lines::Terminal(_));
    let interrupts = Interrupts::watch(!on_terminal)?;
    let mut talk =
        Talk { chat, tokenizer, session, request, max_seq_len: limits.max_seq_len, interrupts, stats: args.stats };
    if on_terminal {
        say::note("/reset begins a new conversation; /exit or Ctrl-D ends this; Ctrl-C stops an answer");
    }
    let mut messages = talk.chat.opening();
    loop {
        let line = match lines.next()? {
            Line::Text(line) => line,
            Line::Interrupted => {
                say::note("/exit or Ctrl-D ends this");
                continue;
            }
            Line::End => return Ok(()),
        };
        match line.trim() {
            "" => {}
            "/exit" => return Ok(()),
            "/reset" => messages = talk.chat.opening(),
            _ => talk.turn(&mut messages, &line)?,
        }
    }
}

/// What all requests of a conversation have in common.
fn request(options: &ChatOptions, tokenizer: &Tokenizer) -> Result<Request> {
    let args = &options.args;
    let only = |Usage(message)| anyhow::anyhow!(message);
    let [stop_words] = args.words.stop.for_prompts(1).map_err(only)?[..] else {
        bail!("one conversation has one list")
    };
    let [bad_words] = args.words.bad.for_prompts(1).map_err(only)?[..] else { bail!("one conversation has one list") };
    Ok(Request {
        max_output_len: args.max_output_len,
        params: options.sampling,
        seed: args.sampling.random_seed,
        end_ids: end_ids(&args.model.engine_dir, args.model.tokenizer_dir.as_deref(), Some(tokenizer))?,
        stop_words: stop_words.to_vec(),
        bad_words: Arc::new(BadWords::new(bad_words, tokenizer)),
        ..Request::default()
    })
}

/// SIGINT. While the model answers, it ends the answer. While a line is read from a pipe, it ends the program. On a terminal
/// it never does: there Ctrl-C is a key of the line editor, and one that comes just after an answer changes nothing.
struct Interrupts {
    /// Whether a signal ends the program now.
    fatal: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    piped: bool,
}

impl Interrupts {
    /// From now on signals are caught. `piped` says whether lines come from a pipe. The first is read before an answer.
    fn watch(piped: bool) -> Result<Interrupts> {
        let (fatal, stop) = (Arc::new(AtomicBool::new(piped)), Arc::new(AtomicBool::new(false)));
        flag::register_conditional_shutdown(SIGINT, 128 + SIGINT, fatal.clone())
            .and_then(|_| flag::register(SIGINT, stop.clone()))
            .context("cannot listen for signals")?;
        Ok(Interrupts { fatal, stop, piped })
    }

    /// Does `work`, which asks now and then whether Ctrl-C came.
    fn answering<T>(&self, work: impl FnOnce(&AtomicBool) -> T) -> T {
        self.stop.store(false, Ordering::SeqCst);
        self.fatal.store(false, Ordering::SeqCst);
        let done = work(&self.stop);
        self.fatal.store(self.piped, Ordering::SeqCst);
        done
    }
}

/// A conversation's means.
struct Talk {
    chat: Chat,
    tokenizer: Arc<Tokenizer>,
    session: Session,
    request: Request,
    max_seq_len: usize,
    interrupts: Interrupts,
    stats: bool,
}

impl Talk {
    /// Answers a turn of the user, and adds both to the conversation. If the turn cannot be answered, it says why, and the
    /// conversation stays as it was.
    fn turn(&mut self, messages: &mut Vec<Value>, text: &str) -> Result<()> {
        messages.push(message("user", text));
        let prompt = match self.chat.answer(messages.clone(), &self.tokenizer) {
            Ok(prompt) => prompt.ids,
            Err(error) => {
                messages.pop();
                eprintln!("error: {}", chain(&error));
                return Ok(());
            }
        };
        let tokens = prompt.len();
        let max_output_len = self.request.max_output_len.min(self.max_seq_len.saturating_sub(tokens));
        // Each turn draws anew.
        let prompt_index = u32::try_from(messages.len())?;
        let submitted = match max_output_len {
            0 => Err(format!("the engine takes sequences of at most {}", self.max_seq_len)),
            _ => {
                let request = Request { prompt, max_output_len, prompt_index, ..self.request.clone() };
                self.session.submit(request).map_err(|refusal| refusal.to_string())
            }
        };
        let id = match submitted {
            Ok(id) => id,
            Err(why) => {
                messages.pop();
                eprintln!("error: the conversation has {tokens} tokens now: {why}; /reset begins a new one");
                return Ok(());
            }
        };
        let Talk { session, interrupts, .. } = self;
        let answer = interrupts.answering(|stop| Answer::print(session, id, stop))?;
        if self.stats {
            eprintln!("{}", answer.figures(tokens));
        }
        if answer.stopped && answer.text.is_empty() {
            messages.pop();
        } else {
            messages.push(message("assistant", &answer.text));
        }
        Ok(())
    }
}

/// An answer of the model, or what there is of it.
#[derive(Debug, Default)]
struct Answer {
    text: String,
    /// Whether Ctrl-C ended it.
    stopped: bool,
    /// Tokens generated.
    generated: usize,
    /// Tokens of the prompt that were computed, and not found in the cache.
    computed: usize,
    first_token: Duration,
    total: Duration,
}

impl Answer {
    /// Prints the answer to a request while it grows.
    fn print(session: &mut Session, id: RequestId, stop: &AtomicBool) -> Result<Answer> {
        let (mut out, mut answer, began) = (stdout().lock(), Answer::default(), Instant::now());
        while !session.is_idle() {
            if !answer.stopped && stop.load(Ordering::SeqCst) {
                answer.stopped = session.cancel(id);
                continue;
            }
            let events = session.step()?;
            answer.computed += session.last_step().prefill_tokens;
            for event in events {
                let event = event.ok()?;
                if event.token.is_some() && answer.generated == 0 {
                    answer.first_token = began.elapsed();
                }
                answer.generated += usize::from(event.token.is_some());
                if let Some(error) = &event.text_failed {
                    say::warning(format_args!("the answer's text ends early: {error}"));
                }
                out.write_all(event.text.as_bytes())?;
                out.flush()?;
                answer.text += &event.text;
            }
        }
        writeln!(out)?;
        answer.total = began.elapsed();
        Ok(answer)
    }

    /// What it took, for a prompt of that many tokens.
    fn figures(&self, tokens: usize) -> String {
        let Answer { generated, computed, first_token, total, .. } = self;
        let (first_ms, seconds) = (first_token.as_secs_f64() * 1e3, total.as_secs_f64());
        format!(
            "tokens        {tokens} of the conversation, {computed} of them computed; {generated} generated in {seconds:.3} s ({:.1} tok/s)\nfirst token   {first_ms:.2} ms",
            ratio(f(*generated), seconds)
        )
    }
}
