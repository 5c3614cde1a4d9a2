//! What the server's answers carry: log-probabilities, chat, and what the fields of a request change.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::served::Served;
use crate::tool::{example_engine, mixtral_in};

/// A template that writes the start token, tools, and a line for each message.
const TEMPLATE: &str = "{{ bos_token }}{% if tools %}[{% for tool in tools %}{{ tool.function.name }}{% endfor %}]\n{% endif %}\
{% for m in messages %}{{ m.role }}: {{ m.content }}\
{% for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments.x }}){% endfor %}{{ '\\n' }}{% endfor %}assistant:";

fn with_template(dir: &Path) -> Served {
    fs::write(dir.join("chat.jinja"), TEMPLATE).unwrap();
    Served::start(dir, "--chat-template chat.jinja")
}

fn chat(served: &Served, more: &Value) -> Value {
    let mut body = json!({"model": "tiny", "temperature": 0, "max_tokens": 12});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    served.post("/v1/chat/completions", &body).ok()
}

fn complete(served: &Served, prompt: &str, more: &Value) -> Value {
    let mut body = json!({"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 12});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    served.complete(&body)
}

fn text(answer: &Value, index: usize) -> &str {
    answer["choices"][index]["text"].as_str().unwrap()
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().unwrap()
}

#[test]
fn log_probabilities_are_those_of_the_answers_tokens() {
    let dir = example_engine("--dtype f32", "");
    let served = Served::start(dir.path(), "");
    let prompt = "ROMEO:\nAs I 😀";
    let whole = complete(&served, prompt, &json!({"logprobs": 3, "echo": true}));
    let told = &whole["choices"][0]["logprobs"];
    let tokens: Vec<&str> = list(&told["tokens"]).iter().map(|token| token.as_str().unwrap()).collect();
    let ids = served.post("/tokenize", &json!({"prompt": prompt})).ok();
    let prompt_len = list(&ids["tokens"]).len();
    assert_eq!(tokens.len(), prompt_len + 12);
    assert_eq!((tokens[0], &told["token_logprobs"][0], &told["top_logprobs"][0]), ("<s>", &Value::Null, &Value::Null));
    let mut offset = 0;
    for (at, token) in tokens.iter().enumerate() {
        assert_eq!(told["text_offset"][at], json!(offset));
        offset += token.chars().count();
        if at > 0 {
            let logprob = told["token_logprobs"][at].as_f64().unwrap();
            let top = told["top_logprobs"][at].as_object().unwrap();
            let largest = top.values().map(|value| value.as_f64().unwrap()).fold(f64::MIN, f64::max);
            assert!(logprob <= largest && (3..=4).contains(&top.len()), "{top:?}");
            // A greedy answer has the likeliest tokens, and their values are equal as written.
            assert_eq!(at >= prompt_len, at >= prompt_len && logprob == largest, "{at}");
        }
    }
    assert_eq!(tokens[prompt_len..].concat(), text(&whole, 0)[prompt.len()..]);

    // Only the prompt's, which an evaluation asks for; the same when other prompts are there too.
    let asked = json!({"model": "tiny", "prompt": [prompt, "First"], "max_tokens": 0, "logprobs": 3, "echo": true});
    let scored = served.complete(&asked);
    for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let part = &list(&told[key])[..prompt_len];
        assert_eq!(list(&scored["choices"][0]["logprobs"][key]), part, "{key}");
    }
    assert_eq!((text(&scored, 0), text(&scored, 1)), (prompt, "First"));
    assert_eq!(scored["usage"]["completion_tokens"], 0);
    let echoed = complete(&served, prompt, &json!({"max_tokens": 0, "echo": true}));
    assert_eq!((text(&echoed, 0), &echoed["choices"][0]["finish_reason"]), (prompt, &json!("length")));

    // A stream tells the same, piece by piece.
    let asked = json!({"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 3, "echo": true,
        "stream": true});
    for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let frames = served.post("/v1/completions", &asked).frames();
        let pieces = frames.iter().flat_map(|frame| list(&frame["choices"][0]["logprobs"][key]));
        assert_eq!(&pieces.cloned().collect::<Vec<_>>(), list(&told[key]), "{key}");
    }
}

#[test]
fn the_best_of_several_answers_have_the_highest_mean() {
    let dir = example_engine("--dtype f32", "");
    let served = Served::start(dir.path(), "");
    let draws = json!({"temperature": 1, "seed": 3, "logprobs": 0});
    let with = |more: Value| {
        let mut fields = draws.clone();
        fields.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        complete(&served, "ROMEO:", &fields)
    };
    let all = with(json!({"n": 5}));
    let mean = |choice: &Value| {
        let logprobs: Vec<f64> =
            list(&choice["logprobs"]["token_logprobs"]).iter().map(|value| value.as_f64().unwrap()).collect();
        logprobs.iter().sum::<f64>() / 12.0
    };
    let mut ranked: Vec<&Value> = list(&all["choices"]).iter().collect();
    ranked.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
    let best = with(json!({"n": 2, "best_of": 5}));
    assert_eq!([text(&best, 0), text(&best, 1)], [&ranked[0]["text"], &ranked[1]["text"]].map(|t| t.as_str().unwrap()));
    assert_eq!((&best["choices"][1]["index"], &best["usage"]["completion_tokens"]), (&json!(1), &json!(60)));
    let streamed = json!({"model": "tiny", "prompt": "a", "n": 1, "best_of": 2, "stream": true});
    assert_eq!(served.post("/v1/completions", &streamed).json()["error"]["param"], "best_of");
}

#[test]
fn bias_and_lengths_are_honoured() {
    let dir = example_engine("--dtype f32", "");
    let served = Served::start(dir.path(), "");
    let used = |answer: &Value| answer["usage"]["completion_tokens"].as_u64().unwrap();
    let reason = |answer: &Value| answer["choices"][0]["finish_reason"].as_str().unwrap().to_owned();
    let biased = complete(&served, "ROMEO:", &json!({"logit_bias": {"100": 100}, "logprobs": 0}));
    let tokens = list(&biased["choices"][0]["logprobs"]["tokens"]);
    assert!(tokens.len() == 12 && tokens.iter().all(|token| *token == tokens[0]), "{tokens:?}");
    // The end token is made likely, so it ends the answer unless a field says otherwise.
    let ended = complete(&served, "ROMEO:", &json!({"logit_bias": {"2": 100}}));
    assert_eq!((used(&ended), reason(&ended), text(&ended, 0)), (1, "stop".to_owned(), ""));
    let later = complete(&served, "ROMEO:", &json!({"logit_bias": {"2": 100}, "min_tokens": 5}));
    assert_eq!((used(&later), reason(&later)), (6, "stop".to_owned()));
    let never = complete(&served, "ROMEO:", &json!({"logit_bias": {"2": 100}, "ignore_eos": true}));
    assert_eq!((used(&never), reason(&never)), (12, "length".to_owned()));
    for (more, field) in [
        (json!({"logit_bias": {"2048": 1}}), "logit_bias.2048"),
        (json!({"logit_bias": {"1": 101}}), "logit_bias.1"),
        (json!({"logit_bias": {"a": 1}}), "logit_bias.a"),
        (json!({"min_tokens": 17}), "min_tokens"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"response_format": {"type": "xml"}}), "response_format.type"),
    ] {
        let mut body = json!({"model": "tiny", "prompt": "a"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let refused = served.post("/v1/completions", &body);
        assert_eq!((refused.status, refused.json()["error"]["param"].as_str()), (400, Some(field)), "{}", refused.body);
    }
}

#[test]
fn chat_is_a_completion_of_the_templates_text() {
    let dir = example_engine("--dtype f32", "");
    let served = with_template(dir.path());
    let asked = json!({"messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What"}, {"type": "text", "text": "is it?"}], "name": "me"},
        {"role": "assistant", "content": null, "refusal": null, "annotations": [],
            "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 3}"}}]},
        {"role": "tool", "content": "9", "tool_call_id": "abcdefghi"},
    ], "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "logprobs": true, "top_logprobs": 2});
    let answer = chat(&served, &asked);
    let prompt = "[f]\nsystem: Be brief.\nuser: What\nis it?\nassistant: f(3)\ntool: 9\nassistant:";
    let same = complete(&served, prompt, &json!({"logprobs": 2}));
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": text(&same, 0), "refusal": null}));
    assert_eq!((&answer["object"], &choice["finish_reason"]), (&json!("chat.completion"), &json!("length")));
    assert_eq!(answer["usage"], same["usage"]);
    let scored = list(&choice["logprobs"]["content"]);
    let logprobs: Vec<&Value> = scored.iter().map(|token| &token["logprob"]).collect();
    assert_eq!(logprobs, list(&same["choices"][0]["logprobs"]["token_logprobs"]).iter().collect::<Vec<_>>());
    let bytes = scored.iter().flat_map(|token| list(&token["bytes"])).map(|byte| byte.as_u64().unwrap());
    let bytes: Vec<u8> = bytes.map(|byte| u8::try_from(byte).unwrap()).collect();
    assert_eq!(String::from_utf8_lossy(&bytes), text(&same, 0));
    assert!(scored.iter().all(|token| list(&token["top_logprobs"]).len() == 2));

    // Without tools, with several answers, streamed.
    let asked = json!({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "n": 2, "seed": 4,
        "max_completion_tokens": 20, "tool_choice": "none", "tools": []});
    let whole = served.post("/v1/chat/completions", &asked).ok();
    let mut streamed = asked;
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let frames = served.post("/v1/chat/completions", &streamed).frames();
    let mut contents = [String::new(), String::new()];
    let (last, chunks) = frames.split_last().unwrap();
    // One for each token, and one that says who speaks.
    assert_eq!(chunks.len(), 2 * (20 + 1));
    for chunk in chunks {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        let choice = &chunk["choices"][0];
        let index = usize::try_from(choice["index"].as_u64().unwrap()).unwrap();
        assert_eq!(
            choice["delta"]["role"] == "assistant",
            contents[index].is_empty() && choice["delta"]["content"] == ""
        );
        contents[index] += choice["delta"]["content"].as_str().unwrap_or_default();
    }
    let expected =
        [0, 1].map(|index: usize| whole["choices"][index]["message"]["content"].as_str().unwrap().to_owned());
    assert_eq!(contents, expected);
    assert_eq!(last["usage"], whole["usage"]);

    // Without a length, an answer is as long as a sequence has room for.
    let endless = served.post(
        "/v1/chat/completions",
        &json!({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}],
        "temperature": 0}),
    );
    assert_eq!(endless.ok()["usage"]["total_tokens"], 512);
}

/// A conversation has the answer of `run --chat`, alone and while others are answered.
#[test]
fn chat_is_what_run_answers() {
    let dir = example_engine("--dtype f32", "");
    let served = with_template(dir.path());
    let line =
        "run --json --max-output-len 24 --chat --chat-template chat.jinja --top-k 50 --random-seed 6 --input-text";
    let run: Value = serde_json::from_str(&mixtral_in(dir.path(), line, &["Who's there?"]).ok()).unwrap();
    let expected = &run["prompts"][0]["outputs"][0]["text"];
    let asked = json!({"messages": [{"role": "user", "content": "Who's there?"}], "max_tokens": 24, "temperature": 1,
        "top_k": 50, "seed": 6, "logprobs": true});
    let alone = chat(&served, &asked);
    assert_eq!(&alone["choices"][0]["message"]["content"], expected);
    std::thread::scope(|scope| {
        for other in 0..4 {
            let others = json!({"messages": [{"role": "user", "content": format!("Nay {other}")}], "n": 3,
                "temperature": 1, "max_tokens": 60});
            let served = &served;
            scope.spawn(move || chat(served, &others));
        }
        for _ in 0..3 {
            // Log-probabilities too, to the bit.
            assert_eq!(chat(&served, &asked)["choices"], alone["choices"]);
        }
    });
}

#[test]
fn conversations_that_cannot_be_answered_are_refused() {
    let dir = example_engine("", "");
    let served = with_template(dir.path());
    let user = |content: Value| json!({"role": "user", "content": content});
    let call =
        |arguments: &str| json!([{"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}]);
    for (more, field) in [
        (json!({"messages": []}), "messages"),
        (json!({"messages": [{"role": "narrator", "content": "x"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (json!({"messages": [user(json!(3))]}), "messages[0].content"),
        (
            json!({"messages": [user(json!([{"type": "image_url", "image_url": {"url": "x"}}]))]}),
            "messages[0].content[0].type",
        ),
        (json!({"messages": [{"role": "user", "content": "x", "mood": "good"}]}), "messages[0].mood"),
        (json!({"messages": [{"role": "assistant", "content": "x", "audio": {"id": "1"}}]}), "messages[0].audio"),
        (json!({"messages": [{"role": "user", "content": "x", "tool_calls": call("{}")}]}), "messages[0].tool_calls"),
        (
            json!({"messages": [{"role": "assistant", "tool_calls": call("{")}]}),
            "messages[0].tool_calls[0].function.arguments",
        ),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tools": [{"type": "retrieval"}]}), "tools[0].type"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"modalities": ["text", "audio"]}), "modalities[1]"),
        (json!({"service_tier": "priority"}), "service_tier"),
        (json!({"store": true}), "store"),
        (json!({"reasoning_effort": "high"}), "reasoning_effort"),
        (json!({"logprobs": 2}), "logprobs"),
        (json!({"max_tokens": 600}), "messages"),
        (json!({"functions": []}), "functions"),
        (json!({"echo": true}), "echo"),
    ] {
        let mut body = json!({"model": "tiny", "messages": [user(json!("x"))]});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let refused = served.post("/v1/chat/completions", &body);
        assert_eq!((refused.status, refused.json()["error"]["param"].as_str()), (400, Some(field)), "{}", refused.body);
    }
    drop(served);
    let bare = Served::start(dir.path(), "");
    let refused = bare.post("/v1/chat/completions", &json!({"model": "tiny", "messages": [user(json!("x"))]}));
    assert!(refused.status == 400 && refused.body.contains("no chat template"), "{}", refused.body);
}

#[test]
fn what_was_done_is_counted_under_vllms_names() {
    let dir = example_engine("", "");
    let served = Served::start(dir.path(), "");
    complete(&served, "ROMEO:", &json!({"n": 2, "temperature": 1}));
    complete(&served, "ROMEO:", &json!({"logit_bias": {"2": 100}}));
    let scraped = served.get("/metrics");
    assert_eq!(scraped.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let value = |name: &str, labels: &str| -> f64 {
        let line = format!("{name}{{model_name=\"tiny\"{labels}}} ");
        let value = scraped.body.lines().find_map(|text| text.strip_prefix(&line));
        value.unwrap_or_else(|| panic!("{line} in {}", scraped.body)).parse().unwrap()
    };
    assert_eq!(value("vllm:generation_tokens_total", ""), 25.0);
    assert_eq!(value("vllm:request_success_total", ",finished_reason=\"length\""), 2.0);
    assert_eq!(value("vllm:request_success_total", ",finished_reason=\"stop\""), 1.0);
    assert_eq!(value("vllm:num_requests_running", "") + value("vllm:num_requests_waiting", ""), 0.0);
    assert_eq!(value("vllm:kv_cache_usage_perc", ""), 0.0);
    assert_eq!(value("vllm:time_to_first_token_seconds_count", ""), 3.0);
    assert_eq!(value("vllm:inter_token_latency_seconds_count", ""), 22.0);
    assert_eq!(value("vllm:e2e_request_latency_seconds_count", ""), 3.0);
    assert_eq!(value("vllm:request_generation_tokens_sum", ""), 25.0);
    assert_eq!(value("vllm:request_prompt_tokens_bucket", ",le=\"20\""), 3.0);
    let tokens = value("vllm:prompt_tokens_total", "");
    assert!(tokens > 3.0 && value("vllm:prefix_cache_queries_total", "") == tokens);
    assert!(scraped.body.contains("# HELP vllm:num_requests_running Sequences that the engine computes."));
}

/// The log has a line for each request with its name, and neither prompts nor answers.
#[test]
fn the_log_names_requests_and_tells_no_text() {
    let dir = example_engine("", "");
    let served = Served::start(dir.path(), "--log-format json");
    let answer = complete(&served, "A secret word", &json!({}));
    served.signal("-TERM");
    let (_, log) = served.ended();
    let lines: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let line = lines.iter().find(|line| line["path"] == "/v1/completions").unwrap();
    assert_eq!(
        (&line["method"], &line["status"], line["request"].as_str().unwrap().len()),
        (&json!("POST"), &json!(200), 16)
    );
    let ended = lines.iter().find(|line| line["message"] == "ended").unwrap();
    assert_eq!((&ended["request"], &ended["tokens"], &ended["why"]), (&line["request"], &json!(12), &json!("length")));
    assert!(!log.contains("secret") && !log.contains(text(&answer, 0).trim()), "{log}");
}
