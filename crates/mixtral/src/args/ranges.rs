//! What every numeric flag takes: a table of all of them, held against values of every kind.

use std::any::TypeId;
use std::collections::BTreeSet;

use clap::CommandFactory;
use proptest::prelude::*;
use proptest::sample::select;

use super::{Cli, Command, parse};

/// The values that a flag takes when nothing else is said.
#[derive(Clone, Copy, Debug)]
enum Takes {
    /// Whole numbers.
    Whole(i128, i128),
    /// These whole numbers.
    OneOf(&'static [i128]),
    /// Finite numbers between, or equal to, two; `f32` says whether they must fit one.
    Real { low: f64, high: f64, f32: bool },
    /// Finite numbers above 0 that fit an f32.
    Positive,
    /// Any number at all: whether a model can have it is said when it is known which one.
    AnyReal,
    /// `N` or `A-B`, of at least 1.
    Span,
}

use Takes::{AnyReal, OneOf, Positive, Real, Span, Whole};

const SIZE: i128 = usize::MAX as i128;
const COUNT: Takes = Whole(1, SIZE);
const ANY_SIZE: Takes = Whole(0, SIZE);
const SEED: Takes = Whole(0, u64::MAX as i128);
const PROBABILITY: Takes = Real { low: 0.0, high: 1.0, f32: true };
const ANY_F32: Takes = Real { low: f64::MIN, high: f64::MAX, f32: true };

/// Every numeric flag of every stage.
const FLAGS: &[(&str, &str, Takes)] = &[
    ("convert", "tp-size", COUNT),
    ("convert", "pp-size", COUNT),
    ("convert", "moe-tp-mode", Whole(0, 2)),
    // With one rank; −1 is TensorRT-LLM's word for "not given".
    ("convert", "moe-tp-size", OneOf(&[-1, 1])),
    ("convert", "moe-ep-size", OneOf(&[-1, 1])),
    ("convert", "moe-normalization-mode", Whole(0, 1)),
    ("convert", "embedding-sharding-dim", Whole(0, 1)),
    ("convert", "workers", COUNT),
    ("convert", "group-size", ANY_SIZE),
    ("convert", "calib-size", ANY_SIZE),
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
    ("build", "tp-size", COUNT),
    ("build", "pp-size", COUNT),
    ("build", "moe-tp-mode", Whole(0, 2)),
    ("build", "moe-tp-size", OneOf(&[-1, 1])),
    ("build", "moe-ep-size", OneOf(&[-1, 1])),
    ("build", "workers", COUNT),
    ("build", "max-batch-size", COUNT),
    ("build", "max-num-tokens", COUNT),
    ("build", "max-input-len", COUNT),
    ("build", "max-output-len", COUNT),
    ("build", "max-seq-len", COUNT),
    ("build", "max-beam-width", OneOf(&[1])),
    ("build", "block-size", OneOf(&[16, 32, 64, 128])),
    ("run", "threads", COUNT),
    ("run", "max-output-len", COUNT),
    ("run", "max-input-length", COUNT),
    ("run", "temperature", Real { low: 0.0, high: f64::MAX, f32: true }),
    ("run", "top-k", ANY_SIZE),
    ("run", "top-p", PROBABILITY),
    ("run", "min-p", PROBABILITY),
    ("run", "repetition-penalty", Positive),
    ("run", "presence-penalty", ANY_F32),
    ("run", "frequency-penalty", ANY_F32),
    ("run", "num-beams", OneOf(&[1])),
    ("run", "length-penalty", ANY_F32),
    ("run", "early-stopping", Whole(i32::MIN as i128, i32::MAX as i128)),
    // Several equal outputs are refused, and without other flags they would be.
    ("run", "num-return-sequences", OneOf(&[1])),
    ("run", "random-seed", SEED),
    ("run", "end-id", Whole(i64::MIN as i128, i64::MAX as i128)),
    ("run", "streaming-interval", COUNT),
    ("run", "kv-cache-free-gpu-mem-fraction", PROBABILITY),
    ("bench", "threads", COUNT),
    ("bench", "batch-size", COUNT),
    ("bench", "context", COUNT),
    ("bench", "prefill-batch", COUNT),
    ("bench", "kv-cache-free-gpu-mem-fraction", PROBABILITY),
    ("bench", "steps", COUNT),
    ("bench", "warmup", ANY_SIZE),
    ("bench", "prefill", COUNT),
    ("bench", "requests", ANY_SIZE),
    ("bench", "input-len", Span),
    ("bench", "output-len", Span),
    ("bench", "arrival-rate", Real { low: 0.0, high: f64::MAX, f32: false }),
    ("bench", "random-seed", SEED),
    ("diff", "layers", COUNT),
    ("diff", "f32-limit", Real { low: 0.0, high: f64::MAX, f32: false }),
    ("diff", "half-limit", Real { low: 0.0, high: f64::MAX, f32: false }),
    ("diff", "max-input-length", COUNT),
    ("diff", "input-len", COUNT),
    ("diff", "max-output-len", COUNT),
    ("diff", "random-seed", SEED),
    ("diff", "threads", COUNT),
    ("verify", "workers", COUNT),
];

/// A whole number as Rust writes it, or with a plus.
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
            AnyReal => text.parse::<f64>().is_ok(),
            Span => {
                let (low, high) = text.split_once('-').unwrap_or((text, text));
                let side = |text| whole(text).filter(|n| (1..=SIZE).contains(n));
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

/// Parses and validates `mixtral command --flag=value`; what can be planned without files is.
fn accepts(command: &str, flag: &str, value: &str) -> bool {
    let mut line = vec!["mixtral".to_owned(), command.to_owned(), format!("--{flag}={value}")];
    line.extend((command == "verify").then(|| "somewhere".to_owned()));
    line.extend((command == "diff").then(|| "--backends=cpu,cuda".to_owned()));
    let Ok(parsed) = parse(line.into_iter().map(Into::into)) else { return false };
    match parsed.cli.command {
        Command::Convert(args) => args.validate().is_ok_and(|options| {
            // Most of what fits a flag fits no model; that is an error too, and never a panic.
            let _ = mixtral_convert::plan(&options.convert);
            true
        }),
        Command::Build(args) => args.validate().is_ok_and(|options| {
            let _ = options.limits.check();
            true
        }),
        Command::Run(args) => args.validate().is_ok(),
        Command::Bench(args) => args.validate().is_ok(),
        Command::Diff(args) => args.validate().is_ok(),
        Command::Inspect(_) | Command::Verify(_) => true,
    }
}

/// Numbers at and about the edges, of every size, and what is none.
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
    // Some flags take a zero with a minus for a zero and some do not, which hurts nobody.
    .prop_filter("minus zero", |value| value != "-0")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_numeric_flag_takes_its_range_and_nothing_else(value in value()) {
        for (command, flag, takes) in FLAGS {
            // A list of values: each of them is tried as one.
            let is_list = matches!((*command, *flag), ("bench", "batch-size" | "prefill") | ("diff", "input-len"));
            if is_list && value.contains(',') {
                continue;
            }
            prop_assert_eq!(
                accepts(command, flag, &value),
                takes.takes(&value),
                "mixtral {} --{}={:?} should be one of {:?}", command, flag, value, takes
            );
        }
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
