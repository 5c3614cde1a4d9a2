#!/usr/bin/env python3
"""How a session goes about its work changes no token and no log-probability.

    sessions.py --mixtral PATH [--backend cuda] [--formats NAME...] [--engine DIR...] [--jobs N]

64 requests of mixed lengths, some of which begin alike, end early, or draw by what they have said before. One run is plain: all
of a prompt in one step, a step after the other. The others overlap their steps, share blocks, cut prompts into chunks of odd
sizes, and have a cache so small that half of the sequences must go to the host's memory, in several combinations; then the same
with beams. Every run must write the same bytes. The engines are of examples/tiny-mixtral in each format, built here, or those
given, of any ranks and with dummy weights too, whose steps then have one size.

A small cache is a small part of a GPU's free memory. On the CPU it is what fits into the memory that /proc/meminfo tells of; the
run gets a file of its own in that place, which needs root.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tool import run_tool

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-mixtral"
FORMATS = {
    "f32": "--dtype f32",
    "f16": "--dtype f16",
    "bf16": "--dtype bf16",
    "int8": "--dtype bf16 --qformat int8_wo",
    "int4": "--dtype bf16 --qformat int4_wo",
    "fp8": "--dtype bf16 --qformat fp8 --calib-size 8",
    "fp8, fp8 cache": "--dtype bf16 --qformat fp8 --calib-size 8 --kv-cache-dtype fp8",
    "int8, fp8 cache": "--dtype bf16 --qformat int8_wo --kv-cache-dtype fp8 --kv-scale 1",
}
# Tokens of a step.
ROOMY, ODD = 4096, 61
# A token that the example often says, and that ends some requests.
END = 201
REUSE, SWAP, BOUND = "--kv_cache_enable_block_reuse", "--scheduler_policy max_utilization", "--max_prefill_tokens"
# Runs that are compared with the plain one: tokens of a step, whether the cache is small, flags.
RUNS = [
    (ROOMY, False, ""),
    (ROOMY, False, REUSE),
    (ROOMY, False, f"--no_overlap {REUSE}"),
    (ODD, False, ""),
    (ODD, False, f"{REUSE} {BOUND} 29"),
    (ROOMY, True, SWAP),
    (ROOMY, True, f"--no_overlap {SWAP}"),
    (ROOMY, True, f"{SWAP} {REUSE} {BOUND} 97"),
    (ODD, True, f"{SWAP} {REUSE}"),
]
RUNS_OF_BEAMS = [(ROOMY, False, REUSE), (ODD, True, f"{SWAP} {REUSE} {BOUND} 97")]
BEAMS = 3


def requests():
    """64 requests as flags of their own: prompts of 1 to 110 tokens, outputs of 10 to 57."""
    rng = random.Random(5)
    beginnings = [[rng.randrange(3, 2000) for _ in range(80)] for _ in range(16)]
    for number in range(64):
        prompt = beginnings[number // 4][: number * 13 % 81] + [rng.randrange(3, 2000) for _ in range(1 + number * 7 % 30)]
        request = {"prompt": prompt, "max_output_len": 10 + number * 11 % 48, "random_seed": number, "top_k": 0, "temperature": 1.3}
        # These end when the next step is under way; these depend on the tokens before; these are drawn twice; and greedy ones.
        own = [{"end_id": END, "min_length": 6}, {"frequency_penalty": 0.3}, {"num_return_sequences": 2}, {"temperature": 0}]
        yield request | (own[number // 2 % 4] if number % 2 else {})


class Engine:
    """An engine, or two that differ in the tokens of a step."""

    def __init__(self, args, name, by_tokens):
        self.args, self.name, self.by_tokens = args, name, by_tokens
        said = json.loads(run_tool(args.mixtral, "inspect", by_tokens[ROOMY], "--json"))
        self.limits, self.dummy = said["config"]["limits"], said["config"]["weights"]["kind"] != "file"
        # Each rank has a GPU of its own, or they share the host's memory.
        ranks = [rank["memory"] for rank in said["ranks"]]
        self.memory = {what: sum(memory[what] for memory in (ranks[:1] if args.backend == "cuda" else ranks)) for what in ranks[0]}

    def cramped(self, records, width, scratch):
        """(words before the command, flags) for a cache that has a third of the blocks that the requests take together."""
        size = self.limits["block_size"]
        needs = [width * record.get("num_return_sequences", 1) * -(-(len(record["prompt"]) + record["max_output_len"]) // size)
                 for record in records]
        at_once = self.limits["max_batch_size"] // width
        wanted = max(sum(sorted(needs)[-at_once:]) // 3, max(needs)) * self.memory["kv_block"]
        fixed = self.memory["arena"] + self.memory["inputs"]
        if self.args.backend == "cuda":
            query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
            free = int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) << 20
            # The driver and the kernels of a process take about this much.
            left = free - fixed - self.memory["weights"] - (800 << 20)
            return [], ["--kv_cache_free_gpu_mem_fraction", f"{wanted / left:.3e}"]
        told = Path(scratch) / "meminfo"
        told.write_text(f"MemAvailable: {(fixed + self.dummy * self.memory['weights'] + wanted) // 1024 + 1} kB\n")
        return ["unshare", "--mount", "sh", "-c", f"mount --bind {told} /proc/meminfo && exec \"$@\"", "sh"], []

    def run(self, tokens, small, flags, beams=1):
        """Everything that a run writes, and its figures."""
        records = list(requests())
        if beams > 1:
            # A search draws nothing, and ends at the end token.
            records = [{key: r[key] for key in ("prompt", "max_output_len")} | {"end_id": END} for r in records]
        with tempfile.TemporaryDirectory(prefix="sessions-") as scratch:
            before, more = self.cramped(records, beams, scratch) if small else ([], [])
            files = [Path(scratch) / name for name in ("ids.csv", "log_probs.npy")]
            (Path(scratch) / "requests.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
            more += [] if (Path(self.by_tokens[ROOMY]) / "tokenizer.json").exists() else ["--tokenizer_dir", EXAMPLE]
            said = run_tool(*before, self.args.mixtral, "-q", "run", "--engine_dir", self.by_tokens[tokens], "--backend",
                            self.args.backend, "--input_file", Path(scratch) / "requests.jsonl", "--num_beams", beams,
                            "--output_csv", files[0], "--output_log_probs_npy", files[1], "--json", *more, *flags.split())
            return [file.read_bytes() for file in files], json.loads(said)["stats"]


def built(args, name, directory):
    """An engine of the example in a format."""
    run_tool(args.mixtral, "-q", "convert", "--model_dir", EXAMPLE, "--output_dir", directory / "checkpoint", *FORMATS[name].split())
    by_tokens = {tokens: directory / f"engine-{tokens}" for tokens in (ROOMY, ODD)}
    for tokens, engine in by_tokens.items():
        run_tool(args.mixtral, "-q", "build", "--checkpoint_dir", directory / "checkpoint", "--output_dir", engine, "--backend",
                 args.backend, "--max_batch_size", 64, "--max_num_tokens", tokens, "--block_size", 16)
    return Engine(args, name, by_tokens)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtral", required=True, type=Path, help="the tool's binary")
    parser.add_argument("--backend", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="NAME", help=", ".join(FORMATS))
    parser.add_argument("--engine", nargs="+", default=[], metavar="DIR", help="engines to check instead")
    parser.add_argument("--jobs", type=int, help="runs at a time; 8, or 1 of engines that are given")
    args = parser.parse_args()
    args.jobs = args.jobs or (1 if args.engine else 8)
    args.mixtral = args.mixtral.resolve()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sessions-") as scratch, ThreadPoolExecutor(args.jobs) as pool:
        if args.engine:
            engines = [Engine(args, Path(engine).name, {ROOMY: engine, ODD: engine}) for engine in args.engine]
        else:
            folders = [Path(scratch) / str(number) for number in range(len(args.formats))]
            engines = list(pool.map(lambda name, folder: built(args, name, folder), args.formats, folders))
        print(f"{len(engines)} engines after {time.monotonic() - begun:.0f} s", flush=True)
        plain = [(ROOMY, False, "--no_overlap", 1), *((*run, 1) for run in RUNS)]
        plain += [(ROOMY, False, "--no_overlap", BEAMS), *((*run, BEAMS) for run in RUNS_OF_BEAMS)]
        jobs = list(itertools.product(engines, plain))
        results = list(pool.map(lambda job: job[0].run(*job[1]), jobs))
    wrong, tokens, swapped, expected = 0, 0, [], {}
    for (engine, (step, small, flags, beams)), (written, stats) in zip(jobs, results):
        same = written == expected.setdefault((engine.name, beams), written)
        did = f"{stats.get('cached_tokens', 0)} tokens reused, {stats.get('swapped_blocks', 0)} blocks swapped out"
        # Beams stay in the cache. On the CPU few blocks of the engine with small steps may leave it: memory is told to be short.
        swaps = small and beams == 1 and step == ROOMY
        is_idle = REUSE in flags and not stats.get("cached_tokens") or swaps and not stats.get("swapped_blocks")
        verdict = "nothing to see" if is_idle else "same" if same else "OTHER BYTES"
        print(f"{engine.name}: {beams} beams, steps of {step}{', small cache' * small} {flags}: {verdict}, {did}")
        wrong += is_idle or not same
        tokens += stats["generated_tokens"]
        swapped += [stats.get("swapped_blocks", 0)] if swaps else []
    print(f"{len(jobs) - wrong} of {len(jobs)} runs of {len(engines)} engines write the same tokens and log-probabilities, {tokens} tokens; "
          f"small caches swap {min(swapped, default=0)} to {max(swapped, default=0)} blocks out; {time.monotonic() - begun:.0f} s")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
