//! Compares the table of old flags with the parser: every flag is known, and the parser does what the table says.

use clap::CommandFactory as _;

use super::old_flags::{OldFlag, Takes, Verdict, table};

use super::{Cli, Command, NotParsed, parse};

/// A value that the flag accepts, if the flag works. For all other flags any text will do.
fn value(flag: &str) -> &'static str {
    match flag {
        "--dtype" => "bfloat16",
        "--log-level" => "info",
        "--hidden-act" => "silu",
        "--rms-norm-eps" => "0.00001",
        "--kv-cache-free-gpu-memory-fraction" => "0.8",
        "--gpt-attention-plugin" | "--gemm-plugin" | "--moe-plugin" => "float16",
        "--tokens-per-block" => "64",
        "--top-p" => "0.5",
        // Several outputs of greedy sampling are refused.
        "--num-return-sequences" | "--tp-size" | "--moe-tp-size" | "--moe-ep-size" | "--moe-tp-mode" => "1",
        "--weight-only-precision" => "int8",
        "--group-size" => "64",
        "--qformat" => "int4_wo",
        "--kv-cache-dtype" => "fp8",
        "--use-fp8-context-fmha" => "enable",
        "--embedding-sharding-dim" | "--moe-renorm-mode" | "--moe-normalization-mode" => "1",
        _ => "8",
    }
}

/// Two spellings of `mixtral PROGRAM FLAG values`, with the other flags that the program needs.
fn lines(old: &OldFlag, values: &[&str]) -> Vec<Vec<String>> {
    let mut base = vec!["mixtral".to_owned(), old.program.to_owned()];
    if old.program == "quantize" && old.flag != "--model-dir" {
        base.push("--model-dir=m".to_owned());
    }
    let typed = old.flag.replacen("--", "", 1).replace('-', "_");
    let underscored = if old.flag.starts_with("--") { format!("--{typed}") } else { old.flag.clone() };
    let mut apart = base.clone();
    apart.push(underscored.clone());
    apart.extend(values.iter().map(|&value| value.to_owned()));
    match (values, old.flag.starts_with("--")) {
        ([one], true) => vec![apart, [&base[..], &[format!("{underscored}={one}")]].concat()],
        _ => vec![apart],
    }
}

/// The flags that are left out of a command line, or why the line is refused.
fn outcome(line: &[String]) -> Result<Vec<String>, String> {
    match parse(line.iter().map(Into::into)) {
        Ok(parsed) => {
            let Cli { command, .. } = parsed.cli;
            let valid = match command {
                Command::Convert(args) => args.validate().map(drop),
                Command::Build(args) => args.validate().map(drop),
                Command::Run(args) => args.validate().map(drop),
                _ => panic!("{line:?} is another command"),
            };
            valid.map(|()| parsed.left_out.iter().map(|old| old.flag.clone()).collect()).map_err(|usage| usage.0)
        }
        Err(NotParsed::Usage(usage)) => Err(usage.0),
        Err(NotParsed::Clap(error)) => panic!("{line:?}: {error}"),
    }
}

fn values(old: &OldFlag, value: &'static str) -> Vec<Vec<&'static str>> {
    match old.takes {
        Takes::Nothing => vec![vec![]],
        Takes::Value => vec![vec![value]],
        Takes::ValueOrNothing => vec![vec![], vec![value]],
        Takes::Values => vec![vec![value], vec![value, value]],
    }
}

#[test]
fn every_old_flag_is_known_and_its_verdict_is_what_happens() {
    for old in table() {
        let expect = |values: &[&'static str], expected: Result<Vec<String>, String>| {
            for line in lines(old, values) {
                assert_eq!(outcome(&line), expected, "{line:?}");
            }
        };
        let left_out = || Ok(vec![old.flag.clone()]);
        match &old.verdict {
            Verdict::Works => values(old, value(&old.flag)).iter().for_each(|values| expect(values, Ok(vec![]))),
            Verdict::Accepted => values(old, "x").iter().for_each(|values| expect(values, left_out())),
            Verdict::Refused => {
                for values in values(old, "x") {
                    let shown: String = values.iter().map(|value| format!(" {value}")).collect();
                    expect(&values, Err(format!("{}{shown}: {}", old.flag, old.why)));
                }
            }
            Verdict::Only(allowed) => {
                allowed.iter().for_each(|value| expect(&[value], left_out()));
                expect(&["x"], Err(format!("{} x: {}", old.flag, old.why)));
            }
        }
    }
}

/// Each flag of a program is in the table once, and every flag that does not simply work has a reason.
#[test]
fn the_table_is_whole() {
    let count = |program: &str| table().iter().filter(|old| old.program == program).count();
    let counts = ["convert", "build", "run", "quantize"].map(count);
    assert_eq!(counts, [74, 89, 74, 32], "{} rows", table().len());
    assert_eq!(counts.iter().sum::<usize>(), table().len());
    for (index, old) in table().iter().enumerate() {
        assert!(!table()[..index].iter().any(|o| (o.program, &o.flag) == (old.program, &old.flag)), "{}", old.flag);
        assert_eq!(old.why.is_empty(), old.verdict == Verdict::Works, "{}", old.flag);
    }
}

/// A flag that this program has itself is not taken out of its command lines.
#[test]
fn a_flag_of_ours_works() {
    let cli = Cli::command();
    for old in table().iter().filter(|old| old.verdict != Verdict::Works) {
        let program = if old.program == "quantize" { "convert" } else { old.program };
        let command = cli.find_subcommand(program).expect("it is a program");
        let name = old.flag.trim_start_matches('-');
        let is_ours = |arg: &clap::Arg| {
            arg.get_long() == Some(name) || arg.get_all_aliases().is_some_and(|names| names.contains(&name))
        };
        assert!(!command.get_arguments().any(is_ours), "mixtral {program} {} is both", old.flag);
    }
}

/// No row of the document is skipped because of a typing mistake in it.
#[test]
fn every_line_of_the_table_is_read() {
    let text = include_str!("../../../../docs/old-flags.md");
    let rows =
        text.lines().filter(|line| line.starts_with("| ") && line.contains("| -") && !line.contains("| ---")).count();
    assert_eq!(rows, table().len());
}

/// The parsed command line, as it is printed for debugging.
fn parsed(line: &[&str]) -> String {
    match parse(line.iter().map(Into::into)) {
        Ok(parsed) => format!("{:?}", parsed.cli.command),
        Err(NotParsed::Usage(usage)) => usage.0,
        Err(NotParsed::Clap(error)) => error.to_string(),
    }
}

#[track_caller]
fn run_args(line: &[&str]) -> super::run::RunArgs {
    let words = ["mixtral", "run"].iter().chain(line);
    match parse(words.map(Into::into)) {
        Ok(super::Parsed { cli: Cli { command: Command::Run(args), .. }, .. }) => *args,
        other => panic!("{other:?}"),
    }
}

#[test]
fn texts_may_begin_like_flags() {
    let texts = |line: &[&str]| run_args(line).input_text;
    assert_eq!(texts(&["--input_text", "- hello", "--help me", "--max_output_len", "3"]), ["- hello", "--help me"]);
    assert_eq!(run_args(&["--input_text", "- a", "--max_output_len", "3"]).request.max_output_len, 3);
    assert_eq!(texts(&["--input-text=- a list item"]), ["- a list item"]);
    assert_eq!(
        texts(&["--input-text", "-5 degrees", "-5", "-", "---", "-1.5e3"]),
        ["-5 degrees", "-5", "-", "---", "-1.5e3"]
    );
    assert_eq!(texts(&["--input-text", "-not a flag", "-quiche"]), ["-not a flag", "-quiche"]);
    assert_eq!(texts(&["--input_text", "--a_b = c_d"]), ["--a_b = c_d"]);
    assert_eq!(texts(&["--input_text", "a_b", "--output_csv=a_b.csv"]), ["a_b"]);
    assert_eq!(
        run_args(&["--bad_words", "- x", "--stop_words", "-- y", "z"]).words.stop.for_prompts(1).unwrap(),
        [["-- y", "z"]]
    );
    // A flag is still read as a flag, and a flag with a typo does not become a prompt.
    assert!(parsed(&["mixtral", "run", "--input_text", "a", "--max_ouput_len", "3"]).contains("unexpected argument"));
    assert_eq!(texts(&["--input_text", "a", "--log_level", "error", "-q", "-v"]), ["a"]);
}

#[test]
fn the_last_of_a_flag_counts() {
    let args = run_args(&[
        "--top_k",
        "3",
        "--input_text",
        "a",
        "b",
        "--top-k=5",
        "--input_text",
        "c",
        "--streaming",
        "--streaming",
    ]);
    assert_eq!((args.request.sampling.top_k, &args.input_text[..], args.streaming), (5, &["c".to_owned()][..], true));
    let twice = |command: &str, flag: &str, first: &str, second: &str| {
        let shown = |values: &[&str]| {
            let flags = values.iter().flat_map(|value| [flag, value]);
            parsed(&["mixtral", command].into_iter().chain(flags).collect::<Vec<_>>())
        };
        assert_eq!(shown(&[first, second]), shown(&[second]), "mixtral {command} {flag}");
        assert_ne!(shown(&[first]), shown(&[second]), "mixtral {command} {flag}");
    };
    twice("convert", "--tp_size", "2", "4");
    twice("convert", "--dtype", "f16", "f32");
    twice("build", "--arch", "sm_80", "sm_90a");
    twice("build", "--max_batch_size", "7", "9");
    twice("bench", "--batch-size", "1", "2");
    twice("bench", "--prefill", "16", "32");
    twice("diff", "--backends", "cpu,cuda", "cuda,cpu");
    twice("diff", "--input-len", "3", "4");
}

#[test]
fn quantize_in_full_precision_is_convert() {
    let validated = |line: &[&str]| match parse(line.iter().map(Into::into)) {
        Ok(super::Parsed { cli: Cli { command: Command::Convert(args), .. }, .. }) => {
            format!("{:?}", args.validate().unwrap().convert)
        }
        _ => panic!("{line:?}"),
    };
    let quantized = ["mixtral", "quantize", "--model_dir", "m", "--qformat", "full_prec", "--calib_size", "32"];
    let converted = ["mixtral", "convert", "--model_dir", "m", "--output_dir", "exported_model"];
    assert_eq!(validated(&quantized), validated(&converted));
    let to_int4 = ["mixtral", "quantize", "--model_dir", "m", "--qformat", "int4_wo"];
    let int4 = [&converted[..], &["--use_weight_only", "--weight_only_precision", "int4"]].concat();
    assert_eq!(validated(&to_int4), validated(&int4));
    let named = parsed(&["mixtral", "quantize", "--model_dir", "m", "--output_dir", "o"]);
    assert_eq!(named, parsed(&["mixtral", "convert", "--model_dir", "m", "--output_dir", "o"]));
    assert!(parsed(&["mixtral", "quantize", "--qformat", "full_prec"]).contains("--model-dir"));
}

#[test]
fn a_flag_that_takes_a_value_needs_one() {
    assert!(parsed(&["mixtral", "build", "--profiling_verbosity", "--max_batch_size", "2"]).contains("takes a value"));
    assert!(parsed(&["mixtral", "build", "--kv_cache_type"]).contains("takes a value"));
}
