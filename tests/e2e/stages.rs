//! The three stages, and the directories between them.

use serde_json::Value;

use crate::tool::{example_engine, mixtral_in, root};

/// The old commands work with only the program's name changed.
#[test]
fn the_old_spelling_works() {
    let dir = tempfile::tempdir().unwrap();
    let model = root().join("examples/tiny-mixtral");
    let model = model.display();
    let at = dir.path();
    let convert = format!(
        "convert --model_dir {model} --output_dir ./ckpt --dtype float16 --tp_size 1 --moe_tp_mode 1 --load_by_shard --workers 2"
    );
    let said = mixtral_in(at, &convert, &[]);
    assert!(said.err.contains("warning: accepted for old command lines, without effect here: --load-by-shard"));
    said.ok();
    mixtral_in(
        at,
        "build --checkpoint_dir ./ckpt --output_dir ./engine --gemm_plugin float16 --max_batch_size 8 --strongly_typed",
        &[],
    )
    .ok();
    let run = format!("run --engine_dir ./engine --tokenizer_dir {model} --max_output_len 24 --input_text");
    let said = mixtral_in(at, &run, &["KING RICHARD III:\nWhat", "ROMEO:\n"]).ok();
    insta::assert_snapshot!("old_spelling", said);
    // Each stage's default input is the default output of the stage before, so the short commands give the same.
    mixtral_in(at, &format!("convert --model_dir {model}"), &[]).ok();
    mixtral_in(at, "build", &[]).ok();
    let short = mixtral_in(at, "run --max_output_len 24 --input_text", &["KING RICHARD III:\nWhat", "ROMEO:\n"]);
    assert_eq!(short.ok(), said);
}

#[test]
fn conversion_and_build_are_reproducible() {
    let (a, b) = (example_engine("--dtype auto", ""), example_engine("--dtype auto", ""));
    for file in [
        "tllm_checkpoint/config.json",
        "tllm_checkpoint/rank0.safetensors",
        "engine_outputs/config.json",
        "engine_outputs/rank0.engine",
        "engine_outputs/rank0.weights.safetensors",
        "engine_outputs/tokenizer.json",
    ] {
        let read = |dir: &tempfile::TempDir| std::fs::read(dir.path().join(file)).unwrap();
        assert!(read(&a) == read(&b), "{file}");
    }
}

#[test]
fn dry_run_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let model = root().join("examples/tiny-mixtral");
    let said =
        mixtral_in(dir.path(), &format!("convert --model_dir {} --tp_size 2 --dry-run", model.display()), &[]).ok();
    assert!(said.contains("rank 1:") && said.contains("disk") && said.contains("memory"), "{said}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn inspect_says_what_is_there() {
    let dir = example_engine("--dtype auto", "");
    let checkpoint = mixtral_in(dir.path(), "inspect tllm_checkpoint", &[]).ok();
    assert!(checkpoint.contains("transformer.layers.3.mlp.fc.weight"), "{checkpoint}");
    let engine = mixtral_in(dir.path(), "inspect engine_outputs", &[]).ok();
    assert!(engine.contains("\nop expert_gate_up "), "{engine}");
    for (what, tensor) in [("tllm_checkpoint", 0), ("engine_outputs", 0)] {
        let said = mixtral_in(dir.path(), &format!("inspect {what} --json"), &[]).ok();
        let value: Value = serde_json::from_str(&said).unwrap();
        assert_eq!(value["ranks"][0]["tensors"][tensor]["name"], "transformer.vocab_embedding.weight");
    }
}

/// Without a checkpoint, a geometry is enough: weights are dummy ones, and prompts and outputs are token ids.
#[test]
fn dummy_weights_need_no_model() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let geometry = "--vocab_size 99 --n_layer 2 --n_head 4 --n_kv_head 2 --n_embd 32 --inter_size 40 --n_positions 64 --moe_num_experts 4 --moe_top_k 2";
    mixtral_in(at, &format!("convert --output_dir c --dtype bf16 {geometry}"), &[]).ok();
    std::fs::write(at.join("ids.csv"), "1,2,3\n4\n").unwrap();
    let generate = |seed: u32, config: &str| {
        mixtral_in(at, &format!("build {config} --output_dir e{seed} --seed {seed}"), &[]).ok();
        mixtral_in(
            at,
            &format!("run --engine_dir e{seed} --input_file ids.csv --max_output_len 6 --output_csv out.csv"),
            &[],
        )
        .ok();
        std::fs::read_to_string(at.join("out.csv")).unwrap()
    };
    let first = generate(1, "--checkpoint_dir c");
    assert_eq!(first.lines().map(|l| l.split(',').count()).collect::<Vec<_>>(), [6, 6]);
    assert_eq!(first, generate(1, "--model_config c/config.json"));
    assert_ne!(first, generate(2, "--checkpoint_dir c"));
}

#[test]
fn bench_measures_every_kind_of_step() {
    let dir = example_engine("--dtype auto --tp_size 2", "--max-batch-size 3");
    let flags = "--quick --batch-size 1,3 --steps 3 --warmup 1 --context 5 --prefill 8 --prefill-batch 2 --requests 7 --input-len 2-6 \
                 --output-len 1-4 --arrival-rate 2000 --per-op --json";
    let said = mixtral_in(dir.path(), &format!("bench {flags}"), &[]).ok();
    let value: Value = serde_json::from_str(&said).unwrap();
    let figure = |path: &str| value.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("{path} in {said}"));
    for path in [
        "/read_gb_per_s",
        "/gflop_per_s",
        "/load_s",
        "/first_token_s",
        "/decode/0/median_ms",
        "/decode/1/tokens_per_s",
        "/decode/1/bandwidth_percent",
        "/prefill/0/tokens_per_s",
        "/throughput/output_tokens_per_s",
        "/throughput/first_token_ms_p99",
        "/throughput/per_token_ms_median",
        "/throughput/between_tokens/median_ms",
    ] {
        assert!(figure(path) > 0.0, "{path}");
    }
    assert_eq!((figure("/decode/1/batch_size"), figure("/decode/1/steps")), (3.0, 3.0));
    let tables = value["per_op"].as_array().unwrap();
    assert_eq!(
        tables.iter().map(|t| t["step"].as_str().unwrap()).collect::<Vec<_>>(),
        ["decode of 1", "decode of 3", "prefill of 2 × 8"]
    );
    for table in tables {
        let ops = table["ops"].as_array().unwrap();
        assert!(ops.iter().any(|op| op["op"].as_str().unwrap().starts_with("all_reduce ")));
        let percent: f64 = ops.iter().map(|op| op["percent"].as_f64().unwrap()).sum();
        assert!((percent - 100.0).abs() < 1e-6);
    }
}

#[test]
fn explain_and_graph_show_the_program() {
    let dir = example_engine("--dtype auto", "--explain --graph program.dot");
    let dot = std::fs::read_to_string(dir.path().join("program.dot")).unwrap();
    assert!(dot.starts_with("digraph program {") && dot.contains("expert_down"));
    assert!(dot.contains("layers 0 to 2, each as this one") && dot.contains("|prefill: "), "{dot}");
    let said = mixtral_in(dir.path(), "build --explain", &[]).ok();
    assert!(said.contains("us at roof") && said.contains("op route ") && said.contains("decode of 1 token"), "{said}");
}
