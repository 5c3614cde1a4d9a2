//! Conversations: `run --chat`, and `mixtral chat` over a pipe and on a terminal.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::tool::{Said, binary, example_engine, example_model, mixtral_in, mixtral_reading};

const TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}
{{ message.role | upper }}:\n{{ message.content + '\\n\\n' }}
{%- endfor %}
{%- if messages[-1].role == 'nobody' %}{{ raise_exception('nobody speaks') }}{% endif %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:\\n' }}{% endif %}";

/// An engine of the example model in `engine_outputs`, which has a chat template.
fn engine() -> TempDir {
    let dir = TempDir::new().expect("a temporary directory");
    let model = example_model(dir.path());
    fs::write(model.join("chat_template.jinja"), TEMPLATE).unwrap();
    mixtral_in(dir.path(), "convert --model-dir model", &[]).ok();
    mixtral_in(dir.path(), "build --backend cpu --block-size 16", &[]).ok();
    dir
}

/// The first prompt's text and ids, and the text of its output.
fn answered(at: &Path, flags: &str, more: &[&str]) -> (String, Value, String) {
    let said: Value = serde_json::from_str(&mixtral_in(at, &format!("run --json {flags}"), more).ok()).unwrap();
    let prompt = &said["prompts"][0];
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    (text(&prompt["text"]), prompt["ids"].clone(), text(&prompt["outputs"][0]["text"]))
}

#[test]
fn texts_and_messages_are_put_into_the_models_template() {
    let dir = engine();
    let at = dir.path();
    let (text, ids, answer) = answered(at, "--max-output-len 12 --chat --input-text", &["Who's there?"]);
    assert_eq!(text, "<s>USER:\nWho's there?\n\nASSISTANT:\n");
    let by_hand = answered(at, "--max-output-len 12 --no-add-special-tokens --input-text", &[&text]);
    assert_eq!(by_hand, (text, ids.clone(), answer), "the template writes the start token, and nothing else does");
    assert_eq!((&ids[0], ids.as_array().unwrap().iter().filter(|id| **id == 1).count()), (&json!(1), 1));

    let messages =
        json!([{"role": "user", "content": "Nay, answer me"}, {"role": "assistant", "content": "Long live"}]);
    fs::write(at.join("list.json"), messages.to_string()).unwrap();
    fs::write(at.join("object.json"), json!({"messages": messages, "continue_final_message": true}).to_string())
        .unwrap();
    let (text, ..) = answered(at, "--max-output-len 1 --input-file list.json --system-prompt", &["- Be brief."]);
    assert_eq!(text, "<s>SYSTEM:\n- Be brief.\n\nUSER:\nNay, answer me\n\nASSISTANT:\nLong live\n\nASSISTANT:\n");
    let (text, ..) = answered(at, "--max-output-len 1 --input-file object.json", &[]);
    assert_eq!(text, "<s>USER:\nNay, answer me\n\nASSISTANT:\nLong live");

    fs::write(at.join("other.jinja"), "{{ messages[-1].content }}{{ eos_token }}").unwrap();
    let (text, ..) = answered(at, "--max-output-len 1 --chat --chat-template other.jinja --input-text x", &[]);
    assert_eq!(text, "x</s>");
}

#[test]
fn what_cannot_be_a_conversation_is_refused() {
    let (with, without) = (engine(), example_engine("", "--backend cpu"));
    fs::write(with.path().join("nobody.json"), r#"[{"role": "nobody", "content": ""}]"#).unwrap();
    fs::write(with.path().join("none.json"), "[]").unwrap();
    fs::write(with.path().join("key.json"), r#"{"messages": [], "tool": []}"#).unwrap();
    fs::write(with.path().join("wrong.jinja"), "{% if %}").unwrap();
    let lines = [
        (&without, "run --chat --input-text a"),
        (&without, "chat"),
        (&with, "run --input-file nobody.json"),
        (&with, "run --input-file none.json"),
        (&with, "run --input-file key.json"),
        (&with, "run --chat --chat-template wrong.jinja"),
        (&with, "run --chat --chat-template missing.jinja"),
    ];
    let said = lines.map(|(dir, line)| {
        let Said { out, err, code } = mixtral_in(dir.path(), line, &[]);
        assert_eq!((out.as_str(), code), ("", 1), "{line}: {err}");
        format!("$ mixtral {line}\n{err}")
    });
    insta::assert_snapshot!(said.join("\n"));
}

#[test]
fn a_conversation_remembers_its_turns_until_it_is_reset() {
    let dir = engine();
    let at = dir.path();
    let (first, second) = ("Who's there?", "Nay, answer me");
    let lines = format!("{first}\r\n\n{second}\n/reset\n{second}\n/exit\nnever read\n");
    let answers = mixtral_reading(at, &["chat", "--max-output-len", "8", "--stop-words", "\n"], &lines).ok();
    let answers: Vec<&str> = answers.lines().collect();
    let [one, two, alone] = answers[..] else { panic!("{answers:?}") };
    assert_ne!(two, alone, "the first turn is part of the second prompt until it is forgotten");

    let messages = json!([{"role": "user", "content": first}, {"role": "assistant", "content": one},
        {"role": "user", "content": second}]);
    fs::write(at.join("all.json"), messages.to_string()).unwrap();
    let (.., answer) = answered(at, "--max-output-len 8 --input-file all.json --stop-words", &["\n"]);
    assert_eq!(two, answer);
}

#[test]
fn a_turn_that_cannot_be_answered_leaves_the_conversation_as_it_was() {
    let dir = engine();
    let lines = format!("Who's there?\n{}\nWho's there?\n", "long ".repeat(600));
    let Said { out, err, code } = mixtral_reading(dir.path(), &["chat", "--max-output-len", "4"], &lines);
    assert_eq!((out.lines().count(), code), (2, 0), "{out}{err}");
    let error = err.lines().find(|line| line.starts_with("error: ")).unwrap();
    assert!(error.contains("tokens now: the engine takes sequences of at most 512; /reset begins a new one"), "{err}");
}

/// `mixtral chat` on a terminal of its own.
struct Terminal {
    child: Child,
    keys: ChildStdin,
    screen: Arc<(Mutex<String>, Condvar)>,
}

impl Terminal {
    /// Starts it. `script` makes the terminal.
    fn open(at: &Path, flags: &str) -> Terminal {
        // Without `exec` some shells stay, and Ctrl-C ends them.
        let line = format!("exec {} chat --stats {flags}", binary().display());
        let mut child = Command::new("script")
            .args(["--quiet", "--return", "--command", &line, "/dev/null"])
            .current_dir(at)
            .env("TERM", "xterm")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("script starts");
        let (keys, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let screen = Arc::new((Mutex::new(String::new()), Condvar::new()));
        let shown = screen.clone();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut bytes) {
                shown.0.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..count]));
                shown.1.notify_all();
            }
        });
        Terminal { child, keys, screen }
    }

    /// Presses keys. Returns the length of what was shown before.
    fn press(&mut self, keys: &str) -> usize {
        let before = self.screen.0.lock().unwrap().len();
        self.keys.write_all(keys.as_bytes()).unwrap();
        self.keys.flush().unwrap();
        before
    }

    /// Waits until the screen has shown enough. Returns everything that it has shown.
    fn wait(&self, enough: impl Fn(&str) -> bool) -> String {
        let (shown, changed) = &*self.screen;
        let shown = shown.lock().unwrap();
        let (shown, waited) =
            changed.wait_timeout_while(shown, Duration::from_secs(120), |shown| !enough(shown)).unwrap();
        assert!(!waited.timed_out(), "this is all that was shown: {shown}");
        shown.clone()
    }

    /// Waits until `text` was shown so many times.
    fn wait_for(&self, text: &str, times: usize) -> String {
        self.wait(|shown| shown.matches(text).count() >= times)
    }

    /// Presses keys that end the program, and waits until it has ended well.
    fn leave(mut self, keys: &str) {
        self.press(keys);
        let began = Instant::now();
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break Some(status),
                None if began.elapsed() > Duration::from_secs(120) => break None,
                None => thread::sleep(Duration::from_millis(5)),
            }
        };
        let shown = self.screen.0.lock().unwrap();
        assert!(status.is_some_and(|status| status.success()), "{status:?}, after this was shown: {shown:?}");
    }
}

/// What the line editor sends when it begins to wait for a line. What is typed before is lost.
const PROMPT: &str = "\u{1b}[?2004h";

/// Whether the tool that makes terminals is there. If not, it prints so.
fn has_script() -> bool {
    let found = Command::new("script").arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        println!("skipped: what needs a terminal, since there is no `script` (package util-linux)");
    }
    found
}

/// The numbers in the lines that begin with `tokens`.
fn figures(shown: &str) -> Vec<[usize; 3]> {
    let numbers = |line: &str| {
        let numbers = line.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok());
        let numbers: Vec<usize> = numbers.take(3).collect();
        numbers.try_into().unwrap()
    };
    shown.lines().filter(|line| line.starts_with("tokens ")).map(numbers).collect()
}

/// What a turn computes is what is new since the last one: at most that and the part of a block of 16 tokens.
#[test]
fn twenty_turns_compute_only_what_is_new() {
    if !has_script() {
        return;
    }
    let dir = engine();
    let mut terminal = Terminal::open(dir.path(), "--max-output-len 5");
    for turn in 1..=20 {
        terminal.wait_for(PROMPT, turn);
        terminal.press("Speak\r");
    }
    let shown = terminal.wait_for(PROMPT, 21);
    terminal.leave("\u{4}");
    let turns = figures(&shown);
    assert_eq!(turns.len(), 20, "{shown}");
    for pair in turns.windows(2) {
        let ([before, ..], [now, computed, _]) = (pair[0], pair[1]);
        assert!(computed <= now - before / 16 * 16, "{computed} of {now} tokens, after {before}: {turns:?}");
    }
    let all: usize = turns.iter().map(|[_, computed, _]| computed).sum();
    assert!(turns[19][0] > 250 && all < 2 * turns[19][0], "{turns:?}");
}

#[test]
fn ctrl_c_stops_an_answer_and_not_the_program() {
    if !has_script() {
        return;
    }
    let dir = engine();
    for _ in 0..50 {
        let mut terminal = Terminal::open(dir.path(), "--max-output-len 480");
        terminal.wait_for(PROMPT, 1);
        // At the prompt it gives up the line.
        terminal.press("never mind\u{3}");
        terminal.wait_for(PROMPT, 2);
        let before = terminal.press("Speak\r");
        terminal.wait(|shown| shown.len() > before + 100);
        terminal.press("\u{3}");
        let shown = terminal.wait_for("first token ", 1);
        let [[_, _, generated]] = figures(&shown)[..] else { panic!("{shown}") };
        if generated < 480 {
            terminal.wait_for(PROMPT, 3);
            return terminal.leave("/exit\r");
        }
        // On a busy machine an answer may be whole before the key arrives. Then it is tried again.
        terminal.child.kill().unwrap();
        terminal.child.wait().unwrap();
    }
    panic!("no answer was stopped");
}
