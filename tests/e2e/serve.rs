//! `mixtral serve` over real connections, on the example model on the CPU.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::served::{Served, ask, connect, kill, post, read_answer, wait_for};
use crate::tool::{binary, example_engine, mixtral_in};

const PROMPTS: [&str; 3] = ["ROMEO:\nAs I", "First Citizen:", "What is"];

/// A long answer, which takes many steps.
fn long(stream: bool) -> Value {
    json!({"model": "tiny", "prompt": "ROMEO:", "max_tokens": 400, "stream": stream})
}

fn texts(answer: &Value) -> Vec<String> {
    let choices = answer["choices"].as_array().unwrap();
    choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn completions_are_what_run_prints() {
    let dir = example_engine("--dtype f32", "");
    let served = Served::start(dir.path(), "");
    let mut line = vec!["--input-text"];
    line.extend(PROMPTS);
    let run = |flags: &str| -> Value {
        serde_json::from_str(&mixtral_in(dir.path(), &format!("run --json --max-output-len 24 {flags}"), &line).ok())
            .unwrap()
    };
    let outputs = |run: &Value| -> Vec<String> {
        let prompts = run["prompts"].as_array().unwrap();
        let outputs = prompts.iter().flat_map(|prompt| prompt["outputs"].as_array().unwrap());
        outputs.map(|output| output["text"].as_str().unwrap().to_owned()).collect()
    };

    let greedy = run("");
    let asked = json!({"model": "tiny", "prompt": PROMPTS, "max_tokens": 24, "temperature": 0});
    let answer = served.complete(&asked);
    assert_eq!(texts(&answer), outputs(&greedy));
    assert_eq!(answer["object"], "text_completion");
    assert!(answer["choices"].as_array().unwrap().iter().all(|choice| choice["finish_reason"] == "length"));
    let ids: Vec<&Value> = greedy["prompts"].as_array().unwrap().iter().map(|prompt| &prompt["ids"]).collect();
    let prompt_tokens: usize = ids.iter().map(|ids| ids.as_array().unwrap().len()).sum();
    let usage = json!({"prompt_tokens": prompt_tokens, "completion_tokens": 72, "total_tokens": prompt_tokens + 72});
    assert_eq!(answer["usage"], usage);
    for (index, ids) in ids.iter().enumerate() {
        let asked = json!({"model": "tiny", "prompt": ids, "max_tokens": 24, "temperature": 0});
        assert_eq!(texts(&served.complete(&asked)), outputs(&greedy)[index..=index]);
    }
    let asked = json!({"model": "tiny", "prompt": ids, "max_tokens": 24, "temperature": 0});
    assert_eq!(texts(&served.complete(&asked)), outputs(&greedy));

    // Draws depend on the seed, on a prompt's place in its request and on the number of the answer.
    let drawn = run("--top-k 40 --temperature 0.9 --random-seed 11 --num-return-sequences 2 --presence-penalty 0.5");
    let asked = json!({"model": "tiny", "prompt": PROMPTS, "max_tokens": 24, "n": 2, "seed": 11, "top_k": 40,
        "temperature": 0.9, "presence_penalty": 0.5});
    assert_eq!(texts(&served.complete(&asked)), outputs(&drawn));
    let other = json!({"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 24});
    assert_ne!(texts(&served.complete(&other)), texts(&served.complete(&other)), "without a seed, draws differ");

    // An answer ends before a text that ends it, and may begin with its prompt.
    let whole = &outputs(&greedy)[0];
    let stop = &whole[5..8];
    let asked = json!({"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0, "stop": [stop, "~"],
        "echo": true});
    let answer = served.complete(&asked);
    let expected = format!("{}{}", PROMPTS[0], &whole[..whole.find(stop).unwrap()]);
    assert_eq!(texts(&answer), [expected]);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
}

#[test]
fn a_stream_has_the_text_of_the_whole() {
    let dir = example_engine("--dtype f32", "");
    let served = Served::start(dir.path(), "");
    let mut asked = json!({"model": "tiny", "prompt": PROMPTS, "max_tokens": 30, "n": 2, "seed": 5, "echo": true});
    let whole = served.complete(&asked);
    asked["stream"] = json!(true);
    asked["stream_options"] = json!({"include_usage": true});
    let frames = served.post("/v1/completions", &asked).frames();
    let mut pieces = vec![String::new(); 6];
    let mut finished = [0; 6];
    let (last, chunks) = frames.split_last().unwrap();
    for chunk in chunks {
        assert_eq!((&chunk["usage"], &chunk["object"]), (&Value::Null, &json!("text_completion")));
        for choice in chunk["choices"].as_array().unwrap() {
            let index = usize::try_from(choice["index"].as_u64().unwrap()).unwrap();
            assert_eq!(finished[index], 0, "nothing comes after the end");
            pieces[index] += choice["text"].as_str().unwrap();
            finished[index] += usize::from(choice["finish_reason"] != Value::Null);
        }
    }
    assert_eq!((pieces, finished), (texts(&whole), [1; 6]));
    // One for each token, and the echo of each answer's prompt.
    assert_eq!(chunks.len(), 6 * 30 + 6);
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &whole["usage"]));

    asked["stream_options"] = json!({"continuous_usage_stats": true});
    let frames = served.post("/v1/completions", &asked).frames();
    let used = |frame: &Value| frame["usage"]["completion_tokens"].as_u64().unwrap();
    assert!(frames.is_sorted_by_key(used));
    assert_eq!(used(frames.last().unwrap()), 180);
}

/// `</s>` has no text, and neither has what waits for the rest of a character. Their tokens have chunks all the same.
#[test]
fn tokens_without_text_have_chunks() {
    let dir = example_engine("", "");
    let served = Served::start(dir.path(), "");
    let asked = json!({"model": "tiny", "prompt": "a", "max_tokens": 10, "stream": true, "ignore_eos": true, "logit_bias": {"2": 100}});
    let frames = served.post("/v1/completions", &asked).frames();
    assert_eq!(frames.iter().map(|frame| &frame["choices"][0]["text"]).collect::<Vec<_>>(), [""; 10]);
}

#[test]
fn what_is_wrong_is_said_in_openais_body() {
    let dir = example_engine("", "--max-seq-len 64");
    let served = Served::start(dir.path(), "--max-body-bytes 4000");
    let mut said = String::new();
    let mut note = |what: &str, answer: &crate::served::Answer| {
        let error = &answer.json()["error"];
        assert_eq!(answer.json().as_object().unwrap().len(), 1);
        let [message, kind, param, code] = ["message", "type", "param", "code"].map(|key| error[key].clone());
        let plain = |value: &Value| value.as_str().map_or("-".to_owned(), str::to_owned);
        said += &format!(
            "{what}\n    {} {} {} {}\n    {}\n",
            answer.status,
            plain(&kind),
            plain(&param),
            plain(&code),
            plain(&message)
        );
    };
    for more in [
        json!({"model": "gpt-4"}),
        json!({"model": null}),
        json!({"prompt": null}),
        json!({"prompt": []}),
        json!({"prompt": [1, "a"]}),
        json!({"prompt": [1, 2048]}),
        json!({"max_tokens": 0}),
        json!({"max_tokens": -1}),
        json!({"max_tokens": 100}),
        json!({"temperature": -0.1}),
        json!({"temperature": "hot"}),
        json!({"top_p": 1.1}),
        json!({"top_k": -2}),
        json!({"min_p": 2}),
        json!({"presence_penalty": 3}),
        json!({"repetition_penalty": 0}),
        json!({"n": 0}),
        json!({"n": 1000}),
        json!({"n": 3, "best_of": 2}),
        json!({"seed": 1.5}),
        json!({"stop": ""}),
        json!({"stop": [1]}),
        json!({"stream_options": {"include_usage": true}}),
        json!({"stream": true, "stream_options": {"usage": true}}),
        json!({"suffix": "end"}),
        json!({"max_new_tokens": 3}),
        json!({"user": 7}),
    ] {
        let mut body = json!({"model": "tiny", "prompt": "a"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        note(&more.to_string(), &served.post("/v1/completions", &body));
    }
    for body in ["", "[1]", "{\"model\": \"tiny\"", "{} {}", "\"text\"", "nul"] {
        note(&format!("body {body:?}"), &ask(served.address, &post("/v1/completions", body, "")));
    }
    note("5000 bytes", &served.post("/v1/completions", &json!({"model": "tiny", "prompt": "a".repeat(5000)})));
    let plain = post("/v1/completions", "{}", "").replace("application/json", "text/plain");
    note("text/plain", &ask(served.address, &plain));
    note("GET /v1/completions", &served.get("/v1/completions"));
    note("GET /v1/nothing", &served.get("/v1/nothing"));
    note("GET /v1/models/other", &served.get("/v1/models/other"));
    note("detokenize 2048", &served.post("/detokenize", &json!({"tokens": [5, 2048]})));
    // Nulls are as good as nothing.
    let nulls = json!({"model": "tiny", "prompt": "a", "max_tokens": 1, "stop": null, "suffix": null, "n": null});
    served.complete(&nulls);
    insta::assert_snapshot!(said);
}

#[test]
fn models_tokens_and_health() {
    let dir = example_engine("", "");
    let served = Served::start(dir.path(), "--served-model-name tiny org/tiny");
    let models = served.get("/v1/models").ok();
    let names: Vec<&Value> = models["data"].as_array().unwrap().iter().map(|model| &model["id"]).collect();
    assert_eq!(names, ["tiny", "org/tiny"]);
    let model = served.get("/v1/models/org/tiny").ok();
    assert_eq!((&model["object"], &model["max_model_len"]), (&json!("model"), &json!(512)));
    let answer = served.complete(&json!({"model": "org/tiny", "prompt": "a", "max_tokens": 1}));
    assert_eq!(answer["model"], "tiny");

    let text = "ROMEO:\nAs I 😀";
    let tokens = served.post("/tokenize", &json!({"model": "tiny", "prompt": text, "return_token_strs": true})).ok();
    let ids = tokens["tokens"].as_array().unwrap();
    assert_eq!((tokens["count"].as_u64().unwrap(), &tokens["max_model_len"]), (ids.len() as u64, &json!(512)));
    assert_eq!((&ids[0], &tokens["token_strs"][0]), (&json!(1), &json!("<s>")));
    let bare = served.post("/tokenize", &json!({"prompt": text, "add_special_tokens": false})).ok();
    assert_eq!((bare["tokens"].as_array().unwrap(), &bare["token_strs"]), (&ids[1..].to_vec(), &Value::Null));
    assert_eq!(served.post("/detokenize", &json!({"tokens": ids})).ok()["prompt"], text);

    for path in ["/health", "/ping", "/ready"] {
        assert_eq!(served.get(path).status, 200);
    }
    let named = "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: mine\r\n\r\n";
    assert_eq!(ask(served.address, named).headers["x-request-id"], "mine");
    assert_eq!(served.get("/health").headers["x-request-id"].len(), 16);
}

#[test]
fn only_clients_with_a_key_are_served() {
    let dir = example_engine("", "");
    std::fs::write(dir.path().join("keys"), "first\n\n second \n").unwrap();
    let served = Served::start(dir.path(), "--api-key-file keys --api-key third");
    let body = json!({"model": "tiny", "prompt": "a", "max_tokens": 1}).to_string();
    for (key, status) in [("first", 200), ("second", 200), ("third", 200), ("fourth", 401), ("", 401)] {
        let headers = format!("Authorization: Bearer {key}\r\n");
        assert_eq!(ask(served.address, &post("/v1/completions", &body, &headers)).status, status, "{key}");
    }
    for path in ["/v1/models", "/v1/nothing"] {
        let refused = served.get(path);
        assert_eq!((refused.status, &*refused.headers["www-authenticate"]), (401, "Bearer"));
        assert_eq!(refused.json()["error"]["code"], "invalid_api_key");
    }
    assert_eq!(served.post("/tokenize", &json!({"prompt": "a"})).status, 401);
    assert_eq!(served.get("/health").status, 200);
}

/// With places for one sequence alone, a second one is turned away while the first runs. A client that goes away makes
/// room, however long its answer would have been.
#[test]
fn a_client_that_goes_away_makes_room() {
    let dir = example_engine("", "--max-batch-size 1");
    let served = Served::start(dir.path(), "--max-waiting 0");
    let short = json!({"model": "tiny", "prompt": "a", "max_tokens": 1});
    for stream in [true, false] {
        let mut gone = 0;
        // The long answer may be complete before the second client comes, so it is tried until it was not.
        wait_for("a client that is turned away", || {
            let mut client = connect(served.address);
            client.write_all(post("/v1/completions", &long(stream).to_string(), "").as_bytes()).unwrap();
            if stream {
                let mut start = [0; 15];
                client.read_exact(&mut start).unwrap();
                assert_eq!(&start, b"HTTP/1.1 200 OK");
            } else {
                std::thread::sleep(Duration::from_millis(20));
            }
            let second = served.post("/v1/completions", &short);
            if second.status == 429 {
                assert_eq!(second.headers["retry-after"], "1");
                assert_eq!(second.json()["error"]["type"], "rate_limit_error");
            }
            drop(client);
            gone += 1;
            second.status == 429
        });
        wait_for("room for another client", || served.post("/v1/completions", &short).status == 200);
        assert!(gone > 0);
    }
    assert_eq!(served.complete(&long(false))["usage"]["completion_tokens"], 400);
}

#[test]
fn a_reader_that_does_not_read_stalls_nobody() {
    let dir = example_engine("", "--max-batch-size 8");
    let served = Served::start(dir.path(), "");
    let idle: Vec<_> = (0..6)
        .map(|_| {
            let mut client = connect(served.address);
            client.write_all(post("/v1/completions", &long(true).to_string(), "").as_bytes()).unwrap();
            client
        })
        .collect();
    for _ in 0..3 {
        served.complete(&json!({"model": "tiny", "prompt": "a", "max_tokens": 20}));
    }
    for client in idle {
        assert!(read_answer(client).frames().len() > 100);
    }
}

#[test]
fn sigterm_lets_answers_finish() {
    let dir = example_engine("", "");
    let served = Served::start(dir.path(), "");
    let mut client = BufReader::new(connect(served.address));
    client.get_mut().write_all(post("/v1/completions", &long(true).to_string(), "").as_bytes()).unwrap();
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        client.read_line(&mut line).unwrap();
    }
    served.signal("-TERM");
    // What comes now is refused, or the server is gone already.
    wait_for("new requests to be refused", || {
        let Ok(mut stream) = std::net::TcpStream::connect(served.address) else { return true };
        let _ = stream.write_all(post("/v1/completions", &long(false).to_string(), "").as_bytes());
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer.is_empty() || answer.starts_with("HTTP/1.1 503") && answer.contains("the server is being stopped")
    });
    let mut rest = String::new();
    client.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"finish_reason\":\"length\"") && rest.contains("data: [DONE]"), "{rest}");
    let (status, log) = served.ended();
    assert_eq!(status.code(), Some(0), "{log}");
}

#[test]
fn answers_that_do_not_end_in_time_end_with_an_error() {
    let dir = example_engine("", "");
    let served = Served::start(dir.path(), "--drain-timeout 1");
    // A batch of long answers takes longer than a second.
    let asked = json!({"model": "tiny", "prompt": vec!["ROMEO:"; 64], "max_tokens": 500, "stream": true});
    let mut client = connect(served.address);
    client.write_all(post("/v1/completions", &asked.to_string(), "").as_bytes()).unwrap();
    let mut start = [0; 15];
    client.read_exact(&mut start).unwrap();
    served.signal("-TERM");
    let mut rest = String::new();
    client.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("the server was stopped before the answer was complete"), "{rest}");
    let (status, log) = served.ended();
    assert_eq!(status.code(), Some(0), "{log}");
}

/// Slow and large bodies are refused, and the limits hold for heads too.
#[test]
fn slow_and_large_requests_are_refused() {
    let dir = example_engine("", "");
    let served = Served::start(dir.path(), "--receive-timeout 1 --max-body-bytes 1000");
    let start = Instant::now();
    let mut slow_head = connect(served.address);
    slow_head.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n").unwrap();
    let mut slow_body = connect(served.address);
    let head = post("/v1/completions", &"a".repeat(900), "");
    slow_body.write_all(&head.as_bytes()[..head.len() - 800]).unwrap();
    // A chunked body does not say how large it is.
    let mut endless = connect(served.address);
    endless
        .write_all(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        .unwrap();
    let chunk = format!("100\r\n{}\r\n", "a".repeat(256));
    for _ in 0..8 {
        let _ = endless.write_all(chunk.as_bytes());
    }
    assert_eq!(read_answer(endless).status, 413);
    assert_eq!(read_answer(slow_body).status, 408);
    let mut nothing = Vec::new();
    let _ = slow_head.read_to_end(&mut nothing);
    assert!(nothing.is_empty() || nothing.starts_with(b"HTTP/1.1 408"), "{}", String::from_utf8_lossy(&nothing));
    assert!(start.elapsed() >= Duration::from_secs(1));
    served.complete(&json!({"model": "tiny", "prompt": "a", "max_tokens": 1}));
}

/// A process for rank 1 of 2, of the engine in `dir`.
fn other_rank(dir: &Path) -> Child {
    Command::new(binary())
        .args(["serve", "--port", "0"])
        .current_dir(dir)
        .envs([("RANK", "1"), ("WORLD_SIZE", "2")])
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

const RANK_0: [(&str, &str); 2] = [("RANK", "0"), ("WORLD_SIZE", "2")];

/// A supervisor that stops the processes of all ranks gets an orderly end.
#[test]
fn all_ranks_end_when_all_are_told_to() {
    let dir = example_engine("--tp_size 2 --moe_tp_mode 1", "");
    let mut other = other_rank(dir.path());
    let served = Served::start_with(dir.path(), "", &RANK_0);
    kill(other.id(), "-TERM");
    assert_eq!(served.complete(&long(false))["usage"]["completion_tokens"], 400);
    served.signal("-TERM");
    let (status, log) = served.ended();
    assert_eq!((status.code(), other.wait().unwrap().code()), (Some(0), Some(0)), "{log}");
}

/// If another rank is killed, running answers end with an error, and the process ends with exit code 1.
#[test]
fn a_dead_rank_ends_the_server() {
    let dir = example_engine("--tp_size 2 --moe_tp_mode 1", "");
    for busy in [true, false] {
        let mut other = other_rank(dir.path());
        let served = Served::start_with(dir.path(), "", &RANK_0);
        served.complete(&json!({"model": "tiny", "prompt": "a", "max_tokens": 2}));
        let client = busy.then(|| {
            let asked = json!({"model": "tiny", "prompt": vec!["ROMEO:"; 64], "max_tokens": 500, "stream": true});
            let mut client = connect(served.address);
            client.write_all(post("/v1/completions", &asked.to_string(), "").as_bytes()).unwrap();
            let mut start = [0; 15];
            client.read_exact(&mut start).unwrap();
            client
        });
        let died = Instant::now();
        kill(other.id(), "-KILL");
        other.wait().unwrap();
        wait_for("the health to be bad", || {
            let Ok(mut stream) = std::net::TcpStream::connect(served.address) else { return true };
            let _ = stream.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer);
            answer.starts_with("HTTP/1.1 503") && answer.contains("the engine failed") && answer.contains("rank 1")
        });
        if let Some(mut client) = client {
            let mut rest = String::new();
            client.read_to_string(&mut rest).unwrap();
            assert!(rest.contains("the engine failed") && rest.contains("data: [DONE]"), "{rest}");
        }
        let (status, log) = served.ended();
        assert_eq!(status.code(), Some(1), "{log}");
        assert!(log.contains("rank 1"), "{log}");
        assert!(died.elapsed() < Duration::from_secs(10), "{:?}", died.elapsed());
    }
}

/// `bench --url` measures a server as `bench` measures an engine, and says how many requests were answered in time.
#[test]
fn a_server_is_measured_by_bench() {
    let dir = example_engine("", "");
    let served = Served::start(dir.path(), "--api-key key");
    let bench = |flags: &str| {
        let line = format!("bench --url http://{} --api-key key --requests 12 {flags}", served.address);
        mixtral_in(dir.path(), &line, &[])
    };
    let figures: Value = serde_json::from_str(
        &bench("--json --input-len 5-20 --output-len 8 --concurrency 3 --arrival-rate 500 --first-token-limit 60000")
            .ok(),
    )
    .unwrap();
    assert_eq!(
        (&figures["model"], &figures["failed"], &figures["concurrency"]),
        (&json!("tiny"), &json!(0), &json!(3))
    );
    let throughput = &figures["throughput"];
    assert_eq!((&throughput["requests"], &throughput["output_tokens"]), (&json!(12), &json!(96)));
    assert!(throughput["prompt_tokens"].as_u64().unwrap() >= 60);
    for rate in ["output_tokens_per_s", "first_token_ms_median", "per_token_ms_p99"] {
        assert!(throughput[rate].as_f64().unwrap() > 0.0, "{rate}");
    }
    assert!(throughput["between_tokens"]["p99_ms"].as_f64().unwrap() > 0.0);
    // A chunk for each token, whatever its text.
    assert_eq!(figures["tokens_per_chunk"], 1.0);
    assert!(figures["goodput_per_s"].as_f64().unwrap() > 0.0);
    let printed = bench("--sequential").ok();
    assert!(printed.starts_with(&format!("tiny at http://{}, at most 1 at a time", served.address)), "{printed}");
    assert!(printed.contains("12 requests one after another"), "{printed}");

    let refused = bench("--input-len 600");
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains("status 400") && refused.err.contains("at most 512 tokens"), "{}", refused.err);
    let line = format!("bench --url http://{} --requests 1", served.address);
    assert!(mixtral_in(dir.path(), &line, &[]).err.contains("no API key"));
    assert_eq!(mixtral_in(dir.path(), "bench --url http://localhost:1", &[]).code, 2);
}
