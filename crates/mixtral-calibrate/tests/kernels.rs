//! The kernels that sum up rows give the bits of [`Observed`], and compile well. The first test compiles them for the host, so it needs
//! no GPU but a C++ compiler, and the second needs NVRTC. Without them they say so and pass.
#![allow(missing_docs)]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use mixtral_calibrate::observe::Observed;
use mixtral_engine::dummy;
use mixtral_kernels::lower::observe::BLOCK;
use mixtral_kernels::{Arch, Code, Compiler, Family, Kernel, Nvrtc, Search, Sources};
use mixtral_model::DType;

const EXPERTS: usize = 4;
const TOP_K: usize = 2;
/// Elements of a token's row, in two blocks, and of a row in the order of the lists, in a part of one.
const WIDTHS: [usize; 2] = [200, 70];
/// Tokens of each sequence: more than a tile of rows, one, none of some expert.
const LENGTHS: [usize; 4] = [75, 1, 33, 64];

/// A step: its rows as floats, and which tokens each expert gets.
struct Step {
    rows: Vec<Vec<f32>>,
    in_order: Vec<Vec<f32>>,
    lists: Vec<Vec<usize>>,
}

impl Step {
    fn new() -> Step {
        let tokens: usize = LENGTHS.iter().sum();
        let rows = |name: &str, count: usize, width: usize| -> Vec<Vec<f32>> {
            let key = dummy::key(3, name);
            let row = |row: usize| (0..width).map(|i| dummy::element(key, (row * width + i) as u64, 1.0)).collect();
            (0..count).map(row).collect()
        };
        // Expert 2 gets no token.
        let chosen = |token: usize| if token.is_multiple_of(3) { [0, 3] } else { [1, 3 * (token / 70 % 2)] };
        let lists = (0..EXPERTS).map(|expert| (0..tokens).filter(|&t| chosen(t).contains(&expert)).collect()).collect();
        let mut rows_of_tokens = rows("tokens", tokens, WIDTHS[0]);
        for row in &mut rows_of_tokens {
            *row = DType::Bf16.widen(&bf16(row));
        }
        Step { rows: rows_of_tokens, in_order: rows("assignments", tokens * TOP_K, WIDTHS[1]), lists }
    }

    /// As the C++ program reads it.
    fn bytes(&self) -> Vec<u8> {
        let tokens = self.rows.len();
        let edges = |lengths: &[usize]| {
            lengths.iter().fold(vec![0], |mut edges, length| {
                edges.push(edges[edges.len() - 1] + length);
                edges
            })
        };
        // An assignment's number is that of its token, times two, and which of the token's experts it is.
        let assignment = |expert: usize, token: usize| {
            token * TOP_K + usize::from((0..expert).any(|other| self.lists[other].contains(&token)))
        };
        let order = self.lists.iter().enumerate().flat_map(|(e, list)| list.iter().map(move |&t| assignment(e, t)));
        let lengths: Vec<usize> = self.lists.iter().map(Vec::len).collect();
        let ints = [tokens, LENGTHS.len()].into_iter().chain(edges(&LENGTHS)).chain(edges(&lengths)).chain(order);
        let mut bytes: Vec<u8> = ints.flat_map(|n| i32::try_from(n).unwrap().to_le_bytes()).collect();
        bytes.extend(self.rows.iter().flat_map(|row| bf16(row)));
        bytes.extend(self.in_order.iter().flatten().flat_map(|x| x.to_le_bytes()));
        bytes
    }

    /// What the CPU makes of the rows at some places, in two steps. Each place has its token.
    fn observed(&self, width: usize, moments: bool, places: &[(usize, &[f32])]) -> Observed {
        let mut observed = Observed::new(width, moments);
        for _ in 0..2 {
            let mut end = 0;
            for length in LENGTHS {
                let tokens = end..end + length;
                end = tokens.end;
                let rows: Vec<&[f32]> =
                    places.iter().filter(|(token, _)| tokens.contains(token)).map(|(_, row)| *row).collect();
                observed.add(&rows);
            }
        }
        observed
    }
}

fn bf16(row: &[f32]) -> Vec<u8> {
    row.iter().flat_map(|x| u16::try_from(x.to_bits() >> 16).unwrap().to_le_bytes()).collect()
}

/// What the program writes, list by list.
fn summed(output: &mut &[u8], lists: usize, width: usize, moments: bool) -> Vec<Observed> {
    let mut take = |bytes: usize| {
        let (taken, rest) = output.split_at(bytes);
        *output = rest;
        taken.to_vec()
    };
    let (counts, amax, sums) = (take(8 * lists), take(4 * lists), take(8 * lists * width * BLOCK));
    (0..lists)
        .map(|list| {
            let sums = sums[list * 8 * width * BLOCK..][..8 * width * BLOCK].as_chunks().0;
            let products = if moments { sums.iter().map(|&b| f64::from_le_bytes(b)).collect() } else { Vec::new() };
            let (count, amax) = (counts.as_chunks().0[list], amax.as_chunks().0[list]);
            Observed::from_sums(width, u64::from_le_bytes(count), f32::from_le_bytes(amax), products)
        })
        .collect()
}

#[test]
fn kernels_sum_up_as_the_definition_does() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("observe");
    let mut compile = Command::new("c++");
    compile.args(["-std=c++20", "-O1", "-ffp-contract=off", "-pthread", "-w", "-I"]).arg(here.join("../../kernels"));
    compile.arg(here.join("tests/headers/observe.cpp")).arg("-o").arg(&program);
    match compile.status() {
        Err(error) => return println!("skipped: no C++ compiler: {error}"),
        Ok(status) => assert!(status.success(), "{compile:?}"),
    }
    let step = Step::new();
    let mut child = Command::new(&program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&step.bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let mut output = output.stdout.as_slice();

    let of_tokens: Vec<(usize, &[f32])> = step.rows.iter().map(Vec::as_slice).enumerate().collect();
    for moments in [true, false] {
        let found = summed(&mut output, 1, WIDTHS[0], moments);
        let expected = step.observed(WIDTHS[0], moments, &of_tokens);
        assert!(found[0].statistics() == expected.statistics(), "all tokens, moments {moments}");
    }
    let starts: Vec<usize> = (0..EXPERTS).map(|expert| step.lists[..expert].iter().map(Vec::len).sum()).collect();
    let found = [summed(&mut output, EXPERTS, WIDTHS[0], true), summed(&mut output, EXPERTS, WIDTHS[1], true)];
    assert!(output.is_empty());
    for (expert, list) in step.lists.iter().enumerate() {
        let gathered: Vec<(usize, &[f32])> = list.iter().map(|&token| (token, step.rows[token].as_slice())).collect();
        let in_order = list.iter().enumerate().map(|(i, &token)| (token, step.in_order[starts[expert] + i].as_slice()));
        let expected =
            [step.observed(WIDTHS[0], true, &gathered), step.observed(WIDTHS[1], true, &in_order.collect::<Vec<_>>())];
        for (found, expected) in found.iter().zip(&expected) {
            assert!(found[expert].statistics() == expected.statistics(), "expert {expert}");
            assert_eq!(expected.statistics().tokens, 2 * list.len() as u64);
        }
    }
}

#[test]
fn kernels_compile_without_defects() {
    let nvrtc = match Nvrtc::load(&Search::from_environment()) {
        Ok(nvrtc) => nvrtc,
        Err(error) => return println!("skipped: {error}"),
    };
    let compiler = Compiler::new(nvrtc, Sources::embedded());
    for symbol in ["observe::experts<f16_t, 200, 2, false, true>", "observe::tokens<bf16_t, 1024, false>"] {
        let (header, symbol) = ("observe/rows.cuh".into(), symbol.to_owned());
        let kernel = Kernel { header, symbol, threads: 160, shared_bytes: 0, family: Family::Portable };
        let compiled = compiler.compile(&kernel, Code::Sass(Arch::SM_90A)).unwrap();
        assert_eq!(compiled.defects, [], "{}\n{}", kernel.symbol, compiled.log);
    }
}
