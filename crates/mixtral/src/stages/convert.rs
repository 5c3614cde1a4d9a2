//! `mixtral convert`: a Hugging Face model → a checkpoint.

use std::io::Write as _;

use anyhow::Result;
use mixtral_build::explain::bytes;

use crate::args::convert::ConvertOptions;
use crate::progress::Bytes;

/// Runs the stage.
pub fn main(options: &ConvertOptions) -> Result<()> {
    let ConvertOptions { convert, dry_run } = options;
    if *dry_run {
        writeln!(std::io::stdout(), "{}", mixtral_convert::plan(convert)?)?;
        return Ok(());
    }
    let progress = Bytes::new();
    let report = mixtral_convert::convert(convert, &progress);
    progress.finish();
    let report = report?;
    let size = usize::try_from(report.bytes).unwrap_or(usize::MAX);
    eprintln!(
        "wrote {}: {} tensors for {} rank(s), {} in {:.1} s",
        convert.output_dir.display(),
        report.tensors,
        report.ranks,
        bytes(size),
        report.seconds
    );
    Ok(())
}
