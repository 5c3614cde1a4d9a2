#!/usr/bin/env python3
"""Live parity with transformers: new random models go through convert, build and run, and transformers checks the results.

    parity.py --mixtral PATH [--backend cuda] [--models 24] [--dtypes NAME...] [--seed N] [--example DIR] [--jobs N]
              [--layout FLAGS]...
    parity.py --self-test

With `--backend cuda` there are two engines for the GPU, one with the kernels selected for it and one with the portable
kernels. f32 engines run on the CPU too. Half of the models have sizes that tensor cores take. `--example` adds a trained
model in every data type, with prompts that it has written itself. Half of the random models are quantized; the reference then
has the floats that the integers stand for. `--layout "--tp_size 2"` cuts all models into ranks. It can be given several times:
all layouts are held against the same logits of transformers. On GPUs the ranks of one engine run at a time.

The limits:
- f32: every logit differs by at most 1e-5 of the reference's largest at its position, and greedy tokens are equal. This
  holds up to a prompt's first near-tie: where a token is chosen and the reference's top two logits are within 1e-5 of the
  largest, or where in any layer the k-th and k+1-th router logits are within 1e-5. From there on two right answers may
  differ, so the comparison of that prompt stops. Such stops must be under 2 % of the prompts.
- 16 bit: the reference is transformers in f32 on the same 16-bit weights, and e = |x - ref| / |ref| at each prompt
  position. Over all positions of a data type, our median of e is at most 1.1 times that of transformers' own eager code
  at that data type, and our 90th percentile at most 1.5 times. Tokens are not compared. For a quantized model, the eager code
  computes the model before it was quantized, and its e is against that model in f32.
"""

import argparse
import copy
import fcntl
import functools
import json
import multiprocessing
import random
import secrets
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from common import MixtralConfig, forward, load_model, random_model, run_tool, save_model, write_decoded

NEAR = 1e-5
MAX_STOPS = 0.02
MAX_MEDIAN, MAX_P90 = 1.1, 1.5
MAX_PROMPT = 300
# Formats of weights, as flags of convert.
FORMATS = ["--qformat int8_wo", "--qformat int4_wo", "--qformat int4_wo --group_size 32 --attention_precision int4",
           "--qformat int4_wo --group_size -1 --attention_precision float"]
MAX_OUTPUT = 8


@dataclass
class Case:
    """One model, random or that of a directory, and its prompts."""
    config: MixtralConfig
    dtype: str
    seed: int
    prompts: list
    batch: int
    directory: Path | None = None
    quantize: str = ""

    def __str__(self):
        c = self.config
        return (f"{self.dtype:8} {c.num_hidden_layers}L h{c.hidden_size:3} {c.num_attention_heads:2}/"
                f"{c.num_key_value_heads}x{c.head_dim:2} {c.num_local_experts:2}e top{c.num_experts_per_tok}"
                f" i{c.intermediate_size:3} v{c.vocab_size:3} {'tied' if c.tie_word_embeddings else 'free'}"
                f" w{c.sliding_window or '-':<3} t{c.rope_parameters['rope_theta']:.0e}"
                f"{f' {self.directory.name}' if self.directory else ''}{f' {self.quantize}' if self.quantize else ''}")


@dataclass
class Output:
    """An implementation's outputs: logits f32 [prompts, positions, vocabulary], NaN where there are none."""
    context: np.ndarray
    generation: np.ndarray
    tokens: list


@dataclass
class Verdict:
    """What a comparison found; `worst` is the largest f32 difference over the largest logit."""
    misses: list = field(default_factory=list)
    worst: float = 0.0
    stops: int = 0
    ours: list = field(default_factory=list)
    eager: list = field(default_factory=list)
    as_cpu: int = 0


@dataclass
class Total:
    """Counts over all f32 models. `as_cpu` counts prompts whose tokens are all the CPU backend's, also after near-ties."""
    prompts: int = 0
    stops: int = 0
    as_cpu: int = 0
    worst: float = 0.0


DTYPES_DRAWN = ["float32", "bfloat16", "float32", "float16"]


def draw_cases(count, seed, tensor_cores=False, ranks=False, dtypes=DTYPES_DRAWN):
    """Models that together take every value of every list below. Each list is shuffled on its own.

    With `tensor_cores`, every second model of each data type has sizes that tensor cores take. With `ranks`, sizes divide over
    two ranks of any kind.
    """
    rng = random.Random(seed)

    def deck(values):
        cards = [values[i % len(values)] for i in range(count)]
        rng.shuffle(cards)
        return cards

    layers, groups, top_ks = deck([1, 2, 3, 4, 5]), deck([1, 2, 3, 4, 6]), deck([1, 2, 3, 4])
    experts, tied, windows = deck([2, 16, 8, 3, 4, 12, 5, 7]), deck([False, True]), deck([False, True])
    thetas, dtypes = deck([1e4, 1e6]), deck(dtypes)
    # A token cannot go to more experts than there are, so models with many experts get the large top-k.
    formats = deck(["", *FORMATS[:2], "", *FORMATS[2:]])
    experts.sort()
    order = sorted(range(count), key=lambda i: (min(top_ks[i], 2), rng.random()))
    experts = [e for _, e in sorted(zip(order, experts))]
    even = [tensor_cores and dtypes[:i].count(dtypes[i]) % 2 == 0 for i in range(count)]
    cases = []
    for i in range(count):
        kv_heads = rng.choice([1, 2, 3]) if not ranks else 2
        heads = kv_heads * groups[i]
        hidden = 64 * rng.randint(1, 4) if even[i] else rng.randint(24, 144)
        head_dim = rng.choice([d for d in ([32, 64, 128] if even[i] else range(6, 34, 2)) if d * heads != hidden])
        inter = 32 * rng.randint(1, 8) if even[i] else rng.randint(16, 120)
        inter += ranks * (inter % 2)
        window = rng.randint(1, 100) if windows[i] else None
        vocab = 16 * rng.randint(4, 40) if even[i] else 2 * rng.randint(30, 300) + 1
        config = MixtralConfig(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=inter,
            num_hidden_layers=max(layers[i], 1 + ranks), num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
            num_local_experts=max(experts[i], top_ks[i]), num_experts_per_tok=top_ks[i],
            tie_word_embeddings=tied[i], sliding_window=window, rms_norm_eps=rng.choice([1e-5, 1e-3]),
            max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": thetas[i]},
            bos_token_id=1, eos_token_id=2,
        )
        lengths = [1, 2, MAX_PROMPT, rng.randint(200, MAX_PROMPT)]
        lengths += [window, window + 1, window + 2] if window else [64, 65, 128]
        # Longer prompts have more near-ties, and the limit counts prompts with a near-tie. So most prompts are short.
        lengths += [int(np.exp(rng.uniform(0, np.log(40)))) for _ in range(17)]
        if dtypes[i] != "float32":
            lengths = lengths[:10]
        rng.shuffle(lengths)
        prompts = [[rng.randrange(vocab) for _ in range(length)] for length in lengths]
        batch = rng.choice([1, 3, len(prompts)])
        cases.append(Case(config, dtypes[i], rng.randrange(2**31), prompts, batch, quantize=formats[i]))
        if ranks and "int4" in formats[i]:
            # Ranks begin at whole groups, and these sizes are odd multiples of anything.
            cases[-1].quantize = FORMATS[0]
    return cases


def check_coverage(cases):
    seen = lambda of: {of(case.config) for case in cases}
    wanted = [
        ("layers", {1, 2, 3, 4, 5}, seen(lambda c: c.num_hidden_layers)),
        ("query groups", {1, 2, 3, 4, 6}, seen(lambda c: c.num_attention_heads // c.num_key_value_heads)),
        ("experts", {2, 16}, seen(lambda c: c.num_local_experts)),
        ("top-k", {1, 2, 3, 4}, seen(lambda c: c.num_experts_per_tok)),
        ("tied", {False, True}, seen(lambda c: c.tie_word_embeddings)),
        ("sliding window", {False, True}, seen(lambda c: c.sliding_window is not None)),
        ("rope_theta", {1e4, 1e6}, seen(lambda c: c.rope_parameters["rope_theta"])),
        ("dtype", {"float32", "bfloat16", "float16"}, {case.dtype for case in cases}),
        ("format of weights", {"", *FORMATS}, {case.quantize for case in cases}),
        ("prompt length", {1, MAX_PROMPT}, {len(prompt) for case in cases for prompt in case.prompts}),
    ]
    for what, values, found in wanted:
        if not values <= found:
            sys.exit(f"these models cover {what} {sorted(found)}, not all of {sorted(values)}; draw more (--models)")


def example_cases(binary, directory):
    """The model of a directory in every data type. The model writes its prompts itself, as long as it was trained for."""
    config = MixtralConfig.from_pretrained(directory)
    lengths = [1, 2, 17, 64, 65, 100, 128, 200, MAX_PROMPT - 1, MAX_PROMPT]
    with tempfile.TemporaryDirectory(prefix="parity-") as scratch:
        checkpoint, engine = Path(scratch) / "checkpoint", Path(scratch) / "engine"
        run_tool(binary, "convert", "--model_dir", directory, "--output_dir", checkpoint, "--dtype", "float32")
        run_tool(binary, "build", "--checkpoint_dir", checkpoint, "--output_dir", engine, "--backend", "cpu")
        said = run_tool(binary, "run", "--engine_dir", engine, "--input_text", "ROMEO:\n", "--max_output_len", MAX_PROMPT,
                        "--end-id", -1, "--num_return_sequences", len(lengths), "--top_k", 0, "--json")
    prompt, = json.loads(said)["prompts"]
    prompts = [(prompt["ids"] + output["ids"])[:length] for length, output in zip(lengths, prompt["outputs"])]
    return [Case(config, dtype, 0, prompts, 8, Path(directory)) for dtype in ("float32", "bfloat16", "float16")]


def by_tool(binary, backend, layouts, case, directory):
    """Converts, builds and runs `case`, whose model is in directory/hf: {what ran: its Output}.

    For a quantized case, directory/decoded gets the model that the quantized weights stand for.
    """
    ids = directory / "ids.csv"
    ids.write_text("".join(",".join(map(str, prompt)) + "\n" for prompt in case.prompts))
    convert = ["convert", "--model_dir", directory / "hf", "--dtype", case.dtype, *case.quantize.split()]
    if case.quantize:
        run_tool(binary, *convert, "--output_dir", directory / "whole")
        model = load_model(directory / "hf", "float32")
        write_decoded(directory / "whole", model, directory / "decoded")

    def of_layout(number):
        layout, checkpoint = layouts[number], directory / f"checkpoint-{number}"
        csv, logits = directory / f"out-{number}.csv", directory / f"logits-{number}"
        run_tool(binary, *convert, "--output_dir", checkpoint, *layout.split())

        def build(kernels):
            engine = directory / f"engine-{number}-{kernels}"
            run_tool(binary, "build", "--checkpoint_dir", checkpoint, "--output_dir", engine, "--backend", backend,
                     "--gemm_plugin", kernels, "--moe_plugin", kernels, "--gather_context_logits",
                     "--max-seq-len", MAX_PROMPT + MAX_OUTPUT, "--max-batch-size", case.batch)
            return engine

        def run(engine, *where):
            with open(binary) as turn:
                if layout and backend == "cuda":
                    # Ranks wait for each other in their kernels. Those of two engines on the same GPUs would wait very long.
                    fcntl.flock(turn, fcntl.LOCK_EX)
                run_tool(binary, "run", "--engine_dir", engine, "--backend", *where, "--input_file", ids,
                         "--max_output_len", MAX_OUTPUT, "--end-id", -1, "--output_csv", csv, "--output_logits_npy", logits)
            tokens = [[int(token) for token in line.split(",")] for line in csv.read_text().splitlines()]
            return Output(np.load(f"{logits}_context.npy"), np.load(f"{logits}_generation.npy"), tokens)

        selected = build("auto")
        if backend == "cpu":
            return {f"{layout} cpu".strip(): run(selected, "cpu")}
        outputs = {f"{layout} selected".strip(): run(selected, backend)}
        if case.dtype == "float32" and number == 0:
            outputs["cpu"] = run(selected, "cpu", "--threads", 2)
        return outputs | {f"{layout} portable".strip(): run(build("disable"), backend)}

    with ThreadPoolExecutor(len(layouts)) as pool:
        return {what: output for outputs in pool.map(of_layout, range(len(layouts))) for what, output in outputs.items()}


def near_ties(case, ids, logits, router_logits):
    """(first position with a near-tie in a router, or len(ids); [len(ids)] whether the top two logits nearly tie)."""
    k = case.config.num_experts_per_tok
    ranked = -np.sort(-router_logits, axis=-1)
    router = np.zeros(len(ids), bool)
    if k < ranked.shape[-1]:
        router = (ranked[..., k - 1] - ranked[..., k] <= NEAR).any(axis=0)
    top = np.partition(logits, -2, axis=-1)[:, -2:]
    logit_tie = top[:, 1] - top[:, 0] <= NEAR * np.abs(logits).max(axis=-1)
    return int(router.argmax()) if router.any() else len(ids), logit_tie


def check_shapes(case, output, verdict):
    """Checks shapes, and that exactly the rows of positions that a prompt does not have are NaN."""
    vocab, count = case.config.vocab_size, len(case.prompts)
    context = (count, max(map(len, case.prompts)), vocab)
    generation = (count, MAX_OUTPUT, vocab)
    if output.context.shape != context or output.generation.shape != generation:
        verdict.misses.append(f"shapes {output.context.shape}, {output.generation.shape}: not {context}, {generation}")
    elif [len(tokens) for tokens in output.tokens] != [MAX_OUTPUT] * count:
        verdict.misses.append(f"token counts {[len(tokens) for tokens in output.tokens]}: not {MAX_OUTPUT} each")
    elif any(not 0 <= token < vocab for tokens in output.tokens for token in tokens):
        verdict.misses.append("a token outside the vocabulary")
    elif any(np.isnan(rows[: len(p)]).any() or not np.isnan(rows[len(p):]).all()
             for rows, p in zip(output.context, case.prompts)) or not np.isfinite(output.generation).all():
        verdict.misses.append("NaN where a logit should be, or a logit where none should")
    if output.context.dtype != np.float32 or output.generation.dtype != np.float32:
        verdict.misses.append("logits that are not f32")
    return not verdict.misses


def compare_f32(case, output, expected_of):
    """`expected_of` a tuple of ids are the reference's logits and router logits. The reference reads the prompt and the tokens
    that we chose, so one forward pass checks every choice."""
    verdict = Verdict()
    if not check_shapes(case, output, verdict):
        return verdict
    for number, (prompt, tokens) in enumerate(zip(case.prompts, output.tokens)):
        n = len(prompt)
        ids = prompt + tokens[:-1]
        expected, router_logits = expected_of(tuple(ids))
        router_tie, logit_tie = near_ties(case, ids, expected, router_logits)
        # The last context row and the first generation row are of the same position. Both are compared.
        positions = np.concatenate([np.arange(n), np.arange(n - 1, len(ids))])
        found = np.concatenate([output.context[number, :n], output.generation[number]])
        compared = positions < router_tie
        positions, found = positions[compared], found[compared]
        error = np.abs(found - expected[positions]).max(axis=-1) / np.abs(expected[positions]).max(axis=-1)
        if error.size:
            verdict.worst = max(verdict.worst, float(error.max()))
            if error.max() > NEAR:
                at = int(positions[error.argmax()])
                verdict.misses.append(f"prompt {number} ({n} tokens): logits off by {error.max():.1e} at position {at}")
        stopped = router_tie < len(ids)
        for step, token in enumerate(tokens):
            at = n - 1 + step
            if stopped and at >= router_tie:
                break
            if logit_tie[at]:
                stopped = True
                break
            if token != int(expected[at].argmax()):
                verdict.misses.append(f"prompt {number}: token {step} is {token}, not {expected[at].argmax()}")
                break
        verdict.stops += stopped
    return verdict


def errors(found, expected):
    """e of each row of two lists of logits, one for each prompt."""
    of = lambda x, ref: np.linalg.norm(x - ref, axis=-1) / np.linalg.norm(ref, axis=-1)
    return [e for x, ref in zip(found, expected) for e in of(x, ref.astype(np.float64))]


def compare_16bit(case, output, expected, eager):
    """`expected` are the reference's logits, `eager` what transformers' own code misses its reference by."""
    verdict = Verdict()
    if check_shapes(case, output, verdict):
        verdict.ours = errors([rows[: len(prompt)] for rows, prompt in zip(output.context, case.prompts)], expected)
        verdict.eager = eager
    return verdict


def check_case(implementation, case):
    """{what ran: Verdict}, and for each f32 one in how many prompts it gave all of the CPU's tokens."""
    with tempfile.TemporaryDirectory(prefix="parity-") as scratch:
        directory = Path(scratch)
        model = load_model(case.directory, "float32") if case.directory else random_model(case.config, case.seed)
        save_model(model, directory / "hf", case.dtype)
        outputs = implementation(case, directory)
        decoded = directory / "decoded"
        reference = load_model(decoded if decoded.exists() else directory / "hf", "float32")
        logits = lambda model: [forward(model, prompt)[0] for prompt in case.prompts]
        if case.dtype == "float32":
            expected_of = functools.cache(lambda ids: forward(reference, list(ids)))
            verdicts = {what: compare_f32(case, output, expected_of) for what, output in outputs.items()}
        else:
            # The eager code computes the model before it was quantized.
            eager, floats = load_model(directory / "hf", case.dtype), load_model(directory / "hf", "float32")
            expected, missed = logits(reference), errors(logits(eager), logits(floats))
            verdicts = {what: compare_16bit(case, output, expected, missed) for what, output in outputs.items()}
    for what, output in outputs.items():
        if case.dtype == "float32" and "cpu" in outputs and what != "cpu":
            verdicts[what].as_cpu = sum(a == b for a, b in zip(output.tokens, outputs["cpu"].tokens))
    return verdicts


def check(cases, implementation, quiet=False, jobs=1):
    """Runs every case. Returns (list of misses, summary)."""
    say = (lambda *_: None) if quiet else (lambda *words: print(*words, flush=True))
    misses, figures, totals, spreads = [], {}, {}, {}
    if jobs > 1:
        # The processes are forked, so that transformers is loaded already.
        pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"))
        found = pool.map(functools.partial(check_case, implementation), cases)
    else:
        found = (check_case(implementation, case) for case in cases)
    for number, (case, verdicts) in enumerate(zip(cases, found)):
        results = []
        for what, verdict in verdicts.items():
            if case.dtype == "float32":
                total = totals.setdefault(what, Total())
                total.prompts += len(case.prompts)
                total.stops += verdict.stops
                total.as_cpu += verdict.as_cpu
                total.worst = max(total.worst, verdict.worst)
                results.append(f"{what} worst {verdict.worst:.1e}" + (f", {verdict.stops} stopped" * bool(verdict.stops)))
            else:
                ours, eager = spreads.setdefault((case.dtype, what), ([], []))
                ours += verdict.ours
                eager += verdict.eager
                results.append(f"{what} {spread(verdict.ours, verdict.eager)[0]}" if verdict.ours else "")
            misses += [f"model {number}, {what}: {miss}" for miss in verdict.misses]
        say(f"{number:2} {case}  {'; '.join(results)}")
        for what, verdict in verdicts.items():
            for miss in verdict.misses[:3]:
                say(f"     MISS {what}: {miss}")
    for what, total in totals.items():
        as_cpu = f", the CPU's tokens in {total.as_cpu} of {total.prompts}" if "cpu" in totals and what != "cpu" else ""
        figures.setdefault(what, []).append(f"float32 {total.worst:.1e}{as_cpu}")
        say(f"float32 {what}: worst {total.worst:.1e}{as_cpu}, {total.stops} stopped at a near-tie")
        if total.stops >= MAX_STOPS * total.prompts:
            misses.append(f"{what}: {total.stops} of {total.prompts} prompts stopped: {MAX_STOPS:.0%} or more")
    for (dtype, what), (ours, eager) in spreads.items():
        if not ours:
            continue
        text, median, p90 = spread(ours, eager)
        figures.setdefault(what, []).append(f"{dtype} {median:.2f}x {p90:.2f}x")
        say(f"{dtype} {what}: {text} over {len(ours)} positions")
        if not (median <= MAX_MEDIAN and p90 <= MAX_P90):
            misses.append(f"{dtype}, {what}: {text}; limits {MAX_MEDIAN} x and {MAX_P90} x")
    return misses, "; ".join(f"{what} {', '.join(of)}" for what, of in figures.items())


def spread(ours, eager):
    """(text, ratio of medians, ratio of 90th percentiles)."""
    median, p90 = (np.percentile(ours, q) / np.percentile(eager, q) for q in (50, 90))
    text = f"median e {np.median(ours):.2e} = {median:.2f} x eager's, 90 % {np.percentile(ours, 90):.2e} = {p90:.2f} x"
    return text, median, p90


def stand_in(edit_config=None, edit_output=None, edit_weights=None):
    """transformers' other code paths (sdpa, grouped experts) take the tool's place, with a planted error if one is given."""
    def run(case, directory):
        model = load_model(directory / "hf", case.dtype, attention="sdpa", experts="batched_mm")
        if edit_config:
            config = copy.deepcopy(model.config)
            edit_config(config)
            state = model.state_dict()
            model = type(model)(config).to(model.dtype).eval()
            model.load_state_dict(state)
            model.model.rotary_emb.inv_freq = type(model.model.rotary_emb)(config).inv_freq
        if edit_weights:
            with torch.no_grad():
                edit_weights(model)
        output = Output(
            np.full((len(case.prompts), max(map(len, case.prompts)), case.config.vocab_size), np.nan, np.float32),
            np.zeros((len(case.prompts), MAX_OUTPUT, case.config.vocab_size), np.float32), [])
        for number, prompt in enumerate(case.prompts):
            ids = list(prompt)
            output.context[number, : len(prompt)] = forward(model, prompt)[0]
            for step in range(MAX_OUTPUT if case.dtype == "float32" else 0):  # at 16 bit they are not compared
                output.generation[number, step] = forward(model, ids)[0][-1]
                ids.append(int(output.generation[number, step].argmax()))
            output.tokens.append(ids[len(prompt):] or [0] * MAX_OUTPUT)
        if edit_output:
            edit_output(case, output)
        return {"stand-in": output}
    return run


def self_test(seed):
    """Checks that the stand-in passes, and that every planted error is caught."""
    cases = draw_cases(24, seed)
    check_coverage(cases)
    print(f"self-test, seed {seed}: transformers in the tool's place")
    misses, _ = check(cases, stand_in())
    if misses:
        sys.exit("\n".join(["self-test: the stand-in itself misses", *misses]))

    def last_bit(case, output):
        row = output.context[-1, len(case.prompts[-1]) - 1]
        row[0] += 2e-5 * np.abs(row).max()

    def wrong_token(case, output):
        # Changes the last token. No later logits depend on it, so only the comparison of tokens can find it.
        output.tokens[0][-1] = (output.tokens[0][-1] + 1) % case.config.vocab_size

    def extra_row(case, output):
        shortest = min(range(len(case.prompts)), key=lambda i: len(case.prompts[i]))
        output.context[shortest, len(case.prompts[shortest])] = 0.0

    def noise(case, output):
        generator = np.random.default_rng(0)
        scale = {"bfloat16": 2**-7, "float16": 2**-10}.get(case.dtype, 0.0)
        size = np.linalg.norm(output.context, axis=-1, keepdims=True) / np.sqrt(case.config.vocab_size)
        output.context += (generator.standard_normal(output.context.shape) * size * scale).astype(np.float32)

    def window(config):
        config.sliding_window += 1

    def theta(config):
        config.rope_parameters["rope_theta"] *= 1.01

    def swap_experts(model):
        gate = model.model.layers[-1].mlp.gate.weight
        gate[[0, 1]] = gate[[1, 0]].clone()

    def norm_eps(config):
        config.rms_norm_eps *= 100

    f32 = [case for case in cases if case.dtype == "float32"][:2]
    sliding = [case for case in cases if case.dtype == "float32" and case.config.sliding_window][:1]
    half = {dtype: [case for case in cases if case.dtype == dtype] for dtype in ("bfloat16", "float16")}
    planted = [
        ("one logit off by 2e-5 of the largest", f32, {"edit_output": last_bit}),
        ("one wrong token", f32, {"edit_output": wrong_token}),
        ("a row of logits past the prompt's end", f32, {"edit_output": extra_row}),
        ("a window wider by one", sliding, {"edit_config": window}),
        ("rope_theta off by 1 %", f32, {"edit_config": theta}),
        ("rms_norm_eps a hundred times as large", f32, {"edit_config": norm_eps}),
        ("two router rows swapped", f32, {"edit_weights": swap_experts}),
    ]
    for dtype, some in half.items():
        planted += [
            (f"{dtype}: as much noise again as one rounding", some, {"edit_output": noise}),
            (f"{dtype}: two router rows swapped", some, {"edit_weights": swap_experts}),
        ]
    for what, some, edits in planted:
        misses, _ = check(some, stand_in(**edits), quiet=True)
        print(f"planted: {what}: {'caught, ' + misses[0] if misses else 'NOT CAUGHT'}", flush=True)
        if not misses:
            sys.exit(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtral", help="the tool's binary")
    parser.add_argument("--backend", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--example", type=Path, help="a directory of a trained model")
    parser.add_argument("--layout", action="append", default=[], metavar="FLAGS", help="flags of convert that cut a model into ranks")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES_DRAWN, choices=set(DTYPES_DRAWN), help="data types of random models")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--models", type=int, default=24)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--self-test", action="store_true")
    args = parser.parse_args()
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    if args.self_test:
        return self_test(seed)
    if not args.mixtral:
        parser.error("--mixtral PATH or --self-test")
    cases = draw_cases(args.models, seed, args.backend == "cuda", bool(args.layout), args.dtypes)
    if not args.layout and args.dtypes == DTYPES_DRAWN:
        check_coverage(cases)
    print(f"{len(cases)} models; again with --models {args.models} --seed {seed}", flush=True)
    if args.example:
        cases += example_cases(args.mixtral, args.example)
    implementation = functools.partial(by_tool, args.mixtral, args.backend, args.layout or [""])
    misses, summary = check(cases, implementation, jobs=args.jobs)
    if misses:
        sys.exit(f"{len(misses)} misses, the first: {misses[0]}")
    print(f"parity holds: {summary}")


if __name__ == "__main__":
    main()
