#!/usr/bin/env python3
"""Beam search against transformers' `generate`: new random f32 models, the same sequences and scores.

    beams.py --mixtral PATH [--models 20] [--seed N]

Every model gets prompts of several lengths, and a search with 2, 4 or 8 beams, each way of ending early, and several length
penalties. Two continuations whose sums differ by less than NEAR may change places in either implementation, and everything
after that may differ. So where outputs differ, the search is repeated here in f64 from transformers' logits, and looked at for
such a tie. Searches that differ without one are wrong; those with one are counted, and may be 5 % at most. One model in four
is cut into two ranks, by tensor or pipeline parallelism.
"""

import argparse
import json
import random
import secrets
import sys
import tempfile
from pathlib import Path

import torch

from common import MixtralConfig, load_model, random_model, run_tool, save_model

NEAR = 2e-5
MAX_SCORE_ERROR = 1e-4
MAX_TIES = 0.05
EARLY = {0: False, 1: True, 2: "never"}


def draw_config(rng):
    vocab = rng.choice([40, 97, 250])
    return MixtralConfig(
        vocab_size=vocab, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=rng.choice([None, 9]),
        max_position_embeddings=256, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, bos_token_id=1, eos_token_id=2)


def tie_in(model, prompt, width, early, penalty, max_new, end):
    """The smallest distance between two sums that decide something, in a search of our own in f64."""
    beams, answers, nearest = [(list(prompt), 0.0)], [], float("inf")
    for length in range(1, max_new + 1):
        with torch.no_grad():
            logits = model(torch.tensor([tokens for tokens, _ in beams])).logits[:, -1].double()
        offers = []
        for (tokens, total), row in zip(beams, logits.log_softmax(-1)):
            values, ids = row.topk(min(2 * width + 1, len(row)))
            offers += [(total + value, tokens + [token]) for value, token in zip(values.tolist(), ids.tolist())]
        offers.sort(key=lambda offer: -offer[0])
        sums = [total for total, _ in offers[: 2 * width + 1]]
        nearest = min([nearest, *(a - b for a, b in zip(sums, sums[1:]))])
        looked_at = offers[: 2 * width]
        ended = lambda tokens: tokens[-1] == end or length == max_new
        answers += [total / length**penalty for total, tokens in looked_at[:width] if ended(tokens)]
        answers.sort(reverse=True)
        nearest = min([nearest, *(a - b for a, b in zip(answers[: width + 1], answers[1 : width + 1]))])
        beams = [(tokens, total) for total, tokens in looked_at if not ended(tokens)][:width]
        if not beams:
            break
        if len(answers) >= width:
            reach = max_new if early == "never" and penalty > 0 else length
            nearest = min(nearest, abs(beams[0][1] / reach**penalty - answers[width - 1]))
            if early is True:
                break
    return nearest


def check_model(mixtral, index, rng, counts):
    with tempfile.TemporaryDirectory() as temp:
        directory = Path(temp)
        save_model(random_model(draw_config(rng), rng.randrange(2**31)), directory / "model", "float32")
        model = load_model(directory / "model", "float32")
        ranks = ["", "", "--tp_size 2", "--pp_size 2"][index % 4].split()
        run_tool(mixtral, "convert", "--model_dir", directory / "model", "--output_dir", directory / "checkpoint", "--dtype",
                 "float32", *ranks)
        run_tool(mixtral, "build", "--checkpoint_dir", directory / "checkpoint", "--output_dir", directory / "engine",
                 "--max_batch_size", "16", "--max_seq_len", "128", "--tokens_per_block", "16")
        for width in (2, 4, 8):
            for early in rng.sample([0, 1, 2], 2):
                penalty, max_new = rng.choice([0.6, 1.0, 2.0]), rng.choice([3, 9, 20])
                prompts = [[rng.randrange(3, model.config.vocab_size) for _ in range(n)] for n in (1, rng.randint(2, 40))]
                (directory / "prompts.csv").write_text("".join(",".join(map(str, p)) + "\n" for p in prompts))
                said = run_tool(mixtral, "run", "--engine_dir", directory / "engine", "--input_file", directory / "prompts.csv",
                                "--no_add_special_tokens", "--num_beams", width, "--early_stopping", early, "--length_penalty",
                                penalty, "--max_output_len", max_new, "--end_id", 2, "--json")
                for prompt, ours in zip(prompts, json.loads(said)["prompts"]):
                    options = dict(num_beams=width, num_return_sequences=width, early_stopping=EARLY[early],
                                   length_penalty=penalty, max_new_tokens=max_new, do_sample=False, pad_token_id=0,
                                   eos_token_id=2, return_dict_in_generate=True, output_scores=True)
                    ids = torch.tensor([prompt])
                    with torch.no_grad():
                        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
                    counts["searches"] += 1
                    expected = []
                    lengths = (theirs.beam_indices >= 0).sum(-1).tolist()
                    for tokens, score, length in zip(theirs.sequences.tolist(), theirs.sequences_scores.tolist(), lengths):
                        expected.append((tokens[len(prompt) : len(prompt) + length], score))
                    found = [(o["ids"], o["score"]) for o in ours["outputs"]]
                    same = [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
                    if same:
                        error = max(abs(a - b) for (_, a), (_, b) in zip(found, expected))
                        counts["worst"] = max(counts["worst"], error)
                    if not same or error > MAX_SCORE_ERROR:
                        tie = tie_in(model, prompt, width, EARLY[early], penalty, max_new, 2)
                        if tie < NEAR and not same:
                            counts["ties"] += 1
                            continue
                        return [f"{width} beams, early stopping {EARLY[early]}, length penalty {penalty}, {max_new} tokens after {prompt}, "
                                f"nearest tie {tie:.1e}:\n  {found}\ninstead of\n  {expected}"]
    return []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtral", required=True)
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    args = parser.parse_args()
    print(f"seed {args.seed}")
    rng = random.Random(args.seed)
    counts, misses = {"searches": 0, "ties": 0, "worst": 0.0}, []
    for index in range(args.models):
        misses += check_model(args.mixtral, index, rng, counts)
    print(f"{args.models} models, {counts['searches']} searches, {counts['ties']} with near-ties, "
          f"scores differ by {counts['worst']:.1e} at most")
    if counts["ties"] > MAX_TIES * counts["searches"]:
        misses.append(f"{counts['ties']} of {counts['searches']} searches have near-ties")
    for miss in misses:
        print(miss)
    sys.exit(bool(misses))


if __name__ == "__main__":
    main()
