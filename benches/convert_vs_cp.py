#!/usr/bin/env python3
"""How fast `mixtral convert` is, compared with `cp` of the same bytes.

    convert_vs_cp.py --mixtral PATH_TO_RELEASE_BINARY [--dir SCRATCH] [--pairs 5] [--tp-size 2] [--dtype bfloat16] [--qformat int8_wo]

Writes a synthetic bf16 model of Mixtral 8x7B's layer shapes once (2 layers, 6.3 GB, random bits of small values). Then it
copies the model with `cp -r --reflink=never` and converts it with `mixtral convert`, in turn. Both timings include `sync`,
and the source is in the page cache. Prints each pair, the median of the ratios (cp's time / convert's) and convert's
largest resident set. Needs numpy and about 20 GB of disk, but no safetensors package: the header is written here.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

H, I, V, HEADS, KV, D, E, LAYERS = 4096, 14336, 32000, 32, 8, 128, 8, 2


def shapes():
    yield "model.embed_tokens.weight", (V, H)
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        yield p + "input_layernorm.weight", (H,)
        yield p + "post_attention_layernorm.weight", (H,)
        for name, rows in ("q", HEADS * D), ("k", KV * D), ("v", KV * D):
            yield f"{p}self_attn.{name}_proj.weight", (rows, H)
        yield p + "self_attn.o_proj.weight", (H, HEADS * D)
        yield p + "block_sparse_moe.gate.weight", (E, H)
        for expert in range(E):
            e = f"{p}block_sparse_moe.experts.{expert}."
            yield e + "w1.weight", (I, H)
            yield e + "w2.weight", (H, I)
            yield e + "w3.weight", (I, H)
    yield "model.norm.weight", (H,)
    yield "lm_head.weight", (V, H)


def write_model(directory):
    directory.mkdir()
    config = dict(architectures=["MixtralForCausalLM"], model_type="mixtral", hidden_act="silu", hidden_size=H,
                  intermediate_size=I, max_position_embeddings=32768, num_attention_heads=HEADS, num_hidden_layers=LAYERS,
                  num_key_value_heads=KV, num_local_experts=E, num_experts_per_tok=2, rms_norm_eps=1e-5, rope_theta=1e6,
                  tie_word_embeddings=False, torch_dtype="bfloat16", vocab_size=V, sliding_window=None)
    (directory / "config.json").write_text(json.dumps(config))
    names = list(shapes())
    header, at = {}, 0
    for name, shape in names:
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    # Signs and mantissas are random; exponents are those of numbers from 2^-7 to 2^-4.
    block = rng.integers(0, 1 << 16, 1 << 24, dtype=np.uint16)
    block = (block & 0x807F) | ((120 + (block >> 7) % 4) << 7).astype(np.uint16)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in names:
            left, start = int(np.prod(shape)), int(rng.integers(0, 1 << 20))
            while left:
                part = block[start:start + left]
                file.write(part.tobytes())
                left, start = left - len(part), 0


def timed(command):
    """Seconds until the command's bytes are on the disk, and its largest resident set in bytes."""
    subprocess.run(["sync"], check=True)
    start = time.monotonic()
    child = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(child, 0)
    subprocess.run(["sync"], check=True)
    if status:
        raise SystemExit(f"{command} ended with {status}")
    return time.monotonic() - start, usage.ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtral", required=True, type=Path)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--qformat", default="full_prec")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=args.dir))
    try:
        model, copy, checkpoint = scratch / "model", scratch / "copy", scratch / "checkpoint"
        write_model(model)
        size = (model / "model.safetensors").stat().st_size
        subprocess.run(["cat", model / "model.safetensors"], check=True, stdout=subprocess.DEVNULL)
        convert = [str(args.mixtral.resolve()), "convert", "--model_dir", str(model), "--output_dir", str(checkpoint),
                   "--dtype", args.dtype, "--tp_size", str(args.tp_size), "--qformat", args.qformat]
        ratios, resident = [], 0
        for pair in range(args.pairs):
            cp, _ = timed(["cp", "-r", "--reflink=never", str(model), str(copy)])
            shutil.rmtree(copy)
            ours, rss = timed(convert)
            shutil.rmtree(checkpoint)
            ratios.append(cp / ours)
            resident = max(resident, rss)
            print(f"pair {pair}: cp {cp:.2f} s ({size / cp / 1e9:.2f} GB/s), convert {ours:.2f} s "
                  f"({size / ours / 1e9:.2f} GB/s), ratio {cp / ours:.2f}", flush=True)
        print(f"{size / 1e9:.2f} GB, tp {args.tp_size}, {args.dtype}, {args.qformat}: median ratio {statistics.median(ratios):.2f}; "
              f"largest resident set {resident / 1e6:.1f} MB")
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
