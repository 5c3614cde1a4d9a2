//! Weight-only quantization.

use mixtral_model::{Precision, WeightOnly};

use super::{Usage, usage};
use crate::say;

/// The flags as they were typed, those that `convert` and `build` share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Quantization")]
pub struct WeightOnlyArgs {
    /// Integers that weights are rounded to: int8 (a scale a row), or int4 (scales for groups; attention stays int8)
    #[arg(long, num_args = 0..=1, default_missing_value = "int8", value_name = "int8|int4", value_parser = integers)]
    pub weight_only_precision: Option<Precision>,
    /// Weights that share an int4 scale: 32, 64, 128, or -1 for a whole row [default: 128]
    #[arg(long, allow_negative_numbers = true, value_parser = group_size)]
    pub group_size: Option<Group>,
    /// Precision of attention's weights beside int4 experts: int4, int8, or float [default: int8]
    #[arg(long, value_name = "int4|int8|float", value_parser = precision)]
    pub attention_precision: Option<Precision>,
}

/// `--group-size`: a number of elements, or a whole row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group(Option<usize>);

fn integers(text: &str) -> Result<Precision, String> {
    match text {
        "int8" => Ok(Precision::Int8),
        "int4" => Ok(Precision::Int4),
        "int4_gptq" | "int4_awq" => Err(format!(
            "a model that was quantized so is read as it is: convert its directory without this flag. To quantize here, name int8 or int4 (not {text})"
        )),
        _ => Err("expected int8 or int4".to_owned()),
    }
}

fn precision(text: &str) -> Result<Precision, String> {
    match text {
        "int8" => Ok(Precision::Int8),
        "int4" => Ok(Precision::Int4),
        "float" => Ok(Precision::Float),
        _ => Err("expected int4, int8 or float".to_owned()),
    }
}

fn group_size(text: &str) -> Result<Group, String> {
    match text {
        "-1" => Ok(Group(None)),
        "32" => Ok(Group(Some(32))),
        "64" => Ok(Group(Some(64))),
        "128" => Ok(Group(Some(128))),
        _ => Err("expected 32, 64, 128, or -1 for a whole row".to_owned()),
    }
}

impl WeightOnlyArgs {
    /// What the flags ask for. `precision` is that of the feed-forward; `None` if nothing is quantized.
    pub fn weight_only(self, precision: Option<Precision>) -> Result<Option<WeightOnly>, Usage> {
        let Some(feed_forward) = precision else {
            for (flag, is_given) in [
                ("--group-size", self.group_size.is_some()),
                ("--attention-precision", self.attention_precision.is_some()),
            ] {
                if is_given {
                    say::warning(format_args!("{flag} changes nothing, because no weights are quantized"));
                }
            }
            return Ok(None);
        };
        // Attention is a tenth of the bytes that a token of Mixtral 8x7B needs, and its rounding costs more than a tenth of the loss.
        // Rounding to fp8 costs little.
        let usual = match feed_forward {
            Precision::Fp8 | Precision::Fp8Rows => feed_forward,
            _ => Precision::Int8,
        };
        let attention = self.attention_precision.unwrap_or(usual);
        if self.group_size.is_some() && feed_forward != Precision::Int4 && attention != Precision::Int4 {
            usage!("--group-size is for int4, and int8 has a scale for each row; leave it out, or quantize to int4");
        }
        let group = self.group_size.map_or(Some(128), |Group(size)| size);
        Ok(Some(WeightOnly { attention, feed_forward, group }))
    }
}
