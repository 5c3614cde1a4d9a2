#!/usr/bin/env python3
"""What a server adds to its engine: the same requests to `mixtral bench` on the engine and, through HTTP, to `mixtral serve`.

    serving.py --mixtral PATH [--engine DIR] [--backend cuda] [--streams 1 8 64 256] [--input-len 128] [--output-len 128]

First comes the time from the start of the server to the first answered request. Then, for each number of streams, as many requests
as streams are sent at once, and the throughputs are compared. Requests that come one after another show what the server adds to the
time of the first token; requests of mixed lengths, at most 64 at a time, how evenly tokens come while others' prompts are
computed. Last comes one load as three programs see it: `bench --url`, and guidellm and aiperf if they are installed. At most so many
requests as there are streams are under way at a time, four times as many in all. Without DIR the engine is one of
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


def between(bench):
    """The times between two tokens that `bench` saw."""
    times = bench["throughput"]["between_tokens"]
    return (f"between two tokens {times['median_ms']:.3f} ms median, {times['p99_ms']:.3f} p99, {times['with_prompts_percent']:.1f} % with prompts, "
            f"without them p99 {times['without_prompts_p99_ms']:.3f}")  # fmt: skip


def evenness(bench):
    """The 99th percentile of these times by their median: of all, and of those in which no prompt was computed."""
    times = bench["throughput"]["between_tokens"]
    p99, without = (times[name] / times["median_ms"] for name in ("p99_ms", "without_prompts_p99_ms"))
    return f"p99 / median {p99:.2f} ({times['with_prompts_percent']:.1f} % with prompts, without {without:.2f})"


def compare(args, of_engine, of_server):
    """Prints what was measured of the engine and of the server, and returns the main figures."""
    engine, server = of_engine[0], of_server[0]
    print(f"first token of requests one after another: engine {engine:.2f} ms, server {server:.2f} ms (medians)")
    figures = [f"first token + {server - engine:.2f} ms"]
    for streams, *both in zip(args.streams, of_engine[1], of_server[1]):
        for what, bench in zip(("engine", "server"), both):
            rate, first = (bench["throughput"][name] for name in ("output_tokens_per_s", "first_token_ms_median"))
            print(f"{streams} streams, {what}: {rate:.0f} output tok/s, first token {first:.1f} ms, {between(bench)}", flush=True)
        engine, server = both
        assert server["failed"] == 0, "requests that were not answered"
        assert server["tokens_per_chunk"] == 1, f"{server['tokens_per_chunk']} tokens a chunk"
        rates = [bench["throughput"]["output_tokens_per_s"] for bench in both]
        figures.append(f"{streams} streams {rates[1] / rates[0]:.3f} x" + f", {evenness(server)}" * (streams == 64))
    return figures


def bench_url(args, url, requests, streams, output_len, seed):
    """What `bench --url` says of that many requests, at most so many at a time as there are streams."""
    return json.loads(run_tool(
        args.mixtral, "-q", "bench", "--json", "--random-seed", seed, "--url", url, "--requests", requests, "--concurrency", streams,
        "--input-len", args.input_len, "--output-len", output_len))  # fmt: skip


def mixed(args, url, seed):
    """The figure of requests of mixed lengths, at most 64 at a time."""
    lengths = f"{args.output_len // 2}-{args.output_len * 3 // 2}"
    bench = bench_url(args, url, args.mixed, 64, lengths, seed)
    print(f"{args.mixed} requests of {lengths} tokens, 64 at a time: {bench['throughput']['output_tokens_per_s']:.0f} output tok/s, {between(bench)}",
          flush=True)  # fmt: skip
    return f"mixed {evenness(bench)}"


def run_load_tool(report, *command, offline):
    """The report of a program that loads the server. If `offline`, it is told not to look for tokenizers on the network."""
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | ({"HF_HUB_OFFLINE": "1"} if offline else {})
    command = [sys.executable, "-m", *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode != 0 or not report.exists():
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(report.read_text())


def guidellm(args, url, words, scratch, counts):
    """What guidellm measures of the server, whose tokenizer's folder is `words`: for each number of streams the requests that were
    answered, tokens a second, and the medians and 99th percentiles of the first token and of a request's mean between tokens."""
    report = scratch / "guidellm.json"
    said = run_load_tool(
        report, "guidellm", "run", "--backend", f"kind=openai_http,target={url},model=served,request_format=/v1/completions",
        "--profile", f"kind=concurrent,streams={args.streams[0]}", "--override", "profile.streams", ",".join(map(str, args.streams)),
        "--constraint", json.dumps({"kind": "max_requests", "count": counts}), "--tokenizer", f"kind=hf_auto,model={words}",
        "--data", f"kind=synthetic_text,prompt_tokens={args.input_len},output_tokens={args.output_len}",
        "--output", f"kind=json,path={report}", "--disable-console", offline=True)  # fmt: skip
    for benchmark in said["benchmarks"]:
        metrics = benchmark["metrics"]
        of = lambda name: metrics[name]["successful"]
        both = lambda name: (of(name)["median"], of(name)["percentiles"]["p99"])
        yield metrics["request_totals"]["successful"], of("output_tokens_per_second")["mean"], *both("time_to_first_token_ms"), *both("inter_token_latency_ms")


def aiperf(args, url, words, scratch, counts):
    """The same by aiperf, which takes a folder for a name on the network if it is told that there is no network."""
    for streams, count in zip(args.streams, counts):
        folder = scratch / f"aiperf-{streams}"
        metrics = run_load_tool(
            folder / "profile_export_aiperf.json", "aiperf", "profile", "--model", "served", "--url", url, "--endpoint-type", "completions",
            "--streaming", "--tokenizer", words, "--concurrency", streams, "--request-count", count, "--num-prompts", count,
            "--isl", args.input_len, "--osl", args.output_len, "--extra-inputs", "ignore_eos:true", "--use-server-token-count",
            "--no-gpu-telemetry", "--no-server-metrics", "--ui", "none", "--artifact-dir", folder, offline=False)  # fmt: skip
        both = lambda name: (metrics[name]["p50"], metrics[name]["p99"])
        yield int(metrics["request_count"]["avg"]), metrics["output_token_throughput"]["avg"], *both("time_to_first_token"), *both("inter_token_latency")


def one_load(args, url, words, scratch, seeds):
    """Prints one load as all programs see it, and returns the tokens a second of each."""
    counts = [max(8, min(4 * streams, 512)) for streams in args.streams]
    said = {"bench": []}
    for streams, count in zip(args.streams, counts):
        bench = bench_url(args, url, count, streams, args.output_len, next(seeds))
        print(f"{count} requests, {streams} at a time: {between(bench)}", flush=True)
        names = ["requests", "output_tokens_per_s", "first_token_ms_median", "first_token_ms_p99", "per_token_ms_median", "per_token_ms_p99"]
        said["bench"].append([bench["throughput"][name] for name in names])
    for tool in (guidellm, aiperf):
        if importlib.util.find_spec(tool.__name__):
            said[tool.__name__] = list(tool(args, url, words, scratch, counts))
    for streams, count, *rows in zip(args.streams, counts, *said.values()):
        for name, (answered, rate, first, first_p99, each, each_p99) in zip(said, rows):
            print(f"{count} requests, {streams} at a time, {name}: {rate:.0f} output tok/s, first token {first:.1f} ms median, {first_p99:.1f} p99, "
                  f"mean between tokens {each:.3f} ms median, {each_p99:.3f} p99", flush=True)  # fmt: skip
            assert answered == count, f"{answered} of {count} requests were answered"
    return [f"{name}'s tok/s {', '.join(f'{streams}: {row[1]:.0f}' for streams, row in zip(args.streams, rows))}" for name, rows in said.items()]


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
                figures.append(mixed(args, server.url, next(seeds)))
            figures += one_load(args, server.url, words, folder, seeds)
    print("; ".join([f"answers after {seconds:.2f} s", *figures]))


if __name__ == "__main__":
    main()
