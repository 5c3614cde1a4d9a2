//! `mixtral diff`.

use std::path::PathBuf;

use super::build::BackendChoice;
use super::run::Prompts;
use super::{Usage, numbers, spelling, usage};

const SIDES: &str = "Sides";
const COMPARED: &str = "What is compared";
const PROMPTS: &str = "Prompts";
const OUTPUT: &str = "Output";

/// The flags as they were typed.
#[derive(Clone, Debug, clap::Args)]
#[command(
    group = clap::ArgGroup::new("prompts").args(["input_text", "input_file"]),
    after_help = "\
Examples:
  mixtral diff ./engine --backends cpu,cuda
  mixtral diff ./engine ./engine-of-two-ranks
  mixtral diff ./engine ./other --layers 2 --input-text \"I love french quiche\""
)]
pub struct DiffArgs {
    /// The reference and the engine to compare with it, or one engine to run on two backends. If one of the two has several
    /// ranks, the other is the reference
    #[arg(value_name = "ENGINE", num_args = 1..=2, default_value = "engine_outputs")]
    pub engines: Vec<PathBuf>,
    /// Where the reference runs, and the other [default: auto for each of two engines]
    #[arg(help_heading = SIDES, long, num_args = 1, action = clap::ArgAction::Set, value_delimiter = ',', value_name = "A,B")]
    pub backends: Vec<BackendChoice>,
    /// Compare the models of the first N layers: less memory, and less to wait for
    #[arg(help_heading = COMPARED, long, value_name = "N", value_parser = numbers::tokens)]
    pub layers: Option<usize>,
    /// First operation that is compared: its index, or a buffer that it writes
    #[arg(help_heading = COMPARED, long, value_name = "OP")]
    pub start: Option<String>,
    /// Last operation that is compared, and the last that the other runs
    #[arg(help_heading = COMPARED, long, value_name = "OP")]
    pub stop: Option<String>,
    /// Largest error of an f32 buffer: the sum of squared differences by the sum of squares of the reference
    #[arg(help_heading = COMPARED, long, default_value_t = 1e-10, value_name = "NMSE")]
    pub f32_limit: f64,
    /// Largest error of a 16-bit buffer; twice that of a sum over ranks, whose parts are rounded too
    #[arg(help_heading = COMPARED, long, default_value_t = 1e-5, value_name = "NMSE")]
    pub half_limit: f64,
    /// Prompts [default: drawn token ids]
    #[arg(help_heading = PROMPTS, long, num_args = 1.., action = clap::ArgAction::Set, value_name = "TEXT", value_parser = spelling::text)]
    pub input_text: Vec<String>,
    /// Prompts from a file, as those of `mixtral run`
    #[arg(help_heading = PROMPTS, long)]
    pub input_file: Option<PathBuf>,
    /// Directory of tokenizer.json [default: the reference's]
    #[arg(help_heading = PROMPTS, long, requires = "prompts")]
    pub tokenizer_dir: Option<PathBuf>,
    /// Cut prompts on the left to this many tokens [default: too long is an error]
    #[arg(help_heading = PROMPTS, long, requires = "prompts", value_parser = numbers::tokens)]
    pub max_input_length: Option<usize>,
    /// Do not put the model's start token before prompts
    #[arg(help_heading = PROMPTS, long, requires = "prompts")]
    pub no_add_special_tokens: bool,
    /// Lengths of the prompts that are drawn
    #[arg(help_heading = PROMPTS, long, num_args = 1.., action = clap::ArgAction::Set, value_delimiter = ',', default_values_t = [33, 7],
        value_parser = numbers::tokens, conflicts_with = "prompts")]
    pub input_len: Vec<usize>,
    /// Tokens that each prompt goes on for, as the reference draws them: the first comes with the prompt, each other one is a
    /// step of decodes
    #[arg(help_heading = PROMPTS, long, default_value = "3", value_parser = numbers::tokens)]
    pub max_output_len: usize,
    /// Seed of the prompts that are drawn
    #[arg(help_heading = PROMPTS, long, default_value_t = 0, conflicts_with = "prompts")]
    pub random_seed: u64,
    /// Threads of the CPU backend [default: all cores]
    #[arg(help_heading = SIDES, long, value_parser = numbers::threads)]
    pub threads: Option<usize>,
    /// Print one JSON object
    #[arg(help_heading = OUTPUT, long)]
    pub json: bool,
}

/// The validated options.
#[derive(Debug)]
pub struct DiffOptions {
    /// Everything that needs no check of its own.
    pub args: DiffArgs,
    /// Engine and backend of the reference, then those of the other side.
    pub sides: [(PathBuf, BackendChoice); 2],
    /// Prompts, if they are not to be drawn.
    pub prompts: Option<Prompts>,
}

impl DiffArgs {
    /// Checks that the flags agree with each other.
    pub fn validate(self) -> Result<DiffOptions, Usage> {
        let sides = match (self.engines.as_slice(), self.backends.as_slice()) {
            ([engine], &[a, b]) => [(engine.clone(), a), (engine.clone(), b)],
            (_, [_, _, _, ..]) => usage!("--backends takes one backend, or one for each of two engines"),
            ([_], _) => {
                usage!("one engine is compared on two backends: add --backends cpu,cuda, or name a second engine")
            }
            ([a, b], []) => [(a.clone(), BackendChoice::Auto), (b.clone(), BackendChoice::Auto)],
            ([a, b], &[on]) => [(a.clone(), on), (b.clone(), on)],
            ([a, b], &[on_a, on_b]) => [(a.clone(), on_a), (b.clone(), on_b)],
            (engines, _) => usage!("{} engines; expected one or two", engines.len()),
        };
        for (flag, limit) in [("--f32-limit", self.f32_limit), ("--half-limit", self.half_limit)] {
            if !limit.is_finite() || limit < 0.0 {
                usage!("{flag} is {limit}; expected a finite number of at least 0");
            }
        }
        let prompts = match &self.input_file {
            Some(path) => Some(Prompts::File(path.clone())),
            None => (!self.input_text.is_empty()).then(|| Prompts::Texts(self.input_text.clone())),
        };
        Ok(DiffOptions { args: self, sides, prompts })
    }
}
