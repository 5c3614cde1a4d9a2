//! `cargo xtask bench`: the CPU backend's kernels that take most of a model's time, in bf16, at Mixtral 8x7B's shapes.
//!
//! Linears alternate between more weights than any cache holds. Under `cargo test` everything is tiny and runs once.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use mixtral_cpu::{CpuBackend, CpuOptions};
use mixtral_engine::{Backend as _, Epilogue, Inspect as _, Op, Rows, StepInputs, Weights};
use mixtral_model::{DType, Piece};
use mixtral_testkit::assembly::Assembly;
use mixtral_testkit::batch::{self, Part};

const BLOCK: usize = 64;

/// Whether this run measures. `cargo test` does not pass the flag.
fn is_measuring() -> bool {
    std::env::args().any(|argument| argument == "--bench")
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn assembly(max_num_tokens: usize, max_seq_len: usize) -> Assembly {
    let mut a = Assembly::new(DType::Bf16);
    let limits = &mut a.program.limits;
    (limits.max_num_tokens, limits.max_num_logits, limits.max_seq_len) = (max_num_tokens, 1, max_seq_len);
    limits.block_size = BLOCK;
    (a.program.kv.num_kv_heads, a.program.kv.head_dim) = (8, 128);
    a
}

fn backend(a: Assembly, kv_blocks: usize) -> CpuBackend {
    let options = CpuOptions { kv_blocks, threads: threads(), ..CpuOptions::default() };
    CpuBackend::load(a.program, Weights::Dummy { seed: 1 }, options).expect("the program loads")
}

/// A program of `count` linears, each with weights of its own.
fn linears(rows: usize, cols: usize, count: usize, max_tokens: usize) -> Assembly {
    let mut a = assembly(max_tokens, max_tokens);
    let input = a.activation("x", Rows::Tokens, cols);
    let out = a.activation("y", Rows::Tokens, rows);
    for i in 0..count {
        let weight = a.declare(&format!("w{i}"), DType::Bf16, &[rows, cols]);
        let source = format!("w{i}");
        let piece = Piece { source, source_rows: rows, source_cols: cols, rows: 0..rows, cols: 0..cols, target_row: 0 };
        a.program.weights[i].pieces.push(piece);
        let (input, out) = (input.clone(), out.clone());
        a.op(Op::Linear { input, weight, rows: None, epilogue: Epilogue::Store, residual: None, out, ladder: vec![] });
    }
    a.place_apart();
    a
}

fn linear(c: &mut Criterion) {
    let ((rows, cols, count), tokens) =
        if is_measuring() { ((14_336, 4096, 9), [1, 4, 16, 128]) } else { ((64, 48, 2), [1, 2, 3, 5]) };
    let a = linears(rows, cols, count, tokens[3]);
    let (limits, vocab_size) = (a.program.limits, a.program.vocab_size);
    let kv_blocks = tokens[3].div_ceil(BLOCK);
    let mut backend = backend(a, kv_blocks);
    let ones: Vec<u8> = [0x80, 0x3f].repeat(tokens[3] * cols);
    backend.write_buffer("x", &ones).expect("the buffer is there");
    let mut group = c.benchmark_group(format!("linear {rows}x{cols} bf16"));
    group.sample_size(10);
    for n in tokens {
        let inputs = batch::prompt(&limits, vocab_size, kv_blocks, n);
        let inputs = StepInputs { return_logits: false, ..inputs };
        group.throughput(Throughput::Bytes((count * rows * cols * 2) as u64));
        group.bench_function(format!("{n} tokens, {count} weights"), |b| {
            b.iter(|| backend.step(&inputs).expect("a step"));
        });
    }
}

fn attention(c: &mut Criterion) {
    let cases = if is_measuring() { [(0, 512), (8192, 1)] } else { [(0, 20), (70, 1)] };
    let mut group = c.benchmark_group("attention 32 heads over 8 bf16");
    group.sample_size(10);
    for (past, new) in cases {
        let mut a = assembly(new, past + new);
        let query = a.activation("q", Rows::Tokens, 32 * 128);
        let out = a.activation("o", Rows::Tokens, 32 * 128);
        a.op(Op::Attention { query, num_heads: 32, window: None, layer: 0, fp8_context: false, out });
        a.place_apart();
        let (limits, blocks) = (a.program.limits, (past + new).div_ceil(BLOCK));
        let sequence = batch::sequences(1, &[past + new], &limits, a.program.vocab_size, blocks).remove(0);
        let mut inputs = batch::step(&limits, &[Part { sequence: &sequence, past, new }]);
        inputs.logits_indices.truncate(1);
        let mut backend = backend(a, blocks);
        group.bench_function(format!("{new} tokens after {past}"), |b| {
            b.iter(|| backend.step(&inputs).expect("a step"));
        });
    }
}

criterion_group!(kernels, linear, attention);
criterion_main!(kernels);
