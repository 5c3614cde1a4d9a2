//! The committed goldens: the outputs of transformers for four tiny models (`tests/goldens/README.md`).

use std::fs;
use std::path::Path;

use safetensors::SafeTensors;

use crate::tool::{mixtral_in, root};

/// A tensor's elements, each of 4 bytes.
fn elements<T>(file: &SafeTensors<'_>, name: &str, from: fn([u8; 4]) -> T) -> Vec<T> {
    let tensor = file.tensor(name).unwrap();
    tensor.data().chunks_exact(4).map(|bytes| from(bytes.try_into().unwrap())).collect()
}

/// The rows of each sequence in a .npy file of shape `[sequences, rows, vocab_size]`.
fn logits(path: &Path) -> Vec<Vec<Vec<f32>>> {
    let bytes = fs::read(path).unwrap();
    let file = npyz::NpyFile::new(&bytes[..]).unwrap();
    let shape: Vec<usize> = file.shape().iter().map(|&n| usize::try_from(n).unwrap()).collect();
    let values: Vec<f32> = file.into_vec().unwrap();
    values
        .chunks(shape[1] * shape[2])
        .map(|sequence| sequence.chunks(shape[2]).map(<[f32]>::to_vec).collect())
        .collect()
}

fn agrees(model: &str) {
    let source = root().join("tests/goldens").join(model);
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let bytes = fs::read(source.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let prompts: Vec<Vec<i32>> =
        (0..3).map(|n| elements(&expected, &format!("prompt.{n}"), i32::from_le_bytes)).collect();
    let lines: Vec<String> =
        prompts.iter().map(|ids| ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")).collect();
    fs::write(at.join("ids.csv"), lines.join("\n") + "\n").unwrap();
    mixtral_in(at, &format!("convert --model_dir {} --dtype auto", source.display()), &[]).ok();
    mixtral_in(at, "build --gather_context_logits", &[]).ok();
    let run = "run --input_file ids.csv --max_output_len 8 --end_id -1 --output_csv out.csv --output_logits_npy logits";
    mixtral_in(at, run, &[]).ok();

    let (context, generation) = (logits(&at.join("logits_context.npy")), logits(&at.join("logits_generation.npy")));
    let generated = fs::read_to_string(at.join("out.csv")).unwrap();
    for (n, line) in generated.lines().enumerate() {
        let tokens: Vec<i32> = line.split(',').map(|id| id.parse().unwrap()).collect();
        assert_eq!(tokens, elements(&expected, &format!("tokens.{n}"), i32::from_le_bytes), "{model}, prompt {n}");
        // Row i predicts the token after position i of prompt and continuation.
        let rows = context[n][..prompts[n].len()].iter().chain(&generation[n][1..]);
        let reference = elements(&expected, &format!("logits.{n}"), f32::from_le_bytes);
        let reference = reference.chunks(context[n][0].len());
        assert_eq!(reference.len(), prompts[n].len() + 7);
        for (position, (row, reference)) in rows.zip(reference).enumerate() {
            let largest = reference.iter().fold(0f32, |max, x| max.max(x.abs()));
            let worst = row.iter().zip(reference).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
            assert!(worst <= 1e-5 * largest, "{model}, prompt {n}, position {position}: {}", worst / largest);
        }
    }
}

#[test]
fn grouped_queries() {
    agrees("grouped");
}

#[test]
fn a_window_and_tied_embeddings() {
    agrees("window-tied");
}

#[test]
fn heads_wider_than_their_share() {
    agrees("wide-heads");
}

#[test]
fn a_dense_model() {
    agrees("dense");
}
