#!/usr/bin/env python3
"""Trains a small but real Mixtral on any text file: a tokenizer, a model, a few minutes on one GPU.

    train_tiny_mixtral.py TEXT OUTPUT_DIR [--minutes 4] [--steps 1500] [...]

The output directory is in Hugging Face's format, weights in bf16 under the names that published Mixtral checkpoints
use. The text is cut as `perplexity_tiny_mixtral.split_text` says: the model and its tokenizer see the first 90 %, the
checkpoint with the lowest loss on the next 5 % is kept, and the last 5 % are never looked at.
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from perplexity_tiny_mixtral import make_windows, split_text

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]  # ids 0, 1, 2, as Mixtral's own


def train_tokenizer(text, vocab_size):
    """Byte-level BPE: any text is representable, and `<s>` goes before every prompt, as Mixtral's tokenizer does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def tokenize(tokenizer, text, bpe_dropout, copies=24):
    """The text's token ids, then `copies` tokenizations in which each merge was skipped with chance `bpe_dropout`.

    The same words spelled in several ways are more text to learn from, when there is so little of it.
    """
    streams = [torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)]
    if bpe_dropout > 0:
        tokenizer.model.dropout = bpe_dropout
        streams += [torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids) for _ in range(copies)]
        tokenizer.model.dropout = None
    return streams


def dense_experts(self, hidden_states, top_k_index, top_k_weights):
    """MixtralExperts.forward with every expert run on every token and the unchosen ones weighted zero.

    The same function as transformers', four times its arithmetic at top-2 of 8, and far fewer and larger kernels: for
    a model this small, much faster to train. Only used while training.
    """
    weights = top_k_weights.new_zeros(len(hidden_states), self.num_experts).scatter(1, top_k_index, top_k_weights)
    gate, up = torch.einsum("th,eoh->eto", hidden_states, self.gate_up_proj).chunk(2, dim=-1)
    outputs = torch.einsum("eti,ehi->eth", self.act_fn(gate) * up, self.down_proj)
    return torch.einsum("eth,te->th", outputs, weights.to(outputs.dtype))


def balance_loss(router_logits, top_k):
    """The Switch Transformer's load-balancing loss, for each layer by itself; 1 when every expert is as busy."""
    losses = []
    for logits in router_logits:
        probs = logits.float().softmax(dim=-1)
        chosen = torch.zeros_like(probs).scatter(1, probs.topk(top_k, dim=-1).indices, 1 / top_k)
        losses.append(probs.shape[-1] * (chosen.mean(dim=0) * probs.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def add_dropout(model, p):
    """Dropout on the embedding and on what each block adds to the residual: transformers' Mixtral has none."""
    def drop(_, __, output):
        if not model.training:
            return output
        if isinstance(output, tuple):
            return (F.dropout(output[0], p), *output[1:])
        return F.dropout(output, p)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


@torch.inference_mode()
def windows_loss(model, windows, device):
    """Mean negative log-likelihood a token over windows of token ids, as the perplexity protocol counts."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(windows), 32):
        batch = [torch.tensor(ids) for ids in windows[start : start + 32]]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100).to(device)
        logits = model(ids.clamp(min=0)).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-100, reduction="sum").item()
        count += (ids[:, 1:] >= 0).sum().item()
    model.train()
    return total / count


def train(model, streams, validation, args, device):
    """Trains in place and leaves the checkpoint of the lowest validation loss in the model.

    `streams` are tokenizations of the training text, the plain one first; the last quarter of training uses it alone.
    """
    decay = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=args.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda",
    )
    # The weights that are kept are a running mean of the trained ones: less noise than any single step's.
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    best, best_loss = None, math.inf
    bos = torch.tensor([SPECIAL_TOKENS.index("<s>")])
    start = time.monotonic()
    step, progress, recent = 0, 0.0, []
    while progress < 1.0:
        # Whichever runs out first, steps or minutes, drives the schedule, so a slow machine still ends annealed.
        progress = max((step + 1) / args.steps, (time.monotonic() - start) / (60 * args.minutes))
        rate = min(1.0, (step + 1) / args.warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate
        crops = []
        for _ in range(args.batch_size):
            ids = streams[random.randrange(len(streams)) if progress < 0.75 else 0]
            offset = random.randrange(len(ids) - args.context + 2)
            crops.append(torch.cat([bos, ids[offset : offset + args.context - 1]]))
        batch = torch.stack(crops)
        batch = batch.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            output = model(batch, output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        balance = balance_loss(output.router_logits, model.config.num_experts_per_tok)
        (loss + args.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        with torch.no_grad():
            keep = min(args.average, step / (step + 10))
            torch._foreach_lerp_(list(average.values()), list(model.parameters()), 1 - keep)
        recent.append(loss.detach())
        if step % args.evaluate_every == 0 or progress >= 1.0:
            trained = {name: p.detach().clone() for name, p in model.named_parameters()}
            load(model, average)
            held_out = windows_loss(model, validation, device)
            if held_out < best_loss:
                best, best_loss = {name: p.clone() for name, p in average.items()}, held_out
            load(model, trained)
            print(f"step {step:5d} {time.monotonic() - start:6.1f} s  loss {torch.stack(recent).mean():.4f}"
                  f"  held out {held_out:.4f}  balance {balance.item():.3f}", flush=True)
            recent = []
            if held_out > best_loss + 0.1:
                print("overfitting: stopped early")
                break
    load(model, best)
    return best_loss


@torch.no_grad()
def load(model, parameters):
    for name, parameter in model.named_parameters():
        parameter.copy_(parameters[name])


def save(model, tokenizer, directory):
    """Writes the Hugging Face directory, and checks that it reads back to the same weights and tokens."""
    model.to("cpu", torch.bfloat16).eval().save_pretrained(directory)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=model.config.max_position_embeddings, clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)
    # transformers 5 writes a class name that transformers 4 does not know; this one both do.
    settings = Path(directory) / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
    with safe_open(Path(directory) / "model.safetensors", "pt") as file:
        names = set(file.keys())
        first = file.get_tensor("model.layers.0.block_sparse_moe.experts.0.w1.weight")
    expected = {f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w{part}.weight"
                for layer in range(model.config.num_hidden_layers)
                for expert in range(model.config.num_local_experts) for part in (1, 2, 3)}
    assert expected <= names, "save_pretrained did not write the per-expert tensor names"
    gate_up = model.model.layers[0].mlp.experts.gate_up_proj[0]
    assert torch.equal(first, gate_up[: len(gate_up) // 2]), "w1 is not the gate half"
    again = MixtralForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), f"{name} changed on its way through the file"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a UTF-8 text file")
    parser.add_argument("output_dir")
    add = lambda flag, default: parser.add_argument(flag, type=type(default), default=default, help=f"({default})")
    add("--minutes", 4.0)
    add("--steps", 1500)
    add("--batch-size", 32)
    add("--context", 512)
    add("--learning-rate", 1e-3)
    add("--warmup", 100)
    add("--weight-decay", 0.1)
    add("--dropout", 0.15)
    add("--bpe-dropout", 0.4)
    add("--balance", 0.02)
    add("--average", 0.99)
    add("--evaluate-every", 100)
    add("--vocab-size", 2048)
    add("--hidden-size", 192)
    add("--intermediate-size", 192)
    add("--layers", 4)
    add("--heads", 6)
    add("--kv-heads", 2)
    add("--experts", 8)
    add("--top-k", 2)
    add("--seed", 0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    random.seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    train_text, validation_text, _ = split_text(args.text)
    tokenizer = train_tokenizer(train_text, args.vocab_size)
    streams = tokenize(tokenizer, train_text, args.bpe_dropout)
    validation = make_windows(tokenizer, validation_text)
    config = MixtralConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.hidden_size // args.heads,
        num_local_experts=args.experts,
        num_experts_per_tok=args.top_k,
        max_position_embeddings=args.context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=SPECIAL_TOKENS.index("</s>"),
    )
    MixtralExperts.forward = dense_experts
    model = MixtralForCausalLM(config).to(device)
    add_dropout(model, args.dropout)
    print(f"{len(streams[0])} training tokens, {sum(map(len, validation))} for validation,"
          f" {sum(p.numel() for p in model.parameters())} parameters on {device}", flush=True)
    best_loss = train(model, streams, validation, args, device)
    save(model, tokenizer, args.output_dir)
    tokens = sum(len(window) - 1 for window in validation)
    print(f"best validation loss {best_loss:.4f} nats a token, {best_loss * tokens / len(validation_text.encode()):.4f}"
          f" a byte, perplexity {math.exp(best_loss):.2f}: {args.output_dir}")


if __name__ == "__main__":
    main()
