//! The kernels' conversions of e4m3 are those of `mixtral_model::fp8`. The header is compiled for the host, so this needs no
//! GPU but a C++ compiler; without one the test says so and passes.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use mixtral_model::fp8;

#[test]
fn kernels_convert_as_the_definition_does() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().expect("a temporary directory");
    let program = folder.path().join("fp8");
    let source = here.join("tests/headers/fp8.cpp");
    let mut compile = Command::new("c++");
    compile.args(["-std=c++17", "-O1", "-w", "-I"]).arg(here.join("../../kernels")).arg(source).arg("-o").arg(&program);
    match compile.status() {
        Err(error) => return println!("skipped: no C++ compiler: {error}"),
        Ok(status) => assert!(status.success(), "{compile:?}"),
    }

    // All upper halves of f32, each with lower halves at its middle and at both ends: between them lie all borders.
    let lower = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
    let bits: Vec<u32> = (0..1u32 << 16).flat_map(|upper| lower.map(|lower| upper << 16 | lower)).collect();
    let mut child = Command::new(&program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it runs");
    let input: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
    let mut stdin = child.stdin.take().expect("piped");
    let writer = std::thread::spawn(move || stdin.write_all(&input).expect("it reads"));
    let ended = child.wait_with_output().expect("it ends");
    writer.join().expect("no panic");
    assert!(ended.status.success(), "a quotient of `fp8::Divisor` became another byte than a correctly rounded one");
    let output = ended.stdout;
    let (bytes, numbers) = output.split_at(bits.len());

    for (&bits, &byte) in bits.iter().zip(bytes) {
        let x = f32::from_bits(bits);
        assert_eq!(byte, fp8::to_bits(x), "{x:e}");
    }
    let numbers: Vec<f32> =
        numbers.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().expect("four"))).collect();
    assert_eq!(numbers.len(), 256 * 9);
    for (byte, found) in (0..=255u8).zip(numbers.chunks_exact(9)) {
        let expected = fp8::from_bits(byte);
        let is_expected = |x: &f32| x.to_bits() == expected.to_bits();
        // As f32, a byte of NaN is NaN. What is moved has the number that the CPU takes from a cache.
        let first = if byte & 0x7f == fp8::NAN { found[0].is_nan() } else { is_expected(&found[0]) };
        assert!(first && found[1..].iter().all(is_expected), "byte {byte:#x}: {found:?}, expected {expected}");
    }
}
