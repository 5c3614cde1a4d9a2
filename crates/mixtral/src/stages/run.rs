//! `mixtral run`: an engine and prompts → text.

use std::io::Write;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use mixtral_engine::EngineDir;
use mixtral_model::TokenId;
use mixtral_runtime::session::{Capabilities, StepStats};
use mixtral_runtime::{BadWords, Request, Session, SessionOptions, Tokenizer};
use serde_json::json;

use crate::args::Usage;
use crate::args::request::RequestArgs;
use crate::args::run::{RunArgs, RunOptions};
use crate::run::chat::Chat;
use crate::run::job::{self, Job};
use crate::run::load::LoadOptions;
use crate::run::outputs::{Output, Printed, Streaming, ids_text, logits_path, write_csv, write_f32, write_npy};
use crate::run::prompts::{self, Encoder, Prompt};
use crate::run::report::{Profile, Stats, expert_table, logits_hash};
use crate::run::tokenizer::{end_ids, tokenizer};
use crate::say;

/// Tokens between two prints of a stream, unless a flag says otherwise.
const STREAMING_INTERVAL: usize = 5;

/// Measured iterations of `--run-profiling`. As many run before them to warm up.
const PROFILING_ITERATIONS: u32 = 10;

/// Runs the stage: either all ranks of the engine, as threads of this process, or the one rank that a launcher started
/// this process for.
pub fn main(options: &RunOptions) -> Result<()> {
    let args = &options.args;
    check_output_paths(args)?;
    let engine = EngineDir::open(&args.model.engine_dir)?;
    let load = LoadOptions {
        place: args.model.place,
        count_experts: args.expert_stats,
        time_ops: false,
        graphs: true,
        windows: &args.max_attention_window_size,
    };
    job::run(&engine, load, |job| lead(options, &engine, job))
}

/// The work of rank 0. It alone reads prompts and writes results.
fn lead(options: &RunOptions, engine: &EngineDir, job: &Job<'_>) -> Result<()> {
    let args = &options.args;
    let texts = prompts::are_texts(&options.prompts) || !args.words.stop.is_empty() || !args.words.bad.is_empty();
    let tokenizer = tokenizer(&args.model, texts)?;
    let chat = args.chat || prompts::are_messages(&options.prompts)?;
    let chat = chat.then(|| Chat::load(&args.template, args.model.tokenizer_dir())).transpose()?;
    let special = !args.no_add_special_tokens;
    let encoder = Encoder { tokenizer: tokenizer.as_deref(), chat: chat.as_ref(), turns: args.chat, special };
    let prompts = prompts::read(&options.prompts, encoder, args.max_input_length)?;
    let capabilities = job.capabilities();
    let asked = asked(args, &prompts)?;
    check_against_engine(&asked, engine)?;
    warn_of_windows(args, &asked, engine, &prompts);
    let requests = requests(options, &asked, &prompts, tokenizer.as_deref(), capabilities.gather_context_logits)?;
    let session_options = args.step.of(SessionOptions {
        policy: args.scheduler_policy.into(),
        block_reuse: args.kv_cache_enable_block_reuse,
        host_blocks: job.host_blocks(),
        ..SessionOptions::default()
    });
    let mut session = job.session(&requests, session_options, tokenizer)?;
    let mut out = std::io::stdout().lock();

    let stream = args.streaming.then(|| Streaming {
        interval: args.streaming_interval.unwrap_or(STREAMING_INTERVAL),
        whole: args.streaming_whole,
        printed: vec![Printed::default(); requests.len()],
    });
    let (outputs, steps) = generate(&mut session, &requests, args, stream, &mut out)?;

    let failed = outputs.iter().find_map(|o| Some((o.prompt, o.failed.clone()?)));
    let failed = failed.map_or(Ok(()), |(prompt, error)| Err(error).context(format!("prompt {prompt}")));
    if outputs.iter().all(|output| output.failed.is_some()) {
        return failed;
    }

    let stats =
        (args.stats || args.json).then(|| Stats::new(job.program(), &steps, &outputs, session.stats().counters));
    let hash = args.logits_hash.then(|| logits_hash(&outputs));
    let counts = args.expert_stats.then(|| session.expert_counts()).transpose()?;
    if args.json {
        let prompts: Vec<_> = prompts
            .iter()
            .enumerate()
            .map(|(index, prompt)| {
                let of_prompt: Vec<_> = outputs.iter().filter(|o| o.prompt == index).map(Output::record).collect();
                json!({ "text": prompt.text, "ids": prompt.ids, "outputs": of_prompt })
            })
            .collect();
        let mut object = json!({ "engine": engine.config().run_id, "prompts": prompts, "stats": stats });
        if let Some(hash) = hash {
            object["logits_hash"] = json!(hash);
        }
        if let Some(counts) = counts {
            object["expert_counts"] = json!(counts);
        }
        if args.run_profiling {
            object["profiling"] = json!(profile(&mut session, &requests, args)?);
        }
        writeln!(out, "{object:#}")?;
    } else {
        if !args.streaming {
            print_outputs(&mut out, &prompts, &outputs)?;
        }
        if let Some(stats) = &stats {
            writeln!(out, "{stats}")?;
        }
        if let Some(hash) = &hash {
            writeln!(out, "logits        {hash}")?;
        }
        if let Some(counts) = &counts {
            write!(out, "{}", expert_table(counts))?;
        }
        if args.run_profiling {
            writeln!(out, "{}", profile(&mut session, &requests, args)?)?;
        }
    }
    write_files(args, &asked, &prompts, &outputs, &capabilities)?;
    failed
}

/// The flags of each prompt's request: those of the command line, changed by what the request says itself.
fn asked(args: &RunArgs, prompts: &[Prompt]) -> Result<Vec<RequestArgs>> {
    let of = |(index, prompt): (usize, &Prompt)| match &prompt.own {
        None => Ok(args.request.clone()),
        Some(own) => {
            let asked = args.request.changed_by(&own.flags).map_err(|Usage(why)| anyhow!("request {index}: {why}"))?;
            if asked.num_return_sequences > 1 && args.beams.num_beams > 1 {
                bail!("request {index}: a beam search has as many outputs as beams; leave out num_return_sequences");
            }
            Ok(asked)
        }
    };
    prompts.iter().enumerate().map(of).collect()
}

/// Checks the flags that depend on the engine.
fn check_against_engine(asked: &[RequestArgs], engine: &EngineDir) -> Result<()> {
    let model = &engine.config().model;
    let vocab_size = model.vocab_size;
    let is_past = |id: i64| usize::try_from(id).is_ok_and(|id| id >= vocab_size);
    if let Some(bias) = asked.iter().flat_map(|asked| &asked.logit_bias).find(|bias| is_past(bias.id.into())) {
        bail!(
            "--logit-bias {}: the model's vocabulary has {vocab_size} entries, so ids end at {}",
            bias.id,
            vocab_size - 1
        );
    }
    if let Some(id) = asked.iter().filter_map(|asked| asked.end_id).find(|&id| is_past(id)) {
        bail!(
            "--end-id {id}: the model's vocabulary has {vocab_size} entries, so ids end at {}; -1 is none",
            vocab_size - 1
        );
    }
    Ok(())
}

/// Says which of the windows of attention that were asked for change nothing.
fn warn_of_windows(args: &RunArgs, asked: &[RequestArgs], engine: &EngineDir, prompts: &[Prompt]) {
    let window = engine.config().model.sliding_window;
    let longest =
        prompts.iter().zip(asked).map(|(p, asked)| p.ids.len().saturating_add(asked.max_output_len)).max().unwrap_or(0);
    for &asked in &args.max_attention_window_size {
        if asked >= longest || window.is_some_and(|window| asked >= window) {
            say::warning(format_args!(
                "--max-attention-window-size {asked} changes nothing: attention sees no more than that anyway"
            ));
        }
    }
}

/// Checks that the outputs can be written, so that an error comes before the work and not after it.
fn check_output_paths(args: &RunArgs) -> Result<()> {
    let files = [
        &args.output_csv,
        &args.output_npy,
        &args.output_logits_npy,
        &args.output_log_probs_npy,
        &args.output_cum_log_probs_npy,
    ];
    for path in files.into_iter().flatten() {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        if let Some(dir) = dir.filter(|dir| !dir.is_dir()) {
            bail!("cannot write {}: there is no directory {}; create it first", path.display(), dir.display());
        }
    }
    Ok(())
}

fn requests(
    options: &RunOptions,
    asked: &[RequestArgs],
    prompts: &[Prompt],
    tokenizer: Option<&Tokenizer>,
    gathers: bool,
) -> Result<Vec<Request>> {
    let args = &options.args;
    let models = end_ids(&args.model.engine_dir, args.model.tokenizer_dir.as_deref(), tokenizer)?;
    let usage = |Usage(message)| anyhow!(message);
    let stop_words = args.words.stop.for_prompts(prompts.len()).map_err(usage)?;
    let bad_words = args.words.bad.for_prompts(prompts.len()).map_err(usage)?;
    let logits = args.output_logits_npy.is_some();
    // The answers of a beam search have their log-probabilities anyway.
    let scored =
        options.beams.is_none() && (args.output_log_probs_npy.is_some() || args.output_cum_log_probs_npy.is_some());
    let mut requests = Vec::new();
    for (index, (prompt, asked)) in prompts.iter().zip(asked).enumerate() {
        let own = prompt.own.as_ref();
        let stop_words = own.and_then(|own| own.stop_words.as_deref()).unwrap_or(stop_words[index]);
        let bad_words = own.and_then(|own| own.bad_words.as_deref()).unwrap_or(bad_words[index]);
        let bad_words = Arc::new(tokenizer.map_or_else(BadWords::default, |t| BadWords::new(bad_words, t)));
        let end_ids = match asked.end_id {
            // −1 means that no token ends a sequence.
            Some(id) => u32::try_from(id).map(TokenId).into_iter().collect(),
            None => models.clone(),
        };
        for hypothesis in 0..asked.num_return_sequences {
            requests.push(Request {
                prompt: prompt.ids.clone(),
                max_output_len: asked.max_output_len,
                params: asked.sampling.params(),
                seed: asked.sampling.random_seed,
                prompt_index: u32::try_from(index)?,
                hypothesis: u32::try_from(hypothesis)?,
                end_ids: end_ids.clone(),
                stop_words: stop_words.to_vec(),
                bad_words: bad_words.clone(),
                min_output_len: asked.min_length,
                no_repeat_ngram_size: asked.no_repeat_ngram_size,
                logit_bias: asked.logit_bias.iter().map(|bias| (TokenId(bias.id), bias.bias)).collect(),
                beams: options.beams,
                logprobs: scored.then_some(0),
                generation_logits: logits || args.logits_hash,
                context_logits: logits && gathers && hypothesis == 0,
                ..Request::default()
            });
        }
    }
    Ok(requests)
}

/// Generates all requests as one batch in flight. With `--streaming` it prints outputs as they grow.
fn generate(
    session: &mut Session,
    requests: &[Request],
    args: &RunArgs,
    mut stream: Option<Streaming>,
    out: &mut dyn Write,
) -> Result<(Vec<Output>, Vec<StepStats>)> {
    let mut first = None;
    for request in requests {
        let id = session.submit(request.clone()).with_context(|| format!("prompt {}", request.prompt_index))?;
        first.get_or_insert(id.0);
    }
    let first = first.unwrap_or(0);
    let text = session.makes_text().then(String::new);
    let width = args.beams.num_beams;
    let output = |request: &Request, beam: usize| Output {
        prompt: request.prompt_index as usize,
        beam: request.hypothesis as usize + beam,
        text: text.clone(),
        ..Output::default()
    };
    let mut outputs: Vec<Output> = requests.iter().flat_map(|r| (0..width).map(move |beam| output(r, beam))).collect();
    let mut steps = Vec::new();
    while !session.is_idle() {
        let events = session.step()?;
        // A step in which all sequences had ended already has none of the outputs' tokens.
        steps.extend(Some(session.last_step()).filter(|step| step.prefill_tokens + step.decode_tokens > 0));
        for event in events {
            let index = width * (event.id.0 - first);
            for (output, answer) in outputs[index..][..width].iter_mut().zip(&event.beams) {
                output.answer(answer, event.finished);
            }
            if let Some(error) = &event.failed {
                outputs[index..][..width].iter_mut().for_each(|output| output.failed = Some(error.clone()));
            }
            let output = &mut outputs[index];
            output.add(&event);
            output.context_logits.extend(event.context_logits);
            if args.logits_hash {
                output.logits_hash.update(bytemuck::cast_slice(&event.generation_logits));
            }
            if args.output_logits_npy.is_some() {
                output.generation_logits.extend(event.generation_logits);
            }
            if let (Some(stream), Some(_)) = (&mut stream, event.token) {
                stream.print(index, output, out)?;
            }
        }
    }
    Ok((outputs, steps))
}

fn print_outputs(out: &mut dyn Write, prompts: &[Prompt], outputs: &[Output]) -> Result<()> {
    for (index, prompt) in prompts.iter().enumerate() {
        match &prompt.text {
            Some(text) => writeln!(out, "Input [Text {index}]: \"{text}\"")?,
            None => writeln!(out, "Input [Text {index}]: {}", ids_text(&prompt.ids))?,
        }
        for output in outputs.iter().filter(|o| o.prompt == index) {
            output.print(out, Printed::default())?;
        }
    }
    Ok(())
}

fn write_files(
    args: &RunArgs,
    asked: &[RequestArgs],
    prompts: &[Prompt],
    outputs: &[Output],
    capabilities: &Capabilities,
) -> Result<()> {
    let longest_output = asked.iter().map(|asked| asked.max_output_len).max().unwrap_or(0);
    if let Some(path) = &args.output_csv {
        write_csv(path, outputs)?;
    }
    if let Some(path) = &args.output_npy {
        write_npy(path, outputs, longest_output)?;
    }
    if let Some(path) = &args.output_log_probs_npy {
        write_f32(path, outputs.iter().map(|o| &o.logprobs[..]), &[longest_output])?;
    }
    if let Some(path) = &args.output_cum_log_probs_npy {
        let sums: Vec<[f32; 1]> = outputs.iter().map(|o| [o.logprobs.iter().sum()]).collect();
        write_f32(path, sums.iter().map(|sum| &sum[..]), &[])?;
    }
    if let Some(stem) = &args.output_logits_npy {
        let vocab_size = capabilities.vocab_size;
        let generated = outputs.iter().map(|o| &o.generation_logits[..]);
        write_f32(&logits_path(stem, "generation"), generated, &[longest_output, vocab_size])?;
        if capabilities.gather_context_logits {
            let longest = prompts.iter().map(|p| p.ids.len()).max().unwrap_or(0);
            let first: Vec<&[f32]> = outputs.iter().filter(|o| o.beam == 0).map(|o| &o.context_logits[..]).collect();
            write_f32(&logits_path(stem, "context"), first.into_iter(), &[longest, vocab_size])?;
        }
    }
    Ok(())
}

/// Measures the mean latency of all requests together, after the iterations that warm up.
fn profile(session: &mut Session, requests: &[Request], args: &RunArgs) -> Result<Profile> {
    let mut sink = std::io::sink();
    let mut seconds = 0.0;
    for iteration in 0..2 * PROFILING_ITERATIONS {
        let started = std::time::Instant::now();
        generate(session, requests, args, None, &mut sink)?;
        if iteration >= PROFILING_ITERATIONS {
            seconds += started.elapsed().as_secs_f64();
        }
    }
    Ok(Profile {
        batch_size: requests.len(),
        iterations: PROFILING_ITERATIONS,
        mean_latency_s: seconds / f64::from(PROFILING_ITERATIONS),
    })
}
