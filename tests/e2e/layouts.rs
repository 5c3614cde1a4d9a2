//! Parallelism changes no tokens: every layout of ranks gives the tokens of one rank.

use std::fs;
use std::path::Path;

use crate::tool::{has_mpirun, mixtral_in, mpirun_in, root};

/// Two tiny f32 models with dummy weights. Layers do not divide evenly over the stages, nor experts over the ranks. KV
/// heads are replicated (2 over 4 ranks), and the vocabulary is odd.
const GEOMETRIES: [(&str, u32); 2] = [
    (
        "--vocab_size 101 --n_layer 4 --n_head 4 --n_kv_head 2 --head_size 6 --n_embd 20 --inter_size 24 --n_positions 256 --moe_num_experts 5 --moe_top_k 2",
        3,
    ),
    (
        "--vocab_size 67 --n_layer 3 --n_head 8 --n_kv_head 4 --n_embd 32 --inter_size 40 --n_positions 256 --moe_num_experts 8 --moe_top_k 3",
        11,
    ),
];

/// tp × pp × {experts in slices, whole experts, both}.
fn layouts() -> Vec<String> {
    let mut layouts = Vec::new();
    for tp in [1, 2, 4] {
        for pp in [1, 2, 3] {
            let mut experts = vec![(tp, 1)];
            if tp > 1 {
                experts.push((1, tp));
            }
            if tp == 4 {
                experts.push((2, 2));
            }
            for (moe_tp, moe_ep) in experts {
                layouts.push(format!("--tp_size {tp} --pp_size {pp} --moe_tp_size {moe_tp} --moe_ep_size {moe_ep}"));
            }
        }
    }
    layouts
}

/// tp_size · pp_size.
fn world_size(layout: &str) -> usize {
    let mut words = layout.split(' ');
    let mut size = |flag| words.find(|w| *w == flag).and_then(|_| words.next()).unwrap().parse::<usize>().unwrap();
    size("--tp_size") * size("--pp_size")
}

/// 20 prompts of 1 to 39 tokens.
fn write_prompts(path: &Path, vocab: u32) {
    let prompt = |n: u32| (0..1 + 2 * n).map(|i| ((i * 31 + n * 17) % vocab).to_string()).collect::<Vec<_>>().join(",");
    fs::write(path, (0..20).map(prompt).collect::<Vec<_>>().join("\n") + "\n").unwrap();
}

/// Builds the engine of a layout in `e`, and returns what its ranks generate as threads of one process.
fn tokens(at: &Path, geometry: &str, seed: u32, layout: &str) -> String {
    mixtral_in(at, &format!("convert --dtype f32 --output_dir c {geometry} {layout}"), &[]).ok();
    let limits = "--max-batch-size 8 --max-num-tokens 48";
    mixtral_in(at, &format!("build --checkpoint_dir c --output_dir e --seed {seed} {limits}"), &[]).ok();
    mixtral_in(at, "run --engine_dir e --input_file ids.csv --max_output_len 12 --output_csv out.csv", &[]).ok();
    fs::read_to_string(at.join("out.csv")).unwrap()
}

#[test]
fn every_layout_gives_the_tokens_of_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    for (geometry, seed) in GEOMETRIES {
        let vocab: u32 = geometry.split(' ').nth(1).unwrap().parse().unwrap();
        write_prompts(&at.join("ids.csv"), vocab);
        let alone = tokens(at, geometry, seed, "");
        assert_eq!(alone.lines().count(), 20);
        for layout in layouts() {
            assert_eq!(tokens(at, geometry, seed, &layout), alone, "{geometry} {layout}");
            if has_mpirun() {
                let ranks = world_size(&layout);
                let run = "run --engine_dir e --input_file ids.csv --max_output_len 12 --output_csv mpi.csv";
                mpirun_in(at, ranks, run).ok();
                assert_eq!(fs::read_to_string(at.join("mpi.csv")).unwrap(), alone, "mpirun: {geometry} {layout}");
                fs::remove_file(at.join("mpi.csv")).unwrap();
            }
        }
    }
}

#[test]
fn sharded_embeddings_give_the_tokens_of_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let (geometry, seed) = GEOMETRIES[0];
    write_prompts(&at.join("ids.csv"), 101);
    let alone = tokens(at, geometry, seed, "");
    for dim in [0, 1] {
        let layout = format!("--tp_size 4 --pp_size 2 --use_parallel_embedding --embedding_sharding_dim {dim}");
        assert_eq!(tokens(at, geometry, seed, &layout), alone, "{layout}");
    }
}

/// Quantized weights in layouts whose ranks begin at whole groups. Both models' sizes are multiples of 32 on every rank.
#[test]
fn quantized_engines_give_the_tokens_of_one_rank_in_every_layout() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    write_prompts(&at.join("ids.csv"), 101);
    let geometry = "--vocab_size 101 --n_layer 4 --n_head 4 --n_kv_head 2 --head_size 32 --n_embd 72 --inter_size 128 --n_positions 256 --moe_num_experts 5 --moe_top_k 2";
    for quantized in [
        "--use_weight_only",
        "--use_weight_only --weight_only_precision int4 --group_size 32",
        "--use_weight_only --weight_only_precision int4 --group_size 32 --attention-precision int4",
        "--use_weight_only --weight_only_precision int4 --group_size -1 --attention-precision float",
    ] {
        let geometry = format!("{geometry} {quantized}");
        let alone = tokens(at, &geometry, 5, "");
        for layout in layouts() {
            assert_eq!(tokens(at, &geometry, 5, &layout), alone, "{geometry} {layout}");
        }
    }
    // The last engine has twelve ranks: four by three.
    if has_mpirun() {
        mpirun_in(at, 12, "run --engine_dir e --input_file ids.csv --max_output_len 12 --output_csv mpi.csv").ok();
        assert_eq!(fs::read_to_string(at.join("mpi.csv")).unwrap(), fs::read_to_string(at.join("out.csv")).unwrap());
    }
}

/// Stages compute what one rank computes, to the bit. Where ranks add up their parts, an input may be rounded to another number
/// of e4m3, so these layouts are compared by the text of a trained model below.
#[test]
fn stages_of_fp8_engines_give_the_tokens_of_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    for (geometry, seed) in GEOMETRIES {
        let vocab: u32 = geometry.split(' ').nth(1).unwrap().parse().unwrap();
        write_prompts(&at.join("ids.csv"), vocab);
        let geometry = format!("{geometry} --qformat fp8 --kv_cache_dtype fp8");
        let alone = tokens(at, &geometry, seed, "");
        for layout in ["--pp_size 2", "--pp_size 3"] {
            assert_eq!(tokens(at, &geometry, seed, layout), alone, "{geometry} {layout}");
        }
    }
}

/// In a pipeline no step has all sequences. `bench` takes a round of steps for one.
#[test]
fn batches_are_measured_in_pipelines_too() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let (geometry, seed) = GEOMETRIES[0];
    for layout in ["--pp_size 3", "--tp_size 2 --pp_size 2"] {
        write_prompts(&at.join("ids.csv"), 101);
        tokens(at, geometry, seed, layout);
        let line = "bench --engine_dir e --json --quick --batch-size 1,8 --steps 6 --warmup 1 --context 5 --prefill 4";
        let bench: serde_json::Value = serde_json::from_str(&mixtral_in(at, line, &[]).ok()).unwrap();
        assert_eq!(bench["left_out"], serde_json::json!([]), "{layout}");
        assert_eq!(bench["decode"].as_array().unwrap().len(), 2, "{layout}");
    }
}

/// Sixteen sequences of 64 tokens.
fn calibration_text() -> String {
    let line = |n: u32| (0..64).map(|i| (300 + (i * i * 7 + n * 131) % 1700).to_string()).collect::<Vec<_>>().join(",");
    (0..16).map(line).collect::<Vec<_>>().join("\n")
}

/// The example model in f32: with 16 bits, the ranks' sums could decide between near-ties.
#[test]
fn the_example_model_writes_the_same_text_in_every_layout() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let model = root().join("examples/tiny-mixtral");
    let text = |layout: &str| {
        let convert = format!("convert --model_dir {} --output_dir c --dtype float32 {layout}", model.display());
        mixtral_in(at, &convert, &[]).ok();
        mixtral_in(at, "build --checkpoint_dir c --output_dir e --gemm_plugin float32", &[]).ok();
        mixtral_in(at, "run --engine_dir e --max_output_len 32 --input_text", &["ROMEO:\n", "First Citizen:\nWe"]).ok()
    };
    let alone = text("");
    for layout in [
        "--tp_size 2",
        "--tp_size 2 --moe_tp_mode 1",
        "--tp_size 6 --moe_tp_size 3 --moe_ep_size 2",
        "--pp_size 3",
        "--tp_size 2 --pp_size 4 --moe_tp_mode 1",
    ] {
        assert_eq!(text(layout), alone, "{layout}");
    }
    fs::write(at.join("calibration.csv"), calibration_text()).unwrap();
    for quantized in [
        "--use_weight_only",
        "--use_weight_only --weight_only_precision int4 --group_size 32",
        "--qformat int4_wo --group_size 32 --attention_precision int4 --calib_data calibration.csv",
        "--qformat fp8 --calib_data calibration.csv",
        "--kv_cache_dtype fp8 --calib_data calibration.csv",
    ] {
        let alone = text(quantized);
        for layout in ["--tp_size 2", "--tp_size 6 --moe_tp_size 3 --moe_ep_size 2", "--tp_size 2 --pp_size 2"] {
            assert_eq!(text(&format!("{quantized} {layout}")), alone, "{quantized} {layout}");
        }
    }
}
