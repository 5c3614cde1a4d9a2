#!/usr/bin/env python3
"""Requests drawn from a description of `mixtral serve`, on the example model on the CPU. It is run by hand.

    conformance.py --mixtral PATH [--description FILE] [--examples 2500]

It needs `pip install schemathesis`, whose program `st` draws the requests and checks the answers: none has a status of 5xx,
and each is what the description says. The description is the server's /openapi.json, or a FILE whose paths begin behind
/v1, such as OpenAI's own. Schemathesis reads this file too: the functions marked as hooks change what it draws.
"""

import argparse
import collections
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import schemathesis

from server import KEY, tiny

FEW = ("max_tokens", "max_completion_tokens", "n", "best_of")
RARE = ("guided_json", "guided_regex", "guided_grammar", "response_format", "tools", "tool_choice", "parallel_tool_calls",
        "logit_bias", "best_of", "stop", "ignore_eos", "chat_template_kwargs", "reasoning_effort", "verbosity", "prediction",
        "audio", "functions", "function_call", "web_search_options", "moderation", "suffix")  # fmt: skip

rng = random.Random(7)
statuses = collections.Counter()


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@schemathesis.hook
def map_body(context, body):
    """Names the model, and keeps answers short. Seven in ten bodies then lose what most requests do not have and what makes
    no sense together, so that some are answered: nearly all that is drawn freely is refused."""
    if not isinstance(body, dict):
        return body
    body = dict(body)
    if isinstance(body.get("model"), str):
        body["model"] = "tiny"
    for name in FEW:
        if is_number(body.get(name)) and body[name] > 4:
            body[name] = rng.randint(1, 4)
    if rng.random() < 0.3:
        return body
    needed = {"model", "prompt", "messages", "tokens"}
    body = {name: value for name, value in body.items()
            if name in needed or rng.random() > (0.85 if name in RARE else 0.4)}  # fmt: skip
    body.pop("min_tokens", None)
    if body.get("stream") is not True:
        body.pop("stream_options", None)
    if body.get("logprobs") is not True:
        body.pop("top_logprobs", None)
    if "max_completion_tokens" in body:
        body.pop("max_tokens", None)
    for name, end in (("logprobs", 21), ("top_logprobs", 21), ("temperature", 2)):
        if is_number(body.get(name)):
            body[name] = abs(body[name]) % end
    for name in ("prompt", "tokens"):
        if isinstance(body.get(name), list):
            body[name] = known_ids(body[name])[:100]
    if isinstance(body.get("messages"), list):
        body["messages"] = [plain(message) for message in body["messages"][:6]]
    return body


def known_ids(value):
    if isinstance(value, list):
        return [known_ids(inner) for inner in value]
    return value % 2048 if is_number(value) and value >= 0 else value


def plain(message):
    """A message without the fields that only some of its kind have."""
    if not isinstance(message, dict):
        return message
    message = {name: message[name] for name in ("role", "content", "name") if name in message}
    if message.get("role") not in ("system", "user", "assistant"):
        message["role"] = rng.choice(["system", "user", "assistant"])
    if not isinstance(message.get("content"), str):
        message["content"] = "x"
    return message


@schemathesis.hook
def after_call(context, case, response):
    statuses[f"{case.method} {case.path} {response.status_code}"] += 1
    lines = [f"{count} {what}\n" for what, count in statuses.items() if not what.endswith(" 405")]
    Path(os.environ["STATUSES"]).write_text("".join(sorted(lines)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtral", type=Path, required=True)
    parser.add_argument("--description", type=Path, help="another description than the server's own")
    parser.add_argument("--examples", type=int, default=2500, help="how many requests are drawn for each path")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tiny(args.mixtral.resolve(), Path(folder)) as server:
        said = Path(folder) / "statuses"
        environment = os.environ | {"SCHEMATHESIS_HOOKS": "conformance", "PYTHONPATH": str(Path(__file__).parent), "STATUSES": str(said)}
        described = [args.description, "--url", f"{server.url}/v1"] if args.description else [f"{server.url}/openapi.json"]
        checks = "not_a_server_error,response_schema_conformance,status_code_conformance,content_type_conformance"
        run = subprocess.run(
            [Path(sys.executable).parent / "st", "run", *described, "--header", f"Authorization: Bearer {KEY}", "--checks", checks,
             "--max-examples", str(args.examples), "--phases", "coverage,fuzzing", "--continue-on-failure"],
            env=environment)  # fmt: skip
        print(said.read_text())
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
