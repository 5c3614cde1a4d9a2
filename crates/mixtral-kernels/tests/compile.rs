//! Compiles with a real NVRTC. Without NVRTC these tests say so and pass.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

use mixtral_engine::{Epilogue, Op, Rows};
use mixtral_kernels::{
    Arch, Cache, Code, CompileError, Compiler, Defect, Family, Kernel, Nvrtc, Schedule, Search, Sources, Target,
    compile_all,
};
use mixtral_model::{CacheFormat, DType, ElemType};
use mixtral_testkit::assembly::Assembly;

/// Three small kernels written like the real ones: a good one, one that spills, and one whose wgmma is serialised.
const HEADERS: &[(&str, &str)] = &[
    ("base/types.cuh", include_str!("../../../kernels/base/types.cuh")),
    ("ptx/pdl.cuh", include_str!("../../../kernels/ptx/pdl.cuh")),
    ("test/scale.cuh", include_str!("headers/scale.cuh")),
    ("test/spill.cuh", include_str!("headers/spill.cuh")),
    ("test/serial.cuh", include_str!("headers/serial.cuh")),
    ("test/wrong.cuh", "#pragma once\n__global__ void wrong(float* x) { x[0] = y; }\n"),
];

const SM_80: Code = Code::Sass(Arch::BASE);
const SM_90A: Code = Code::Sass(Arch::SM_90A);
const PTX: Code = Code::Ptx(Arch::BASE);

fn kernel(header: &'static str, symbol: &str) -> Kernel {
    Kernel { header: header.into(), symbol: symbol.to_owned(), threads: 128, shared_bytes: 0, family: Family::Portable }
}

fn scale(n: usize) -> Kernel {
    kernel("test/scale.cuh", &format!("test::scale<bf16_t, {n}>"))
}

/// `None` without NVRTC, which is printed.
fn compiler() -> Option<Compiler> {
    match Nvrtc::load(&Search::from_environment()) {
        Ok(nvrtc) => Some(Compiler::new(nvrtc, Sources::of(HEADERS))),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

#[test]
fn a_template_becomes_sass_and_ptx_with_its_resources() {
    let Some(compiler) = compiler() else { return };
    for code in [SM_80, SM_90A] {
        let compiled = compiler.compile(&scale(8), code).unwrap_or_else(|e| panic!("{e}"));
        assert!(compiled.image.starts_with(b"\x7fELF"), "a cubin is an ELF file");
        assert!(compiled.entry.starts_with("_ZN4test5scale"), "{}", compiled.entry);
        assert!(compiled.image.windows(compiled.entry.len()).any(|w| w == compiled.entry.as_bytes()));
        let resources = compiled.resources.expect("known of SASS");
        assert!((8..=64).contains(&resources.registers), "{resources:?}");
        assert_eq!((resources.static_shared, resources.stack, resources.spills), (512, 0, (0, 0)));
        assert_eq!(compiled.defects, []);
    }
    let compiled = compiler.compile(&scale(8), PTX).unwrap_or_else(|e| panic!("{e}"));
    let text = String::from_utf8(compiled.image).expect("PTX is text");
    assert!(text.contains(".target sm_80") && text.contains(&compiled.entry) && text.ends_with('\0'), "{text}");
    assert_eq!((compiled.resources, compiled.defects), (None, vec![]));
}

#[test]
fn spills_and_serialised_wgmma_are_defects() {
    let Some(compiler) = compiler() else { return };
    let spilling =
        compiler.compile(&kernel("test/spill.cuh", "test::spill<200>"), SM_80).unwrap_or_else(|e| panic!("{e}"));
    let (stores, loads) = spilling.resources.expect("known").spills;
    assert!(stores > 0 && loads > 0);
    assert_eq!(spilling.defects, [Defect::Spills { stores, loads }]);
    assert!(!spilling.defects[0].is_fatal());

    let serial = compiler.compile(&kernel("test/serial.cuh", "test::serial"), SM_90A).unwrap_or_else(|e| panic!("{e}"));
    let fatal: Vec<_> = serial.defects.iter().filter(|d| d.is_fatal()).map(ToString::to_string).collect();
    assert!(fatal.iter().any(|text| text.contains("serialized")), "{fatal:?}\n{}", serial.log);
    assert!(fatal.iter().any(|text| text.contains("'setmaxnreg' ignored")), "{fatal:?}\n{}", serial.log);
}

#[test]
fn a_refusal_names_kernel_options_place_and_a_copy_of_the_source() {
    let Some(compiler) = compiler() else { return };
    let error = compiler.compile(&kernel("test/wrong.cuh", "wrong"), SM_90A).expect_err("y is not declared");
    let text = error.to_string();
    let CompileError::Rejected { dump: Ok(folder), .. } = error else { panic!("{text}") };
    for part in [
        "cannot compile wrong for sm_90a",
        "nvrtc --std=c++17 --gpu-architecture=sm_90a",
        "test/wrong.cuh(2): error: identifier \"y\" is undefined",
        &folder.display().to_string(),
    ] {
        assert!(text.contains(part), "no `{part}` in:\n{text}");
    }
    let unit = fs::read_to_string(folder.join("mixtral.cu")).expect("written");
    assert!(unit.contains("#include \"test/wrong.cuh\""), "{unit}");
    assert!(folder.join("test/wrong.cuh").exists());
    fs::remove_dir_all(folder).expect("removable");
    let error = compiler.compile(&kernel("test/gone.cuh", "gone"), SM_80).expect_err("no such header").to_string();
    assert!(error.contains("kernels/test/gone.cuh is not among"), "{error}");
}

/// Compiles with a cache. Returns the images, how many came from the cache, and its warning.
fn batch(compiler: &Compiler, work: &[(Kernel, Code)], cache: &Cache) -> (Vec<Vec<u8>>, usize, Option<String>) {
    let batch = compile_all(compiler, work, 2, Some(cache), &|_| {}).unwrap_or_else(|e| panic!("{e}"));
    (batch.kernels.into_iter().map(|k| k.2.image).collect(), batch.from_cache, batch.cache_warning)
}

#[test]
fn the_cache_gives_what_was_compiled_and_mends_itself() {
    let Some(compiler) = compiler() else { return };
    let folder = tempfile::tempdir().expect("a temporary directory");
    let open = || Cache::new(folder.path().to_owned());
    let work: Vec<_> = [SM_80, PTX].iter().flat_map(|code| [4, 8].map(|n| (scale(n), *code))).collect();
    let (first, from_cache, warning) = batch(&compiler, &work, &open());
    assert_eq!((from_cache, warning), (0, None));
    let (second, from_cache, _) = batch(&compiler, &work, &open());
    assert_eq!((&second, from_cache), (&first, 4));

    let entry = fs::read_dir(folder.path()).expect("there").next().expect("four").expect("readable").path();
    let mut bytes = fs::read(&entry).expect("readable");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&entry, bytes).expect("writable");
    let (third, from_cache, warning) = batch(&compiler, &work, &open());
    assert_eq!((&third, from_cache), (&first, 3));
    let warning = warning.expect("it says so");
    assert!(warning.contains("is damaged; it is compiled again"), "{warning}");
    let (fourth, from_cache, warning) = batch(&compiler, &work, &open());
    assert_eq!((&fourth, from_cache, warning), (&first, 4, None));

    // A changed header that the kernels include makes them other kernels. A changed header that they do not include
    // leaves them the same.
    for (name, expected) in [("ptx/pdl.cuh", 0), ("test/spill.cuh", 4)] {
        let longer = |text| -> &'static str { Box::leak(format!("{text}// more\n").into_boxed_str()) };
        let headers: Vec<_> =
            HEADERS.iter().map(|&(n, text)| (n, if n == name { longer(text) } else { text })).collect();
        let nvrtc = Nvrtc::load(&Search::from_environment()).expect("as above");
        let (_, from_cache, _) = batch(&Compiler::new(nvrtc, Sources::of(&headers)), &work, &open());
        assert_eq!(from_cache, expected, "{name}");
    }
}

#[test]
fn a_cache_that_cannot_be_written_is_a_warning() {
    let Some(compiler) = compiler() else { return };
    let folder = tempfile::tempdir().expect("a temporary directory");
    let file = folder.path().join("file");
    fs::write(&file, "").expect("writable");
    let (images, from_cache, warning) =
        batch(&compiler, &[(scale(4), PTX), (scale(8), PTX)], &Cache::new(file.join("cache")));
    assert_eq!((images.len(), from_cache), (2, 0));
    assert!(warning.expect("it says so").contains("compiled kernels cannot be kept in"));
}

#[test]
fn two_batches_at_once_share_a_cache() {
    let Some(compiler) = compiler() else { return };
    let folder = tempfile::tempdir().expect("a temporary directory");
    let work: Vec<_> = (1..=6).map(|n| (scale(n), SM_80)).collect();
    let calls = AtomicUsize::new(0);
    let run = || {
        let cache = Cache::new(folder.path().to_owned());
        let count = |_| {
            calls.fetch_add(1, Ordering::Relaxed);
        };
        let batch = compile_all(&compiler, &work, 2, Some(&cache), &count).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(batch.cache_warning, None);
        assert_eq!(batch.kernels.iter().map(|(k, code, _)| (k.clone(), *code)).collect::<Vec<_>>(), work);
        batch.kernels.into_iter().map(|k| k.2.image).collect::<Vec<_>>()
    };
    let (one, other) = std::thread::scope(|scope| {
        let other = scope.spawn(run);
        (run(), other.join().expect("no panic"))
    });
    assert_eq!(one, other);
    assert_eq!(calls.load(Ordering::Relaxed), 12);
    assert_eq!(fs::read_dir(folder.path()).expect("there").count(), 6, "one entry a kernel and nothing temporary");
}

#[test]
fn one_bad_kernel_fails_the_batch_by_name() {
    let Some(compiler) = compiler() else { return };
    let work = [(scale(4), SM_80), (kernel("test/wrong.cuh", "wrong"), SM_80), (scale(8), SM_80)];
    let error = compile_all(&compiler, &work, 2, None, &|_| {}).expect_err("one is wrong");
    assert!(error.to_string().starts_with("cannot compile wrong for sm_80: "), "{error}");
    if let CompileError::Rejected { dump: Ok(folder), .. } = error {
        fs::remove_dir_all(folder).expect("removable");
    }
}

/// The attention kernel of this name for groups of `group` heads.
fn attention(name: &str, dtype: DType, head_dim: usize, group: usize, window: Option<usize>, family: Family) -> Kernel {
    attention_over(CacheFormat::Plain, false, name, dtype, head_dim, group, window, family)
}

/// The same over a cache of this format, and with prompts in fp8 or not.
fn attention_over(
    format: CacheFormat,
    fp8_context: bool,
    name: &str,
    dtype: DType,
    head_dim: usize,
    group: usize,
    window: Option<usize>,
    family: Family,
) -> Kernel {
    let (mut a, kv_heads) = (Assembly::new(dtype), 2);
    let heads = kv_heads * group;
    (a.program.kv.num_kv_heads, a.program.kv.head_dim, a.program.limits.block_size) = (kv_heads, head_dim, 64);
    let query = a.activation("qkv", Rows::Tokens, (heads + 2 * kv_heads) * head_dim);
    let out = a.activation("out", Rows::Tokens, heads * head_dim);
    if name.starts_with("rope") {
        let directions = (format == CacheFormat::Fp8).then(|| "directions".to_owned());
        a.declare("directions", DType::F32, &[kv_heads, head_dim]);
        a.op(Op::RopeWriteKv { qkv: query.clone(), num_heads: heads, theta: 1e6, layer: 0, directions });
    }
    a.op(Op::Attention { query, num_heads: heads, window, fp8_context, layer: 0, out });
    a.program.kv.format = format;
    let schedule = Schedule::new(&a.program, Target { family }).expect("kernels");
    let kernel = schedule.kernels().into_iter().find(|kernel| kernel.symbol.contains(&format!("::{name}<"))).cloned();
    kernel.expect("attention")
}

/// The kernels of a header for a dense linear, gate/up and down of experts, with weights of one format.
fn linears_of(dtype: DType, word: &str, header: &str, code: Code) -> Vec<(Kernel, Code)> {
    linears_of_width(1024, dtype, word, header, code)
}

/// The same of hidden states of `hidden` elements.
fn linears_of_width(hidden: usize, dtype: DType, word: &str, header: &str, code: Code) -> Vec<(Kernel, Code)> {
    let mut a = Assembly::new(dtype);
    let (inter, name) = (512, str::to_owned);
    (a.program.num_experts, a.program.top_k) = (8, 2);
    for (buffer, rows, cols) in [
        ("x", Rows::Tokens, hidden),
        ("sum", Rows::Tokens, hidden),
        ("inner", Rows::Assignments, inter),
        ("outer", Rows::Assignments, hidden),
    ] {
        a.activation(buffer, rows, cols);
    }
    a.buffer("offsets", ElemType::I32, Rows::One, 9);
    a.buffer("order", ElemType::I32, Rows::Assignments, 1);
    for (weight, shape) in
        [("o", &[hidden, hidden][..]), ("fc", &[8, 2 * inter, hidden]), ("proj", &[8, hidden, inter])]
    {
        a.declare(weight, dtype, shape);
        a.program.weights.last_mut().expect("just declared").format = word.parse().expect("a format");
    }
    let (lists, ladder) = ((name("offsets"), name("order")), vec![]);
    let (input, weight, out) = (name("x"), name("o"), name("sum"));
    let (residual, epilogue) = (Some(name("x")), Epilogue::Residual);
    a.op(Op::Linear { input, weight, rows: None, epilogue, residual, out, ladder: ladder.clone() });
    let (offsets, order) = lists.clone();
    let (input, weight, out) = (name("x"), name("fc"), name("inner"));
    a.op(Op::ExpertGateUp { input, weight, offsets, order, silu_mul: true, out, ladder: ladder.clone() });
    let ((offsets, order), input, weight, out) = (lists, name("inner"), name("proj"), name("outer"));
    a.op(Op::ExpertDown { input, weight, offsets, order, out, ladder });
    (a.program.limits.max_num_tokens, a.program.limits.max_seq_len) = (4096, 4096);
    let schedule = Schedule::new(&a.program, Target { family: code.family() }).expect("kernels");
    schedule
        .kernels()
        .into_iter()
        .filter(|kernel| kernel.header == header)
        .map(|kernel| (kernel.clone(), code))
        .collect()
}

/// Checks that kernels compile without defects and without a stack.
fn assert_clean(work: &[(Kernel, Code)]) {
    let compiler = match Nvrtc::load(&Search::from_environment()) {
        Ok(nvrtc) => Compiler::new(nvrtc, Sources::embedded()),
        Err(error) => return println!("skipped: {error}"),
    };
    let cache = Cache::folder_from_environment().map(Cache::new);
    let batch = compile_all(&compiler, work, 2, cache.as_ref(), &|_| {}).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(batch.kernels.len(), work.len());
    for (kernel, code, compiled) in batch.kernels {
        let resources = compiled.resources.expect("known of SASS");
        println!("{} for {code}: {} registers", kernel.symbol, resources.registers);
        assert_eq!(compiled.defects, [], "{} for {code}", kernel.symbol);
        assert_eq!(resources.stack, 0, "{} for {code}", kernel.symbol);
    }
}

#[test]
fn prefill_attention_spills_nothing_and_is_not_serialised() {
    let prefill = |dtype, head_dim, group, window| {
        (attention("prefill_wgmma", dtype, head_dim, group, window, Family::Hopper), SM_90A)
    };
    let mut work = Vec::new();
    for head_dim in [64, 128] {
        for group in [1, 3, 4, 6, 8] {
            work.push(prefill(DType::Bf16, head_dim, group, None));
            work.push(prefill(DType::F16, head_dim, group, Some(4096)));
        }
        work.push(prefill(DType::Bf16, head_dim, 4, Some(100)));
        work.push(prefill(DType::F16, head_dim, 4, None));
    }
    assert_clean(&work);
}

#[test]
fn decode_attention_spills_nothing() {
    let mut work = Vec::new();
    for head_dim in [64, 128] {
        for (group, dtype, window) in [
            (1, DType::Bf16, None),
            (3, DType::F16, Some(100)),
            (4, DType::Bf16, None),
            (4, DType::F16, Some(4096)),
            (6, DType::Bf16, Some(4096)),
            (8, DType::F16, None),
            (16, DType::Bf16, None),
            (30, DType::F16, Some(100)),
        ] {
            work.push((attention("decode_tma", dtype, head_dim, group, window, Family::Hopper), SM_90A));
            if group <= 8 {
                work.push((attention("rope_decode_tma", dtype, head_dim, group, window, Family::Hopper), SM_90A));
            }
            let portable = attention("decode_paged", dtype, head_dim, group, window, Family::Portable);
            work.extend([(portable.clone(), SM_80), (portable, SM_90A)]);
        }
    }
    assert_clean(&work);
}

#[test]
fn attention_over_an_fp8_cache_spills_nothing_and_is_not_serialised() {
    let of = |name, dtype, head_dim, group, window, family| {
        attention_over(CacheFormat::Fp8, name == "prefill_e4m3", name, dtype, head_dim, group, window, family)
    };
    let mut work = Vec::new();
    for (dtype, group, window) in [(DType::Bf16, 4, None), (DType::F16, 6, Some(4096))] {
        for name in ["decode_tma", "rope_decode_tma", "prefill_fp8", "prefill_e4m3"] {
            work.push((of(name, dtype, 128, group, window, Family::Hopper), SM_90A));
        }
        for name in ["decode_paged", "prefill_paged"] {
            work.push((of(name, dtype, 128, group, window, Family::Portable), SM_80));
        }
    }
    work.push((of("decode_paged", DType::Bf16, 64, 8, None, Family::Hopper), SM_90A));
    work.push((of("simt", DType::F16, 48, 3, Some(100), Family::Portable), SM_80));
    for (name, dtype, head_dim) in
        [("prefill_paged", DType::Bf16, 128), ("prefill_paged", DType::F16, 64), ("simt", DType::F32, 48)]
    {
        work.push((attention_over(CacheFormat::Fp8, true, name, dtype, head_dim, 4, None, Family::Portable), SM_80));
    }
    assert_clean(&work);
}

#[test]
fn packed_linears_of_many_tokens_spill_nothing_and_are_not_serialised() {
    let formats = [
        (DType::Bf16, "int4:g128:bf16"),
        (DType::Bf16, "int8:row:f32"),
        (DType::F16, "int4:g128:f16:zeros"),
        (DType::Bf16, "int8:g64:f32:zeros"),
    ];
    let of = |(dtype, word): &(DType, &str)| linears_of(*dtype, word, "linear/wgmma.cuh", SM_90A);
    let work: Vec<_> = formats.iter().flat_map(of).collect();
    assert!(work.len() >= 4 * 3 * 3, "{} kernels", work.len());
    assert_clean(&work);
}

#[test]
fn packed_linears_of_few_tokens_spill_nothing() {
    let formats = [
        (DType::Bf16, "int4:g128:bf16"),
        (DType::F16, "int4:g32:f32:zeros"),
        (DType::Bf16, "int8:row:bf16:zeros"),
        (DType::F16, "int8:g64:f16"),
    ];
    let mut work = Vec::new();
    for (dtype, word) in formats {
        work.extend(linears_of(dtype, word, "linear/stream.cuh", SM_90A));
        work.extend(linears_of(dtype, word, "linear/mma.cuh", SM_80));
        // (The experts' strips differ in where tokens lie and results go.)
        let strips = linears_of(dtype, word, "linear/strip.cuh", SM_80).into_iter();
        work.extend(strips.filter(|(kernel, _)| kernel.symbol.contains("strip_dense")));
    }
    assert!(work.len() >= 4 * 3 * 5, "{} kernels", work.len());
    // Sixteen warps that multiply leave each the fewest registers.
    for (dtype, word) in
        [(DType::Bf16, "int8:row:f32"), (DType::F16, "int8:row:bf16:zeros"), (DType::Bf16, "int4:g128:bf16")]
    {
        let wide = linears_of_width(4096, dtype, word, "linear/stream.cuh", SM_90A);
        let before = work.len();
        work.extend(wide.into_iter().filter(|(kernel, _)| kernel.threads == 17 * 32));
        assert!(work.len() > before, "{word} has no kernel of so many warps");
    }
    assert_clean(&work);
}

#[test]
fn fp8_linears_spill_nothing_and_are_not_serialised() {
    // The widest tiles, and those of one token.
    let some = |work: Vec<(Kernel, Code)>, tiles: &[&str]| -> Vec<(Kernel, Code)> {
        let is_one = |kernel: &Kernel| tiles.iter().any(|tile| kernel.symbol.contains(&format!(">, {tile},")));
        work.into_iter().filter(|(kernel, _)| is_one(kernel)).collect()
    };
    let wgmma = linears_of(DType::Bf16, "fp8", "linear/wgmma.cuh", SM_90A);
    let mut work = some(wgmma, &["256, 144", "128, 192", "64, 8", "32, 64"]);
    assert!(work.len() >= 4 * 2, "{} kernels", work.len());
    work.extend(some(linears_of(DType::F16, "fp8", "linear/mma.cuh", SM_80), &["64, 64"]));
    work.extend(linears_of(DType::Bf16, "fp8", "linear/strip.cuh", SM_80).into_iter().take(4));
    for (word, tiles) in
        [("fp8:row:static", &["256, 144", "128, 192"][..]), ("fp8:row:token", &["256, 144", "128, 192", "64, 8"])]
    {
        work.extend(some(linears_of(DType::Bf16, word, "linear/wgmma.cuh", SM_90A), tiles));
        work.extend(some(linears_of(DType::F16, word, "linear/mma.cuh", SM_80), &["64, 64"]));
    }
    work.extend(linears_of(DType::F16, "fp8:row:token", "elementwise/round.cuh", SM_80).into_iter().take(1));
    work.extend(linears_of(DType::F32, "fp8", "linear/simt.cuh", SM_80).into_iter().take(1));
    // It rounds by an instruction, and by integers where there is none.
    for code in [SM_80, SM_90A] {
        work.extend(linears_of(DType::Bf16, "fp8", "elementwise/round.cuh", code).into_iter().take(1));
    }
    assert_clean(&work);
}

#[test]
fn sums_of_many_ranks_spill_nothing() {
    let of = |symbol: &str| Kernel {
        header: "collective/all_reduce.cuh".into(),
        symbol: format!("exchange::{symbol}"),
        threads: 512,
        shared_bytes: 0,
        family: Family::Portable,
    };
    let float = of("all_reduce<float, float, 4096, 3, step::Rows::TOKENS, true, true>");
    let slices = of("combine_all_reduce<bf16_t, bf16_t, 4096, 2, 0, 8, true, 4, true, true>");
    // Mixtral 8x22B's rows, which leave few registers.
    let whole = of("combine_all_reduce<bf16_t, bf16_t, 6144, 2, 0, 1, false, 8, true, true>");
    assert_clean(&[(float, SM_80), (slices, SM_80), (whole.clone(), SM_80), (whole, SM_90A)]);
}
