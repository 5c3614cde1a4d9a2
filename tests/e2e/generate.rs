//! `mixtral run`: sampling, batches, and every kind of output.

use std::path::Path;

use serde_json::Value;

use crate::tool::{example_engine, mixtral_in};

const PROMPT: &str = "First Citizen:\nWe are";

fn json(dir: &Path, flags: &str, prompts: &[&str]) -> Value {
    let mut more = vec!["--input-text"];
    more.extend(prompts);
    serde_json::from_str(&mixtral_in(dir, &format!("run --json {flags}"), &more).ok()).unwrap()
}

fn ids(value: &Value, prompt: usize, beam: usize) -> Vec<u64> {
    let ids = value["prompts"][prompt]["outputs"][beam]["ids"].as_array().unwrap();
    ids.iter().map(|id| id.as_u64().unwrap()).collect()
}

fn text(value: &Value) -> &str {
    value["prompts"][0]["outputs"][0]["text"].as_str().unwrap()
}

fn npy(path: &Path) -> (Vec<u64>, Vec<f32>) {
    let bytes = std::fs::read(path).unwrap();
    let file = npyz::NpyFile::new(&bytes[..]).unwrap();
    (file.shape().to_vec(), file.into_vec().unwrap())
}

#[test]
fn a_prompt_gives_the_same_alone_and_in_a_batch() {
    let dir = example_engine("--dtype auto", "--gather_context_logits --max-num-tokens 24");
    let at = dir.path();
    let others = [
        "ROMEO:\n",
        "O, she doth teach the torches to burn bright! It seems she hangs upon the cheek of night",
        PROMPT,
    ];
    let alone = json(at, "--max-output-len 20 --output-logits-npy alone", &[PROMPT]);
    let batch = json(at, "--max-output-len 20 --output-logits-npy batch", &others);
    assert_eq!(ids(&alone, 0, 0), ids(&batch, 2, 0));
    for kind in ["generation", "context"] {
        let (shape, alone) = npy(&at.join(format!("alone_{kind}.npy")));
        let (batch_shape, batch) = npy(&at.join(format!("batch_{kind}.npy")));
        assert_eq!((shape[0], batch_shape[0], shape[2]), (1, 3, batch_shape[2]));
        let row = usize::try_from(batch_shape[1] * batch_shape[2]).unwrap();
        // Chunks of 24 tokens a step cut the long prompt, and the batch's context is as long as its longest prompt.
        let same: Vec<u32> = batch[2 * row..][..alone.len()].iter().map(|x| x.to_bits()).collect();
        assert!(alone.iter().map(|x| x.to_bits()).eq(same), "{kind} logits");
    }
}

#[test]
fn logits_files_have_rows_where_there_are_tokens() {
    let dir = example_engine("--dtype auto", "--gather_context_logits");
    let at = dir.path();
    let said = json(at, "--max-output-len 5 --output-logits-npy logits.npy --output-npy ids.npy", &["ROMEO:", PROMPT]);
    let prompt_len = |i: usize| said["prompts"][i]["ids"].as_array().unwrap().len();
    let (shape, context) = npy(&at.join("logits_context.npy"));
    assert_eq!(shape[..2], [2, prompt_len(1) as u64]);
    let vocab = usize::try_from(shape[2]).unwrap();
    let finite: Vec<bool> = context.chunks(vocab).map(|row| row.iter().all(|x| x.is_finite())).collect();
    assert_eq!(finite.iter().filter(|f| **f).count(), prompt_len(0) + prompt_len(1));
    // The generated token is the argmax of its row.
    let (shape, generation) = npy(&at.join("logits_generation.npy"));
    assert_eq!(shape, [2, 5, vocab as u64]);
    for (row, id) in generation.chunks(vocab).zip(ids(&said, 0, 0)) {
        let best = row.iter().fold(f32::MIN, |a, b| a.max(*b));
        assert_eq!(row[usize::try_from(id).unwrap()], best);
    }
    let bytes = std::fs::read(at.join("ids.npy")).unwrap();
    let file = npyz::NpyFile::new(&bytes[..]).unwrap();
    assert_eq!(file.shape(), [2, 5]);
    let written: Vec<i32> = file.into_vec().unwrap();
    assert_eq!(written.iter().map(|id| u64::try_from(*id).unwrap()).collect::<Vec<_>>()[..5], ids(&said, 0, 0));
}

#[test]
fn seeds_decide_the_draws() {
    let dir = example_engine("--dtype auto", "");
    let at = dir.path();
    let flags = "--max-output-len 16 --top-k 0 --temperature 1.2 --top-p 0.95 --min-p 0.01 --num-return-sequences 3";
    let one = json(at, &format!("{flags} --random-seed 7"), &[PROMPT]);
    let again = json(at, &format!("{flags} --random-seed 7 --threads 1"), &[PROMPT]);
    let other = json(at, &format!("{flags} --random-seed 8"), &[PROMPT]);
    for beam in 0..3 {
        assert_eq!(ids(&one, 0, beam), ids(&again, 0, beam));
    }
    assert_ne!(ids(&one, 0, 0), ids(&other, 0, 0));
    assert_ne!(ids(&one, 0, 0), ids(&one, 0, 1));
}

#[test]
fn penalties_and_bad_words_change_the_text() {
    let dir = example_engine("--dtype auto", "");
    let at = dir.path();
    let plain = json(at, "--max-output-len 60", &["ROMEO:\n"]);
    let distinct = |value: &Value| {
        let mut seen = ids(value, 0, 0);
        seen.sort_unstable();
        seen.dedup();
        seen.len()
    };
    for flags in ["--repetition-penalty 1.5", "--presence-penalty 1.5", "--frequency-penalty 0.7"] {
        let penalized = json(at, &format!("--max-output-len 60 {flags}"), &["ROMEO:\n"]);
        assert!(distinct(&penalized) > distinct(&plain), "{flags}");
    }
    let word = text(&plain).split_whitespace().next().unwrap().to_owned();
    let line = format!("run --json --max-output-len 60 --bad-words {word} --input-text");
    let without: Value = serde_json::from_str(&mixtral_in(at, &line, &["ROMEO:\n"]).ok()).unwrap();
    assert!(!text(&without).split_whitespace().any(|w| w == word), "{word:?} in {:?}", text(&without));
}

#[test]
fn stop_words_and_end_ids_end_a_sequence() {
    let dir = example_engine("--dtype auto", "");
    let at = dir.path();
    let whole = json(at, "--max-output-len 60", &["ROMEO:\n"]);
    let stop = "\n\n";
    let mut line = vec!["--stop-words", stop, "--input-text", "ROMEO:\n"];
    let said: Value = serde_json::from_str(&mixtral_in(at, "run --json --max-output-len 60", &line).ok()).unwrap();
    let expected = text(&whole).split(stop).next().unwrap();
    assert_eq!(
        (text(&said), &said["prompts"][0]["outputs"][0]["finish_reason"]),
        (expected, &Value::from("stop_word"))
    );
    // The ids are not cut.
    assert!(ids(&whole, 0, 0).starts_with(&ids(&said, 0, 0)));

    let third = ids(&whole, 0, 0)[2].to_string();
    line = vec!["--end-id", &third, "--input-text", "ROMEO:\n"];
    let said: Value = serde_json::from_str(&mixtral_in(at, "run --json --max-output-len 60", &line).ok()).unwrap();
    let generated = ids(&said, 0, 0);
    assert_eq!(generated.last(), ids(&whole, 0, 0).get(2));
    assert!(generated.len() <= 3);
    assert_eq!(said["prompts"][0]["outputs"][0]["finish_reason"], "end_id");
}

#[test]
fn prompts_come_from_files_too() {
    let dir = example_engine("--dtype auto", "");
    let at = dir.path();
    let direct = json(at, "--max-output-len 8", &["ROMEO:", "JULIET:"]);
    std::fs::write(at.join("prompts.txt"), "ROMEO:\nJULIET:\n").unwrap();
    let csv: String = (0..2)
        .map(|i| {
            let ids = direct["prompts"][i]["ids"].as_array().unwrap();
            ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ") + "\n"
        })
        .collect();
    std::fs::write(at.join("prompts.csv"), csv).unwrap();
    for file in ["prompts.txt", "prompts.csv"] {
        let line = format!("run --json --max-output-len 8 --input-file {file}");
        let said: Value = serde_json::from_str(&mixtral_in(at, &line, &[]).ok()).unwrap();
        for prompt in 0..2 {
            assert_eq!(ids(&said, prompt, 0), ids(&direct, prompt, 0), "{file}");
        }
    }
    let cut = json(at, "--max-output-len 8 --max-input-length 2", &["JULIET: ROMEO:"]);
    assert_eq!(cut["prompts"][0]["ids"].as_array().unwrap().len(), 2);
}

#[test]
fn statistics_are_complete() {
    let dir = example_engine("--dtype auto", "");
    let at = dir.path();
    let said = json(at, "--max-output-len 12 --stats --expert-stats --logits-hash", &[PROMPT]);
    let stats = &said["stats"];
    assert_eq!(stats["generated_tokens"], 12);
    assert_eq!(said["logits_hash"].as_str().unwrap().len(), 64);
    assert!(stats["decode_step_ms"].as_f64().unwrap() > 0.0);
    let tokens = u64::try_from(said["prompts"][0]["ids"].as_array().unwrap().len()).unwrap() + 11;
    for layer in said["expert_counts"].as_array().unwrap() {
        let total: u64 = layer.as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum();
        assert_eq!(total, 2 * tokens);
    }
    let again = json(at, "--max-output-len 12 --logits-hash", &[PROMPT]);
    assert_eq!(again["logits_hash"], said["logits_hash"]);
    let printed = mixtral_in(at, "run --max-output-len 4 --run-profiling --input-text", &[PROMPT]).ok();
    assert!(printed.contains("batch_size: 1, avg latency of 10 iterations: "), "{printed}");

    let long = PROMPT.repeat(60);
    let twice = json(at, "--max-output-len 2 --kv-cache-enable-block-reuse", &[&long, &long]);
    let (stats, tokens) = (&twice["stats"], twice["prompts"][0]["ids"].as_array().unwrap().len() as u64);
    let [computed, cached] = ["prompt_tokens", "cached_tokens"].map(|name| stats[name].as_u64().unwrap());
    assert!(cached >= 64 && computed + cached == 2 * tokens, "{cached} and {computed} of two times {tokens}");
    assert_eq!(stats["swapped_blocks"], 0);
}
