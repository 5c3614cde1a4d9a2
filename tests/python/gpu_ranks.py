#!/usr/bin/env python3
"""Checks engines of several ranks on GPUs: every layout gives the tokens of one rank on the CPU.

    gpu_ranks.py --mixtral PATH [--launchers threads mpirun]

Two tiny f32 models with dummy weights, 20 prompts, tp {1, 2, 4} × pp {1, 2} × {experts in slices, whole experts, both}, as threads of one
process and as processes under mpirun. Where there are fewer GPUs than ranks, ranks share them (--ranks-per-gpu). Engines are built here,
so NVRTC is needed. No Python package is.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# An odd vocabulary, KV heads that are replicated over four ranks, experts that do not divide over the ranks; and one more regular.
GEOMETRIES = [
    "--vocab_size 101 --n_layer 4 --n_head 4 --n_kv_head 2 --head_size 8 --n_embd 40 --inter_size 48 --n_positions 256"
    " --moe_num_experts 5 --moe_top_k 2",
    "--vocab_size 67 --n_layer 3 --n_head 8 --n_kv_head 4 --n_embd 64 --inter_size 64 --n_positions 256"
    " --moe_num_experts 8 --moe_top_k 3",
]
PROMPTS = "\n".join(",".join(str((i * 31 + n * 17) % 67) for i in range(1 + 2 * n)) for n in range(20)) + "\n"
# A launch that shares a GPU with others needs a queue of its own there.
ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}


def layouts():
    """Flags of a layout, and how many ranks it has."""
    for tp in (1, 2, 4):
        for pp in (1, 2):
            for moe_tp, moe_ep in sorted({(tp, 1), (1, tp), (2, 2) if tp == 4 else (tp, 1)}):
                yield f"--tp_size {tp} --pp_size {pp} --moe_tp_size {moe_tp} --moe_ep_size {moe_ep}", tp * pp


def run(command, cwd, seconds=120):
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=seconds, env=os.environ | ENVIRONMENT)
    except subprocess.TimeoutExpired:
        sys.exit(f"no end after {seconds} s: {' '.join(command)}")
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def num_gpus():
    return len(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.splitlines())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtral", required=True)
    parser.add_argument("--launchers", nargs="+", default=["threads", "mpirun"], choices=["threads", "mpirun"])
    parser.add_argument("--arch", default="sm_90")
    args = parser.parse_args()
    mixtral, gpus = str(Path(args.mixtral).resolve()), num_gpus()
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        (root / "ids.csv").write_text(PROMPTS)
        engines = [(g, layout, ranks, root / f"{g}-{n}") for g in range(2) for n, (layout, ranks) in enumerate(layouts())]

        def build(job):
            geometry, layout, _, at = job
            at.mkdir()
            convert = [mixtral, "convert", "--dtype", "f32", "--output_dir", "c", *GEOMETRIES[geometry].split(), *layout.split()]
            run(convert, at)
            run([mixtral, "build", "--checkpoint_dir", "c", "--output_dir", "e", "--seed", "3", "--arch", args.arch,
                 "--max-batch-size", "8", "--max-num-tokens", "48"], at, 300)

        begun = time.time()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(build, engines))
        print(f"{len(engines)} engines built in {time.time() - begun:.0f} s")

        def tokens(at, ranks, launcher, *flags):
            launch = ["mpirun", "--oversubscribe", "-n", str(ranks)] if launcher == "mpirun" else []
            run([*launch, mixtral, "run", "--engine_dir", "e", "--input_file", "../ids.csv", "--max_output_len", "12",
                 "--output_csv", "out.csv", *flags], at)
            return (at / "out.csv").read_text()

        references = [tokens(engine[3], 1, "threads", "--backend", "cpu") for engine in engines if engine[2] == 1]
        wrong = 0
        for launcher in args.launchers:
            for geometry, layout, ranks, at in engines:
                begun = time.time()
                share = ["--backend", "cuda", "--ranks-per-gpu", str(-(-ranks // gpus))]
                same = tokens(at, ranks, launcher, *share) == references[geometry]
                wrong += not same
                print(f"model {geometry}, {layout}, {launcher}: {'same' if same else 'OTHER TOKENS'}, {time.time() - begun:.1f} s")
        verdict = f"{len(engines) * len(args.launchers) - wrong} of {len(engines) * len(args.launchers)} layouts give the CPU's tokens"
        print(f"{verdict}, on {gpus} GPUs")
        sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
