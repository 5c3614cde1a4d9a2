//! Every geometry that a configuration can describe is planned or refused, however large it is. Sizes never overflow.

use std::cell::Cell;
use std::collections::BTreeMap;

use mixtral_build::{BuildOptions, dot, explain, plan};
use mixtral_checkpoint::{CheckpointConfig, rank_tensors};
use mixtral_engine::{Limits, Program};
use mixtral_model::{DType, Mapping, ModelConfig, ModelFamily};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// A size from 1 to 2^`bits`. Every power of two is equally likely.
fn size(bits: u32) -> impl Strategy<Value = usize> {
    (0..=bits, any::<bool>()).prop_map(|(bits, one_less)| (1usize << bits) - usize::from(one_less && bits > 0))
}

fn config() -> impl Strategy<Value = CheckpointConfig> {
    let widths = (size(20), size(20), size(20), size(20));
    let heads = (size(10), 0u32..8, size(19));
    let experts = (size(14), size(14), any::<bool>());
    let ranks = (0u32..4, 1usize..3, any::<bool>(), any::<bool>());
    (widths, heads, experts, ranks).prop_map(|(widths, heads, experts, (tp, pp_size, by_experts, f32))| {
        let mut model = ModelConfig::mixtral_8x7b(if f32 { DType::F32 } else { DType::Bf16 });
        (model.vocab_size, model.hidden_size, model.intermediate_size, model.max_position_embeddings) = widths;
        let (num_kv_heads, group, half) = heads;
        (model.num_heads, model.num_kv_heads, model.head_dim) = (num_kv_heads << group, num_kv_heads, 2 * half);
        model.num_layers = 2;
        (model.moe.num_experts, model.moe.top_k) = (experts.0, experts.1);
        if experts.2 {
            (model.family, model.moe.num_experts, model.moe.top_k) = (ModelFamily::Mistral, 1, 1);
        }
        let tp_size = 1 << tp;
        let mapping = match by_experts {
            true => Mapping::expert_parallel(tp_size, pp_size),
            false => Mapping::tensor_parallel(tp_size, pp_size),
        };
        CheckpointConfig::new(model, mapping)
    })
}

fn limits() -> impl Strategy<Value = (usize, usize, usize, bool)> {
    (size(21), size(25), size(31), any::<bool>())
}

#[test]
fn every_geometry_is_planned_or_refused() {
    let planned = Cell::new(0);
    let mut runner = TestRunner::new(ProptestConfig::with_cases(2000));
    let result =
        runner.run(&(config(), limits()), |(config, (max_batch_size, max_num_tokens, max_seq_len, gather))| {
            if config.validate().is_err() {
                return Ok(());
            }
            let _ = config.model.num_parameters();
            for rank in config.mapping.ranks() {
                let _ = rank_tensors(&config, rank).iter().map(|spec| u128::from(spec.num_bytes())).sum::<u128>();
            }
            let limits = Limits { max_batch_size, max_num_tokens, max_seq_len, max_num_logits: 1, block_size: 16 };
            let options = BuildOptions {
                limits,
                gather_context_logits: gather,
                fp8_context: false,
                recorded: BTreeMap::new(),
                workers: 1,
                memory_budget: None,
                kernels: None,
            };
            let Ok(programs) = plan(&config, &options) else { return Ok(()) };
            planned.set(planned.get() + 1);
            for program in &programs {
                let _ = explain::explain(std::slice::from_ref(program), &[], None);
                let _ = dot::dot(std::slice::from_ref(program), None);
                prop_assert_eq!(&Program::parse(&program.to_text()).unwrap(), program);
            }
            Ok(())
        });
    result.unwrap();
    println!("{} of 2000 were planned", planned.get());
    assert!(planned.get() > 100, "{} of 2000 were planned", planned.get());
}

#[test]
fn what_does_not_fit_into_memory_is_named() {
    let config = CheckpointConfig::new(ModelConfig::mixtral_8x7b(DType::F16), Mapping::single());
    let limits =
        Limits { max_batch_size: 8, max_num_tokens: 8192, max_seq_len: 4096, max_num_logits: 1, block_size: 64 };
    let refused = |gigabytes: usize| {
        let options = BuildOptions {
            limits,
            gather_context_logits: false,
            fp8_context: false,
            recorded: BTreeMap::new(),
            workers: 1,
            memory_budget: Some(gigabytes * 1_000_000_000),
            kernels: None,
        };
        plan(&config, &options).unwrap_err().to_string()
    };
    let weights = refused(60);
    assert!(weights.contains("60.00 GB are there; the weights alone do not fit"), "{weights}");
    let activations = refused(94);
    assert!(activations.contains("94.00 GB are there; lower --max-num-tokens (now 8192)"), "{activations}");
}
