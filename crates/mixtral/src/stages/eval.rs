//! `mixtral eval`: how well one engine, or two side by side, predict a text or answer questions.

use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use mixtral_engine::{EngineDir, Limits};
use mixtral_runtime::{SessionOptions, Tokenizer};
use serde_json::{Value, json};

use crate::args::eval::{EvalOptions, Measure};
use crate::eval::choices::{self, Accuracy, Question};
use crate::eval::score::{Sequence, requests, sums};
use crate::eval::text::{Perplexity, windows};
use crate::run::job::{self, Job};
use crate::run::load::LoadOptions;
use crate::run::prompt_files::whole_text;
use crate::say;

/// Tokens of a window, unless a flag says otherwise or the engine takes fewer.
const CONTEXT: usize = 2048;

/// Runs the stage: the engines one after another, each with all its ranks.
pub fn main(options: &EvalOptions) -> Result<()> {
    let args = &options.args;
    let engines: Vec<EngineDir> = args.engine_dir.iter().map(|dir| EngineDir::open(dir)).collect::<Result<_, _>>()?;
    let limits: Vec<Limits> = engines.iter().map(|engine| engine.config().limits).collect();
    let tokenizer = Tokenizer::load(args.tokenizer_dir())?;
    let task = Task::read(options, &tokenizer, limits.iter().map(|limits| limits.max_seq_len).min().unwrap_or(0))?;
    let found: Mutex<Vec<Found>> = Mutex::default();
    for engine in &engines {
        let load = LoadOptions { place: args.place, count_experts: false, time_ops: false, graphs: true, windows: &[] };
        job::run(engine, load, |job| {
            let result = task.measure(job)?;
            found.lock().unwrap_or_else(PoisonError::into_inner).push(result);
            Ok(())
        })?;
    }
    // Only rank 0 has results, and only it prints.
    let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut out = std::io::stdout().lock();
    if args.json && !found.is_empty() {
        writeln!(out, "{:#}", json(&engines, &found)?)?;
    } else {
        for (engine, found) in engines.iter().zip(&found) {
            writeln!(out, "{}: {found}", engine.dir().display())?;
        }
        if let [Found::Perplexity(first), Found::Perplexity(second)] = &found[..] {
            let more = 100.0 * (second.perplexity / first.perplexity - 1.0);
            writeln!(
                out,
                "the second's perplexity is {:.3} % {} the first's",
                more.abs(),
                if more < 0.0 { "below" } else { "above" }
            )?;
        }
    }
    Ok(())
}

/// What is measured, with all that is the same for every engine.
enum Task {
    Text { windows: Vec<Sequence>, context: usize, stride: usize },
    Choices { questions: Vec<Question>, sequences: Vec<Sequence> },
}

impl Task {
    /// Reads and encodes what is measured, for engines that take sequences of `longest` tokens.
    fn read(options: &EvalOptions, tokenizer: &Tokenizer, longest: usize) -> Result<Task> {
        let special = !options.args.no_add_special_tokens;
        match &options.measure {
            Measure::Text { file, context, stride } => {
                let context = context.unwrap_or(CONTEXT.min(longest));
                if context > longest {
                    bail!(
                        "--context {context}: the engine takes sequences of at most {longest} tokens; build it with a larger --max-seq-len"
                    );
                }
                let stride = stride.unwrap_or(context.div_ceil(2));
                if stride > context {
                    bail!("--stride {stride} leaves out tokens between windows of {context}; it may be at most that");
                }
                let ids = tokenizer.encode(&whole_text(file)?, special)?;
                let windows = windows(&ids, context, stride);
                if windows.is_empty() {
                    bail!("{}: there is no token to score, since none follows another", file.display());
                }
                Ok(Task::Text { windows, context, stride })
            }
            Measure::Choices(file) => {
                let questions = choices::read(file)?;
                let named = |file: &Path| file.display().to_string();
                let sequences =
                    choices::sequences(&questions, tokenizer, special, longest).with_context(|| named(file))?;
                Ok(Task::Choices { questions, sequences })
            }
        }
    }

    /// Measures one engine.
    fn measure(&self, job: &Job<'_>) -> Result<Found> {
        let capabilities = job.capabilities();
        if !capabilities.gather_context_logits {
            say::warning(format_args!(
                "the engine scores only {} tokens a step; one that is built with --gather-context-logits is faster, with the same result",
                capabilities.limits.max_num_logits
            ));
        }
        let (Task::Text { windows: sequences, .. } | Task::Choices { sequences, .. }) = self;
        let mut session = job.session(&requests(sequences), SessionOptions::default(), None)?;
        let sums = sums(&mut session, sequences)?;
        Ok(match self {
            Task::Text { windows, context, stride } => {
                Found::Perplexity(Perplexity::new(windows, &sums, *context, *stride))
            }
            Task::Choices { questions, .. } => Found::Accuracy(Accuracy::new(questions, &sums)),
        })
    }
}

/// What was measured of one engine.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(untagged)]
enum Found {
    Perplexity(Perplexity),
    Accuracy(Accuracy),
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Found::Perplexity(found) => found.fmt(f),
            Found::Accuracy(found) => found.fmt(f),
        }
    }
}

/// One engine's object, or an object with a list of two.
fn json(engines: &[EngineDir], found: &[Found]) -> Result<Value> {
    let mut objects = Vec::new();
    for (engine, found) in engines.iter().zip(found) {
        let mut object = json!({ "engine_dir": engine.dir(), "engine": engine.config().run_id });
        if let (Some(object), Value::Object(keys)) = (object.as_object_mut(), serde_json::to_value(found)?) {
            object.extend(keys);
        }
        objects.push(object);
    }
    match <[Value; 1]>::try_from(objects) {
        Ok([one]) => Ok(one),
        Err(two) => Ok(json!({ "engines": two })),
    }
}
