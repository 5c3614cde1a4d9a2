//! Beam searches and log-probabilities on the command line.

use std::fs;

use serde_json::Value;

use crate::tool::{example_engine, mixtral_in};

/// The numbers of a `.npy` file of f32, behind its header.
fn numbers(path: &std::path::Path) -> (String, Vec<f32>) {
    let bytes = fs::read(path).unwrap();
    let end = bytes.iter().position(|&byte| byte == b'\n').unwrap() + 1;
    let header = String::from_utf8_lossy(&bytes[10..end]);
    let shape = header.split("'shape': ").nth(1).unwrap().split(')').next().unwrap().to_owned() + ")";
    (shape, bytes[end..].chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect())
}

#[test]
fn beams_are_printed_and_written_best_first() {
    let dir = example_engine("--dtype f32", "");
    let at = dir.path();
    let line =
        "run --num-beams 3 --early-stopping 0 --length-penalty 0.5 --max-output-len 6 --input-text ROMEO: JULIET:";
    let files = ["--output-csv", "ids.csv", "--output-npy", "ids.npy", "--output-log-probs-npy", "logprobs.npy"];
    let files = [&files[..], &["--output-cum-log-probs-npy", "sums.npy"]].concat();
    let said = mixtral_in(at, line, &files).ok();
    let printed: Vec<&str> = said.lines().filter(|line| line.starts_with("Output")).collect();
    assert_eq!(printed.len(), 6, "{said}");
    assert!(printed[4].starts_with("Output [Text 1 Beam 1]: \""), "{said}");
    let said: Value = serde_json::from_str(&mixtral_in(at, line, &["--json"]).ok()).unwrap();
    let ids = fs::read_to_string(at.join("ids.csv")).unwrap();
    let (shape, logprobs) = numbers(&at.join("logprobs.npy"));
    let (sums_shape, sums) = numbers(&at.join("sums.npy"));
    assert_eq!((&*shape, &*sums_shape), ("(6, 6, )", "(6, )"));
    for (index, line) in ids.lines().enumerate() {
        let outputs = &said["prompts"][index / 3]["outputs"];
        let output = &outputs[index % 3];
        let tokens: Vec<String> = output["ids"].as_array().unwrap().iter().map(ToString::to_string).collect();
        assert_eq!((line, output["beam"].as_u64()), (&*tokens.join(","), Some(index as u64 % 3)));
        let row = &logprobs[6 * index..][..6];
        assert!(
            row[..tokens.len()].iter().all(|x| *x < 0.0) && row[tokens.len()..].iter().all(|x| x.is_nan()),
            "{row:?}"
        );
        let sum: f32 = row[..tokens.len()].iter().sum();
        assert_eq!(sum, sums[index]);
        let score = output["score"].as_f64().unwrap();
        assert!((score - f64::from(sum) / (tokens.len() as f64).sqrt()).abs() < 1e-5);
        assert!(index % 3 == 0 || score <= outputs[index % 3 - 1]["score"].as_f64().unwrap());
    }
}

#[test]
fn what_beams_do_not_have_is_refused() {
    let dir = example_engine("", "--max_batch_size 4");
    let said = |more: &str| {
        let said = mixtral_in(dir.path(), &format!("run --num-beams 2 --max-output-len 4 --input-text x {more}"), &[]);
        assert_ne!(said.code, 0, "{more}");
        said.err.lines().last().unwrap_or_default().to_owned()
    };
    let all = ["--num-return-sequences 2 --top-k 0", "--streaming", "--stop-words a", "--logits-hash", "--num-beams=5"];
    insta::assert_snapshot!(all.map(said).join("\n"));
}

/// The log-probabilities of a greedy output are those of the likeliest tokens. Flags that move blocks or change steps change
/// none of them.
#[test]
fn log_probabilities_are_written_for_draws_too() {
    let dir = example_engine("--dtype f32", "");
    let at = dir.path();
    let line = "run --max-output-len 5 --no-repeat-ngram-size 2 --min-length 3 --input-text ROMEO: JULIET:";
    mixtral_in(at, line, &["--output-log-probs-npy", "a.npy"]).ok();
    let blocks = ["--kv-cache-enable-block-reuse", "--scheduler-policy", "max_utilization"];
    let steps = ["--max-prefill-tokens", "2", "--no-overlap", "--output-log-probs-npy", "b.npy"];
    mixtral_in(at, line, &[&blocks[..], &steps].concat()).ok();
    let (shape, logprobs) = numbers(&at.join("a.npy"));
    assert_eq!(shape, "(2, 5, )");
    assert!(logprobs.iter().all(|x| *x < 0.0));
    assert_eq!(fs::read(at.join("a.npy")).unwrap(), fs::read(at.join("b.npy")).unwrap());
}
