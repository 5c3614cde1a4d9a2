//! Degrees of parallelism.

use mixtral_model::Mapping;

use super::beside::{Described, compare, described};
use super::{Usage, numbers, usage};

/// The flags as they were typed.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
#[command(next_help_heading = "Parallelism")]
pub struct ParallelArgs {
    /// Tensor-parallel ranks [default: 1]
    #[arg(long, value_parser = numbers::ranks)]
    pub tp_size: Option<usize>,
    /// Pipeline stages [default: 1]
    #[arg(long, value_parser = numbers::ranks)]
    pub pp_size: Option<usize>,
    /// How experts are spread over the tensor-parallel ranks: 1 whole experts, 2 slices of each (0 only without ranks)
    /// [default: 2]
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=2))]
    pub moe_tp_mode: Option<u8>,
    /// Ranks that share each expert (with --moe-ep-size, instead of --moe-tp-mode)
    #[arg(long, allow_negative_numbers = true, value_parser = ranks_or_unset)]
    pub moe_tp_size: Option<i64>,
    /// Ranks that whole experts are dealt over
    #[arg(long, allow_negative_numbers = true, value_parser = ranks_or_unset)]
    pub moe_ep_size: Option<i64>,
}

/// A number of ranks, or −1, which means "not given" in TensorRT-LLM.
fn ranks_or_unset(text: &str) -> Result<i64, String> {
    if text == "-1" {
        return Ok(-1);
    }
    let ranks = numbers::ranks(text).map_err(|e| format!("{e}, or -1 for not given"))?;
    i64::try_from(ranks).map_err(|e| e.to_string())
}

impl ParallelArgs {
    /// Whether any flag was given.
    pub fn is_given(&self) -> bool {
        self.tp_size.is_some()
            || self.pp_size.is_some()
            || self.moe_tp_mode.is_some()
            || self.experts().0.is_some()
            || self.experts().1.is_some()
    }

    /// The values of `--moe-tp-size` and `--moe-ep-size`, if they were given.
    fn experts(&self) -> (Option<usize>, Option<usize>) {
        let given = |size: Option<i64>| size.and_then(|n| usize::try_from(n).ok());
        (given(self.moe_tp_size), given(self.moe_ep_size))
    }

    /// The mapping that the flags describe.
    pub fn mapping(&self) -> Result<Mapping, Usage> {
        let (tp_size, pp_size) = (self.tp_size.unwrap_or(1), self.pp_size.unwrap_or(1));
        let (moe_tp_size, moe_ep_size) = match self.experts() {
            (None, None) => match self.moe_tp_mode {
                Some(1) => (1, tp_size),
                _ => (tp_size, 1),
            },
            (Some(moe_tp), None) if tp_size.is_multiple_of(moe_tp) => (moe_tp, tp_size / moe_tp),
            (None, Some(moe_ep)) if tp_size.is_multiple_of(moe_ep) => (tp_size / moe_ep, moe_ep),
            (Some(moe_tp), None) => usage!("--moe-tp-size {moe_tp} does not divide --tp-size {tp_size}"),
            (None, Some(moe_ep)) => usage!("--moe-ep-size {moe_ep} does not divide --tp-size {tp_size}"),
            (Some(moe_tp), Some(moe_ep)) if moe_tp.checked_mul(moe_ep) == Some(tp_size) => (moe_tp, moe_ep),
            (Some(moe_tp), Some(moe_ep)) => {
                usage!("--moe-tp-size {moe_tp} × --moe-ep-size {moe_ep} must be --tp-size, which is {tp_size}")
            }
        };
        let mapping = Mapping { tp_size, pp_size, moe_tp_size, moe_ep_size };
        match self.moe_tp_mode {
            Some(0) if tp_size > 1 => usage!(
                "--moe-tp-mode 0 (none) needs --tp-size 1, which is {tp_size}; use 1 (whole experts) or 2 (slices)"
            ),
            Some(mode) if !is_of_mode(&mapping, mode) => usage!(
                "--moe-tp-mode {mode} ({}) contradicts --moe-tp-size {moe_tp_size} and --moe-ep-size {moe_ep_size}; leave one of them out",
                if mode == 1 { "whole experts on each rank" } else { "slices of each expert" }
            ),
            _ => Ok(mapping),
        }
    }

    /// Compares the flags that were given with a directory's mapping. Messages call the directory `place`.
    pub fn beside(&self, mapping: &Mapping, place: &str) -> Result<Option<String>, Usage> {
        let (moe_tp, moe_ep) = self.experts();
        let found = format!("experts in {} slices over {} ranks", mapping.moe_tp_size, mapping.moe_ep_size);
        let mode = |mode| Described::new("--moe-tp-mode", mode, found, is_of_mode(mapping, mode));
        compare(
            place,
            "convert the model again for other ranks",
            [
                described("--tp-size", self.tp_size, "tp_size", mapping.tp_size),
                described("--pp-size", self.pp_size, "pp_size", mapping.pp_size),
                described("--moe-tp-size", moe_tp, "moe_tp_size", mapping.moe_tp_size),
                described("--moe-ep-size", moe_ep, "moe_ep_size", mapping.moe_ep_size),
                self.moe_tp_mode.map(mode),
            ],
        )
    }
}

/// Whether the mapping spreads the experts as `--moe-tp-mode MODE` does. With one rank all modes are the same.
fn is_of_mode(mapping: &Mapping, mode: u8) -> bool {
    match mode {
        _ if mapping.tp_size == 1 => true,
        1 => mapping.moe_ep_size == mapping.tp_size,
        2 => mapping.moe_tp_size == mapping.tp_size,
        _ => false,
    }
}
