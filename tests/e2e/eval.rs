//! `mixtral eval`: perplexities and accuracies of one engine and of two, and of several ranks.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::tool::{Said, example_engine, has_mpirun, mixtral_in, mpirun_in, root};

const TEXT: &str = "Good morrow, cousin.\nWhat news from Padua?\nNone that is good, my lord: the mill is burnt.\n";

fn measured(at: &Path, flags: &str) -> Value {
    serde_json::from_str(&mixtral_in(at, &format!("eval --json {flags}"), &[]).ok()).unwrap()
}

#[test]
fn two_engines_are_measured_side_by_side_and_ranks_change_nothing() {
    let dir = example_engine("--dtype f32", "--backend cpu --gather-context-logits");
    let at = dir.path();
    fs::write(at.join("text.txt"), TEXT).unwrap();
    let model = root().join("examples/tiny-mixtral");
    mixtral_in(at, &format!("convert --model-dir {} --output-dir two --dtype f32 --tp-size 2", model.display()), &[])
        .ok();
    mixtral_in(at, "build --checkpoint-dir two --output-dir ranks --backend cpu", &[]).ok();

    let flags = "--text text.txt --context 24 --stride 8";
    let one = measured(at, flags);
    assert_eq!(
        (&one["engine_dir"], &one["context"], &one["stride"]),
        (&json!("engine_outputs"), &json!(24), &json!(8))
    );
    let perplexity = one["perplexity"].as_f64().unwrap();
    assert!((one["nats_per_token"].as_f64().unwrap().exp() / perplexity - 1.0).abs() < 1e-9);

    let both = measured(at, &format!("{flags} --engine-dir engine_outputs --engine-dir ranks"));
    let [first, second] = &both["engines"].as_array().unwrap()[..] else { panic!("{both}") };
    assert_eq!(*first, one);
    let close = |other: &Value| (other["perplexity"].as_f64().unwrap() / perplexity - 1.0).abs() < 1e-6;
    assert!(close(second) && second["tokens"] == one["tokens"], "{both}");
    let printed = mixtral_in(at, &format!("eval {flags} --engine-dir engine_outputs --engine-dir ranks"), &[]).ok();
    assert!(printed.contains("engine_outputs: perplexity ") && printed.contains("the second's perplexity is 0.000 %"));
    if has_mpirun() {
        let said = mpirun_in(at, 2, &format!("eval {flags} --engine-dir ranks --json")).ok();
        assert_eq!(serde_json::from_str::<Value>(&said).unwrap(), *second);
    }
}

#[test]
fn the_likeliest_choice_is_found_and_what_is_no_question_is_refused() {
    let dir = example_engine("", "--backend cpu --gather-context-logits");
    let at = dir.path();
    let question =
        |answer: usize| json!({"context": "Good morrow, ", "choices": ["cousin.", "xq zzk"], "answer": answer});
    fs::write(at.join("right.jsonl"), format!("{}\n\n{}\n", question(0), question(1))).unwrap();
    let found = measured(at, "--choices right.jsonl");
    assert_eq!((&found["accuracy"], &found["questions"]), (&json!(0.5), &json!(2)));
    assert_eq!(found["logprobs"][0], found["logprobs"][1]);
    let printed = mixtral_in(at, "eval --choices right.jsonl", &[]).ok();
    assert_eq!(printed, "engine_outputs: accuracy 50.00 % (50.00 % normalized by length) of 2 questions\n");

    fs::write(at.join("answer.jsonl"), question(2).to_string()).unwrap();
    fs::write(at.join("key.jsonl"), r#"{"context": "a", "choice": []}"#).unwrap();
    fs::write(at.join("empty.jsonl"), json!({"context": "a", "choices": [""], "answer": 0}).to_string()).unwrap();
    fs::write(at.join("none.jsonl"), "\n").unwrap();
    fs::write(at.join("one.txt"), "a").unwrap();
    let lines = [
        "eval --choices answer.jsonl",
        "eval --choices key.jsonl",
        "eval --choices empty.jsonl",
        "eval --choices none.jsonl",
        "eval --text missing.txt",
        "eval --text one.txt --no-add-special-tokens",
        "eval --text one.txt --context 513",
        "eval --text one.txt --stride 513",
        "eval --text one.txt --engine-dir nowhere",
    ];
    let said = lines.map(|line| {
        let Said { out, err, code } = mixtral_in(at, line, &[]);
        assert_eq!((out.as_str(), code), ("", 1), "{line}: {err}");
        format!("$ mixtral {line}\n{err}")
    });
    insta::assert_snapshot!(said.join("\n"));
}
