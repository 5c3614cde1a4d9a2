#!/usr/bin/env python3
"""The same engine and the same prompts give the same bits, and a prompt's bits do not depend on what else is in the batch.
Nor do tokens depend on whether steps overlap.

    determinism.py --mixtral PATH --engine DIR [--backend cuda]

Runs the engine on some prompts of random ids, then on the same prompts again, then on one of them alone. Compares the
logits of the generated tokens. (Steps whose logits are wanted do not overlap.) Then it draws tokens at random, with and
without overlap, and compares these.
"""

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

# More sequences than have rope and attention in one kernel on Hopper (eight), so that in company and alone are different kernels, if the
# engine takes ten at once.
LENGTHS = [1, 9, 16, 33, 64, 100, 130, 2, 40, 21]
ALONE = 3
OUTPUT = 16
# Tokens that are drawn without logits, and the one that ends a sequence.
MANY, END = 100, 7


def run(args, prompts, directory, *flags):
    """Runs the engine on the prompts."""
    ids = directory / "ids.csv"
    ids.write_text("".join(",".join(map(str, prompt)) + "\n" for prompt in prompts))
    command = [args.mixtral, "run", "--engine_dir", args.engine, "--backend", args.backend, "--input_file", ids, *flags]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"mixtral run ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def logits(args, prompts, directory):
    """The logits of the generated tokens: f32 [prompts, OUTPUT, vocabulary]."""
    out = directory / "logits"
    run(args, prompts, directory, "--max_output_len", OUTPUT, "--end_id", -1, "--output_logits_npy", out)
    return np.load(f"{out}_generation.npy")


def tokens(args, prompts, directory, *flags):
    """The tokens drawn. Some end sequences, so that steps under way compute what is thrown away."""
    out = directory / "tokens.csv"
    run(args, prompts, directory, "--max_output_len", MANY, "--end_id", END, "--top_k", 8, "--temperature", 1.5,
        "--num_return_sequences", 2, "--output_csv", out, *flags)
    return out.read_text()


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
        drawn = [tokens(args, prompts, Path(scratch), *flags) for flags in ([], ["--no_overlap"])]
    if not np.isfinite(first).all():
        sys.exit("logits that are no numbers")
    counts = different(first, again), different(first[ALONE], alone[0])
    if any(counts):
        sys.exit(f"logits that differ: {counts[0]} of {first.size} when run again, {counts[1]} of {alone.size} alone")
    if drawn[0] != drawn[1]:
        sys.exit("overlap changes tokens")
    count = drawn[0].count(",") + drawn[0].count("\n")
    print(f"{first.size} logits the same again, {alone.size} the same alone, {count} tokens the same without overlap")


if __name__ == "__main__":
    main()
