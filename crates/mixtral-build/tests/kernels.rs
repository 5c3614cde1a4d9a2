//! Every kernel of the models that matter compiles for Ampere and for Hopper without a warning, a spill or a serialised
//! wgmma. The tests need NVRTC but no GPU. Without NVRTC they say so and pass.

use std::collections::BTreeSet;

use mixtral_build::{BuildOptions, DenseLinears, KernelOptions, plan};
use mixtral_checkpoint::CheckpointConfig;
use mixtral_convert::recipes;
use mixtral_engine::{Limits, Program};
use mixtral_kernels::{
    Arch, Cache, Code, CompileError, Compiler, Executable, Family, Kernel, Nvrtc, Schedule, Search, Sources, Target,
    compile_all, needed,
};
use mixtral_model::{CacheFormat, DType, Mapping, ModelConfig, Rank};

fn kernel_options(archs: Vec<Arch>) -> KernelOptions {
    KernelOptions {
        archs,
        dense_linears: DenseLinears::Tuned,
        tuned_experts: true,
        workers: std::thread::available_parallelism().map_or(1, usize::from),
        nvrtc: Search::from_environment(),
        cache: Cache::folder_from_environment(),
    }
}

/// The programs of a model with dummy weights, as `mixtral build` makes them.
fn programs(model: ModelConfig, mapping: Mapping, kernels: &KernelOptions) -> Vec<Program> {
    let config = CheckpointConfig::new(model, mapping);
    let options = BuildOptions {
        limits: Limits {
            max_batch_size: 64,
            max_num_tokens: 8192,
            max_seq_len: config.model.max_position_embeddings.min(4096),
            max_num_logits: 64,
            block_size: 64,
        },
        gather_context_logits: false,
        fp8_context: false,
        recorded: Default::default(),
        workers: 1,
        kernels: Some(kernels.clone()),
        memory_budget: None,
    };
    let mut programs = plan(&config, &options).unwrap();
    for program in &mut programs {
        for recipe in recipes(&config, Rank(program.rank), false) {
            program
                .weights
                .iter_mut()
                .filter(|w| w.name == recipe.name)
                .for_each(|w| w.pieces.clone_from(&recipe.pieces));
        }
    }
    programs
}

/// A small model whose sizes are multiples of no vector or tile.
fn odd(dtype: DType) -> ModelConfig {
    let mut model = ModelConfig::mixtral_8x7b(dtype);
    (model.num_layers, model.hidden_size, model.intermediate_size, model.vocab_size) = (2, 36, 44, 101);
    (model.num_heads, model.num_kv_heads, model.head_dim, model.sliding_window) = (6, 2, 10, Some(9));
    model.max_position_embeddings = 64;
    model
}

/// The model of examples/tiny-mixtral, in another type.
fn tiny(dtype: DType) -> ModelConfig {
    let mut model = ModelConfig::mixtral_8x7b(dtype);
    (model.num_layers, model.hidden_size, model.intermediate_size, model.vocab_size) = (4, 192, 192, 2048);
    (model.num_heads, model.num_kv_heads, model.head_dim, model.max_position_embeddings) = (6, 2, 32, 512);
    model
}

/// Layers that are alike are written once: 56 layers take no more lines than 32, and few in both cases.
#[test]
fn schedules_of_large_models_are_short_and_read_back() {
    let options = kernel_options(vec![Arch::SM_90A]);
    let codes = options.codes();
    let lines = [ModelConfig::mixtral_8x7b(DType::Bf16), ModelConfig::mixtral_8x22b(DType::Bf16)].map(|model| {
        let program = programs(model, Mapping::single(), &options).remove(0);
        needed::schedules(&program, &codes)
            .unwrap()
            .into_values()
            .map(|schedule| {
                let text = schedule.to_text();
                assert_eq!(Schedule::parse(&text, &program).unwrap(), schedule);
                println!("{:?}: {} lines, {} bytes", schedule.family, text.lines().count(), text.len());
                text.lines().count()
            })
            .collect::<Vec<_>>()
    });
    assert_eq!(lines[0], lines[1], "lines of Mixtral 8x7B and 8x22B");
    assert!(lines[0].iter().all(|&lines| lines < 700), "{lines:?}");
}

#[test]
fn every_kernel_compiles_without_a_defect() {
    let options = kernel_options(vec![Arch::BASE, Arch::SM_90A]);
    let sass: BTreeSet<Code> = options.codes().into_iter().filter(|code| matches!(code, Code::Sass(_))).collect();
    assert_eq!(sass.len(), 2);
    let (large, small) = ([DType::Bf16, DType::F16], [DType::F32, DType::Bf16]);
    let models = large.iter().flat_map(|d| [ModelConfig::mixtral_8x7b(*d), ModelConfig::mixtral_8x22b(*d)]);
    let models = models.chain(small.iter().flat_map(|d| [odd(*d), tiny(*d)]));
    let with_cache = |model| ModelConfig { cache: CacheFormat::Fp8, key_directions: true, ..model };
    let models =
        models.chain([ModelConfig::mixtral_8x7b, ModelConfig::mixtral_8x22b].map(|of| with_cache(of(DType::Bf16))));
    let programs: Vec<_> = models.flat_map(|model| programs(model, Mapping::single(), &options)).collect();
    let needed = programs.iter().map(|program| needed::kernels(&needed::schedules(program, &sass).unwrap(), &sass));
    let work: Vec<(Kernel, Code)> = needed.flatten().collect::<BTreeSet<_>>().into_iter().collect();
    assert!(work.iter().any(|(kernel, _)| kernel.family == Family::Hopper));

    let nvrtc = match Nvrtc::load(&options.nvrtc) {
        Ok(nvrtc) => nvrtc,
        Err(error) => return println!("skipped: {error} (cargo xtask test installs it)"),
    };
    let compiler = Compiler::new(nvrtc, Sources::embedded());
    let cache = options.cache.map(Cache::new);
    let batch = compile_all(&compiler, &work, options.workers, cache.as_ref(), &|_| {});
    let batch = batch.unwrap_or_else(|e: CompileError| panic!("{e}"));
    println!("{} kernels, {} from the cache", work.len(), batch.from_cache);
    let defects = batch.kernels.iter().flat_map(|(kernel, code, compiled)| {
        compiled.defects.iter().map(move |defect| format!("{} for {code}: {defect}", kernel.symbol))
    });
    // Symbols with internal linkage contain the compiler's process id. With them, an engine would not be reproducible.
    let own = batch.kernels.iter().filter(|(_, _, compiled)| compiled.image.windows(10).any(|w| w == b"_INTERNAL_"));
    let own = own.map(|(kernel, code, _)| format!("{} for {code}: a constant without `inline`", kernel.symbol));
    let defects: Vec<_> = defects.chain(own).collect();
    assert!(defects.is_empty(), "{}", defects.join("\n"));
}

#[test]
fn ladders_follow_the_plugins_and_the_architectures() {
    let plans = |options: &KernelOptions| {
        let program = programs(ModelConfig::mixtral_8x7b(DType::Bf16), Mapping::single(), options).remove(0);
        let rungs = |prefix: &str| {
            let lines = program.to_text();
            let line = lines.lines().find(|line| line.starts_with(prefix)).expect("every model has one").to_owned();
            (line.contains("wgmma:"), line.contains("\"mma:"), line.contains("\"cublaslt\""))
        };
        (rungs("op linear"), rungs("op expert_gate_up"))
    };
    let (tuned, portable) = ((true, false, false), (false, true, false));
    let both = kernel_options(vec![Arch::BASE, Arch::SM_90A]);
    assert_eq!(plans(&both), (tuned, tuned));
    assert_eq!(plans(&KernelOptions { dense_linears: DenseLinears::Portable, ..both.clone() }), (portable, tuned));
    let cublaslt = |options: KernelOptions| KernelOptions { dense_linears: DenseLinears::CublasLt, ..options };
    assert_eq!(plans(&cublaslt(both.clone())), ((true, false, true), tuned), "short steps keep their kernels");
    assert_eq!(plans(&cublaslt(kernel_options(vec![Arch::BASE]))), ((false, true, true), portable));
    assert_eq!(plans(&KernelOptions { tuned_experts: false, ..both.clone() }), (tuned, portable));
    let neither = KernelOptions { dense_linears: DenseLinears::Portable, tuned_experts: false, ..both };
    assert_eq!(plans(&neither), (portable, portable));
    let names = |options: &KernelOptions| options.codes().iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(names(&neither), ["sm_80", "sm_90", "compute_80"], "without Hopper's own instructions");
    assert_eq!(plans(&kernel_options(vec![Arch::BASE])), (portable, portable));
}

#[test]
fn a_program_with_another_window_gets_what_a_build_would_give_it() {
    let options = kernel_options(vec![Arch::BASE, Arch::SM_90A]);
    if let Err(error) = Nvrtc::load(&options.nvrtc) {
        return println!("skipped: {error} (cargo xtask test installs it)");
    }
    let of = |sliding_window| {
        let model = ModelConfig { sliding_window, ..tiny(DType::Bf16) };
        let program = programs(model, Mapping::single(), &options).remove(0);
        let kernels = options.compile(std::slice::from_ref(&program), &|_, _| ()).unwrap();
        let executables = kernels.ranks[0].iter().map(|images| {
            let schedule = kernels.schedules[0][&images.code.family()].clone();
            Executable { schedule, images: images.clone() }
        });
        (program, executables.collect::<Vec<_>>())
    };
    let ((mut program, held), (expected, built)) = (of(None), of(Some(100)));
    program.narrow_attention(0, &[100]);
    assert_eq!(program, expected);
    for (held, built) in held.iter().zip(&built) {
        let schedule = Schedule::new(&program, Target { family: held.images.code.family() }).unwrap();
        assert_eq!(schedule, built.schedule);
        let adapted = options.executable(schedule, held.images.clone()).unwrap();
        let kernels = adapted.schedule.kernels();
        assert!(kernels.iter().all(|kernel| adapted.images.find(kernel) == built.images.find(kernel)));
        // Those of attention; all others are the engine's.
        let compiled = adapted.images.iter().count() - held.images.iter().count();
        assert!((1..=6).contains(&compiled) && compiled < kernels.len() / 4, "{compiled} of {}", kernels.len());
        // Nothing is missing then, and no compiler is asked for.
        let nvrtc = Search { only: Some("/nowhere".into()), ..Search::default() };
        let without = KernelOptions { nvrtc, ..options.clone() };
        assert_eq!(without.executable(adapted.schedule.clone(), adapted.images.clone()).unwrap(), adapted);
    }
}
