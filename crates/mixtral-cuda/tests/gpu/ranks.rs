//! Compares ranks on GPUs with ranks on the CPU: exchanging rows gives the same bits in every kind of step. Each rank
//! is a thread. If there are fewer GPUs than ranks, ranks share them.

use std::collections::{HashMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mixtral_cpu::{CpuBackend, CpuOptions};
use mixtral_cuda::{CudaOptions, Loading, devices};
use mixtral_engine::op::FusedNorm;
use mixtral_engine::{
    Backend as _, BackendError, Collectives, Epilogue, Inspect, Op, Program, Rows, StepInputs, Weights,
};
use mixtral_kernels::{Arg, Work};
use mixtral_model::{DType, ElemType, MoeNormalization};
use mixtral_testkit::assembly::Assembly;
use mixtral_testkit::batch::{self, Part};
use mixtral_testkit::elements::{from_bytes, ints_to_bytes, to_bytes, values};

use crate::kernels::Machine;

const KV_BLOCKS: usize = 40;

/// A job of some ranks in groups of `tp_size`.
#[derive(Clone, Copy, Debug)]
struct Layout {
    ranks: usize,
    tp_size: usize,
}

/// Two stages of two ranks each.
const STAGES: Layout = Layout { ranks: 4, tp_size: 2 };
const PAIR: Layout = Layout { ranks: 2, tp_size: 2 };

/// Messages that wait, by sender and receiver.
type Waiting = HashMap<(usize, usize), VecDeque<Vec<u8>>>;

/// Messages between threads.
#[derive(Default)]
struct Post {
    waiting: Mutex<Waiting>,
    arrived: Condvar,
    /// Whether a rank is gone.
    gone: AtomicBool,
}

/// One rank's access to the messages.
struct Mailbox {
    post: Arc<Post>,
    rank: usize,
    tp_size: usize,
}

impl Collectives for Mailbox {
    fn all_gather(&self, mine: &[u8], all: &mut [u8]) -> Result<(), BackendError> {
        let first = self.rank / self.tp_size * self.tp_size;
        let group = first..first + self.tp_size;
        group.clone().filter(|&to| to != self.rank).try_for_each(|to| self.send(to, mine))?;
        for (from, part) in group.zip(all.chunks_exact_mut(mine.len())) {
            if from == self.rank {
                part.copy_from_slice(mine);
            } else {
                self.recv(from, part)?;
            }
        }
        Ok(())
    }

    fn send(&self, to: usize, bytes: &[u8]) -> Result<(), BackendError> {
        let mut waiting = self.post.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.entry((self.rank, to)).or_default().push_back(bytes.to_vec());
        self.post.arrived.notify_all();
        Ok(())
    }

    fn recv(&self, from: usize, bytes: &mut [u8]) -> Result<(), BackendError> {
        let mut waiting = self.post.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(message) = waiting.entry((from, self.rank)).or_default().pop_front() {
                bytes.copy_from_slice(&message);
                return Ok(());
            }
            waiting = self.post.arrived.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn check(&self) -> Result<(), BackendError> {
        match self.post.gone.load(Ordering::Relaxed) {
            true => Err(BackendError::Peer("rank 1 is gone".into())),
            false => Ok(()),
        }
    }
}

/// Buffers that a rank's program reads, and those that it writes.
const GIVEN: [&str; 4] = ["part", "residual", "columns", "expert_output"];
const MADE: [&str; 7] = ["sum", "added", "normed", "both", "joined", "combined", "router_input"];
/// Those of them that norms write. On a GPU, norms add in another order.
const NORMS: [&str; 3] = ["normed", "both", "router_input"];

const NUM_EXPERTS: usize = 8;
const TOP_K: usize = 2;

/// The program of one of the ranks, in one stage or two. It has every operation that sends rows to other ranks.
fn program(dtype: DType, cols: usize, layout: Layout, rank: usize) -> (Program, Weights) {
    let mut a = Assembly::new(dtype);
    let tp_size = layout.tp_size;
    (a.program.rank, a.program.world_size, a.program.tp_size) = (rank, layout.ranks, tp_size);
    let place = rank % tp_size;
    let experts = [place, place + 1].map(|place| place * NUM_EXPERTS / tp_size);
    let weight = a.weight("scale", dtype, &[cols], &values("scale", cols, 1.0));
    (a.program.num_experts, a.program.top_k) = (NUM_EXPERTS, TOP_K);
    let router = a.weight("router", DType::F32, &[NUM_EXPERTS, cols], &values("router", NUM_EXPERTS * cols, 1.0));
    for name in GIVEN.iter().chain(&MADE).chain(&["passed", "share"]) {
        let rows = if *name == "expert_output" { Rows::Assignments } else { Rows::Tokens };
        if *name != "joined" {
            a.activation(name, rows, cols);
        }
    }
    for (name, dtype, rows, cols) in [
        ("ids", ElemType::I32, Rows::Tokens, TOP_K),
        ("weights", ElemType::F32, Rows::Tokens, TOP_K),
        ("chosen", ElemType::I32, Rows::Tokens, TOP_K),
        ("chosen_weights", ElemType::F32, Rows::Tokens, TOP_K),
        ("logits", ElemType::F32, Rows::Tokens, NUM_EXPERTS),
        ("offsets", ElemType::I32, Rows::One, experts[1] - experts[0] + 1),
        ("order", ElemType::I32, Rows::Assignments, 1),
    ] {
        a.buffer(name, dtype, rows, cols);
    }
    a.activation("joined", Rows::Tokens, tp_size * cols);
    let name = str::to_owned;
    let reduce = |residual: bool, out: &str, normed: Option<&str>| Op::AllReduce {
        input: name("part"),
        residual: residual.then(|| name("residual")),
        out: name(out),
        norm: normed.map(|out| FusedNorm { weight: weight.clone(), eps: 1e-5, out: name(out) }),
    };
    let mut ops = vec![
        reduce(false, "sum", None),
        reduce(true, "added", None),
        reduce(false, "sum", Some("normed")),
        reduce(true, "added", Some("both")),
        Op::AllGather { input: name("columns"), out: name("joined") },
        Op::Combine {
            input: name("expert_output"),
            expert_ids: name("ids"),
            expert_weights: name("weights"),
            experts,
            residual: None,
            out: name("share"),
            norm: None,
        },
        Op::AllReduce {
            input: name("share"),
            residual: Some(name("residual")),
            out: name("combined"),
            norm: Some(FusedNorm { weight: weight.clone(), eps: 1e-5, out: name("router_input") }),
        },
        Op::Linear {
            input: name("router_input"),
            weight: router,
            rows: None,
            epilogue: Epilogue::F32,
            residual: None,
            out: name("logits"),
            ladder: vec![],
        },
        Op::Route {
            logits: name("logits"),
            normalization: MoeNormalization::Renorm,
            layer: 0,
            experts,
            expert_ids: name("chosen"),
            expert_weights: name("chosen_weights"),
            offsets: name("offsets"),
            order: name("order"),
        },
    ];
    match rank.checked_sub(tp_size) {
        Some(from) => ops.insert(0, Op::Recv { out: name("passed"), from }),
        None if layout.ranks > tp_size => ops.push(Op::Send { input: name("residual"), to: rank + tp_size }),
        None => {}
    }
    ops.into_iter().for_each(|op| a.op(op));
    a.place_apart();
    (a.program, a.weights.into_weights())
}

/// Steps of prompts and of decodes. There are more steps than slots of an inbox.
fn steps(program: &Program) -> Vec<StepInputs<'static>> {
    let limits = program.limits;
    let decodes = |n: usize| {
        let sequences = batch::sequences(7, &vec![2; n], &limits, program.vocab_size, KV_BLOCKS);
        let parts: Vec<Part<'_>> = sequences.iter().map(|sequence| Part { sequence, past: 1, new: 1 }).collect();
        batch::step(&limits, &parts)
    };
    let prompt = |n: usize| batch::prompt(&limits, program.vocab_size, KV_BLOCKS, n);
    vec![prompt(1), prompt(33), decodes(1), decodes(7), prompt(256), decodes(33), decodes(1), prompt(5), decodes(2)]
}

/// What a rank writes in every step, by buffer.
fn run(backend: &mut dyn Inspect, dtype: DType) -> Vec<Vec<Vec<u8>>> {
    let program = backend.program().clone();
    let (rank, last) = (program.rank, program.ops.len());
    let bytes = |name: &str, tokens: usize| tokens * program.buffer(name).unwrap().cols * dtype.size();
    let made = steps(&program).into_iter().enumerate().map(|(step, inputs)| {
        let tokens = inputs.num_tokens();
        let assignments = TOP_K * tokens;
        let expert = |i: usize| i32::try_from((i / 2 * 3 + i % 2 * 5 + step) % NUM_EXPERTS).unwrap();
        let ids: Vec<i32> = (0..assignments).map(expert).collect();
        backend.write_buffer("ids", &ints_to_bytes(&ids)).unwrap();
        backend.write_buffer("weights", &to_bytes(DType::F32, &values("weights", assignments, 0.5))).unwrap();
        for name in GIVEN {
            let rows = if name == "expert_output" { assignments } else { tokens };
            let n = bytes(name, rows) / dtype.size();
            backend.write_buffer(name, &to_bytes(dtype, &values(&format!("{name} {rank} {step}"), n, 2.0))).unwrap();
        }
        backend.run_ops(0..last, &inputs).unwrap();
        let received = (rank >= program.tp_size).then_some("passed");
        MADE.into_iter().chain(received).map(|name| backend.read_buffer(name, bytes(name, tokens)).unwrap()).collect()
    });
    made.collect()
}

/// What the ranks of a job return, each on a thread of its own.
fn on_threads<T: Send>(Layout { ranks, tp_size }: Layout, rank: impl Fn(usize, Arc<Mailbox>) -> T + Sync) -> Vec<T> {
    let post = Arc::new(Post::default());
    std::thread::scope(|scope| {
        let spawn = |r: usize| {
            let (post, rank) = (Arc::clone(&post), &rank);
            scope.spawn(move || rank(r, Arc::new(Mailbox { post, rank: r, tp_size })))
        };
        let threads: Vec<_> = (0..ranks).map(spawn).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Of steps of up to 256 rows, three and four ranks sum those of more than 320 KB in shares.
#[test]
fn ranks_say_to_each_other_what_those_of_the_cpu_say() {
    let Some(machine) = Machine::find() else { return };
    let (three, four) = (Layout { ranks: 3, tp_size: 3 }, Layout { ranks: 4, tp_size: 4 });
    let layouts = [
        (STAGES, &[DType::F32, DType::F16, DType::Bf16][..], &[20, 64, 1000, 4096, 6144][..]),
        (three, &[DType::F32, DType::Bf16], &[20, 1004, 4096]),
        (four, &[DType::F32, DType::F16], &[64, 1004, 6144]),
    ];
    for (layout, dtypes, widths) in layouts {
        for (dtype, cols) in dtypes.iter().flat_map(|dtype| widths.iter().map(move |cols| (*dtype, *cols))) {
            say_the_same(&machine, layout, dtype, cols, true);
        }
    }
}

/// NCCL carries the rows of ranks that have a GPU each.
#[test]
fn ranks_without_mapped_memory_say_the_same() {
    let Some(machine) = Machine::find() else { return };
    let gpus = devices().unwrap().len();
    let four = Layout { ranks: 4, tp_size: 4 };
    for layout in [PAIR, STAGES, four].into_iter().filter(|layout| layout.ranks <= gpus) {
        for (dtype, cols) in [(DType::F32, 20), (DType::Bf16, 1004), (DType::F16, 4096)] {
            say_the_same(&machine, layout, dtype, cols, false);
        }
    }
}

fn say_the_same(machine: &Machine, layout: Layout, dtype: DType, cols: usize, maps: bool) {
    let Layout { ranks, tp_size } = layout;
    let count = devices().unwrap().len().min(ranks);
    let sharing = ranks.div_ceil(count);
    let mut compared = 0;
    let programs: Vec<_> = (0..ranks).map(|rank| program(dtype, cols, layout, rank)).collect();
    let code = machine.codes()[0];
    let (library, failures) = machine.compile(code, &programs.iter().map(|(p, _)| p).collect::<Vec<_>>());
    assert!(failures.is_empty(), "{failures:?}");
    let expected = on_threads(layout, |rank, ranks| {
        let (program, weights) = &programs[rank];
        let options = CpuOptions { kv_blocks: KV_BLOCKS, threads: 1, ..CpuOptions::default() };
        let mut cpu = CpuBackend::load(program.clone(), weights.clone(), options).unwrap().with_ranks(ranks);
        run(&mut cpu, dtype)
    });
    let found = on_threads(layout, |rank, ranks| {
        let (program, weights) = &programs[rank];
        let executable = library.executable(program).unwrap();
        let options = CudaOptions { device: rank % count, sharing, maps, ..CudaOptions::default() };
        let loading = Loading::new(program.clone(), weights, &executable, options).unwrap();
        let mut gpu = loading.finish(KV_BLOCKS, Some(ranks.clone())).unwrap();
        if !maps {
            println!("{}", gpu.links().unwrap());
        }
        // No rank starts before all have loaded: allocating may wait for another rank's kernels, and those
        // would wait for this rank.
        ranks.all_gather(&[0], &mut vec![0; tp_size]).unwrap();
        run(&mut gpu, dtype)
    });
    for (rank, (found, expected)) in found.iter().zip(&expected).enumerate() {
        for (step, (found, expected)) in found.iter().zip(expected).enumerate() {
            for (buffer, (found, expected)) in found.iter().zip(expected).enumerate() {
                let what = format!("{layout:?}, {dtype} of {cols}, rank {rank}, step {step}, buffer {buffer}");
                let (found, expected) = (from_bytes(dtype, found), from_bytes(dtype, expected));
                let is_norm = MADE.get(buffer).is_some_and(|name| NORMS.contains(name));
                let limit = if is_norm { 1e-5 } else { 0.0 };
                let off: f64 = found.iter().zip(&expected).map(|(a, b)| (a - b) * (a - b)).sum();
                let size: f64 = expected.iter().map(|x| x * x).sum();
                assert!(size > 0.0 && off <= limit * size, "{what}: {off} of {size}");
                compared += found.len();
            }
        }
    }
    println!(
        "{ranks} ranks on {count} GPUs, {tp_size} in a group, {dtype} of {cols}: {compared} elements are the same"
    );
}

/// Columns of the rows that are summed to take the time: a token is 8 KB.
const COLS: usize = 4096;

/// A program of one of the ranks of a group, which sums `sums` times, one after another.
fn sums(sums: usize, tokens: usize, fused: bool, layout: Layout, rank: usize) -> (Program, Weights) {
    let mut a = Assembly::new(DType::Bf16);
    (a.program.rank, a.program.world_size, a.program.tp_size) = (rank, layout.ranks, layout.tp_size);
    let limits = &mut a.program.limits;
    (limits.max_num_tokens, limits.max_batch_size) = (tokens.max(64), 64);
    limits.max_seq_len = tokens.max(256);
    let weight = a.weight("scale", DType::Bf16, &[COLS], &vec![1.0; COLS]);
    let names = ["a", "b", "residual", "added", "normed"].map(|name| a.activation(name, Rows::Tokens, COLS));
    let logits = a.buffer("logits", ElemType::F32, Rows::Logits, a.program.vocab_size);
    let [one, other, residual, added, normed] = names;
    for index in 0..sums {
        let (from, to) = if index % 2 == 0 { (&one, &other) } else { (&other, &one) };
        let norm = FusedNorm { weight: weight.clone(), eps: 1e-5, out: normed.clone() };
        a.op(match fused {
            false => Op::AllReduce { input: from.clone(), residual: None, out: to.clone(), norm: None },
            true => Op::AllReduce {
                input: from.clone(),
                residual: Some(residual.clone()),
                out: added.clone(),
                norm: Some(norm),
            },
        });
    }
    a.op(Op::Sample { logits });
    a.place_apart();
    (a.program, a.weights.into_weights())
}

/// How ranks sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// As the number of rows says.
    Chosen,
    /// Every rank sums all rows.
    Whole,
    /// Every rank sums a share of them.
    InShares,
    /// NCCL gathers the rows, and every rank sums all of them.
    Nccl,
}

/// Microseconds of an all-reduce of `tokens` rows by ranks with a GPU each: steps of many sums against steps of few, so that what
/// a step costs anyway drops out.
fn us_of_a_sum(machine: &Machine, layout: Layout, tokens: usize, fused: bool, how: How) -> f64 {
    const FEW: usize = 8;
    let many = if tokens > 64 { 40 } else { 264 };
    let [less, more] = [FEW, many].map(|count| {
        let programs: Vec<_> = (0..layout.ranks).map(|rank| sums(count, tokens, fused, layout, rank)).collect();
        let code = machine.codes()[0];
        let (library, failures) = machine.compile(code, &programs.iter().map(|(p, _)| p).collect::<Vec<_>>());
        assert!(failures.is_empty(), "{failures:?}");
        let blocks = tokens.div_ceil(16).max(64);
        let times = on_threads(layout, |rank, ranks| {
            let (program, weights) = &programs[rank];
            let mut executable = library.executable(program).unwrap();
            for work in executable.schedule.regimes.iter_mut().flat_map(|(_, works)| works) {
                let Work::Launch(launch) = work else { continue };
                let from = launch.args.iter_mut().filter(|arg| arg.name == "shares_from");
                from.for_each(|arg| match how {
                    How::Whole => arg.arg = Arg::I32(i32::MAX),
                    How::InShares => arg.arg = Arg::I32(1),
                    How::Chosen | How::Nccl => {}
                });
            }
            let options = CudaOptions { device: rank, maps: how != How::Nccl, ..CudaOptions::default() };
            let loading = Loading::new(program.clone(), weights, &executable, options).unwrap();
            let mut gpu = loading.finish(blocks, Some(ranks.clone())).unwrap();
            let limits = program.limits;
            let inputs = match tokens {
                0..=64 => {
                    let sequences = batch::sequences(7, &vec![2; tokens], &limits, program.vocab_size, blocks);
                    let part = |sequence| Part { sequence, past: 1, new: 1 };
                    batch::step(&limits, &sequences.iter().map(part).collect::<Vec<_>>())
                }
                _ => batch::prompt(&limits, program.vocab_size, blocks, tokens),
            };
            let inputs = StepInputs { return_logits: false, ..inputs };
            let mut times: Vec<Duration> = (0..60)
                .map(|_| {
                    let begun = Instant::now();
                    gpu.step(&inputs).unwrap();
                    begun.elapsed()
                })
                .collect();
            times.sort();
            times[times.len() / 4]
        });
        times.into_iter().max().unwrap()
    });
    more.saturating_sub(less).as_secs_f64() * 1e6 / (many - FEW) as f64
}

/// The printed floors are those to be reached by two Hopper GPUs. The test fails at twice the floor, because a machine may be
/// shared.
#[test]
fn sums_of_two_gpus_take_a_few_microseconds() {
    let Some(machine) = Machine::find() else { return };
    if devices().unwrap().len() < PAIR.ranks {
        return;
    }
    for (tokens, fused, floor) in
        [(1, false, 3.0), (64, false, 5.0), (4096, false, 115.0), (1, true, 3.2), (64, true, 5.5)]
    {
        let [each, nccl] = [How::Chosen, How::Nccl].map(|how| us_of_a_sum(&machine, PAIR, tokens, fused, how));
        let what = if fused { "all-reduce, residual and norm" } else { "all-reduce" };
        println!("{what} of {tokens} tokens ({} KB): {each:.2} us, floor {floor}; by NCCL {nccl:.2}", tokens * 8);
        assert!(each < 2.0 * floor, "{what} of {tokens} tokens took {each:.2} us");
    }
}

/// Times sums over three or four GPUs in which every rank sums everything, and sums in shares. Of long rows, shares send half as
/// much or less.
#[test]
fn long_sums_of_many_gpus_are_faster_in_shares() {
    let Some(machine) = Machine::find() else { return };
    let ranks = devices().unwrap().len().min(4);
    if ranks < 3 {
        return;
    }
    let layout = Layout { ranks, tp_size: ranks };
    for tokens in [1, 8, 16, 32, 64, 128, 512, 4096] {
        let us = [How::Whole, How::InShares, How::Nccl].map(|how| us_of_a_sum(&machine, layout, tokens, false, how));
        let [whole, shares, nccl] = us;
        println!("{ranks} ranks, {} KB: {whole:.2} us, in shares {shares:.2}, by NCCL {nccl:.2}", tokens * 8);
        assert!(tokens < 4096 || shares < whole, "{shares} us in shares, {whole} us otherwise");
    }
}

/// Set in the process in which a rank's GPU is lost.
const CHILD: &str = "MIXTRAL_LOST_RANK";

/// Rank 1 goes away without a step, panics, or its kernel traps. All others end soon, and name it; also the one that waits for
/// it in NCCL.
#[test]
fn a_rank_that_is_gone_ends_the_others() {
    if std::env::var_os(CHILD).is_none() {
        // Ranks that share one GPU share its context too, so all of them lose it: there is nothing to tell apart.
        let alone = devices().is_ok_and(|devices| devices.len() > 1);
        for how in if alone { &["leaves", "panics", "traps", "leaves NCCL"][..] } else { &["leaves", "panics"] } {
            let mut child = Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", "ranks::a_rank_that_is_gone_ends_the_others", "--nocapture"]);
            child.env("CUDA_DEVICE_MAX_CONNECTIONS", "32");
            let output = child.env(CHILD, how).output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
            print!("{said}");
            assert!(output.status.success(), "{how}: {}", output.status);
        }
        return;
    }
    let Some(machine) = Machine::find() else { return };
    let how = std::env::var(CHILD).unwrap();
    let maps = how != "leaves NCCL";
    let layout = if maps { STAGES } else { PAIR };
    let Layout { ranks: all, .. } = layout;
    let count = devices().unwrap().len().min(all);
    let traps = how == "traps";
    let programs: Vec<_> = (0..all).map(|rank| program(DType::F32, 64, layout, rank)).collect();
    let code = machine.codes()[0];
    let (library, failures) = machine.compile(code, &programs.iter().map(|(p, _)| p).collect::<Vec<_>>());
    assert!(failures.is_empty(), "{failures:?}");
    let trapping = library.with("exchange::all_reduce", &machine.trap(code, &programs[1].0, "exchange::all_reduce"));
    let ends = on_threads(layout, |rank, ranks| {
        let (program, weights) = &programs[rank];
        let library = if traps && rank == 1 { &trapping } else { &library };
        let executable = library.executable(program).unwrap();
        let sharing = all.div_ceil(count);
        let options = CudaOptions { device: rank % count, sharing, maps, ..CudaOptions::default() };
        let loading = Loading::new(program.clone(), weights, &executable, options).unwrap();
        let mut gpu = loading.finish(KV_BLOCKS, Some(ranks.clone())).unwrap();
        let begun = Instant::now();
        if rank == 1 {
            // The others wait for it by then.
            std::thread::sleep(Duration::from_millis(500));
        }
        if rank == 1 && !traps {
            if how == "panics" {
                // What the thread owns is dropped before anyone hears of the panic, while others write to its memory.
                let panicked = std::panic::catch_unwind(AssertUnwindSafe(|| {
                    let _dropped = gpu;
                    panic!("as the test wants");
                }));
                assert!(panicked.is_err());
            }
            ranks.post.gone.store(true, Ordering::Relaxed);
            return (begun.elapsed(), "it left".to_owned());
        }
        // Two steps are under way, whose kernels wait for rank 1.
        let inputs = StepInputs { return_logits: false, ..steps(program)[1].clone() };
        let launched = gpu.launch(&inputs).and_then(|_| gpu.launch(&inputs));
        let error = launched.and_then(|_| gpu.collect()).unwrap_err();
        if rank == 1 {
            ranks.post.gone.store(true, Ordering::Relaxed);
        }
        (begun.elapsed(), error.to_string())
    });
    for (rank, (took, said)) in ends.iter().enumerate() {
        println!("rank {rank} ended after {took:?}: {}", &said[..said.len().min(150)]);
        assert!(*took < Duration::from_secs(10), "rank {rank} took {took:?}");
        let own = if traps { "context is lost" } else { "left" };
        assert!(said.contains(if rank == 1 { own } else { "rank 1 is gone" }), "rank {rank}: {said}");
    }
}
