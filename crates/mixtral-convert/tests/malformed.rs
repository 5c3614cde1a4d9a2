//! Every malformed input has its own message, and leaves no output behind.
#![allow(missing_docs)]

use std::fs;
use std::path::Path;

use mixtral_convert::{ConvertOptions, Input, convert};
use mixtral_model::{DType, Mapping};
use mixtral_testkit::{Layout, Tensor, TinyModel, write_safetensors};
use serde_json::{Value, json};

/// Collects one message for each case.
#[derive(Default)]
struct Messages(Vec<String>);

impl Messages {
    /// Writes a model of `layout` in `shards` files, spoils it, converts it, and keeps the message.
    fn case(
        &mut self,
        name: &str,
        model: &TinyModel,
        (layout, shards): (Layout, usize),
        spoil: impl FnOnce(&Path, &mut ConvertOptions),
    ) {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("model");
        model.write(&dir, layout, shards);
        let mut options = ConvertOptions::new(Input::Directory(dir.clone()), root.path().join("ckpt"));
        spoil(&dir, &mut options);
        let existed = options.output_dir.exists();
        let error = convert(&options, &()).unwrap_err().to_string();
        assert_eq!(options.output_dir.exists(), existed, "{name} leaves output behind");
        self.0.push(format!("# {name}\n{}", error.replace(root.path().to_str().unwrap(), "[DIR]")));
    }

    /// As [`Messages::case`] with one file of weights in transformers 4's layout.
    fn plain(&mut self, name: &str, spoil: impl FnOnce(&Path)) {
        self.case(name, &TinyModel::mixtral(DType::F32, 1), (Layout::V4, 1), |dir, _| spoil(dir));
    }

    /// As [`Messages::plain`], with a changed key of config.json.
    fn config(&mut self, name: &str, key: &str, value: Value) {
        self.plain(name, |dir| edit(&dir.join("config.json"), key, value));
    }

    /// As [`Messages::plain`], with changed tensors.
    fn tensors(&mut self, name: &str, dtype: Option<DType>, spoil: impl FnOnce(&mut Vec<Tensor>)) {
        let model = TinyModel::mixtral(DType::F32, 1);
        self.case(name, &model, (Layout::V4, 1), |dir, options| {
            let mut tensors = model.weights();
            spoil(&mut tensors);
            write_safetensors(&dir.join("model.safetensors"), &tensors);
            options.dtype = dtype;
        });
    }

    fn text(self) -> String {
        self.0.join("\n")
    }
}

/// Sets a key of a JSON file, or removes it if `value` is the string `remove`.
fn edit(path: &Path, key: &str, value: Value) {
    let mut json: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let map = json.as_object_mut().unwrap();
    if value == "remove" {
        map.shift_remove(key);
    } else {
        map.insert(key.to_owned(), value);
    }
    fs::write(path, json.to_string()).unwrap();
}

const LFS_POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 4943162336\n";

#[test]
fn configurations() {
    let mut m = Messages::default();
    m.plain("no directory", |dir| fs::remove_dir_all(dir).unwrap());
    m.plain("no configuration", |dir| fs::remove_file(dir.join("config.json")).unwrap());
    m.plain("config is no JSON", |dir| fs::write(dir.join("config.json"), "{\"model_type\": ").unwrap());
    m.plain("config is no object", |dir| fs::write(dir.join("config.json"), "[1]").unwrap());
    m.plain("config is an LFS pointer", |dir| fs::write(dir.join("config.json"), LFS_POINTER).unwrap());
    m.plain("config is a checkpoint's", |dir| {
        fs::write(dir.join("config.json"), r#"{"architecture": "MixtralForCausalLM"}"#).unwrap();
    });
    m.config("another architecture", "model_type", json!("llama"));
    m.config("no model_type", "model_type", json!("remove"));
    m.config("a key is missing", "hidden_size", json!("remove"));
    m.config("a key is of the wrong kind", "num_hidden_layers", json!("two"));
    m.config("a negative size", "vocab_size", json!(-5));
    m.config("an enormous size", "intermediate_size", json!(1u64 << 40));
    m.config("heads do not group", "num_key_value_heads", json!(3));
    m.config("more active experts than experts", "num_experts_per_tok", json!(5));
    m.config("experts without end", "num_local_experts", json!(16384));
    m.plain("experts and layers without end", |dir| {
        edit(&dir.join("config.json"), "num_local_experts", json!(16384));
        edit(&dir.join("config.json"), "num_hidden_layers", json!(16384));
    });
    m.config("an odd head", "head_dim", json!(7));
    m.config("another activation", "hidden_act", json!("gelu"));
    m.config("scaled rotary frequencies", "rope_scaling", json!({ "type": "linear", "factor": 4.0 }));
    m.config("scaled rotary frequencies, new spelling", "rope_parameters", json!({ "rope_type": "yarn" }));
    m.config("a quantizer that is no object", "quantization_config", json!("awq"));
    m.plain("heads do not group by the default", |dir| {
        edit(&dir.join("config.json"), "num_attention_heads", json!(12));
        edit(&dir.join("config.json"), "num_key_value_heads", json!("remove"));
    });
    m.plain("config is an engine's", |dir| {
        fs::write(dir.join("config.json"), r#"{"mixtral_engine_format": 3}"#).unwrap();
    });
    m.config("an unknown type", "torch_dtype", json!("float8_e4m3fn"));
    m.config("a norm without epsilon", "rms_norm_eps", json!(0.0));
    let model = TinyModel::mixtral(DType::F32, 1);
    let consolidated = (Layout::Consolidated, 1);
    m.case("params.json without a key", &model, consolidated, |dir, _| {
        edit(&dir.join("params.json"), "n_layers", json!("remove"));
    });
    m.case("params.json of a model that sees", &model, consolidated, |dir, _| {
        edit(&dir.join("params.json"), "vision_encoder", json!({ "hidden_size": 1024 }));
    });
    m.case("no type anywhere", &model, consolidated, |_, options| options.save_config_only = true);
    insta::assert_snapshot!(m.text());
}

#[test]
fn files() {
    let mut m = Messages::default();
    let model = TinyModel::mixtral(DType::F32, 1);
    let (sharded, consolidated) = ((Layout::V4, 2), (Layout::Consolidated, 1));
    let index = "model.safetensors.index.json";
    m.plain("no weights", |dir| fs::remove_file(dir.join("model.safetensors")).unwrap());
    m.plain("only a pickle", |dir| {
        fs::rename(dir.join("model.safetensors"), dir.join("pytorch_model.bin")).unwrap();
    });
    m.case("only Mistral's pickle", &model, consolidated, |dir, _| {
        fs::rename(dir.join("consolidated.safetensors"), dir.join("consolidated.00.pth")).unwrap();
    });
    m.case("no index", &model, sharded, |dir, _| fs::remove_file(dir.join(index)).unwrap());
    m.case("index is no JSON", &model, sharded, |dir, _| fs::write(dir.join(index), "<html>").unwrap());
    m.case("index without a map", &model, sharded, |dir, _| edit(&dir.join(index), "weight_map", json!("remove")));
    m.case("index leads elsewhere", &model, sharded, |dir, _| {
        edit(&dir.join(index), "weight_map", json!({ "model.norm.weight": "../../etc/passwd" }));
    });
    m.case("shards missing", &model, sharded, |dir, _| {
        for shard in 1..=2 {
            fs::remove_file(dir.join(format!("model-0000{shard}-of-00002.safetensors"))).unwrap();
        }
    });
    m.case("a tensor in two files", &model, (Layout::Consolidated, 2), |dir, _| {
        fs::remove_file(dir.join("consolidated.safetensors.index.json")).unwrap();
        fs::copy(
            dir.join("consolidated-00001-of-00002.safetensors"),
            dir.join("consolidated-00003-of-00002.safetensors"),
        )
        .unwrap();
    });
    let weights = |dir: &Path| dir.join("model.safetensors");
    m.plain("weights are an LFS pointer", |dir| fs::write(weights(dir), LFS_POINTER).unwrap());
    m.plain("weights are empty", |dir| fs::write(weights(dir), "").unwrap());
    m.plain("weights are a zip", |dir| fs::write(weights(dir), "PK\u{3}\u{4} and so on and on").unwrap());
    m.plain("weights are cut short", |dir| {
        fs::OpenOptions::new().write(true).open(weights(dir)).unwrap().set_len(100_000).unwrap();
    });
    m.plain("the header is cut short", |dir| {
        fs::OpenOptions::new().write(true).open(weights(dir)).unwrap().set_len(1000).unwrap();
    });
    m.plain("tensors overlap", |dir| {
        let header = json!({
            "model.norm.weight": { "dtype": "F32", "shape": [2], "data_offsets": [0, 8] },
            "lm_head.weight": { "dtype": "F32", "shape": [2], "data_offsets": [4, 12] },
        })
        .to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend([0; 12]);
        fs::write(weights(dir), bytes).unwrap();
    });
    insta::assert_snapshot!(m.text());
}

const ADAPTER: &str = r#"{"peft_type": "LORA", "base_model_name_or_path": "mistralai/Mixtral-8x22B-v0.1"}"#;

#[test]
fn directories_that_are_no_model() {
    let mut m = Messages::default();
    let model = TinyModel::mixtral(DType::F32, 1);
    let plain = (Layout::V4, 1);
    let weights = "model.safetensors";
    m.case("a file", &model, plain, |dir, options| options.input = Input::Directory(dir.join(weights)));
    m.case("a name on the hub", &model, plain, |_, options| {
        options.input = Input::Directory("someone/Mixtral-tuned".into());
    });
    // The layout of huggingface_hub's cache.
    let cached = |dir: &Path, hashes: &[&str]| {
        for hash in hashes {
            fs::create_dir_all(dir.join("snapshots").join(hash)).unwrap();
            fs::copy(dir.join("config.json"), dir.join("snapshots").join(hash).join("config.json")).unwrap();
        }
        fs::create_dir_all(dir.join("blobs")).unwrap();
        fs::create_dir_all(dir.join("snapshots/0dead")).unwrap();
        fs::remove_file(dir.join("config.json")).unwrap();
    };
    m.plain("the hub's cache", |dir| cached(dir, &["4fc1d2"]));
    m.plain("the hub's cache of two versions", |dir| {
        cached(dir, &["4fc1d2", "9a8b7c"]);
        fs::create_dir(dir.join("refs")).unwrap();
        fs::write(dir.join("refs/main"), "4fc1d2\n").unwrap();
    });
    m.plain("the hub's whole cache", |dir| {
        cached(dir, &["4fc1d2"]);
        fs::create_dir(dir.join("models--someone--Mixtral-tuned")).unwrap();
        fs::rename(dir.join("snapshots"), dir.join("models--someone--Mixtral-tuned/snapshots")).unwrap();
    });
    m.plain("the hub's cache without a model", |dir| cached(dir, &[]));
    m.plain("the folder above", |dir| {
        fs::create_dir(dir.join("checkpoint-500")).unwrap();
        fs::rename(dir.join("config.json"), dir.join("checkpoint-500/config.json")).unwrap();
    });
    m.plain("an adapter with its base's configuration", |dir| {
        fs::rename(dir.join(weights), dir.join("adapter_model.safetensors")).unwrap();
        fs::write(dir.join("adapter_config.json"), ADAPTER).unwrap();
    });
    m.plain("an adapter alone", |dir| {
        fs::remove_file(dir.join("config.json")).unwrap();
        fs::rename(dir.join(weights), dir.join("adapter_model.bin")).unwrap();
        fs::write(dir.join("adapter_config.json"), "{}").unwrap();
    });
    let renamed = |m: &mut Messages, name: &str, files: &[&str]| {
        m.plain(name, |dir| {
            fs::remove_file(dir.join(weights)).unwrap();
            files.iter().for_each(|file| fs::write(dir.join(file), "x").unwrap());
        });
    };
    renamed(&mut m, "GGUF", &["mixtral-8x7b.Q5_0.gguf"]);
    renamed(&mut m, "TensorFlow", &["tf_model.h5"]);
    renamed(&mut m, "FSDP", &["__0_0.distcp", "training_args.bin"]);
    renamed(&mut m, "DeepSpeed", &["zero_to_fp32.py", "latest"]);
    m.plain("another name", |dir| fs::rename(dir.join(weights), dir.join("mixtral.safetensors")).unwrap());
    insta::assert_snapshot!(m.text());
}

fn tensor<'a>(tensors: &'a mut [Tensor], name: &str) -> &'a mut Tensor {
    tensors.iter_mut().find(|t| t.name == name).unwrap()
}

const W2: &str = "model.layers.1.block_sparse_moe.experts.3.w2.weight";

/// Sets one element of an f32 tensor.
fn set(tensor: &mut Tensor, index: usize, value: f32) {
    tensor.data[4 * index..4 * index + 4].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn tensors() {
    let mut m = Messages::default();
    m.tensors("missing, misshapen and without a place, at once", None, |tensors| {
        tensors.retain(|t| t.name != "model.norm.weight");
        let w2 = tensor(tensors, W2);
        w2.shape = vec![48, 32];
        tensors.push(Tensor::new("model.layers.2.input_layernorm.weight", DType::F32, &[32], &[1.0; 32]));
        tensors.push(Tensor::new("lm_head.bias", DType::F32, &[97], &[1.0; 97]));
    });
    m.plain("weights of another type", |dir| {
        retype(&dir.join("model.safetensors"), "model.norm.weight", "F32", "C64x");
    });
    let model = TinyModel::mixtral(DType::F32, 1);
    m.case("fused experts of another size", &model, (Layout::V5, 1), |dir, _| {
        edit(&dir.join("config.json"), "intermediate_size", json!(64));
    });
    m.case("another model's configuration", &model, (Layout::Consolidated, 1), |dir, _| {
        edit(&dir.join("params.json"), "n_layers", json!(1));
    });
    m.tensors("not a number", None, |tensors| {
        let w2 = tensor(tensors, W2);
        set(w2, 1000, f32::NAN);
        set(w2, 77, f32::NEG_INFINITY);
    });
    m.tensors("the router is not finite", None, |tensors| {
        set(tensor(tensors, "model.layers.0.block_sparse_moe.gate.weight"), 5, f32::INFINITY);
    });
    m.tensors("past the range of f16", Some(DType::F16), |tensors| {
        let w2 = tensor(tensors, W2);
        set(w2, 3, 65504.0);
        set(w2, 9, -65505.0);
        set(w2, 10, 1e9);
    });
    m.tensors("past the range of bf16", Some(DType::Bf16), |tensors| set(tensor(tensors, W2), 0, f32::MAX));
    insta::assert_snapshot!(m.text());
}

/// Gives the first tensor of this name another type of the same size.
fn retype(path: &Path, name: &str, old: &str, new: &str) {
    let bytes = fs::read(path).unwrap();
    let header = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let text = String::from_utf8(bytes[8..8 + header].to_vec()).unwrap();
    let at = text.find(&format!("\"{name}\"")).unwrap();
    let text = format!("{}{}", &text[..at], text[at..].replacen(old, new, 1));
    let length = (text.len() as u64).to_le_bytes();
    fs::write(path, [&length[..], text.as_bytes(), &bytes[8 + header..]].concat()).unwrap();
}

/// Weights that do not match their configuration, for a reason that can be found out.
#[test]
fn diagnoses() {
    let mut m = Messages::default();
    let model = TinyModel::mixtral(DType::F32, 1);
    for prefix in ["module.", "_orig_mod.", "base_model.model.", "language_model.", "student.backbone."] {
        m.tensors(&format!("names begin with {prefix}"), None, |tensors| {
            tensors.iter_mut().for_each(|t| t.name = format!("{prefix}{}", t.name));
        });
    }
    m.tensors("the model without its head", None, |tensors| {
        tensors.retain(|t| t.name != "lm_head.weight");
        tensors.iter_mut().for_each(|t| t.name = t.name.replacen("model.", "", 1));
    });
    m.tensors("an adapter beside its base", None, |tensors| {
        for t in tensors {
            t.name = format!("base_model.model.{}", t.name.replace("v_proj.weight", "v_proj.base_layer.weight"));
        }
    });
    m.tensors("an adapter's deltas", None, |tensors| {
        tensors.push(Tensor::new("model.layers.1.self_attn.k_proj.lora_B.weight", DType::F32, &[32, 2], &[0.0; 64]));
    });
    m.tensors("a bias", None, |tensors| {
        tensors.push(Tensor::new("model.layers.1.self_attn.v_proj.bias", DType::F32, &[16], &[1.0; 16]));
    });
    m.tensors("without elements", None, |tensors| {
        for t in tensors {
            (t.shape, t.data) = (vec![0], Vec::new());
        }
    });
    let rows = |tensors: &mut Vec<Tensor>, name: &str, add: usize| {
        let t = tensor(tensors, name);
        t.shape[0] += add;
        t.data.extend(vec![0; add * 32 * 4]);
    };
    m.tensors("more rows than the vocabulary", None, |tensors| {
        rows(tensors, "model.embed_tokens.weight", 5);
        rows(tensors, "lm_head.weight", 5);
    });
    m.tensors("more rows in the head alone", None, |tensors| rows(tensors, "lm_head.weight", 5));
    m.tensors("without a head", None, |tensors| tensors.retain(|t| t.name != "lm_head.weight"));
    m.tensors("a reward model", None, |tensors| {
        tensors.retain(|t| t.name != "lm_head.weight");
        tensors.push(Tensor::new("score.weight", DType::F32, &[1, 32], &[1.0; 32]));
    });
    m.tensors("a layer with the largest number", None, |tensors| {
        let name = format!("model.layers.{}.input_layernorm.weight", usize::MAX);
        tensors.push(Tensor::new(name, DType::F32, &[32], &[1.0; 32]));
    });
    m.config("fewer layers than the weights have", "num_hidden_layers", json!(1));
    m.config("more layers than the weights have", "num_hidden_layers", json!(5));
    m.config("fewer experts than the weights have", "num_local_experts", json!(2));
    m.config("more experts than the weights have", "num_local_experts", json!(7));
    m.config("experts of a dense configuration", "model_type", json!("mistral"));
    m.case("a dense model of experts", &TinyModel::mistral(DType::F32, 1), (Layout::V4, 1), |dir, _| {
        edit(&dir.join("config.json"), "model_type", json!("mixtral"));
    });
    let weights = |dir: &Path| dir.join("model.safetensors");
    let (norm, awq) = ("model.norm.weight", json!({ "quant_method": "awq", "bits": 4 }));
    m.plain("quantized, and the configuration says how", |dir| {
        retype(&weights(dir), W2, W2, &W2.replace("weight", "qweight"));
        retype(&weights(dir), &W2.replace("weight", "qweight"), "F32", "I32");
        edit(&dir.join("config.json"), "quantization_config", awq);
    });
    m.plain("quantized, and a file beside says how", |dir| {
        retype(&weights(dir), W2, W2, &W2.replace("weight", "g_idx"));
        fs::write(dir.join("quantize_config.json"), "{}").unwrap();
    });
    m.plain("fp8, and nothing says so", |dir| {
        retype(&weights(dir), norm, "[32]", "[128]");
        retype(&weights(dir), norm, "F32", "F8_E4M3");
    });
    m.plain("float64", |dir| {
        retype(&weights(dir), norm, "[32]", "[16]");
        retype(&weights(dir), norm, "F32", "F64");
    });
    m.case("quantized, in Mistral's own files", &model, (Layout::Consolidated, 1), |dir, _| {
        retype(&dir.join("consolidated.safetensors"), "norm.weight", "F32", "I32");
    });
    insta::assert_snapshot!(m.text());
}

#[test]
fn what_the_router_alone_can_hold_is_no_overflow() {
    let root = tempfile::tempdir().unwrap();
    let model = TinyModel::mixtral(DType::F32, 1);
    let dir = root.path().join("model");
    let mut tensors = model.weights();
    set(tensor(&mut tensors, "model.layers.0.block_sparse_moe.gate.weight"), 5, 1e30);
    set(tensor(&mut tensors, W2), 5, 65504.0);
    model.write_tensors(&dir, Layout::V4, 1, &tensors);
    let mut options = ConvertOptions::new(Input::Directory(dir), root.path().join("ckpt"));
    options.dtype = Some(DType::F16);
    convert(&options, &()).unwrap();
}

#[test]
fn options() {
    let mut m = Messages::default();
    let model = TinyModel::mixtral(DType::F32, 1);
    let plain = (Layout::V4, 1);
    m.case("a mapping that does not divide the heads", &model, plain, |_, options| {
        options.mapping = Mapping::tensor_parallel(3, 1);
    });
    m.case("more ranks than experts", &TinyModel::mistral(DType::F32, 1), plain, |_, options| {
        options.mapping = Mapping::expert_parallel(2, 1);
    });
    m.case("more stages than layers", &model, plain, |_, options| options.mapping = Mapping::tensor_parallel(1, 3));
    m.case("an embedding of three dimensions", &model, plain, |_, options| options.embedding_sharding_dim = 2);
    m.case("the output is the input", &model, plain, |dir, options| options.output_dir = dir.to_owned());
    m.case("the output is someone's", &model, plain, |_, options| {
        fs::create_dir(&options.output_dir).unwrap();
        fs::write(options.output_dir.join("thesis.tex"), "years of work").unwrap();
    });
    m.case("the output is a file", &model, plain, |_, options| fs::write(&options.output_dir, "x").unwrap());
    insta::assert_snapshot!(m.text());
}
