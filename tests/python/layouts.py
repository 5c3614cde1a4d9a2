#!/usr/bin/env python3
"""Checks that the three source layouts of one model give byte-identical checkpoints, and that those are right.

    layouts.py --mixtral PATH
    layouts.py --self-test

Small random models are written as transformers 4 named them, as transformers 5 fuses them and as Mistral publishes
them, each as one file and as shards with an index. Every source is converted with `--dtype auto` to every layout of
`check_checkpoint.LAYOUTS`. The directories must agree byte for byte (tokenizer files aside), and the checkpoint of
the first source must pass check_checkpoint.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from check_checkpoint import LAYOUTS, Miss, check_checkpoint, layout_models
from common import load_model, random_model, read_tensors, run_tool, save_model
from common import to_consolidated, to_fused, to_stacked, write_tensors


def old_config(directory):
    """config.json as transformers 4 wrote it."""
    config = json.loads((Path(directory) / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.36.0"
    return config


def write_sources(model, config, dtype, root):
    """Writes the model in every layout: {what: directory}. The first has transformers' per-expert names."""
    first = root / "v4"
    save_model(model, first, dtype)
    tensors, sources = read_tensors(first), {"v4, one file": first}

    def add(what, tensors, stem, shards, configs):
        directory = root / what.replace(", ", "-").replace(" ", "-")
        write_tensors(tensors, directory, stem, shards)
        for name, content in configs.items():
            (directory / name).write_text(json.dumps(content, indent=2))
        sources[what] = directory

    add("v4, 3 shards", tensors, "model", 3, {"config.json": old_config(first)})
    if config.model_type == "mixtral":
        new = {"config.json": json.loads((first / "config.json").read_text())}
        add("v5 fused, one file", to_fused(tensors, config), "model", 1, new)
        add("v5 fused, 2 shards", to_fused(tensors, config), "model", 2, new)
    if not config.tie_word_embeddings:  # Mistral's own files never have tied embeddings
        consolidated, params = to_consolidated(tensors, config)
        add("consolidated, one file", consolidated, "consolidated", 1, {"params.json": params})
        add("consolidated, 2 shards", consolidated, "consolidated", 2, {"params.json": params})
        if config.model_type == "mixtral":
            add("consolidated, stacked", to_stacked(consolidated, config), "consolidated", 1, {"params.json": params})
    return sources


def contents(directory):
    """{name: bytes} of the files of a checkpoint. Tokenizer files differ between the sources, so config.json is compared
    without their hashes and without its own hash."""
    found = {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.suffix == ".safetensors"}
    config = json.loads((Path(directory) / "config.json").read_text())
    del config["mixtral"]["files"], config["mixtral"]["seal"]
    return found | {"config.json": json.dumps(config, indent=2)}


def check_layouts(binary):
    failures = 0
    for model, (config, dtype) in layout_models().items():
        with tempfile.TemporaryDirectory(prefix="layouts-") as scratch:
            sources = write_sources(random_model(config, 11), config, dtype, Path(scratch))
            for tp, pp, moe_tp, moe_ep, options in LAYOUTS:
                if model == "dense" and moe_ep > 1:
                    continue
                flags = ["--tp_size", tp, "--pp_size", pp, "--moe_tp_size", moe_tp, "--moe_ep_size", moe_ep]
                if options.get("use_parallel_embedding"):
                    flags += ["--use_parallel_embedding"]
                    flags += ["--embedding_sharding_dim", options.get("embedding_sharding_dim", 0)]
                results = {}
                for what, source in sources.items():
                    out = Path(scratch) / "out"
                    run_tool(binary, "convert", "--model_dir", source, "--output_dir", out, "--dtype", "auto", *flags)
                    results[what] = contents(out)
                    if what == "v4, one file":
                        try:
                            verdict = f"{check_checkpoint(source, out)} tensors bit for bit"
                        except Miss as miss:
                            verdict, failures = f"MISS {miss}", failures + 1
                    shutil.rmtree(out)
                expected = results["v4, one file"]
                for what, found in results.items():
                    differing = sorted(name for name in expected.keys() | found.keys()
                                       if expected.get(name) != found.get(name))
                    if differing:
                        verdict, failures = f"{verdict}; MISS from {what}: {differing} differ", failures + 1
                print(f"{model}: {' '.join(map(str, flags))}: {verdict}, {len(results)} sources", flush=True)
    if failures:
        sys.exit(f"{failures} misses")


def rotate_neighbours(x, theta):
    """Mistral's rotary embedding: elements (0,1), (2,3) … of [positions, heads, head_dim] are complex numbers."""
    angles = torch.outer(torch.arange(len(x)), theta ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1]))
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).flatten(-2)


def rotate_halves(x, theta):
    """Hugging Face's rotary embedding: element i pairs with element i + head_dim / 2."""
    angles = torch.outer(torch.arange(len(x)), theta ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1]))[:, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


def self_test():
    """Checks the sources: transformers reads all alike, and q and k of the consolidated one give the same scores."""
    for model, (config, dtype) in layout_models().items():
        with tempfile.TemporaryDirectory(prefix="layouts-") as scratch:
            original = random_model(config, 11)
            sources = write_sources(original, config, dtype, Path(scratch))
            expected = dict(load_model(sources["v4, one file"], dtype).named_parameters())
            for what, source in sources.items():
                if "consolidated" in what:
                    continue
                found = dict(load_model(source, dtype).named_parameters())
                assert found.keys() == expected.keys()
                assert all(torch.equal(found[name], expected[name]) for name in expected), what
                print(f"{model}: transformers reads the same from {what}")
            if config.tie_word_embeddings:
                continue
            tensors = {name: x.float() for name, x in read_tensors(sources["v4, one file"]).items()}
            published, _ = to_consolidated(tensors, config)
            x = torch.randn(12, config.hidden_size, generator=torch.Generator().manual_seed(0))

            def scores(q, k, rotate):
                q, k = ((x @ w.T).unflatten(-1, (-1, config.head_dim)) for w in (q, k))
                q, k = rotate(q, 1e6), rotate(k, 1e6).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
                return torch.einsum("ihd,jhd->hij", q, k)

            ours = scores(published["layers.1.attention.wq.weight"], published["layers.1.attention.wk.weight"],
                          rotate_neighbours)
            hf = "model.layers.1.self_attn.{}_proj.weight"
            theirs = scores(tensors[hf.format("q")], tensors[hf.format("k")], rotate_halves)
            unpermuted = scores(tensors[hf.format("q")], tensors[hf.format("k")], rotate_neighbours)
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4), "the permutation is not Mistral's"
            assert not torch.allclose(unpermuted, theirs, rtol=1e-2, atol=1e-2), "this test sees no permutation"
            print(f"{model}: consolidated q and k score as Hugging Face's do")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtral", help="the tool's binary")
    parser.add_argument("--self-test", action="store_true")
    args = parser.parse_args()
    if args.self_test:
        return self_test()
    if not args.mixtral:
        parser.error("--mixtral PATH or --self-test")
    check_layouts(args.mixtral)


if __name__ == "__main__":
    main()
