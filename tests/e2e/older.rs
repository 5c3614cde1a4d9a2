//! If a run that was to write a newer output has failed, the next stage uses the older output, but with a warning.

use std::fs;
use std::path::Path;

use mixtral_model::DType;
use mixtral_testkit::{Layout, TinyModel};

use crate::kills::small_model;
use crate::tool::{Said, fast_dir, mixtral_in};

const BUILD: &str = "build --max_seq_len 64";
const RUN: &str = "run --input_file prompt.csv --max_output_len 2 --end_id -1";

fn three_stages(at: &Path) {
    small_model(at);
    fs::write(at.join("prompt.csv"), "1,2,3\n").unwrap();
    ["convert --model_dir model", BUILD, RUN].iter().for_each(|line| drop(mixtral_in(at, line, &[]).ok()));
}

#[track_caller]
fn warns(said: Said, words: &[&str]) {
    let err = said.err.clone();
    said.ok();
    let warning = err.lines().find(|l| l.starts_with("warning: the last `")).unwrap_or_default();
    assert!(words.iter().all(|word| warning.contains(word)), "{err}");
}

#[test]
fn build_says_that_the_last_convert_failed() {
    let dir = fast_dir();
    let at = dir.path();
    three_stages(at);
    let spoiled = TinyModel::mixtral(DType::F32, 3);
    let mut tensors = spoiled.weights();
    tensors.last_mut().unwrap().data[..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    spoiled.write_tensors(&at.join("spoiled"), Layout::V5, 1, &tensors);
    for (line, code, why) in [
        // The runs fail before anything is written, while something is written, and before anything is read.
        ("convert --model_dir nowhere", 1, "there is no model directory nowhere"),
        ("convert --model_dir spoiled", 1, "elements that are not finite"),
        ("convert --model_dir model --tp_size 4 --moe_tp_size 3", 2, "--moe-tp-size"),
    ] {
        let said = mixtral_in(at, line, &[]);
        assert_eq!(said.code, code, "{}", said.err);
        warns(mixtral_in(at, BUILD, &[]), &["the last `mixtral convert` into tllm_checkpoint did not finish", why]);
    }
    mixtral_in(at, "convert --model_dir model", &[]).ok();
    let said = mixtral_in(at, BUILD, &[]);
    assert!(!said.err.contains("warning"), "{}", said.err);
    assert!(said.err.starts_with("from tllm_checkpoint: 2 layers"), "{}", said.err);
}

#[test]
fn run_says_that_the_last_build_failed() {
    let dir = fast_dir();
    let at = dir.path();
    three_stages(at);
    let before = mixtral_in(at, RUN, &[]).ok();
    assert_eq!(mixtral_in(at, "build --checkpoint_dir nowhere", &[]).code, 1);
    let said = mixtral_in(at, RUN, &[]);
    assert_eq!(said.out, before);
    warns(said, &["the last `mixtral build` into engine_outputs did not finish", "nowhere"]);
    mixtral_in(at, BUILD, &[]).ok();
    assert!(!mixtral_in(at, RUN, &[]).err.contains("warning"));
}

#[test]
fn a_directory_that_a_killed_run_was_replacing_says_so() {
    let dir = fast_dir();
    let at = dir.path();
    three_stages(at);
    fs::write(at.join("tllm_checkpoint/.mixtral-lock"), "").unwrap();
    fs::create_dir(at.join("tllm_checkpoint/.mixtral-new")).unwrap();
    warns(mixtral_in(at, BUILD, &[]), &["did not finish (it was stopped)"]);
    // Somebody holds the lock: a stage is working there.
    let lock = fs::File::open(at.join("tllm_checkpoint/.mixtral-lock")).unwrap();
    lock.lock().unwrap();
    let said = mixtral_in(at, BUILD, &[]);
    assert!(said.err.contains("`mixtral convert` is replacing tllm_checkpoint just now"), "{}", said.err);
    said.ok();
}

/// TensorRT-LLM's convert without a model wrote config.json alone, and its build then took dummy weights.
#[test]
fn a_configuration_alone_gets_dummy_weights_with_a_warning() {
    let dir = fast_dir();
    let at = dir.path();
    let geometry =
        "--n_layer 2 --n_embd 64 --n_head 4 --inter_size 96 --vocab_size 97 --moe_num_experts 4 --moe_top_k 2";
    mixtral_in(at, &format!("convert {geometry} --output_dir only"), &[]).ok();
    let said = mixtral_in(at, "build --checkpoint_dir only --max_seq_len 64", &[]);
    let warning = "warning: only has a config.json and no weights; the engine gets dummy weights (seed 0)";
    assert!(said.err.contains(warning), "{}", said.err);
    said.ok();
    fs::write(at.join("prompt.csv"), "1,2,3\n").unwrap();
    mixtral_in(at, RUN, &[]).ok();
}

/// The weights fit into f16, but the activations do not.
#[test]
fn activations_past_the_range_of_f16_name_bf16() {
    let dir = fast_dir();
    let at = dir.path();
    let model = TinyModel::mixtral(DType::Bf16, 9);
    let mut tensors = model.weights();
    for t in tensors.iter_mut().filter(|t| t.name.contains(".experts.")) {
        let value = if t.name.contains(".w2.") { 48_000.0 } else { 1.0 };
        let values: Vec<f32> = t.values().iter().map(|x| x.signum() * value).collect();
        *t = mixtral_testkit::Tensor::new(t.name.clone(), DType::Bf16, &t.shape, &values);
    }
    model.write_tensors(&at.join("model"), Layout::V4, 1, &tensors);
    fs::write(at.join("prompt.csv"), "1,2,3,4,5\n").unwrap();
    for (dtype, code) in [("bf16", 0), ("f16", 1)] {
        mixtral_in(at, &format!("convert --model_dir model --dtype {dtype}"), &[]).ok();
        mixtral_in(at, BUILD, &[]).ok();
        let said = mixtral_in(at, RUN, &[]);
        assert_eq!(said.code, code, "{dtype}: {}", said.err);
        let hint = "activations left the range of f16 (±65504), as those of models trained in bf16 may: convert it with --dtype bfloat16";
        assert_eq!(said.err.contains(hint), code == 1, "{dtype}: {}", said.err);
    }
}
