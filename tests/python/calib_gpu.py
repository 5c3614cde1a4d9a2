#!/usr/bin/env python3
"""What calibration of Mixtral 8x7B's shape takes on a GPU, and that it finds what the CPU finds.

    calib_gpu.py --mixtral PATH [--backend cuda] [--small]

Writes models of that shape with one and two layers in bf16 (6.3 GB) and 512 lines of 512 token ids, and converts them to fp8 with an fp8
cache: by that text, by it with moments (which integers need), and by the model's own text. Says how long calibration took and how
much memory it had. Each further layer takes as long as the second, so the two give the time of 32. By a text, memory does not grow with
layers. Then examples/tiny-mixtral is calibrated on the CPU and on the GPU. Reruns and other batches must give the same bits, and the two
backends nearly the same statistics. `--small` is a shape that a CPU can calibrate in seconds.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

import load
from perplexity import MODEL, TEXT

SMALL = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
# Of a model's memory, what calibration may use: on the device, on the host.
LIMITS = (6.0, 4.0)
# How far CPU and GPU may be apart in f32: largest magnitudes and moments as parts of their values, tokens of an input as a part of
# all. (Where two experts are nearly tied, a token may go to the other one.) In bf16 they may be as far apart as the two types.
APART = (1e-4, 1e-4, 1e-3)


def watched(process, free):
    """Waits for a process. Returns the most GB that it had on the device, where `free` bytes were free before, and on the host."""
    device = host = 0
    while process.poll() is None:
        if free is not None:
            device = max(device, free - torch.cuda.mem_get_info()[0])
        # What the system tells of a process that has ended includes the memory of the one that started it.
        status = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        host = max(host, int(status[1]) * 1024 if status else 0)
        time.sleep(0.01)
    return device / 1e9, host / 1e9


def convert(args, model, output, *flags, backend=None):
    """Converts to fp8. Returns the seconds of calibration, of everything, and the GB on the device and the host."""
    command = [args.mixtral, "convert", "--model-dir", model, "--output-dir", output, "--qformat", "fp8", "--kv-cache-dtype", "fp8",
               "--backend", backend or args.backend, *flags]
    free = None
    if args.backend == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
    begun = time.monotonic()
    with open(output.with_suffix(".said"), "w+") as said:
        process = subprocess.Popen(list(map(str, command)), stderr=said)
        device, host = watched(process, free)
        seconds = time.monotonic() - begun
        said.seek(0)
        text = said.read()
    found = re.search(r"calibrated with .* in ([0-9.]+) s", text)
    if process.returncode != 0 or not found:
        sys.exit(f"{' '.join(map(str, command))}\n{text}")
    shutil.rmtree(output)
    return float(found[1]), seconds, device, host


def write_models(args, scratch):
    """Writes models of one and of two layers, which share files. Returns their directories."""
    models = [scratch / name for name in ("one", "two")]
    for model in models:
        model.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(MODEL / name, model)
    load.write_model(models[1], 2, args.backend)
    index, config = (json.loads((models[1] / name).read_text()) for name in ("model.safetensors.index.json", "config.json"))
    kept = {name: file for name, file in index["weight_map"].items() if ".layers.1." not in name}
    (models[0] / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": kept}))
    (models[0] / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    for file in set(kept.values()):
        (models[0] / file).symlink_to(models[1] / file)
    return models


def measure(args, scratch):
    """Calibrates one and two layers of the large shape. Returns a summary, and whether the limits hold."""
    if args.small:
        load.GEOMETRY.update(SMALL)
    size, length = (16, 64) if args.small else (512, 512)
    models = write_models(args, scratch)
    sizes = [sum(file.stat().st_size for file in model.glob("*.safetensors")) for model in models]
    draw, ids = random.Random(1), scratch / "ids.csv"
    ids.write_text("".join(",".join(str(draw.randrange(3, 1000)) for _ in range(length)) + "\n" for _ in range(size)))
    text = ["--calib-size", size, "--calib-max-seq-length", length, "--dtype", "bfloat16"]
    # A layer's weights are on the device and the text's rows on the host. Where less memory was seen, it was measured wrongly.
    least = (sizes[1] - sizes[0] if args.backend == "cuda" else 0) / 1e9, 2 * size * length * load.GEOMETRY["hidden_size"] / 1e9
    runs = {"text": ["--calib-data", ids], "text with moments": ["--calib-data", ids, "--calib-cache"], "own text": []}
    holds, summary = True, []
    for name, flags in runs.items():
        found = []
        # The first run compiles kernels, for all layers at once.
        for number, model in enumerate([models[0], *models]):
            kept = [scratch / f"kept-{number}"] if flags[-1:] == ["--calib-cache"] else []
            found.append(convert(args, model, scratch / "checkpoint", *text, *flags, *kept))
            print(f"{name}, {model.name}: calibrated in {found[-1][0]:.1f} s (all {found[-1][1]:.1f} s), device {found[-1][2]:.2f} GB, "
                  f"host {found[-1][3]:.2f} GB", flush=True)
        (compiling, *_), (one, *_), (two, _, device, host) = found
        whole = max(compiling - one, 0) + two + 30 * (two - one)
        holds = holds and device >= least[0] and host >= least[1]
        holds = holds and (whole < 180 if name == "own text" else device < LIMITS[0] and host < LIMITS[1])
        memory = "" if name == "own text" else f", device {device:.1f} GB, host {host:.1f} GB"
        summary.append(f"{name} {two:.1f} s, 32 layers {whole:.0f} s{memory}")
    whole = (sizes[1] + 30 * (sizes[1] - sizes[0])) / 1e9
    print(f"files come from memory here; {whole:.0f} GB of 32 layers come from a disk once, or twice for own text if memory does not keep them")
    return "; ".join(summary), holds


def apart(a, b):
    """How far two files of statistics are apart: amax, moments, tokens."""
    amax = moments = tokens = 0.0
    most = max(int(value.view(np.uint64)[0]) for name, value in a.items() if name.endswith(".tokens"))
    for name in a:
        if name.endswith("amax"):
            amax = max(amax, float(np.max(np.abs(a[name] / b[name] - 1))))
        elif name.endswith(".moments"):
            x, y = (f[name].astype(np.float64) for f in (a, b))
            moments = max(moments, float(np.sqrt(((x - y) ** 2).sum() / (y**2).sum())))
        elif name.endswith(".tokens"):
            counts = [int(f[name].view(np.uint64)[0]) for f in (a, b)]
            tokens = max(tokens, abs(counts[0] - counts[1]) / most)
    return amax, moments, tokens


def compare(args, scratch):
    """Calibrates the example on both backends. Returns whether they agree."""
    (scratch / "text").write_text(TEXT * 40)
    agree, of_types = True, []
    for dtype in ("float32", "bfloat16"):
        files = {}
        for name, backend, batch in [("cpu", "cpu", 8), ("gpu", args.backend, 8), ("again", args.backend, 8), ("batch", args.backend, 3)]:
            files[name] = scratch / f"{dtype}-{name}"
            convert(args, MODEL, scratch / "example", "--dtype", dtype, "--calib-data", scratch / "text", "--calib-size", 64,
                    "--calib-max-seq-length", 200, "--batch-size", batch, "--calib-cache", files[name], backend=backend)
        bits = {name: file.read_bytes() for name, file in files.items()}
        same = bits["gpu"] == bits["again"] == bits["batch"]
        of_types.append(load_file(files["cpu"]))
        limits = apart(*of_types) if len(of_types) == 2 else APART
        found = apart(load_file(files["gpu"]), of_types[-1])
        agree = agree and same and all(f <= limit for f, limit in zip(found, limits))
        print(f"{dtype}: CPU and {args.backend} differ by {found[0]:.1e} in the largest magnitudes, {found[1]:.1e} in moments, "
              f"{found[2]:.1e} of the tokens (at most {limits[0]:.1e}, {limits[1]:.1e}, {limits[2]:.1e}); a rerun and other batches give "
              f"{'the same bits' if same else 'OTHER BITS'}", flush=True)
    return agree


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtral", required=True, help="the tool's binary")
    parser.add_argument("--backend", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > 16_000_000_000
    with tempfile.TemporaryDirectory(prefix="calib-", dir=memory if has_room else None) as scratch:
        print(f"in {scratch}", flush=True)
        agree = compare(args, Path(scratch))
        summary, holds = measure(args, Path(scratch))
    print(f"{summary}; CPU and GPU {'agree' if agree else 'DIFFER'}{'' if holds else '; OUTSIDE OF LIMITS'}")
    sys.exit(0 if agree and holds else 1)


if __name__ == "__main__":
    main()
