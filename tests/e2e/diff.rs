//! `mixtral diff`: engines that compute the same, and engines in which something was changed.

use std::fs;
use std::path::Path;

use mixtral_engine::{EngineDir, EngineWriter, Op, Program};
use mixtral_model::Rank;
use serde_json::Value;

use crate::tool::{example_engine, mixtral_in};

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
