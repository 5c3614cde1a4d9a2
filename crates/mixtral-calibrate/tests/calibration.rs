//! Calibration of small models: what is seen, and that it does not depend on how it is computed.
#![allow(missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mixtral_calibrate::{CalibrateError, CalibrateOptions, Machine, Text, calibrate};
use mixtral_checkpoint::Checkpoint;
use mixtral_convert::{ConvertOptions, FloatModel, Input, LinearInput, Statistics};
use mixtral_model::{CacheFormat, DType, Precision, Rank, WeightOnly};
use mixtral_testkit::{Layout, TinyModel};
use tempfile::TempDir;

/// A model and eight lines of token ids.
struct Setup {
    dir: TempDir,
    model: TinyModel,
}

impl Setup {
    fn new(model: TinyModel) -> Self {
        let dir = TempDir::new().unwrap();
        model.write(&dir.path().join("model"), Layout::V4, 1);
        let line = |n: usize| (0..20 + 3 * n).map(|i| (i * (n + 7) % 97).to_string()).collect::<Vec<_>>().join(",");
        fs::write(dir.path().join("ids.csv"), (0..8).map(line).collect::<Vec<_>>().join("\n")).unwrap();
        Setup { dir, model }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn options(&self) -> CalibrateOptions {
        let text = Text { size: 512, max_seq_length: 512, seed: 0 };
        CalibrateOptions {
            data: Some(self.path("ids.csv")),
            text,
            batch_size: 3,
            cache: None,
            moments: true,
            machine: Machine::Cpu,
        }
    }

    fn run(&self, threads: usize, options: &CalibrateOptions) -> Result<Statistics, CalibrateError> {
        let mut convert = ConvertOptions::new(Input::Directory(self.path("model")), self.path("out"));
        convert.workers = threads;
        Ok(calibrate(&convert, options, [&(), &()])?.expect("the model has weights").statistics)
    }
}

#[test]
fn statistics_do_not_depend_on_threads_or_batches() {
    for model in [TinyModel::mixtral(DType::Bf16, 3), TinyModel::mistral(DType::F32, 4)] {
        let setup = Setup::new(model);
        let once = setup.run(1, &setup.options()).unwrap();
        for (threads, batch_size) in [(1, 3), (3, 3), (2, 1), (2, 100)] {
            let again = setup.run(threads, &CalibrateOptions { batch_size, ..setup.options() }).unwrap();
            assert!(again == once, "{threads} threads, {batch_size} sequences at a time");
        }
    }
}

/// Every token comes to attention, and to as many experts as it is sent to.
#[test]
fn every_token_is_seen_where_it_goes() {
    let setup = Setup::new(TinyModel::mixtral(DType::F32, 3));
    let seen = setup.run(2, &setup.options()).unwrap();
    let tokens: u64 = (0..8).map(|n| 20 + 3 * n).sum();
    for layer in 0..2 {
        let count = |wanted: fn(&LinearInput) -> bool| -> u64 {
            let inputs = LinearInput::of_layer(&setup.model.config, layer);
            seen.iter().filter(|(input, _)| inputs.contains(input) && wanted(input)).map(|(_, seen)| seen.tokens).sum()
        };
        assert_eq!(count(|input| matches!(input, LinearInput::Attention(_))), tokens);
        assert_eq!(count(|input| matches!(input, LinearInput::Output(_))), tokens);
        assert_eq!(count(|input| matches!(input, LinearInput::FeedForward { .. })), 2 * tokens);
        assert_eq!(count(|input| matches!(input, LinearInput::Down { .. })), 2 * tokens);
        assert!(seen.cache_amax[layer].iter().all(|amax| *amax > 0.0));
    }
    assert_eq!(seen.cache_amax.len(), 2);
}

/// The input of the first layer's attention is a norm of the embedding, so it can be computed here.
#[test]
fn mean_squares_and_maxima_are_those_of_the_inputs() {
    let setup = Setup::new(TinyModel::mixtral(DType::F32, 3));
    let seen = setup.run(2, &setup.options()).unwrap();
    let weights = setup.model.weights();
    let values = |name: &str| weights.iter().find(|weight| weight.name == name).unwrap().values();
    let (table, norm) = (values("model.embed_tokens.weight"), values("model.layers.0.input_layernorm.weight"));
    let (mut squares, mut amax, mut tokens) = (vec![0f64; 32], 0f64, 0.0);
    for id in fs::read_to_string(setup.path("ids.csv")).unwrap().split([',', '\n']) {
        let row = &table[id.parse::<usize>().unwrap() * 32..][..32];
        let mean: f64 = row.iter().map(|x| f64::from(x * x)).sum::<f64>() / 32.0;
        for (i, x) in row.iter().enumerate() {
            let x = f64::from(*x) / (mean + 1e-5).sqrt() * f64::from(norm[i]);
            squares[i] += x * x;
            amax = amax.max(x.abs());
        }
        tokens += 1.0;
    }
    let (_, found) = seen.iter().find(|(input, _)| *input == LinearInput::Attention(0)).unwrap();
    assert!((f64::from(found.amax) - amax).abs() < 1e-5 * amax);
    let block = found.block(32, 0);
    for (i, squares) in squares.iter().enumerate() {
        assert!((block[i * 33] - squares / tokens).abs() < 1e-5 * squares / tokens, "input {i}");
    }
}

#[test]
fn kept_statistics_are_used_again() {
    let setup = Setup::new(TinyModel::mixtral(DType::F32, 3));
    let options = CalibrateOptions { cache: Some(setup.path("kept")), ..setup.options() };
    let found = setup.run(2, &options).unwrap();
    fs::remove_file(setup.path("ids.csv")).unwrap();
    assert!(setup.run(2, &options).unwrap() == found);
    let other = Setup::new(TinyModel::mistral(DType::F32, 3));
    let said = other.run(1, &CalibrateOptions { cache: Some(setup.path("kept")), ..other.options() }).unwrap_err();
    assert!(said.to_string().contains("holds the statistics of another model (2 layers, "), "{said}");
    // A model of the same shape has other weights. Another type does not make another model of it.
    let twin = Setup::new(TinyModel::mixtral(DType::F32, 4));
    let said = twin.run(1, &CalibrateOptions { cache: Some(setup.path("kept")), ..twin.options() }).unwrap_err();
    assert!(said.to_string().contains("holds the statistics of another model (2 layers, "), "{said}");
    let open = |setup: &Setup, dtype| {
        let input = Input::Directory(setup.path("model"));
        let options = ConvertOptions { dtype: Some(dtype), ..ConvertOptions::new(input, setup.path("out")) };
        FloatModel::open(&options).unwrap().unwrap().fingerprint().unwrap()
    };
    assert_eq!(open(&setup, DType::F32), open(&setup, DType::Bf16));
    assert_ne!(open(&setup, DType::F32), open(&twin, DType::F32));
    let mut bytes = fs::read(setup.path("kept")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..][..64].fill(0xff);
    for (bytes, expected) in [(&bytes[..], "has numbers that are not finite"), (b"damaged", "kept")] {
        fs::write(setup.path("kept"), bytes).unwrap();
        let said = setup.run(1, &options).unwrap_err().to_string();
        assert!(said.contains(expected), "{said}");
    }
}

/// A cache in fp8 needs the largest magnitudes, and no moments. Integers of 8 bits beside it use neither.
#[test]
fn a_small_cache_changes_no_integers_of_8_bits() {
    let mut model = TinyModel::mixtral(DType::F32, 3);
    // More than one block of moments.
    model.config.intermediate_size = 160;
    let setup = Setup::new(model);
    let statistics = setup.run(2, &CalibrateOptions { moments: false, ..setup.options() }).unwrap();
    let weight_only = WeightOnly { attention: Precision::Int8, feed_forward: Precision::Int8, group: None };
    let bytes = |name: &str, statistics: Option<Statistics>| {
        let options = ConvertOptions {
            weight_only: Some(weight_only),
            cache: statistics.is_some().then_some(CacheFormat::Fp8),
            statistics: statistics.map(Arc::new),
            ..ConvertOptions::new(Input::Directory(setup.path("model")), setup.path(name))
        };
        mixtral_convert::convert(&options, &()).unwrap();
        let rank = Checkpoint::open(&setup.path(name)).unwrap().rank(Rank(0)).unwrap();
        rank.tensor("transformer.layers.1.mlp.proj.weight").unwrap().bytes.to_vec()
    };
    assert!(bytes("calibrated", Some(statistics)) == bytes("plain", None));
}

fn refusal(setup: &Setup, data: &str) -> String {
    fs::write(setup.path("data"), data).unwrap();
    let options = CalibrateOptions { data: Some(setup.path("data")), ..setup.options() };
    let said = setup.run(1, &options).unwrap_err().to_string();
    said.replace(&Path::new(setup.dir.path()).display().to_string(), "DIR")
}

#[test]
fn data_that_cannot_be_used_is_refused() {
    let setup = Setup::new(TinyModel::mixtral(DType::F32, 3));
    let said = ["", " \n\n", "1,2\n3,97\n", "1 2\nthree\n", "some text"].map(|data| refusal(&setup, data));
    let no_text = CalibrateOptions { data: None, ..setup.options() };
    let no_start = setup.run(1, &no_text).unwrap_err().to_string();
    let no_folder = CalibrateOptions { cache: Some(setup.path("missing/kept")), ..setup.options() };
    let no_folder = setup.run(1, &no_folder).unwrap_err().to_string();
    let others = [no_start, no_folder].map(|said| said.replace(&setup.dir.path().display().to_string(), "DIR"));
    insta::assert_snapshot!(said.into_iter().chain(others).collect::<Vec<_>>().join("\n"));
}

/// The example model has a tokenizer, so it reads text and writes its own.
#[test]
fn text_json_lines_and_the_models_own_text() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let dir = TempDir::new().unwrap();
    let tokens = |data: Option<&str>, seed: u64| {
        let data = data.map(|data| {
            let path = dir.path().join("data");
            fs::write(&path, data).unwrap();
            path
        });
        let text = Text { size: 3, max_seq_length: 16, seed };
        let convert =
            ConvertOptions::new(Input::Directory(root.join("examples/tiny-mixtral")), dir.path().join("unused"));
        let options = CalibrateOptions { data, text, batch_size: 2, cache: None, moments: true, machine: Machine::Cpu };
        let found = calibrate(&convert, &options, [&(), &()]).unwrap().unwrap();
        (found.text.unwrap(), found.statistics)
    };
    let text = "First Citizen:\nBefore we proceed any further, hear me speak.\n".repeat(40);
    assert_eq!(tokens(Some(&text), 0).0, (3, 48));
    let lines = "{\"text\": \"Speak, speak.\"}\n\n{\"id\": 2, \"text\": \"You are all resolved rather to die than to famish?\"}\n";
    let found = tokens(Some(lines), 0);
    assert_eq!(found.0.0, 2);
    assert!(tokens(Some(&format!("\u{FEFF}{lines}")), 0) == found, "a byte order mark is no text");
    let (own, again, other) = (tokens(None, 1), tokens(None, 1), tokens(None, 2));
    assert_eq!(own.0, (3, 48));
    assert!(own.1 == again.1 && own.1 != other.1);
    assert_eq!(own.1.rare().len(), own.1.iter().count(), "48 tokens are too few for all inputs");
}
