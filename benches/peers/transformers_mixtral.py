#!/usr/bin/env python3
"""How fast Hugging Face transformers runs Mixtral 8x7B's shape here: decode steps and prefill, and the machine's ceilings.

    transformers_mixtral.py [--compile] [--batch 1,8,64] [--prompt 128] [--prefill 1x2048,8x2048] [--json FILE]

Weights are random and made on the GPU. A step reads the experts that its tokens go to, so the script measures whether the
weights route evenly. Decode is one forward pass for each step over a static cache, with the implementations that
transformers chooses itself: sdpa attention and, for the experts, those that `generate` switches to (`batched_mm`, which
copies the weights of every token's experts, for few tokens, else `grouped_mm`). `--compile` compiles the step as `generate`
does (reduce-overhead, with CUDA graphs). Prefill is never compiled, as in `generate`. With `--device cpu --config FILE` the
script measures a small model.
"""

import argparse
import gc
import json
import math
import os
import statistics
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may use a network

import torch
import transformers
from transformers import MixtralConfig, MixtralForCausalLM, StaticCache

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MIXTRAL_8X7B = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=32768,
    rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=False)
READ_BYTES = 4 << 30
MATMUL = 8192
# The fewest experts that a step may hit, as a part of what even routing would hit. With fewer, the figures would be too
# good.
MIN_SPREAD = 0.8

if triton:
    @triton.jit
    def read(data, out, count, BLOCK: tl.constexpr):
        lanes = tl.arange(0, BLOCK)
        folded = tl.zeros([BLOCK], tl.int32)
        for start in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
            folded ^= tl.load(data + start + lanes)
        tl.store(out + tl.program_id(0) * BLOCK + lanes, folded)


class Clock:
    """Measures consecutive pieces of work on a device without waiting between them."""

    def __init__(self, device):
        self.on_gpu, self.marks = device == "cuda", []

    def mark(self):
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self):
        """The seconds between neighbouring marks."""
        if self.on_gpu:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:])]
        return [b - a for a, b in zip(self.marks, self.marks[1:])]


def times(device, work, warmup, rounds):
    for _ in range(warmup):
        work()
    clock = Clock(device)
    clock.mark()
    for _ in range(rounds):
        work()
        clock.mark()
    return clock.seconds()


def ceilings(device, scale=1):
    """The most bytes read and FLOPs computed a second: the best of some rounds."""
    count, size = READ_BYTES // 4 // scale, MATMUL // scale
    data = torch.ones(count, dtype=torch.int32, device=device)
    if triton and device == "cuda":
        by, block = "a Triton kernel", 4096
        programs = 4 * torch.cuda.get_device_properties(0).multi_processor_count
        out = torch.empty(programs * block, dtype=torch.int32, device=device)
        work = lambda: read[(programs,)](data, out, count, BLOCK=block, num_warps=8)
    else:
        by, work = "torch.sum", lambda: data.sum(dtype=torch.int32)
    seconds = min(times(device, work, 3, 10))
    del data
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    flops = 2 * size**3 / min(times(device, lambda: a @ b, 3, 10))
    return {"read_gb_per_s": 4 * count / seconds / 1e9, "read_by": by, "matmul_tflop_per_s": flops / 1e12,
            "matmul": f"bfloat16 {size} x {size} x {size}"}


def random_model(config, device):
    """A model in which every weight is drawn, with a standard deviation of 1/√inputs."""
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = MixtralForCausalLM(config).to(torch.bfloat16).eval()
    model.to_empty(device=device)
    # The buffers of the rotary embedding are computed, and not drawn at random.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            elif name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
                # Matrix by matrix: an operation is fastest with at most 2^31 elements.
                for matrix in parameter:
                    matrix.normal_(0, 1 / math.sqrt(matrix.shape[-1]))
            else:
                parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]))
    return model


def experts_hit(model, run):
    """How many experts of a layer a forward pass goes to, on average."""
    hits = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda _, __, output: hits.append(output[2].unique().numel()))
             for layer in model.model.layers]
    run()
    for hook in hooks:
        hook.remove()
    return statistics.mean(hits)


def prefill(model, ids, cache_len, experts):
    """Computes prompts. Returns (the cache, the next tokens)."""
    model.set_experts_implementation(experts)
    cache = StaticCache(config=model.config, max_cache_len=cache_len)
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return cache, logits[:, -1:].argmax(-1)


def random_ids(config, batch, length, device):
    return torch.randint(3, config.vocab_size, (batch, length), device=device)


def measure_decode(model, args, batch):
    config = model.config
    few = batch * config.num_experts_per_tok <= 2 * config.num_local_experts
    experts = args.experts or ("batched_mm" if few else "grouped_mm")
    steps = args.warmup + args.steps
    cache, token = prefill(model, random_ids(config, batch, args.prompt, args.device), args.prompt + steps + 2, "grouped_mm")
    position = torch.full((1, 1), args.prompt, device=args.device)
    model.set_experts_implementation(experts)
    forward = model.forward

    def step():
        nonlocal token
        logits = forward(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
        position.add_(1)

    hit = experts_hit(model, step)
    if args.compile:
        torch._dynamo.reset()
        forward = torch.compile(model.forward, mode="reduce-overhead")
    begun = time.monotonic()
    step()
    first_s = time.monotonic() - begun
    median = statistics.median(times(args.device, step, args.warmup, args.steps))
    even = config.num_local_experts * (1 - (1 - config.num_experts_per_tok / config.num_local_experts) ** batch)
    return {"batch": batch, "prompt": args.prompt, "steps": args.steps, "experts": experts, "compiled": args.compile,
            "median_ms": 1e3 * median, "tokens_per_s": batch / median, "experts_hit": hit, "experts_hit_if_even": even,
            "first_step_s": first_s}


def measure_prefill(model, args, batch, length):
    ids = random_ids(model.config, batch, length, args.device)
    median = statistics.median(times(args.device, lambda: prefill(model, ids, length, args.experts or "grouped_mm"), 1, 3))
    return {"prompts": batch, "length": length, "experts": args.experts or "grouped_mm", "median_ms": 1e3 * median,
            "tokens_per_s": batch * length / median}


def or_why_not(measure, *args):
    """The figures of `measure`, or a message if memory was too small."""
    try:
        return measure(*args)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def numbers(text):
    return [int(word) for word in text.split(",") if word]


def shapes(text):
    return [tuple(map(int, word.split("x"))) for word in text.split(",") if word]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=numbers, default=[1, 8, 64], help="sequences of the decode steps")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in each sequence's cache when decoding begins")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--prefill", type=shapes, default=[(1, 2048), (8, 2048)], help="PROMPTSxLENGTH,...")
    parser.add_argument("--compile", action="store_true", help="compile the decode step")
    parser.add_argument("--experts", help="one of transformers' experts implementations, for everything")
    parser.add_argument("--config", help="config.json of another geometry")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", help="where the figures go; standard output too")
    args = parser.parse_args()
    config = MixtralConfig.from_json_file(args.config) if args.config else MixtralConfig(**MIXTRAL_8X7B)

    with torch.no_grad():
        scale = 1 if args.device == "cuda" else 16
        roof = ceilings(args.device, scale)
        begun = time.monotonic()
        model = random_model(config, args.device)
        if args.device == "cuda":
            torch.cuda.synchronize()
        result = {
            "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "cuda": torch.version.cuda,
                         "triton": triton.__version__ if triton else None, "python": sys.version.split()[0]},
            "geometry": {name: getattr(config, name) for name in MIXTRAL_8X7B},
            "dtype": "bfloat16",
            "drawing_weights_s": time.monotonic() - begun,
            "decode": [or_why_not(measure_decode, model, args, batch) | {"batch": batch} for batch in args.batch],
            "prefill": [or_why_not(measure_prefill, model, args, *shape) | {"prompts": shape[0], "length": shape[1]}
                        for shape in args.prefill],
        }
        del model
        # The ceilings are measured before and after, since clocks change.
        again = ceilings(args.device, scale)
    result["ceilings"] = {name: max(value, again[name]) for name, value in roof.items()}
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        with open(args.json, "w") as file:
            print(text, file=file)
    uneven = [d for d in result["decode"] if d.get("experts_hit", 1) < MIN_SPREAD * d.get("experts_hit_if_even", 1)]
    if uneven:
        sys.exit(f"these weights do not route evenly, so figures would flatter: {uneven}")
    figure = lambda row: f"{row['tokens_per_s']:.1f} tok/s" if "tokens_per_s" in row else "out of memory"
    said = [f"decode {row['batch']}: {figure(row)}" for row in result["decode"]]
    said += [f"prefill {row['prompts']} x {row['length']}: {figure(row)}" for row in result["prefill"]]
    print("; ".join(said))


if __name__ == "__main__":
    main()
