//! Chat templates, held to what transformers makes of the same templates and conversations (`tests/goldens/chat`).

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::folder;
use mixtral_tokenizer::{ChatError, ChatTemplate, Conversation, Tokenizer};
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// A conversation as `conversations.json` has it: the arguments of `apply_chat_template`.
#[derive(Deserialize)]
struct Given {
    messages: Vec<Value>,
    tools: Option<Vec<Value>>,
    documents: Option<Vec<Value>>,
    #[serde(default)]
    add_generation_prompt: bool,
    #[serde(default)]
    continue_final_message: bool,
}

/// What transformers made of it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Expected {
    Rendered { text: String, ids: Vec<u32> },
    Refused { refused: String },
}

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/chat")
}

fn tiny_mixtral() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/tiny-mixtral")
}

fn read<T: serde::de::DeserializeOwned>(name: &str) -> T {
    serde_json::from_slice(&std::fs::read(goldens().join(name)).unwrap()).unwrap()
}

fn conversation(given: Given) -> Conversation {
    let Given { messages, tools, documents, add_generation_prompt, continue_final_message } = given;
    Conversation { messages, tools, documents, add_generation_prompt, continue_final_message, ..Default::default() }
}

fn user(content: &str) -> Conversation {
    Conversation { messages: vec![json!({"role": "user", "content": content})], ..Default::default() }
}

#[test]
fn templates_give_the_texts_ids_and_refusals_of_transformers() {
    let tokenizer = Tokenizer::load(&tiny_mixtral()).unwrap();
    let conversations: BTreeMap<String, Given> = read("conversations.json");
    let conversations: Vec<_> = conversations.into_iter().map(|(name, given)| (name, conversation(given))).collect();
    let all: BTreeMap<String, BTreeMap<String, Option<Expected>>> = read("rendered.json");
    let mut starts = 0;
    for (name, expected) in &all {
        let file = goldens().join(format!("{name}.jinja"));
        let template = ChatTemplate::from_file(&file, &tiny_mixtral()).unwrap();
        for (of, conversation) in &conversations {
            let found = template.render(conversation);
            match (&expected[of], found) {
                (Some(Expected::Rendered { text, ids }), Ok(found)) => {
                    assert_eq!(found, *text, "{name}: {of}");
                    let found: Vec<u32> = tokenizer.encode(&found, false).unwrap().iter().map(|id| id.0).collect();
                    assert_eq!(found, *ids, "{name}: {of}");
                    starts += usize::from(found.first() == Some(&1));
                    assert_ne!(found.get(1), Some(&1), "{name}: {of}: a second start token");
                }
                (Some(Expected::Refused { refused }), Err(ChatError::Refused { message })) => {
                    assert_eq!(message, *refused, "{name}: {of}");
                }
                (None, Err(error)) => assert!(!matches!(error, ChatError::Refused { .. }), "{name}: {of}: {error}"),
                (expected, found) => {
                    panic!("{name}: {of}: {found:?}, but transformers has a result: {}", expected.is_some())
                }
            }
        }
    }
    assert!(starts > 10, "of {starts} conversations the template writes the start token");
}

#[test]
fn the_files_of_templates_count_before_the_configuration_and_have_names() {
    let named = |named: Value| json!({"bos_token": "<s>", "chat_template": named}).to_string();
    let load = |files: &[(&str, &[u8])]| ChatTemplate::load(folder(files).path()).unwrap();
    assert!(load(&[("tokenizer_config.json", b"{\"bos_token\": \"<s>\"}")]).is_none());
    assert!(load(&[]).is_none());

    let single = named(json!("{{ bos_token }}one"));
    let template = load(&[("tokenizer_config.json", single.as_bytes())]).unwrap();
    assert_eq!(template.render(&user("x")).unwrap(), "<s>one");

    let list = json!([{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"},
        {"name": "rag", "template": "{{ documents[0].title }}"}]);
    let template = load(&[("tokenizer_config.json", named(list).as_bytes())]).unwrap();
    assert_eq!(template.names(), ["default", "rag", "tool_use"]);
    assert_eq!(template.render(&user("x")).unwrap(), "plain");
    let tools = Conversation { tools: Some(vec![json!({}), json!({})]), ..user("x") };
    assert_eq!(template.render(&tools).unwrap(), "2 tools");
    let documents = Some(vec![json!({"title": "A castle", "text": ""})]);
    let rag = Conversation { documents, template: Some("rag".to_owned()), ..user("x") };
    assert_eq!(template.render(&rag).unwrap(), "A castle");
    let unknown = Conversation { template: Some("chat".to_owned()), ..user("x") };
    let error = template.render(&unknown).unwrap_err().to_string();
    assert_eq!(error, "there is no chat template `chat` in this model; it has default, rag, tool_use");

    let dir = folder(&[
        ("tokenizer_config.json", single.as_bytes()),
        ("chat_template.jinja", b"{{ bos_token }}file\n"),
        ("chat_template.short.jinja", b"s"),
        ("chat_template.json", b"{}"),
    ]);
    std::fs::create_dir(dir.path().join("additional_chat_templates")).unwrap();
    std::fs::write(dir.path().join("additional_chat_templates/long.jinja"), "l").unwrap();
    let template = ChatTemplate::load(dir.path()).unwrap().unwrap();
    assert_eq!(template.names(), ["default", "long", "short"]);
    assert_eq!(template.render(&user("x")).unwrap(), "<s>file", "Jinja drops one newline at the end");
    let alone = load(&[("chat_template.short.jinja", b"s")]).unwrap();
    assert!(matches!(alone.render(&user("x")), Err(ChatError::NoSuchTemplate { name, .. }) if name == "default"));
}

#[test]
fn variables_are_the_tokens_with_names_and_what_the_caller_gives() {
    let config = json!({"eos_token": {"content": "</s>", "__type": "AddedToken"}, "pad_token": null,
        "extra_special_tokens": {"image_token": "<image>"},
        "chat_template": "{{ eos_token }}{{ image_token }}{{ pad_token is defined }}{{ thinking }}{{ tools is none }}"});
    let dir = folder(&[("tokenizer_config.json", config.to_string().as_bytes())]);
    let template = ChatTemplate::load(dir.path()).unwrap().unwrap();
    let mut variables = Map::from_iter([("thinking".to_owned(), json!(false))]);
    let render = |variables: &Map<String, Value>| {
        template.render(&Conversation { variables: variables.clone(), ..user("x") }).unwrap()
    };
    assert_eq!(render(&variables), "</s><image>FalseFalseTrue");
    variables.insert("eos_token".to_owned(), json!("<end>"));
    assert_eq!(render(&variables), "<end><image>FalseFalseTrue");
}

#[test]
fn what_is_wrong_with_a_template_is_said() {
    let load = |template: &[u8]| {
        let dir = folder(&[("chat_template.jinja", template)]);
        let said = ChatTemplate::load(dir.path()).map(|_| ()).map_err(|e| e.to_string());
        said.map_err(|said| said.replace(dir.path().to_str().unwrap(), "DIR"))
    };
    let said = load(b"{% if messages %}").unwrap_err();
    assert!(
        said.starts_with("cannot read DIR/chat_template.jinja: its chat template is wrong: syntax error"),
        "{said}"
    );
    assert!(load(b"version https://git-lfs.github.com/spec/v1\noid").unwrap_err().contains("Git LFS pointer"));
    assert!(load(b"\xff{{").unwrap_err().contains("not UTF-8"));

    let dir = folder(&[("chat_template.jinja", b"{{ messages[0].content.text.more }}")]);
    let template = ChatTemplate::load(dir.path()).unwrap().unwrap();
    let said = template.render(&user("x")).unwrap_err().to_string();
    assert!(said.contains("failed on this conversation: undefined value"), "{said}");
    assert!(said.contains("default:1"), "{said}");
}
