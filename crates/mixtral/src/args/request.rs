//! The flags of one request. A line of a `.jsonl` file has them too, for its own request.

use serde::Serialize;
use serde_json::{Map, Value};

use super::numbers;
use super::run::LENGTHS;
use super::sampling::{SAMPLING, SamplingArgs};
use super::{Usage, usage};

/// The flags as they were typed.
#[derive(Clone, Debug, clap::Args, Serialize)]
pub struct RequestArgs {
    /// Tokens to generate at most
    #[arg(help_heading = LENGTHS, long, default_value = "128", value_parser = numbers::tokens)]
    pub max_output_len: usize,
    /// Tokens before which no end token ends a sequence
    #[arg(help_heading = LENGTHS, long, default_value_t = 0, value_parser = numbers::tokens_or_none)]
    pub min_length: usize,
    /// Token that ends a sequence; -1 is none [default: the model's]
    #[arg(help_heading = LENGTHS, long, allow_negative_numbers = true, value_parser = clap::value_parser!(i64).range(-1..=i64::from(u32::MAX)))]
    pub end_id: Option<i64>,
    /// How tokens are drawn.
    #[command(flatten)]
    #[serde(flatten)]
    pub sampling: SamplingArgs,
    /// Keep out every series of this many tokens that was there already; 0 is off
    #[arg(help_heading = SAMPLING, long, default_value_t = 0, value_parser = numbers::tokens_or_none)]
    pub no_repeat_ngram_size: usize,
    /// Numbers that are added to the logits of tokens
    #[arg(help_heading = SAMPLING, long, num_args = 1.., action = clap::ArgAction::Set, value_name = "ID:NUMBER", value_parser = bias)]
    pub logit_bias: Vec<Bias>,
    /// Sequences drawn for each prompt
    #[arg(help_heading = SAMPLING, long, default_value = "1", value_parser = numbers::return_sequences)]
    pub num_return_sequences: usize,
}

/// A token's id, and what is added to its logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bias {
    /// The token.
    pub id: u32,
    /// What is added.
    pub bias: f32,
}

impl Serialize for Bias {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}:{}", self.id, self.bias))
    }
}

fn bias(text: &str) -> Result<Bias, String> {
    let parts = text.split_once(':').and_then(|(id, bias)| Some((id.parse().ok()?, numbers::finite(bias).ok()?)));
    parts.map(|(id, bias)| Bias { id, bias }).ok_or_else(|| "expected a token id, a colon and a number".to_owned())
}

/// The flags alone, as a line that clap parses.
#[derive(clap::Parser)]
#[command(no_binary_name = true, args_override_self = true)]
struct Line {
    #[command(flatten)]
    args: RequestArgs,
}

impl RequestArgs {
    /// These flags, changed by the keys of an object. A key is a flag's name with underscores.
    ///
    /// # Errors
    /// A key that is no flag, or a value that its flag does not accept.
    pub fn changed_by(&self, keys: &Map<String, Value>) -> Result<RequestArgs, Usage> {
        let Ok(Value::Object(mut all)) = serde_json::to_value(self) else { usage!("these flags have no JSON") };
        all.extend(keys.clone());
        let words = all.iter().flat_map(|(key, value)| words(key, value));
        let line = <Line as clap::Parser>::try_parse_from(words).map_err(|error| {
            let text = error.to_string();
            Usage(text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned())
        })?;
        line.args.validate()?;
        Ok(line.args)
    }

    /// Checks that the flags agree with each other.
    pub fn validate(&self) -> Result<(), Usage> {
        if self.num_return_sequences > 1 && self.sampling.params().is_greedy() {
            usage!(
                "--num-return-sequences {} with greedy sampling would give equal outputs; add --top-k 0 (or more than 1) and a temperature above 0",
                self.num_return_sequences
            );
        }
        Ok(())
    }
}

/// A key and its value as words of a command line.
fn words(key: &str, value: &Value) -> Vec<String> {
    let flag = format!("--{}", key.replace('_', "-"));
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    match value {
        Value::Null => Vec::new(),
        Value::Array(values) if values.is_empty() => Vec::new(),
        Value::Array(values) => std::iter::once(flag).chain(values.iter().map(text)).collect(),
        Value::Object(values) if values.is_empty() => Vec::new(),
        Value::Object(values) => {
            std::iter::once(flag).chain(values.iter().map(|(id, value)| format!("{id}:{}", text(value)))).collect()
        }
        value => vec![format!("{flag}={}", text(value))],
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn changed(keys: &Value) -> Result<RequestArgs, String> {
        let typed = ["--temperature=0.7", "--top-k=40", "--logit-bias", "3:-1.5", "--end-id=-1"];
        let args = <Line as clap::Parser>::try_parse_from(typed).map_err(|e| e.to_string())?.args;
        args.changed_by(keys.as_object().expect("an object")).map_err(|usage| usage.0)
    }

    #[test]
    fn keys_change_the_flags_that_they_name() {
        let args = changed(&json!({})).unwrap();
        assert_eq!((args.sampling.temperature, args.sampling.top_k, args.end_id), (0.7, 40, Some(-1)));
        assert_eq!(args.logit_bias, [Bias { id: 3, bias: -1.5 }]);
        let args = changed(&json!({"temperature": 0.25, "logit_bias": {"7": 2, "9": -0.5}, "end_id": null})).unwrap();
        assert_eq!((args.sampling.temperature, args.sampling.top_k, args.end_id), (0.25, 40, None));
        assert_eq!(args.logit_bias, [Bias { id: 7, bias: 2.0 }, Bias { id: 9, bias: -0.5 }]);
    }

    #[test]
    fn keys_are_held_to_what_flags_accept() {
        let said = [
            json!({"top_p": 2}),
            json!({"top_q": 1}),
            json!({"temperature": 0, "num_return_sequences": 3}),
            json!({"logit_bias": {"a": 1}}),
        ]
        .map(|keys| changed(&keys).unwrap_err());
        insta::assert_snapshot!(said.join("\n"));
    }
}
