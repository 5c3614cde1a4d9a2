#!/usr/bin/env python3
"""Retrieval over a long context: engines with fp8 weights and an fp8 cache find what float engines find.

    retrieval.py --mixtral PATH [--length 16384]

The model is a tiny f32 Mixtral whose attention is set by hand, so that it copies. Its first layer writes the code of the token
before into each position. Its second layer looks for the positions whose token before is the current one, and writes the code of
the token that is there, which is then predicted. So `M X ... M` gives X, however long ago that was.

The prompt is a text of random tokens that hides pairs (M, X) at evenly spaced depths, and ends with all the Ms. At each of these
the likeliest token has to be the right X. Expected of every format: no miss, and a margin of at least a half of the float engine's.
"""

import argparse
import json
import math
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from common import run_tool, write_tensors

# What `convert` is told. Attention in fp8 is what `build` is told.
FORMATS = {"float": "", "fp8 cache": "--kv_cache_dtype fp8", "fp8 cache, attention in fp8": "--kv_cache_dtype fp8", "fp8": "--qformat fp8",
           "fp8, fp8 cache": "--qformat fp8 --kv_cache_dtype fp8", "fp8 by rows, fp8 cache": "--use_fp8_rowwise --kv_cache_dtype fp8"}
CODE = 32  # numbers of a token's code, about 1 in size
VOCABULARY = 2 * CODE
HEAD = 2 * CODE
HIDDEN, INNER, EXPERTS = 4 * CODE, 32, 4
# The slow half of the rotary pairs turns by less than 0.02 over 16 384 positions, so it can compare codes wherever they are.
THETA = 1e12
NEEDLES = 12


def codes():
    """Codes that are orthogonal or opposite, `[VOCABULARY, CODE]`."""
    hadamard = torch.ones(1, 1)
    while len(hadamard) < CODE:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    # Turned, so that their numbers are none of e4m3's.
    turn, _ = torch.linalg.qr(torch.randn(CODE, CODE, generator=torch.Generator().manual_seed(0)))
    return torch.cat([hadamard, -hadamard]) @ turn


def write_model(directory):
    """Writes the model. A position has four parts: its token's code, the code of the token before, the answer's code, and ones."""
    token, before, answer, ones = (slice(k * CODE, (k + 1) * CODE) for k in range(4))
    slow = torch.arange(CODE // 2, CODE)
    slow = torch.cat([slow, slow + CODE])  # both numbers of each slow pair
    fast = torch.arange(8)
    speeds = THETA ** (-fast / CODE)
    # The fastest pairs tell neighbours apart. They weigh so much that a token whose numbers are rounded up does not win.
    weights = 6.3 / CODE * torch.tensor([4.0, 2, 1, 1, 1, 1, 1, 1]).sqrt()
    zeros = lambda *shape: torch.zeros(*shape)
    tensors = {"model.embed_tokens.weight": zeros(VOCABULARY, HIDDEN), "lm_head.weight": zeros(VOCABULARY, HIDDEN),
               "model.norm.weight": torch.ones(HIDDEN)}
    tensors["model.embed_tokens.weight"][:, token] = codes()
    tensors["model.embed_tokens.weight"][:, ones] = 1
    tensors["lm_head.weight"][:, answer] = codes()
    eye = torch.eye(CODE)
    for index in range(2):
        layer = f"model.layers.{index}"
        q, k, v, o = zeros(HEAD, HIDDEN), zeros(HEAD, HIDDEN), zeros(HEAD, HIDDEN), zeros(HIDDEN, HEAD)
        v[:CODE, token] = eye
        if index == 0:
            # The product of q and k is largest where k is one position before q.
            q[fast, ones] = weights[:, None]
            k[fast, ones] = (weights * speeds.cos())[:, None]
            k[fast + CODE, ones] = (weights * speeds.sin())[:, None]
            o[before, :CODE] = eye
        else:
            q[slow, token] = 3 * eye
            k[slow, before] = 3 * eye
            o[answer, :CODE] = eye
        tensors |= {f"{layer}.self_attn.{name}_proj.weight": weight for name, weight in zip("qkvo", (q, k, v, o))}
        tensors |= {f"{layer}.{norm}_layernorm.weight": torch.ones(HIDDEN) for norm in ("input", "post_attention")}
        moe = f"{layer}.block_sparse_moe"
        tensors[f"{moe}.gate.weight"] = zeros(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            shapes = {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}
            tensors |= {f"{moe}.experts.{expert}.{name}.weight": zeros(*shape) for name, shape in shapes.items()}
    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "dtype": "float32", "vocab_size": VOCABULARY,
              "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 1,
              "num_key_value_heads": 1, "head_dim": HEAD, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
              "max_position_embeddings": 1 << 15, "rope_theta": THETA, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    write_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, directory)
    (directory / "config.json").write_text(json.dumps(config))


def write_prompt(length, rng):
    """(token ids, the X of each M at the end)."""
    ids = list(range(VOCABULARY))
    rng.shuffle(ids)
    keys, answers, filler = ids[:NEEDLES], ids[NEEDLES : 2 * NEEDLES], ids[2 * NEEDLES :]
    text = [rng.choice(filler) for _ in range(length - NEEDLES)]
    for number, pair in enumerate(zip(keys, answers)):
        place = 1 + number * (len(text) - 4) // (NEEDLES - 1)
        text[place : place + 2] = pair
    return text + keys, answers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtral", required=True, help="the tool's binary")
    parser.add_argument("--length", type=int, default=2048)
    args = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="retrieval-") as scratch:
        work = Path(scratch)
        (work / "hf").mkdir()
        write_model(work / "hf")
        ids, answers = write_prompt(args.length, rng)
        (work / "ids.csv").write_text(",".join(map(str, ids)) + "\n")
        (work / "calibration.csv").write_text("".join(",".join(map(str, write_prompt(256, rng)[0])) + "\n" for _ in range(4)))
        margins = {}
        for name, flags in FORMATS.items():
            needs_text = "fp8" in flags and flags != "--use_fp8_rowwise"
            run_tool(args.mixtral, "convert", "--model_dir", work / "hf", "--dtype", "float32", "--output_dir", work / "c",
                     *flags.split(), *(["--calib_data", work / "calibration.csv"] if needs_text else []))
            run_tool(args.mixtral, "build", "--checkpoint_dir", work / "c", "--output_dir", work / "e", "--backend", "cpu",
                     "--gather_context_logits", "--max-seq-len", args.length + 1, "--max-batch-size", 1,
                     *(["--use_fp8_context_fmha", "enable"] if "attention in fp8" in name else []))
            run_tool(args.mixtral, "run", "--engine_dir", work / "e", "--backend", "cpu", "--input_file", work / "ids.csv",
                     "--max_output_len", 1, "--end-id", -1, "--output_logits_npy", work / "logits")
            logits = np.load(f"{work / 'logits'}_context.npy")[0, args.length - NEEDLES : args.length]
            right = logits[np.arange(NEEDLES), answers]
            others = logits.copy()
            others[np.arange(NEEDLES), answers] = -math.inf
            margins[name] = (right - others.max(axis=-1)).min()
            print(f"{name}: {(right > others.max(axis=-1)).sum()} of {NEEDLES}, smallest margin {margins[name]:.2f}", flush=True)
    missed = [name for name, margin in margins.items() if not margin >= margins["float"] / 2 > 0]
    if missed:
        sys.exit(f"retrieval over {args.length} tokens fails: {', '.join(missed)}")
    print(f"retrieval over {args.length} tokens holds")


if __name__ == "__main__":
    main()
