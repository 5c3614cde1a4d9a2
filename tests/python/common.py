"""Shared by the checks against transformers: random models, reference logits, source layouts."""

import json
import math
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may use a network

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from tool import run_tool  # the checks have it from here

torch.set_num_threads(1)  # the matrices here are too small to share
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def random_model(config, seed):
    """A model whose weights are so large that attention, routing and logits all have an effect."""
    model = (MixtralForCausalLM if config.model_type == "mixtral" else MistralForCausalLM)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    # Standard deviations, times the square root of the input's width. Large router weights make near-ties rare. Blocks
    # whose outputs are small beside the residual do not amplify f32 rounding: transformers' own code paths then differ
    # by about 1e-6 of the largest logit at most, a tenth of what parity allows.
    gains = {"gate.weight": 3.0, "o_proj.weight": 0.5, "down_proj": 0.5, "down_proj.weight": 0.5, "lm_head.weight": 2.0}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name == "model.norm.weight" and config.tie_word_embeddings:
                # Weights of either sign: else a tied lm_head, which is the embedding itself, predicts the last token
                # again and again.
                parameter.copy_(noise * 2 / math.sqrt(len(noise)))
            elif "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                gain = next((g for suffix, g in gains.items() if name.endswith(suffix)), 1.0)
                parameter.copy_(noise * gain / math.sqrt(parameter.shape[-1]))
    return model


def save_model(model, directory, dtype):
    """Writes the model in `dtype` in Hugging Face's format with the per-expert names of published checkpoints."""
    model.to(DTYPES[dtype]).save_pretrained(directory)
    names = load_file(Path(directory) / "model.safetensors").keys()
    assert not any(".mlp.experts." in name for name in names), "transformers wrote fused experts"


def load_model(directory, dtype, attention="eager", experts="eager"):
    """The model of a directory, read by transformers, with arithmetic in `dtype`. By default its plainest code."""
    kind = json.loads((Path(directory) / "config.json").read_text())["model_type"]
    options = {"experts_implementation": experts} if kind == "mixtral" else {}
    cls = MixtralForCausalLM if kind == "mixtral" else MistralForCausalLM
    model = cls.from_pretrained(directory, dtype=DTYPES[dtype], attn_implementation=attention, **options).eval()
    correct_inv_freq(model)
    return model


def correct_inv_freq(model):
    """Sets the rotary frequencies to their correctly rounded f32 values.

    They are 1 / theta^(2i/d), with the power rounded to f32. torch's vectorized power may be off by one unit in the last
    place, and for a few (theta, d), such as 1e6 and 14, it is. At position 300 that unit is 2e-5 of an angle, which uses up
    the whole limit on logits. So the reference takes the exact value. The two values may not differ by more than that unit.
    """
    rotary, config = model.model.rotary_emb, model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    powers = np.power(np.float64(config.rope_parameters["rope_theta"]), exponents.astype(np.float64)).astype(np.float32)
    exact = np.float32(1) / powers
    torch_values = rotary.inv_freq.numpy()
    assert np.all(np.abs(torch_values - exact) <= 2 * np.spacing(exact)), "these are other frequencies"
    rotary.inv_freq.copy_(torch.from_numpy(exact))


def decoded(tensors, formats, kind, name, cols):
    """The floats of a weight of a checkpoint, of `cols` columns; `formats` are those of attention and of the feed-forward."""
    values = tensors[f"{name}.weight"]
    if formats[kind] == "plain":
        return values.float()
    if formats[kind].startswith("fp8"):
        scales = tensors[f"{name}.weights_scaling_factor"]
        by_rows = formats[kind] != "fp8"
        return values.float() * (scales if by_rows else scales.reshape(-1, *[1] * (values.dim() - 1)))
    bits, group = formats[kind].split(":")[:2]
    values = values.float() if bits == "int8" else torch.stack([values & 15, values >> 4], dim=-1).flatten(-2).float()
    scales = tensors[f"{name}.weights_scaling_factor"].float()
    values = values[..., :cols]  # an odd row of int4 ends in half a byte
    scales = scales.repeat_interleave(cols if group == "row" else int(group[1:]), dim=-1)[..., :cols]
    return (values - (128 if bits == "int8" else 8)) * scales


def write_decoded(checkpoint, model, directory):
    """Writes the model of a quantized checkpoint of one rank as f32 in Hugging Face's format.

    `model` has the same configuration, and what is not quantized.
    """
    tensors = load_file(Path(checkpoint) / "rank0.safetensors")
    formats = json.loads((Path(checkpoint) / "config.json").read_text())["mixtral"]["formats"]
    config = model.config
    state = {}
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"transformer.layers.{layer}", f"model.layers.{layer}"
        of = lambda kind, name, cols: decoded(tensors, formats, kind, f"{ours}.{name}", cols)
        hidden, inter = config.hidden_size, config.intermediate_size
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        for part, rows in zip("qkv", of("attention", "attention.qkv", hidden).split([q, kv, kv])):
            state[f"{theirs}.self_attn.{part}_proj.weight"] = rows
        state[f"{theirs}.self_attn.o_proj.weight"] = of("attention", "attention.dense", q)
        # transformers 5 has gate before up.
        up, gate = of("feed_forward", "mlp.fc", hidden).chunk(2, dim=1)
        state[f"{theirs}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        state[f"{theirs}.mlp.experts.down_proj"] = of("feed_forward", "mlp.proj", inter)
    own = model.state_dict()
    assert all(own[name].shape == tensor.shape for name, tensor in state.items()), "the checkpoint is of another model"
    model.load_state_dict(own | state)
    save_model(model, directory, "float32")


def forward(model, ids):
    """(logits [len(ids), vocabulary], router logits [layers, len(ids), experts]) of one sequence, in f32."""
    routers = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda _, __, output: routers.append(output[0]))
             for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return logits.float().numpy(), torch.stack(routers).float().numpy() if routers else None


def read_tensors(directory):
    """Every tensor of a Hugging Face directory, from one file or from an index of shards."""
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    return {name: tensor for file in sorted(files) for name, tensor in load_file(directory / file).items()}


def write_tensors(tensors, directory, stem="model", shards=1):
    """Writes `stem`.safetensors, or `shards` files and an index of them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # Clones the tensors, since safetensors refuses views.
    tensors = {name: tensors[name].clone().contiguous() for name in sorted(tensors)}
    if shards == 1:
        save_file(tensors, directory / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard::shards]  # a layer's tensors land in different shards
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= {name: file for name in part}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def to_fused(tensors, config):
    """The tensors as transformers 5 names them: experts fused, gate rows before up rows."""
    fused = {name.replace(".block_sparse_moe.gate.", ".mlp.gate."): tensor
             for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(config.num_hidden_layers):
        old, new = f"model.layers.{layer}.block_sparse_moe.experts", f"model.layers.{layer}.mlp.experts"
        of = lambda expert, part: tensors[f"{old}.{expert}.{part}.weight"]
        experts = range(config.num_local_experts)
        fused[f"{new}.gate_up_proj"] = torch.stack([torch.cat([of(e, "w1"), of(e, "w3")]) for e in experts])
        fused[f"{new}.down_proj"] = torch.stack([of(e, "w2") for e in experts])
    return fused


def to_stacked(consolidated, config):
    """Mistral's older layout, that of 8x7B: an MLP's experts below each other in one matrix, w2 transposed."""
    stacked = {name.replace(".feed_forward.", ".block_sparse_moe."): tensor
               for name, tensor in consolidated.items() if ".experts." not in name}
    for layer in range(config.num_hidden_layers):
        for part in ("w1", "w2", "w3"):
            experts = [consolidated[f"layers.{layer}.feed_forward.experts.{expert}.{part}.weight"]
                       for expert in range(config.num_local_experts)]
            stacked[f"layers.{layer}.block_sparse_moe.{part}"] = torch.cat([e.T if part == "w2" else e for e in experts])
    return stacked


def to_consolidated(tensors, config):
    """(tensors, params.json) as Mistral publishes them.

    Mistral's rotary embedding turns neighbouring elements of a head: (0,1), (2,3) …. Hugging Face's turns (0, d/2),
    (1, d/2 + 1) …. So the rows of q and k are interleaved within each head.
    """
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    renamed = {
        "model.embed_tokens.": "tok_embeddings.", "model.norm.": "norm.", "lm_head.": "output.",
        "model.layers.": "layers.", ".input_layernorm.": ".attention_norm.",
        ".post_attention_layernorm.": ".ffn_norm.", ".block_sparse_moe.": ".feed_forward.",
        ".mlp.gate_proj.": ".feed_forward.w1.", ".mlp.down_proj.": ".feed_forward.w2.",
        ".mlp.up_proj.": ".feed_forward.w3.",
        **{f".self_attn.{part}_proj.": f".attention.w{part}." for part in "qkvo"},
    }
    consolidated = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name or ".k_proj." in name:
            heads = tensor.shape[0] // head_dim
            tensor = tensor.view(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)
        for old, new in renamed.items():
            name = name.replace(old, new)
        consolidated[name] = tensor
    params = {
        "dim": config.hidden_size, "n_layers": config.num_hidden_layers, "head_dim": head_dim,
        "hidden_dim": config.intermediate_size, "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads, "norm_eps": config.rms_norm_eps, "vocab_size": config.vocab_size,
        "rope_theta": config.rope_parameters["rope_theta"],
    }
    if config.sliding_window is not None:
        params["sliding_window"] = config.sliding_window
    if config.model_type == "mixtral":
        params["moe"] = {"num_experts": config.num_local_experts, "num_experts_per_tok": config.num_experts_per_tok}
    return consolidated, params
