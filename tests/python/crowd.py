#!/usr/bin/env python3
"""Many short requests to an engine of examples/tiny-mixtral: what the host's part of a step costs, with and without overlap.

    crowd.py --mixtral PATH [--backend cuda] [--requests 40000]

The engine is in bf16 and takes 128 sequences at a time. Prints output tokens a second, the part of the time in which the GPU had
nothing to do, and the process's memory: after a third of its time, after nine tenths, and at its largest, which may be when the
machine's own rates are measured.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from server import example_engine


def resident(pid):
    """The memory that a process has, in MB; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def measured(command):
    """(the JSON that a command prints, MB after a third of its time, after nine tenths, at most)."""
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    sizes = []
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        sizes.append(resident(process.pid))
        time.sleep(0.05)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{command}: ended with {os.waitstatus_to_exitcode(status)}")
    return json.loads(process.stdout.read()), sizes[len(sizes) // 3], sizes[len(sizes) * 9 // 10], usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtral", type=Path, required=True, help="the tool's binary")
    parser.add_argument("--backend", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--requests", type=int, default=40_000)
    args = parser.parse_args()
    mixtral, figures = args.mixtral.resolve(), []
    with tempfile.TemporaryDirectory(prefix="crowd-") as scratch:
        engine = example_engine(mixtral, Path(scratch), "--dtype bf16", f"--max-batch-size 128 --backend {args.backend}")
        for name, flags in {"overlap": [], "none": ["--no-overlap"]}.items():
            found, early, late, most = measured(
                [mixtral, "-q", "bench", "--engine-dir", engine, "--backend", args.backend, "--batch-size", 128, "--prefill", 128, "--quick",
                 "--requests", args.requests, "--input-len", "16-200", "--output-len", "4-120", "--json", *flags])  # fmt: skip
            rate, idle = found["throughput"]["output_tokens_per_s"], found["requests_gpu_idle_percent"]
            step = found["decode"][0]["median_ms"]
            print(f"{name}: {rate:.0f} output tok/s in {found['throughput']['seconds']:.2f} s, a step of 128 {step:.3f} ms, GPU idle "
                  f"{'-' if idle is None else f'{idle:.1f} %'}; memory {early:.0f} MB, then {late:.0f} MB, {most:.0f} MB at most", flush=True)
            figures.append((rate, early, late, most))
    (rate, early, late, most), (without, *_) = figures
    print(f"{args.requests} requests: {rate:.0f} output tok/s, {without:.0f} without overlap ({rate / without:.2f} x); memory {early:.0f} MB, "
          f"then {late:.0f} MB, {most:.0f} MB at most")


if __name__ == "__main__":
    main()
