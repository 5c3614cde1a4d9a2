//! Things that may not change a bit of the logits: the batch, chunking, block placement, fusion, threads, instruction
//! set, garbage in memory.

use mixtral_cpu::{CpuBackend, CpuOptions, Isa};
use mixtral_engine::{Backend as _, Inspect as _, KvScale, Program, StepInputs, Weights};
use mixtral_model::{DType, Fp8Input, TokenId, WeightFormat};
use mixtral_testkit::batch::{self, PagedTokens, Part};
use mixtral_testkit::decoder::{self, Geometry};
use mixtral_testkit::poison::poison;

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];
const KV_BLOCKS: usize = 64;

/// A loaded decoder whose arena and cache are full of NaN.
fn load(geometry: &Geometry, fused: bool, threads: usize, isa: Option<Isa>) -> CpuBackend {
    load_program(geometry, decoder::program(geometry, fused), threads, isa)
}

/// The same decoder with fp8 weights, an fp8 cache, and prompts that attend in fp8.
fn load_fp8(geometry: &Geometry, fused: bool, threads: usize, isa: Option<Isa>) -> CpuBackend {
    load_format(WeightFormat::Fp8, geometry, fused, threads, isa)
}

/// The same with scales of rows and tokens.
fn load_fp8_rows(geometry: &Geometry, fused: bool, threads: usize, isa: Option<Isa>) -> CpuBackend {
    load_format(WeightFormat::Fp8Rows(Fp8Input::Token), geometry, fused, threads, isa)
}

fn load_format(format: WeightFormat, geometry: &Geometry, fused: bool, threads: usize, isa: Option<Isa>) -> CpuBackend {
    let mut program = decoder::program(geometry, fused);
    decoder::quantize(&mut program, format);
    decoder::cache_in_fp8(&mut program, KvScale { key: 0.02, value: 0.01 });
    if format == WeightFormat::Fp8 {
        program.attend_in_fp8();
    }
    load_program(geometry, program, threads, isa)
}

fn load_program(geometry: &Geometry, program: Program, threads: usize, isa: Option<Isa>) -> CpuBackend {
    let options = CpuOptions { kv_blocks: KV_BLOCKS, threads, count_experts: true, isa, ..CpuOptions::default() };
    let mut backend = CpuBackend::load(program, Weights::Dummy { seed: 5 }, options).unwrap();
    poison(backend.arena_mut());
    for layer in 0..geometry.num_layers {
        let mut bytes = backend.read_cache(layer).unwrap();
        bytes.iter_mut().for_each(|half| poison(half));
        backend.write_cache(layer, &bytes[0], &bytes[1]).unwrap();
    }
    backend
}

/// How a decoder is loaded.
type Load = fn(&Geometry, bool, usize, Option<Isa>) -> CpuBackend;

/// The bits of logits rows, by sequence and position.
type Logits = Vec<Vec<Vec<u32>>>;

/// Runs steps of `(sequence, past, new)` parts and collects the logits of every position.
fn run(backend: &mut CpuBackend, sequences: &[PagedTokens], steps: &[Vec<(usize, usize, usize)>]) -> Logits {
    let (limits, vocab_size) = (backend.program().limits, backend.program().vocab_size);
    let mut logits: Logits = sequences.iter().map(|s| vec![vec![]; s.tokens.len()]).collect();
    for step in steps {
        let parts: Vec<Part<'_>> =
            step.iter().map(|&(s, past, new)| Part { sequence: &sequences[s], past, new }).collect();
        let mut inputs = batch::step(&limits, &parts);
        if backend.program().attends_in_fp8() {
            // A chunk of one token belongs to a prompt, and its bits are not those of a decode.
            inputs.num_decodes = 0;
        }
        let outputs = backend.step(&inputs).unwrap();
        let mut rows = outputs.logits.chunks(vocab_size);
        for &(s, past, new) in step {
            for logits in &mut logits[s][past..past + new] {
                *logits = rows.next().unwrap().iter().map(|x| x.to_bits()).collect();
            }
        }
        // The next step may not depend on what this one leaves in the arena.
        poison(backend.arena_mut());
    }
    logits
}

fn whole(sequences: &[PagedTokens], s: usize) -> Vec<Vec<(usize, usize, usize)>> {
    vec![vec![(s, 0, sequences[s].tokens.len())]]
}

const LENGTHS: [usize; 6] = [37, 1, 16, 50, 5, 90];

fn sequences(geometry: &Geometry, seed: u32) -> Vec<PagedTokens> {
    let limits = decoder::program(geometry, true).limits;
    let mut sequences = batch::sequences(3, &LENGTHS, &limits, geometry.vocab_size, KV_BLOCKS);
    // The same tokens in other blocks.
    let places = batch::sequences(seed, &LENGTHS, &limits, geometry.vocab_size, KV_BLOCKS);
    sequences.iter_mut().zip(places).for_each(|(s, place)| s.blocks = place.blocks);
    sequences
}

/// Each sequence alone and in one piece, on one thread of the portable instruction set, without fusion.
fn alone(geometry: &Geometry) -> Logits {
    alone_by(load, geometry)
}

fn alone_by(load: Load, geometry: &Geometry) -> Logits {
    let sequences = sequences(geometry, 3);
    let mut all = vec![];
    for s in 0..sequences.len() {
        let mut backend = load(geometry, false, 1, Some(Isa::Portable));
        all.push(run(&mut backend, &sequences, &whole(&sequences, s)).swap_remove(s));
    }
    all
}

#[test]
fn nothing_that_may_not_matter_changes_a_bit() {
    for dtype in DTYPES {
        nothing_matters(load, dtype);
    }
}

#[test]
fn nothing_that_may_not_matter_changes_a_bit_of_fp8() {
    nothing_matters(load_fp8, DType::Bf16);
    nothing_matters(load_fp8_rows, DType::F32);
}

fn nothing_matters(load: Load, dtype: DType) {
    for window in [None, Some(11)] {
        let geometry = Geometry { window, ..Geometry::small(dtype) };
        let expected = alone_by(load, &geometry);
        assert!(expected.iter().flatten().flatten().all(|&x| f32::from_bits(x).is_finite()));
        let shuffled = sequences(&geometry, 77);
        let together = vec![(0..shuffled.len()).map(|s| (s, 0, LENGTHS[s])).collect::<Vec<_>>()];
        // Prefills that are cut anywhere, then decodes of some sequences beside prefills of others.
        let chunked = vec![
            vec![(0, 0, 1), (3, 0, 7), (5, 0, 33)],
            vec![(0, 1, 1), (3, 7, 16), (5, 33, 31)],
            vec![(1, 0, 1), (0, 2, 30), (5, 64, 3)],
            vec![(4, 0, 1), (5, 67, 1), (3, 23, 27), (2, 0, 15), (0, 32, 2)],
            vec![(2, 15, 1), (5, 68, 1), (4, 1, 4), (0, 34, 3)],
            vec![(5, 69, 21)],
        ];
        for fused in [false, true] {
            for isa in Isa::available() {
                for (threads, steps) in [(1, &together), (3, &chunked)] {
                    let mut backend = load(&geometry, fused, threads, Some(isa));
                    let found = run(&mut backend, &shuffled, steps);
                    assert_eq!(found, expected, "{dtype} window {window:?} fused {fused} {isa:?} threads {threads}");
                }
            }
        }
    }
}

/// A hash of the bits of some models' logits. A change that moves bits has to say so.
#[test]
fn logits_are_what_they_were() {
    let models = DTYPES.into_iter().flat_map(|dtype| [None, Some(11)].map(|window| (dtype, window)));
    let hash = |(dtype, window): (DType, Option<usize>)| {
        let mut hasher = blake3::Hasher::new();
        let logits = alone(&Geometry { window, ..Geometry::small(dtype) });
        for bits in logits.iter().flatten().flatten() {
            hasher.update(&bits.to_le_bytes());
        }
        format!("{dtype}, window {window:?}: {}", &hasher.finalize().to_hex()[..16])
    };
    insta::assert_snapshot!(models.map(hash).collect::<Vec<_>>().join("\n"));
}

#[test]
fn head_groups_and_expert_counts_of_all_kinds_agree() {
    for (num_heads, num_kv_heads, num_experts, top_k) in [(2, 2, 1, 1), (4, 2, 8, 3), (6, 1, 4, 4), (3, 1, 5, 1)] {
        let small = Geometry::small(DType::Bf16);
        let geometry = Geometry { num_heads, num_kv_heads, num_experts, top_k, ..small };
        let expected = alone(&geometry);
        let shuffled = sequences(&geometry, 78);
        let together = vec![(0..shuffled.len()).map(|s| (s, 0, LENGTHS[s])).collect::<Vec<_>>()];
        assert_eq!(run(&mut load(&geometry, true, 2, None), &shuffled, &together), expected);
    }
}

#[test]
fn dead_tokens_leave_no_trace() {
    let geometry = Geometry::small(DType::F16);
    let sequences = sequences(&geometry, 3);
    let mut backend = load(&geometry, true, 2, None);
    let limits = backend.program().limits;
    let part = |s: usize| Part { sequence: &sequences[s], past: 0, new: LENGTHS[s] };
    let live = backend.step(&batch::step(&limits, &[part(0)])).unwrap();
    let counts = backend.expert_counts();
    let before = backend.read_cache(1).unwrap();

    let mut backend = load(&geometry, true, 2, None);
    let mut inputs = batch::step(&limits, &[part(0), part(3)]);
    inputs.slot_mapping[LENGTHS[0]..].fill(-1);
    inputs.logits_indices.truncate(LENGTHS[0]);
    let beside_dead = backend.step(&inputs).unwrap();
    assert_eq!(live.logits, beside_dead.logits);
    assert_eq!(counts, backend.expert_counts());
    assert_eq!(before, backend.read_cache(1).unwrap());
}

#[test]
fn experts_are_counted_and_tokens_drawn() {
    let geometry = Geometry::small(DType::F32);
    let sequences = sequences(&geometry, 3);
    let mut backend = load(&geometry, true, 2, None);
    let limits = backend.program().limits;
    let mut inputs = batch::step(&limits, &[Part { sequence: &sequences[0], past: 0, new: 37 }]);
    inputs.samples = [36, 0].map(batch::greedy).to_vec();
    let outputs = backend.step(&inputs).unwrap();
    let best = |row: usize| {
        let row = &outputs.logits[row * geometry.vocab_size..][..geometry.vocab_size];
        let best = (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best });
        TokenId(u32::try_from(best).unwrap())
    };
    assert_eq!(outputs.tokens, [best(36), best(0)]);
    let counts = backend.expert_counts();
    assert_eq!(counts.len(), geometry.num_layers);
    for layer in counts {
        assert_eq!(layer.iter().sum::<u64>(), 37 * geometry.top_k as u64);
    }
    // Only the draws, without the logits.
    inputs.return_logits = false;
    let drawn = backend.step(&inputs).unwrap();
    assert_eq!((drawn.tokens, drawn.logits.len()), (outputs.tokens, 0));
}

#[test]
fn an_empty_step_does_nothing() {
    let mut backend = load(&Geometry::small(DType::F32), true, 2, None);
    let inputs = StepInputs { cu_query_lens: vec![0], return_logits: true, ..StepInputs::default() };
    assert_eq!(backend.step(&inputs).unwrap(), mixtral_engine::StepOutputs::default());
}
