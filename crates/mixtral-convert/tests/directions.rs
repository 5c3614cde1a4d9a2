//! The directions that an fp8 cache rounds keys by: they are what their definition says, for every way of storing and cutting a
//! model.
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use mixtral_checkpoint::Checkpoint;
use mixtral_convert::{ConvertOptions, ConvertPlan, Input, convert, plan, requantize};
use mixtral_model::{CacheFormat, DType, Mapping, ModelConfig, Precision, WeightOnly, fp8};
use mixtral_testkit::{Layout, TinyModel};
use safetensors::{Dtype, SafeTensors};

const NAME: &str = "attention.kv_cache_key_directions";

/// Rows that are longer than what is summed at a time.
fn model() -> TinyModel {
    let mut model = TinyModel::mixtral(DType::Bf16, 11);
    model.config = ModelConfig {
        hidden_size: 600,
        intermediate_size: 8,
        num_layers: 3,
        num_heads: 8,
        num_kv_heads: 2,
        head_dim: 16,
        ..model.config
    };
    model
}

fn options(from: &Path, to: PathBuf) -> ConvertOptions {
    ConvertOptions {
        cache: Some(CacheFormat::Fp8),
        kv_scale: Some(1.0),
        workers: 2,
        ..ConvertOptions::new(Input::Directory(from.to_owned()), to)
    }
}

/// The directions of a checkpoint's KV heads, by layer and head. Copies on several ranks must be alike.
fn directions(dir: &Path) -> BTreeMap<(usize, usize), Vec<f32>> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    assert_eq!(checkpoint.verify(1, &()).unwrap().problems, []);
    let (model, mapping) = (&checkpoint.config().model, checkpoint.config().mapping);
    assert!(model.key_directions);
    let mut all = BTreeMap::new();
    for rank in mapping.ranks() {
        let file = checkpoint.rank(rank).unwrap();
        let heads = mapping.kv_heads(model, rank);
        for (local, layer) in mapping.layers(model, rank).enumerate() {
            let found = file.tensor(&format!("transformer.layers.{local}.{NAME}")).unwrap();
            assert_eq!(found.shape, [heads.len(), model.head_dim]);
            for (head, direction) in heads.clone().zip(DType::F32.widen(found.bytes).chunks(model.head_dim)) {
                let before = all.insert((layer, head), direction.to_vec());
                assert!(before.is_none_or(|before| before == direction), "copies differ");
            }
        }
    }
    assert_eq!(all.len(), model.num_layers * model.num_kv_heads);
    all
}

/// Checks a direction against the definition, summed plainly: `queries` are the rows of the query heads that share the KV head.
fn check(direction: &[f32], queries: &[f32], norm: &[f32]) {
    let n = direction.len();
    let row = |index: usize| &queries[index * norm.len()..][..norm.len()];
    let mut moment = vec![vec![0f64; n]; n];
    for index in 0..queries.len() / norm.len() {
        let head = index / n * n;
        for (j, sum) in moment[index % n].iter_mut().enumerate() {
            let products = row(index).iter().zip(row(head + j)).zip(norm);
            *sum += products.map(|((a, b), g)| f64::from(*a) * f64::from(*b) * f64::from(*g).powi(2)).sum::<f64>();
        }
    }
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let times = |x: &[f64]| moment.iter().map(|row| dot(row, x)).collect::<Vec<_>>();
    // Power iteration from a vector that has a part along each axis.
    let mut first: Vec<f64> = (0..n).map(|i| 1.0 / (1.7 + i as f64)).collect();
    for _ in 0..20_000 {
        first = times(&first);
        let length = dot(&first, &first).sqrt();
        first.iter_mut().for_each(|x| *x /= length);
    }
    let eigenvalue = dot(&times(&first), &first);
    let rest = ((0..n).map(|i| moment[i][i]).sum::<f64>() - eigenvalue) / (n - 1) as f64;
    let found: Vec<f64> = direction.iter().map(|&x| f64::from(x)).collect();
    let square = dot(&found, &found);
    assert!((square / (eigenvalue / rest - 1.0) - 1.0).abs() < 1e-6, "{square} {eigenvalue} {rest}");
    assert!((dot(&found, &first).powi(2) / square - 1.0).abs() < 1e-6, "another direction");
    let largest = direction.iter().fold(0f32, |largest, &x| if x.abs() > largest.abs() { x } else { largest });
    assert!(largest > 0.0);
}

#[test]
fn they_are_the_same_for_every_layout_of_files_and_of_ranks() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: String| root.path().join(name);
    let model = model();
    let mut all = Vec::new();
    for (index, layout) in
        [Layout::V4, Layout::V5, Layout::Consolidated, Layout::ConsolidatedStacked].into_iter().enumerate()
    {
        let from = at(format!("model {index}"));
        model.write(&from, layout, 1 + index);
        // Four ranks have a KV head in two copies.
        let mappings = [
            Mapping::single(),
            Mapping::tensor_parallel(2, 1),
            Mapping::tensor_parallel(4, 1),
            Mapping::expert_parallel(4, 2),
            Mapping::tensor_parallel(1, 2),
            Mapping::tensor_parallel(1, 3),
        ];
        for (workers, mapping) in (1..).zip(mappings) {
            let to = at(format!("checkpoint {index} {workers}"));
            convert(&ConvertOptions { mapping, workers, ..options(&from, to.clone()) }, &()).unwrap();
            all.push(directions(&to));
        }
    }
    assert!(all.iter().all(|found| *found == all[0]));
    let weights: BTreeMap<String, Vec<f32>> =
        model.weights().into_iter().map(|t| (t.name.clone(), t.values())).collect();
    let ModelConfig { hidden_size, head_dim, .. } = model.config;
    let group = model.config.group_size() * head_dim * hidden_size;
    for ((layer, head), direction) in &all[0] {
        let of = |name: &str| &weights[&format!("model.layers.{layer}.{name}.weight")];
        check(direction, &of("self_attn.q_proj")[head * group..][..group], of("input_layernorm"));
    }
}

#[test]
fn other_types_and_formats_of_the_output_do_not_change_them() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    model().write(&at("model"), Layout::V4, 1);
    let options =
        |name: &str| ConvertOptions { mapping: Mapping::tensor_parallel(2, 1), ..options(&at("model"), at(name)) };
    convert(&options("floats"), &()).unwrap();
    let expected = directions(&at("floats"));
    convert(&ConvertOptions { dtype: Some(DType::F16), ..options("f16") }, &()).unwrap();
    assert_eq!(directions(&at("f16")), expected);
    let int8 = WeightOnly { attention: Precision::Int8, feed_forward: Precision::Int8, group: None };
    convert(&ConvertOptions { weight_only: Some(int8), ..options("int8") }, &()).unwrap();
    assert_eq!(directions(&at("int8")), expected);
    requantize(&Checkpoint::open(&at("floats")).unwrap(), int8, &at("again"), 2, &()).unwrap();
    assert_eq!(directions(&at("again")), expected);
}

#[test]
fn weights_of_zeros_have_directions_of_zeros() {
    let root = tempfile::tempdir().unwrap();
    let (from, to) = (root.path().join("model"), root.path().join("checkpoint"));
    let model = model();
    let mut weights = model.weights();
    weights.iter_mut().filter(|t| t.name == "model.layers.1.self_attn.q_proj.weight").for_each(|t| t.data.fill(0));
    model.write_tensors(&from, Layout::V4, 1, &weights);
    convert(&options(&from, to.clone()), &()).unwrap();
    for ((layer, _), direction) in directions(&to) {
        assert_eq!(direction.iter().all(|&x| x == 0.0), layer == 1);
    }
}

#[test]
fn only_an_fp8_cache_of_a_model_with_weights_has_them() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    model().write(&at("model"), Layout::V4, 1);
    let small = options(&at("model"), at("checkpoint"));
    let large = ConvertOptions { cache: None, kv_scale: None, ..small.clone() };
    let config_only = ConvertOptions { save_config_only: true, ..small.clone() };
    let [small, large, config_only] = [small, large, config_only].map(|options| plan(&options).unwrap());
    assert!(small.model.key_directions && !large.model.key_directions && !config_only.model.key_directions);
    let named = |plan: &ConvertPlan| plan.ranks[0].tensors.iter().filter(|tensor| tensor.name.ends_with(NAME)).count();
    assert_eq!([named(&small), named(&large)], [3, 0]);
    // Heads may be too wide.
    for (head_dim, has) in [(256, true), (258, false)] {
        let mut wide = model();
        (wide.config.head_dim, wide.config.hidden_size) = (head_dim, 8);
        wide.write(&at(&format!("wide {head_dim}")), Layout::V4, 1);
        let wide = plan(&options(&at(&format!("wide {head_dim}")), at("checkpoint"))).unwrap();
        assert_eq!(wide.model.key_directions, has);
    }
    // A worker reads a head's rows as floats.
    let rows = 2 * 12 * 600 * 4;
    assert!(small.peak_memory_bytes >= large.peak_memory_bytes + rows);
}

#[test]
fn imported_fp8_weights_have_those_of_their_values_and_integers_have_none() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/quantized");
    let root = tempfile::tempdir().unwrap();
    for name in
        ["compressed-mixtral-fp8", "compressed-mixtral-fp8-rows", "compressed-mistral-fp8", "modelopt-mixtral-fp8"]
    {
        let to = root.path().join(name);
        convert(&options(&fixtures.join(name), to.clone()), &()).unwrap();
        let cut = root.path().join(format!("{name} cut"));
        let mapping = Mapping::tensor_parallel(2, 2);
        convert(&ConvertOptions { mapping, ..options(&fixtures.join(name), cut.clone()) }, &()).unwrap();
        let found = directions(&to);
        assert_eq!(directions(&cut), found, "{name}");
        let model = Checkpoint::open(&to).unwrap().config().model.clone();
        let bytes = fs::read(fixtures.join(name).join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let floats = |name: &str| -> Vec<f32> {
            let tensor = file.tensor(name).unwrap();
            match tensor.dtype() {
                Dtype::F8_E4M3 => tensor.data().iter().map(|&byte| fp8::from_bits(byte)).collect(),
                Dtype::F32 => DType::F32.widen(tensor.data()),
                Dtype::F16 => DType::F16.widen(tensor.data()),
                Dtype::BF16 => DType::Bf16.widen(tensor.data()),
                other => panic!("{name}: {other:?}"),
            }
        };
        let group = model.group_size() * model.head_dim * model.hidden_size;
        for ((layer, head), direction) in found {
            let of = |name: &str| floats(&format!("model.layers.{layer}.{name}"));
            let (mut rows, scales) = (of("self_attn.q_proj.weight"), of("self_attn.q_proj.weight_scale"));
            let scaled = rows.len() / scales.len();
            rows.iter_mut().enumerate().for_each(|(index, x)| *x *= scales[index / scaled]);
            check(&direction, &rows[head * group..][..group], &of("input_layernorm.weight"));
        }
    }
    for name in ["gptq-mixtral", "awq-mixtral", "compressed-mixtral-int8"] {
        let to = root.path().join(name);
        convert(&options(&fixtures.join(name), to.clone()), &()).unwrap();
        let checkpoint = Checkpoint::open(&to).unwrap();
        let model = &checkpoint.config().model;
        assert!(model.cache == CacheFormat::Fp8 && !model.key_directions, "{name}");
    }
}
