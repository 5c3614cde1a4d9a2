//! Models that libraries quantized (`tests/goldens/quantized/README.md`): each layout of ranks gives the tokens that
//! transformers gives with the dequantized weights.

use std::fs;

use safetensors::SafeTensors;

use crate::tool::{fast_dir, mixtral_in, root};

/// Lines of token ids from the tensors `name`.0, `name`.1 and `name`.2.
fn lines(file: &SafeTensors<'_>, name: &str) -> String {
    let line = |n: usize| {
        let tensor = file.tensor(&format!("{name}.{n}")).unwrap();
        let ids = tensor.data().chunks_exact(4).map(|bytes| i32::from_le_bytes(bytes.try_into().unwrap()).to_string());
        ids.collect::<Vec<_>>().join(",") + "\n"
    };
    (0..3).map(line).collect()
}

fn agrees(model: &str, layouts: &[&str]) {
    let source = root().join("tests/goldens/quantized").join(model);
    let bytes = fs::read(source.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let dir = fast_dir();
    let at = dir.path();
    fs::write(at.join("ids.csv"), lines(&expected, "prompt")).unwrap();
    for layout in layouts {
        let convert = format!("convert --model_dir {} --dtype f32 --output_dir c {layout}", source.display());
        mixtral_in(at, &convert, &[]).ok();
        mixtral_in(at, "build --checkpoint_dir c --output_dir e", &[]).ok();
        let run = "run --engine_dir e --input_file ids.csv --max_output_len 8 --end_id -1 --output_csv out.csv";
        mixtral_in(at, run, &[]).ok();
        assert_eq!(fs::read_to_string(at.join("out.csv")).unwrap(), lines(&expected, "tokens"), "{model} {layout}");
    }
}

/// One rank, tensor parallel, in stages, and experts whole.
const LAYOUTS: [&str; 4] = ["", "--tp_size 2", "--pp_size 2", "--tp_size 2 --moe_tp_size 1 --moe_ep_size 2"];
/// Without tensor parallelism, which would cut groups of these models.
const STAGES: [&str; 2] = ["", "--pp_size 2"];

#[test]
fn autoawq() {
    agrees("awq-mixtral", &LAYOUTS);
    agrees("awq-mistral", &STAGES);
}

#[test]
fn gptq() {
    agrees("gptq-mixtral", &LAYOUTS);
    agrees("gptq-mixtral-rows", &LAYOUTS);
    agrees("gptq-mistral-v2", &STAGES);
}

/// Checkpoints that ModelOpt wrote for TensorRT-LLM (`tests/goldens/tensorrt-llm/README.md`) are built as they are, in its own cut
/// for two ranks too.
#[test]
fn tensorrt_llm() {
    let goldens = root().join("tests/goldens/tensorrt-llm");
    let bytes = fs::read(goldens.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let dir = fast_dir();
    let at = dir.path();
    fs::write(at.join("ids.csv"), lines(&expected, "prompt")).unwrap();
    for checkpoint in ["fp8-tp1", "fp8-tp2"] {
        let from = goldens.join(checkpoint);
        mixtral_in(at, &format!("build --checkpoint_dir {} --output_dir e --strongly_typed", from.display()), &[]).ok();
        let program = String::from_utf8_lossy(&fs::read(at.join("e/rank0.engine")).unwrap()).into_owned();
        assert!(program.contains("kv_scale key=1.0 value=1.0"), "{checkpoint}");
        let run = "run --engine_dir e --input_file ids.csv --max_output_len 8 --end_id -1 --output_csv out.csv";
        mixtral_in(at, run, &[]).ok();
        assert_eq!(fs::read_to_string(at.join("out.csv")).unwrap(), lines(&expected, "tokens"), "{checkpoint}");
    }
}

#[test]
fn fp8() {
    agrees("compressed-mixtral-fp8", &LAYOUTS);
    agrees("compressed-mixtral-fp8-rows", &[""]);
    agrees("compressed-mixtral-fp8-dynamic", &LAYOUTS);
    agrees("compressed-mistral-fp8", &[""]);
    agrees("modelopt-mixtral-fp8", &LAYOUTS);
    agrees("modelopt-mistral-fp8", &STAGES);
}

#[test]
fn compressed_tensors() {
    agrees("compressed-mixtral-int4", &LAYOUTS);
    agrees("compressed-mixtral-int8", &LAYOUTS);
    agrees("compressed-mixtral-int8-unpacked", &[""]);
    agrees("compressed-mixtral-int8-zeros", &STAGES);
    agrees("compressed-mistral-int4-zeros", &STAGES);
}

/// Whether the model or a checkpoint of its floats is quantized, the engine is the same.
#[test]
fn build_quantizes_a_checkpoint_of_floats() {
    let dir = fast_dir();
    let at = dir.path();
    let model = root().join("examples/tiny-mixtral");
    let convert = format!("convert --model_dir {} --dtype bfloat16 --tp_size 2", model.display());
    mixtral_in(at, &format!("{convert} --output_dir floats"), &[]).ok();
    for flags in
        ["--weight_only_precision int8", "--weight_only_precision int4 --group_size 32 --attention_precision int4"]
    {
        mixtral_in(at, &format!("{convert} --output_dir c --use_weight_only {flags}"), &[]).ok();
        mixtral_in(at, "build --checkpoint_dir c --output_dir e", &[]).ok();
        mixtral_in(at, &format!("build --checkpoint_dir floats --output_dir at_build {flags}"), &[]).ok();
        for file in ["config.json", "rank0.weights.safetensors", "rank1.weights.safetensors"] {
            let read = |engine: &str| fs::read(at.join(engine).join(file)).unwrap();
            assert!(read("at_build") == read("e"), "{flags}: {file} differs");
        }
        // It is there already.
        mixtral_in(at, &format!("build --checkpoint_dir c --output_dir e {flags}"), &[]).ok();
    }
    let said = mixtral_in(at, "build --checkpoint_dir c --output_dir e --weight_only_precision int8", &[]);
    assert_eq!(said.code, 1);
    assert!(said.err.contains("quantized already, to int4:g32:bf16"), "{}", said.err);
    let mut left: Vec<_> = fs::read_dir(at).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["at_build", "c", "e", "floats"]);
}

/// The old quantize.py's command, word for word but for the sizes. Without a data set the model writes its own text.
#[test]
fn the_old_command_quantizes_to_fp8() {
    let dir = fast_dir();
    let at = dir.path();
    let model = root().join("examples/tiny-mixtral");
    let quantize = format!(
        "quantize --model_dir {} --dtype float16 --qformat fp8 --kv_cache_dtype fp8 --output_dir ckpt --calib_size 4 --tp_size 2 --calib_max_seq_length 96",
        model.display()
    );
    let said = mixtral_in(at, &quantize, &[]);
    assert!(said.err.contains("calibrated with 4 sequences, 384 tokens"), "{}", said.err);
    said.ok();
    let config = fs::read_to_string(at.join("ckpt/config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["quantization"]["quant_algo"], "FP8");
    assert_eq!(config["quantization"]["kv_cache_quant_algo"], "FP8");
    let bytes = fs::read(at.join("ckpt/rank1.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let shape = |name: &str| {
        let tensor = file.tensor(&format!("transformer.layers.3.{name}")).unwrap();
        (format!("{:?}", tensor.dtype()), tensor.shape().to_vec())
    };
    assert_eq!(shape("attention.qkv.weight"), ("F8_E4M3".to_owned(), vec![160, 192]));
    assert_eq!(shape("attention.qkv.weights_scaling_factor"), ("F32".to_owned(), vec![1]));
    assert_eq!(shape("attention.qkv.activation_scaling_factor"), ("F32".to_owned(), vec![1]));
    assert_eq!(shape("attention.kv_cache_scaling_factor"), ("F32".to_owned(), vec![2]));
    assert_eq!(shape("mlp.fc.weight"), ("F8_E4M3".to_owned(), vec![8, 192, 192]));
    assert_eq!(shape("mlp.fc.weights_scaling_factor"), ("F32".to_owned(), vec![8, 1]));
    mixtral_in(at, "verify ckpt", &[]).ok();
    let build = "build --checkpoint_dir ckpt --output_dir engine --gemm_plugin float16 --strongly_typed --workers 2 --use_fp8_context_fmha enable";
    mixtral_in(at, build, &[]).ok();
    let config = fs::read_to_string(at.join("engine/config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["options"]["use_fp8_context_fmha"], "enable");
    assert!(mixtral_in(at, "inspect engine", &[]).ok().contains("attention of prompts in fp8"));
    let text = mixtral_in(at, "run --engine_dir engine --max_output_len 16 --input_text", &["ROMEO:\n"]).ok();
    assert!(text.contains("ROMEO"), "{text}");

    let by_rows =
        format!("quantize --model_dir {} --dtype float16 --qformat fp8_pc_pt --output_dir rows", model.display());
    mixtral_in(at, &by_rows, &[]).ok();
    for ckpt in ["ckpt", "rows"] {
        let for_gpu = format!("build --checkpoint_dir {ckpt} --output_dir gpu --arch sm_90a --dry-run --explain");
        let explained = mixtral_in(at, &for_gpu, &[]).ok();
        assert!(explained.contains("[wgmma:") && !explained.contains("[mma:"), "{explained}");
    }
    let refused = mixtral_in(at, "build --checkpoint_dir rows --use_fp8_context_fmha enable", &[]);
    assert_eq!(refused.code, 1);
    let why = "attention in fp8 takes its keys and values from an fp8 cache, and this model's cache is f16";
    assert!(refused.err.contains(why), "{}", refused.err);
    let to_int8 = mixtral_in(at, &quantize.replace("--kv_cache_dtype fp8", "--kv_cache_dtype int8"), &[]);
    assert_eq!(to_int8.code, 2);
    assert!(to_int8.err.contains("this version has no int8 cache; use fp8"), "{}", to_int8.err);
}
