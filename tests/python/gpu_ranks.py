#!/usr/bin/env python3
"""Checks engines of several ranks on GPUs: every layout gives the tokens of one rank on the CPU.

    gpu_ranks.py --mixtral PATH [--launchers threads mpirun hosts] [--backend cpu]

Two tiny f32 models with dummy weights, 20 prompts, tp {1, 2, 4} × pp {1, 2} × {experts in slices, whole experts, both}, as threads of one
process and as processes under mpirun. Where there are fewer GPUs than ranks, ranks share them (--ranks-per-gpu). Engines are built here,
so NVRTC is needed. No Python package is.

`hosts`: ranks with a GPU each, on two hosts that are network namespaces of this machine. NCCL carries what goes from one to the other.
The ranks of a host are next to each other, or every other one. One model, and layouts of as many ranks as there are GPUs at most. With
`--backend cpu` all this runs without GPUs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hosts import Hosts

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
    parser.add_argument("--launchers", nargs="+", default=["threads", "mpirun"], choices=["threads", "mpirun", "hosts"])
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--backend", default="cuda", choices=["cuda", "cpu"])
    args = parser.parse_args()
    on_gpus = args.backend == "cuda"
    mixtral, gpus = str(Path(args.mixtral).resolve()), num_gpus() if on_gpus else 4
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        (root / "ids.csv").write_text(PROMPTS)
        engines = [(g, layout, ranks, root / f"{g}-{n}") for g in range(2) for n, (layout, ranks) in enumerate(layouts())]
        between_hosts = [engine for engine in engines if engine[0] == 0 and 1 < engine[2] <= gpus]
        if args.launchers == ["hosts"]:
            engines = [engine for engine in engines if engine[2] == 1 or engine in between_hosts]

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

        def generate(*flags):
            return [mixtral, "run", "--engine_dir", "e", "--input_file", "../ids.csv", "--max_output_len", "12",
                    "--output_csv", "out.csv", *flags]

        def tokens(at, ranks, launcher, *flags):
            launch = ["mpirun", "--oversubscribe", "-n", str(ranks)] if launcher == "mpirun" else []
            run([*launch, *generate(*flags)], at)
            return (at / "out.csv").read_text()

        references = [tokens(engine[3], 1, "threads", "--backend", "cpu") for engine in engines if engine[2] == 1]
        wrong, compared = 0, 0
        for launcher in args.launchers:
            if launcher == "hosts":
                continue
            for geometry, layout, ranks, at in engines:
                begun = time.time()
                share = ["--ranks-per-gpu", str(-(-ranks // gpus))] if on_gpus else []
                same = tokens(at, ranks, launcher, "--backend", args.backend, *share) == references[geometry]
                wrong, compared = wrong + (not same), compared + 1
                print(f"model {geometry}, {layout}, {launcher}: {'same' if same else 'OTHER TOKENS'}, {time.time() - begun:.1f} s")
        if "hosts" in args.launchers:
            with Hosts() as hosts:
                for _, layout, ranks, at in between_hosts:
                    for places in sorted({tuple(2 * r // ranks for r in range(ranks)), tuple(r % 2 for r in range(ranks))}):
                        begun = time.time()
                        (at / "out.csv").unlink(missing_ok=True)
                        command = generate("--backend", args.backend, "--verbose")
                        said = hosts.run(command, places, at, 29700 + compared, ENVIRONMENT)
                        same = (at / "out.csv").read_text() == references[0]
                        # Each rank says how it reaches the others.
                        by_nccl = sum("through NCCL" in text for text in said)
                        good = same and (by_nccl > 0 or not on_gpus)
                        wrong, compared = wrong + (not good), compared + 1
                        verdict = "same" if same else "OTHER TOKENS"
                        print(f"{layout}, hosts {places}: {verdict}, {by_nccl} ranks use NCCL, {time.time() - begun:.1f} s", flush=True)
        verdict = f"{compared - wrong} of {compared} runs give the CPU's tokens"
        print(f"{verdict}, on {gpus} GPUs" if on_gpus else f"{verdict}, on CPUs")
        sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
