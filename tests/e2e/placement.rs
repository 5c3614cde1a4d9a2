//! Ranks on GPUs: which GPU each rank gets, and the errors if a rank gets none or its part does not fit. Ranks are
//! threads of one process, or processes of their own. The GPUs are those of the tests' driver.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use tempfile::TempDir;

use crate::drivers::{driver, with_driver};
use crate::kernels::has_nvrtc;
use crate::tool::{Said, binary, example_engine, mixtral_in, said};

const RUN: &str = "run --max_output_len 2 --input_text KING";

/// The tests' driver, and an engine of two ranks with kernels for Hopper GPUs and for others from generation 8 on.
/// `None` if one of them cannot be made.
fn two_ranks() -> Option<(&'static Path, &'static Path)> {
    static MADE: OnceLock<Option<(TempDir, TempDir)>> = OnceLock::new();
    let made = MADE.get_or_init(|| {
        let driver = driver(&[]).filter(|_| has_nvrtc())?;
        Some((driver, example_engine("--dtype auto --tp_size 2", "--arch sm_90a --max_num_tokens 64")))
    });
    made.as_ref().map(|(driver, engine)| (driver.path(), engine.path()))
}

/// Runs two ranks as processes, each with the variables that a launcher would give it. Returns what they printed.
fn as_processes(driver: &Path, dir: &Path, line: &str, variables: [&[(&str, &str)]; 2]) -> [Said; 2] {
    // Jobs of the same parent process need different names.
    static JOBS: AtomicUsize = AtomicUsize::new(29_600);
    let port = JOBS.fetch_add(1, Ordering::Relaxed).to_string();
    let start = |rank: usize| {
        let mut command = Command::new(binary());
        command
            .args(line.split_whitespace())
            .current_dir(dir)
            .env("LD_LIBRARY_PATH", driver)
            .env_remove("RUST_BACKTRACE");
        command.envs([("RANK", rank.to_string().as_str()), ("WORLD_SIZE", "2"), ("MASTER_PORT", &port)]);
        command.envs(variables[rank].iter().copied());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts")
    };
    [0, 1].map(start).map(|child| said(child.wait_with_output().expect("it ends")))
}

/// The printed lines of all ranks, without the names of this host and of processes.
fn plain(said: &[Said]) -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").expect("Linux, where the driver is");
    let host = host.trim();
    let name = |line: &str| {
        let line = line.replace(&format!(" on {host}"), " on HOST").replace(&format!(" of {host},"), " of HOST,");
        match line.split_once("(process ") {
            Some((before, after)) => {
                format!("{before}(process PID{}", after.trim_start_matches(|c: char| c.is_ascii_digit()))
            }
            None => line,
        }
    };
    let is_ours = |line: &&str| ["rank ", "warning: ", "error: "].iter().any(|start| line.starts_with(start));
    let mut lines: Vec<String> = said.iter().flat_map(|said| said.err.lines()).filter(is_ours).map(name).collect();
    lines.sort();
    lines.join("\n")
}

/// The messages of ranks that must all succeed.
#[track_caller]
fn done(said: &[Said]) -> String {
    assert!(said.iter().all(|said| said.code == 0), "{said:?}");
    plain(said)
}

/// The errors of ranks that must all fail, without the amount of memory that the engine needs.
#[track_caller]
fn failed(said: &[Said]) -> String {
    assert!(said.iter().all(|said| said.code == 1 && !said.err.contains("panicked")), "{said:?}");
    let short = |line: &str| match (line.split_once(" on the GPU: "), line.rsplit_once("; ")) {
        (Some((before, _)), Some((_, advice))) => {
            format!("{}… {advice}", before.split_once("needs").map_or(before, |(start, _)| start))
        }
        _ => line.to_owned(),
    };
    let text = plain(said);
    text.lines().filter(|line| line.starts_with("error: ")).map(short).collect::<Vec<_>>().join("\n")
}

#[test]
fn every_rank_has_a_gpu() {
    let Some((driver, engine)) = two_ranks() else { return };
    let threads = |line: &str, variables: &[(&str, &str)]| done(&[with_driver(driver, engine, line, variables)]);
    let processes = |line: &str, variables| done(&as_processes(driver, engine, line, variables));
    let (run, shared) = (format!("{RUN} -v"), format!("{RUN} -v --ranks-per-gpu 2"));
    let two = ("DRIVER_DEVICES", "2");
    let said = [
        ("threads", threads(&run, &[two])),
        ("threads that share", threads(&shared, &[two])),
        ("threads on GPUs of two kinds", threads(&run, &[two, ("DRIVER_OTHER", "1")])),
        ("processes", processes(&run, [&[two], &[two]])),
        ("processes that share", processes(&shared, [&[two], &[two]])),
        (
            "processes that see one GPU each",
            processes(&run, [&[two, ("CUDA_VISIBLE_DEVICES", "0")], &[two, ("CUDA_VISIBLE_DEVICES", "1")]]),
        ),
    ];
    insta::assert_snapshot!(said.map(|(how, said)| format!("# {how}\n{said}\n")).join("\n"));
}

/// Whichever rank fails, and however the ranks were started, all ranks end and give the reason of the one that failed.
#[test]
fn a_rank_that_cannot_run_on_a_gpu_ends_the_others() {
    let Some((driver, engine)) = two_ranks() else { return };
    let threads = |line: &str, variables: &[(&str, &str)]| failed(&[with_driver(driver, engine, line, variables)]);
    let processes = |line: &str, variables| failed(&as_processes(driver, engine, line, variables));
    let [one, two] = ["1", "2"].map(|count| ("DRIVER_DEVICES", count));
    let same = ("CUDA_VISIBLE_DEVICES", "1");
    let full = ("DRIVER_FULL", "1");
    let old = [two, ("DRIVER_OTHER", "1"), ("DRIVER_GENERATION", "7")];
    let said = [
        ("one GPU for two threads", threads(RUN, &[one])),
        ("one GPU for two processes", processes(RUN, [&[one], &[one]])),
        ("processes that all see the same", processes(RUN, [&[two, same], &[two, same]])),
        ("a process that sees none", processes(RUN, [&[two], &[two, ("CUDA_VISIBLE_DEVICES", "")]])),
        ("a full GPU, threads", threads(RUN, &[two, full])),
        ("a full GPU, processes", processes(RUN, [&[two, full], &[two, full]])),
        ("a GPU without kernels, threads", threads(RUN, &old)),
        ("a GPU without kernels, processes", processes(RUN, [&old, &old])),
    ];
    insta::assert_snapshot!(said.map(|(how, said)| format!("# {how}\n{said}\n")).join("\n"));
}

#[test]
fn bench_says_on_how_many_gpus() {
    let Some((driver, engine)) = two_ranks() else { return };
    let line = "bench --quick --json --batch-size 2 --context 8 --steps 2 --warmup 1 --prefill 16";
    let said = with_driver(driver, engine, line, &[("DRIVER_DEVICES", "2")]);
    let value: serde_json::Value = serde_json::from_str(&said.ok()).unwrap();
    assert_eq!(value["place"], "2 × A Hopper GPU of the tests (sm_90a)");
    assert_eq!(value["decode"][0]["batch_size"], 2);
    // The tests' driver says a millisecond of every two events.
    assert_eq!(value["decode"][0]["gpu_idle_us"], 1000.0);
    let waits = with_driver(driver, engine, &format!("{line} --no-overlap"), &[("DRIVER_DEVICES", "2")]);
    let value: serde_json::Value = serde_json::from_str(&waits.ok()).unwrap();
    assert_eq!(value["decode"][0]["gpu_idle_us"], 1000.0);
}

#[test]
fn flags_of_another_place_change_nothing_and_say_so() {
    let engine = example_engine("--dtype auto", "--backend cpu");
    let line = format!("{RUN} --ranks-per-gpu 2 --kv-cache-free-gpu-mem-fraction 0.5");
    insta::assert_snapshot!(done(&[mixtral_in(engine.path(), &line, &[])]), @r"
    warning: --kv-cache-free-gpu-mem-fraction changes nothing on the CPU, whose cache is as large as the requests need
    warning: --ranks-per-gpu changes nothing on the CPU
    ");
    let Some((driver, _)) = two_ranks() else { return };
    let engine = example_engine("--dtype auto", "--arch sm_90a --max_num_tokens 64");
    let line = format!("{RUN} --ranks-per-gpu 2 --threads 1");
    insta::assert_snapshot!(done(&[with_driver(driver, engine.path(), &line, &[])]), @r"
    warning: --ranks-per-gpu changes nothing: the engine has one rank
    warning: --threads changes nothing on a GPU
    ");
}
