#!/usr/bin/env python3
"""How many requests a second are answered whose prompts begin alike, with and without reuse of the cache's blocks.

    prefixes.py --mixtral PATH [--engine DIR] [--backend cuda] [--requests 128] [--length 2000] [--shared 1500]

All prompts have the same first tokens and others of their own. Both runs must give the same tokens. Without DIR the engine is one of
examples/tiny-mixtral, which takes no more than 512 tokens.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

from server import example_engine
from tool import run_tool


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtral", type=Path, required=True, help="the tool's binary")
    parser.add_argument("--engine", type=Path, help="an engine, with dummy weights or others")
    parser.add_argument("--backend", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--length", type=int, default=2000, help="tokens of a prompt")
    parser.add_argument("--shared", type=int, default=1500, help="tokens that all prompts begin with")
    parser.add_argument("--output-len", type=int, default=32)
    args = parser.parse_args()
    mixtral, rng = args.mixtral.resolve(), random.Random(3)
    draw = lambda count: [rng.randrange(3, 2000) for _ in range(count)]
    beginning = draw(args.shared)
    prompts = [beginning + draw(args.length - args.shared) for _ in range(args.requests)]
    with tempfile.TemporaryDirectory(prefix="prefixes-") as scratch:
        engine = args.engine or example_engine(mixtral, Path(scratch), build=f"--max-batch-size 128 --backend {args.backend}")
        ids = Path(scratch) / "ids.csv"
        ids.write_text("".join(",".join(map(str, prompt)) + "\n" for prompt in prompts))
        command = [mixtral, "-q", "run", "--engine_dir", engine, "--backend", args.backend, "--input_file", ids, "--max_output_len",
                   args.output_len, "--end_id", -1, "--json"]
        runs = [json.loads(run_tool(*command, *flags)) for flags in ([], ["--kv_cache_enable_block_reuse"])]
    outputs = [[prompt["outputs"][0] for prompt in run["prompts"]] for run in runs]
    if [output["ids"] for output in outputs[0]] != [output["ids"] for output in outputs[1]]:
        sys.exit("reuse changes tokens")
    # All requests came at the same time, so the last one's end is that of all.
    rates = [args.requests / max(output["total_ms"] for output in of_run) * 1e3 for of_run in outputs]
    print(f"{args.requests} prompts that share {args.shared} of {args.length} tokens, {args.output_len} tokens each: {rates[0]:.2f} requests/s, "
          f"with reuse {rates[1]:.2f} = {rates[1] / rates[0]:.2f} x; {runs[1]['stats'].get('cached_tokens', 0)} tokens found in the cache")


if __name__ == "__main__":
    main()
