//! The errors for inputs that cannot work. Every message says what is wrong and where, what was expected and found, and
//! the next step. It goes to stderr, and the exit code is 1 (the work failed) or 2 (wrong usage). None is a panic.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::tool::{Said, example_engine, mixtral_in, root};

/// The message of a command that must fail with `code`, without the temporary directory and without numbers that differ
/// from run to run.
#[track_caller]
fn refused(dir: &Path, said: Said, code: i32) -> String {
    assert_eq!(said.code, code, "{}{}", said.out, said.err);
    assert!(!said.err.contains("panicked"), "{}", said.err);
    let text = said.err.replace(&dir.display().to_string(), "DIR").replace(&root().display().to_string(), "ROOT");
    let hashes = |word: &str| word.len() >= 32 && word.chars().all(|c| c.is_ascii_hexdigit());
    let lines = text.lines().map(|line| {
        // The rest of the line says how long ago.
        let line = line.split(", written ").next().unwrap_or_default();
        line.split_inclusive(|c: char| !c.is_ascii_alphanumeric())
            .map(|word| {
                let bare = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
                let is_file_size =
                    bare.len() >= 5 && bare.chars().all(|c| c.is_ascii_digit()) && line.contains(" bytes");
                match bare {
                    _ if hashes(bare) => word.replace(bare, "HASH"),
                    _ if is_file_size => word.replace(bare, "SIZE"),
                    _ => word.to_owned(),
                }
            })
            .collect::<String>()
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// One snapshot for a table of command lines.
#[test]
fn wrong_command_lines() {
    let dir = tempfile::tempdir().unwrap();
    let lines = [
        "",
        "conver",
        "convert --tp-sizes 2",
        "convert --tp-size two",
        "convert --tp-size 0",
        "convert --dtype int8",
        "convert --moe-tp-mode 3",
        "convert --tp-size 4 --moe-tp-mode 0",
        "convert --tp-size 4 --moe-tp-size 3",
        "convert --tp-size 4 --moe-tp-size 2 --moe-ep-size 4",
        "convert --moe-normalization-mode 2",
        "convert --use-weight-only --weight-only-precision int4_awq",
        "convert --qformat nvfp4",
        "convert --use-weight-only --group-size 64",
        "convert --use-weight-only --weight-only-precision int4 --group-size 48",
        "convert --qformat nvfp4",
        "convert --kv-cache-dtype int8",
        "build --gemm-plugin int8",
        "build --moe-plugin cublaslt",
        "build --block-size 48",
        "build --checkpoint-dir a --model-config mixtral-8x7b",
        "build --arch sm_90a --backend cpu",
        "build --arch sm_91",
        "bench --prefill-batch 0",
        "build --tune",
        "bench --input-len 9-3",
        "bench --sequential --requests 3 --arrival-rate 2",
        "build --max-input-len 64 --max-seq-len 64",
        "build --use-fp8-context-fmha on",
        "convert --tp-size 2 --moe-tp-mode 1 --moe-tp-size 2",
        "convert --workers 2000",
        "quantize --model-dir m --qformat int4_awq",
        "quantize --qformat full_prec",
        "build --weight-only-precision int3",
        "build --kv-cache-type disabled",
        "build --profiling-verbosity",
        "bench --input-len 9",
        "diff engine --backends cpu,cpu --tokenizer-dir t",
        "run --threads 100000",
        "run --num-return-sequences 100000000",
        "run --max-output-len 18446744073709551615",
        "run --end-id -7",
        "run --lora-dir a b",
        "run --max-output-len 0",
        "run --temperature -1",
        "run --top-p 1.5",
        "run --num-beams 4 --streaming",
        "run --chat --input-file ids.csv",
        "run --system-prompt a",
        "run --num-return-sequences 2",
        "run --json --streaming",
        "run --input-text a --input-file b.txt",
        "run --num-beams 4 --num-return-sequences 2 --top-k 0",
        "inspect",
    ];
    let mut text = String::new();
    for line in lines {
        text += &format!("$ mixtral {line}\n{}\n\n", refused(dir.path(), mixtral_in(dir.path(), line, &[]), 2));
    }
    insta::assert_snapshot!(text);
}

#[test]
fn directories_that_are_something_else() {
    let dir = example_engine("--dtype auto", "");
    let at = dir.path();
    fs::create_dir(at.join("empty")).unwrap();
    fs::create_dir(at.join("mine")).unwrap();
    fs::write(at.join("mine/thesis.tex"), "precious").unwrap();
    let model = root().join("examples/tiny-mixtral").display().to_string();
    let lines = [
        "convert --model-dir nowhere".to_owned(),
        "convert --model-dir empty".to_owned(),
        "convert --model-dir tllm_checkpoint".to_owned(),
        "convert --model-dir engine_outputs".to_owned(),
        format!("convert --model-dir {model}/model.safetensors"),
        "convert --model-dir .".to_owned(),
        format!("convert --model-dir {model} --output-dir mine"),
        format!("convert --model-dir {model} --tp-size 16"),
        "build --checkpoint-dir nowhere".to_owned(),
        "build --checkpoint-dir empty".to_owned(),
        format!("build --checkpoint-dir {model}"),
        "build --checkpoint-dir engine_outputs".to_owned(),
        "build --checkpoint-dir tllm_checkpoint/config.json".to_owned(),
        "build --output-dir mine".to_owned(),
        "build --gemm-plugin f16".to_owned(),
        "build --model-config mixtral-9x9b".to_owned(),
        "run --engine-dir nowhere".to_owned(),
        "run --engine-dir empty".to_owned(),
        "run --engine-dir tllm_checkpoint".to_owned(),
        format!("run --engine-dir {model}"),
        "run --tokenizer-dir empty".to_owned(),
        "run --backend cuda".to_owned(),
        "bench --backend cuda".to_owned(),
        "inspect nowhere".to_owned(),
        "inspect empty".to_owned(),
    ];
    let mut text = String::new();
    for line in lines {
        let said = refused(at, mixtral_in(at, &line, &[]), 1);
        text += &format!("$ mixtral {}\n{said}\n\n", line.replace(&model, "MODEL"));
    }
    insta::assert_snapshot!(text);
    assert_eq!(fs::read_to_string(at.join("mine/thesis.tex")).unwrap(), "precious");
}

#[test]
fn prompts_that_cannot_be_answered() {
    let dir = example_engine("--dtype auto", "--max-seq-len 64");
    let at = dir.path();
    for (name, content) in [
        ("unknown.csv", "1,2\n3,99999\n"),
        ("words.csv", "1,two,3\n"),
        ("negative.csv", "1,-2\n"),
        ("blank.csv", "\"\",\"\"\n"),
        ("nothing.csv", ""),
        ("nothing.txt", ""),
        ("prompts.docx", "x"),
        ("array.npy", "not numpy"),
        ("fine.csv", "1,2\n"),
    ] {
        fs::write(at.join(name), content).unwrap();
    }
    fs::write(at.join("binary.txt"), [0xff, 0xfe, 0x00]).unwrap();
    let long = "word ".repeat(100);
    let mut text = String::new();
    let mut case = |line: &str, more: &[&str]| {
        let said = refused(at, mixtral_in(at, line, more), 1);
        text += &format!("$ mixtral {line}\n{said}\n\n");
    };
    for name in [
        "unknown.csv",
        "words.csv",
        "negative.csv",
        "blank.csv",
        "nothing.csv",
        "nothing.txt",
        "prompts.docx",
        "array.npy",
        "binary.txt",
        "missing.txt",
    ] {
        case(&format!("run --max-output-len 4 --input-file {name}"), &[]);
    }
    case("run --max-output-len 8 --input-text", &["fine", &long]);
    case("run --max-output-len 64 --input-text", &["fine"]);
    case("run --max-output-len 4 --no-add-special-tokens --input-text", &[""]);
    case("run --max-output-len 4 --end-id 99999 --input-file fine.csv", &[]);
    case("run --max-output-len 4 --output-csv nowhere/out.csv --input-file fine.csv", &[]);
    insta::assert_snapshot!(text);
}

/// Does each damage to a fresh copy of one engine.
#[test]
fn damaged_engines() {
    let dir = example_engine("--dtype auto", "");
    let at = dir.path();
    type Damage = (&'static str, fn(&Path));
    let damages: [Damage; 12] = [
        ("an engine of a later version", |e| edit_config(e, |v| v["mixtral_engine_format"] = 99.into())),
        ("config.json without ranks", |e| edit_config(e, |v| v["ranks"] = Value::Array(vec![]))),
        ("config.json with an impossible geometry", |e| edit_config(e, |v| v["model"]["num_kv_heads"] = 7.into())),
        ("config.json cut short", |e| truncate(&e.join("config.json"), 100)),
        ("no config.json, as after a kill", |e| {
            fs::remove_file(e.join("config.json")).unwrap();
            fs::write(e.join(".mixtral-lock"), "").unwrap();
        }),
        ("no program", |e| fs::remove_file(e.join("rank0.engine")).unwrap()),
        ("a program cut short", |e| truncate(&e.join("rank0.engine"), 200)),
        ("a program with a flipped bit", |e| flip(&e.join("rank0.engine"), 3000)),
        ("no weights", |e| fs::remove_file(e.join("rank0.weights.safetensors")).unwrap()),
        ("weights cut short", |e| truncate(&e.join("rank0.weights.safetensors"), 100_000)),
        ("weights with a flipped bit in the header", |e| flip(&e.join("rank0.weights.safetensors"), 60)),
        ("a tokenizer that is no JSON", |e| fs::write(e.join("tokenizer.json"), "{").unwrap()),
    ];
    let mut text = String::new();
    for (name, damage) in damages {
        let copy = fresh_copy(at, "engine_outputs");
        damage(&copy);
        let said = refused(at, mixtral_in(at, "run --engine-dir copy --max-output-len 4", &[]), 1);
        text += &format!("{name}\n{said}\n\n");
    }
    insta::assert_snapshot!(text);
}

/// Does each damage to a fresh copy of the example's checkpoint or engine, and runs `verify` on it.
#[test]
fn what_verify_says() {
    let dir = example_engine("--dtype auto", "");
    let at = dir.path();
    fs::create_dir(at.join("empty")).unwrap();
    type Damage = (&'static str, &'static str, fn(&Path));
    let damages: [Damage; 11] = [
        ("tllm_checkpoint", "one bit of a tensor", |d| flip(&d.join("rank0.safetensors"), 5_000_000)),
        ("tllm_checkpoint", "a bit of every megabyte", |d| {
            (1..9).for_each(|mb| flip(&d.join("rank0.safetensors"), mb * 1_000_000));
        }),
        ("tllm_checkpoint", "a header of another run", |d| {
            rewrite(&d.join("rank0.safetensors"), "\"rank\":\"0\"", "\"rank\":\"1\"");
        }),
        ("tllm_checkpoint", "an edited config", |d| {
            rewrite(&d.join("config.json"), "\"norm_epsilon\": ", "\"norm_epsilon\": 1");
        }),
        ("tllm_checkpoint", "a config without its seal", |d| rewrite(&d.join("config.json"), "\"seal\"", "\"sale\"")),
        ("tllm_checkpoint", "another tokenizer", |d| rewrite(&d.join("tokenizer.json"), "version", "VERSION")),
        ("tllm_checkpoint", "no tokenizer", |d| fs::remove_file(d.join("tokenizer.json")).unwrap()),
        ("tllm_checkpoint", "another tool's, with weights that are not finite", |d| {
            edit_config(d, |v| drop(v.as_object_mut().unwrap().shift_remove("mixtral")));
            forget_metadata(&d.join("rank0.safetensors"));
            let path = d.join("rank0.safetensors");
            let mut bytes = fs::read(&path).unwrap();
            let end = bytes.len();
            bytes[end - 6..].fill(0xff);
            fs::write(path, bytes).unwrap();
        }),
        ("engine_outputs", "one bit of a weight", |d| flip(&d.join("rank0.weights.safetensors"), 5_000_000)),
        ("engine_outputs", "one bit of the program", |d| flip(&d.join("rank0.engine"), 3000)),
        ("engine_outputs", "an edited config", |d| {
            rewrite(&d.join("config.json"), "\"max_seq_len\": 512", "\"max_seq_len\": 513");
        }),
    ];
    let mut text = String::new();
    for (what, name, damage) in damages {
        let copy = fresh_copy(at, what);
        damage(&copy);
        let said = refused(at, mixtral_in(at, "verify copy", &[]), 1);
        text += &format!("{what}: {name}\n{said}\n\n");
    }
    for nothing in ["nowhere", "empty"] {
        let said = refused(at, mixtral_in(at, &format!("verify {nothing}"), &[]), 1);
        text += &format!("{nothing}\n{said}\n\n");
    }
    // Nothing is wrong with these, and `verify` says so.
    for good in ["tllm_checkpoint", "engine_outputs"] {
        text += &format!("$ mixtral verify {good}\n{}\n", mixtral_in(at, &format!("verify {good}"), &[]).ok());
    }
    let copy = fresh_copy(at, "tllm_checkpoint");
    edit_config(&copy, |v| drop(v.as_object_mut().unwrap().shift_remove("mixtral")));
    forget_metadata(&copy.join("rank0.safetensors"));
    text += &format!("another tool's\n{}", mixtral_in(at, "verify copy", &[]).ok());
    insta::assert_snapshot!(text);
}

/// Counts the malformed inputs whose message is in a snapshot, so that nobody removes some of them without noticing.
#[test]
fn more_than_a_hundred_malformed_inputs_have_their_message_in_a_snapshot() {
    let convert = "crates/mixtral-convert/tests/snapshots/malformed__";
    let checkpoint = "crates/mixtral-checkpoint/";
    let here = "tests/e2e/snapshots/e2e__refusals__";
    // A snapshot, and how the line of an input begins. Without such a beginning, every line that is not indented is an
    // input.
    let snapshots = [
        (format!("{convert}configurations"), "# "),
        (format!("{convert}files"), "# "),
        (format!("{convert}tensors"), "# "),
        (format!("{convert}options"), "# "),
        (format!("{checkpoint}tests/snapshots/checkpoint__each_broken_directory_has_its_message"), ""),
        (format!("{checkpoint}src/snapshots/mixtral_checkpoint__config__tests__each_refusal_says_what_and_where"), ""),
        (
            format!("{checkpoint}src/snapshots/mixtral_checkpoint__header__tests__each_malformed_file_has_its_message"),
            "",
        ),
        (format!("{here}damaged_engines"), "error: "),
        (format!("{here}directories_that_are_something_else"), "error: "),
        (format!("{here}prompts_that_cannot_be_answered"), "error: "),
        (format!("{here}what_verify_says"), "error: "),
    ];
    let mut all = 0;
    for (name, begin) in snapshots {
        let text = fs::read_to_string(root().join(format!("{name}.snap"))).unwrap();
        let body = text.splitn(3, "---\n").nth(2).expect("a snapshot has a head");
        let begins = |line: &&str| !line.is_empty() && !line.starts_with(' ') && line.starts_with(begin);
        let count = body.lines().filter(begins).count();
        println!("{count:4} {name}");
        assert!(count > 0, "{name}");
        all += count;
    }
    println!("{all:4} in all");
    assert!(all >= 100, "{all} malformed inputs");
}

/// Copies `at/name` to `at/copy`. A test must not change the original, since an engine's weights are a hard link to the
/// checkpoint's.
fn fresh_copy(at: &Path, name: &str) -> PathBuf {
    let copy = at.join("copy");
    let _ = fs::remove_dir_all(&copy);
    fs::create_dir(&copy).unwrap();
    for entry in fs::read_dir(at.join(name)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    copy
}

/// Replaces the first `old` in a file by `new`.
fn rewrite(path: &Path, old: &str, new: &str) {
    let bytes = fs::read(path).unwrap();
    let at = bytes.windows(old.len()).position(|w| w == old.as_bytes()).expect("it is there");
    fs::write(path, [&bytes[..at], new.as_bytes(), &bytes[at + old.len()..]].concat()).unwrap();
}

/// Takes the metadata out of a safetensors file. The file keeps its length.
fn forget_metadata(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let end = 8 + usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let mut header: Value = serde_json::from_slice(&bytes[8..end]).unwrap();
    header.as_object_mut().unwrap().shift_remove("__metadata__");
    let text = header.to_string();
    bytes[8..end].fill(b' ');
    bytes[8..8 + text.len()].copy_from_slice(text.as_bytes());
    fs::write(path, bytes).unwrap();
}

fn edit_config(engine: &Path, change: impl Fn(&mut Value)) {
    let path = engine.join("config.json");
    let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    fs::write(&path, value.to_string()).unwrap();
}

fn truncate(path: &Path, len: usize) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..len]).unwrap();
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

/// With weights that make all logits NaN, the run prints no output, and ends with an error that names the step.
#[test]
fn logits_that_are_not_numbers() {
    let dir = example_engine("--dtype auto", "");
    let at = dir.path();
    let path = at.join("engine_outputs/rank0.weights.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    // The last tensors of the file are 16-bit weights, so this makes the last 64 KB all NaN.
    let len = bytes.len();
    bytes[len - 65_536..].fill(0xff);
    fs::remove_file(&path).unwrap();
    fs::write(&path, bytes).unwrap();
    for beams in ["", " --num-beams 2"] {
        let said = mixtral_in(at, &format!("run --max-output-len 4 --input-text ROMEO:{beams}"), &[]);
        assert_eq!(said.out, "");
        let said = refused(at, said, 1);
        assert!(said.contains("step 0") && said.contains("not finite"), "{said}");
    }
}
