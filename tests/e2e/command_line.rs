//! The command line itself: old flags, flags that repeat or contradict a directory, measured figures, how much is
//! printed, and shell completions.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::tool::{Said, example_engine, mixtral_in, root};

/// Rows of `docs/old-flags.md`: program, flag, the values that follow it, verdict, reason.
fn old_flags() -> Vec<[String; 5]> {
    let text = fs::read_to_string(root().join("docs/old-flags.md")).unwrap();
    let row = |line: &str| -> Option<[String; 5]> {
        let cells: Vec<_> =
            line.strip_prefix('|')?.strip_suffix('|')?.split('|').map(|c| c.trim().to_owned()).collect();
        let [program, flag, _, takes, verdict, why] = <[String; 6]>::try_from(cells).ok()?;
        flag.starts_with('-').then_some([program, flag, takes, verdict, why]).filter(|row| !row[1].starts_with("---"))
    };
    text.lines().filter_map(row).collect()
}

/// A command line of the program that works. The tests add flags to it.
fn line(program: &str) -> String {
    let model = root().join("examples/tiny-mixtral").display().to_string();
    match program {
        "convert" | "quantize" => format!("{program} --model_dir {model} --output_dir c --dtype float16"),
        "build" => "build --output_dir e --backend cpu".to_owned(),
        _ => "run --max_output_len 2 --input_text a".to_owned(),
    }
}

/// A command line with all accepted flags of a program runs, with one warning that names each of them.
#[test]
fn what_is_accepted_runs_with_one_warning() {
    let dir = example_engine("--dtype f16", "--backend cpu");
    for program in ["convert", "build", "run", "quantize"] {
        let mut words = Vec::new();
        let mut flags = Vec::new();
        for [of, flag, takes, verdict, _] in old_flags() {
            let value = match verdict.as_str() {
                "accepted" => "1".to_owned(),
                only => match only.strip_prefix("only ") {
                    Some(values) => values.split(", ").next().unwrap_or_default().to_owned(),
                    None => continue,
                },
            };
            if of == program {
                flags.push(flag.replace('_', "-"));
                words.push(flag);
                words.extend((takes != "nothing").then_some(value));
            }
        }
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let said = mixtral_in(dir.path(), &line(program), &words);
        let warnings: Vec<&str> = said.err.lines().filter(|line| line.starts_with("warning: ")).collect();
        let expected = format!("warning: accepted for old command lines, without effect here: {}", flags.join(", "));
        assert_eq!(warnings, [expected], "{}", said.err);
        said.ok();
    }
}

#[test]
fn what_is_refused_says_why_with_exit_code_2() {
    let dir = tempfile::tempdir().unwrap();
    let mut refused = 0;
    for [program, flag, takes, verdict, why] in old_flags() {
        let value: &[&str] = match takes.as_str() {
            "nothing" => &[],
            _ => &["something"],
        };
        if verdict == "refused" || verdict.starts_with("only ") {
            let said = mixtral_in(dir.path(), &line(&program), &[&[flag.as_str()], value].concat());
            let shown = [&[flag.replace('_', "-").as_str()], value].concat().join(" ");
            assert_eq!((said.code, said.err), (2, format!("error: {shown}: {why}\n")), "mixtral {program} {flag}");
            refused += 1;
        }
    }
    assert!(refused > 50, "{refused}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is written");
}

/// A flag that repeats what a directory says gives a warning; a flag that contradicts it is refused.
#[test]
fn flags_beside_a_directory_are_compared_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let model = root().join("examples/tiny-mixtral").display().to_string();
    let convert =
        |flags: &str| mixtral_in(at, &format!("convert --model_dir {model} --output_dir c --tp_size 2 {flags}"), &[]);
    let build =
        |flags: &str| mixtral_in(at, &format!("build --checkpoint_dir c --output_dir e --backend cpu {flags}"), &[]);
    let agrees = |said: Said, flags: &str| {
        assert!(said.err.contains(&format!("warning: {flags}")) && said.err.contains("says the same"), "{}", said.err);
        said.ok();
    };
    let differs = |said: Said, parts: [&str; 2]| {
        assert_eq!((said.code, parts.iter().all(|part| said.err.contains(part))), (2, true), "{}", said.err);
    };
    agrees(
        convert("--n_layer 4 --hidden_act silu --rotary_base 10000 --moe_num_experts 8"),
        "--n-layer, --hidden-act, --rotary-base, --moe-num-experts change nothing",
    );
    differs(convert("--n_layer 5"), ["--n-layer 5, but ", "says num_hidden_layers 4;"]);
    differs(convert("--vocab_size 2050"), ["--vocab-size 2050, but ", "says vocab_size 2048;"]);
    differs(convert("--rms_norm_eps 0.1"), ["--rms-norm-eps 0.1, but ", "says rms_norm_eps 0.00001;"]);
    differs(convert("--moe_top_k 1"), ["--moe-top-k 1, but ", "says num_experts_per_tok 2;"]);
    agrees(build("--tp_size 2"), "--tp-size changes nothing");
    agrees(build("--pp_size 1 --moe_tp_mode 2 --dtype f16"), "--pp-size, --moe-tp-mode change nothing");
    differs(build("--tp_size 4"), ["--tp-size 4, but ", "says tp_size 2;"]);
    differs(build("--moe_tp_mode 1"), ["--moe-tp-mode 1, but ", "experts in 2 slices over 1 ranks"]);
    differs(build("--dtype bf16"), ["--dtype bf16, but ", "says dtype f16;"]);
    differs(build("--seed 3"), ["--seed is for dummy weights", "leave it out"]);
}

/// If only one of the two lengths is given, the longest sequence is that length plus the old commands' default for the
/// other, as far as the model's positions allow.
#[test]
fn a_length_alone_sets_the_longest_sequence() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let longest = |flags: &str| {
        mixtral_in(at, &format!("build --model-config mixtral-8x7b --dry-run --explain --backend cpu {flags}"), &[])
            .ok()
    };
    assert!(longest("--max_input_len 2000").contains("sequences of 3024 tokens"));
    assert!(longest("--max_output_len 100").contains("sequences of 1124 tokens"));
    assert!(longest("--max_input_len 200 --max_output_len 100").contains("sequences of 300 tokens"));
    assert!(longest("--max_input_len 32000").contains("sequences of 32768 tokens"));
    let said = mixtral_in(at, "build --model-config mixtral-8x7b --dry-run --max_input_len 9 --max_seq_len 90", &[]);
    assert!(said.err.contains("--max-input-len changes nothing beside --max-seq-len 90"), "{}", said.err);
    assert_eq!(fs::read_dir(at).unwrap().count(), 0, "a dry run writes nothing");
}

/// The picture and the explanation of 32 layers on 8 ranks stay short.
#[test]
fn eight_ranks_of_a_large_model_are_a_page() {
    let dir = tempfile::tempdir().unwrap();
    let line = "build --model-config mixtral-8x7b --tp-size 8 --dry-run --explain --graph all.dot --backend cpu";
    let said = mixtral_in(dir.path(), line, &[]).ok();
    assert!(said.lines().count() < 100 && said.contains("ranks 0 to 7 of 8, which are alike"), "{said}");
    let picture = fs::read_to_string(dir.path().join("all.dot")).unwrap();
    assert!(picture.lines().count() < 120 && picture.contains("layers 0 to 30, each as this one"), "{picture}");
    assert!(picture.contains(" MB, ") && picture.contains(" us"), "bytes and time stand in the boxes: {picture}");
}

/// Layouts of ranks on GPUs are compared without a GPU and without a compiler of kernels.
#[test]
fn a_dry_run_predicts_steps_of_all_ranks() {
    let dir = tempfile::tempdir().unwrap();
    let layouts = [
        "--tp-size 2",
        "--tp-size 2 --moe-tp-mode 1",
        "--pp-size 2",
        "--tp-size 2 --arch sm_80",
        "--tp-size 2 --backend cpu",
    ];
    let predicted = layouts.map(|layout| {
        let arch = if layout.contains("--arch") || layout.contains("cpu") { "" } else { "--arch sm_90a" };
        let line = format!("build --model-config mixtral-8x7b --dtype bf16 --dry-run --explain {arch} {layout}");
        let said = mixtral_in(dir.path(), &line, &[]).ok();
        let (_, table) = said.split_once("predicted").unwrap_or_default();
        format!("{layout}\n{}", table.trim_end())
    });
    insta::assert_snapshot!(predicted.join("\n\n"));
}

fn json(at: &Path, line: &str) -> Value {
    serde_json::from_str(&mixtral_in(at, line, &[]).ok()).expect("one JSON object")
}

/// A figure that was not measured is left out, and not printed as 0.
#[test]
fn figures_that_were_not_measured_are_not_printed() {
    let dir = example_engine("--dtype auto", "--backend cpu --max-batch-size 8");
    let at = dir.path();
    let plain = json(at, "run --json --max-output-len 6 --input-text a");
    assert!(plain.get("logits_hash").is_none() && plain.get("expert_counts").is_none(), "{plain}");
    assert!(plain["stats"]["decode_step_ms"].as_f64().unwrap() > 0.0);
    // One token comes with the prompt: nothing is decoded.
    let one = json(at, "run --json --stats --max-output-len 1 --input-text a");
    let stats = one["stats"].as_object().unwrap();
    assert!(stats.keys().all(|key| !key.starts_with("decode")), "{one}");
    assert!(stats.values().all(|figure| figure.as_f64().unwrap() > 0.0), "{one}");
    let profiled = json(at, "run --json --run-profiling --max-output-len 2 --input-text a");
    assert!(profiled["profiling"]["mean_latency_s"].as_f64().unwrap() > 0.0, "{profiled}");

    let bench = json(at, "bench --json --batch-size 2,9 --steps 2 --warmup 1 --context 3 --prefill 4");
    assert_eq!((bench["decode"].as_array().unwrap().len(), &bench["decode"][0]["batch_size"]), (1, &2.into()));
    assert_eq!(bench["left_out"][0]["batch_size"], 9);
    let printed = mixtral_in(at, "bench --batch-size 2,9 --steps 2 --warmup 1 --context 3 --prefill 4", &[]).ok();
    assert!(printed.contains("     9  left out: the engine takes 8 sequences"), "{printed}");
    assert!(!printed.contains(" 0.000"), "{printed}");
}

/// A run's statistics are counted while it runs. Only a benchmark measures the machine, since that takes memory and
/// time.
#[test]
fn figures_cost_what_they_show() {
    let dir = example_engine("--dtype auto", "--backend cpu");
    let measures = |line: &str| {
        let said = mixtral_in(dir.path(), line, &[]);
        let measures = said.err.contains("the machine's own rates: ");
        said.ok();
        measures
    };
    assert!(measures("bench -v --quick --batch-size 1 --steps 1 --prefill 4"));
    assert!(!measures("run -v --stats --max-output-len 4 --input-text a"));
    assert!(!measures("run -v --json --stats --expert-stats --max-output-len 4 --input-text a"));
}

#[test]
fn as_much_is_said_as_was_asked_for() {
    let dir = example_engine("--dtype auto", "--backend cpu");
    let at = dir.path();
    let run = "run --max-output-len 2 --use_py_session --input-text a";
    let usual = mixtral_in(at, run, &[]);
    assert!(usual.err.contains("--use-py-session"), "{}", usual.err);
    for quiet in ["-q", "--quiet", "-v -q", "--log_level error"] {
        let said = mixtral_in(at, &format!("{run} {quiet}"), &[]);
        assert_eq!((said.err.as_str(), &said.out), ("", &usual.out), "{quiet}");
    }
    for verbose in ["-v", "--verbose", "-q -v", "--log_level=verbose"] {
        let said = mixtral_in(at, &format!("{run} {verbose}"), &[]);
        for detail in ["engine engine_outputs: ", "tokenizer: ", "all: ", "there is one kind of session"] {
            assert!(said.err.contains(detail), "{verbose}: {}", said.err);
        }
        assert_eq!(said.out, usual.out);
    }
    assert_eq!(mixtral_in(at, "-q build --output-dir again", &[]).err, "");
    let failed = mixtral_in(at, "-q run --engine-dir nowhere", &[]);
    assert!(failed.code == 1 && failed.err.starts_with("error: "), "errors are always said: {}", failed.err);
}

#[test]
fn the_version_says_what_it_finds() {
    let at = Path::new(".");
    let (short, long) = (mixtral_in(at, "-V", &[]).ok(), mixtral_in(at, "--version", &[]).ok());
    assert!(short.starts_with(concat!("mixtral ", env!("CARGO_PKG_VERSION"))) && short.lines().count() == 1, "{short}");
    assert!(long.starts_with(&short), "{long}");
    for what in ["NVRTC ", "CUDA driver ", "GPU ", "CPU "] {
        assert!(long.lines().any(|line| line.starts_with(what)), "{long}");
    }
}

#[test]
fn shells_and_man_know_every_command() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = mixtral_in(at, &format!("completions {shell}"), &[]).ok();
        assert!(script.contains("moe-tp-mode") && script.contains("input-text"), "{shell}");
    }
    assert!(mixtral_in(at, "man", &[]).ok().contains(".TH mixtral 1"));
    mixtral_in(at, "man pages", &[]).ok();
    for command in ["convert", "build", "run", "serve", "bench", "diff", "inspect", "verify"] {
        let page = fs::read_to_string(at.join(format!("pages/mixtral-{command}.1"))).unwrap();
        assert!(page.contains("Examples:"), "{command}");
    }
}

/// The help of every command is grouped, has examples, and lists all flags that work.
#[test]
fn help_of_every_command() {
    let mut text = String::new();
    for command in ["", "convert", "build", "run", "serve", "bench", "diff", "inspect", "verify", "completions", "man"]
    {
        let help = mixtral_in(Path::new("."), &format!("{command} -h"), &[]).ok();
        assert!(help.contains("Examples:"), "{command}: {help}");
        text += &format!("$ mixtral {command} -h\n{help}\n");
    }
    insta::assert_snapshot!(text);
}
