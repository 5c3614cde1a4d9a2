//! An engine's directory: what is written is read back, and a directory that is not whole, or has files of another
//! engine, is refused.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use mixtral_checkpoint::{Header, Verified};
use mixtral_engine::dir::{OWNERSHIP, RankRecord, engine_file_name, weights_file_name};
use mixtral_engine::{EngineConfig, EngineDir, EngineWriter, MappedWeights, Program, WeightSource, WeightsKind};
use mixtral_model::{DType, ElemType, Mapping, ModelConfig, Rank};
use mixtral_testkit::decoder::{self, Geometry};
use mixtral_testkit::{Tensor, write_safetensors};
use tempfile::TempDir;

/// One byte more than the larger of two limits: of a tensor in an engine file, and of a config.
const TOO_LARGE: u64 = (256 << 20) + 1;

/// The program of one of two ranks.
fn program(rank: usize) -> Program {
    Program { rank, world_size: 2, ..decoder::program(&Geometry::small(DType::F32), true) }
}

/// A weight file for `program`, with `change` made to its tensors.
fn write_weights(path: &Path, program: &Program, change: impl FnOnce(&mut Vec<Tensor>)) {
    let tensor = |weight: &mixtral_engine::Weight| {
        let elements: usize = weight.shape.iter().product();
        let (name, shape) = (weight.name.clone(), weight.shape.clone());
        Tensor { name, dtype: DType::F32, shape, data: (0..elements).flat_map(|i| (i as f32).to_le_bytes()).collect() }
    };
    let mut tensors: Vec<_> = program.weights.iter().map(tensor).collect();
    change(&mut tensors);
    write_safetensors(path, &tensors);
}

fn config(weights: WeightsKind, files: BTreeMap<String, String>, ranks: Vec<RankRecord>) -> EngineConfig {
    let mut model = ModelConfig::mixtral_8x7b(DType::F32);
    model.num_layers = 2;
    EngineConfig {
        mixtral_engine_format: 1,
        tool_version: "0.0.0".to_owned(),
        run_id: String::new(),
        model,
        mapping: Mapping::tensor_parallel(1, 2),
        targets: vec!["cpu".to_owned()],
        limits: program(0).limits,
        gather_context_logits: false,
        options: BTreeMap::new(),
        weights,
        files,
        ranks,
    }
}

/// An engine of two ranks in `engine`, with two images each, weights, and a tokenizer; `change` is made to its config.
fn engine_with(change: impl FnOnce(&mut EngineConfig)) -> TempDir {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let writer = EngineWriter::create(&dir.path().join("engine")).unwrap();
    let images = BTreeMap::from([("first".to_owned(), vec![1, 2, 3]), ("second".to_owned(), vec![])]);
    let ranks = [0, 1].map(|rank| {
        let weights = dir.path().join("weights");
        let _ = fs::remove_file(&weights);
        write_weights(&weights, &program(rank), |_| {});
        writer.rank(&program(rank), &images, Some(&weights)).unwrap()
    });
    let hash = writer.copy_in("tokenizer.json", &dir.path().join("tokenizer.json"), None).unwrap();
    let files = BTreeMap::from([("tokenizer.json".to_owned(), hash.to_string())]);
    let mut config = config(WeightsKind::File, files, ranks.to_vec());
    change(&mut config);
    writer.finish(config).unwrap();
    dir
}

fn open(dir: &TempDir) -> Result<EngineDir, String> {
    EngineDir::open(&dir.path().join("engine")).map_err(|error| said(dir, &error))
}

/// A message without the folder's name.
fn said(dir: &TempDir, error: &impl ToString) -> String {
    error.to_string().replace(&*dir.path().to_string_lossy(), "DIR")
}

fn verified(engine: &EngineDir) -> Verified {
    engine.verify(2, &()).unwrap()
}

#[test]
fn what_is_written_is_read_back() {
    let dir = engine_with(|_| {});
    let engine = open(&dir).unwrap();
    assert_eq!(engine.dir(), dir.path().join("engine"));
    for rank in [0, 1] {
        let (number, program) = (Rank(rank), program(rank));
        let read = engine.program(number).unwrap();
        assert_eq!(read.to_text(), program.to_text());
        assert_eq!(engine.images(number).unwrap(), ["first", "second"]);
        assert_eq!(["first", "second"].map(|name| engine.image(number, name).unwrap()), [vec![1, 2, 3], vec![]]);
        engine.check_weights(&read).unwrap();
        let weights = MappedWeights(engine.weight_file(number).unwrap());
        for weight in &program.weights {
            assert_eq!(weights.shape(&weight.name), Some((ElemType::F32, weight.shape.as_slice())));
            let view = weights.weight(&weight.name).unwrap();
            assert_eq!((view.elem, view.shape), (ElemType::F32, weight.shape.as_slice()));
            let mut read = [0; 8];
            weights.read(&weight.name, 4, &mut read).unwrap();
            assert_eq!((&read[..4], &read[4..]), (&1f32.to_le_bytes()[..], &2f32.to_le_bytes()[..]));
            assert_eq!(view.bytes[4..12], read);
        }
        assert!(weights.shape("none").is_none() && weights.weight("none").is_none());
        assert!(weights.read("none", 0, &mut [0]).is_err());
    }
    let (names, found) = ([0, 1].map(|rank| engine_file_name(Rank(rank))), verified(&engine));
    assert_eq!(names, ["rank0.engine", "rank1.engine"]);
    assert_eq!(weights_file_name(Rank(12)), "rank12.weights.safetensors");
    // Program and two images, and the weights, of each rank; the tokenizer.
    let tensors = 2 * (3 + program(0).weights.len());
    assert_eq!((found.tensors, found.files, found.problems.len()), (tensors, 1, 0));
    assert!(engine.program(Rank(2)).unwrap_err().to_string().starts_with("rank 2 of an engine of 2 ranks"));
    // Dummy weights are no file.
    let dummy = engine_with(|config| config.weights = WeightsKind::Dummy { seed: 3 });
    fs::remove_file(dummy.path().join("engine/rank1.weights.safetensors")).unwrap();
    assert_eq!(verified(&open(&dummy).unwrap()).tensors, 6);
}

#[test]
fn what_is_no_whole_engine_of_this_version_is_not_opened() {
    let said = |change: &dyn Fn(&Path)| {
        let dir = engine_with(|_| {});
        change(&dir.path().join("engine"));
        open(&dir).unwrap_err()
    };
    let written = |text: &'static str| said(&move |dir| fs::write(dir.join("config.json"), text).unwrap());
    let edited = |from: &'static str, to: &'static str| {
        said(&move |dir| {
            let path = dir.join("config.json");
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.contains(from));
            fs::write(path, text.replacen(from, to, 1)).unwrap();
        })
    };
    let configured = |change: fn(&mut EngineConfig)| open(&engine_with(change)).unwrap_err();
    let said = [
        said(&|dir| fs::remove_dir_all(dir).unwrap()),
        said(&|dir| fs::remove_file(dir.join("config.json")).unwrap()),
        said(&|dir| File::create(dir.join("config.json")).unwrap().set_len(TOO_LARGE).unwrap()),
        written("{"),
        written(r#"{"architecture": "MixtralForCausalLM"}"#),
        written(r#"{"model_type": "mixtral"}"#),
        written("{}"),
        edited("\"mixtral_engine_format\": 1", "\"mixtral_engine_format\": 99"),
        edited("\"gather_context_logits\": false", "\"gather_context_logits\": true"),
        configured(|config| drop(config.ranks.pop())),
        configured(|config| config.limits.block_size = 0),
        configured(|config| config.model.num_layers = 0),
        configured(|config| config.mapping.pp_size = 3),
    ];
    insta::assert_snapshot!(said.join("\n"));
}

#[test]
fn files_that_were_changed_are_named() {
    // What the engine says when one of its files was changed: of the program, of an image, and of the weights.
    let said = |change: &dyn Fn(&Path)| {
        let dir = engine_with(|_| {});
        change(&dir.path().join("engine"));
        let engine = open(&dir).unwrap();
        let all = [
            engine.program(Rank(0)).map(drop),
            engine.image(Rank(0), "first").map(drop),
            engine.weight_file(Rank(0)).map(drop),
            engine.check_weights(&program(0)),
        ];
        all.map(|result| result.map_or_else(|error| said(&dir, &error), |()| "fine".to_owned())).join("\n")
    };
    let flip = |name: &'static str, from_end: usize| {
        move |dir: &Path| {
            let mut bytes = fs::read(dir.join(name)).unwrap();
            let at = bytes.len() - from_end;
            bytes[at] ^= 1;
            fs::write(dir.join(name), bytes).unwrap();
        }
    };
    let said = [
        said(&|dir| fs::remove_file(dir.join("rank0.engine")).unwrap()),
        said(&|dir| _ = fs::copy(dir.join("rank1.engine"), dir.join("rank0.engine")).unwrap()),
        said(&flip("rank0.engine", 1)),
        said(&|dir| {
            let file = File::options().append(true).open(dir.join("rank0.weights.safetensors")).unwrap();
            file.set_len(file.metadata().unwrap().len() + 1).unwrap();
        }),
        said(&|dir| {
            write_weights(&dir.join("rank0.weights.safetensors"), &program(0), |tensors| {
                let one = tensors.iter_mut().find(|tensor| tensor.shape.len() == 2).unwrap();
                one.shape.swap(0, 1);
            });
        }),
    ];
    insta::assert_snapshot!(hashes_left_out(&said.join("\n\n")));
    // What only reading all of it can find: a weight that is not finite, and another tokenizer.
    let dir = engine_with(|_| {});
    let path = dir.path().join("engine/rank1.weights.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.len() - 4;
    bytes[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    flip("tokenizer.json", 1)(&dir.path().join("engine"));
    let found = verified(&open(&dir).unwrap());
    assert_eq!(found.problems.len(), 2, "{:?}", found.problems);
}

/// Replaces hashes, since they change with every format. Different hashes stay different.
fn hashes_left_out(text: &str) -> String {
    let mut known = Vec::new();
    text.split_inclusive(|c: char| !c.is_ascii_hexdigit())
        .map(|word| {
            let hash: String = word.chars().take_while(char::is_ascii_hexdigit).collect();
            if hash.len() < 64 {
                return word.to_owned();
            }
            let number = known.iter().position(|other| *other == hash).unwrap_or_else(|| {
                known.push(hash.clone());
                known.len() - 1
            });
            word.replace(&hash, &format!("HASH{number}"))
        })
        .collect()
}

/// Engines whose config has the right hashes of files that our writer would not make.
#[test]
fn what_a_config_vouches_for_is_still_looked_at() {
    // The program of another rank; weights of another shape; no image of that name; a program larger than any.
    let dir = engine_with(|config| config.ranks.swap(0, 1));
    let engine = dir.path().join("engine");
    for file in ["engine", "weights.safetensors"] {
        let [first, second] = [0, 1].map(|rank| engine.join(format!("rank{rank}.{file}")));
        fs::rename(&first, engine.join("between")).unwrap();
        fs::rename(&second, &first).unwrap();
        fs::rename(engine.join("between"), &second).unwrap();
    }
    let opened = open(&dir).unwrap();
    let mut messages = vec![said(&dir, &opened.program(Rank(0)).unwrap_err())];
    messages.push(said(&dir, &opened.image(Rank(0), "third").unwrap_err()));
    let mut other = program(0);
    let weight = other.weights.iter_mut().find(|weight| weight.shape.len() == 2).unwrap();
    weight.shape.swap(0, 1);
    messages.push(said(&dir, &opened.check_weights(&other).unwrap_err()));

    let large = TempDir::new().unwrap();
    let file = large.path().join("large");
    let header =
        format!("{{\"program\":{{\"dtype\":\"U8\",\"shape\":[{TOO_LARGE}],\"data_offsets\":[0,{TOO_LARGE}]}}}}");
    fs::write(&file, [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()).unwrap();
    File::options().append(true).open(&file).unwrap().set_len(8 + header.len() as u64 + TOO_LARGE).unwrap();
    let hash = Header::read(&File::open(&file).unwrap(), &file).unwrap().blake3.to_string();
    let dir = engine_with(|config| config.ranks[0].engine_header_blake3 = hash);
    fs::copy(&file, dir.path().join("engine/rank0.engine")).unwrap();
    messages.push(said(&dir, &open(&dir).unwrap().program(Rank(0)).unwrap_err()));
    insta::assert_snapshot!(messages.join("\n"));
}

#[test]
fn an_engine_directory_is_told_from_a_users() {
    for name in ["rank0.engine", "rank12.engine", "rank3.weights.safetensors", "tokenizer.json"] {
        assert!((OWNERSHIP.owns)(name), "{name}");
    }
    for name in ["rank.engine", "rank1.safetensors", "rankx.engine", "rank1x.weights.safetensors", "1.engine", "notes"]
    {
        assert!(!(OWNERSHIP.owns)(name), "{name}");
    }
    assert!((OWNERSHIP.is_marker)(br#"{"mixtral_engine_format": 1}"#) && !(OWNERSHIP.is_marker)(b"{}"));
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("notes"), "").unwrap();
    assert!(EngineWriter::create(dir.path()).is_err());
}

#[test]
fn a_tokenizers_file_is_the_one_expected() {
    let dir = TempDir::new().unwrap();
    let from = dir.path().join("tokenizer.json");
    fs::write(&from, "{}").unwrap();
    let writer = EngineWriter::create(&dir.path().join("engine")).unwrap();
    let hash = writer.copy_in("tokenizer.json", &from, None).unwrap().to_string();
    writer.copy_in("tokenizer.json", &from, Some(&hash)).unwrap();
    let other = hash.replace(|_: char| true, "0");
    assert!(writer.copy_in("tokenizer.json", &from, Some(&other)).unwrap_err().to_string().contains(&other));
}
