//! Models that libraries quantized (`tests/goldens/quantized/README.md`): the checkpoint has their values to the bit, in
//! every layout of ranks.
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use mixtral_checkpoint::names::part_name;
use mixtral_checkpoint::{Checkpoint, RankFile, rank_weights};
use mixtral_convert::{ConvertOptions, HfTensor, Input, Matrix, convert};
use mixtral_model::fp8;
use mixtral_model::{
    CacheFormat, DType, Formats, Mapping, PartKind, Precision, Quantization, Rank, WeightFormat, WeightOnly,
};
use mixtral_testkit::{Tensor, write_safetensors};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/quantized")
}

fn options(model: &Path, output: PathBuf, mapping: Mapping) -> ConvertOptions {
    ConvertOptions { mapping, workers: 2, ..ConvertOptions::new(Input::Directory(model.to_owned()), output) }
}

/// A weight of a rank, decoded: its columns, its values in f32 and, where it is quantized, the type of its scales.
struct Decoded {
    cols: usize,
    values: Vec<f32>,
    scale: Option<DType>,
}

impl Decoded {
    /// Decodes the weight `name` of `shape`, one element at a time. A product of at most 8 and 11 bits is exact in f32.
    fn read(file: &RankFile, name: &str, format: WeightFormat, shape: &[usize]) -> Decoded {
        let cols = *shape.last().unwrap();
        let rows: usize = shape.iter().rev().skip(1).product();
        let part = |kind| file.tensor(&part_name(name, kind)).unwrap();
        let floats = |kind| {
            let view = part(kind);
            let (dtype, data) = (view.elem.float().unwrap(), view.bytes.to_vec());
            Tensor { name: String::new(), dtype, shape: view.shape.to_vec(), data }.values()
        };
        let quantization = match format {
            WeightFormat::Plain => return Decoded { cols, values: floats(PartKind::Values), scale: None },
            WeightFormat::Fp8 | WeightFormat::Fp8Rows(_) => {
                let (bytes, scales) = (part(PartKind::Values).bytes, floats(PartKind::Scales));
                let value =
                    |(index, &byte): (usize, &u8)| fp8::from_bits(byte) * scales[index * scales.len() / bytes.len()];
                return Decoded {
                    cols,
                    values: bytes.iter().enumerate().map(value).collect(),
                    scale: Some(DType::F32),
                };
            }
            WeightFormat::Quantized(quantization) => quantization,
        };
        let Quantization { bits, zeros, scale, .. } = quantization;
        let (integers, scales) = (part(PartKind::Values).bytes, floats(PartKind::Scales));
        let zeros = zeros.then(|| part(PartKind::Zeros).bytes);
        let (row_bytes, groups, group) =
            (quantization.row_bytes(cols), quantization.groups(cols), quantization.group_len(cols));
        let value = |index: usize| {
            let (row, col) = (index / cols, index % cols);
            let byte = integers[row * row_bytes + col / bits.per_byte()];
            let integer = if bits.per_byte() == 2 { byte >> (4 * (col % 2)) & 15 } else { byte };
            let at = row * groups + col / group;
            let zero = zeros.map_or(bits.middle(), |zeros| zeros[at]);
            assert!(zero <= bits.max());
            (f32::from(integer) - f32::from(zero)) * scales[at]
        };
        Decoded { cols, values: (0..rows * cols).map(value).collect(), scale: Some(scale) }
    }

    fn rows(&self, first: usize, count: usize) -> Decoded {
        let values = self.values[first * self.cols..(first + count) * self.cols].to_vec();
        Decoded { values, ..*self }
    }
}

/// All weights of a rank, decoded, by name.
fn decoded(checkpoint: &Checkpoint, rank: Rank) -> BTreeMap<String, Decoded> {
    let file = checkpoint.rank(rank).unwrap();
    let weights = rank_weights(checkpoint.config(), rank).into_iter();
    weights.map(|w| (w.name.clone(), Decoded::read(&file, &w.name, w.format, &w.shape))).collect()
}

/// The tensors of the whole model, by transformers 4's names, from the one rank of a checkpoint.
fn whole(checkpoint: &Checkpoint) -> BTreeMap<String, Decoded> {
    let model = &checkpoint.config().model;
    let weights = decoded(checkpoint, Rank(0));
    let part = |tensor: HfTensor| {
        let of = |layer: usize, name: &str| &weights[&format!("transformer.layers.{layer}.{name}.weight")];
        let [rows, _] = tensor.matrix_shape(model);
        let (queries, keys) = (model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim);
        let (hidden, inner) = (model.hidden_size, model.intermediate_size);
        let feed_forward = |layer, expert, matrix| match matrix {
            Matrix::Up => of(layer, "mlp.fc").rows(expert * 2 * inner, rows),
            Matrix::Gate => of(layer, "mlp.fc").rows((expert * 2 + 1) * inner, rows),
            Matrix::Down => of(layer, "mlp.proj").rows(expert * hidden, rows),
        };
        match tensor {
            HfTensor::EmbedTokens => weights["transformer.vocab_embedding.weight"].rows(0, rows),
            HfTensor::FinalNorm => weights["transformer.ln_f.weight"].rows(0, rows),
            HfTensor::LmHead => weights["lm_head.weight"].rows(0, rows),
            HfTensor::InputNorm(layer) => of(layer, "input_layernorm").rows(0, rows),
            HfTensor::PostNorm(layer) => of(layer, "post_layernorm").rows(0, rows),
            HfTensor::Router(layer) => of(layer, "mlp.router").rows(0, rows),
            HfTensor::Query(layer) => of(layer, "attention.qkv").rows(0, rows),
            HfTensor::Key(layer) => of(layer, "attention.qkv").rows(queries, rows),
            HfTensor::Value(layer) => of(layer, "attention.qkv").rows(queries + keys, rows),
            HfTensor::Output(layer) => of(layer, "attention.dense").rows(0, rows),
            HfTensor::Expert { layer, expert, matrix } => feed_forward(layer, expert, matrix),
            HfTensor::Mlp { layer, matrix } => feed_forward(layer, 0, matrix),
        }
    };
    HfTensor::all(model, false).into_iter().map(|tensor| (tensor.to_string(), part(tensor))).collect()
}

/// Checks a fixture: values to the bit, and the same values from the shards of every layout in `mappings`.
fn agrees(name: &str, format: &str, mappings: &[Mapping]) {
    both_agree(name, [format, format], mappings);
}

/// The same, with a format for attention and one for the feed-forward.
fn both_agree(name: &str, formats: [&str; 2], mappings: &[Mapping]) {
    let (source, root) = (fixtures().join(name), tempfile::tempdir().unwrap());
    convert(&options(&source, root.path().join("one"), Mapping::single()), &()).unwrap();
    let checkpoint = Checkpoint::open(&root.path().join("one")).unwrap();
    let model = checkpoint.config().model.clone();
    assert_eq!([model.formats.attention.to_string(), model.formats.feed_forward.to_string()], formats, "{name}");
    let values = whole(&checkpoint);

    let bytes = fs::read(source.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let mut compared = 0;
    for (tensor, Decoded { values, scale, .. }) in &values {
        let Some(scale) = scale else { continue };
        let rounded = Tensor::new("", *scale, &[values.len()], values).data;
        let hash = expected.tensor(&format!("blake3.{tensor}")).unwrap();
        assert_eq!(blake3::hash(&rounded).as_bytes()[..], *hash.data(), "{name}: {tensor}");
        compared += 1;
    }
    let hashes = expected.names().into_iter().filter(|tensor| tensor.starts_with("blake3.")).count();
    assert_eq!(compared, hashes, "{name}");

    // A plain model of the same values; `tests/merge.rs` shows that plain models are cut as they should be.
    let plain = root.path().join("plain");
    fs::create_dir(&plain).unwrap();
    let tensor = |(name, decoded): (&String, &Decoded)| {
        let rows = decoded.values.len() / decoded.cols;
        let shape = if name.contains("norm") { vec![decoded.cols] } else { vec![rows, decoded.cols] };
        Tensor::new(name.clone(), DType::F32, &shape, &decoded.values)
    };
    write_safetensors(&plain.join("model.safetensors"), &values.iter().map(tensor).collect::<Vec<_>>());
    let mut config: Value = serde_json::from_slice(&fs::read(source.join("config.json")).unwrap()).unwrap();
    config.as_object_mut().unwrap().shift_remove("quantization_config");
    fs::write(plain.join("config.json"), config.to_string()).unwrap();
    for &mapping in mappings {
        let (ours, theirs) = (root.path().join("ours"), root.path().join("theirs"));
        convert(&options(&source, ours.clone(), mapping), &()).unwrap();
        let mut plain = options(&plain, theirs.clone(), mapping);
        plain.dtype = Some(DType::F32);
        let ours = Checkpoint::open(&ours).unwrap();
        if ours.config().model.cache == CacheFormat::Fp8 {
            (plain.cache, plain.kv_scale) = (Some(CacheFormat::Fp8), Some(1.0));
        }
        convert(&plain, &()).unwrap();
        let theirs = Checkpoint::open(&theirs).unwrap();
        for rank in mapping.ranks() {
            let theirs = decoded(&theirs, rank);
            let mut ours = decoded(&ours, rank);
            ours.retain(|name, _| !name.ends_with("kv_cache_scaling_factor"));
            for (name, ours) in ours {
                assert!(ours.values == theirs[&name].values, "{name} on rank {rank} of {mapping:?}");
            }
        }
    }
}

/// Tensor parallel, in stages, by experts, and all of these.
fn all_mappings() -> [Mapping; 4] {
    [
        Mapping::tensor_parallel(2, 1),
        Mapping::tensor_parallel(1, 2),
        Mapping::expert_parallel(2, 1),
        Mapping { tp_size: 2, pp_size: 2, moe_tp_size: 1, moe_ep_size: 2 },
    ]
}

#[test]
fn autoawq() {
    agrees("awq-mixtral", "int4:g32:f16:zeros", &all_mappings());
    agrees("awq-mistral", "int4:g128:f16:zeros", &[Mapping::tensor_parallel(1, 2)]);
}

#[test]
fn gptq() {
    agrees("gptq-mixtral", "int4:g32:f16", &all_mappings());
    agrees("gptq-mixtral-rows", "int4:row:f16:zeros", &all_mappings());
    agrees("gptq-mistral-v2", "int4:g128:f16:zeros", &[Mapping::tensor_parallel(1, 2)]);
}

#[test]
fn compressed_tensors() {
    agrees("compressed-mixtral-int4", "int4:g32:f16", &all_mappings());
    agrees("compressed-mixtral-int8", "int8:row:bf16", &all_mappings());
    agrees("compressed-mixtral-int8-unpacked", "int8:row:bf16:zeros", &all_mappings());
    agrees("compressed-mixtral-int8-zeros", "int8:g32:bf16:zeros", &[Mapping::tensor_parallel(1, 2)]);
    agrees("compressed-mistral-int4-zeros", "int4:g128:bf16:zeros", &[Mapping::tensor_parallel(1, 2)]);
}

#[test]
fn fp8_by_every_library() {
    // Query, key and value have scales of their own, and so have up and gate but in ModelOpt's experts.
    agrees("compressed-mixtral-fp8", "fp8:row:static", &all_mappings());
    agrees("compressed-mixtral-fp8-rows", "fp8:row:static", &all_mappings());
    agrees("compressed-mixtral-fp8-dynamic", "fp8:row:token", &all_mappings());
    agrees("compressed-mistral-fp8", "fp8:row:static", &[Mapping::tensor_parallel(2, 2)]);
    both_agree("modelopt-mixtral-fp8", ["fp8:row:static", "fp8"], &all_mappings());
    agrees("modelopt-mistral-fp8", "fp8:row:static", &[Mapping::tensor_parallel(2, 2)]);
}

/// The numbers of a model's file, by name.
fn numbers(name: &str) -> BTreeMap<String, f32> {
    let bytes = fs::read(fixtures().join(name).join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let number = |(name, view): (String, TensorView<'_>)| match (view.dtype(), view.data()) {
        (Dtype::F32, &[a, b, c, d]) => Some((name, f32::from_le_bytes([a, b, c, d]))),
        (Dtype::BF16, &[c, d]) => Some((name, f32::from_le_bytes([0, 0, c, d]))),
        _ => None,
    };
    file.tensors().into_iter().filter_map(number).collect()
}

#[test]
fn an_input_has_the_largest_scale_of_its_linears_in_every_layout() {
    for name in ["compressed-mixtral-fp8", "modelopt-mixtral-fp8"] {
        let numbers = numbers(name);
        for mapping in all_mappings() {
            let root = tempfile::tempdir().unwrap();
            let to = root.path().join("checkpoint");
            convert(&options(&fixtures().join(name), to.clone(), mapping), &()).unwrap();
            let checkpoint = Checkpoint::open(&to).unwrap();
            let model = &checkpoint.config().model;
            assert_eq!(model.cache, CacheFormat::Fp8);
            for rank in mapping.ranks() {
                let file = checkpoint.rank(rank).unwrap();
                let floats = |name: &str| DType::F32.widen(file.tensor(name).unwrap().bytes);
                for (index, layer) in mapping.layers(model, rank).enumerate() {
                    let of_layer = |number: &&String| number.contains(&format!("layers.{layer}."));
                    let largest = |linears: &[&str]| {
                        let is_read = |number: &&String| {
                            number.ends_with("input_scale") && linears.iter().any(|linear| number.contains(linear))
                        };
                        numbers.keys().filter(of_layer).filter(is_read).map(|n| numbers[n]).fold(0.0, f32::max)
                    };
                    let ours =
                        |name: &str| floats(&format!("transformer.layers.{index}.{name}.activation_scaling_factor"));
                    assert_eq!(ours("attention.qkv"), [largest(&["q_proj", "k_proj", "v_proj"])]);
                    assert_eq!(ours("attention.dense"), [largest(&["o_proj"])]);
                    assert_eq!(ours("mlp.fc"), [largest(&[".w1.", ".w3.", ".gate_proj.", ".up_proj."])]);
                    assert_eq!(ours("mlp.proj"), [largest(&[".w2.", ".down_proj."])]);
                    let of_cache =
                        |end: &str| *numbers.iter().find(|(n, _)| of_layer(n) && n.ends_with(end)).unwrap().1;
                    let found = floats(&format!("transformer.layers.{index}.attention.kv_cache_scaling_factor"));
                    assert_eq!(found, [of_cache("k_scale"), of_cache("v_scale")]);
                }
            }
        }
    }
}

#[test]
fn autofp8_and_modelopts_own_file_say_the_same_in_other_words() {
    let root = tempfile::tempdir().unwrap();
    let read = |from: &Path, to: &str| {
        let to = root.path().join(to);
        convert(&options(from, to.clone(), Mapping::expert_parallel(2, 1)), &()).unwrap();
        ["rank0.safetensors", "rank1.safetensors"].map(|name| fs::read(to.join(name)).unwrap())
    };
    let from = root.path().join("autofp8");
    let edit = |config: &mut Value| {
        config["quantization_config"] =
            json!({ "quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static" });
    };
    spoiled("compressed-mixtral-fp8", &from, edit, |_| {});
    assert!(read(&from, "a") == read(&fixtures().join("compressed-mixtral-fp8"), "b"), "AutoFP8");

    let from = root.path().join("modelopt");
    let remove = |config: &mut Value| drop(config.as_object_mut().unwrap().shift_remove("quantization_config"));
    spoiled("modelopt-mixtral-fp8", &from, remove, |_| {});
    let keys = json!({ "quantization": { "quant_algo": "FP8", "kv_cache_quant_algo": "FP8" } });
    fs::write(from.join("hf_quant_config.json"), keys.to_string()).unwrap();
    assert!(read(&from, "c") == read(&fixtures().join("modelopt-mixtral-fp8"), "d"), "ModelOpt");
}

#[test]
fn autofp8_with_dynamic_inputs_has_scales_of_tokens() {
    let root = tempfile::tempdir().unwrap();
    let (from, to) = (root.path().join("model"), root.path().join("checkpoint"));
    let edit = |config: &mut Value| {
        config["quantization_config"] = json!({ "quant_method": "fp8", "activation_scheme": "dynamic" });
    };
    spoiled("modelopt-mixtral-fp8", &from, edit, |tensors| tensors.retain(|name, _| !name.ends_with(".input_scale")));
    convert(&options(&from, to.clone(), Mapping::single()), &()).unwrap();
    let model = Checkpoint::open(&to).unwrap().config().model.clone();
    assert_eq!(model.formats.attention.to_string(), "fp8:row:token");
    // The scales of its cache are there, whatever the configuration says.
    assert_eq!(model.cache, CacheFormat::Fp8);
}

#[test]
fn the_scales_of_a_cache_may_be_one_or_missing_or_given() {
    let root = tempfile::tempdir().unwrap();
    let (from, to) = (root.path().join("model"), root.path().join("checkpoint"));
    let one_for_both = |tensors: &mut BTreeMap<String, Stored>| {
        tensors.retain(|name, _| !name.ends_with("v_scale"));
        renamed(tensors, &[(".self_attn.k_proj.k_scale", ".self_attn.kv_scale")]);
    };
    spoiled("modelopt-mixtral-fp8", &from, |_| {}, one_for_both);
    convert(&options(&from, to.clone(), Mapping::single()), &()).unwrap();
    let scales = |to: &Path| {
        let file = Checkpoint::open(to).unwrap().rank(Rank(0)).unwrap();
        DType::F32.widen(file.tensor("transformer.layers.1.attention.kv_cache_scaling_factor").unwrap().bytes)
    };
    let expected = numbers("modelopt-mixtral-fp8")["model.layers.1.self_attn.k_proj.k_scale"];
    assert_eq!(scales(&to), [expected; 2]);

    let from = root.path().join("without");
    spoiled(
        "modelopt-mixtral-fp8",
        &from,
        |_| {},
        |tensors| tensors.retain(|name, _| !name.contains("_proj.k_scale") && !name.contains("_proj.v_scale")),
    );
    let mut options = options(&from, to.clone(), Mapping::single());
    let report = convert(&options, &()).unwrap();
    assert!(report.warnings[0].contains("--kv-scale 1"), "{report:?}");
    assert_eq!(Checkpoint::open(&to).unwrap().config().model.cache, CacheFormat::Plain);
    (options.cache, options.kv_scale) = (Some(CacheFormat::Fp8), Some(1.0));
    assert!(convert(&options, &()).unwrap().warnings.is_empty());
    assert_eq!(scales(&to), [1.0; 2]);
}

/// A stored tensor of any type.
type Stored = (Dtype, Vec<usize>, Vec<u8>);

/// A copy of a fixture in `dir`, with its tensors changed by `spoil`, and the keys of its configuration by `edit`.
fn spoiled(name: &str, dir: &Path, edit: impl FnOnce(&mut Value), spoil: impl FnOnce(&mut BTreeMap<String, Stored>)) {
    fs::create_dir_all(dir).unwrap();
    let source = fixtures().join(name);
    let mut config: Value = serde_json::from_slice(&fs::read(source.join("config.json")).unwrap()).unwrap();
    edit(&mut config);
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let bytes = fs::read(source.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let stored =
        |(name, view): (String, TensorView<'_>)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
    let mut tensors: BTreeMap<String, Stored> = file.tensors().into_iter().map(stored).collect();
    spoil(&mut tensors);
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

/// Renames all tensors by what `rename` replaces.
fn renamed(tensors: &mut BTreeMap<String, Stored>, rename: &[(&str, &str)]) {
    let new = |name: &str| rename.iter().fold(name.to_owned(), |name, (old, new)| name.replace(old, new));
    *tensors = std::mem::take(tensors).into_iter().map(|(name, tensor)| (new(&name), tensor)).collect();
}

#[test]
fn a_config_without_weights_is_of_plain_ones_and_says_so() {
    let root = tempfile::tempdir().unwrap();
    let mut only_config = options(&fixtures().join("awq-mixtral"), root.path().join("checkpoint"), Mapping::single());
    only_config.save_config_only = true;
    let report = convert(&only_config, &()).unwrap();
    assert!(report.warnings.iter().any(|warning| warning.contains("quantized by awq")), "{report:?}");
    let checkpoint = Checkpoint::open(&only_config.output_dir).unwrap();
    assert_eq!(checkpoint.config().model.formats, Formats::default());
}

#[test]
fn every_spelling_gives_the_same_checkpoint() {
    let to_4 = [(".gate_proj.", ".w1."), (".up_proj.", ".w3."), (".down_proj.", ".w2.")];
    let moe = [(".mlp.", ".block_sparse_moe.")];
    let spellings: [Vec<(&str, &str)>; 3] = [vec![], moe.to_vec(), [&moe[..], &to_4[..]].concat()];
    let root = tempfile::tempdir().unwrap();
    let mut first = None;
    for (index, spelling) in spellings.into_iter().enumerate() {
        let (from, to) = (root.path().join(format!("model{index}")), root.path().join(format!("checkpoint{index}")));
        spoiled("gptq-mixtral", &from, |_| {}, |tensors| renamed(tensors, &spelling));
        convert(&options(&from, to.clone(), Mapping::expert_parallel(2, 1)), &()).unwrap();
        let read = |name: &str| fs::read(to.join(name)).unwrap();
        let files = ["config.json", "rank0.safetensors", "rank1.safetensors"].map(read);
        assert!(*first.get_or_insert(files.clone()) == files, "spelling {index}");
    }
}

#[test]
fn files_beside_the_configuration_describe_older_models() {
    let older = [
        (
            "gptq-mixtral",
            "quantize_config.json",
            json!({ "bits": 4, "group_size": 32, "desc_act": false, "sym": true }),
        ),
        (
            "awq-mixtral",
            "quant_config.json",
            json!({ "w_bit": 4, "q_group_size": 32, "zero_point": true, "version": "GEMM" }),
        ),
    ];
    for (name, file, keys) in older {
        let root = tempfile::tempdir().unwrap();
        let from = root.path().join("model");
        let remove = |config: &mut Value| drop(config.as_object_mut().unwrap().shift_remove("quantization_config"));
        spoiled(name, &from, remove, |_| {});
        fs::write(from.join(file), keys.to_string()).unwrap();
        let read = |from: &Path, to: &str| {
            let to = root.path().join(to);
            convert(&options(from, to.clone(), Mapping::single()), &()).unwrap();
            fs::read(to.join("rank0.safetensors")).unwrap()
        };
        assert!(read(&from, "older") == read(&fixtures().join(name), "newer"), "{name}");
    }
}

#[test]
fn the_tool_that_wrote_zeros_may_be_named_in_a_list_or_alone() {
    let root = tempfile::tempdir().unwrap();
    let from = root.path().join("model");
    let alone = |config: &mut Value| config["quantization_config"]["meta"]["quantizer"] = json!("gptqmodel:1.0.0");
    spoiled("gptq-mixtral-rows", &from, alone, |_| {});
    convert(&options(&from, root.path().join("checkpoint"), Mapping::single()), &()).unwrap();
}

#[test]
fn a_part_of_a_model_may_be_plain_or_of_another_scheme() {
    let root = tempfile::tempdir().unwrap();
    let (from, to) = (root.path().join("model"), root.path().join("checkpoint"));
    let plain = |tensors: &mut BTreeMap<String, Stored>| {
        // Attention's linears in floats: ones.
        let is_attention = |name: &str| name.contains(".self_attn.");
        let shapes: Vec<(String, Vec<usize>)> = tensors
            .iter()
            .filter(|(name, _)| is_attention(name) && name.ends_with(".weight_packed"))
            .map(|(name, (_, shape, _))| (name.replace("_packed", ""), vec![shape[0], shape[1] * 8]))
            .collect();
        tensors.retain(|name, _| !is_attention(name));
        for (name, shape) in shapes {
            let bytes = Tensor::new("", DType::F16, &shape, &vec![1.0; shape[0] * shape[1]]).data;
            tensors.insert(name, (Dtype::F16, shape, bytes));
        }
    };
    spoiled("compressed-mixtral-int4", &from, |_| {}, plain);
    convert(&options(&from, to.clone(), Mapping::single()), &()).unwrap();
    let formats = Checkpoint::open(&to).unwrap().config().model.formats;
    assert_eq!(
        (formats.attention.to_string(), formats.feed_forward.to_string()),
        ("plain".into(), "int4:g32:f16".into())
    );

    // Experts' groups twice as long, with a scheme of their own.
    let (from, to) = (root.path().join("model2"), root.path().join("checkpoint2"));
    let edit = |config: &mut Value| {
        let groups = &mut config["quantization_config"]["config_groups"];
        groups["group_1"] = groups["group_0"].clone();
        groups["group_1"]["weights"]["group_size"] = json!(64);
    };
    let merge = |tensors: &mut BTreeMap<String, Stored>| {
        for (name, (_, shape, data)) in tensors {
            if name.contains(".experts.") && name.ends_with(".weight_scale") {
                *data = data.chunks(4).flat_map(|two| two[..2].to_vec()).collect();
                shape[1] /= 2;
            }
        }
    };
    spoiled("compressed-mixtral-int4", &from, edit, merge);
    convert(&options(&from, to.clone(), Mapping::single()), &()).unwrap();
    let formats = Checkpoint::open(&to).unwrap().config().model.formats;
    assert_eq!(
        (formats.attention.to_string(), formats.feed_forward.to_string()),
        ("int4:g32:f16".into(), "int4:g64:f16".into())
    );
}

#[test]
fn what_is_refused_says_why() {
    let mut text = String::new();
    let mut case = |title: &str,
                    fixture: &str,
                    mapping: Mapping,
                    edit: &dyn Fn(&mut Value),
                    spoil: &dyn Fn(&mut BTreeMap<String, Stored>)| {
        let root = tempfile::tempdir().unwrap();
        let (from, to) = (root.path().join("model"), root.path().join("checkpoint"));
        spoiled(fixture, &from, edit, spoil);
        let error = convert(&options(&from, to.clone(), mapping), &()).unwrap_err().to_string();
        assert!(!to.exists(), "{title} leaves output behind");
        writeln!(text, "# {title}\n{}", error.replace(root.path().to_str().unwrap(), "[DIR]")).unwrap();
    };
    let one = Mapping::single();
    let (awq, gptq, compressed) = ("awq-mixtral", "gptq-mixtral", "compressed-mixtral-int4");
    let mut key = |title: &str, fixture: &str, key: &str, value: Value| {
        case(title, fixture, one, &|config| config["quantization_config"][key] = value.clone(), &|_| {});
    };
    key("another library", awq, "quant_method", json!("bitsandbytes"));
    key("AutoAWQ's gemv", awq, "version", json!("gemv"));
    key("AutoAWQ for Marlin", awq, "version", json!("marlin"));
    key("AutoAWQ without zeros", awq, "zero_point", json!(false));
    key("llm-awq", awq, "backend", json!("llm-awq"));
    key("groups of 48", awq, "group_size", json!(48));
    key("GPTQ with 8 bits", gptq, "bits", json!(8));
    key("GPTQ with 3 bits", gptq, "bits", json!(3));
    key("GPTQ for Marlin", gptq, "checkpoint_format", json!("marlin"));
    key("old GPTQ for Marlin", gptq, "is_marlin_format", json!(true));
    key("GPTQ in other words", gptq, "pack_dtype", json!("int16"));
    key("a cache of integers", compressed, "kv_cache_scheme", json!({ "num_bits": 8, "type": "int" }));
    key("sparse weights", compressed, "sparsity_config", json!({ "format": "sparse-24-bitmask" }));
    key("turned activations", compressed, "transform_config", json!({ "config_groups": { "u": {} } }));
    key("a format without groups", compressed, "config_groups", Value::Null);
    let many: serde_json::Map<String, Value> = (0..17).map(|n| (n.to_string(), json!({}))).collect();
    key("groups without end", compressed, "config_groups", Value::Object(many));
    let mut group = |title: &str, at: &[&str], value: Value| {
        let edit = |config: &mut Value| {
            let group = &mut config["quantization_config"]["config_groups"]["group_0"];
            *at.iter().fold(group, |group, key| &mut group[*key]) = value.clone();
        };
        case(title, compressed, one, &edit, &|_| {});
    };
    group("fp4", &["format"], json!("nvfp4-pack-quantized"));
    group("4 bits that are not packed", &["format"], json!("int-quantized"));
    group("fp8", &["weights", "type"], json!("float"));
    group("2 bits", &["weights", "num_bits"], json!(2));
    group("a scale a tensor", &["weights", "strategy"], json!("tensor"));
    group("quantized inputs", &["input_activations"], json!({ "num_bits": 8 }));
    case(
        "zeros that AutoGPTQ wrote",
        "gptq-mixtral-rows",
        one,
        &|config| config["quantization_config"]["meta"] = json!({ "quantizer": "auto_gptq:0.7.1" }),
        &|_| {},
    );
    let experts = "model.layers.1.mlp.experts.2";
    let at = |suffix: &str| format!("{experts}.{suffix}");
    case("the order of activations", gptq, one, &|_| {}, &|tensors| {
        tensors.get_mut(&at("down_proj.g_idx")).unwrap().2[4] = 3;
    });
    case("symmetric, but for one zero", gptq, one, &|_| {}, &|tensors| {
        tensors.get_mut(&at("up_proj.qzeros")).unwrap().2[0] = 0x76;
    });
    case("groups of another size in a layer", awq, one, &|_| {}, &|tensors| {
        let name = "model.layers.1.self_attn.v_proj.scales";
        let (_, shape, data) = tensors.get_mut(name).unwrap();
        shape[0] /= 2;
        data.truncate(data.len() / 2);
    });
    case("scales of another type in a layer", compressed, one, &|_| {}, &|tensors| {
        tensors.get_mut("model.layers.1.self_attn.v_proj.weight_scale").unwrap().0 = Dtype::BF16;
    });
    case("a linear that is plain", awq, one, &|_| {}, &|tensors| {
        let name = "model.layers.1.self_attn.q_proj";
        tensors.retain(|tensor, _| !tensor.starts_with(name));
        tensors.insert(format!("{name}.weight"), (Dtype::F16, vec![64, 64], vec![0; 2 * 64 * 64]));
    });
    case("a linear that is not", awq, one, &|_| {}, &|tensors| {
        let name = "model.layers.0.self_attn.q_proj";
        tensors.retain(|tensor, _| !tensor.starts_with(name));
        tensors.insert(format!("{name}.weight"), (Dtype::F16, vec![64, 64], vec![0; 2 * 64 * 64]));
    });
    case("a quantized head", awq, one, &|_| {}, &|tensors| {
        tensors.remove("lm_head.weight");
        tensors.insert("lm_head.qweight".to_owned(), (Dtype::I32, vec![64, 12], vec![0; 4 * 64 * 12]));
    });
    case("a scale that is infinite", awq, one, &|_| {}, &|tensors| {
        tensors.get_mut("model.layers.0.self_attn.k_proj.scales").unwrap().2[..2].copy_from_slice(&[0, 0x7c]);
    });
    let (fp8, dynamic) = ("compressed-mixtral-fp8", "compressed-mixtral-fp8-dynamic");
    let mut of_fp8 = |title: &str, fixture: &str, at: &[&str], value: Value| {
        let edit = |config: &mut Value| {
            let keys = &mut config["quantization_config"];
            *at.iter().fold(keys, |keys, key| &mut keys[*key]) = value.clone();
        };
        case(title, fixture, one, &edit, &|_| {});
    };
    let group = |key, of| ["config_groups", "group_0", key, of];
    of_fp8("fp8 in blocks", dynamic, &group("weights", "strategy"), json!("block"));
    of_fp8("fp8 with a scale for all tokens of a step", fp8, &group("input_activations", "dynamic"), json!(true));
    of_fp8("fp8 with inputs in groups", dynamic, &group("input_activations", "strategy"), json!("group"));
    of_fp8("fp8 of other bits", fp8, &group("weights", "num_bits"), json!(4));
    of_fp8("fp8 with plain inputs", fp8, &["config_groups", "group_0", "input_activations"], Value::Null);
    of_fp8("a cache with scales of heads", fp8, &["kv_cache_scheme", "strategy"], json!("attn_head"));
    let auto_fp8 = |keys: Value| move |config: &mut Value| config["quantization_config"] = keys.clone();
    let blocks = json!({ "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128] });
    case("DeepSeek's fp8 in blocks", fp8, one, &auto_fp8(blocks), &|_| {});
    case(
        "AutoFP8 of another scheme",
        fp8,
        one,
        &auto_fp8(json!({ "quant_method": "fp8", "activation_scheme": "none" })),
        &|_| {},
    );
    case("ModelOpt's fp4", fp8, one, &auto_fp8(json!({ "quant_method": "modelopt", "quant_algo": "NVFP4" })), &|_| {});
    case("fbgemm's fp8", fp8, one, &auto_fp8(json!({ "quant_method": "fbgemm_fp8" })), &|_| {});
    let modelopt = "modelopt-mixtral-fp8";
    let number = |at: &'static str, bytes: [u8; 4]| {
        move |tensors: &mut BTreeMap<String, Stored>| tensors.get_mut(at).unwrap().2 = bytes.to_vec()
    };
    let input = "model.layers.1.block_sparse_moe.experts.2.w2.input_scale";
    case("an input's scale of 0", modelopt, one, &|_| {}, &number(input, [0; 4]));
    let nan = f32::NAN.to_le_bytes();
    case(
        "a cache's scale that is no number",
        modelopt,
        one,
        &|_| {},
        &number("model.layers.0.self_attn.k_proj.k_scale", nan),
    );
    case("a weight that is no number", modelopt, one, &|_| {}, &|tensors| {
        tensors.get_mut("model.layers.1.self_attn.o_proj.weight").unwrap().2[7] = 0xff;
    });
    case("an expert without a scale", modelopt, one, &|_| {}, &|tensors| drop(tensors.remove(input)));
    case("a layer's cache without a scale", modelopt, one, &|_| {}, &|tensors| {
        tensors.remove("model.layers.1.self_attn.v_proj.v_scale");
    });
    case("fp8 with more exponent", modelopt, one, &|_| {}, &|tensors| {
        tensors.get_mut("model.layers.1.self_attn.o_proj.weight").unwrap().0 = Dtype::F8_E5M2;
    });
    case("ranks that cut groups", "awq-mistral", Mapping::tensor_parallel(2, 1), &|_| {}, &|_| {});
    let mut again = options(&fixtures().join(awq), PathBuf::from("checkpoint"), one);
    again.weight_only = Some(WeightOnly { attention: Precision::Int8, feed_forward: Precision::Int8, group: None });
    let error = convert(&again, &()).unwrap_err().to_string();
    let dir = fixtures().display().to_string();
    writeln!(text, "# quantized weights that are to be quantized\n{}", error.replace(&dir, "[DIR]")).unwrap();
    insta::assert_snapshot!(text);
}
