#!/usr/bin/env python3
"""What a server adds to its engine: the same requests to `mixtral bench` on the engine and, through HTTP, to `mixtral serve`.

    serving.py --mixtral PATH [--engine DIR] [--backend cuda] [--streams 1 8 64 256] [--input-len 128] [--output-len 128]

First comes the time from the start of the server to the first answered request. Then, for each number of streams, as many requests
as streams are sent at once, and the throughputs are compared. Requests that come one after another show what the server adds to the
time of the first token; requests of mixed lengths, at most 64 at a time, how evenly tokens come while others' prompts are
computed. Last comes guidellm with the same lengths and streams, if that package is installed. Without DIR the engine is one of
examples/tiny-mixtral. An engine without a tokenizer gets one that is made here.
"""

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from server import ROOT, Server, example_engine
from tool import run_tool

# Requests one after another, and tokens of their answers.
ALONE, SHORT = 16, 8


def tokenizer(folder, vocab_size):
    """The example's tokenizer, with made-up words up to a larger vocabulary."""
    described = json.loads((ROOT / "examples/tiny-mixtral/tokenizer.json").read_text())
    vocab = described["model"]["vocab"]
    vocab.update({f"Ġ#{number}": number for number in range(len(vocab), vocab_size)})
    (folder / "tokenizer.json").write_text(json.dumps(described))
    (folder / "tokenizer_config.json").write_text((ROOT / "examples/tiny-mixtral/tokenizer_config.json").read_text())
    return folder


def first_answer(mixtral, engine, *flags):
    """(a server, seconds from its start to the answer of a request, which is asked again and again)."""
    begun = time.monotonic()
    server = Server(mixtral, engine, "--served-model-name", "served", *flags)
    body = json.dumps({"model": "served", "prompt": [300, 301, 302], "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json"})
    while True:
        try:
            urllib.request.urlopen(request, timeout=60).read()
            return server, time.monotonic() - begun
        except urllib.error.HTTPError as error:
            if error.code != 503 or server.process.poll() is not None:
                sys.exit(f"the server ended, or answered with {error.code}: {error.read().decode()}")
            time.sleep(0.005)


def measured(args, where, seeds):
    """(median ms to the first token of requests one after another, what `bench` says of each number of streams) of an engine or a
    server. Every measurement has prompts of its own, so that none finds its blocks in the server's cache."""
    bench = lambda *flags: json.loads(run_tool(args.mixtral, "-q", "bench", "--json", "--random-seed", next(seeds), *where, *flags))
    lengths = ["--input-len", args.input_len, "--output-len"]
    alone = bench("--sequential", "--requests", ALONE, *lengths, SHORT)["throughput"]["first_token_ms_median"]
    wave = lambda streams: ["--requests", streams] if streams > 1 else ["--sequential", "--requests", 4]
    return alone, [bench(*wave(streams), *lengths, args.output_len) for streams in args.streams]


def compare(args, of_engine, of_server):
    """Prints what was measured of the engine and of the server, and returns the main figures."""
    engine, server = of_engine[0], of_server[0]
    print(f"first token of requests one after another: engine {engine:.2f} ms, server {server:.2f} ms (medians)")
    figures = [f"first token + {server - engine:.2f} ms"]
    for streams, engine, server in zip(args.streams, of_engine[1], of_server[1]):
        assert server["failed"] == 0, "requests that were not answered"
        rates = [bench["throughput"]["output_tokens_per_s"] for bench in (engine, server)]
        first = [bench["throughput"]["first_token_ms_median"] for bench in (engine, server)]
        median, p99 = server["between_chunks_ms_median"], server["between_chunks_ms_p99"]
        print(f"{streams} streams: engine {rates[0]:.0f} output tok/s, first token {first[0]:.1f} ms; server {rates[1]:.0f}, {first[1]:.1f} ms; "
              f"between two tokens {median:.3f} ms median, {p99:.3f} ms p99", flush=True)
        figures.append(f"{streams} streams {rates[1] / rates[0]:.3f} x" + f", p99 / median {p99 / median:.2f}" * (streams == 64))
    return figures


def mixed(args, url):
    """The figure of requests of mixed lengths, at most 64 at a time."""
    low, high = args.output_len // 2, args.output_len * 3 // 2
    served = json.loads(run_tool(
        args.mixtral, "-q", "bench", "--json", "--random-seed", 1, "--url", url, "--requests", args.mixed, "--concurrency", 64,
        "--input-len", args.input_len, "--output-len", f"{low}-{high}"))  # fmt: skip
    median, p99 = served["between_chunks_ms_median"], served["between_chunks_ms_p99"]
    print(f"{args.mixed} requests of {low} to {high} tokens, 64 at a time: {served['throughput']['output_tokens_per_s']:.0f} output tok/s; "
          f"between two tokens {median:.3f} ms median, {p99:.3f} ms p99", flush=True)
    return f"mixed p99 / median {p99 / median:.2f}"


def guidellm(args, url, words, scratch):
    """What guidellm measures of the server, whose tokenizer's folder is `words`: a figure for each number of streams."""
    report = scratch / "guidellm.json"
    counts = [max(8, min(4 * streams, 512)) for streams in args.streams]
    command = [
        sys.executable, "-m", "guidellm", "run", "--backend", f"kind=openai_http,target={url},model=served,request_format=/v1/completions",
        "--profile", f"kind=concurrent,streams={args.streams[0]}", "--override", "profile.streams", ",".join(map(str, args.streams)),
        "--constraint", json.dumps({"kind": "max_requests", "count": counts}), "--tokenizer", f"kind=hf_auto,model={words}",
        "--data", f"kind=synthetic_text,prompt_tokens={args.input_len},output_tokens={args.output_len}",
        "--output", f"kind=json,path={report}", "--disable-console",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode != 0 or not report.exists():
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    figures = []
    for streams, benchmark in zip(args.streams, json.loads(report.read_text())["benchmarks"]):
        metrics = benchmark["metrics"]
        counted = metrics["request_totals"]
        of = lambda name: metrics[name]["successful"]
        gaps, rate = of("inter_token_latency_ms"), of("output_tokens_per_second")["mean"]
        print(f"guidellm, {streams} streams: {counted['successful']} requests, {counted['errored']} errors, {rate:.0f} output tok/s, first token "
              f"{of('time_to_first_token_ms')['median']:.1f} ms, between tokens {gaps['median']:.3f} ms, p99 {gaps['percentiles']['p99']:.3f}",
              flush=True)
        assert counted["successful"] > 0 and not counted["errored"], "guidellm's requests failed"
        figures.append(f"{streams}: {rate:.0f}")
    return [f"guidellm's tok/s {', '.join(figures)}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtral", type=Path, required=True, help="the tool's binary")
    parser.add_argument("--engine", type=Path, help="an engine, with dummy weights or others")
    parser.add_argument("--backend", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--mixed", type=int, default=192, help="requests of mixed lengths; 0 leaves them out")
    args = parser.parse_args()
    args.mixtral = args.mixtral.resolve()
    with tempfile.TemporaryDirectory(prefix="serving-") as scratch:
        folder = Path(scratch)
        args.engine = args.engine or example_engine(args.mixtral, folder, build=f"--max-batch-size 256 --backend {args.backend}")
        words = args.engine
        if not (words / "tokenizer.json").exists():
            words = tokenizer(folder, json.loads((args.engine / "config.json").read_text())["model"]["vocab_size"])
        # The engine comes first: the server takes most of a GPU's memory.
        seeds = itertools.count(100)
        short = ["--batch-size", 1, "--context", 16, "--steps", 1, "--warmup", 0, "--prefill", 16, "--quick"]
        of_engine = measured(args, ["--engine-dir", args.engine, "--backend", args.backend, *short], seeds)
        server, seconds = first_answer(args.mixtral, args.engine, "--backend", args.backend, "--tokenizer-dir", words)
        print(f"first request answered {seconds:.2f} s after the start", flush=True)
        with server:
            figures = compare(args, of_engine, measured(args, ["--url", server.url], seeds))
            if args.mixed:
                figures.append(mixed(args, server.url))
            if importlib.util.find_spec("guidellm"):
                figures += guidellm(args, server.url, words, folder)
    print("; ".join([f"answers after {seconds:.2f} s", *figures]))


if __name__ == "__main__":
    main()
