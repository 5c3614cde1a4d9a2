//! One model gives the same checkpoint from every layout. Also tests the stage as a whole.
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use mixtral_checkpoint::names::is_tokenizer_file;
use mixtral_checkpoint::{Checkpoint, Progress};
use mixtral_convert::{ConvertOptions, Input, convert, plan};
use mixtral_model::{CacheFormat, DType, Mapping, ModelConfig, Rank};
use mixtral_testkit::{Layout, Tensor, TinyModel, write_safetensors};

const LAYOUTS: [Layout; 4] = [Layout::V4, Layout::V5, Layout::Consolidated, Layout::ConsolidatedStacked];

fn options(model_dir: &Path, output_dir: PathBuf) -> ConvertOptions {
    ConvertOptions { workers: 2, ..ConvertOptions::new(Input::Directory(model_dir.to_owned()), output_dir) }
}

/// The files of a directory, except the tokenizer's.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    entries
        .map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap()))
        .filter(|(name, _)| !is_tokenizer_file(name))
        .collect()
}

#[test]
fn every_layout_of_a_model_gives_the_same_bytes() {
    for (seed, dtype) in [(1, DType::Bf16), (2, DType::F16), (3, DType::F32)] {
        for tied in [false, true] {
            let mut model = TinyModel::mixtral(dtype, seed);
            model.tied = tied;
            model.config.sliding_window = tied.then_some(64);
            let root = tempfile::tempdir().unwrap();
            let mut first = None;
            for (index, layout) in LAYOUTS.into_iter().enumerate() {
                let (from, to) = (root.path().join(format!("model{index}")), root.path().join(format!("ckpt{index}")));
                model.write(&from, layout, 1 + index % 3);
                let mut options = options(&from, to.clone());
                options.mapping = Mapping { tp_size: 2, pp_size: 2, moe_tp_size: 1, moe_ep_size: 2 };
                convert(&options, &()).unwrap();
                let found = contents(&to);
                assert_eq!(found.len(), 5, "config.json and four ranks");
                assert_eq!(*first.get_or_insert_with(|| found.clone()), found, "{layout:?}");
                assert_eq!(Checkpoint::open(&to).unwrap().verify(2, &()).unwrap().problems, []);
            }
        }
    }
}

#[test]
fn dense_models_take_the_same_path() {
    let model = TinyModel::mistral(DType::Bf16, 4);
    let root = tempfile::tempdir().unwrap();
    let mut first = None;
    for (name, layout) in [("hf", Layout::V4), ("hf5", Layout::V5), ("mistral", Layout::Consolidated)] {
        let (from, to) = (root.path().join(name), root.path().join(format!("{name}-ckpt")));
        model.write(&from, layout, 2);
        convert(&options(&from, to.clone()), &()).unwrap();
        let found = contents(&to);
        assert_eq!(*first.get_or_insert_with(|| found.clone()), found, "{layout:?}");
        let checkpoint = Checkpoint::open(&to).unwrap();
        assert_eq!(checkpoint.config().model, model.config);
        let fc = checkpoint.rank(Rank(0)).unwrap().tensor("transformer.layers.1.mlp.fc.weight").unwrap().shape.to_vec();
        assert_eq!(fc, [1, 96, 32]);
    }
}

#[test]
fn the_dialects_of_a_configuration_agree() {
    let root = tempfile::tempdir().unwrap();
    let read = |edit: &dyn Fn(&mut serde_json::Map<String, serde_json::Value>)| {
        let model = TinyModel::mixtral(DType::Bf16, 1);
        let mut json = model.config_json(Layout::V4);
        edit(json.as_object_mut().unwrap());
        let dir = root.path().join("model");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("config.json"), json.to_string()).unwrap();
        let mut options = options(&dir, root.path().join("ckpt"));
        options.save_config_only = true;
        convert(&options, &()).unwrap();
        Checkpoint::open(&options.output_dir).unwrap().config().model.clone()
    };
    let plain = read(&|_| {});
    assert_eq!(plain, TinyModel::mixtral(DType::Bf16, 1).config);
    let head_dim = |edit: &dyn Fn(&mut serde_json::Map<String, serde_json::Value>)| read(edit).head_dim;
    assert_eq!(head_dim(&|json| drop(json.remove("head_dim"))), 8);
    assert_eq!(head_dim(&|json| drop(json.insert("head_dim".into(), serde_json::Value::Null))), 8);
    let theta = |json: serde_json::Value| {
        read(&|map| {
            map.remove("rope_theta");
            map.extend(json.as_object().unwrap().clone());
        })
        .rope_theta
    };
    assert_eq!(theta(serde_json::json!({})), 1e6);
    assert_eq!(theta(serde_json::json!({ "rope_theta": 5e4, "rope_scaling": null })), 5e4);
    assert_eq!(theta(serde_json::json!({ "rope_parameters": { "rope_theta": 5e4, "rope_type": "default" } })), 5e4);
    assert_eq!(read(&|json| drop(json.insert("sliding_window".into(), 128.into()))).sliding_window, Some(128));
    assert_eq!(read(&|json| drop(json.remove("sliding_window"))).sliding_window, None);
}

#[test]
fn types_are_converted_once_and_the_router_never_through_another() {
    let model = TinyModel::mixtral(DType::F32, 5);
    let root = tempfile::tempdir().unwrap();
    let from = root.path().join("model");
    model.write(&from, Layout::V5, 1);
    let weights = model.weights();
    for dtype in [DType::F16, DType::Bf16] {
        let to = root.path().join(dtype.to_string());
        let mut options = options(&from, to.clone());
        options.dtype = Some(dtype);
        convert(&options, &()).unwrap();
        let checkpoint = Checkpoint::open(&to).unwrap();
        assert_eq!(checkpoint.config().model.dtype, dtype);
        let rank = checkpoint.rank(Rank(0)).unwrap();
        let expected = |name: &str, dtype| {
            let t = weights.iter().find(|t| t.name == name).unwrap();
            Tensor::new("", dtype, &t.shape, &t.values()).data
        };
        let router = rank.tensor("transformer.layers.1.mlp.router.weight").unwrap();
        assert_eq!(router.bytes, expected("model.layers.1.block_sparse_moe.gate.weight", DType::F32));
        let dense = rank.tensor("transformer.layers.1.attention.dense.weight").unwrap();
        assert_eq!(dense.bytes, expected("model.layers.1.self_attn.o_proj.weight", dtype));
    }
}

#[test]
fn harmless_extra_tensors_are_ignored_and_tokenizer_files_carried_along() {
    let model = TinyModel::mixtral(DType::Bf16, 6);
    let root = tempfile::tempdir().unwrap();
    let (from, to) = (root.path().join("model"), root.path().join("ckpt"));
    let mut tensors = model.weights();
    tensors.push(Tensor::new("model.layers.0.self_attn.rotary_emb.inv_freq", DType::F32, &[6], &[1.0; 6]));
    model.write_tensors(&from, Layout::V4, 1, &tensors);
    for name in ["special_tokens_map.json", "chat_template.jinja", "generation_config.json", "README.md"] {
        fs::write(from.join(name), if name.ends_with(".json") { "{}" } else { name }).unwrap();
    }
    fs::create_dir(from.join("additional_chat_templates")).unwrap();
    fs::write(from.join("additional_chat_templates/tool_use.jinja"), "{{ tools }}").unwrap();
    convert(&options(&from, to.clone()), &()).unwrap();
    let mut names: Vec<_> = fs::read_dir(&to).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(
        names,
        [
            "added_tokens.json",
            "chat_template.jinja",
            "chat_template.tool_use.jinja",
            "config.json",
            "generation_config.json",
            "rank0.safetensors",
            "special_tokens_map.json"
        ]
    );
    assert_eq!(fs::read_to_string(to.join("chat_template.jinja")).unwrap(), "chat_template.jinja");
    assert_eq!(fs::read_to_string(to.join("chat_template.tool_use.jinja")).unwrap(), "{{ tools }}");
}

#[test]
fn without_weights_only_the_config_is_written() {
    let root = tempfile::tempdir().unwrap();
    let geometry = ModelConfig::mixtral_8x7b(DType::F16);
    let mut options = ConvertOptions::new(Input::Geometry(geometry.clone()), root.path().join("ckpt"));
    options.mapping = Mapping::expert_parallel(2, 1);
    options.dtype = Some(DType::Bf16);
    let report = convert(&options, &()).unwrap();
    assert_eq!((report.run_id, report.tensors, report.bytes), (None, 0, 0));
    let checkpoint = Checkpoint::open(&options.output_dir).unwrap();
    assert!(!checkpoint.has_weights());
    assert_eq!(checkpoint.config().model, ModelConfig { dtype: DType::Bf16, ..geometry });
    assert_eq!(checkpoint.config().mapping, options.mapping);
}

/// A progress that adds up the bytes, and runs a test's function once in the middle of the work.
struct Watch<F: Fn() + Sync> {
    total: AtomicU64,
    done: AtomicU64,
    once: Mutex<Option<F>>,
}

impl<F: Fn() + Sync + Send> Progress for Watch<F> {
    fn start(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
    }

    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        if let Some(action) = self.once.lock().unwrap().take() {
            action();
        }
    }
}

#[test]
fn progress_ends_at_its_total_and_a_second_writer_is_refused_meanwhile() {
    let root = tempfile::tempdir().unwrap();
    let (from, to) = (root.path().join("model"), root.path().join("ckpt"));
    TinyModel::mixtral(DType::Bf16, 7).write(&from, Layout::V4, 1);
    let mut options = options(&from, to.clone());
    options.mapping = Mapping::tensor_parallel(2, 1);
    let refused = Mutex::new(String::new());
    let second = || {
        assert!(Checkpoint::open(&to).is_err(), "an unfinished checkpoint does not load");
        *refused.lock().unwrap() = convert(&options, &()).unwrap_err().to_string();
    };
    let watch = Watch { total: AtomicU64::new(0), done: AtomicU64::new(0), once: Mutex::new(Some(second)) };
    let report = convert(&options, &watch).unwrap();
    let expected = format!("another process is writing {}; wait for it, or choose another --output-dir", to.display());
    assert_eq!(*refused.lock().unwrap(), expected);
    assert_eq!(watch.done.into_inner(), report.bytes);
    assert_eq!(watch.total.into_inner(), report.bytes);
    assert_eq!(Checkpoint::open(&to).unwrap().verify(2, &()).unwrap().problems, []);
}

#[test]
fn directions_of_keys_are_part_of_the_progress() {
    let root = tempfile::tempdir().unwrap();
    let from = root.path().join("model");
    let mut model = TinyModel::mixtral(DType::Bf16, 7);
    model.config.head_dim = 16;
    model.write(&from, Layout::V4, 1);
    let options = ConvertOptions {
        cache: Some(CacheFormat::Fp8),
        kv_scale: Some(1.0),
        ..options(&from, root.path().join("ckpt"))
    };
    let watch = Watch { total: AtomicU64::new(0), done: AtomicU64::new(0), once: Mutex::new(Some(|| ())) };
    let report = convert(&options, &watch).unwrap();
    let config = Checkpoint::open(&options.output_dir).unwrap().config().model.clone();
    assert!(config.key_directions);
    let queries = config.num_layers * config.num_heads * config.head_dim * config.hidden_size * 2;
    assert_eq!(watch.total.into_inner(), report.bytes + queries as u64);
    assert_eq!(watch.done.into_inner(), report.bytes + queries as u64);
}

#[test]
fn a_failure_leaves_nothing_and_what_a_killed_run_left_is_cleaned() {
    let root = tempfile::tempdir().unwrap();
    let (from, to) = (root.path().join("model"), root.path().join("ckpt"));
    let model = TinyModel::mixtral(DType::F32, 8);
    let mut tensors = model.weights();
    let at = tensors.len() - 1;
    tensors[at].data[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    model.write_tensors(&from, Layout::V4, 1, &tensors);
    convert(&options(&from, to.clone()), &()).unwrap_err();
    assert!(!to.exists());

    // What a killed run leaves: the lock file, ranks of another mapping, no config.
    fs::create_dir(&to).unwrap();
    for name in [".mixtral-lock", "rank0.safetensors", "rank3.safetensors", "config.json.partial"] {
        fs::write(to.join(name), "half a file").unwrap();
    }
    fs::remove_dir_all(&from).unwrap();
    model.write(&from, Layout::V4, 1);
    convert(&options(&from, to.clone()), &()).unwrap();
    assert_eq!(contents(&to).into_keys().collect::<Vec<_>>(), ["config.json", "rank0.safetensors"]);
    let checkpoint = Checkpoint::open(&to).unwrap();
    assert_eq!(checkpoint.verify(2, &()).unwrap().problems, []);
}

#[test]
fn the_plan_says_what_will_be_done() {
    let root = tempfile::tempdir().unwrap();
    let from = root.path().join("model");
    TinyModel::mixtral(DType::Bf16, 9).write(&from, Layout::V5, 2);
    let mut options = options(&from, root.path().join("ckpt"));
    options.mapping = Mapping::tensor_parallel(2, 1);
    options.dtype = Some(DType::F16);
    let mut plan = plan(&options).unwrap();
    assert!(!options.output_dir.exists(), "a plan writes nothing");
    assert!(plan.free_bytes.take().is_some());
    assert_eq!(serde_json::to_value(&plan).unwrap()["ranks"][1]["tensors"][2]["shape"], serde_json::json!([48, 32]));
    let report = convert(&options, &()).unwrap();
    assert_eq!(report.bytes, plan.output_bytes);
    insta::assert_snapshot!(plan.to_string().replace(root.path().to_str().unwrap(), "[DIR]"));
}

#[test]
fn both_dialects_in_one_directory_read_as_hugging_face() {
    let root = tempfile::tempdir().unwrap();
    let from = root.path().join("model");
    let model = TinyModel::mixtral(DType::Bf16, 10);
    model.write(&from, Layout::Consolidated, 1);
    model.write(&from, Layout::V4, 2);
    assert_eq!(
        plan(&options(&from, root.path().join("a"))).unwrap().layout.unwrap(),
        "Hugging Face, a tensor an expert"
    );
    for entry in fs::read_dir(&from).unwrap().map(|e| e.unwrap().path()) {
        if entry.file_name().unwrap().to_str().unwrap().starts_with("model") {
            fs::remove_file(entry).unwrap();
        }
    }
    assert_eq!(plan(&options(&from, root.path().join("a"))).unwrap().layout.unwrap(), "Mistral consolidated");
}

#[test]
fn wide_rows_and_long_columns_take_every_way_of_reading() {
    // Rows of more than 4096 bytes a rank, tensors of more than one chunk, and a number of columns that is no multiple
    // of a block.
    let mut model = TinyModel::mixtral(DType::F32, 11);
    model.config.hidden_size = 258;
    model.config.intermediate_size = 2310;
    model.config.moe.num_experts = 2;
    let root = tempfile::tempdir().unwrap();
    let mut first = None;
    for layout in LAYOUTS {
        let (from, to) = (root.path().join("model"), root.path().join("ckpt"));
        let _ = fs::remove_dir_all(&from);
        model.write(&from, layout, 1);
        for (tp, dtype) in [(2, None), (2, Some(DType::Bf16))] {
            let mut options = options(&from, to.clone());
            options.mapping = Mapping::tensor_parallel(tp, 1);
            options.dtype = dtype;
            convert(&options, &()).unwrap();
            if dtype.is_none() {
                let found = contents(&to);
                assert!(*first.get_or_insert_with(|| found.clone()) == found, "{layout:?}");
                let weights = model.weights_in(Layout::V4);
                let name = "model.layers.1.block_sparse_moe.experts.1.w2.weight";
                let w2 = weights.iter().find(|t| t.name == name).unwrap().values();
                let checkpoint = Checkpoint::open(&to).unwrap();
                let rank = checkpoint.rank(Rank(1)).unwrap();
                let proj = rank.tensor("transformer.layers.1.mlp.proj.weight").unwrap();
                let expected: Vec<u8> =
                    w2.chunks(2310).flat_map(|row| &row[1155..]).flat_map(|v| v.to_le_bytes()).collect();
                assert!(proj.bytes[proj.bytes.len() / 2..] == expected);
            }
        }
    }
}

#[test]
fn a_model_may_keep_one_tensor_in_another_type() {
    let model = TinyModel::mixtral(DType::Bf16, 12);
    let root = tempfile::tempdir().unwrap();
    let (from, to) = (root.path().join("model"), root.path().join("ckpt"));
    let mut tensors = model.weights();
    let norm = tensors.iter_mut().find(|t| t.name == "model.norm.weight").unwrap();
    *norm = Tensor::new("model.norm.weight", DType::F32, &[32], &norm.values());
    fs::create_dir(&from).unwrap();
    model.write_tensors(&from, Layout::V4, 1, &tensors);
    write_safetensors(&from.join("model.safetensors"), &tensors);
    convert(&options(&from, to.clone()), &()).unwrap();
    let plain = root.path().join("plain");
    model.write(&plain, Layout::V4, 1);
    let ckpt = root.path().join("plain-ckpt");
    convert(&options(&plain, ckpt.clone()), &()).unwrap();
    assert_eq!(contents(&to), contents(&ckpt));
}

/// The bytes of a tensor of the only rank.
fn written(checkpoint: &Path, tensor: &str) -> Vec<u8> {
    Checkpoint::open(checkpoint).unwrap().rank(Rank(0)).unwrap().tensor(tensor).unwrap().bytes.to_vec()
}

#[test]
fn a_configuration_that_ties_counts_only_where_one_of_the_two_is_missing() {
    let root = tempfile::tempdir().unwrap();
    for layout in LAYOUTS {
        let (from, to) = (root.path().join("model"), root.path().join("ckpt"));
        let mut model = TinyModel::mixtral(DType::Bf16, 13);
        let tensors = model.weights_in(layout);
        model.tied = true;
        let find = |names: [&str; 2]| tensors.iter().find(|t| names.contains(&t.name.as_str())).unwrap().data.clone();
        const EMBEDDING: [&str; 2] = ["model.embed_tokens.weight", "tok_embeddings.weight"];
        const HEAD: [&str; 2] = ["lm_head.weight", "output.weight"];
        let (embedding, head) = (find(EMBEDDING), find(HEAD));
        assert_ne!(embedding, head);
        for (left_out, expected) in
            [(["", ""], [&embedding, &head]), (HEAD, [&embedding, &embedding]), (EMBEDDING, [&head, &head])]
        {
            let _ = fs::remove_dir_all(&from);
            let kept: Vec<_> = tensors.iter().filter(|t| !left_out.contains(&t.name.as_str())).cloned().collect();
            model.write_tensors(&from, layout, 1, &kept);
            convert(&options(&from, to.clone()), &()).unwrap();
            let found = ["transformer.vocab_embedding.weight", "lm_head.weight"].map(|name| written(&to, name));
            assert!([&found[0], &found[1]] == expected, "{layout:?} without {left_out:?}");
        }
    }
}

#[test]
fn an_index_says_which_files_there_are_and_nothing_else() {
    let root = tempfile::tempdir().unwrap();
    let (from, to) = (root.path().join("model"), root.path().join("ckpt"));
    let model = TinyModel::mixtral(DType::Bf16, 14);
    model.write(&from, Layout::V4, 3);
    convert(&options(&from, to.clone()), &()).unwrap();
    let expected = contents(&to);
    let index = from.join("model.safetensors.index.json");
    let shard = |n: usize| format!("model-0000{n}-of-00003.safetensors");
    for map in [
        // An index whose entries are swapped, of another model, and far too few.
        serde_json::json!({ "model.norm.weight": shard(1), "lm_head.weight": shard(2), "a.b.c": shard(3) }),
        serde_json::json!({ "x": shard(3), "y": shard(1), "z": shard(2) }),
    ] {
        fs::write(&index, serde_json::json!({ "weight_map": map }).to_string()).unwrap();
        convert(&options(&from, to.clone()), &()).unwrap();
        assert!(contents(&to) == expected, "{map}");
    }
}

#[test]
fn a_quantizer_left_in_the_configuration_of_plain_weights_changes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let (from, to) = (root.path().join("model"), root.path().join("ckpt"));
    let model = TinyModel::mixtral(DType::F16, 15);
    model.write(&from, Layout::V5, 1);
    convert(&options(&from, to.clone()), &()).unwrap();
    let expected = contents(&to);
    for left in [serde_json::json!({ "quant_method": "gptq", "bits": 3 }), serde_json::json!({})] {
        let mut config = model.config_json(Layout::V5);
        config["quantization_config"] = left;
        fs::write(from.join("config.json"), config.to_string()).unwrap();
        convert(&options(&from, to.clone()), &()).unwrap();
        assert!(contents(&to) == expected);
    }
}
