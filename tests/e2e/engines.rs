//! Engines of other builds of `mixtral` on a GPU: they run as they were built, or the error says what to do. The tests
//! have a driver of their own, which refuses launches whose parameters are not the kernel's.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use mixtral_engine::dir::weights_file_name;
use mixtral_engine::{EngineDir, EngineWriter, Program};
use mixtral_kernels::{
    Arch, Cache, Code, Compiler, Executable, Family, KernelImages, Nvrtc, Schedule, Search, Target, compile_all,
};
use mixtral_model::Rank;
use tempfile::TempDir;

use crate::drivers::{RUN, driver, refused, with_driver};
use crate::kernels::has_nvrtc;
use crate::tool::{example_engine, mixtral_in, mixtral_with};

#[path = "../../crates/mixtral-cuda/tests/gpu/other_build.rs"]
mod other_build;

const CODE: Code = Code::Sass(Arch::SM_90A);

/// The tests' driver, and an engine of the example model with kernels for its GPU. `None` if either cannot be made on
/// this machine.
fn driver_and_engine() -> Option<(TempDir, TempDir)> {
    let driver = driver(&[])?;
    has_nvrtc().then(|| (driver, example_engine("--dtype auto", "--arch sm_90a")))
}

/// Writes the engine `from`, which has one rank, to `to` with other images.
fn rewrite(from: &Path, to: &Path, change: impl FnOnce(&Program, &mut BTreeMap<String, Vec<u8>>)) {
    let engine = EngineDir::open(from).unwrap();
    let program = engine.program(Rank(0)).unwrap();
    let names = engine.images(Rank(0)).unwrap();
    let mut images = names.into_iter().map(|name| (name.to_owned(), engine.image(Rank(0), name).unwrap())).collect();
    change(&program, &mut images);
    let writer = EngineWriter::create(to).unwrap();
    let mut config = engine.config().clone();
    config.ranks = vec![writer.rank(&program, &images, Some(&from.join(weights_file_name(Rank(0))))).unwrap()];
    for (name, hash) in &config.files {
        writer.copy_in(name, &from.join(name), Some(hash)).unwrap();
    }
    writer.finish(config).unwrap();
}

/// A program's kernels and schedule as another build would make them.
fn of_another_build(program: &Program) -> Executable {
    let schedule = other_build::lowered(Schedule::new(program, Target { family: Family::Hopper }).unwrap());
    let compiler = Compiler::new(Nvrtc::load(&Search::from_environment()).unwrap(), other_build::sources());
    let work: Vec<_> = schedule.kernels().into_iter().map(|kernel| (kernel.clone(), CODE)).collect();
    let cache = Cache::folder_from_environment().map(Cache::new);
    let batch = compile_all(&compiler, &work, 2, cache.as_ref(), &|_| ()).unwrap();
    let images = KernelImages::new(CODE, batch.kernels.iter().map(|(kernel, _, compiled)| (kernel, compiled)));
    Executable { schedule, images }
}

#[test]
fn an_engine_of_another_build_is_launched_as_it_was_built() {
    let Some((driver, dir)) = driver_and_engine() else { return };
    let (driver, dir) = (driver.path(), dir.path());
    let run = |engine: &str| with_driver(driver, dir, &format!("{RUN} --engine-dir {engine}"), &[]);
    let own = run("engine_outputs").ok();
    let engine = dir.join("engine_outputs");
    let other = |schedule: bool| {
        move |program: &Program, images: &mut BTreeMap<String, Vec<u8>>| {
            let other = of_another_build(program);
            images.insert(CODE.image_name(), other.images.to_bytes());
            if schedule {
                let text = other.schedule.to_text().into_bytes();
                images.insert(Family::Hopper.schedule_name().to_owned(), text);
            }
        }
    };
    rewrite(&engine, &dir.join("other"), other(true));
    assert_eq!(run("other").ok(), own);

    // With this build's schedule, the other build's kernels would read parameters that are not there. Loading refuses
    // this …
    rewrite(&engine, &dir.join("mixed"), other(false));
    let loaded = refused(run("mixed"), driver);
    // … and if the driver cannot list a kernel's parameters, the tests' driver refuses the launch.
    let old = self::driver(&["-DBEFORE_12_4"]).unwrap();
    let launched = refused(with_driver(old.path(), dir, &format!("{RUN} --engine-dir mixed"), &[]), driver);
    assert!(launched.contains("driver: 7 parameters for _ZN5embed5embed"), "{launched}");
    assert_eq!(with_driver(old.path(), dir, &format!("{RUN} --engine-dir other"), &[]).ok(), own);
    insta::assert_snapshot!(loaded);
}

#[test]
fn an_engine_that_this_version_cannot_launch_says_so_and_is_mended() {
    let Some((driver, dir)) = driver_and_engine() else { return };
    let (driver, dir) = (driver.path(), dir.path());
    let engine = dir.join("engine_outputs");
    let on_cpu = |name: &str| {
        mixtral_in(dir, &format!("run --backend cpu --max_output_len 4 --engine-dir {name}"), &["--input_text", "KING"])
            .ok()
    };
    let (expected, on_gpu) = (on_cpu("engine_outputs"), with_driver(driver, dir, RUN, &[]).ok());
    let schedule = Family::Hopper.schedule_name();
    let edited = |from: &'static str, to: &'static str| {
        move |images: &mut BTreeMap<String, Vec<u8>>| {
            let text = String::from_utf8(images[schedule].clone()).unwrap();
            assert!(text.contains(from), "no `{from}` in\n{text}");
            images.insert(schedule.to_owned(), text.replacen(from, to, 1).into_bytes());
        }
    };
    type Change = Box<dyn Fn(&mut BTreeMap<String, Vec<u8>>)>;
    let changes: [(&str, Change); 5] = [
        // An engine from before engines held schedules.
        ("old", Box::new(|images| images.retain(|name, _| !name.starts_with("schedule.")))),
        ("newer", Box::new(edited("mixtral-schedule 1", "mixtral-schedule 7"))),
        ("splits", Box::new(edited("\"decode_split\":256", "\"decode_split\":128"))),
        ("renamed", Box::new(edited("\"top_k\":", "\"k\":"))),
        ("outside", Box::new(edited("{\"buffer\":0}", "{\"buffer\":4000}"))),
    ];
    let mut said = String::new();
    for (name, change) in changes {
        rewrite(&engine, &dir.join(name), |_, images| change(images));
        mixtral_in(dir, &format!("verify {name}"), &[]).ok();
        let message = refused(with_driver(driver, dir, &format!("{RUN} --engine-dir {name}"), &[]), driver);
        said.push_str(&format!("# {name}\n{message}"));
        // The CPU needs no schedule.
        assert_eq!(on_cpu(name), expected);
        let weights = |name: &str| fs::metadata(dir.join(name).join(weights_file_name(Rank(0)))).unwrap().ino();
        let before = weights(name);
        mixtral_in(dir, &format!("build --from-engine {name}"), &[]).ok();
        assert_eq!(weights(name), before, "the weights are the file that they were");
        mixtral_in(dir, &format!("verify {name}"), &[]).ok();
        assert_eq!(with_driver(driver, dir, &format!("{RUN} --engine-dir {name}"), &[]).ok(), on_gpu);
        assert_eq!(on_cpu(name), expected);
        assert_eq!(
            fs::read(dir.join(name).join("rank0.engine")).unwrap(),
            fs::read(engine.join("rank0.engine")).unwrap()
        );
    }
    insta::assert_snapshot!(said);
}

/// If a build is interrupted, or cannot be done, the engine that was there stays.
#[test]
fn from_engine_leaves_what_it_cannot_build() {
    let Some((_, dir)) = driver_and_engine() else { return };
    let dir = dir.path();
    let files = || -> BTreeMap<String, Vec<u8>> {
        // The lock file is left out: a run that fails writes its reason there.
        let entries = fs::read_dir(dir.join("engine_outputs")).unwrap().map(|entry| entry.unwrap());
        let entries = entries.filter(|entry| entry.file_name() != ".mixtral-lock");
        entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
    };
    let before = files();
    let mut said = String::new();
    let mut refuse = |flags: &str, variables: &[(&str, &Path)], code: i32| {
        let found = mixtral_with(dir, variables, &format!("build --from-engine engine_outputs {flags}"), &[]);
        assert_eq!(found.code, code, "{}{}", found.out, found.err);
        let message = found.err.replace(&dir.display().to_string(), "DIR");
        said.push_str(&format!("# {flags}\n{}\n", message.lines().next().unwrap_or_default()));
        assert!(files() == before, "{flags}: the engine was changed");
    };
    for flags in [
        "--checkpoint-dir tllm_checkpoint",
        "--model-config mixtral-8x7b",
        "--output-dir elsewhere",
        "--max-batch-size 8",
        "--max_seq_len=128",
        "--tp-size 2",
        "--gather-context-logits",
        "--backend cpu",
        "--gemm-plugin float16",
        "--moe-plugin fast",
    ] {
        refuse(flags, &[], 2);
    }
    refuse("", &[("MIXTRAL_NVRTC", &dir.join("nowhere"))], 1);

    // A damaged engine is not built again.
    let path = dir.join("engine_outputs/rank0.engine");
    let whole = fs::read(&path).unwrap();
    let program = whole.windows(15).position(|w| w == b"mixtral-program").unwrap();
    let mut damaged = whole.clone();
    damaged[program + 60] ^= 1;
    fs::write(&path, &damaged).unwrap();
    let found = mixtral_in(dir, "build --from-engine engine_outputs", &[]);
    assert_eq!(found.code, 1, "{}{}", found.out, found.err);
    assert!(found.err.contains("the program has BLAKE3"), "{}", found.err);
    assert!(fs::read(&path).unwrap() == damaged);
    fs::write(&path, &whole).unwrap();
    let tokenizer = dir.join("engine_outputs/tokenizer.json");
    fs::write(&tokenizer, fs::read_to_string(&tokenizer).unwrap() + " ").unwrap();
    let (found, damaged) = (mixtral_in(dir, "build --from-engine engine_outputs", &[]), files());
    assert_eq!(found.code, 1, "{}{}", found.out, found.err);
    assert!(found.err.contains("tokenizer.json: the file has BLAKE3"), "{}", found.err);
    assert!(damaged.iter().all(|(name, bytes)| name == "tokenizer.json" || before[name] == *bytes));
    assert_eq!(damaged.len(), before.len());
    let found = mixtral_in(dir, "build --from-engine nothing", &[]);
    said.push_str(&format!("# nothing\n{}", found.err));
    insta::assert_snapshot!(said);
}

/// An engine in which one buffer lies in another's memory is refused everywhere, whoever made its memory plan.
#[test]
fn an_arena_with_overlapping_buffers_is_refused() {
    let engine = example_engine("--dtype auto", "--backend cpu");
    let dir = engine.path();
    let from = EngineDir::open(&dir.join("engine_outputs")).unwrap();
    let mut program = from.program(Rank(0)).unwrap();
    let offset = program.buffer("layer0.attention_input").unwrap().offset;
    program.buffers.iter_mut().find(|buffer| buffer.name == "layer0.qkv").unwrap().offset = offset + 64;
    let writer = EngineWriter::create(&dir.join("overlapping")).unwrap();
    let mut config = from.config().clone();
    let weights = from.dir().join(weights_file_name(Rank(0)));
    config.ranks = vec![writer.rank(&program, &BTreeMap::new(), Some(&weights)).unwrap()];
    config.files.clear();
    writer.finish(config).unwrap();
    let mut said = BTreeSet::new();
    for line in ["run --backend cpu --input_text KING", "bench", "verify", "inspect"] {
        let flag = if matches!(line, "verify" | "inspect") { "overlapping" } else { "--engine-dir overlapping" };
        let found = mixtral_in(dir, &format!("{line} {flag}"), &[]);
        assert_eq!(found.code, 1, "{line}: {}{}", found.out, found.err);
        said.insert(found.err);
    }
    insta::assert_snapshot!(said.into_iter().collect::<Vec<_>>().join(""));
}

#[test]
fn from_engine_takes_other_architectures_and_plugins() {
    if !has_nvrtc() {
        return;
    }
    let engine = example_engine("--dtype auto", "--backend cpu --max-num-tokens 512");
    let dir = engine.path();
    let config = || EngineDir::open(&dir.join("engine_outputs")).unwrap().config().clone();
    let without = mixtral_in(dir, "build --from-engine engine_outputs", &[]);
    assert_eq!(without.code, 1, "{}{}", without.out, without.err);
    insta::assert_snapshot!(without.err, @"error: engine_outputs was built for the CPU alone, and this machine has no GPU to build for: name architectures with --arch (sm_80, sm_90a, …). On the CPU it runs as it is");
    let before = config();
    mixtral_in(dir, "build --from-engine engine_outputs --arch sm_90a --gemm-plugin cublaslt", &[]).ok();
    let with = config();
    assert_eq!(with.targets, ["cpu", "sm_90a", "compute_80"]);
    assert_eq!((with.limits, &with.files, with.weights), (before.limits, &before.files, before.weights));
    assert_eq!(with.ranks[0].weights_header_blake3, before.ranks[0].weights_header_blake3);
    assert_eq!(with.options["gemm_plugin"], "cublaslt");
    // The recorded flags are used until others are given.
    mixtral_in(dir, "build --from-engine engine_outputs", &[]).ok();
    assert_eq!(config().options["gemm_plugin"], "cublaslt");
    mixtral_in(dir, "build --from-engine engine_outputs --arch sm_80 --gemm-plugin disable --moe-plugin disable", &[])
        .ok();
    assert_eq!(config().targets, ["cpu", "sm_80", "compute_80"]);
    let engine = EngineDir::open(&dir.join("engine_outputs")).unwrap();
    let images: BTreeSet<&str> = engine.images(Rank(0)).unwrap().into_iter().collect();
    assert_eq!(images, BTreeSet::from(["kernels.compute_80", "kernels.sm_80", "schedule.portable"]));
    let program = engine.program(Rank(0)).unwrap();
    Executable::read(&engine, Rank(0), &program, "sm_80".parse().unwrap()).unwrap();
    assert!(!program.to_text().contains("cublaslt"), "plans are chosen anew");
    mixtral_in(dir, "verify engine_outputs", &[]).ok();
}
