//! What every numeric flag accepts: a table of all of them, tested with values of every kind.

use std::any::TypeId;
use std::collections::BTreeSet;
use std::thread;

use clap::CommandFactory;
use proptest::prelude::*;
use proptest::sample::select;

use super::numbers::{
    ARRIVAL_RATES, MAX_BODY_BYTES, MAX_CONNECTIONS, MAX_RANKS, MAX_REQUESTS, MAX_RETURN_SEQUENCES, MAX_SECONDS,
    MAX_SEQUENCES, MAX_THREADS, MAX_TOKENS,
};
use super::{Cli, Command, parse};

/// The values that a flag accepts on a command line without further flags.
#[derive(Clone, Copy, Debug)]
enum Takes {
    /// Whole numbers from the first to the second.
    Whole(i128, i128),
    /// These whole numbers.
    OneOf(&'static [i128]),
    /// Finite numbers from `low` to `high`. `f32` says whether they must fit an f32.
    Real { low: f64, high: f64, f32: bool },
    /// Finite numbers above 0 that fit an f32.
    Positive,
    /// Any number. Whether the model can have it is checked later, when the model is known.
    AnyReal,
    /// `N` or `A-B`, of tokens.
    Span,
    /// Requests a second, or 0.
    Rate,
}

use Takes::{AnyReal, OneOf, Positive, Rate, Real, Span, Whole};

const SIZE: i128 = usize::MAX as i128;
const THREADS: Takes = Whole(1, MAX_THREADS as i128);
const TOKENS: Takes = Whole(1, MAX_TOKENS as i128);
const SEQUENCES: Takes = Whole(1, MAX_SEQUENCES as i128);
const RANKS: Takes = Whole(1, MAX_RANKS as i128);
/// Which sizes a model may have, and how many candidates there are, is checked later, when the model is known.
const ANY_SIZE: Takes = Whole(0, SIZE);
const SECONDS: Takes = Whole(1, MAX_SECONDS as i128);
const MILLISECONDS: Takes = Whole(1, 1000 * MAX_SECONDS as i128);
const SEED: Takes = Whole(0, u64::MAX as i128);
const PROBABILITY: Takes = Real { low: 0.0, high: 1.0, f32: true };
const ANY_F32: Takes = Real { low: f64::MIN, high: f64::MAX, f32: true };

/// Every numeric flag of every stage.
const FLAGS: &[(&str, &str, Takes)] = &[
    ("convert", "tp-size", RANKS),
    ("convert", "pp-size", RANKS),
    ("convert", "moe-tp-mode", Whole(0, 2)),
    // What one rank allows; −1 means "not given" in TensorRT-LLM.
    ("convert", "moe-tp-size", OneOf(&[-1, 1])),
    ("convert", "moe-ep-size", OneOf(&[-1, 1])),
    ("convert", "moe-normalization-mode", Whole(0, 1)),
    ("convert", "embedding-sharding-dim", Whole(0, 1)),
    ("convert", "workers", THREADS),
    ("convert", "kv-scale", Positive),
    ("convert", "calib-size", SEQUENCES),
    ("convert", "calib-max-seq-length", TOKENS),
    ("convert", "batch-size", SEQUENCES),
    ("convert", "seed", SEED),
    ("convert", "vocab-size", ANY_SIZE),
    ("convert", "n-positions", ANY_SIZE),
    ("convert", "n-layer", ANY_SIZE),
    ("convert", "n-head", ANY_SIZE),
    ("convert", "n-kv-head", ANY_SIZE),
    ("convert", "head-size", ANY_SIZE),
    ("convert", "n-embd", ANY_SIZE),
    ("convert", "inter-size", ANY_SIZE),
    ("convert", "rms-norm-eps", AnyReal),
    ("convert", "rotary-base", AnyReal),
    ("convert", "moe-num-experts", ANY_SIZE),
    ("convert", "moe-top-k", ANY_SIZE),
    ("build", "seed", SEED),
    ("build", "tp-size", RANKS),
    ("build", "pp-size", RANKS),
    ("build", "moe-tp-mode", Whole(0, 2)),
    ("build", "moe-tp-size", OneOf(&[-1, 1])),
    ("build", "moe-ep-size", OneOf(&[-1, 1])),
    ("build", "workers", THREADS),
    ("build", "max-batch-size", SEQUENCES),
    ("build", "max-num-tokens", TOKENS),
    ("build", "max-input-len", TOKENS),
    ("build", "max-output-len", TOKENS),
    ("build", "max-seq-len", TOKENS),
    ("build", "block-size", OneOf(&[16, 32, 64, 128])),
    ("run", "threads", THREADS),
    ("run", "max-output-len", TOKENS),
    ("run", "max-input-length", TOKENS),
    ("run", "temperature", Real { low: 0.0, high: f64::MAX, f32: true }),
    ("run", "top-k", ANY_SIZE),
    ("run", "top-p", PROBABILITY),
    ("run", "min-p", PROBABILITY),
    ("run", "repetition-penalty", Positive),
    ("run", "presence-penalty", ANY_F32),
    ("run", "frequency-penalty", ANY_F32),
    ("run", "num-beams", SEQUENCES),
    ("run", "length-penalty", ANY_F32),
    ("run", "early-stopping", Whole(i64::MIN as i128, i64::MAX as i128)),
    ("run", "beam-search-diversity-rate", ANY_F32),
    ("run", "no-repeat-ngram-size", Whole(0, MAX_TOKENS as i128)),
    ("run", "min-length", Whole(0, MAX_TOKENS as i128)),
    ("run", "num-return-sequences", Whole(1, MAX_RETURN_SEQUENCES as i128)),
    ("run", "random-seed", SEED),
    ("run", "max-attention-window-size", TOKENS),
    ("run", "max-prefill-tokens", TOKENS),
    ("run", "end-id", Whole(-1, u32::MAX as i128)),
    ("run", "streaming-interval", TOKENS),
    ("run", "kv-cache-free-gpu-mem-fraction", PROBABILITY),
    ("run", "ranks-per-gpu", RANKS),
    ("chat", "threads", THREADS),
    ("chat", "max-output-len", TOKENS),
    ("chat", "temperature", Real { low: 0.0, high: f64::MAX, f32: true }),
    ("chat", "top-k", ANY_SIZE),
    ("chat", "top-p", PROBABILITY),
    ("chat", "min-p", PROBABILITY),
    ("chat", "repetition-penalty", Positive),
    ("chat", "presence-penalty", ANY_F32),
    ("chat", "frequency-penalty", ANY_F32),
    ("chat", "random-seed", SEED),
    ("chat", "max-prefill-tokens", TOKENS),
    ("chat", "kv-cache-free-gpu-mem-fraction", PROBABILITY),
    ("chat", "ranks-per-gpu", RANKS),
    ("serve", "max-prefill-tokens", TOKENS),
    ("serve", "max-waiting", Whole(0, MAX_REQUESTS as i128)),
    ("serve", "max-connections", Whole(1, MAX_CONNECTIONS as i128)),
    ("serve", "max-body-bytes", Whole(1, MAX_BODY_BYTES as i128)),
    ("serve", "receive-timeout", SECONDS),
    ("serve", "answer-timeout", SECONDS),
    ("serve", "drain-timeout", SECONDS),
    ("serve", "threads", THREADS),
    ("serve", "kv-cache-free-gpu-mem-fraction", PROBABILITY),
    ("serve", "ranks-per-gpu", RANKS),
    ("bench", "threads", THREADS),
    ("bench", "batch-size", SEQUENCES),
    ("bench", "context", TOKENS),
    ("bench", "max-prefill-tokens", TOKENS),
    ("bench", "prefill-batch", SEQUENCES),
    ("bench", "kv-cache-free-gpu-mem-fraction", PROBABILITY),
    ("bench", "ranks-per-gpu", RANKS),
    ("bench", "steps", TOKENS),
    ("bench", "warmup", Whole(0, MAX_TOKENS as i128)),
    ("bench", "prefill", TOKENS),
    ("bench", "requests", Whole(0, MAX_REQUESTS as i128)),
    ("bench", "input-len", Span),
    ("bench", "output-len", Span),
    ("bench", "arrival-rate", Rate),
    ("bench", "concurrency", SEQUENCES),
    ("bench", "first-token-limit", MILLISECONDS),
    ("bench", "per-token-limit", MILLISECONDS),
    ("bench", "random-seed", SEED),
    ("eval", "context", TOKENS),
    ("eval", "stride", TOKENS),
    ("eval", "threads", THREADS),
    ("eval", "kv-cache-free-gpu-mem-fraction", PROBABILITY),
    ("eval", "ranks-per-gpu", RANKS),
    ("diff", "layers", TOKENS),
    ("diff", "f32-limit", Real { low: 0.0, high: f64::MAX, f32: false }),
    ("diff", "half-limit", Real { low: 0.0, high: f64::MAX, f32: false }),
    ("diff", "max-input-length", TOKENS),
    ("diff", "input-len", TOKENS),
    ("diff", "max-output-len", TOKENS),
    ("diff", "random-seed", SEED),
    ("diff", "threads", THREADS),
    ("verify", "workers", THREADS),
];

/// A whole number as Rust writes it, or with a plus sign.
fn whole(text: &str) -> Option<i128> {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    let plain = !digits.is_empty() && digits.len() < 30 && digits.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

impl Takes {
    fn takes(self, text: &str) -> bool {
        let real = || text.parse::<f64>().ok().filter(|x| x.is_finite());
        #[expect(clippy::cast_possible_truncation, reason = "the question is whether it fits")]
        let fits = |x: f64| (x as f32).is_finite();
        match self {
            Whole(low, high) => whole(text).is_some_and(|n| (low..=high).contains(&n)),
            OneOf(values) => whole(text).is_some_and(|n| values.contains(&n)),
            Real { low, high, f32 } => real().is_some_and(|x| (low..=high).contains(&x) && (!f32 || fits(x))),
            #[expect(clippy::cast_possible_truncation, reason = "what is too small for an f32 is 0")]
            Positive => real().is_some_and(|x| x as f32 > 0.0 && fits(x)),
            Rate => real().is_some_and(|x| x == 0.0 || ARRIVAL_RATES.contains(&x)),
            AnyReal => text.parse::<f64>().is_ok(),
            Span => {
                let (low, high) = text.split_once('-').unwrap_or((text, text));
                let side = |text| whole(text).filter(|n| (1..=MAX_TOKENS as i128).contains(n));
                side(low).zip(side(high)).is_some_and(|(low, high)| low <= high)
            }
        }
    }
}

/// Every flag of the command line that takes numbers.
fn numeric_flags() -> BTreeSet<(String, String)> {
    let numbers = [
        TypeId::of::<u8>(),
        TypeId::of::<u32>(),
        TypeId::of::<u64>(),
        TypeId::of::<usize>(),
        TypeId::of::<i32>(),
        TypeId::of::<i64>(),
        TypeId::of::<f32>(),
        TypeId::of::<f64>(),
        TypeId::of::<(usize, usize)>(),
    ];
    let mut flags = BTreeSet::new();
    for command in Cli::command().get_subcommands() {
        for arg in command.get_arguments() {
            let kind = arg.get_value_parser().type_id();
            if let Some(flag) = arg.get_long().filter(|_| numbers.iter().any(|n| kind == *n)) {
                flags.insert((command.get_name().to_owned(), flag.to_owned()));
            }
        }
    }
    flags
}

#[test]
fn the_table_has_every_numeric_flag() {
    let table: BTreeSet<_> = FLAGS.iter().map(|(command, flag, _)| (command.to_string(), flag.to_string())).collect();
    assert_eq!(table, numeric_flags());
}

/// Parses and validates `mixtral command --flag=value`, and plans the conversion if that needs no files.
fn accepts(command: &str, flag: &str, value: &str) -> bool {
    let mut line = vec!["mixtral".to_owned(), command.to_owned(), format!("--{flag}={value}")];
    line.extend((command == "bench").then(|| "--requests=1".to_owned()).filter(|_| flag != "requests"));
    let is_of_server = ["concurrency", "first-token-limit", "per-token-limit"].contains(&flag);
    line.extend(is_of_server.then(|| "--url=http://localhost".to_owned()));
    // Several outputs of greedy sampling would be equal, and are refused.
    line.extend((flag == "num-return-sequences").then(|| "--top-k=0".to_owned()));
    line.extend((command == "diff" && flag == "max-input-length").then(|| "--input-text=a".to_owned()));
    line.extend((command == "verify").then(|| "somewhere".to_owned()));
    line.extend((command == "diff").then(|| "--backends=cpu,cuda".to_owned()));
    line.extend((command == "eval").then(|| "--text=t".to_owned()));
    let Ok(parsed) = parse(line.into_iter().map(Into::into)) else { return false };
    match parsed.cli.command {
        Command::Convert(args) => args.validate().is_ok_and(|options| {
            // Most values that fit a flag fit no model. That has to be an error and never a panic.
            let _ = mixtral_convert::plan(&options.convert);
            true
        }),
        Command::Build(args) => args.validate().is_ok_and(|options| {
            let _ = options.limits.check();
            true
        }),
        Command::Run(args) => args.validate().is_ok(),
        Command::Chat(args) => args.validate().is_ok(),
        Command::Serve(args) => args.validate().is_ok(),
        Command::Bench(args) => args.validate().is_ok(),
        Command::Eval(args) => args.validate().is_ok(),
        Command::Diff(args) => args.validate().is_ok(),
        _ => true,
    }
}

/// Numbers at and near the bounds, numbers of every size, and texts that are no numbers.
fn value() -> impl Strategy<Value = String> {
    let edges = ["0", "1", "-1", "2", "+1", "0.0", "1.0", "-1.5", "1e400", "NaN", "inf", "-inf", "infinity"];
    let more =
        ["", " ", "1 ", "0x10", "1_000", "1,5", "١", "two", "1-", "-", "3-2", "2-3", "0-4", "1e39", "1e-50", "16"];
    let huge = ["18446744073709551615", "18446744073709551616", "9223372036854775808", "-9223372036854775809"];
    prop_oneof![
        select(edges.to_vec()).prop_map(str::to_owned),
        select(more.to_vec()).prop_map(str::to_owned),
        select(huge.to_vec()).prop_map(str::to_owned),
        (any::<u64>(), 0u32..64).prop_map(|(n, shift)| (n >> shift).to_string()),
        (any::<i64>(), 0u32..63).prop_map(|(n, shift)| (n >> shift).to_string()),
        any::<f32>().prop_map(|x| x.to_string()),
        (0.0f32..2.0).prop_map(|x| x.to_string()),
        (1u64..100, 1u64..100).prop_map(|(low, high)| format!("{low}-{high}")),
    ]
    // Some flags accept -0 as zero and some do not. Neither does harm.
    .prop_filter("minus zero", |value| value != "-0")
}

/// A flag that takes the value and should not, or the other way round. Two threads look for it.
fn wrongly_taken(value: &str) -> Option<String> {
    let wrong = |(command, flag, takes): &(&str, &str, Takes)| {
        // The flag takes a list. The values are tried one by one, so a list is left out.
        let is_list = matches!((*command, *flag), ("bench", "batch-size" | "prefill") | ("diff", "input-len"));
        (!(is_list && value.contains(',')) && accepts(command, flag, value) != takes.takes(value))
            .then(|| format!("mixtral {command} --{flag}={value:?} should be one of {takes:?}"))
    };
    let (half, rest) = FLAGS.split_at(FLAGS.len() / 2);
    thread::scope(|scope| {
        let half = scope.spawn(|| half.iter().find_map(wrong));
        rest.iter().find_map(wrong).or_else(|| half.join().unwrap())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_numeric_flag_takes_its_range_and_nothing_else(value in value()) {
        prop_assert_eq!(wrongly_taken(&value), None);
    }

    #[test]
    fn mappings_and_geometries_of_any_size_are_planned_or_refused(
        sizes in prop::collection::vec((any::<u64>(), 0u32..64).prop_map(|(n, shift)| n >> shift), 12),
    ) {
        let flags = ["tp-size", "pp-size", "moe-tp-size", "vocab-size", "n-layer", "n-head", "n-kv-head", "head-size",
            "n-embd", "inter-size", "moe-num-experts", "moe-top-k"];
        let flags = flags.iter().zip(sizes).map(|(flag, size)| format!("--{flag}={size}"));
        let line = ["mixtral", "convert"].into_iter().map(str::to_owned).chain(flags);
        if let Ok(parsed) = parse(line.map(Into::into))
            && let Command::Convert(args) = parsed.cli.command
            && let Ok(options) = args.validate()
        {
            let _ = mixtral_convert::plan(&options.convert);
        }
    }
}
