//! `mixtral verify`: whether a checkpoint or an engine is as it was written.

use std::io::Write as _;

use anyhow::{Result, bail};
use mixtral_build::explain::bytes;
use mixtral_checkpoint::{Checkpoint, Verified, lines};
use mixtral_engine::{EngineDir, EngineError};

use crate::args::verify::VerifyArgs;
use crate::progress::Bytes;
use crate::run::machine;

/// Runs the command.
pub fn main(args: &VerifyArgs) -> Result<()> {
    let workers = args.workers.unwrap_or_else(machine::cores);
    let progress = Bytes::new();
    let verified = read(args, workers, &progress);
    progress.finish();
    let (what, Verified { tensors, files, bytes: size, unhashed, problems }) = verified?;
    let all = format!("{tensors} tensors and {files} other files");
    if let Some(first) = problems.first() {
        let others: Vec<String> = problems[1..].iter().map(|p| format!("  {p}")).collect();
        let others = if others.is_empty() { String::new() } else { format!("\nthe others:\n{}", lines(&others)) };
        bail!("damage in {} of {all}; the first: {first}{others}", problems.len());
    }
    let size = bytes(usize::try_from(size).unwrap_or(usize::MAX));
    let mut out = std::io::stdout().lock();
    let verdict = match unhashed {
        0 => "as they were written".to_owned(),
        _ => format!("without a fault, but {unhashed} of them came without a hash from another tool: they are finite"),
    };
    Ok(writeln!(out, "{what} {}: {all}, {size}, {verdict}", args.dir.display())?)
}

fn read(args: &VerifyArgs, workers: usize, progress: &Bytes) -> Result<(&'static str, Verified)> {
    // Decides between engine and checkpoint as `inspect` does.
    match EngineDir::open(&args.dir) {
        Ok(engine) => Ok(("engine", engine.verify(workers, progress)?)),
        Err(EngineError::NotAnEngine { .. } | EngineError::NoConfig { .. } | EngineError::NoDirectory { .. }) => {
            Ok(("checkpoint", Checkpoint::open(&args.dir)?.verify(workers, progress)?))
        }
        Err(error) => Err(error.into()),
    }
}
