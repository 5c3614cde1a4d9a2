//! Writes a checkpoint, reads it back, verifies it, and damages it in every way for which a reader must have a message.
#![allow(missing_docs)]

use std::fs;
use std::path::Path;

use mixtral_checkpoint::{Checkpoint, CheckpointConfig, CheckpointWriter, Problem, rank_tensors};
use mixtral_model::{DType, ElemType, Mapping, ModelConfig, Rank};

fn config() -> CheckpointConfig {
    let mut model = ModelConfig::mixtral_8x7b(DType::Bf16);
    model.vocab_size = 11;
    model.hidden_size = 8;
    model.intermediate_size = 12;
    model.num_layers = 2;
    model.num_heads = 2;
    model.num_kv_heads = 1;
    model.head_dim = 4;
    model.moe.num_experts = 3;
    CheckpointConfig::new(model, Mapping::tensor_parallel(2, 1))
}

/// Byte `index` of a tensor. It is so small that no element is infinite.
fn byte(rank: usize, tensor: usize, index: usize) -> u8 {
    u8::try_from((rank * 31 + tensor * 7 + index) % 61).unwrap()
}

fn write(dir: &Path) -> String {
    let writer = CheckpointWriter::create(dir, config(), false).unwrap();
    for rank in writer.ranks() {
        for (t, spec) in rank.tensors().iter().enumerate() {
            let len = usize::try_from(spec.num_bytes()).unwrap();
            let bytes: Vec<u8> = (0..len).map(|i| byte(rank.rank().0, t, i)).collect();
            let mut tensor = rank.tensor(&spec.name);
            let (head, tail) = bytes.split_at(len / 3);
            tensor.write(head).unwrap();
            tensor.write(tail).unwrap();
            tensor.finish().unwrap();
        }
    }
    writer.finish().unwrap().unwrap()
}

fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_is_written_is_read_back_verified_and_understood_by_others() {
    let root = tempfile::tempdir().unwrap();
    let run_id = write(root.path());
    assert_eq!(listing(root.path()), ["config.json", "rank0.safetensors", "rank1.safetensors"]);
    let checkpoint = Checkpoint::open(root.path()).unwrap();
    assert_eq!(checkpoint.config().run_id.as_deref(), Some(run_id.as_str()));
    assert!(checkpoint.has_weights());
    for rank in 0..2 {
        let file = checkpoint.rank(Rank(rank)).unwrap();
        let bytes = fs::read(file.path()).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let specs = rank_tensors(checkpoint.config(), Rank(rank));
        assert_eq!(theirs.len(), specs.len());
        for spec in specs {
            let ours = file.tensor(&spec.name).unwrap();
            assert_eq!((ours.elem, ours.shape), (spec.elem, spec.shape.as_slice()));
            let theirs = theirs.tensor(&spec.name).unwrap();
            assert_eq!(ours.bytes, theirs.data());
            assert_eq!(ours.shape, theirs.shape());
            assert_eq!(ours.bytes.as_ptr().addr() % spec.elem.size(), 0);
            assert_eq!(file.hash(&spec.name).unwrap(), blake3::hash(ours.bytes).to_hex().as_str());
        }
        let (n, _) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!((n + 8) % 64, 0, "the data section starts at a multiple of 64");
    }
    let verified = checkpoint.verify(2, &()).unwrap();
    assert_eq!((verified.tensors, verified.unhashed, verified.problems.len()), (34, 0, 0));
}

#[test]
fn parts_of_a_tensor_are_read_without_its_mapping() {
    let root = tempfile::tempdir().unwrap();
    write(root.path());
    let file = Checkpoint::open(root.path()).unwrap().rank(Rank(1)).unwrap();
    let name = "lm_head.weight";
    let bytes = file.tensor(name).unwrap().bytes;
    let mut part = [0; 10];
    for offset in [0, 7, bytes.len() - part.len()] {
        file.read(name, offset, &mut part).unwrap();
        assert_eq!(part, bytes[offset..][..part.len()]);
    }
    // Behind the tensor lies another one, which must not be read.
    for offset in [bytes.len() - part.len() + 1, usize::MAX] {
        let error = file.read(name, offset, &mut part).unwrap_err().to_string();
        let said = error.replace(&root.path().display().to_string(), "DIR");
        assert_eq!(said, "cannot read `lm_head.weight` of DIR/rank1.safetensors: unexpected end of file");
    }
    let error = file.read("lm_head.bias", 0, &mut part).unwrap_err().to_string();
    assert!(error.ends_with("has no tensor `lm_head.bias`"), "{error}");
}

#[test]
fn the_same_content_gives_the_same_run_id_and_bytes() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    assert_eq!(write(a.path()), write(b.path()));
    for name in listing(a.path()) {
        assert_eq!(fs::read(a.path().join(&name)).unwrap(), fs::read(b.path().join(&name)).unwrap());
    }
}

#[test]
fn a_checkpoint_of_the_config_alone_has_no_weights() {
    let root = tempfile::tempdir().unwrap();
    write(root.path());
    CheckpointWriter::create(root.path(), config(), true).unwrap().finish().unwrap();
    assert_eq!(listing(root.path()), ["config.json"]);
    let checkpoint = Checkpoint::open(root.path()).unwrap();
    assert!(!checkpoint.has_weights());
    assert_eq!(checkpoint.config().run_id, None);
}

#[test]
fn files_of_other_tools_load_without_run_id_and_hashes() {
    let root = tempfile::tempdir().unwrap();
    let config = config();
    let text = config.to_json();
    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    value.as_object_mut().unwrap().shift_remove("mixtral");
    fs::write(root.path().join("config.json"), value.to_string()).unwrap();
    for rank in 0..2 {
        let specs = rank_tensors(&config, Rank(rank));
        let data: Vec<Vec<u8>> = specs.iter().map(|s| vec![1; usize::try_from(s.num_bytes()).unwrap()]).collect();
        let views = specs.iter().zip(&data).map(|(spec, data)| {
            let dtype = if spec.elem == ElemType::F32 { safetensors::Dtype::F32 } else { safetensors::Dtype::BF16 };
            (spec.name.clone(), safetensors::tensor::TensorView::new(dtype, spec.shape.clone(), data).unwrap())
        });
        let path = root.path().join(format!("rank{rank}.safetensors"));
        safetensors::serialize_to_file(views, None, &path).unwrap();
    }
    let verified = Checkpoint::open(root.path()).unwrap().verify(2, &()).unwrap();
    assert_eq!((verified.tensors, verified.unhashed), (34, 34));
    assert_eq!(verified.problems, []);
}

#[test]
fn damage_is_found_by_hash_and_by_value() {
    let root = tempfile::tempdir().unwrap();
    write(root.path());
    let path = root.path().join("rank1.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&path, bytes).unwrap();
    let verified = Checkpoint::open(root.path()).unwrap().verify(2, &()).unwrap();
    assert!(
        matches!(&verified.problems[..], [Problem::Hash { tensor: Some(tensor), .. }] if tensor == "lm_head.weight"),
        "{verified:?}"
    );
}

#[test]
fn each_broken_directory_has_its_message() {
    let mut messages = Vec::new();
    let mut case = |name: &str, damage: &dyn Fn(&Path)| {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("ckpt");
        write(&dir);
        damage(&dir);
        let error = Checkpoint::open(&dir).and_then(|c| c.rank(Rank(1))).unwrap_err();
        messages.push(format!("{name}: {}", error.to_string().replace(root.path().to_str().unwrap(), "[DIR]")));
    };
    let rank1 = |dir: &Path| dir.join("rank1.safetensors");
    let edit_config = |dir: &Path, key: &str, value: serde_json::Value| {
        let path = dir.join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        // Without these, a wrong key is named. With them, the error would be that the text was changed.
        config["mixtral"].as_object_mut().unwrap().shift_remove("seal");
        config["mixtral"].as_object_mut().unwrap().shift_remove("headers");
        fs::write(path, config.to_string()).unwrap();
    };
    case("no directory", &|dir| fs::remove_dir_all(dir).unwrap());
    case("no config", &|dir| fs::remove_file(dir.join("config.json")).unwrap());
    case("unfinished", &|dir| {
        fs::rename(dir.join("config.json"), dir.join(".mixtral-lock")).unwrap();
    });
    case("rank file missing", &|dir| fs::remove_file(rank1(dir)).unwrap());
    case("rank not in the mapping", &|dir| {
        edit_config(dir, "mapping", serde_json::json!({ "tp_size": 1 }));
    });
    case("truncated", &|dir| {
        let len = fs::metadata(rank1(dir)).unwrap().len();
        fs::OpenOptions::new().write(true).open(rank1(dir)).unwrap().set_len(len - 1).unwrap();
    });
    case("another run's config", &|dir| {
        edit_config(dir, "mixtral", serde_json::json!({ "run_id": "0123456789abcdef0123456789abcdef" }));
    });
    case("another geometry", &|dir| {
        edit_config(dir, "intermediate_size", 10.into());
        edit_config(dir, "num_hidden_layers", 3.into());
    });
    case("another data type", &|dir| edit_config(dir, "dtype", "float16".into()));
    case("a config that was edited", &|dir| {
        let path = dir.join("config.json");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("\"max_position_embeddings\": 32768", "\"max_position_embeddings\": 32769"))
            .unwrap();
    });
    case("a header that was edited", &|dir| {
        let mut bytes = fs::read(rank1(dir)).unwrap();
        let at = bytes.windows(11).position(|w| w == b"\"rank\":\"1\",").unwrap();
        bytes[at + 8] = b'0';
        fs::write(rank1(dir), bytes).unwrap();
    });
    case("not a safetensors file", &|dir| fs::write(rank1(dir), "PK\u{3}\u{4}a zip file of some sort").unwrap());
    insta::assert_snapshot!(messages.join("\n"));
}
