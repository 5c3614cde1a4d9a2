#!/usr/bin/env python3
"""An engine with dummy weights against transformers with the same dummy weights, at any size.

    twin.py --mixtral PATH [--engine DIR] [--backend cuda]

DIR was built with `--model-config NAME|PATH --gather-context-logits`; without DIR, small engines are built. The tool
continues some prompts greedily and writes its logits. Then transformers computes the logits of the same tokens. This script
draws transformers' weights by the same integer arithmetic as mixtral-engine's `dummy.rs`. It draws a layer's weights when
the layer is about to run and drops them after it: the reference is in f32, and all weights of Mixtral 8x7B would be 187 GB.
The limits are those of parity.py: f32 within 1e-5 of the largest logit, 16 bit no worse than transformers' own code at that
data type.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from common import DTYPES, correct_inv_freq, run_tool
from parity import MAX_MEDIAN, MAX_P90, NEAR, spread

# The values of a few elements in Rust.
PINNED = Path(__file__).parents[2] / "crates/mixtral-engine/src/snapshots/mixtral_engine__dummy__tests__values_are_pinned.snap"
# Elements drawn at a time.
CHUNK = 1 << 24


def key(seed, name):
    """FNV-1a of the name, started from the seed."""
    value = seed ^ 0xCBF29CE484222325
    for byte in name.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def signed(word):
    """The i32 of the same bits as the lower half of `word`."""
    return (word + 2**31) % 2**32 - 2**31


def mix_(x):
    """A 32-bit mix, in place. Products wrap. Shifts extend the sign, so those bits are masked."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= signed(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def scale(fan_in):
    return float(np.float32(1 / np.sqrt(21845.0 * fan_in)))


def elements(key, index, scale):
    """The elements at i64 indices of a whole tensor, f32."""
    word = index.to(torch.int32) ^ (index >> 32).to(torch.int32).mul_(signed(0x9E3779B9))
    word = mix_(word.bitwise_xor_(signed(key)))
    word = mix_(word.add_(signed(key >> 32)))
    total = word & 0xFF
    for shift in (8, 16, 24):
        total += (word >> shift) & 0xFF
    return (total.float() - 510).mul_(scale)


def check_elements(device):
    """Checks that the elements drawn here are Rust's."""
    numbers = re.findall(r"-?\d[\d.e-]*", PINNED.read_text().split("---")[2])
    pinned_key, (pinned_scale, *pinned) = int(numbers[0]), map(np.float32, numbers[1:])
    name_key, index = key(7, "model.layers.0.self_attn.q_proj.weight"), [0, 1, 4095, 4096, 1 << 33]
    found = elements(name_key, torch.tensor(index, device=device), scale(4096)).cpu().numpy()
    if (name_key, np.float32(scale(4096))) != (pinned_key, pinned_scale) or not np.array_equal(found, pinned):
        sys.exit(f"the generator here says {name_key}, {scale(4096)}, {found}: not {pinned_key}, {pinned_scale}, {pinned}")


class Weights:
    """Fills parameters, by transformers' names, with the dummy weights of a model in a data type."""

    def __init__(self, seed, dtype):
        self.seed, self.dtype = seed, dtype

    def draw(self, out, name):
        """Fills `out`, [rows, columns] and contiguous, with the whole tensor of that name."""
        flat, name_key = out.view(-1), key(self.seed, name)
        # Routers are f32 in our checkpoints, whatever the model's data type is.
        rounded = torch.float32 if name.endswith("block_sparse_moe.gate.weight") else self.dtype
        for first in range(0, len(flat), CHUNK):
            part = flat[first : first + CHUNK]
            index = torch.arange(first, first + len(part), device=out.device)
            part.copy_(elements(name_key, index, scale(out.shape[-1])).to(rounded))

    def fill(self, name, parameter):
        """Fills a parameter. transformers 5 fuses the experts; their tensors are drawn by the older names."""
        old = name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith("norm.weight"):
            parameter.fill_(1)
        elif name.endswith("experts.gate_up_proj"):
            for expert, matrix in enumerate(parameter):
                gate, up = matrix.chunk(2)
                self.draw(gate, old.replace("gate_up_proj", f"{expert}.w1.weight"))
                self.draw(up, old.replace("gate_up_proj", f"{expert}.w3.weight"))
        elif name.endswith("experts.down_proj"):
            for expert, matrix in enumerate(parameter):
                self.draw(matrix, old.replace("down_proj", f"{expert}.w2.weight"))
        else:
            self.draw(parameter, old)


def twin(config, weights, dtype, device):
    """A MixtralForCausalLM that computes in `dtype`. A module's parameters exist only while it runs."""
    with torch.device("meta"):
        model = MixtralForCausalLM(config).to(dtype).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    correct_inv_freq(model)
    model.model.rotary_emb.to(device)

    def appear(prefix):
        def hook(module, _):
            module.to_empty(device=device)
            for name, parameter in module.named_parameters():
                weights.fill(f"{prefix}.{name}", parameter)
        return hook

    for layer in model.model.layers:
        # The router runs in f32 as in our engines, so that both route by the same weights.
        layer.mlp.gate.float()
        layer.mlp.gate.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    holders = {f"model.layers.{i}": layer for i, layer in enumerate(model.model.layers)}
    holders |= {"model.embed_tokens": model.model.embed_tokens, "model.norm": model.model.norm, "lm_head": model.lm_head}
    for prefix, module in holders.items():
        module.register_forward_pre_hook(appear(prefix))
        module.register_forward_hook(lambda module, *_: module.to("meta") and None)
    return model


def logits(config, weights, dtype, device, ids):
    """f32 [sequences, positions, vocabulary]."""
    begun = time.monotonic()
    with torch.inference_mode():
        found = twin(config, weights, dtype, device)(ids.to(device), use_cache=False).logits.float().cpu().numpy()
    print(f"transformers, {str(dtype).removeprefix('torch.')}: {time.monotonic() - begun:.1f} s", flush=True)
    return found


def ours(args, engine, prompts):
    """(context logits, generation logits, tokens)."""
    with tempfile.TemporaryDirectory(prefix="twin-") as scratch:
        ids, csv, out = (Path(scratch) / name for name in ("ids.csv", "out.csv", "logits"))
        ids.write_text("".join(",".join(map(str, prompt)) + "\n" for prompt in prompts))
        begun = time.monotonic()
        run_tool(args.mixtral, "run", "--engine_dir", engine, "--backend", args.backend, "--input_file", ids,
                 "--max_output_len", args.output, "--end_id", -1, "--output_csv", csv, "--output_logits_npy", out)
        print(f"mixtral: {time.monotonic() - begun:.1f} s", flush=True)
        tokens = [[int(token) for token in line.split(",")] for line in csv.read_text().splitlines()]
        return np.load(f"{out}_context.npy"), np.load(f"{out}_generation.npy"), tokens


def transformers_config(model):
    """The geometry that an engine's config.json describes."""
    return MixtralConfig(
        vocab_size=model["vocab_size"], hidden_size=model["hidden_size"], intermediate_size=model["intermediate_size"],
        num_hidden_layers=model["num_layers"], num_attention_heads=model["num_heads"],
        num_key_value_heads=model["num_kv_heads"], head_dim=model["head_dim"], rms_norm_eps=model["norm_eps"],
        num_local_experts=model["moe"]["num_experts"], num_experts_per_tok=model["moe"]["top_k"],
        max_position_embeddings=model["max_position_embeddings"], sliding_window=model["sliding_window"],
        rope_parameters={"rope_type": "default", "rope_theta": model["rope_theta"]}, tie_word_embeddings=False,
        attn_implementation="eager", experts_implementation="eager", bos_token_id=None, eos_token_id=None)


def compare(dtype, found, expected, eager):
    """Prints the verdict in a line, and exits if it is a miss. `eager` is a function, since f32 does not need it."""
    if dtype == "float32":
        error = float((np.abs(found - expected).max(axis=-1) / np.abs(expected).max(axis=-1)).max())
        text, holds = f"largest difference {error:.1e} of the largest logit, limit {NEAR}", error <= NEAR
    else:
        e = lambda x: np.linalg.norm(x - expected, axis=-1).ravel() / np.linalg.norm(expected, axis=-1).ravel()
        text, median, p90 = spread(e(found), e(eager()))
        text, holds = f"{text}, limits {MAX_MEDIAN} x and {MAX_P90} x", median <= MAX_MEDIAN and p90 <= MAX_P90
    print(f"{text}, over {found.shape[0]} x {found.shape[1]} positions")
    if not holds:
        sys.exit(f"MISS {text}")


def check(args, directory):
    """Compares one engine with transformers, and exits at a miss."""
    engine = json.loads((directory / "config.json").read_text())
    model, dtype = engine["model"], engine["model"]["dtype"]
    config, weights = transformers_config(model), Weights(engine["weights"]["seed"], DTYPES[dtype])
    rng = random.Random(1)
    prompts = [[rng.randrange(config.vocab_size) for _ in range(args.length)] for _ in range(args.prompts)]
    context, generation, tokens = ours(args, directory, prompts)
    # The last context row and the first generation row are of the same position.
    found = np.concatenate([context[:, :-1], generation], axis=1)
    ids = torch.tensor([prompt + said[:-1] for prompt, said in zip(prompts, tokens)])
    if found.shape != (*ids.shape, config.vocab_size) or not np.isfinite(found).all():
        sys.exit(f"logits of shape {found.shape}, or some that are no numbers")
    expected = logits(config, weights, torch.float32, args.backend, ids)
    compare(dtype, found, expected, lambda: logits(config, weights, DTYPES[dtype], args.backend, ids))


def check_small(args):
    """Builds and checks engines of a small model."""
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory(prefix="twin-") as scratch:
            MixtralConfig(
                vocab_size=1000, hidden_size=192, intermediate_size=320, num_hidden_layers=2, num_attention_heads=6,
                num_key_value_heads=2, head_dim=32, num_local_experts=8, num_experts_per_tok=2, dtype=dtype,
            ).save_pretrained(scratch)
            run_tool(args.mixtral, "build", "--model-config", scratch, "--seed", 3, "--backend", args.backend,
                     "--gather-context-logits", "--output-dir", Path(scratch) / "engine")
            check(args, Path(scratch) / "engine")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtral", required=True, help="the tool's binary")
    parser.add_argument("--engine", type=Path, help="an engine with dummy weights and context logits")
    parser.add_argument("--backend", choices=["cpu", "cuda"], default="cpu")
    # Dummy routers have many near-ties. If one is decided the other way, all later logits of its sequence change. So
    # many short sequences tell more than a few long ones.
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--length", type=int, default=16, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=16, help="tokens generated for each")
    args = parser.parse_args()
    check_elements(args.backend)
    check(args, args.engine) if args.engine else check_small(args)


if __name__ == "__main__":
    main()
