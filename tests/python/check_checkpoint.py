#!/usr/bin/env python3
"""An independent reader of checkpoints: rebuilds every Hugging Face tensor from the rank files, bit for bit.

    check_checkpoint.py HF_DIR CHECKPOINT_DIR...
    check_checkpoint.py --self-test

HF_DIR has transformers' per-expert names, and each checkpoint was converted from it with `--dtype auto`. This reader was
written from the description of the format and shares no code with the converter. It checks that each rank's file has
exactly the expected tensor names, shapes and data types. Over all ranks it checks that every element of every Hugging
Face tensor is there with its bits, that copies agree, and that padding is zero.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from common import MistralConfig, MixtralConfig, random_model, read_tensors, save_model


class Miss(Exception):
    """Raised for a checkpoint that does not agree with its source."""


def expect(condition, message):
    if not condition:
        raise Miss(message)


def even(count, parts, index):
    """The index-th of `parts` ranges over `count`. They are as even as possible; earlier ranges take the remainder."""
    start = sum((count - p + parts - 1) // parts for p in range(index))
    return slice(start, start + (count - index + parts - 1) // parts)


class Geometry:
    """The config.json of a Hugging Face directory, in the old or the new spelling, with defaults filled in."""

    def __init__(self, directory):
        self.raw = raw = json.loads((Path(directory) / "config.json").read_text())
        self.mixtral = raw["model_type"] == "mixtral"
        self.hidden = raw["hidden_size"]
        self.heads = raw["num_attention_heads"]
        self.kv_heads = raw.get("num_key_value_heads") or self.heads
        self.head_dim = raw.get("head_dim") or self.hidden // self.heads
        self.layers = raw["num_hidden_layers"]
        self.experts = raw["num_local_experts"] if self.mixtral else 1
        self.inter = raw["intermediate_size"]
        self.vocab = raw["vocab_size"]
        self.dtype = raw.get("dtype") or raw["torch_dtype"]
        self.theta = raw.get("rope_theta") or raw["rope_parameters"]["rope_theta"]

    def ffn(self, layer, expert, part):
        """Name of w1 (gate), w2 (down) or w3 (up) of an expert; a dense model is one expert."""
        if self.mixtral:
            return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"
        return f"model.layers.{layer}.mlp.{ {'w1': 'gate', 'w2': 'down', 'w3': 'up'}[part] }_proj.weight"


class Layout:
    """How a checkpoint's config.json spreads the model over the ranks."""

    def __init__(self, config):
        mapping = config["mapping"]
        self.tp, self.pp = mapping["tp_size"], mapping["pp_size"]
        self.moe_tp, self.moe_ep = mapping["moe_tp_size"], mapping["moe_ep_size"]
        self.parallel_embedding = config.get("use_parallel_embedding", False) and self.tp > 1
        self.embedding_dim = config.get("embedding_sharding_dim", 0)
        expect(mapping["world_size"] == self.tp * self.pp, f"world_size {mapping['world_size']}")
        expect(self.moe_tp * self.moe_ep == self.tp, f"moe_tp {self.moe_tp} x moe_ep {self.moe_ep}, tp {self.tp}")


def pieces(geometry, layout, rank):
    """The tensors of a rank: {name: (shape, is_router, [(HF name, HF slices, slices here)])}."""
    g, tp = geometry, layout.tp
    tp_rank, pp_rank = rank % tp, rank // tp
    moe_tp_rank, moe_ep_rank = tp_rank // layout.moe_ep, tp_rank % layout.moe_ep
    everything = slice(None)
    heads = g.heads // tp
    kv_heads = max(g.kv_heads, tp) // tp
    kv_start = tp_rank * kv_heads if g.kv_heads >= tp else tp_rank // (tp // g.kv_heads)
    padded = -(-g.vocab // tp) * tp
    rows = slice(tp_rank * padded // tp, min((tp_rank + 1) * padded // tp, g.vocab))
    out = {}

    def whole(name, source, shape):
        out[name] = (shape, False, [(source, (everything,), (everything,))])

    def vocabulary(name, source):
        there = slice(0, max(0, rows.stop - rows.start))
        out[name] = ([padded // tp, g.hidden], False, [(source, (rows, everything), (there, everything))])

    if pp_rank == 0:
        name, source = "transformer.vocab_embedding.weight", "model.embed_tokens.weight"
        if not layout.parallel_embedding:
            whole(name, source, [g.vocab, g.hidden])
        elif layout.embedding_dim == 0:
            vocabulary(name, source)
        else:
            width = g.hidden // tp
            columns = slice(tp_rank * width, (tp_rank + 1) * width)
            out[name] = ([g.vocab, width], False, [(source, (everything, columns), (everything, everything))])
    stage = even(g.layers, layout.pp, pp_rank)
    experts = even(g.experts, layout.moe_ep, moe_ep_rank)
    inter = g.inter // layout.moe_tp
    columns = slice(moe_tp_rank * inter, (moe_tp_rank + 1) * inter)
    for local, layer in enumerate(range(stage.start, stage.stop)):
        p, hf = f"transformer.layers.{local}.", f"model.layers.{layer}."
        whole(p + "input_layernorm.weight", hf + "input_layernorm.weight", [g.hidden])
        whole(p + "post_layernorm.weight", hf + "post_attention_layernorm.weight", [g.hidden])
        qkv, here = [], 0
        for part, start, count in [("q", tp_rank * heads, heads), ("k", kv_start, kv_heads), ("v", kv_start, kv_heads)]:
            there, n = start * g.head_dim, count * g.head_dim
            qkv.append((f"{hf}self_attn.{part}_proj.weight", (slice(there, there + n),), (slice(here, here + n),)))
            here += n
        out[p + "attention.qkv.weight"] = ([here, g.hidden], False, qkv)
        q = heads * g.head_dim
        columns_q = slice(tp_rank * q, (tp_rank + 1) * q)
        out[p + "attention.dense.weight"] = ([g.hidden, q], False, [
            (hf + "self_attn.o_proj.weight", (everything, columns_q), (everything, everything))])
        if g.mixtral:
            out[p + "mlp.router.weight"] = ([g.experts, g.hidden], True, [
                (hf + "block_sparse_moe.gate.weight", (everything,), (everything,))])
        fc, proj = [], []
        for here, expert in enumerate(range(experts.start, experts.stop)):
            fc.append((g.ffn(layer, expert, "w3"), (columns,), (here, slice(0, inter))))
            fc.append((g.ffn(layer, expert, "w1"), (columns,), (here, slice(inter, 2 * inter))))
            proj.append((g.ffn(layer, expert, "w2"), (everything, columns), (here,)))
        count = experts.stop - experts.start
        out[p + "mlp.fc.weight"] = ([count, 2 * inter, g.hidden], False, fc)
        out[p + "mlp.proj.weight"] = ([count, g.hidden, inter], False, proj)
    if pp_rank == layout.pp - 1:
        whole("transformer.ln_f.weight", "model.norm.weight", [g.hidden])
        vocabulary("lm_head.weight", "lm_head.weight")
    return out


def check_config(geometry, config):
    g, raw = geometry, geometry.raw
    wanted = {
        "architecture": "MixtralForCausalLM" if g.mixtral else "MistralForCausalLM", "dtype": g.dtype,
        "logits_dtype": "float32", "vocab_size": g.vocab, "max_position_embeddings": raw["max_position_embeddings"],
        "hidden_size": g.hidden, "num_hidden_layers": g.layers, "num_attention_heads": g.heads,
        "num_key_value_heads": g.kv_heads, "head_size": g.head_dim, "hidden_act": "swiglu" if g.mixtral else "silu",
        "intermediate_size": g.inter, "norm_epsilon": raw["rms_norm_eps"], "position_embedding_type": "rope_gpt_neox",
        "rotary_base": g.theta, "sliding_window": raw.get("sliding_window"), "share_embedding_table": False,
        "rotary_scaling": None, "attn_bias": False, "mlp_bias": False, "kv_dtype": g.dtype,
    }
    if g.mixtral:
        top_k, mode = raw["num_experts_per_tok"], 1
        wanted |= {"moe_num_experts": g.experts, "moe_top_k": top_k, "moe_normalization_mode": mode,
                   "moe": {"num_experts": g.experts, "top_k": top_k, "normalization_mode": mode}}
    for key, value in wanted.items():
        expect(key in config, f"config.json: `{key}` is missing")
        expect(config[key] == value, f"config.json: `{key}` is {config[key]!r}, not {value!r}")
    quantization = config.get("quantization", {})
    expect(quantization.get("quant_algo") is None and quantization.get("kv_cache_quant_algo") is None, "quantized")


def bits(tensor):
    """The tensor as integers, so that comparing compares bits and not values."""
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def check_checkpoint(hf_dir, checkpoint_dir):
    """Raises `Miss` at the first difference. Returns how many tensors the ranks hold."""
    geometry, source = Geometry(hf_dir), read_tensors(hf_dir)
    if "lm_head.weight" not in source:
        expect(geometry.raw.get("tie_word_embeddings"), "the source has no lm_head and is not tied")
        source["lm_head.weight"] = source["model.embed_tokens.weight"]
    dtype = getattr(torch, geometry.dtype)
    config = json.loads((Path(checkpoint_dir) / "config.json").read_text())
    check_config(geometry, config)
    layout = Layout(config)
    files = {path.name for path in Path(checkpoint_dir).glob("*.safetensors")}
    expect(files == {f"rank{r}.safetensors" for r in range(layout.tp * layout.pp)}, f"files {sorted(files)}")

    rebuilt = {name: torch.zeros_like(tensor) for name, tensor in source.items()}
    covered = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in source.items()}
    count = 0
    for rank in range(layout.tp * layout.pp):
        file = f"rank{rank}.safetensors"
        found = load_file(Path(checkpoint_dir) / file)
        wanted = pieces(geometry, layout, rank)
        expect(found.keys() == wanted.keys(), f"{file}: names differ: {sorted(found.keys() ^ wanted.keys())}")
        for name, (shape, is_router, parts) in wanted.items():
            tensor, where = found[name], f"{file}: {name}"
            expect(list(tensor.shape) == shape, f"{where}: shape {list(tensor.shape)}, not {shape}")
            stored = torch.float32 if is_router else dtype
            expect(tensor.dtype == stored, f"{where}: {tensor.dtype}, not {stored}")
            filled = torch.zeros(tensor.shape, dtype=torch.bool)
            for hf, there, here in parts:
                part = tensor[here]
                if is_router:
                    # Every bf16 or f16 value is an f32 value too, so conversion to f32 and back must change nothing.
                    part = part.to(dtype)
                    expect(torch.equal(bits(part.float()), bits(tensor[here])), f"{where}: not the source's values")
                seen = covered[hf][there]
                expect(seen.shape == part.shape, f"{where}: does not fit {hf}")
                expect(torch.equal(bits(rebuilt[hf][there])[seen], bits(part)[seen]), f"{where}: copies of {hf} differ")
                rebuilt[hf][there] = part
                covered[hf][there] = True
                filled[here] = True
            expect(not bits(tensor)[~filled].any(), f"{where}: padding is not zero")
            count += 1
    for name, tensor in source.items():
        expect(covered[name].all(), f"{name}: not all of it is in the checkpoint")
        expect(torch.equal(bits(rebuilt[name]), bits(tensor)), f"{name}: other bits than the source")
    return count


def write_checkpoint(hf_dir, out_dir, mapping, **options):
    """A converter for the self-test. It cuts tensors in another way than the checker above: by chunks, not by slices."""
    g, source = Geometry(hf_dir), read_tensors(hf_dir)
    source.setdefault("lm_head.weight", source["model.embed_tokens.weight"])
    tp, pp, moe_tp, moe_ep = (mapping[key] for key in ("tp_size", "pp_size", "moe_tp_size", "moe_ep_size"))
    pad = torch.nn.functional.pad
    chunk = lambda tensor, parts, index, dim=0: torch.chunk(tensor, parts, dim)[index]
    stages = torch.arange(g.layers).tensor_split(pp)  # tensor_split gives the remainder to the earlier parts
    dealt = torch.arange(g.experts).tensor_split(moe_ep)
    Path(out_dir).mkdir()
    for rank in range(tp * pp):
        t, stage = rank % tp, stages[rank // tp].tolist()
        mt, experts = t // moe_ep, dealt[t % moe_ep].tolist()
        out = {}
        padded = lambda tensor: chunk(pad(tensor, (0, 0, 0, -g.vocab % tp)), tp, t)
        if rank < tp:
            embedding = source["model.embed_tokens.weight"]
            if options.get("use_parallel_embedding"):
                dim = options.get("embedding_sharding_dim", 0)
                embedding = chunk(embedding, tp, t, 1) if dim else padded(embedding)
            out["transformer.vocab_embedding.weight"] = embedding
        for local, layer in enumerate(stage):
            p, hf = f"transformer.layers.{local}.", f"model.layers.{layer}."
            q, k, v = (source[f"{hf}self_attn.{x}_proj.weight"].unflatten(0, (-1, g.head_dim)) for x in "qkv")
            if g.kv_heads < tp:
                k, v = (x.repeat_interleave(tp // g.kv_heads, dim=0) for x in (k, v))
            out[p + "attention.qkv.weight"] = torch.cat([chunk(x, tp, t).flatten(0, 1) for x in (q, k, v)])
            out[p + "attention.dense.weight"] = chunk(source[hf + "self_attn.o_proj.weight"], tp, t, 1)
            out[p + "input_layernorm.weight"] = source[hf + "input_layernorm.weight"]
            out[p + "post_layernorm.weight"] = source[hf + "post_attention_layernorm.weight"]
            if g.mixtral:
                out[p + "mlp.router.weight"] = source[hf + "block_sparse_moe.gate.weight"].float()
            w1, w2, w3 = ([source[g.ffn(layer, e, part)] for e in experts] for part in ("w1", "w2", "w3"))
            out[p + "mlp.fc.weight"] = torch.stack(
                [torch.cat([chunk(up, moe_tp, mt), chunk(gate, moe_tp, mt)]) for gate, up in zip(w1, w3)])
            out[p + "mlp.proj.weight"] = torch.stack([chunk(down, moe_tp, mt, 1) for down in w2])
        if rank >= tp * (pp - 1):
            out["transformer.ln_f.weight"] = source["model.norm.weight"]
            out["lm_head.weight"] = padded(source["lm_head.weight"])
        save_file({name: x.contiguous().clone() for name, x in out.items()}, Path(out_dir) / f"rank{rank}.safetensors")
    raw = g.raw
    config = {
        "architecture": "MixtralForCausalLM" if g.mixtral else "MistralForCausalLM", "dtype": g.dtype,
        "kv_dtype": g.dtype, "logits_dtype": "float32", "vocab_size": g.vocab, "hidden_size": g.hidden,
        "max_position_embeddings": raw["max_position_embeddings"], "num_hidden_layers": g.layers,
        "num_attention_heads": g.heads, "num_key_value_heads": g.kv_heads, "head_size": g.head_dim,
        "hidden_act": "swiglu" if g.mixtral else "silu", "intermediate_size": g.inter,
        "norm_epsilon": raw["rms_norm_eps"], "position_embedding_type": "rope_gpt_neox", "rotary_base": g.theta,
        "rotary_scaling": None, "sliding_window": raw["sliding_window"], "share_embedding_table": False,
        "attn_bias": False, "mlp_bias": False, "mapping": mapping | {"world_size": tp * pp}, **options,
    }
    if g.mixtral:
        top_k = raw["num_experts_per_tok"]
        config |= {"moe_num_experts": g.experts, "moe_top_k": top_k, "moe_normalization_mode": 1,
                   "moe": {"num_experts": g.experts, "top_k": top_k, "normalization_mode": 1}}
    (Path(out_dir) / "config.json").write_text(json.dumps(config))


# (tp, pp, moe_tp, moe_ep, options). They have every kind of split, KV replication (tp 4 and 8 over 2 KV heads), uneven
# stages and experts (5 layers over 2 and 3, 6 experts over 4), and padding (97 tokens).
LAYOUTS = [
    (1, 1, 1, 1, {}),
    (2, 1, 2, 1, {}),
    (2, 1, 1, 2, {}),
    (4, 1, 2, 2, {}),
    (4, 2, 1, 4, {}),
    (8, 1, 4, 2, {}),
    (1, 3, 1, 1, {}),
    (2, 2, 2, 1, {"use_parallel_embedding": True}),
    (4, 1, 4, 1, {"use_parallel_embedding": True, "embedding_sharding_dim": 1}),
]


def layout_models():
    """The models for all layouts. Their number of positions is Mixtral's, since a consolidated source does not name it."""
    shape = dict(
        vocab_size=97, hidden_size=48, intermediate_size=40, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=2, head_dim=10, max_position_embeddings=32768, sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=1e-5,
    )
    mixtral = dict(num_local_experts=6, num_experts_per_tok=2)
    return {
        "mixtral": (MixtralConfig(**shape, **mixtral), "bfloat16"),
        "tied": (MixtralConfig(**shape, **mixtral, tie_word_embeddings=True), "float32"),
        "dense": (MistralConfig(**shape), "float16"),
    }


def self_test():
    def edited(directory, rank, name, edit):
        path = Path(directory) / f"rank{rank}.safetensors"
        tensors = load_file(path)
        edit(tensors, name)
        save_file(tensors, path)

    def one_bit(tensors, name):
        bits(tensors[name]).view(-1)[-1] ^= 1

    def halves_swapped(tensors, name):
        tensors[name] = torch.cat(tensors[name].chunk(2, dim=1)[::-1], dim=1)

    def rounded(tensors, name):
        tensors[name] = tensors[name] * (1 + 2**-12)

    def dropped(tensors, name):
        del tensors[name]

    layer = "transformer.layers.0."
    planted = [
        ("a bit of the last router", 1, layer + "mlp.router.weight", one_bit),
        ("a router that is not the source's", 1, layer + "mlp.router.weight", rounded),
        ("a bit of a replicated KV head", 1, layer + "attention.qkv.weight", one_bit),
        ("gate and up swapped", 2, layer + "mlp.fc.weight", halves_swapped),
        ("a bit of an expert's w2", 3, layer + "mlp.proj.weight", one_bit),
        ("a padding row that is not zero", 3, "lm_head.weight", one_bit),
        ("a missing norm", 0, layer + "post_layernorm.weight", dropped),
    ]
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
        for model, (config, dtype) in layout_models().items():
            hf = Path(scratch) / model
            save_model(random_model(config, 7), hf, dtype)
            for number, (tp, pp, moe_tp, moe_ep, options) in enumerate(LAYOUTS):
                if model == "dense" and moe_ep > 1:
                    continue
                out = Path(scratch) / f"{model}-{number}"
                mapping = {"tp_size": tp, "pp_size": pp, "moe_tp_size": moe_tp, "moe_ep_size": moe_ep}
                write_checkpoint(hf, out, mapping, **options)
                count = check_checkpoint(hf, out)
                print(f"{model}: tp {tp} pp {pp} moe_tp {moe_tp} moe_ep {moe_ep} {options or ''}: {count} tensors")
        hf = Path(scratch) / "mixtral"
        for number, (what, rank, name, edit) in enumerate(planted):
            out = Path(scratch) / f"planted-{number}"
            write_checkpoint(hf, out, {"tp_size": 4, "pp_size": 1, "moe_tp_size": 2, "moe_ep_size": 2})
            edited(out, rank, name, edit)
            try:
                check_checkpoint(hf, out)
            except Miss as miss:
                print(f"planted: {what}: caught, {miss}")
            else:
                sys.exit(f"planted: {what}: NOT CAUGHT")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf_dir", nargs="?")
    parser.add_argument("checkpoint_dirs", nargs="*")
    parser.add_argument("--self-test", action="store_true")
    args = parser.parse_args()
    if args.self_test:
        return self_test()
    if not args.checkpoint_dirs:
        parser.error("HF_DIR and at least one CHECKPOINT_DIR, or --self-test")
    for directory in args.checkpoint_dirs:
        try:
            print(f"{directory}: {check_checkpoint(args.hf_dir, directory)} tensors, every bit as in {args.hf_dir}")
        except Miss as miss:
            sys.exit(f"{directory}: {miss}")


if __name__ == "__main__":
    main()
