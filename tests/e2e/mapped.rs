//! What happens if the file of an engine's mapped weights changes while the engine runs.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::tool::{binary, example_engine, mixtral_in, root};

const RUN: &str = "run --max_output_len 480 --end_id -1 --streaming --streaming-interval 20 --input_text";

/// Starts a long generation and waits until it is under way.
fn generating(at: &Path) -> (Child, String) {
    let mut command = Command::new(binary());
    command.args(RUN.split(' ')).arg("ROMEO:").current_dir(at).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut text = String::new();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    out.read_line(&mut text).unwrap();
    text += std::str::from_utf8(out.buffer()).unwrap();
    child.stdout = Some(out.into_inner());
    (child, text)
}

#[test]
fn an_engine_that_is_built_again_while_it_runs_goes_on_as_it_was() {
    let dir = example_engine("--dtype auto", "");
    let at = dir.path();
    let undisturbed = mixtral_in(at, RUN, &["ROMEO:"]).ok();
    let (mut child, mut text) = generating(at);
    let model = root().join("examples/tiny-mixtral");
    mixtral_in(at, &format!("convert --model_dir {} --dtype f32", model.display()), &[]).ok();
    mixtral_in(at, "build --max_batch_size 2", &[]).ok();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(text, undisturbed);
}

/// No reader of mapped files can turn this into an error: the system ends the process with SIGBUS. The process must not
/// go on with wrong weights, and must leave nothing behind.
#[test]
fn weights_cut_short_while_an_engine_runs_end_it() {
    let dir = example_engine("--dtype auto", "");
    let at = dir.path();
    let (mut child, _) = generating(at);
    let weights = fs::OpenOptions::new().write(true).open(at.join("engine_outputs/rank0.weights.safetensors"));
    weights.unwrap().set_len(4096).unwrap();
    let mut rest = String::new();
    child.stdout.take().unwrap().read_to_string(&mut rest).unwrap();
    let status = child.wait().unwrap();
    assert!(!status.success(), "{rest}");
    assert!(status.signal() == Some(7) || status.code() == Some(1), "{status}");
}
