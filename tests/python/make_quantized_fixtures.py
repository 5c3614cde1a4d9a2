#!/usr/bin/env python3
"""Writes tests/goldens/quantized: tiny models that libraries quantized, and what transformers makes of their weights.

    make_quantized_fixtures.py autoawq=PYTHON gptqmodel=PYTHON llmcompressor=PYTHON modelopt=PYTHON

Each PYTHON is an interpreter that has that library (REQUIREMENTS below). The one that runs this has what
tests/python/requirements.txt names, and blake3. Everything runs on the CPU. The format is described in
tests/goldens/quantized/README.md.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parent / "goldens" / "quantized"
REQUIREMENTS = {
    "autoawq": "autoawq==0.2.9 transformers==4.51.3",
    "gptqmodel": "gptqmodel==7.7.0 transformers==5.24.0",
    "llmcompressor": "llmcompressor==0.14.0.1 compressed-tensors==0.19.0 transformers==5.17.0",
    "modelopt": "nvidia-modelopt==0.47.0 transformers==5.17.0",
}
VOCABULARY = 96
PROMPT_LENGTHS = [1, 6, 20]
# See make_goldens.py. It is larger here because the library rounds each weight's value to the type of its scale, and the
# engine does not.
CLEAR = 4e-3
# Where inputs are rounded to e4m3, two right answers may differ by a rounding, which changes logits more.
CLEAR_FP8 = 3e-2


def compressed(bits, group, symmetric, form=None):
    """A scheme of compressed-tensors: `bits` in groups of `group`, or with one scale a row if that is None."""
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {"weights": {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}, "format": form}


def compressed_fp8(strategy, inputs, dynamic, cache=None):
    """A scheme of compressed-tensors in e4m3."""
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    return {"weights": {**fp8, "strategy": strategy}, "input_activations": {**fp8, "strategy": inputs, "dynamic": dynamic},
            "cache": {**fp8, "strategy": "tensor", "dynamic": False} if cache else None}


# {name: (library, model, its options)}. Together they have every packing that is read, with and without zeros, in
# groups and in whole rows, and every spelling of the experts that libraries write.
RECIPES = {
    "awq-mixtral": ("autoawq", "mixtral", {"q_group_size": 32}),
    "awq-mistral": ("autoawq", "mistral", {"q_group_size": 128}),
    "gptq-mixtral": ("gptqmodel", "mixtral", {"group_size": 32}),
    "gptq-mixtral-rows": ("gptqmodel", "mixtral", {"group_size": -1, "desc_act": True, "sym": False}),
    "gptq-mistral-v2": ("gptqmodel", "mistral", {"group_size": 128, "sym": False, "format": "gptq_v2"}),
    "compressed-mixtral-int4": ("llmcompressor", "mixtral", compressed(4, 32, True)),
    "compressed-mixtral-int8": ("llmcompressor", "small", compressed(8, None, True)),
    "compressed-mixtral-int8-zeros": ("llmcompressor", "small", compressed(8, 32, False)),
    "compressed-mixtral-int8-unpacked": ("llmcompressor", "small", compressed(8, None, False, "int-quantized")),
    "compressed-mistral-int4-zeros": ("llmcompressor", "mistral", compressed(4, 128, False)),
    "compressed-mixtral-fp8": ("llmcompressor", "small", compressed_fp8("tensor", "tensor", False, cache=True)),
    "compressed-mixtral-fp8-rows": ("llmcompressor", "small", compressed_fp8("channel", "tensor", False)),
    "compressed-mixtral-fp8-dynamic": ("llmcompressor", "small", compressed_fp8("channel", "token", True)),
    "compressed-mistral-fp8": ("llmcompressor", "slim", compressed_fp8("tensor", "tensor", False)),
    "modelopt-mixtral-fp8": ("modelopt", "small", {"cache": True}),
    "modelopt-mistral-fp8": ("modelopt", "slim", {"cache": False}),
}


def configs():
    """{model: its configuration}. Widths are multiples of 32, because the libraries pack so many."""
    from common import MistralConfig, MixtralConfig

    common = dict(vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
                  rms_norm_eps=1e-5, sliding_window=None)
    rope = lambda theta: {"rope_type": "default", "rope_theta": theta}
    experts = dict(num_local_experts=4, num_experts_per_tok=2, rope_parameters=rope(1e6))
    return {
        "mixtral": MixtralConfig(**common, **experts, hidden_size=64, intermediate_size=128, num_attention_heads=4,
                                 num_key_value_heads=2, head_dim=16),
        "small": MixtralConfig(**common, **experts, hidden_size=32, intermediate_size=64, num_attention_heads=2,
                               num_key_value_heads=2, head_dim=16),
        "mistral": MistralConfig(**common, hidden_size=128, intermediate_size=256, num_attention_heads=4,
                                 num_key_value_heads=2, head_dim=32, rope_parameters=rope(1e4)),
        "slim": MistralConfig(**common, hidden_size=32, intermediate_size=64, num_attention_heads=2,
                              num_key_value_heads=2, head_dim=16, rope_parameters=rope(1e4)),
    }


def numbers(seed, count, length):
    """Random token ids, for calibration and as prompts."""
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for _ in range(count)]


# What runs in a library's own interpreter: quantizes the model in `source`, saves it in `target`, and returns its
# dequantized matrices by the names of the file's modules, each [outputs, inputs] in the type of its scales.


def read(directory):
    from safetensors.torch import load_file

    return load_file(Path(directory) / "model.safetensors")


def autoawq(source, target, options):
    import torch.utils._pytree  # autoawq needs it loaded
    from awq import AutoAWQForCausalLM
    from awq.utils.packing_utils import dequantize_gemm

    class Tokenizer:
        encode = staticmethod(lambda text: list(map(int, text.split())))

    model = AutoAWQForCausalLM.from_pretrained(source, device_map="cpu", safetensors=True)
    texts = [" ".join(map(str, ids)) for ids in numbers(0, 32, 64)]
    options = {"zero_point": True, "w_bit": 4, "version": "GEMM", **options}
    # Its search for clipping asks for more outputs than these models have.
    model.quantize(Tokenizer(), options, calib_data=texts, max_calib_seq_len=64, apply_clip=False)
    model.save_quantized(str(target))
    tensors = read(target)
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    parts = lambda module: [tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales")]
    return {module: dequantize_gemm(*parts(module), 4, options["q_group_size"]).T for module in modules}


def write_tokenizer(source):
    """What some libraries want, though they use it only to find the token that pads."""
    from tokenizers import Tokenizer, models

    words = {f"word{token}": token for token in range(VOCABULARY)}
    Tokenizer(models.WordLevel(words, unk_token="word0")).save(str(Path(source) / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "word0", "bos_token": "word1",
               "eos_token": "word2", "pad_token": "word2"}
    (Path(source) / "tokenizer_config.json").write_text(json.dumps(special))


def gptqmodel(source, target, options):
    os.environ["GPTQMODEL_CPU_WORKERS"] = "4"  # with one it does not start
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    write_tokenizer(source)
    model = GPTQModel.load(source, QuantizeConfig(bits=4, device="cpu", **options))
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in numbers(0, 32, 48)], batch_size=4)
    model.save(str(target))
    # In float16 the scales stay what the file has.
    model = GPTQModel.load(str(target), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model.eval()
    linears = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    return {name: type(module).dequantize_weight(module).T for name, module in linears.items()}


def llmcompressor(source, target, options):
    from compressed_tensors.compressors import BaseCompressor
    from datasets import Dataset
    from compressed_tensors.quantization import QuantizationConfig
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    write_tokenizer(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    linearize_moe(model)
    cache = options.pop("cache", None)
    groups = {"group_0": {"targets": ["Linear"], **options}}
    recipe = QuantizationModifier(config_groups=groups, kv_cache_scheme=cache, ignore=["lm_head", "re:.*mlp.gate$"])
    texts = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in numbers(0, 32, 64)]
    is_static = "input_activations" in options and not options["input_activations"]["dynamic"]
    data = {"dataset": Dataset.from_list(texts), "num_calibration_samples": 32, "max_seq_length": 64} if is_static else {}
    oneshot(model=model, recipe=recipe, **data)
    model.save_pretrained(target, save_compressed=True)
    tensors = read(target)
    config = QuantizationConfig.model_validate(json.loads((target / "config.json").read_text())["quantization_config"])
    compressor = BaseCompressor.get_value_from_registry(config.format)
    modules = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    parts = lambda module: {name.removeprefix(f"{module}."): tensor
                            for name, tensor in tensors.items() if name.startswith(f"{module}.")}
    scheme = config.config_groups["group_0"]
    values = {module: compressor.decompress(parts(module), scheme)["weight"] for module in modules}
    return in_f32(tensors, values) if config.format == "float-quantized" else values


def modelopt(source, target, options):
    import copy

    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    recipe = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    if options["cache"]:
        recipe["quant_cfg"].extend(copy.deepcopy(mtq.FP8_KV_CFG)["quant_cfg"])

    def calibrate(model):
        for ids in numbers(0, 32, 48):
            model(torch.tensor([ids]))

    model = mtq.quantize(model, recipe, calibrate)
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=str(target))
    tensors = read(target)
    return in_f32(tensors, {name.removesuffix(".weight_scale"): None for name in tensors if name.endswith(".weight_scale")})


def in_f32(tensors, values):
    """The matrices in e4m3 as f32, which hold more than the library's own values, if it has any."""
    import torch

    for module, value in values.items():
        exact = tensors[f"{module}.weight"].float() * tensors[f"{module}.weight_scale"].float()
        assert value is None or torch.equal(exact.to(value.dtype), value), module
        values[module] = exact
    return values


def quantize(name, work):
    """Runs in the library's interpreter."""
    from safetensors.torch import save_file

    library, model, options = RECIPES[name]
    target = work / name
    target.mkdir()
    values = globals()[library](str(work / model), target, options)
    save_file({module: value.contiguous().clone() for module, value in values.items()}, work / f"{name}.values")


def transformers_4(module):
    """The name that transformers 4 gives a module of any spelling."""
    if ".experts." in module:
        for new, old in {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}.items():
            module = module.replace(f".{new}", f".{old}")
        module = module.replace(".mlp.", ".block_sparse_moe.")
    return module.replace(".mlp.gate", ".block_sparse_moe.gate") if module.endswith(".mlp.gate") else module


def float_model(name, values, source, directory):
    """A model of transformers in f32: `values` for the linears, and the other tensors of the fixture."""
    import torch
    from common import load_model, write_tensors

    tensors = {f"{transformers_4(module)}.weight": value.float() for module, value in values.items()}
    for key, tensor in read(source).items():
        module, _, part = key.rpartition(".")
        if module not in values and part == "weight":
            tensors[f"{transformers_4(module)}.weight"] = tensor.float()
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    write_tensors(tensors, directory)
    (directory / "config.json").write_text(json.dumps(config))
    return load_model(directory, "float32")


def source_rounding(model, source):
    """What an engine of the model in `source` rounds beside weights, for transformers: see fp8.py."""
    from fp8 import Rounding

    tensors = read(source)
    by_name = {f"{transformers_4(key.rpartition('.')[0])}.{key.rpartition('.')[2]}": key for key in tensors}
    number = lambda name: tensors[by_name[name]].float().flatten()[0] if name in by_name else None
    rounding = Rounding(model)
    is_moe = hasattr(model.model.layers[0].mlp, "experts")
    for index in range(len(model.model.layers)):
        layer = f"model.layers.{index}"
        experts = range(model.config.num_local_experts) if is_moe else [None]
        of_expert = lambda expert: f"{layer}.block_sparse_moe.experts.{expert}" if is_moe else f"{layer}.mlp"
        up, gate, down = ("w3", "w1", "w2") if is_moe else ("up_proj", "gate_proj", "down_proj")
        readers = {
            "attention.qkv": [f"{layer}.self_attn.{part}_proj" for part in "qkv"],
            "attention.dense": [f"{layer}.self_attn.o_proj"],
            "mlp.fc": [f"{of_expert(expert)}.{part}" for expert in experts for part in (up, gate)],
            "mlp.proj": [f"{of_expert(expert)}.{down}" for expert in experts],
        }
        for name, modules in readers.items():
            scales = [number(f"{module}.input_scale") for module in modules]
            # Without stored scales, each token has its own.
            rounding.round_inputs(index, name, None if scales[0] is None else max(scales))
        for keys, values in (("k_scale", "v_scale"), ("k_proj.k_scale", "v_proj.v_scale")):
            scales = [number(f"{layer}.self_attn.{part}") for part in (keys, values)]
            if scales[0] is not None:
                rounding.round_cache(index, scales)
    return rounding


def clear_prompts(name, model, clear_enough):
    """Prompts, and for each (its continuation, how clear every choice is), at least `clear_enough`."""
    from make_goldens import continue_greedily

    for seed in range(4000):
        prompts = [numbers(1000 * seed + length, 1, length)[0] for length in PROMPT_LENGTHS]
        found = [continue_greedily(model, prompt)[1:] for prompt in prompts]
        if min(clear for _, clear in found) > clear_enough:
            return prompts, found
    sys.exit(f"{name}: no prompts give clear choices")


def expect(name, work):
    """Writes the fixture `name` from what the library made of it."""
    import blake3
    import torch
    from safetensors.torch import load_file, save_file

    values = load_file(work / f"{name}.values")
    model = float_model(name, values, work / name, work / f"{name}.float")
    rounding, clear_enough = contextlib.nullcontext(), CLEAR
    if "fp8" in name:
        rounding, clear_enough = source_rounding(model, work / name), CLEAR_FP8
    with rounding:
        prompts, found = clear_prompts(name, model, clear_enough)
    expected = {}
    for number, (prompt, (tokens, _)) in enumerate(zip(prompts, found)):
        expected[f"prompt.{number}"] = torch.tensor(prompt, dtype=torch.int32)
        expected[f"tokens.{number}"] = torch.tensor(tokens, dtype=torch.int32)
    for module, value in values.items():
        digest = blake3.blake3(value.contiguous().view(torch.uint8).numpy().tobytes()).digest()
        expected[f"blake3.{transformers_4(module)}.weight"] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    target = FIXTURES / name
    target.mkdir(parents=True, exist_ok=True)
    config = json.loads((work / name / "config.json").read_text())
    if "meta" in config["quantization_config"]:  # also has the folder in which the library ran
        config["quantization_config"]["meta"] = {"quantizer": config["quantization_config"]["meta"]["quantizer"]}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (target / "model.safetensors").write_bytes((work / name / "model.safetensors").read_bytes())
    save_file(expected, target / "expected.safetensors")
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"{name}: closest choice {min(clear for _, clear in found):.1e}, {size} bytes", flush=True)


def write(pythons, only):
    from common import random_model, save_model

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for model, config in configs().items():
            save_model(random_model(config, 1), work / model, "float16" if model == "mixtral" else "bfloat16")
        for name, (library, _, _) in RECIPES.items():
            if only in name:
                command = [pythons[library], str(Path(__file__).resolve()), "--quantize", name, str(work)]
                done = subprocess.run(command, capture_output=True, text=True, cwd=work)
                if done.returncode != 0:
                    sys.exit(f"{name}: {REQUIREMENTS[library]} failed\n{done.stdout}{done.stderr}")
                expect(name, work)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", metavar="LIBRARY=PYTHON")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the fixtures whose names contain TEXT")
    parser.add_argument("--quantize", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quantize:
        return quantize(args.quantize[0], Path(args.quantize[1]))
    write(dict(pair.split("=", 1) for pair in args.pythons), args.only)


if __name__ == "__main__":
    main()
