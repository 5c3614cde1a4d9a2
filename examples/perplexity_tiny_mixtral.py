#!/usr/bin/env python3
"""Perplexity of a small model on text held out from its training, by transformers and by `mixtral run`.

The protocol, the same for both:
- `split_text` cuts a text file in three: 90 % to train on, 5 % to choose a checkpoint by, the last 5 % to report on.
- The last part is tokenized once, without special tokens, and dealt into windows that do not overlap: `<s>` and then
  the next 255 tokens (fewer in the last window). So every held-out token is predicted exactly once, and `<s>` never.
- Perplexity = exp(mean of -log p(token | the tokens before it in its window)), over all tokens of all windows.

    perplexity_tiny_mixtral.py transformers MODEL_DIR TEXT             # weights as saved, arithmetic in f32
    perplexity_tiny_mixtral.py windows MODEL_DIR TEXT IDS.csv          # the windows, a line of token ids each
    mixtral run --engine_dir E --input_file IDS.csv --max_output_len 1 --output_logits_npy L
    perplexity_tiny_mixtral.py logits IDS.csv L_context.npy            # an engine built with --gather_context_logits
"""

import argparse
import math
from pathlib import Path

import numpy as np

WINDOW = 256


def split_text(path):
    """(train, validation, test): the first 90 %, the next 5 % and the last 5 % of a text, cut at line ends."""
    text = Path(path).read_text(encoding="utf-8")
    cuts = [text.find("\n", int(len(text) * share)) + 1 for share in (0.90, 0.95)]
    if not 0 < cuts[0] < cuts[1] < len(text):
        raise SystemExit(f"{path}: too short, or too few lines, to hold anything out")
    return text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]


def make_windows(tokenizer, text):
    """Token ids of `text`, dealt into windows of at most `WINDOW` ids that each begin with `<s>`.

    `tokenizer` is a `tokenizers.Tokenizer`.
    """
    bos = tokenizer.token_to_id("<s>")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [[bos, *ids[start : start + WINDOW - 1]] for start in range(0, len(ids), WINDOW - 1)]


def nll(logits, ids):
    """Summed negative log-likelihood of `ids[1:]` under `logits` [at least len(ids), vocabulary], in f64."""
    rows = logits[: len(ids) - 1].astype(np.float64)
    if not np.isfinite(rows).all():
        raise SystemExit("a logit that should be there is not finite")
    top = rows.max(axis=-1)
    log_sum = top + np.log(np.exp(rows - top[:, None]).sum(axis=-1))
    return float((log_sum - rows[np.arange(len(rows)), ids[1:]]).sum())


def report(total, windows, text=None):
    tokens = sum(len(ids) - 1 for ids in windows)
    per_byte = f", {total / len(text.encode()):.4f} nats a byte" if text else ""
    print(f"perplexity {math.exp(total / tokens):.4f} ({total / tokens:.6f} nats a token{per_byte})"
          f" over {tokens} tokens in {len(windows)} windows")


def by_transformers(model_dir, text_file):
    import torch
    from tokenizers import Tokenizer
    from transformers import MixtralForCausalLM

    text = split_text(text_file)[2]
    windows = make_windows(Tokenizer.from_file(f"{model_dir}/tokenizer.json"), text)
    model = MixtralForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.inference_mode():
        total = sum(nll(model(torch.tensor([ids])).logits[0].numpy(), ids) for ids in windows)
    report(total, windows, text)


def write_windows(model_dir, text_file, csv_file):
    from tokenizers import Tokenizer

    windows = make_windows(Tokenizer.from_file(f"{model_dir}/tokenizer.json"), split_text(text_file)[2])
    Path(csv_file).write_text("".join(",".join(map(str, ids)) + "\n" for ids in windows))
    print(f"{len(windows)} windows of at most {WINDOW} ids in {csv_file}")


def by_logits(csv_file, npy_file):
    windows = [[int(i) for i in line.split(",")] for line in Path(csv_file).read_text().split()]
    logits = np.load(npy_file, mmap_mode="r")
    if logits.ndim != 3 or logits.shape[0] != len(windows) or logits.shape[1] < max(map(len, windows)):
        raise SystemExit(f"{npy_file}: shape {logits.shape} does not fit the {len(windows)} windows of {csv_file}")
    report(sum(nll(rows, ids) for rows, ids in zip(logits, windows)), windows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    for name, run, files in [
        ("transformers", by_transformers, ["model_dir", "text_file"]),
        ("windows", write_windows, ["model_dir", "text_file", "csv_file"]),
        ("logits", by_logits, ["csv_file", "npy_file"]),
    ]:
        mode = modes.add_parser(name)
        mode.set_defaults(run=run)
        for file in files:
            mode.add_argument(file)
    args = vars(parser.parse_args())
    args.pop("mode")
    args.pop("run")(**args)


if __name__ == "__main__":
    main()
