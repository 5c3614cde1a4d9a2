//! A window of attention given at run time: the same logits as those of an engine that has it, and on a GPU its kernels.

use std::fs;

use serde_json::Value;
use tempfile::TempDir;

use crate::drivers::{driver, with_driver};
use crate::kernels::has_nvrtc;
use crate::tool::{Said, example_engine, example_model, mixtral_in};

const RUN: &str = "run --backend cpu --max-output-len 12 --logits-hash --json --input-text ROMEO: what JULIET:";

/// The ids of each prompt's output, and the hash of all logits.
fn generated(said: Said) -> (Value, Value) {
    let value: Value = serde_json::from_str(&said.ok()).unwrap();
    let ids = value["prompts"].as_array().unwrap().iter().map(|prompt| prompt["outputs"][0]["ids"].clone());
    (ids.collect(), value["logits_hash"].clone())
}

#[test]
fn a_window_at_run_time_is_that_of_the_model() {
    // An engine of the same model with a window of its own.
    let own = TempDir::new().unwrap();
    let config = example_model(own.path()).join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    assert!(text.contains("\"sliding_window\": null"));
    fs::write(&config, text.replace("\"sliding_window\": null", "\"sliding_window\": 5")).unwrap();
    mixtral_in(own.path(), "convert --model_dir model --dtype f32", &[]).ok();
    mixtral_in(own.path(), "build --backend cpu", &[]).ok();
    let engine = example_engine("--dtype f32", "--backend cpu");
    let run = |dir: &TempDir, more: &[&str]| generated(mixtral_in(dir.path(), RUN, more));

    let expected = run(&own, &[]);
    assert_eq!(run(&engine, &["--max-attention-window-size", "5"]), expected);
    assert_eq!(run(&engine, &["--max_attention_window_size", "5", "5"]), expected);
    assert_ne!(run(&engine, &[]), expected);
    // A window of the model's own stays, if it is smaller.
    assert_eq!(run(&own, &["--max-attention-window-size", "9"]), expected);
    assert_eq!(run(&own, &["--max-attention-window-size", "3"]), run(&engine, &["--max-attention-window-size", "3"]));
    let said = mixtral_in(own.path(), RUN, &["--max-attention-window-size", "9", "4"]);
    assert_eq!(said.err.matches("changes nothing").count(), 1, "{}", said.err);

    // One for each layer, over again; the second of two stages begins with the third.
    let by_layer = run(&engine, &["--max-attention-window-size", "4", "9", "6"]);
    assert!(by_layer != expected && by_layer != run(&engine, &["--max-attention-window-size", "4"]));
    let stages = example_engine("--dtype f32 --pp_size 2", "--backend cpu");
    assert_eq!(run(&stages, &["--max-attention-window-size", "4", "9", "6"]), by_layer);
}

/// An engine's kernels were compiled for the model's window. Those for another are compiled when it is loaded.
#[test]
fn a_gpu_gets_kernels_for_a_window_at_run_time() {
    let Some(folder) = driver(&[]) else { return };
    if !has_nvrtc() {
        return;
    }
    let engine = example_engine("--dtype auto", "--arch sm_90a --max_num_tokens 64");
    let run = |window: &str, variables: &[(&str, &str)]| {
        let line = format!(
            "run -v --backend cuda --max_output_len 4 --max-attention-window-size {window} --input-file ids.csv"
        );
        with_driver(folder.path(), engine.path(), &line, variables)
    };
    fs::write(engine.path().join("ids.csv"), "1,2,3\n").unwrap();
    let said = run("6", &[]);
    assert!(said.code == 0 && said.err.contains("kernels for a narrower attention"), "{}", said.err);
    // The longest sequence of this run has 7 tokens, so no other kernels are needed.
    let nowhere = [("MIXTRAL_NVRTC", "/nowhere")];
    let said = run("7", &nowhere);
    let changes_nothing = said.err.contains("--max-attention-window-size 7 changes nothing");
    assert!(said.code == 0 && changes_nothing && !said.err.contains("kernels for"), "{}", said.err);
    let said = run("5", &nowhere);
    let message = "error: --max-attention-window-size: a GPU needs kernels for it, which this engine does not hold; install NVRTC, leave the flag out, or run with --backend cpu";
    assert!(
        said.code == 1 && said.err.contains(message) && said.err.contains("MIXTRAL_NVRTC=/nowhere"),
        "{}",
        said.err
    );
}
