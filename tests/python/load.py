#!/usr/bin/env python3
"""How fast an engine's weights get onto a GPU, from files that are in memory.

    load.py --mixtral PATH [--gigabytes N] [--backend cuda] [--convert "--qformat int4_wo --tp_size 2"]

Writes a layer of Mixtral 8x7B's shape in bf16 as Hugging Face would and converts it. The checkpoint's layer is then repeated until there
are N GB (so each format has as many bytes, and a fixed time that any load takes counts the same for each), and an engine is built, in /dev/shm if
that has room. `--convert` gives convert further flags: formats, or tensor parallelism. `mixtral bench` prints how long loading took.
An engine of the same shape with dummy weights, which are made on the device, is loaded too: the difference is the time of the
weights. For comparison, torch measures the rate of copies from pinned memory.
"""

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from common import run_tool

GEOMETRY = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "torch_dtype": "bfloat16", "hidden_act": "silu",
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False,
}
# Loads of each engine. The best one counts, since other work on the machine can only slow a load down.
ROUNDS = 3


def layer_shapes():
    """The names and shapes of a layer's tensors."""
    hidden, inner = GEOMETRY["hidden_size"], GEOMETRY["intermediate_size"]
    kv = hidden // GEOMETRY["num_attention_heads"] * GEOMETRY["num_key_value_heads"]
    shapes = {f"self_attn.{part}_proj.weight": (rows, hidden)
              for part, rows in {"q": hidden, "k": kv, "v": kv, "o": hidden}.items()}
    shapes |= {f"{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    shapes["block_sparse_moe.gate.weight"] = (GEOMETRY["num_local_experts"], hidden)
    for expert in range(GEOMETRY["num_local_experts"]):
        parts = {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}
        shapes |= {f"block_sparse_moe.experts.{expert}.{part}.weight": shape for part, shape in parts.items()}
    return shapes


def write_model(directory, device):
    """Writes the model of one layer."""
    draw = lambda shape: torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(0.02).cpu()
    table = (GEOMETRY["vocab_size"], GEOMETRY["hidden_size"])
    shapes = {f"model.layers.0.{name}": shape for name, shape in layer_shapes().items()}
    shapes |= {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": table[1:]}
    save_file({name: draw(shape) for name, shape in shapes.items()}, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(GEOMETRY | {"num_hidden_layers": 1}))


def repeat_layer(checkpoint, gigabytes):
    """Repeats the layer of a checkpoint until all ranks together have so many gigabytes."""
    ranks = [(file, load_file(file)) for file in sorted(checkpoint.glob("rank*.safetensors"))]
    of_layer = re.compile(r"(.*\blayers\.)0(\..*)")
    size = lambda in_layer: sum(t.nbytes for _, tensors in ranks for n, t in tensors.items() if bool(of_layer.match(n)) == in_layer)
    layers = max(1, round((gigabytes * 1e9 - size(False)) / size(True)))
    for file, tensors in ranks:
        for name, tensor in list(tensors.items()):
            if match := of_layer.match(name):
                tensors |= {f"{match[1]}{i}{match[2]}": tensor.clone() for i in range(1, layers)}
        # Not into the file that the tensors still lie in.
        save_file(tensors, file.with_suffix(".new"))
        file.with_suffix(".new").rename(file)
    config = json.loads((checkpoint / "config.json").read_text()) | {"num_hidden_layers": layers}
    # These files are no longer those that convert wrote.
    for key in ("run_id", "seal", "headers"):
        del config["mixtral"][key]
    (checkpoint / "config.json").write_text(json.dumps(config))
    return layers


def pinned_rate():
    """Bytes a second from pinned memory to the GPU."""
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    best = float("inf")
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        device.copy_(host, non_blocking=True)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return host.nbytes / best


def load_seconds(args, engine):
    """The seconds of the best of some loads."""
    seconds = []
    for _ in range(ROUNDS):
        said = run_tool(args.mixtral, "bench", "--engine-dir", engine, "--backend", args.backend, "--quick", "--json",
                        "--batch-size", 1, "--context", 16, "--steps", 1, "--warmup", 0, "--prefill", 16)
        seconds.append(json.loads(said)["load_s"])
    print(f"{engine.name}: loaded in {', '.join(f'{s:.3f}' for s in seconds)} s", flush=True)
    return min(seconds)


def measure(args, scratch):
    model, checkpoint, engine, dummy = (scratch / name for name in ("model", "checkpoint", "engine", "dummy"))
    model.mkdir()
    write_model(model, args.backend)
    run_tool(args.mixtral, "convert", "--model_dir", model, "--output_dir", checkpoint, "--dtype", "bfloat16",
             *args.convert.split())
    shutil.rmtree(model)
    print(f"{repeat_layer(checkpoint, args.gigabytes)} layers", flush=True)
    limits = ["--max-batch-size", 8, "--max-num-tokens", 512, "--max-seq-len", 512, "--backend", args.backend]
    run_tool(args.mixtral, "build", "--checkpoint_dir", checkpoint, "--output_dir", engine, *limits)
    run_tool(args.mixtral, "build", "--model-config", checkpoint / "config.json", "--output_dir", dummy, *limits)
    ranks = json.loads(run_tool(args.mixtral, "inspect", engine, "--json"))["ranks"]
    weights = sum(rank["bytes"] for rank in ranks)
    loaded, without = load_seconds(args, engine), load_seconds(args, dummy)
    pinned = f"{pinned_rate() / 1e9:.1f} GB/s from pinned memory" if args.backend == "cuda" else "no bus"
    rate = f"{weights / (loaded - without) / 1e9:.1f} GB/s" if loaded > without else "in no time"
    of = f" of {len(ranks)} ranks" if len(ranks) > 1 else ""
    print(f"{weights / 1e9:.1f} GB{of} loaded in {loaded:.2f} s ({weights / loaded / 1e9:.1f} GB/s), {without:.2f} s of it "
          f"not for weights: those at {rate}, {pinned}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtral", required=True, help="the tool's binary")
    parser.add_argument("--gigabytes", type=float, default=12)
    parser.add_argument("--convert", default="", metavar="FLAGS", help="further flags of convert")
    parser.add_argument("--backend", choices=["cpu", "cuda"], default="cuda")
    args = parser.parse_args()
    # The checkpoint, which the engine shares, and first a layer in bf16, twice if it is not quantized.
    needed = int(args.gigabytes * 1e9) + 7_000_000_000
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > needed
    with tempfile.TemporaryDirectory(prefix="load-", dir=memory if has_room else None) as scratch:
        print(f"in {scratch}", flush=True)
        measure(args, Path(scratch))


if __name__ == "__main__":
    main()
