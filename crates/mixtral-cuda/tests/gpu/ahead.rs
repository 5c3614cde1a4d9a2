//! Steps that are launched before the tokens of the step before are known: the same tokens as one by one.

use std::collections::VecDeque;

use mixtral_cpu::{CpuBackend, CpuOptions};
use mixtral_cuda::{CudaBackend, CudaOptions, KvBlocks};
use mixtral_engine::{
    Backend, Launched, Program, RandomKey, SampleRequest, SamplingParams, StepInputs, TokenSource, Weights,
};
use mixtral_model::{DType, TokenId};
use mixtral_testkit::batch::{self, PagedTokens, Part};
use mixtral_testkit::decoder::{self, Geometry};

use crate::kernels::Machine;

const KV_BLOCKS: usize = 64;
const WEIGHTS: Weights = Weights::Dummy { seed: 5 };

/// A sequence: the step in which it joins, the tokens of its prompt, and how many it generates.
struct Story {
    joins: usize,
    prompt: usize,
    output: usize,
}

/// Sequences join beside decodes, and end while others go on. The step behind an end has other draws than the one before.
const STORIES: [Story; 5] = [
    Story { joins: 0, prompt: 36, output: 12 },
    Story { joins: 0, prompt: 2, output: 4 },
    Story { joins: 0, prompt: 11, output: 20 },
    Story { joins: 3, prompt: 47, output: 6 },
    Story { joins: 7, prompt: 3, output: 9 },
];

impl Story {
    /// How many tokens it has drawn before a step, if it takes part in the step.
    fn drawn_before(&self, step: usize) -> Option<usize> {
        step.checked_sub(self.joins).filter(|&drawn| drawn < self.output)
    }
}

/// How the host asks for a step's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asks {
    /// For tokens alone.
    Tokens,
    /// In every third step for the logits too.
    Logits,
    /// In every third step with a bias, which the host adds.
    Bias,
}

/// The step's inputs without the ids of decodes' tokens, and the sequences that take part, in order.
fn inputs(program: &Program, sequences: &[PagedTokens], step: usize, asks: Asks) -> (StepInputs<'static>, Vec<usize>) {
    let part = |s: usize| STORIES[s].drawn_before(step).map(|drawn| (s, drawn));
    let (prompts, decodes): (Vec<_>, Vec<_>) = (0..STORIES.len()).filter_map(part).partition(|&(_, drawn)| drawn == 0);
    let all: Vec<(usize, usize)> = decodes.into_iter().chain(prompts).collect();
    let parts: Vec<Part<'_>> = all
        .iter()
        .map(|&(s, drawn)| {
            let prompt = STORIES[s].prompt;
            let (past, new) = if drawn == 0 { (0, prompt) } else { (prompt + drawn - 1, 1) };
            Part { sequence: &sequences[s], past, new }
        })
        .collect();
    let mut inputs = batch::step(&program.limits, &parts);
    inputs.logits_indices = inputs.cu_query_lens[1..].iter().map(|&end| end - 1).collect();
    inputs.return_logits = asks == Asks::Logits && step % 3 == 1;
    let draw = |(row, &(s, drawn)): (usize, &(usize, usize))| {
        // Every other sequence draws at random.
        let params = SamplingParams { top_k: (s + 1) % 2, temperature: 2.0, ..SamplingParams::default() };
        let (prompt, position) = (u32::try_from(s).unwrap(), u32::try_from(drawn).unwrap());
        let biased = asks == Asks::Bias && step % 3 == 1;
        let bias = if biased { vec![(TokenId(7), 100.0)] } else { Vec::new() };
        let key = RandomKey { seed: 3, prompt, hypothesis: 0, position };
        SampleRequest { params, key, bias, ..batch::greedy(row) }
    };
    inputs.samples = all.iter().enumerate().map(draw).collect();
    (inputs, all.into_iter().map(|(s, _)| s).collect())
}

/// The tokens that each sequence draws. With `ahead`, every step is launched while the one before is under way.
fn generate(backend: &mut dyn Backend, program: &Program, asks: Asks, ahead: bool) -> Vec<Vec<TokenId>> {
    let lengths = STORIES.map(|story| story.prompt + story.output);
    let sequences = batch::sequences(3, &lengths, &program.limits, program.vocab_size, KV_BLOCKS);
    let mut tokens = vec![Vec::new(); STORIES.len()];
    let mut under_way: VecDeque<(Vec<usize>, Launched)> = VecDeque::new();
    let mut collect = |backend: &mut dyn Backend, (takes_part, launched): (Vec<usize>, Launched)| {
        let outputs = match launched {
            Launched::Done(outputs) => outputs,
            Launched::UnderWay => backend.collect().unwrap(),
        };
        assert_eq!(outputs.non_finite, []);
        takes_part.iter().zip(outputs.tokens).for_each(|(&s, token)| tokens[s].push(token));
        tokens.clone()
    };
    let mut known = vec![Vec::new(); STORIES.len()];
    let mut before: Vec<usize> = Vec::new();
    for step in 0.. {
        let (mut inputs, takes_part) = inputs(program, &sequences, step, asks);
        if takes_part.is_empty() {
            break;
        }
        for (row, s) in takes_part.iter().enumerate().take(inputs.num_decodes) {
            let source = if ahead {
                TokenSource::Draw(before.iter().position(|b| b == s).unwrap())
            } else {
                TokenSource::Id(*known[*s].last().unwrap())
            };
            inputs.token_ids[row] = source.number();
        }
        let launched = if ahead { backend.launch(&inputs) } else { backend.step(&inputs).map(Launched::Done) };
        under_way.push_back((takes_part.clone(), launched.unwrap()));
        before = takes_part;
        if !ahead || under_way.len() == 2 {
            known = collect(backend, under_way.pop_front().unwrap());
        }
    }
    under_way.into_iter().for_each(|flight| known = collect(backend, flight));
    known
}

fn decoders() -> Vec<(String, Program)> {
    let small = (DType::F32.to_string(), decoder::program(&Geometry::small(DType::F32), true));
    let round = |word: Option<&str>| {
        let mut program = decoder::program(&Geometry { window: Some(70), ..Geometry::round(DType::Bf16) }, true);
        word.iter().for_each(|word| decoder::quantize(&mut program, word.parse().unwrap()));
        (word.unwrap_or("bf16").to_owned(), program)
    };
    [small].into_iter().chain([None, Some("int8:row:f32"), Some("int4:g128:bf16")].map(round)).collect()
}

/// The definition: what the story itself gives, on the CPU.
#[test]
fn the_cpu_takes_the_tokens_of_the_step_before() {
    let program = decoder::program(&Geometry::small(DType::F32), true);
    let load = || {
        let options = CpuOptions { kv_blocks: KV_BLOCKS, ..CpuOptions::default() };
        CpuBackend::load(program.clone(), WEIGHTS, options).unwrap()
    };
    for asks in [Asks::Tokens, Asks::Logits, Asks::Bias] {
        let one_by_one = generate(&mut load(), &program, asks, false);
        assert_eq!(one_by_one.iter().map(Vec::len).collect::<Vec<_>>(), STORIES.map(|story| story.output));
        assert_eq!(generate(&mut load(), &program, asks, true), one_by_one, "{asks:?}");
    }
}

#[test]
fn a_step_takes_tokens_that_the_device_still_draws() {
    let Some(machine) = Machine::find() else { return };
    for (name, program) in decoders() {
        for code in machine.codes() {
            let (library, failures) = machine.compile(code, &[&program]);
            assert!(failures.is_empty(), "{}", failures.join("\n"));
            let load = |graphs, overlap| {
                let kv_blocks = KvBlocks::Exactly(KV_BLOCKS);
                let options = CudaOptions { graphs, overlap, count_experts: true, ..CudaOptions::default() };
                let executable = library.executable(&program).unwrap();
                CudaBackend::load(program.clone(), &WEIGHTS, &executable, kv_blocks, options).unwrap()
            };
            for asks in [Asks::Tokens, Asks::Logits, Asks::Bias] {
                let mut plain = load(false, false);
                let one_by_one = generate(&mut plain, &program, asks, false);
                for (graphs, overlap) in [(false, false), (true, false), (true, true)] {
                    let mut backend = load(graphs, overlap);
                    for round in 0..3 {
                        let found = generate(&mut backend, &program, asks, true);
                        let what =
                            format!("{name} {code}: {asks:?}, graphs {graphs}, overlap {overlap}, round {round}");
                        assert_eq!(found, one_by_one, "{what}");
                    }
                    let counts = |backend: &CudaBackend| backend.expert_counts().into_iter().flatten().sum::<u64>();
                    assert_eq!(counts(&backend), 3 * counts(&plain), "{name} {code}");
                    let idle = backend.device_idle().unwrap();
                    let steps = idle.pauses + 1;
                    println!("{name} {code}: {asks:?}, graphs {graphs}: idle {:?} of {steps} steps", idle.time);
                }
            }
        }
    }
}

#[test]
fn no_more_than_two_steps_are_under_way() {
    let Some(machine) = Machine::find() else { return };
    let program = decoder::program(&Geometry::small(DType::F32), true);
    let (library, failures) = machine.compile(machine.codes()[0], &[&program]);
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let (executable, kv_blocks) = (library.executable(&program).unwrap(), KvBlocks::Exactly(KV_BLOCKS));
    let load = || CudaBackend::load(program.clone(), &WEIGHTS, &executable, kv_blocks, CudaOptions::default()).unwrap();
    let sequences = batch::sequences(3, &[9], &program.limits, program.vocab_size, KV_BLOCKS);
    let mut inputs = batch::step(&program.limits, &[Part { sequence: &sequences[0], past: 0, new: 9 }]);
    inputs.return_logits = false;
    inputs.samples = vec![batch::greedy(8)];
    let mut backend = load();
    for _ in 0..2 {
        assert_eq!(backend.launch(&inputs).unwrap(), Launched::UnderWay);
    }
    let said = backend.launch(&inputs).unwrap_err().to_string();
    assert!(said.contains("2 steps are under way"), "{said}");
    let tokens = [backend.collect().unwrap().tokens, backend.collect().unwrap().tokens];
    assert_eq!(tokens[0], tokens[1]);
    assert!(backend.collect().unwrap_err().to_string().contains("no step is under way"));
    // A draw that the step before does not have.
    inputs.token_ids[3] = TokenSource::Draw(1).number();
    assert!(backend.launch(&inputs).unwrap_err().to_string().contains("`token_ids`[3] is -2"));
    // A backend may be dropped while steps are under way.
    let mut backend = load();
    inputs.token_ids[3] = 3;
    backend.launch(&inputs).unwrap();
    backend.launch(&inputs).unwrap();
}
