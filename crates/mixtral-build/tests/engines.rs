//! Engines for the CPU: `build` writes what was planned, with the checkpoint's weights and tokenizer.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use mixtral_build::{BuildError, BuildOptions, WeightsFrom, build, lower, plan};
use mixtral_checkpoint::{Checkpoint, CheckpointConfig, CheckpointWriter};
use mixtral_convert::recipes;
use mixtral_engine::{EngineDir, Limits, WeightsKind};
use mixtral_model::{DType, Mapping, ModelConfig, Rank};

/// A tiny model on two stages of two ranks each.
fn config() -> CheckpointConfig {
    let mut model = ModelConfig::mixtral_8x7b(DType::Bf16);
    (model.num_layers, model.hidden_size, model.intermediate_size) = (2, 24, 20);
    (model.num_heads, model.num_kv_heads, model.head_dim, model.vocab_size) = (4, 2, 8, 61);
    CheckpointConfig::new(model, Mapping::tensor_parallel(2, 2))
}

fn options() -> BuildOptions {
    BuildOptions {
        limits: Limits { max_batch_size: 4, max_num_tokens: 32, max_seq_len: 64, max_num_logits: 1, block_size: 16 },
        gather_context_logits: false,
        fp8_context: false,
        recorded: BTreeMap::from([("gemm_plugin".to_owned(), "auto".to_owned())]),
        workers: 3,
        kernels: None,
        memory_budget: None,
    }
}

/// Writes a checkpoint of zeros to `dir`, with a tokenizer's files and one other file.
fn write_checkpoint(dir: &Path) {
    let mut writer = CheckpointWriter::create(dir, config(), false).unwrap();
    writer.write_in("tokenizer.json", b"{}").unwrap();
    writer.write_in("tokenizer_config.json", b"{ }").unwrap();
    for rank in writer.ranks() {
        for spec in rank.tensors() {
            let mut tensor = rank.tensor(&spec.name);
            tensor.write(&vec![0; usize::try_from(spec.num_bytes()).unwrap()]).unwrap();
            tensor.finish().unwrap();
        }
    }
    writer.finish().unwrap();
    fs::write(dir.join("notes.txt"), "").unwrap();
}

#[test]
fn a_rank_of_logits_for_each_sequence_or_for_each_token() {
    let rows = |max_batch_size, gather_context_logits| {
        let limits = Limits { max_batch_size, ..options().limits };
        let programs = plan(&config(), &BuildOptions { limits, gather_context_logits, ..options() }).unwrap();
        let ranks: Vec<_> = programs.iter().map(|program| (program.rank, program.limits.max_num_logits)).collect();
        assert_eq!(ranks, [0, 1, 2, 3].map(|rank| (rank, ranks[0].1)));
        ranks[0].1
    };
    assert_eq!([rows(4, false), rows(100, false), rows(4, true)], [4, 32, 32]);
    let limits = Limits { block_size: 0, ..options().limits };
    let error = plan(&config(), &BuildOptions { limits, ..options() }).unwrap_err();
    assert!(matches!(error, BuildError::Limits(_)), "{error}");
}

#[test]
fn a_rank_fits_into_the_memory_or_is_refused_before_anything_is_written() {
    let needed =
        plan(&config(), &options()).unwrap().iter().map(|program| program.memory_plan().total(0)).max().unwrap();
    let within = |memory_budget| plan(&config(), &BuildOptions { memory_budget: Some(memory_budget), ..options() });
    assert_eq!(within(needed).unwrap().len(), 4);
    let error = within(needed - 1).unwrap_err();
    let BuildError::Memory { needed: found, weights, arena, inputs, budget, .. } = error else { panic!("{error}") };
    assert_eq!((found, budget, weights + arena + inputs), (needed, needed - 1, needed));
    let dir = tempfile::tempdir().unwrap();
    let weights = WeightsFrom::Dummy { seed: 1, recipes: &|rank| recipes(&config(), rank, false) };
    let small = BuildOptions { memory_budget: Some(1), ..options() };
    build(&config(), &weights, &small, &dir.path().join("engine"), &|_, _| ()).unwrap_err();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn an_engine_with_dummy_weights_says_where_each_element_comes_from() {
    let dir = tempfile::tempdir().unwrap();
    let weights = WeightsFrom::Dummy { seed: 7, recipes: &|rank| recipes(&config(), rank, false) };
    let built = build(&config(), &weights, &options(), dir.path(), &|_, _| ()).unwrap();
    assert!(built.kernels.is_none());
    let engine = EngineDir::open(dir.path()).unwrap();
    assert_eq!(engine.config(), &built.config);
    let config_of = engine.config();
    assert_eq!((&config_of.targets[..], config_of.weights), (&["cpu".to_owned()][..], WeightsKind::Dummy { seed: 7 }));
    assert_eq!((&config_of.options, config_of.files.len(), config_of.ranks.len()), (&options().recorded, 0, 4));
    for (rank, program) in (0..).map(Rank).zip(&built.programs) {
        assert_eq!(engine.program(rank).unwrap().to_text(), program.to_text());
        let planned = lower(&config(), rank, program.limits);
        assert_eq!(program.ops, planned.ops);
        for recipe in recipes(&config(), rank, false) {
            assert_eq!(program.weight(&recipe.name).unwrap().pieces, recipe.pieces, "{rank}: {}", recipe.name);
        }
    }
}

#[test]
fn an_engine_of_a_checkpoint_has_its_weights_and_its_tokenizer() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_checkpoint(from.path());
    let checkpoint = Checkpoint::open(from.path()).unwrap();
    let build = |dir: &Path| build(&config(), &WeightsFrom::Checkpoint(&checkpoint), &options(), dir, &|_, _| ());
    let built = build(to.path()).unwrap();
    let engine = EngineDir::open(to.path()).unwrap();
    let verified = engine.verify(1, &()).unwrap();
    assert_eq!((verified.problems.len(), verified.files, engine.config().weights), (0, 2, WeightsKind::File));
    for program in &built.programs {
        engine.check_weights(program).unwrap();
        assert!(program.weights.iter().all(|weight| weight.pieces.is_empty()));
    }
    assert_eq!(engine.config().files, checkpoint.config().files);
    assert_eq!(engine.config().files.keys().collect::<Vec<_>>(), ["tokenizer.json", "tokenizer_config.json"]);
    assert!(!to.path().join("notes.txt").exists());
    // The tokenizer is not the one with which the checkpoint was written.
    fs::write(from.path().join("tokenizer.json"), "[]").unwrap();
    let error = build(&to.path().join("other")).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json: the file has BLAKE3"), "{error}");
}
