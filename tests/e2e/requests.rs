//! What requests may ask for: a file of requests, each with flags of its own, biases, and standard input.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::tool::{example_engine, mixtral_in, mixtral_reading};

fn run(at: &Path, flags: &str, more: &[&str]) -> Value {
    serde_json::from_str(&mixtral_in(at, &format!("run --json {flags}"), more).ok()).unwrap()
}

/// The outputs of all prompts, one after another.
fn outputs(said: &Value) -> Vec<Value> {
    said["prompts"].as_array().unwrap().iter().flat_map(|p| p["outputs"].as_array().unwrap().clone()).collect()
}

fn ids(output: &Value) -> Vec<u64> {
    output["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
}

#[test]
fn each_line_of_a_file_is_a_request_with_flags_of_its_own() {
    let dir = example_engine("", "--backend cpu");
    let at = dir.path();
    let plain = outputs(&run(at, "--max-output-len 9 --input-text", &["ROMEO:", "JULIET:"]));
    let (first, second) = (ids(&plain[0]), ids(&plain[1]));
    let prompt = run(at, "--max-output-len 1 --input-text ROMEO:", &[])["prompts"][0]["ids"].clone();
    let lines = [
        json!({"prompt": "ROMEO:", "max_output_len": 5}),
        json!({"prompt": prompt, "end_id": first[3]}),
        json!({"prompt": "ROMEO:", "logit_bias": {first[0].to_string(): -100}, "max_output_len": 1}),
        json!({"prompt": "JULIET:", "top_k": 0, "temperature": 1.5, "num_return_sequences": 2, "random_seed": 3}),
    ];
    let text = lines.map(|line| line.to_string()).join("\n\n");
    fs::write(at.join("requests.jsonl"), &text).unwrap();
    let said = outputs(&run(at, "--max-output-len 9 --input-file requests.jsonl", &[]));
    assert_eq!(said.len(), 5);
    assert_eq!(ids(&said[0]), first[..5]);
    assert_eq!(ids(&said[1]), first[..=3]);
    assert!(ids(&said[2])[0] != first[0] && ids(&said[2]).len() == 1);
    assert!(ids(&said[3]) != second && ids(&said[3]) != ids(&said[4]));
    assert_eq!((&said[3]["beam"], &said[4]["beam"]), (&json!(0), &json!(1)));

    let wrong = [r#"{"prompt": "a", "top_p": 2}"#, r#"{"promt": "a"}"#, r#"{"prompt": [1], "messages": []}"#, "[]"];
    let refused = wrong.map(|line| {
        fs::write(at.join("wrong.jsonl"), format!("{{\"prompt\": \"a\"}}\n{line}\n")).unwrap();
        let said = mixtral_in(at, "run --input-file wrong.jsonl", &[]);
        assert_eq!(said.code, 1, "{line}: {}", said.err);
        said.err
    });
    insta::assert_snapshot!(refused.concat());
}

#[test]
fn prompts_come_from_standard_input() {
    let dir = example_engine("", "--backend cpu");
    let args = ["run", "--max-output-len", "4", "--input-file", "-"];
    let printed = mixtral_reading(dir.path(), &args, "ROMEO:\r\nJULIET:\n").ok();
    let typed = mixtral_in(dir.path(), "run --max-output-len 4 --input-text ROMEO: JULIET:", &[]).ok();
    assert_eq!(printed, typed);
}
