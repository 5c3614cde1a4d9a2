//! `mixtral diff`: engines that compute the same, and engines in which something was changed.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use mixtral_engine::{EngineDir, EngineWriter, Op, Program};
use mixtral_model::Rank;
use serde_json::Value;

use crate::tool::{example_engine, mixtral_in, root};

/// A small f32 model with dummy weights, whose layers and experts do not divide evenly over ranks, whose KV heads are
/// shared by four ranks, and whose vocabulary is odd.
const GEOMETRY: &str = "--vocab_size 101 --n_layer 3 --n_head 4 --n_kv_head 2 --head_size 6 --n_embd 20 --inter_size 24 --n_positions 256 --moe_num_experts 5 --moe_top_k 2";

/// Builds an engine of [`GEOMETRY`] in `output`.
fn build(at: &Path, output: &str, layout: &str, seed: u32) {
    mixtral_in(at, &format!("convert --dtype f32 --output_dir c {GEOMETRY} {layout}"), &[]).ok();
    let limits = "--max-batch-size 8 --max-num-tokens 48";
    mixtral_in(at, &format!("build --checkpoint_dir c --output_dir {output} --seed {seed} {limits}"), &[]).ok();
}

/// Writes an engine like `engine_outputs` to `other`, with a changed program and a weight file of its own.
fn changed(dir: &Path, change: impl Fn(&mut Program)) {
    let engine = EngineDir::open(&dir.join("engine_outputs")).unwrap();
    let mut program = engine.program(Rank(0)).unwrap();
    change(&mut program);
    let copy = dir.join("weights");
    fs::copy(dir.join("engine_outputs/rank0.weights.safetensors"), &copy).unwrap();
    let writer = EngineWriter::create(&dir.join("other")).unwrap();
    let record = writer.rank(&program, &[].into(), Some(&copy)).unwrap();
    let mut config = engine.config().clone();
    config.ranks = vec![record];
    config.files.clear();
    writer.finish(config).unwrap();
    fs::remove_file(copy).unwrap();
}

/// The buffers that differ, and the message.
fn differs(dir: &Path, flags: &str) -> (Vec<String>, String) {
    let said = mixtral_in(dir, &format!("diff engine_outputs other --json {flags}"), &[]);
    assert_eq!(said.code, 1, "{}{}", said.out, said.err);
    let value: Value = serde_json::from_str(&said.out).unwrap();
    let rows = value["operations"].as_array().unwrap();
    let wrong = rows.iter().filter(|row| row["exceeded"] != 0);
    (wrong.map(|row| row["buffer"].as_str().unwrap().to_owned()).collect(), said.err)
}

#[test]
fn equal_engines_are_equal() {
    let dir = example_engine("--dtype bf16", "");
    changed(dir.path(), |_| ());
    for flags in [
        "engine_outputs --backends cpu,cpu",
        "engine_outputs other",
        "engine_outputs other --layers 2 -v",
        "engine_outputs other --start layer1.qkv --stop layer1.attended --input-len 9,40,200 --max-output-len 2",
    ] {
        let said = mixtral_in(dir.path(), &format!("diff {flags}"), &[]).ok();
        assert!(said.contains(" ok ") && !said.contains("FAIL"), "{flags}: {said}");
    }
    let said = mixtral_in(dir.path(), "diff engine_outputs other --json --input-text", &["ROMEO:\n", "What"]).ok();
    let value: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&value["exceeded"], &value["first"], &value["steps"]), (&0.into(), &Value::Null, &3.into()));
    assert!(value["operations"].as_array().unwrap().iter().all(|row| row["max"] == 0.0));
}

#[test]
fn a_changed_operation_is_named() {
    let dir = example_engine("--dtype f32", "");
    // Changes the epsilon of one norm in the program's text.
    changed(dir.path(), |program| {
        let norms =
            program.ops.iter_mut().filter_map(|op| if let Op::Norm { eps, .. } = op { Some(eps) } else { None });
        norms.skip(2).take(1).for_each(|eps| *eps *= 100.0);
    });
    let (wrong, message) = differs(dir.path(), "");
    assert_eq!(wrong, ["layer1.moe_input"]);
    assert!(
        message.starts_with("error: operation 16 (norm) is wrong: `layer1.moe_input` has an error (NMSE) of "),
        "{message}"
    );
    assert!(message.contains(" in step 0, limit 1e-10; furthest apart at ["), "{message}");
    // Wider limits allow the difference, and it is not found if the norm is outside of the range.
    for flags in ["--f32-limit 0.1", "--stop layer1.qkv", "--start layer1.activated", "--layers 1"] {
        mixtral_in(dir.path(), &format!("diff engine_outputs other {flags}"), &[]).ok();
    }
}

#[test]
fn a_changed_weight_is_named() {
    let dir = example_engine("--dtype bf16", "");
    changed(dir.path(), |_| ());
    let path = dir.path().join("other/rank0.weights.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let info = metadata.info("transformer.layers.2.mlp.proj.weight").unwrap();
    let (start, end) = info.data_offsets;
    // The first expert gets another expert's matrix. Headers and sizes stay as they were.
    let expert = (end - start) / info.shape[0];
    let data = 8 + header + start;
    bytes.copy_within(data + expert..data + 2 * expert, data);
    fs::write(&path, bytes).unwrap();
    let (wrong, message) = differs(dir.path(), "--input-len 60");
    assert_eq!(wrong, ["layer2.expert_output"]);
    assert!(message.contains("(expert_down) is wrong: `layer2.expert_output`"), "{message}");
}

#[test]
fn ranks_are_compared_with_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    build(at, "alone", "", 3);
    let mut left_out = Vec::new();
    for layout in [
        "--tp_size 2",
        "--tp_size 2 --moe_tp_mode 1",
        "--pp_size 2",
        "--tp_size 4 --pp_size 2 --moe_tp_size 2 --moe_ep_size 2",
        "--tp_size 4 --use_parallel_embedding --embedding_sharding_dim 0",
        "--tp_size 4 --use_parallel_embedding --embedding_sharding_dim 1",
    ] {
        build(at, "ranks", layout, 3);
        let said = mixtral_in(at, "diff alone ranks --json --input-len 33,7", &[]).ok();
        let value: Value = serde_json::from_str(&said).unwrap();
        assert_eq!((&value["exceeded"], &value["steps"]), (&0.into(), &3.into()), "{layout}");
        left_out.push(format!("{layout}: {}", value["left_out"]));
        // Every rank of every stage is there, and everything that it computes before its first sum is the same to the bit.
        let rows = value["operations"].as_array().unwrap();
        let ranks: BTreeSet<u64> = rows.iter().map(|row| row["rank"].as_u64().unwrap()).collect();
        let world: u64 = value["other"].as_str().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        assert_eq!(ranks, (0..world).collect(), "{layout}");
        for buffer in [
            "qkv",
            "keys",
            "values",
            "attended",
            "after_attention",
            "router_logits",
            "expert_ids",
            "activated",
            "output",
        ] {
            let found = rows.iter().filter(|row| row["buffer"].as_str().unwrap().ends_with(&format!(".{buffer}")));
            let found: BTreeSet<u64> = found.map(|row| row["rank"].as_u64().unwrap()).collect();
            assert_eq!(found, ranks, "{layout}: {buffer}");
        }
        let exact = ["layer0.qkv", "layer0.attended", "layer0.expert_ids", "layer0.activated", "layer0.expert_offsets"];
        let mut of_exact = rows.iter().filter(|row| exact.contains(&row["buffer"].as_str().unwrap()));
        assert!(of_exact.all(|row| row["max"] == 0.0), "{layout}: {rows:#?}");
        let some = mixtral_in(at, "diff alone ranks --start layer1.qkv --stop layer1.attended", &[]).ok();
        assert!(some.contains("linear qkv (f32)") && !some.contains("all_reduce"), "{some}");
        // The order of the engines does not matter.
        let table = mixtral_in(at, "diff ranks alone", &[]).ok();
        assert!(table.starts_with("reference alone on ") && table.contains("r:op"), "{table}");
    }
    insta::assert_snapshot!(left_out.join("\n"));
}

/// Converts the example model and builds its engine in `output`.
fn build_example(at: &Path, output: &str, flags: &str) {
    let model = root().join("examples/tiny-mixtral");
    let convert = format!("convert --model_dir {} --output_dir c {flags}", model.display());
    mixtral_in(at, &convert, &[]).ok();
    mixtral_in(at, &format!("build --checkpoint_dir c --output_dir {output}"), &[]).ok();
}

/// In 16 bits ranks round more often than one rank does. Quantized weights are cut between groups.
#[test]
fn ranks_in_16_bits_are_within_the_limits() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    for format in
        ["--dtype bf16", "--dtype f16", "--dtype bf16 --use_weight_only --weight_only_precision int4 --group_size 32"]
    {
        build_example(at, "alone", format);
        for layout in
            ["--tp_size 2", "--tp_size 6 --moe_tp_size 3 --moe_ep_size 2", "--tp_size 2 --pp_size 2 --moe_tp_mode 1"]
        {
            build_example(at, "ranks", &format!("{format} {layout}"));
            let said = mixtral_in(at, "diff alone ranks --input-len 100,7 --max-output-len 5", &[]);
            assert_eq!(said.code, 0, "{format} {layout}: {}{}", said.out, said.err);
        }
    }
}

#[test]
fn a_wrong_rank_is_named_with_its_operation() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    build_example(at, "alone", "--dtype f32");
    // Writes the bytes of a rank's tensor over those of another rank, or the first of `part` equal parts of them.
    let swap = |from: (usize, &str), to: (usize, &str), part: usize| {
        let file = |rank: usize| at.join(format!("ranks/rank{rank}.weights.safetensors"));
        let place = |bytes: &[u8], name: &str| {
            let (header, metadata) = safetensors::SafeTensors::read_metadata(bytes).unwrap();
            let (start, end) = metadata.info(name).unwrap().data_offsets;
            8 + header + start..8 + header + start + (end - start) / part
        };
        let source = fs::read(file(from.0)).unwrap();
        let source = source[place(&source, from.1)].to_vec();
        let mut bytes = fs::read(file(to.0)).unwrap();
        let range = place(&bytes, to.1);
        bytes[range].copy_from_slice(&source);
        fs::write(file(to.0), bytes).unwrap();
    };
    let named = |layout: &str, wrong: &dyn Fn()| {
        build_example(at, "ranks", &format!("--dtype f32 {layout}"));
        mixtral_in(at, "diff alone ranks", &[]).ok();
        wrong();
        let said = mixtral_in(at, "diff alone ranks", &[]);
        assert_eq!(said.code, 1, "{}", said.out);
        said.err.split(" has ").next().unwrap().to_owned()
    };
    let qkv = "transformer.layers.1.attention.qkv.weight";
    let found = [
        named("--tp_size 2", &|| swap((1, qkv), (0, qkv), 1)),
        named("--tp_size 2", &|| swap((0, qkv), (1, qkv), 1)),
        // Parts of sums: the reference computes them too.
        named("--tp_size 2", &|| {
            let dense = "transformer.layers.2.attention.dense.weight";
            swap((0, dense), (1, dense), 1);
        }),
        named("--tp_size 6 --moe_tp_size 3 --moe_ep_size 2", &|| {
            let proj = "transformer.layers.1.mlp.proj.weight";
            swap((0, proj), (3, proj), 2);
        }),
        // Whole experts: those of rank 0 on rank 1.
        named("--tp_size 2 --moe_tp_mode 1", &|| {
            let fc = "transformer.layers.3.mlp.fc.weight";
            swap((0, fc), (1, fc), 1);
        }),
        named("--tp_size 2 --moe_tp_mode 1", &|| {
            let proj = "transformer.layers.0.mlp.proj.weight";
            swap((1, proj), (0, proj), 4);
        }),
        // The second stage has the first one's layers.
        named("--pp_size 2", &|| {
            let router = "transformer.layers.0.mlp.router.weight";
            swap((0, router), (1, router), 1);
        }),
    ];
    insta::assert_snapshot!(found.join("\n"));
}

/// All weights of one rank of another model.
#[test]
fn a_rank_of_another_seed_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    build(at, "alone", "", 3);
    build(at, "ranks", "--tp_size 2", 4);
    let said = mixtral_in(at, "diff alone ranks", &[]);
    assert!(said.err.starts_with("error: operation 0 (embed) of rank 0 is wrong: `embedded` has "), "{}", said.err);
    build(at, "ranks", "--tp_size 2", 3);
    for (flags, expected) in [
        (
            "alone ranks --backends cuda",
            "error: an engine of several ranks is compared on the CPU; leave out --backends, or use --backends cpu",
        ),
        (
            "alone ranks --layers 2",
            "error: --layers is for engines of one rank; --start and --stop compare fewer operations",
        ),
        (
            "ranks ranks",
            "error: the engines have 2 and 2 ranks, but the reference must have one; convert with --tp-size 1 --pp-size 1",
        ),
    ] {
        let said = mixtral_in(at, &format!("diff {flags}"), &[]);
        assert_eq!((said.code, said.err.trim_end()), (1, expected), "{flags}");
    }
    mixtral_in(at, "build --checkpoint_dir c --output_dir ranks --seed 3 --max-num-tokens 32", &[]).ok();
    let said = mixtral_in(at, "diff alone ranks", &[]);
    assert!(said.err.starts_with("error: the engines cannot be compared: the limits are "), "{}", said.err);
}

#[test]
fn engines_that_do_not_match_are_refused() {
    let dir = example_engine("--dtype bf16", "");
    mixtral_in(dir.path(), "build --output-dir other --max-num-tokens 512", &[]).ok();
    for (flags, expected) in [
        (
            "engine_outputs other",
            "error: the engines cannot be compared: max_num_tokens is 8192 in the reference and 512 in the other; build both with the same limits, from checkpoints of the same geometry and data type",
        ),
        (
            "engine_outputs --backends cpu,cpu --layers 9",
            "error: engine_outputs: 9 layers of a program of 4; ask for 1 to 4",
        ),
        (
            "engine_outputs --backends cpu,cpu --start layer0.x",
            "error: there is no operation `layer0.x`: give an index below 46, or a buffer that the operation writes, as `mixtral inspect` shows them",
        ),
    ] {
        let said = mixtral_in(dir.path(), &format!("diff {flags}"), &[]);
        assert_eq!((said.code, said.err.trim_end()), (1, expected), "{flags}");
    }
}

#[test]
fn wrong_command_lines() {
    let dir = tempfile::tempdir().unwrap();
    for (line, expected) in [
        ("diff a", "error: one engine is compared on two backends: add --backends cpu,cuda, or name a second engine"),
        ("diff a b c", "error: unexpected value 'c' for '[ENGINE]...' found; no more were expected"),
        ("diff a b --backends cpu,cpu,cpu", "error: --backends takes one backend, or one for each of two engines"),
        ("diff a b --f32-limit nan", "error: --f32-limit is NaN; expected a finite number of at least 0"),
    ] {
        let said = mixtral_in(dir.path(), line, &[]);
        assert_eq!((said.code, said.err.lines().next()), (2, Some(expected)), "{line}");
    }
}
