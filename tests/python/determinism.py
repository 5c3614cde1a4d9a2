#!/usr/bin/env python3
"""The same engine and the same prompts give the same bits, and a prompt's bits do not depend on what else is in the batch.

    determinism.py --mixtral PATH --engine DIR [--backend cuda]

Runs the engine on some prompts of random ids, then on the same prompts again, then on one of them alone. Compares the
logits of the generated tokens.
"""

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

LENGTHS = [1, 9, 16, 33, 64, 100, 130]
ALONE = 3
OUTPUT = 16


def logits(args, prompts, directory):
    """The logits of the generated tokens: f32 [prompts, OUTPUT, vocabulary]."""
    ids, out = directory / "ids.csv", directory / "logits"
    ids.write_text("".join(",".join(map(str, prompt)) + "\n" for prompt in prompts))
    command = [args.mixtral, "run", "--engine_dir", args.engine, "--backend", args.backend, "--input_file", ids,
               "--max_output_len", OUTPUT, "--end_id", -1, "--output_logits_npy", out]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"mixtral run ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return np.load(f"{out}_generation.npy")


def different(a, b):
    """How many elements of two arrays differ in their bits."""
    return int((a.view(np.uint32) != b.view(np.uint32)).sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtral", required=True, help="the tool's binary")
    parser.add_argument("--engine", required=True, help="an engine")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--vocabulary", type=int, default=2000, help="ids are below this")
    args = parser.parse_args()
    rng = random.Random(1)
    prompts = [[rng.randrange(3, args.vocabulary) for _ in range(length)] for length in LENGTHS]
    with tempfile.TemporaryDirectory(prefix="determinism-") as scratch:
        first = logits(args, prompts, Path(scratch))
        again = logits(args, prompts, Path(scratch))
        alone = logits(args, [prompts[ALONE]], Path(scratch))
    if not np.isfinite(first).all():
        sys.exit("logits that are no numbers")
    counts = different(first, again), different(first[ALONE], alone[0])
    if any(counts):
        sys.exit(f"logits that differ: {counts[0]} of {first.size} when run again, {counts[1]} of {alone.size} alone")
    print(f"{first.size} logits the same again, {alone.size} the same alone")


if __name__ == "__main__":
    main()
