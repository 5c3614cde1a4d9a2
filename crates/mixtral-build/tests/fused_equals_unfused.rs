//! Passes change no bit: the fused program and the naive one give the same logits in every data type, for prompts and
//! for decodes.

use mixtral_build::lower;
use mixtral_build::lower::lower_unfused;
use mixtral_checkpoint::CheckpointConfig;
use mixtral_convert::recipes;
use mixtral_cpu::{CpuBackend, CpuOptions};
use mixtral_engine::{Limits, Program, SamplingParams, Weights};
use mixtral_model::{DType, Mapping, ModelConfig, ModelFamily, MoeNormalization, Rank, TokenId};
use mixtral_runtime::session::Capabilities;
use mixtral_runtime::{Local, Request, Session};

const LIMITS: Limits =
    Limits { max_batch_size: 4, max_num_tokens: 20, max_seq_len: 64, max_num_logits: 20, block_size: 16 };

fn model(dtype: DType, family: ModelFamily, normalization: MoeNormalization) -> CheckpointConfig {
    let mut model = ModelConfig::mixtral_8x7b(dtype);
    (model.family, model.num_layers, model.hidden_size, model.intermediate_size) = (family, 3, 36, 44);
    (model.num_heads, model.num_kv_heads, model.head_dim, model.vocab_size) = (6, 2, 10, 101);
    (model.sliding_window, model.moe.normalization) = (Some(9), normalization);
    if family == ModelFamily::Mistral {
        (model.moe.num_experts, model.moe.top_k) = (1, 1);
    }
    CheckpointConfig::new(model, Mapping::single())
}

/// The bits of all logits of three prompts and their continuations.
fn logits(config: &CheckpointConfig, mut program: Program) -> Vec<u32> {
    for recipe in recipes(config, Rank(0), false) {
        program.weights.iter_mut().filter(|w| w.name == recipe.name).for_each(|w| w.pieces.clone_from(&recipe.pieces));
    }
    let (limits, vocab_size) = (program.limits, program.vocab_size);
    let options = CpuOptions { kv_blocks: 12, threads: 2, ..CpuOptions::default() };
    let backend = CpuBackend::load(program, Weights::Dummy { seed: 5 }, options).unwrap();
    let capabilities = Capabilities { limits, vocab_size, gather_context_logits: true };
    let mut session = Session::new(Box::new(Local::new(Box::new(backend))), capabilities, None);
    for len in [1u32, 17, 30] {
        let prompt = (0..len).map(|i| TokenId((7 * i + len) % 101)).collect();
        let request = Request {
            prompt,
            max_output_len: 5,
            params: SamplingParams::default(),
            generation_logits: true,
            context_logits: true,
            ..Request::default()
        };
        session.submit(request).unwrap();
    }
    let mut all = vec![Vec::new(); 3];
    while !session.is_idle() {
        for event in session.step().unwrap() {
            all[event.id.0].extend(event.context_logits.iter().chain(&event.generation_logits).map(|x| x.to_bits()));
        }
    }
    all.concat()
}

#[test]
fn fused_equals_unfused_to_the_bit() {
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        for (family, normalization) in [
            (ModelFamily::Mixtral, MoeNormalization::Renorm),
            (ModelFamily::Mixtral, MoeNormalization::None),
            (ModelFamily::Mistral, MoeNormalization::Renorm),
        ] {
            let config = model(dtype, family, normalization);
            let naive = logits(&config, lower_unfused(&config, Rank(0), LIMITS));
            let fused = logits(&config, lower(&config, Rank(0), LIMITS));
            assert!(naive == fused, "{dtype} {family:?} {normalization:?}");
        }
    }
}

#[test]
fn the_normalization_mode_matters() {
    let bits = |normalization| {
        let config = model(DType::F32, ModelFamily::Mixtral, normalization);
        logits(&config, lower(&config, Rank(0), LIMITS))
    };
    assert_ne!(bits(MoeNormalization::Renorm), bits(MoeNormalization::None));
}
