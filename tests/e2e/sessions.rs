//! Batching changes no results and leaves no blocks behind: sessions over the CPU backend, with requests that come and
//! go.

use std::time::Duration;

use mixtral_build::lower;
use mixtral_checkpoint::CheckpointConfig;
use mixtral_convert::recipes;
use mixtral_cpu::{CpuBackend, CpuOptions};
use mixtral_engine::{BackendError, DeviceIdle, Limits, RandomKey, SamplingParams, StepInputs, StepOutputs, Weights};
use mixtral_model::{DType, Formats, Mapping, ModelConfig, Rank, TokenId, WeightFormat};
use mixtral_runtime::session::Capabilities;
use mixtral_runtime::{Beams, Executor, Local, Policy, Request, RequestId, Session, SessionOptions};
use proptest::prelude::*;

const VOCAB: u32 = 61;

/// A tiny model with a window, experts and grouped queries.
fn model(dtype: DType) -> ModelConfig {
    let mut model = ModelConfig::mixtral_8x7b(dtype);
    (model.num_layers, model.hidden_size, model.intermediate_size) = (2, 24, 20);
    (model.num_heads, model.num_kv_heads, model.head_dim, model.vocab_size) = (4, 2, 8, VOCAB as usize);
    model.sliding_window = Some(21);
    model
}

/// The model over a cache of `kv_blocks` blocks of 16 tokens.
fn session(dtype: DType, max_batch_size: usize, max_num_tokens: usize, kv_blocks: usize) -> Session {
    session_of(model(dtype), max_batch_size, max_num_tokens, kv_blocks, SessionOptions::default())
}

fn session_of(
    model: ModelConfig,
    max_batch_size: usize,
    max_num_tokens: usize,
    kv_blocks: usize,
    session: SessionOptions,
) -> Session {
    let config = CheckpointConfig::new(model, Mapping::single());
    let limits =
        Limits { max_batch_size, max_num_tokens, max_seq_len: 128, max_num_logits: max_num_tokens, block_size: 16 };
    let mut program = lower(&config, Rank(0), limits);
    for recipe in recipes(&config, Rank(0), false) {
        program.weights.iter_mut().filter(|w| w.name == recipe.name).for_each(|w| w.pieces.clone_from(&recipe.pieces));
    }
    let capabilities = Capabilities { limits, vocab_size: program.vocab_size, gather_context_logits: true };
    let options = CpuOptions { kv_blocks, threads: 1, ..CpuOptions::default() };
    let backend = CpuBackend::load(program, Weights::Dummy { seed: 9 }, options).unwrap();
    Session::with_options(Box::new(Ahead(Local::new(Box::new(backend)))), capabilities, None, session)
}

/// An executor of the CPU backend that takes a step while another is under way, as that of a GPU does.
struct Ahead(Local);

impl Executor for Ahead {
    fn depth(&self) -> usize {
        self.0.depth()
    }

    fn runs_ahead(&self) -> bool {
        true
    }

    fn launch(&mut self, inputs: &StepInputs<'_>) -> Result<(), BackendError> {
        self.0.launch(inputs)
    }

    fn collect(&mut self) -> Result<StepOutputs, BackendError> {
        self.0.collect()
    }

    fn kv_blocks(&self) -> usize {
        self.0.kv_blocks()
    }

    fn expert_counts(&mut self) -> Result<Vec<Vec<u64>>, BackendError> {
        self.0.expert_counts()
    }

    fn op_times(&self) -> Vec<Duration> {
        self.0.op_times()
    }

    fn device_idle(&self) -> Option<DeviceIdle> {
        self.0.device_idle()
    }
}

/// Each step waits for the tokens of the step before.
const ONE_BY_ONE: SessionOptions = SessionOptions {
    policy: Policy::GuaranteedNoEvict,
    block_reuse: false,
    host_blocks: 0,
    max_prefill_tokens: None,
    overlap: false,
};

fn request(seed: u32, len: usize, output: usize) -> Request {
    let token = |i: usize| {
        let key = RandomKey { seed: u64::from(seed), prompt: 0, hypothesis: 0, position: u32::try_from(i).unwrap() };
        TokenId(u32::try_from(key.bits() % u64::from(VOCAB)).unwrap())
    };
    Request {
        prompt: (0..len).map(token).collect(),
        max_output_len: output,
        params: SamplingParams { top_k: 0, temperature: 1.3, ..SamplingParams::default() },
        prompt_index: seed,
        generation_logits: true,
        context_logits: true,
        ..Request::default()
    }
}

/// The bits of all logits of one request, and its tokens.
#[derive(Default, PartialEq, Debug)]
struct Trace {
    tokens: Vec<TokenId>,
    context: Vec<u32>,
    generation: Vec<u32>,
}

fn run(session: &mut Session, watched: RequestId) -> Trace {
    let mut trace = Trace::default();
    while !session.is_idle() {
        for event in session.step().unwrap().into_iter().filter(|e| e.id == watched) {
            trace.tokens.extend(event.token);
            trace.context.extend(event.context_logits.iter().map(|x| x.to_bits()));
            trace.generation.extend(event.generation_logits.iter().map(|x| x.to_bits()));
        }
    }
    trace
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// A prompt gives the same bits alone in one chunk, alone in chunks of any size, and among up to 63 other prompts
    /// that join when there is room, in steps of any size.
    #[test]
    fn a_prompt_gives_the_same_bits_in_every_schedule(
        len in 1usize..60,
        chunk in 1usize..40,
        max_num_tokens in 3usize..90,
        max_batch_size in 1usize..65,
        others in prop::collection::vec((1usize..50, 1usize..12), 0..64),
        place in any::<prop::sample::Index>(),
        dtype in prop::sample::select(vec![DType::F32, DType::Bf16, DType::F16]),
    ) {
        let watched = request(7, len, 9);
        let mut alone = session_of(model(dtype), 1, 128, 8, ONE_BY_ONE);
        let id = alone.submit(watched.clone()).unwrap();
        let expected = run(&mut alone, id);
        prop_assert_eq!(expected.tokens.len(), 9);
        prop_assert_eq!(expected.context.len(), len * VOCAB as usize);

        let mut chunked = session(dtype, 1, chunk, 8);
        let id = chunked.submit(watched.clone()).unwrap();
        prop_assert!(run(&mut chunked, id) == expected, "chunks of {}", chunk);

        let mut crowd = session(dtype, max_batch_size, max_num_tokens, 60);
        let place = place.index(others.len() + 1);
        let mut id = RequestId(0);
        for (i, (len, output)) in others.iter().enumerate() {
            if i == place {
                id = crowd.submit(watched.clone()).unwrap();
            }
            crowd.submit(request(100 + u32::try_from(i).unwrap(), *len, *output)).unwrap();
        }
        if place == others.len() {
            id = crowd.submit(watched).unwrap();
        }
        prop_assert!(run(&mut crowd, id) == expected, "among {} others", others.len());
        prop_assert_eq!(crowd.free_blocks(), 60);
    }
}

/// The model in every type and format.
fn models() -> Vec<(String, ModelConfig)> {
    let floats = [DType::F32, DType::F16, DType::Bf16].map(|dtype| (dtype.to_string(), model(dtype)));
    let quantized = ["int8:row:f32", "int4:g32:bf16", "fp8"].map(|format| {
        let mut model = model(DType::Bf16);
        // A group of 32 fits into every row.
        (model.hidden_size, model.intermediate_size) = (32, 64);
        let format: WeightFormat = format.parse().unwrap();
        model.formats = Formats { attention: format, feed_forward: format };
        (format.to_string(), model)
    });
    floats.into_iter().chain(quantized).collect()
}

/// 64 requests of mixed lengths. In fours, their prompts begin alike.
fn mixed() -> Vec<Request> {
    let mixed = |seed: u32| {
        let common = request(1000 + seed / 4, 40, 0).prompt;
        let own = request(seed, 1 + (seed as usize * 7) % 30, 0).prompt;
        let plain = Request {
            prompt: [&common[..(seed as usize * 13) % 41], &own].concat(),
            context_logits: false,
            logprobs: Some(2),
            ..request(seed, 1, 10 + (seed as usize * 11) % 48)
        };
        match seed % 8 {
            // These end when the next step may be under way.
            1 => Request { end_ids: (0..20).map(TokenId).collect(), min_output_len: 6, ..plain },
            3 => Request { prompt_logprobs: Some(1), ..plain },
            5 => {
                let beams = Some(Beams { width: 2, ..Beams::default() });
                Request { beams, logprobs: None, generation_logits: false, ..plain }
            }
            // The draws of these depend on the tokens before.
            6 => Request { params: SamplingParams { frequency_penalty: 0.3, ..plain.params }, ..plain },
            _ => plain,
        }
    };
    (0..64).map(mixed).collect()
}

/// What each request got, to the bit.
fn traces(session: &mut Session, requests: &[Request]) -> Vec<Vec<u32>> {
    let first = requests.iter().map(|request| session.submit(request.clone()).unwrap()).min().unwrap();
    let mut traces = vec![Vec::new(); requests.len()];
    while !session.is_idle() {
        for event in session.step().unwrap() {
            let trace = &mut traces[event.id.0 - first.0];
            // The last part of a prompt comes with the first token.
            for scored in event.prompt_logprobs.iter().chain(&event.logprobs) {
                trace.extend([scored.token.0, scored.logprob.to_bits()]);
                trace.extend(scored.best.iter().flat_map(|(token, logprob)| [token.0, logprob.to_bits()]));
            }
            trace.extend(event.generation_logits.iter().map(|x| x.to_bits()));
            for answer in &event.beams {
                trace.push(answer.score.to_bits());
                trace.extend(answer.tokens.iter().map(|token| token.0));
            }
        }
    }
    traces
}

/// Whether steps overlap, prompts share blocks, sequences are swapped out, and how long chunks are, moves no bit.
#[test]
fn overlap_and_sharing_and_swapping_move_no_bit() {
    let requests = mixed();
    for (name, model) in models() {
        let session = |max_batch_size, max_num_tokens, kv_blocks, options| {
            session_of(model.clone(), max_batch_size, max_num_tokens, kv_blocks, options)
        };
        let expected = traces(&mut session(64, 128, 400, ONE_BY_ONE), &requests);
        assert!(expected.iter().all(|trace| trace.len() > 4));
        let reuse = SessionOptions { block_reuse: true, ..SessionOptions::default() };
        let swaps = SessionOptions { policy: Policy::MaxUtilization, host_blocks: 400, ..SessionOptions::default() };
        let both = SessionOptions { block_reuse: true, max_prefill_tokens: Some(9), ..swaps };
        for (max_batch_size, max_num_tokens, kv_blocks, options) in [
            (64, 128, 400, SessionOptions::default()),
            (64, 128, 400, reuse),
            (3, 17, 40, reuse),
            (64, 96, 36, swaps),
            (64, 33, 18, both),
        ] {
            let mut session = session(max_batch_size, max_num_tokens, kv_blocks, options);
            let found = traces(&mut session, &requests);
            let same = found.iter().zip(&expected).filter(|(found, expected)| found == expected).count();
            let counters = session.stats().counters;
            let what = format!("{name}, {options:?}, steps of {max_num_tokens}: {counters:?}");
            assert_eq!(same, requests.len(), "{what}");
            assert_eq!(session.free_blocks(), kv_blocks, "{what}");
            assert_eq!(counters.cached_tokens > 100, options.block_reuse, "{what}");
            assert_eq!(counters.swapped_out > 10, options.policy == Policy::MaxUtilization, "{what}");
        }
    }
}

/// Requests come, finish, and are cancelled while queued, in their prompt, or while decoding.
#[test]
fn five_hundred_requests_with_cancellations_leave_no_block() {
    let mut session = session(DType::F32, 9, 40, 30);
    let mut numbers = (0u32..).map(|position| RandomKey { seed: 1, prompt: 2, hypothesis: 3, position }.bits());
    let mut draw = |below: u64| usize::try_from(numbers.next().unwrap() % below).unwrap();
    let (mut live, mut finished, mut cancelled) = (Vec::new(), 0, 0);
    let mut submitted = 0;
    while submitted < 500 || !session.is_idle() {
        for _ in 0..draw(4) {
            if submitted < 500 {
                live.push(session.submit(request(submitted, 1 + draw(70), 1 + draw(20))).unwrap());
                submitted += 1;
            }
        }
        if !live.is_empty() && draw(5) == 0 {
            let id: RequestId = live.swap_remove(draw(live.len() as u64));
            assert!(session.cancel(id));
            assert!(!session.cancel(id));
            cancelled += 1;
        }
        for event in session.step().unwrap() {
            assert!(live.contains(&event.id), "an event of {}, which ended", event.id);
            if event.finished.is_some() {
                live.retain(|id| *id != event.id);
                finished += 1;
            }
        }
    }
    assert_eq!((finished + cancelled, live.len()), (500, 0));
    assert!(cancelled > 50 && finished > 200, "{cancelled} cancelled, {finished} finished");
    assert_eq!(session.free_blocks(), 30);
}
