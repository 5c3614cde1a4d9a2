#!/usr/bin/env python3
"""OpenAI's own clients against `mixtral serve`, on the example model on the CPU.

    clients.py --mixtral PATH [--javascript DIR]

DIR is a folder whose node_modules has OpenAI's package for JavaScript; without it, only the Python client is tried. The
clients check the types of answers. This script checks what is in them.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import httpx
import jsonschema
import openai
import pydantic
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from server import KEY, ROOT, tiny

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells it.", "strict": False,
                                           "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]
USER = [{"role": "user", "content": "What is it?"}]


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
    # Fields that say what this server does anyway.
    same = client.chat.completions.create(**asked, modalities=["text"], service_tier="auto", store=False,
                                          safety_identifier="me", prompt_cache_key="plays", user="me", metadata={"a": "b"})
    assert [choice.message for choice in same.choices] == [choice.message for choice in plain.choices]


class Size(pydantic.BaseModel):
    width: int = pydantic.Field(ge=1, le=99)
    height: int = pydantic.Field(ge=1, le=99)


class House(pydantic.BaseModel):
    owner: Literal["Montague", "Capulet"]
    rooms: list[Size] = pydantic.Field(min_length=1, max_length=3)
    burnt: bool | None


def forms(client):
    """Answers of a given form: the client reads them into its own types."""
    asked = {"model": "tiny", "messages": USER, "seed": 5, "max_completion_tokens": 400}
    house = client.chat.completions.parse(**asked, response_format=House).choices[0].message.parsed
    assert isinstance(house, House)
    answer = client.chat.completions.create(**asked, response_format={"type": "json_object"}, logit_bias={})
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    text = client.completions.create(model="tiny", prompt="ROMEO:", max_tokens=50, seed=1,
                                     extra_body={"guided_regex": "[A-Z][a-z]{2,5}, [0-9]{2}"}).choices[0].text
    assert re.fullmatch("[A-Z][a-z]{2,5}, [0-9]{2}", text), text
    choice = client.completions.create(model="tiny", prompt="ROMEO:", max_tokens=50, stream=True,
                                       extra_body={"guided_grammar": 'start: "yes" | "no"'})
    assert "".join(chunk.choices[0].text for chunk in choice) in ("yes", "no")
    wrong = {"model": "tiny", "prompt": "a", "extra_body": {"guided_json": {"type": "objekt"}}}
    assert expect(openai.BadRequestError, lambda: client.completions.create(**wrong)).param == "guided_json"

    # Arguments that the function does not list are none of it, though the schema does not say so.
    city = {"type": "object", "properties": {"city": {"enum": ["Verona", "Mantua"]}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": city}},
             {"type": "function", "function": {"name": "time", "parameters": city}}]
    named = {"type": "function", "function": {"name": "time"}}
    for choice, names in [("required", {"weather", "time"}), (named, {"time"})]:
        extra = {"parallel_tool_calls": False} if choice == "required" else {}
        called = client.chat.completions.create(**asked, tools=tools, tool_choice=choice, **extra).choices[0]
        [call] = called.message.tool_calls
        assert called.finish_reason == "tool_calls" and called.message.content is None
        assert call.function.name in names
        assert json.loads(call.function.arguments) in ({"city": "Verona"}, {"city": "Mantua"})
        with client.chat.completions.stream(**asked, tools=tools, tool_choice=choice, **extra) as stream:
            final = stream.until_done().get_final_completion().choices[0].message
        assert final.tool_calls[0].function.arguments == call.function.arguments
        # The call goes back as it came, with the tool's answer.
        answered = USER + [called.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "fair"}]
        client.chat.completions.create(model="tiny", messages=answered, tools=tools, max_tokens=1)


def schema(rng, depth):
    """A schema drawn at random, of values that a short answer can have."""
    kinds = ["enum", "integer", "boolean", "null", "string", "const"] + ["object", "array", "any of"] * (depth > 0)
    match rng.choice(kinds):
        case "enum":
            return {"enum": rng.sample(["a", "b c", "\u00e9", 7, -1.5, None, True, "line\n"], 3)}
        case "const":
            return {"const": rng.choice(["x", 0, {"k": [1, "two"]}])}
        case "integer":
            low = rng.randrange(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(100)}
        case "string":
            return {"type": "string", "pattern": rng.choice(["^[a-f]{1,4}$", "^(on|off)$", "^[0-9]{2}:[0-9]{2}$"])}
        case "array":
            low = rng.randrange(3)
            return {"type": "array", "items": schema(rng, depth - 1), "minItems": low, "maxItems": low + rng.randrange(3)}
        case "any of":
            return {"anyOf": [schema(rng, depth - 1) for _ in range(2)]}
        case "object":
            names = rng.sample(["name", "size", "of", "kind", "\u00fcber"], rng.randrange(1, 4))
            return {"type": "object", "properties": {name: schema(rng, depth - 1) for name in names},
                    "required": names[: rng.randrange(len(names) + 1)], "additionalProperties": False}
        case kind:
            return {"type": kind}


def schemas(client, count, seed):
    """Every finished answer fits its schema, which another implementation confirms."""
    rng = random.Random(seed)
    drawn = [schema(rng, 1 + number * 3 // count) for number in range(count)]

    def answer(wanted):
        form = {"type": "json_schema", "json_schema": {"name": "drawn", "schema": wanted, "strict": True}}
        return client.chat.completions.create(model="tiny", messages=USER, response_format=form, max_tokens=300).choices[0]

    finished = 0
    with ThreadPoolExecutor(4) as pool:
        for wanted, choice in zip(drawn, pool.map(answer, drawn)):
            if choice.finish_reason == "stop":
                finished += 1
                jsonschema.validate(json.loads(choice.message.content), wanted)
    assert finished >= 0.95 * count, f"only {finished} of {count} answers were finished"
    print(f"{finished} of {count} answers finished, and all of them fit their schemas (seed {seed})")


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


def document(url):
    """The server's own description fits what it takes and what it refuses."""
    described = httpx.get(f"{url}/openapi.json").json()
    cases = {
        "/v1/completions": (
            [{"prompt": "a"}, {"prompt": ["a", "b"]}, {"prompt": [1, 5]}, {"prompt": [[1], [1, 5]], "stop": "x"},
             {"prompt": "a", "stop": ["x", "y"], "stream": True, "stream_options": {"include_usage": True}}],
            [{}, {"prompt": {"Text": "a"}}, {"prompt": []}, {"prompt": "a", "stop": {"Text": "x"}}, {"prompt": "a", "n": 0}]),
        "/v1/chat/completions": (
            [{"messages": USER}, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
             {"messages": USER, "tools": TOOLS, "tool_choice": "none"},
             {"messages": USER, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}}],
            [{"messages": []}, {"messages": [{"role": "user", "content": {"Text": "a"}}]},
             {"messages": USER, "tools": TOOLS, "tool_choice": "never"}, {"messages": USER, "modalities": ["audio"]}]),
    }  # fmt: skip
    for path, (taken, refused) in cases.items():
        schema = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        fits = jsonschema.Draft202012Validator({**schema, "components": described["components"]})
        for body, status in [(body, 200) for body in taken] + [(body, 400) for body in refused]:
            body = {"model": "tiny", "max_tokens": 1, **body}
            answer = httpx.post(url + path, json=body, headers={"Authorization": f"Bearer {KEY}"})
            assert answer.status_code == status and fits.is_valid(body) == (status == 200), (body, answer.text)


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
    parser.add_argument("--schemas", type=int, default=200, help="how many schemas are drawn")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="seed of the schemas")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tiny(args.mixtral.resolve(), Path(folder), "--max-waiting", "4") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=30)
        completions(client)
        chat(client)
        errors(client, server.url)
        document(server.url)
        forms(client)
        schemas(client, args.schemas, args.seed)
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
