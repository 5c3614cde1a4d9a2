//! Generated sequences, and the files they are written to.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use mixtral_model::TokenId;
use mixtral_runtime::{Event, FinishReason, Hypothesis, RequestError, Timing};
use npyz::WriterBuilder as _;
use serde::Serialize;

use crate::say;

/// One generated sequence.
#[derive(Clone, Debug, Default)]
pub struct Output {
    /// Which prompt it continues.
    pub prompt: usize,
    /// Which of the prompt's sequences it is.
    pub beam: usize,
    /// Its ids, the end id included.
    pub ids: Vec<TokenId>,
    /// Its text; `None` without a tokenizer.
    pub text: Option<String>,
    /// Why it ended, and when.
    pub finished: Option<(FinishReason, Timing)>,
    /// The log-probabilities of its tokens, if they are wanted.
    pub logprobs: Vec<f32>,
    /// Its score in a beam search.
    pub score: Option<f32>,
    /// Why it failed, if it did. What it had before that stays.
    pub failed: Option<RequestError>,
    /// The logits that its tokens were drawn from, `[tokens, vocab_size]`, if they are kept.
    pub generation_logits: Vec<f32>,
    /// The logits of its prompt, `[prompt tokens, vocab_size]`, if they are kept.
    pub context_logits: Vec<f32>,
    /// A running hash of the logits that its tokens were drawn from, if wanted.
    pub logits_hash: blake3::Hasher,
}

/// How much of an output was printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Printed {
    ids: usize,
    /// Bytes.
    text: usize,
}

/// `[1, 2, 3]`.
pub fn ids_text(ids: &[TokenId]) -> String {
    let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
    format!("[{}]", ids.join(", "))
}

/// Prints outputs while they grow.
pub struct Streaming {
    /// Tokens between two prints.
    pub interval: usize,
    /// Print all of an output each time, instead of what is new.
    pub whole: bool,
    /// How much of each output was printed.
    pub printed: Vec<Printed>,
}

impl Streaming {
    /// Prints the output with this index at every `interval`-th token and at its end.
    pub fn print(&mut self, index: usize, output: &Output, out: &mut dyn std::io::Write) -> std::io::Result<()> {
        if !output.ids.len().is_multiple_of(self.interval) && output.finished.is_none() {
            return Ok(());
        }
        let (before, now) = (self.printed[index], output.extent());
        if self.whole {
            output.print(out, Printed::default())?;
        } else if output.text.is_none() || before.text < now.text || (output.finished.is_some() && now.text == 0) {
            output.print(out, before)?;
        }
        self.printed[index] = now;
        out.flush()
    }
}

/// A sequence for people and programs.
#[derive(Debug, Serialize)]
pub struct OutputRecord<'a> {
    beam: usize,
    ids: &'a [TokenId],
    text: Option<&'a str>,
    finish_reason: Option<FinishReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    score: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    first_token_ms: Option<f64>,
    total_ms: Option<f64>,
}

impl Output {
    /// Adds what a step generated.
    pub fn add(&mut self, event: &Event) {
        self.ids.extend(event.token);
        self.logprobs.extend(event.logprobs.iter().map(|scored| scored.logprob));
        if let Some(text) = &mut self.text {
            *text += &event.text;
        }
        if let Some(error) = &event.text_failed {
            say::warning(format_args!("prompt {}: its text ends early, its ids do not: {error}", self.prompt));
        }
        if event.beams.is_empty() {
            self.finished = event.finished.or(self.finished);
        }
    }

    /// Takes an answer of a beam search.
    pub fn answer(&mut self, answer: &Hypothesis, finished: Option<(FinishReason, Timing)>) {
        self.ids.clone_from(&answer.tokens);
        self.logprobs.clone_from(&answer.logprobs);
        self.score = Some(answer.score);
        if let Some(text) = &mut self.text {
            text.clone_from(&answer.text);
        }
        self.finished = answer.reason.zip(finished.map(|(_, timing)| timing));
    }

    /// Prints the line that run.py prints, with the text from `from` on. Where there is no tokenizer, the ids take the
    /// text's place.
    pub fn print(&self, out: &mut dyn std::io::Write, from: Printed) -> std::io::Result<()> {
        let Output { prompt, beam, text, ids, .. } = self;
        write!(out, "Output [Text {prompt} Beam {beam}]: ")?;
        match text {
            Some(text) => writeln!(out, "\"{}\"", text.get(from.text..).unwrap_or_default()),
            None => writeln!(out, "{}", ids_text(&ids[from.ids..])),
        }
    }

    /// How much there is to print.
    pub fn extent(&self) -> Printed {
        Printed { ids: self.ids.len(), text: self.text.as_ref().map_or(0, String::len) }
    }

    /// The record of a sequence in JSON.
    pub fn record(&self) -> OutputRecord<'_> {
        let ms = |pick: fn(&Timing) -> std::time::Duration| {
            self.finished.as_ref().map(|(_, timing)| pick(timing).as_secs_f64() * 1e3)
        };
        OutputRecord {
            beam: self.beam,
            ids: &self.ids,
            text: self.text.as_deref(),
            score: self.score,
            error: self.failed.as_ref().map(ToString::to_string),
            finish_reason: self.finished.map(|(reason, _)| reason),
            first_token_ms: ms(|t| t.first_token),
            total_ms: ms(|t| t.total),
        }
    }
}

fn create(path: &Path) -> Result<BufWriter<File>> {
    Ok(BufWriter::new(File::create(path).with_context(|| format!("cannot write {}", path.display()))?))
}

/// One line a sequence: its ids.
pub fn write_csv(path: &Path, outputs: &[Output]) -> Result<()> {
    let mut file = create(path)?;
    for output in outputs {
        let ids: Vec<String> = output.ids.iter().map(ToString::to_string).collect();
        writeln!(file, "{}", ids.join(","))?;
    }
    file.flush().with_context(|| format!("cannot write {}", path.display()))
}

/// i32 `[sequences, max_output_len]`, padded with −1.
pub fn write_npy(path: &Path, outputs: &[Output], max_output_len: usize) -> Result<()> {
    let mut file = create(path)?;
    let shape = [outputs.len() as u64, max_output_len as u64];
    let mut writer = npyz::WriteOptions::new().default_dtype().shape(&shape).writer(&mut file).begin_nd()?;
    for output in outputs {
        let ids = output.ids.iter().map(|t| i32::try_from(t.0).unwrap_or(-1));
        writer.extend(ids.chain(std::iter::repeat(-1)).take(max_output_len))?;
    }
    writer.finish()?;
    file.flush().with_context(|| format!("cannot write {}", path.display()))
}

/// `F` and `F.npy` → `F_generation.npy`, `F_context.npy`.
pub fn logits_path(stem: &Path, kind: &str) -> PathBuf {
    let text = stem.to_string_lossy();
    format!("{}_{kind}.npy", text.strip_suffix(".npy").unwrap_or(&text)).into()
}

/// f32 `[sequences, …shape]`; what a sequence does not have is NaN.
pub fn write_f32<'a>(path: &Path, sequences: impl ExactSizeIterator<Item = &'a [f32]>, shape: &[usize]) -> Result<()> {
    let mut file = create(path)?;
    let all: Vec<u64> = [sequences.len()].iter().chain(shape).map(|&n| n as u64).collect();
    let mut writer = npyz::WriteOptions::new().default_dtype().shape(&all).writer(&mut file).begin_nd()?;
    for values in sequences {
        let present = values.iter().copied();
        writer.extend(present.chain(std::iter::repeat(f32::NAN)).take(shape.iter().product()))?;
    }
    writer.finish()?;
    file.flush().with_context(|| format!("cannot write {}", path.display()))
}
