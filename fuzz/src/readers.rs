//! The table of readers. A reader of files gets files in a folder of its own, and is called through the same function
//! as in production.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use mixtral_build::{BuildOptions, plan};
use mixtral_checkpoint::seal::{UNSEALED, seal};
use mixtral_checkpoint::{Checkpoint, CheckpointConfig, Header, RankFile, rank_tensors};
use mixtral_convert::source::config::SourceConfig;
use mixtral_convert::source::files::{self, Dialect};
use mixtral_convert::{ConvertOptions, Input};
use mixtral_engine::dir::RankRecord;
use mixtral_engine::{EngineConfig, EngineDir, Limits, Program, StepInputs, StepOutputs, WeightsKind};
use mixtral_kernels::{Arch, Code, KernelImages, Schedule};
use mixtral_model::{DType, Mapping, ModelConfig, Rank, TokenId};
use mixtral_tokenizer::{ChatTemplate, Conversation, TextStream, Tokenizer, model_end_ids};
use tempfile::TempDir;

use crate::prompt_files::{conversation, csv_ids, npy_ids, records, text_lines};

/// A reader of foreign bytes.
pub struct Reader {
    /// Its name, on the command line and in `fuzz/corpus`.
    pub name: &'static str,
    /// Reads the bytes. It may refuse them.
    pub read: fn(&[u8]),
}

/// All readers.
pub const READERS: &[Reader] = &[
    Reader { name: "safetensors-header", read: safetensors_header },
    Reader { name: "safetensors-index", read: safetensors_index },
    Reader { name: "hugging-face-config", read: |bytes| source_config(bytes, Dialect::HuggingFace) },
    Reader { name: "params-json", read: |bytes| source_config(bytes, Dialect::Consolidated) },
    Reader { name: "quantized-model", read: quantized_model },
    Reader { name: "checkpoint", read: checkpoint },
    Reader { name: "engine-config", read: engine_config },
    Reader { name: "engine-file", read: engine_file },
    Reader { name: "program-text", read: program_text },
    Reader { name: "schedule-text", read: schedule_text },
    Reader { name: "kernel-images", read: kernel_images },
    Reader { name: "step", read: step },
    Reader { name: "tokenizer-json", read: tokenizer_json },
    Reader { name: "tokenizer-config", read: tokenizer_config },
    Reader { name: "added-tokens", read: added_tokens },
    Reader {
        name: "tokenizer-model",
        read: |bytes| use_tokenizer(&directory("sentencepiece", &[("tokenizer.model", bytes)])),
    },
    Reader { name: "tekken-json", read: |bytes| use_tokenizer(&directory("tekken", &[("tekken.json", bytes)])) },
    Reader { name: "chat-template", read: chat_template },
    Reader { name: "prompts-txt", read: |bytes| drop(text_lines(&file("prompts.txt", bytes))) },
    Reader { name: "prompts-csv", read: |bytes| drop(csv_ids(&file("prompts.csv", bytes))) },
    Reader { name: "prompts-npy", read: |bytes| drop(npy_ids(&file("prompts.npy", bytes))) },
    Reader { name: "prompts-json", read: |bytes| drop(conversation(&file("prompts.json", bytes))) },
    Reader { name: "prompts-jsonl", read: |bytes| drop(records(&file("prompts.jsonl", bytes))) },
    Reader { name: "rendezvous-message", read: mixtral_comm::hostile::message },
    Reader { name: "rendezvous-frame", read: mixtral_comm::hostile::frame },
    Reader { name: "rendezvous-greeting", read: mixtral_comm::hostile::greeting },
    Reader { name: "rendezvous-notice", read: mixtral_comm::hostile::notice },
];

/// The reader of that name.
#[must_use]
pub fn reader(name: &str) -> Option<&'static Reader> {
    READERS.iter().find(|reader| reader.name == name)
}

/// A folder of this process. It is kept between inputs, since making a folder takes longer than reading most inputs.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    FOLDER.get_or_init(|| TempDir::new().expect("a temporary folder")).path()
}

fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder().join(name);
    fs::write(&path, bytes).expect("the temporary folder is writable");
    path
}

/// Makes a folder that contains just these files.
fn directory(name: &str, contents: &[(&str, &[u8])]) -> PathBuf {
    let dir = folder().join(name);
    fs::create_dir_all(&dir).expect("the temporary folder is writable");
    for (name, bytes) in contents {
        fs::write(dir.join(name), bytes).expect("the temporary folder is writable");
    }
    dir
}

/// Splits an input into two files: the bytes before the first NUL, which no JSON contains, and those after it.
fn two(bytes: &[u8]) -> (&[u8], &[u8]) {
    let at = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    (&bytes[..at], bytes.get(at + 1..).unwrap_or_default())
}

/// The text with a right seal, if it has the place for one, so that fuzzing gets past the check of the seal.
fn sealed(text: &[u8]) -> Vec<u8> {
    std::str::from_utf8(text).map_or_else(|_| text.to_vec(), |text| seal(text).into_bytes())
}

fn safetensors_header(bytes: &[u8]) {
    let path = file("x.safetensors", bytes);
    let Ok(file) = RankFile::open(&path) else { return };
    for name in file.names() {
        let tensor = file.tensor(name).expect("a tensor that was listed");
        let size = tensor.shape.iter().product::<usize>() * tensor.elem.size();
        assert_eq!(tensor.bytes.len(), size, "a view has the bytes of its shape");
        let _ = file.hash(name);
    }
}

fn safetensors_index(bytes: &[u8]) {
    let shards = [("a.safetensors", &b""[..]), ("b.safetensors", b"")];
    let dir = directory("indexed", &[shards[0], shards[1], ("model.safetensors.index.json", bytes)]);
    let Ok(paths) = files::find(&dir, Dialect::HuggingFace) else { return };
    for path in &paths {
        assert_eq!(path.parent(), Some(dir.as_path()), "a shard lies in the model's directory");
    }
}

fn source_config(bytes: &[u8], dialect: Dialect) {
    let dir = directory("source", &[(dialect.config_file(), bytes)]);
    let Ok(source) = SourceConfig::read(&dir, dialect) else { return };
    let config = CheckpointConfig::new(source.model, Mapping::single());
    config.validate().expect("what one reader accepts, the next one takes");
    let path = Path::new("config.json");
    assert_eq!(CheckpointConfig::parse(config.to_json().as_bytes(), path).expect("what is written is read"), config);
    let _ = rank_tensors(&config, Rank(0)).iter().map(|spec| u128::from(spec.num_bytes())).sum::<u128>();
}

/// A model's configuration and its weights, which are converted if they belong together.
fn quantized_model(bytes: &[u8]) {
    let (config, weights) = two(bytes);
    let dir = directory("quantized", &[("config.json", config), ("model.safetensors", weights)]);
    let options =
        ConvertOptions { workers: 1, ..ConvertOptions::new(Input::Directory(dir), folder().join("converted")) };
    if mixtral_convert::convert(&options, &()).is_ok() {
        let checkpoint = Checkpoint::open(&options.output_dir).expect("what is written is read");
        assert!(checkpoint.verify(1, &()).is_ok(), "what is written is whole");
    }
}

fn checkpoint(bytes: &[u8]) {
    let (config, rank) = two(bytes);
    let dir = directory("checkpoint", &[("config.json", &sealed(config)), ("rank0.safetensors", rank)]);
    let Ok(checkpoint) = Checkpoint::open(&dir) else { return };
    let _ = checkpoint.verify(1, &());
    let config = checkpoint.config();
    for rank in config.mapping.ranks().take(4) {
        let _ = rank_tensors(config, rank);
    }
}

fn engine_config(bytes: &[u8]) {
    let dir = directory("engine-config", &[("config.json", &sealed(bytes))]);
    let Ok(engine) = EngineDir::open(&dir) else { return };
    let limits = engine.config().limits;
    let _ = limits.blocks_for(limits.max_seq_len).max(limits.max_blocks_per_seq());
    let _ = engine.verify(1, &());
}

/// The config of an engine with one rank. It does not depend on the program.
fn config_of(record: RankRecord) -> Vec<u8> {
    let config = EngineConfig {
        mixtral_engine_format: mixtral_engine::program::FORMAT_VERSION,
        tool_version: String::new(),
        run_id: UNSEALED.to_owned(),
        model: ModelConfig::mixtral_8x7b(DType::F32),
        mapping: Mapping::single(),
        targets: Vec::new(),
        limits: LIMITS,
        gather_context_logits: false,
        options: BTreeMap::new(),
        weights: WeightsKind::Dummy { seed: 0 },
        files: BTreeMap::new(),
        ranks: vec![record],
    };
    seal(&serde_json::to_string(&config).expect("a config is JSON")).into_bytes()
}

/// Reads `rank0.engine`, with a config beside it that has the file's hashes, as an attacker's would have.
fn engine_file(bytes: &[u8]) {
    let path = file("rank0.engine", bytes);
    let open = || Header::read(&fs::File::open(&path).ok()?, &path).ok();
    let Some(header) = open() else { return };
    let at = |offset: u64| usize::try_from(offset).expect("an offset inside of the file");
    let hash = |start, end| blake3_of(&bytes[at(start)..at(end)]);
    let record = RankRecord {
        engine_header_blake3: header.blake3.to_string(),
        engine_blake3: header.tensors.iter().map(|t| (t.name.clone(), hash(t.start, t.end))).collect(),
        weights_bytes: 0,
        weights_header_blake3: String::new(),
    };
    let dir = directory("engine", &[("config.json", &config_of(record)), ("rank0.engine", bytes)]);
    let engine = EngineDir::open(&dir).expect("the config is good");
    if let Ok(program) = engine.program(Rank(0)) {
        assert_eq!(engine.verify(1, &()).expect("its program was read").problems, []);
        use_program(&program);
    }
}

fn blake3_of(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_string()
}

fn program_text(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(program) = Program::parse(text) {
        use_program(&program);
    }
}

/// Reads the text of a schedule of a small program.
fn schedule_text(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let program = small_program();
    let Ok(schedule) = Schedule::parse(text, program) else { return };
    let again = Schedule::parse(&schedule.to_text(), program).expect("what is written is read");
    assert_eq!(again, schedule);
    let _ = schedule.kernels();
    for tokens in 0..=program.limits.max_num_tokens {
        for decodes in [true, false] {
            assert!(tokens == 0 || schedule.for_step(tokens, decodes).is_some(), "a step without work");
        }
    }
}

/// Reads the kernels of an engine.
fn kernel_images(bytes: &[u8]) {
    let code = Code::Sass(Arch::SM_90A);
    let Ok(images) = KernelImages::from_bytes(code, bytes) else { return };
    let again = KernelImages::from_bytes(code, &images.to_bytes()).expect("what is written is read");
    assert_eq!(again, images);
}

/// Does what is done with every program that was read, before anything of its size is allocated.
fn use_program(program: &Program) {
    let again = Program::parse(&program.to_text()).expect("what is written is read");
    assert_eq!(&again, program);
    let _ = program.memory_plan().total(1 << 20);
    let _ = program.lifetimes();
    let _ = mixtral_build::explain::explain(std::slice::from_ref(program), &[], None);
    let _ = mixtral_build::dot::dot(std::slice::from_ref(program), None);
}

const LIMITS: Limits =
    Limits { max_batch_size: 4, max_num_tokens: 16, max_seq_len: 64, max_num_logits: 4, block_size: 16 };

fn small_program() -> &'static Program {
    static PROGRAM: OnceLock<Program> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let mut model = ModelConfig::mixtral_8x7b(DType::F32);
        (model.vocab_size, model.hidden_size, model.intermediate_size, model.num_layers) = (64, 16, 16, 1);
        (model.num_heads, model.num_kv_heads, model.head_dim) = (2, 1, 8);
        let options = BuildOptions {
            limits: LIMITS,
            gather_context_logits: false,
            fp8_context: false,
            recorded: BTreeMap::new(),
            workers: 1,
            memory_budget: None,
            kernels: None,
        };
        let programs = plan(&CheckpointConfig::new(model, Mapping::single()), &options);
        programs.expect("a small model is built").remove(0)
    })
}

/// Reads a step from rank 0.
fn step(bytes: &[u8]) {
    if let Ok(step) = StepInputs::unpack(bytes) {
        // Tokens that no penalty reads are not written, so the first block written may be shorter than the input.
        // Written a second time, it must be the same.
        let block = step.pack();
        assert_eq!(StepInputs::unpack(&block).expect("what is written is read").pack(), block);
        let _ = step.check(small_program(), 8, 2);
    }
    if let Ok(outputs) = StepOutputs::unpack(bytes) {
        assert_eq!(outputs.pack(), bytes);
    }
}

fn tokenizer_json(bytes: &[u8]) {
    use_tokenizer(&directory("tokenizer", &[("tokenizer.json", bytes)]));
}

/// Reads the files beside a tokenizer that name its tokens and end tokens. One input is two files.
fn tokenizer_config(bytes: &[u8]) {
    let (generation, tokenizer) = two(bytes);
    beside_tokenizer(
        "tokenizer-config",
        &[("generation_config.json", generation), ("tokenizer_config.json", tokenizer)],
    );
}

/// Reads the files of older versions of transformers.
fn added_tokens(bytes: &[u8]) {
    let (special, added) = two(bytes);
    beside_tokenizer("added-tokens", &[("special_tokens_map.json", special), ("added_tokens.json", added)]);
}

fn beside_tokenizer(name: &str, files: &[(&str, &[u8])]) {
    const TOKENIZER: &[u8] =
        br#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"</s>": 0, "a": 1}, "unk_token": "a"}}"#;
    let mut files = files.to_vec();
    files.push(("tokenizer.json", TOKENIZER));
    use_tokenizer(&directory(name, &files));
}

/// A template, and the messages that it renders.
fn chat_template(bytes: &[u8]) {
    let (template, messages) = two(bytes);
    let dir = directory("chat", &[("chat_template.jinja", template)]);
    let Ok(Some(template)) = ChatTemplate::load(&dir) else { return };
    let ordinary = || vec![serde_json::json!({"role": "user", "content": "What light?"})];
    let messages: Vec<_> = serde_json::from_slice(messages).unwrap_or_else(|_| ordinary());
    let conversation = Conversation { messages, ..Conversation::default() };
    let _ = template.render(&conversation);
    let _ = template.render(&Conversation { continue_final_message: true, ..conversation });
}

fn use_tokenizer(dir: &Path) {
    let _ = model_end_ids(dir);
    let Ok(tokenizer) = Tokenizer::load(dir) else { return };
    let _ = (tokenizer.start_id(), tokenizer.end_id(), tokenizer.pad_id());
    for text in ["", "ROMEO: what light?\n", "\u{e4} \u{1f600}\u{0}"] {
        let Ok(ids) = tokenizer.encode(text, true) else { continue };
        let _ = tokenizer.decode(&ids);
    }
    let mut stream = TextStream::default();
    for id in [0, 1, 2, 300, u32::MAX] {
        let _ = stream.push(&tokenizer, TokenId(id));
    }
    let _ = stream.finish(&tokenizer);
}
