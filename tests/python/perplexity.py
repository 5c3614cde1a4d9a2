#!/usr/bin/env python3
"""Checks that `mixtral eval` finds what transformers finds: perplexity and log-probabilities in f32, of examples/tiny-mixtral.

The text's windows and the questions' sequences are made here by rules of their own. Perplexities agree within 1e-5 of
their value, log-probabilities of choices within 1e-4 nats.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from common import load_model, run_tool

MODEL = Path(__file__).resolve().parent.parent.parent / "examples" / "tiny-mixtral"
TEXT = """A BAKER, to his apprentice:
Good boy, the oven sleeps; go, wake the coals,
For ere the market bell has told its eight
The whole of Padua will cry for bread.

APPRENTICE:
Sir, I have blown till I am out of breath,
And still the fire is colder than your thanks.

BAKER:
Then warm it with thy wit, if that be hot. —
Où est le blé? The miller swears ’tis ground; 40 sacks, he says, & more at noon.
""" * 6
QUESTIONS = [
    {"context": "KING HENRY:\nWhat says my", "choices": [" lord?", " oven", " 40 sacks of the miller's bread"], "answer": 0},
    {"context": "Good morrow, ", "choices": ["cousin.", "Xylophone quartz."], "answer": 0},
    {"context": "First Citizen:\n", "choices": ["We", "é"], "answer": 1},
]


def logprobs(model, ids):
    """The log-probability of each token but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return torch.log_softmax(logits[:-1], dim=-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def perplexity(model, ids, context, stride):
    """Each token is scored by the first window that has it, unless it is the first of that window."""
    scored = {}
    for start in range(0, len(ids), stride):
        window = ids[start : start + context]
        for at, logprob in enumerate(logprobs(model, window) if len(window) > 1 else [], start + 1):
            scored.setdefault(at, logprob)
        if start + context >= len(ids):
            break
    return math.exp(-sum(scored.values()) / len(scored)), len(scored)


def choice(model, tokenizer, context, text):
    """The log-probability of a continuation. It begins where the tokens differ from those of the context alone."""
    alone, ids = tokenizer(context.rstrip())["input_ids"], tokenizer(context + text)["input_ids"]
    before = next((at for at, (a, b) in enumerate(zip(alone, ids)) if a != b), min(len(alone), len(ids)))
    return sum(logprobs(model, ids)[before - 1 :])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtral", required=True, help="the tool's binary")
    args = parser.parse_args()
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), load_model(MODEL, "float32")
    wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        run_tool(args.mixtral, "convert", "--model-dir", MODEL, "--output-dir", work / "c", "--dtype", "f32")
        run_tool(args.mixtral, "build", "--checkpoint-dir", work / "c", "--output-dir", work / "e", "--backend", "cpu",
                 "--gather-context-logits")  # fmt: skip
        (work / "text.txt").write_text(TEXT, encoding="utf-8")
        (work / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS), encoding="utf-8")
        measure = lambda *flags: json.loads(run_tool(args.mixtral, "eval", "--engine-dir", work / "e", "--json", *flags))
        ids = tokenizer(TEXT)["input_ids"]
        for context, stride in [(512, 256), (100, 7), (64, 64), (33, 32), (2, 1)]:
            found = measure("--text", work / "text.txt", "--context", context, "--stride", stride)
            expected, tokens = perplexity(model, ids, context, stride)
            off = abs(found["perplexity"] / expected - 1)
            agrees = off < 1e-5 and found["tokens"] == tokens
            wrong += not agrees
            print(f"windows of {context}, {stride} apart: {found['perplexity']:.6f} of {found['tokens']} tokens, "
                  f"transformers {expected:.6f} of {tokens}: off by {off:.1e}{'' if agrees else ', TOO MUCH'}")  # fmt: skip
        found = measure("--choices", work / "questions.jsonl")
        expected = [[choice(model, tokenizer, q["context"], text) for text in q["choices"]] for q in QUESTIONS]
        off = max(abs(a - b) for mine, theirs in zip(found["logprobs"], expected) for a, b in zip(mine, theirs, strict=True))
        right = sum(max(range(len(e)), key=e.__getitem__) == q["answer"] for e, q in zip(expected, QUESTIONS))
        agrees = off < 1e-4 and math.isclose(found["accuracy"], right / len(QUESTIONS))
        wrong += not agrees
        print(f"choices: off by {off:.1e} nats, accuracy {found['accuracy']:.3f}{'' if agrees else ', NOT transformers’'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
