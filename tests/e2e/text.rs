//! The text that goes into and comes out of a run: prompt files as people save them, stop words and bad words, what is
//! printed when, and the tokenizer's files that the stages copy from the model.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::tool::{example_engine, example_model, fast_dir, mixtral_in};

/// The ids of the prompts, and the texts of their outputs.
fn generated(dir: &Path, flags: &str, more: &[&str]) -> Vec<(Vec<u64>, String, Vec<u64>)> {
    let said: Value = serde_json::from_str(&mixtral_in(dir, &format!("run --json {flags}"), more).ok()).unwrap();
    let ids = |value: &Value| value["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
    let prompts = said["prompts"].as_array().unwrap().iter();
    prompts.map(|p| (ids(p), p["outputs"][0]["text"].as_str().unwrap().to_owned(), ids(&p["outputs"][0]))).collect()
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = fs::read(path).map_or_else(|_| json!({}), |bytes| serde_json::from_slice(&bytes).unwrap());
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

#[test]
fn prompt_files_are_read_as_people_save_them() {
    let dir = example_engine("--dtype auto", "");
    let at = dir.path();
    let prompts = |name: &str, bytes: &[u8]| {
        fs::write(at.join(name), bytes).unwrap();
        let said = generated(at, "--max-output-len 1 --input-file", &[name]);
        said.into_iter().map(|(ids, ..)| ids).collect::<Vec<_>>()
    };
    let plain = prompts("lf.txt", "ROMEO:\nÀ toi\n".as_bytes());
    assert_eq!(prompts("cr.txt", "ROMEO:\rÀ toi\r".as_bytes()), plain);
    assert_eq!(prompts("mark.txt", "\u{feff}ROMEO:\r\nÀ toi".as_bytes()), plain);
    for big in [false, true] {
        let unit = |unit: u16| if big { unit.to_be_bytes() } else { unit.to_le_bytes() };
        let bytes: Vec<u8> = "\u{feff}ROMEO:\r\nÀ toi\r\n".encode_utf16().flat_map(unit).collect();
        assert_eq!(prompts("utf-16.txt", &bytes), plain);
    }
    let ids = vec![vec![1, 9, 30], vec![1, 7]];
    assert_eq!(prompts("a.csv", b"\xEF\xBB\xBF1, 9,30,\r\n1,7\r\n"), ids);
    assert_eq!(prompts("b.csv", b"1.0,9.000000e+00,30\n1,7\n"), ids);
    let array = |descr: &str, by_column: &str, bytes: Vec<u8>| {
        let header = format!("{{'descr': '{descr}', 'fortran_order': {by_column}, 'shape': (2, 4), }}");
        let header = format!("{header:<117}\n");
        let length = u16::try_from(header.len()).unwrap().to_le_bytes();
        [b"\x93NUMPY\x01\x00".as_slice(), &length, header.as_bytes(), &bytes].concat()
    };
    // Rows are padded on the left or on the right, with the padding token (here it is also the end token) or with
    // negative numbers.
    let rows = [2, 1, 9, 30, 1, 7, 2, -1];
    let columns = [2, 1, 1, 7, 9, 2, 30, -1];
    assert_eq!(
        prompts("a.npy", &array("<i4", "False", rows.iter().flat_map(|n: &i32| n.to_le_bytes()).collect())),
        ids
    );
    assert_eq!(
        prompts("b.npy", &array(">i8", "True", columns.iter().flat_map(|n: &i64| n.to_be_bytes()).collect())),
        ids
    );
    let unsigned = rows.map(|n: i32| u16::try_from(n).unwrap_or(2));
    assert_eq!(prompts("c.npy", &array("<u2", "False", unsigned.iter().flat_map(|n| n.to_le_bytes()).collect())), ids);
}

#[test]
fn a_list_of_words_is_for_all_prompts_or_for_its_own() {
    let dir = example_engine("--dtype auto", "");
    let at = dir.path();
    let flags = "--max-output-len 40 --input-text ROMEO: JULIET:";
    let whole = generated(at, flags, &[]);
    let word = |n: usize| whole[n].1.split_whitespace().nth(3).unwrap();
    let until = |n: usize, word: &str| whole[n].1.split(word).next().unwrap().to_owned();
    let texts = |more: &[&str]| generated(at, flags, more).into_iter().map(|(_, text, _)| text).collect::<Vec<_>>();
    let (first, second) = (word(0), word(1));
    assert_eq!(texts(&["--stop-words", first]), [until(0, first), until(1, first)]);
    assert_eq!(texts(&["--stop-words", first, "--stop-words", second]), [until(0, first), until(1, second)]);
    let spaced = format!(" {first}");
    assert_eq!(texts(&["--stop-words", &spaced, "--stop-words", "~~"])[0], until(0, &spaced));
    let bare = [first, second].map(|word| word.trim_matches(|c: char| !c.is_alphanumeric()));
    let banned = texts(&["--bad-words", bare[0], "--bad-words", &format!(" {}", bare[1])]);
    for (text, word) in banned.iter().zip(bare) {
        assert!(!text.split(|c: char| !c.is_alphanumeric()).any(|other| other == word), "{word:?} in {text:?}");
    }
    let three = mixtral_in(at, &format!("run {flags} --stop-words a --stop-words b --stop-words c"), &[]);
    assert!(three.err.contains("--stop-words was given 3 times, and there are 2 prompts"), "{}", three.err);
}

#[test]
fn a_stream_prints_what_is_new_or_all_again() {
    let dir = example_engine("--dtype auto", "");
    let at = dir.path();
    let run = |flags: &str| mixtral_in(at, &format!("run --max-output-len 20 --input-text ROMEO: {flags}"), &[]);
    let parts = |printed: &str| {
        let parts = printed.split("Output [Text 0 Beam 0]: \"").skip(1);
        parts.map(|part| part.strip_suffix("\"\n").unwrap().to_owned()).collect::<Vec<_>>()
    };
    let whole = parts(&run("").ok());
    let new = parts(&run("--streaming --streaming-interval 6").ok());
    // The four parts end after 6, 12, 18 and 20 tokens.
    assert_eq!((new.len(), new.concat()), (4, whole[0].clone()));
    let again = parts(&run("--streaming --streaming-interval 6 --streaming-whole").ok());
    assert_eq!(again.last(), whole.last());
    assert!(again.windows(2).all(|pair| pair[1].starts_with(&pair[0])), "{again:?}");
    // If the first token is the end id, the output is an empty text, and not ids.
    let first = generated(at, "--max-output-len 1 --input-text ROMEO:", &[])[0].2[0];
    for flags in ["", "--streaming", "--streaming --streaming-whole"] {
        let printed = run(&format!("--end-id {first} {flags}")).ok();
        assert!(printed.ends_with("Output [Text 0 Beam 0]: \"\"\n"), "{flags}: {printed}");
    }
}

#[test]
fn flags_that_do_not_make_it_draw_are_named() {
    let dir = example_engine("--dtype auto", "");
    let warned = |flags: &str| {
        let said = mixtral_in(dir.path(), &format!("run --max-output-len 1 --input-text ROMEO: {flags}"), &[]);
        said.err.lines().find(|line| line.contains("always takes the likeliest")).map(str::to_owned)
    };
    assert!(
        warned("--temperature 0.7 --top-p 0.95").unwrap().contains("--temperature 0.7 --top-p 0.95 changes nothing")
    );
    assert!(warned("--min-p 0.1").is_some());
    for flags in ["", "--temperature 0", "--temperature 0.7 --top-k 0", "--top-p 0.9 --top-k 40", "--top-p 1"] {
        assert_eq!(warned(flags), None, "{flags}");
    }
}

#[test]
fn the_model_says_how_its_sequences_end_in_whichever_file() {
    let more = ["--max-output-len", "8", "--input-text", "ROMEO:"];
    let dir = example_engine("--dtype auto", "");
    let whole = generated(dir.path(), "--end-id -1", &more).swap_remove(0).2;
    let end = whole[2];
    let expected = &whole[..=whole.iter().position(|id| *id == end).unwrap()];
    let ended = |change: &dyn Fn(&Path)| {
        let dir = fast_dir();
        change(&example_model(dir.path()));
        mixtral_in(dir.path(), "convert --model-dir model --output-dir ckpt --dtype auto", &[]).ok();
        mixtral_in(dir.path(), "build --checkpoint-dir ckpt --output-dir engine_outputs --backend cpu", &[]).ok();
        mixtral_in(dir.path(), "verify engine_outputs", &[]).ok();
        generated(dir.path(), "", &more).swap_remove(0).2
    };
    assert_eq!(
        ended(&|model| {
            fs::remove_file(model.join("generation_config.json")).unwrap();
            edit(&model.join("config.json"), |config| config["eos_token_id"] = json!([2, end]));
        }),
        expected
    );
    assert_eq!(
        ended(&|model| {
            fs::write(model.join("generation_config.json"), r#"{"temperature": 0.7}"#).unwrap();
            edit(&model.join("config.json"), |config| config["eos_token_id"] = json!(end));
        }),
        expected
    );
    // Both the tokenizer's end token and that of the generation config end a sequence.
    assert_eq!(
        ended(&|model| {
            let tokenizer: Value = serde_json::from_slice(&fs::read(model.join("tokenizer.json")).unwrap()).unwrap();
            let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
            let token = vocab.iter().find(|(_, id)| **id == json!(end)).unwrap().0.clone();
            edit(&model.join("tokenizer_config.json"), |config| config["eos_token"] = json!({"content": token}));
        }),
        expected
    );
}

#[test]
fn convert_looks_at_the_tokenizer_as_it_looks_at_weights() {
    let said = |change: fn(&Path)| {
        let dir = fast_dir();
        change(&example_model(dir.path()));
        mixtral_in(dir.path(), "convert --model-dir model --output-dir ckpt --dtype auto", &[])
    };
    let pointer = said(|model| {
        fs::write(model.join("tokenizer.json"), "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
            .unwrap();
    });
    assert_eq!(pointer.code, 1);
    assert!(pointer.err.contains("tokenizer.json: it is a Git LFS pointer"), "{}", pointer.err);
    let cut = said(|model| {
        let bytes = fs::read(model.join("tokenizer.json")).unwrap();
        fs::write(model.join("tokenizer.json"), &bytes[..bytes.len() / 3]).unwrap();
    });
    assert!(cut.code == 1 && cut.err.contains("cut off"), "{}", cut.err);
    let padded =
        said(|model| edit(&model.join("tokenizer_config.json"), |config| config["pad_token"] = json!("[PAD]")));
    assert!(padded.code == 0 && padded.err.contains("1 added token(s)"), "{}", padded.err);
    let larger = said(|model| {
        edit(&model.join("tokenizer.json"), |json| json["model"]["vocab"]["zzzzzz"] = json!(2048));
    });
    assert!(larger.code == 1 && larger.err.contains("has 2049 tokens"), "{}", larger.err);
}

#[test]
fn a_missing_start_token_is_said() {
    let dir = example_engine("--dtype auto", "");
    let tokenizer = fast_dir();
    let model = example_model(tokenizer.path());
    edit(&model.join("tokenizer.json"), |json| json["post_processor"] = Value::Null);
    let line = format!("run --max-output-len 1 --input-text ROMEO: --tokenizer-dir {}", model.display());
    let said = mixtral_in(dir.path(), &line, &[]);
    assert!(said.err.contains("puts no start token before prompts"), "{}", said.err);
    let said = mixtral_in(dir.path(), &format!("{line} --no-add-special-tokens"), &[]);
    assert!(!said.err.contains("start token"), "{}", said.err);
}
