#!/usr/bin/env python3
"""OpenAI's own clients against `mixtral serve`, on the example model on the CPU.

    clients.py --mixtral PATH [--javascript DIR]

DIR is a folder whose node_modules has OpenAI's package for JavaScript; without it, only the Python client is tried. The
clients check the types of answers. This script checks what is in them.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

ROOT = Path(__file__).parents[2]
KEY = "a key"
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\\n' }}{% endfor %}assistant:"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells it.", "strict": False,
                                           "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]
USER = [{"role": "user", "content": "What is it?"}]


class Server:
    """A server on a free port, of an engine of the example model."""

    def __init__(self, mixtral, folder):
        run = lambda *args: subprocess.run([mixtral, *args], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        run("-q", "convert", "--model-dir", ROOT / "examples/tiny-mixtral", "--dtype", "f32")
        run("-q", "build", "--max-batch-size", "4")
        (folder / "chat.jinja").write_text(TEMPLATE)
        self.process = subprocess.Popen(
            [mixtral, "-q", "serve", "--port", "0", "--served-model-name", "tiny", "--api-key", KEY,
             "--chat-template", "chat.jinja", "--max-waiting", "4"],
            cwd=folder, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().split()[-1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        ended = self.process.wait(timeout=60)
        assert ended == 0, f"the server ended with {ended}"


def expect(error, call):
    """The error of a call that must fail."""
    try:
        call()
    except error as caught:
        return caught
    raise AssertionError(f"expected {error.__name__}")


def completions(client):
    greedy = {"model": "tiny", "prompt": "ROMEO:", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**greedy, logprobs=2, echo=True)
    assert isinstance(whole, Completion) and whole.object == "text_completion" and whole.model == "tiny"
    choice = whole.choices[0]
    assert choice.finish_reason == "length" and choice.text.startswith("ROMEO:")
    count = whole.usage.prompt_tokens + 12
    assert whole.usage.completion_tokens == 12 and whole.usage.total_tokens == count
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == count
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    # What lm-eval does to see whether a continuation is the greedy one.
    assert all(logprob == max(top.values()) for logprob, top in
               zip(logprobs.token_logprobs[whole.usage.prompt_tokens:], logprobs.top_logprobs[whole.usage.prompt_tokens:]))

    chunks = list(client.completions.create(**greedy, stream=True, stream_options={"include_usage": True}))
    assert "ROMEO:" + "".join(chunk.choices[0].text for chunk in chunks[:-1]) == choice.text
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage

    many = client.completions.create(
        model="tiny", prompt=[[1, 5, 6], [1, 7]], max_tokens=5, n=2, best_of=3, seed=7, temperature=0.8, top_p=0.9,
        presence_penalty=0.1, frequency_penalty=0.1, logit_bias={"20": -100}, stop=["\n\n"], user="me",
        extra_body={"top_k": 30, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True})
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]


def chat(client):
    asked = {"model": "tiny", "messages": USER, "max_completion_tokens": 10, "seed": 1, "n": 2}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, tools=TOOLS, tool_choice="auto")
    assert isinstance(whole, ChatCompletion)
    for choice in whole.choices:
        assert choice.message.role == "assistant" and choice.message.tool_calls is None
        assert len(choice.logprobs.content) == 10 and len(choice.logprobs.content[0].top_logprobs) == 3
    plain = client.chat.completions.create(**asked)
    texts = ["", ""]
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        assert isinstance(chunk, ChatCompletionChunk)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in plain.choices] and chunk.usage == plain.usage
    ending = asked | {"stop": ["e"], "max_completion_tokens": 400}
    with client.chat.completions.stream(**ending) as stream:
        final = stream.until_done().get_final_completion()
    ended = client.chat.completions.create(**ending)
    assert [choice.message.content for choice in final.choices] == [choice.message.content for choice in ended.choices]
    assert all(choice.finish_reason == "stop" for choice in ended.choices)
    # An answer is sent back as the client gives it.
    again = USER + [plain.choices[0].message.model_dump(), {"role": "user", "content": "And?"}]
    client.chat.completions.create(model="tiny", messages=again, max_tokens=1)


def errors(client, url):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    missing = expect(openai.NotFoundError, lambda: client.models.retrieve("other"))
    assert missing.code == "model_not_found"
    strangers = openai.OpenAI(base_url=f"{url}/v1", api_key="another")
    assert expect(openai.AuthenticationError, lambda: strangers.models.list()).code == "invalid_api_key"
    wrong = expect(openai.BadRequestError, lambda: client.completions.create(model="tiny", prompt="a", temperature=-1))
    assert wrong.param == "temperature" and "temperature" in wrong.message
    unknown = {"model": "tiny", "prompt": "a", "extra_body": {"do_sample": True}}
    assert expect(openai.BadRequestError, lambda: client.completions.create(**unknown)).param == "do_sample"
    long = {"model": "tiny", "prompt": "a", "max_tokens": 10_000}
    assert expect(openai.BadRequestError, lambda: client.completions.create(**long)).code == "context_length_exceeded"


def crowd(client):
    """More clients than there is room for: those that are turned away try again, as the client does by itself."""
    asked = {"model": "tiny", "prompt": "ROMEO:", "max_tokens": 60, "temperature": 0}
    patient = client.with_options(max_retries=30)
    with ThreadPoolExecutor(24) as pool:
        texts = list(pool.map(lambda _: patient.completions.create(**asked).choices[0].text, range(24)))
    assert len(set(texts)) == 1, "an answer does not depend on who else asks"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mixtral", type=Path, required=True)
    parser.add_argument("--javascript", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Server(args.mixtral.resolve(), Path(folder)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=30)
        completions(client)
        chat(client)
        errors(client, server.url)
        crowd(client)
        print(f"openai {openai.__version__} for Python: all as expected")
        if args.javascript:
            # Packages are looked for beside the script.
            script = Path(shutil.copy(ROOT / "tests/javascript/client.mjs", args.javascript))
            environment = os.environ | {"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": KEY}
            if subprocess.run(["node", script], env=environment).returncode != 0:
                sys.exit("the client for JavaScript failed")


if __name__ == "__main__":
    main()
