#!/usr/bin/env python3
"""Writes tests/goldens: tiny models and the outputs of transformers for them, for tests that run without Python.

    make_goldens.py            # writes them again
    make_goldens.py --check    # checks that transformers still gives the committed outputs for the committed weights

The format is described in tests/goldens/README.md.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from common import MistralConfig, MixtralConfig, forward, load_model, random_model, save_model
from layouts import old_config

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
PROMPT_LENGTHS = [1, 6, 40]
NEW_TOKENS = 8
# The smallest distance of any choice from the next best, relative to the largest logit or in router logits. With it, no
# right implementation can choose differently.
CLEAR = 1e-3


def models():
    """{name: config}. Together they have grouped and ungrouped heads, every kind of routing, windows, tied and dense."""
    common = dict(max_position_embeddings=64, bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5, sliding_window=None)
    rope = lambda theta: {"rope_type": "default", "rope_theta": theta}
    return {
        "grouped": MixtralConfig(**common | dict(
            vocab_size=61, hidden_size=24, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=6, num_local_experts=4, num_experts_per_tok=2, rope_parameters=rope(1e6))),
        "window-tied": MixtralConfig(**common | dict(
            vocab_size=97, hidden_size=20, intermediate_size=13, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=1, head_dim=4, num_local_experts=3, num_experts_per_tok=1, sliding_window=5,
            tie_word_embeddings=True, rope_parameters=rope(1e4))),
        "wide-heads": MixtralConfig(**common | dict(
            vocab_size=73, hidden_size=17, intermediate_size=7, num_hidden_layers=2, num_attention_heads=3,
            num_key_value_heads=3, head_dim=16, num_local_experts=6, num_experts_per_tok=4, rms_norm_eps=1e-6,
            rope_parameters=rope(1e4))),
        "dense": MistralConfig(**common | dict(
            vocab_size=64, hidden_size=32, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, sliding_window=9, rope_parameters=rope(1e4))),
    }


def continue_greedily(model, prompt):
    """(logits of the prompt and of all new tokens but the last, new tokens, the distance of the closest choice)."""
    ids, tokens = list(prompt), []
    for _ in range(NEW_TOKENS):
        logits, routers = forward(model, ids)
        tokens.append(int(logits[-1].argmax()))
        ids.append(tokens[-1])
    top = np.sort(logits[len(prompt) - 1 :], axis=-1)
    clear = ((top[:, -1] - top[:, -2]) / np.abs(top).max(axis=-1)).min()
    if routers is not None and model.config.num_experts_per_tok < routers.shape[-1]:
        ranked, k = -np.sort(-routers, axis=-1), model.config.num_experts_per_tok
        clear = min(clear, (ranked[..., k - 1] - ranked[..., k]).min())
    return logits, tokens, clear


def expectations(model, prompts):
    """The tensors of expected.safetensors, and the distance of the closest choice of all prompts."""
    tensors, clearest = {}, np.inf
    for number, prompt in enumerate(prompts):
        logits, tokens, clear = continue_greedily(model, prompt)
        tensors[f"prompt.{number}"] = torch.tensor(prompt, dtype=torch.int32)
        tensors[f"tokens.{number}"] = torch.tensor(tokens, dtype=torch.int32)
        tensors[f"logits.{number}"] = torch.from_numpy(logits).contiguous()
        clearest = min(clearest, clear)
    return tensors, clearest


def write():
    for name, config in models().items():
        directory = GOLDENS / name
        for seed in range(100):
            save_model(random_model(config, seed), directory, "float32")
            rng = random.Random(seed)
            prompts = [[rng.randrange(config.vocab_size) for _ in range(length)] for length in PROMPT_LENGTHS]
            tensors, clear = expectations(load_model(directory, "float32"), prompts)
            if clear > CLEAR:
                break
        else:
            sys.exit(f"{name}: no seed gives clear choices")
        save_file(tensors, directory / "expected.safetensors")
        (directory / "generation_config.json").unlink()
        if name == "grouped":  # one model has a config.json as transformers 4 wrote it
            (directory / "config.json").write_text(json.dumps(old_config(directory), indent=2) + "\n")
        size = sum(path.stat().st_size for path in directory.iterdir())
        print(f"{name}: seed {seed}, closest choice {clear:.1e}, {size} bytes")


def check():
    for name in models():
        committed = load_file(GOLDENS / name / "expected.safetensors")
        prompts = [committed[f"prompt.{number}"].tolist() for number in range(len(PROMPT_LENGTHS))]
        found, _ = expectations(load_model(GOLDENS / name, "float32"), prompts)
        for key, expected in committed.items():
            worst = ((found[key] - expected).abs().max() / expected.abs().max()).item()
            if worst > (1e-5 if key.startswith("logits") else 0):
                sys.exit(f"{name}: {key} differs by {worst:.1e}")
        print(f"{name}: as committed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check() if parser.parse_args().check else write()


if __name__ == "__main__":
    main()
