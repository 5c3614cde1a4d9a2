"""Checks that ids and texts are those of mistral-common and transformers.

With Mistral's own files alone (SentencePiece models, tekken.json), the prompts' ids must be mistral-common's. With
transformers' form of the same tokenizers they must be transformers' ids, and random ids must give its text. With a chat
template for Mixtral Instruct, conversations in that form must have the ids that mistral-common gives them. The engine is
a tiny random model. Texts are new each time; the seed is printed, and the same seed draws the same texts."""

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

from common import run_tool

import mistral_common
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from transformers import AutoTokenizer, MistralConfig

DATA = Path(mistral_common.__file__).parent / "data"
TEMPLATE = Path(__file__).parent.parent / "goldens" / "chat" / "mixtral-instruct.jinja"
FILES = {  # the name in Mistral's release: (the file, the rows of the model's embedding)
    "tokenizer.model": ("tokenizer.model.v1", 32000),
    "tokenizer.model.v3": ("mistral_instruct_tokenizer_240323.model.v3", 32768),
    "tokenizer.model.v7": ("mistral_instruct_tokenizer_241114.model.v7", 32768),
    "tekken.json": ("tekken_240718.json", 131072),
}
PARTS = [
    " ", "  ", "    ", "\t", "\n", "\r\n", "\n\n\n", "▁", "▁▁", "é", "e\u0301", "ﬁ", "Å", "ß", "İ", "日本語", "한국어", "нет",
    "مرحبا", "नमस्ते", "🦀", "👩‍👩‍👧", "\u200b", "\ufeff", "\u3000", "\u00a0", "\u2028", "\u0085", "\U0001f1e9\U0001f1ea", "\ue000", "\U0010ffff",
    "<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<0x0A>", "[REFERENCE_DOC_1]", "[TOOL_CALLS]", "<SPECIAL_20>",
    "Hello", " world", "the", " The", "don't", "it's", "1234", "3.14", "---", "====", "....", "())", "{\"a\": 1}", "def f(x):\n    return x",
    "aaaa", "ananana", "abababab", "ha" * 9, "0" * 7, "https://a.b/c?d=e&f", "ÀÉÎ", "iPhone", "CamelCaseWord",
]  # fmt: skip


def texts(rng, count):
    """Ordinary and nasty texts."""
    yield from PARTS
    yield from (" " * n + tail for n in range(1, 40) for tail in ("", "x"))
    for _ in range(count):
        parts = rng.choices(PARTS, k=rng.randint(1, 8))
        if rng.random() < 0.3:
            parts.append("".join(chr(rng.choice((rng.randint(1, 0xD7FF), rng.randint(0x10000, 0x1FFFF)))) for _ in range(4)))
        if rng.random() < 0.5:
            parts.append("".join(rng.choices("etaoinshrdlu ETA.,'-\n", k=rng.randint(1, 30))))
        yield "".join(parts)


def engine(args, work, rows):
    """An engine of dummy weights, without a tokenizer."""
    source, built = work / f"source{rows}", work / f"engine{rows}"
    if not built.exists():
        MistralConfig(
            vocab_size=rows, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=4096, dtype="float32",
        ).save_pretrained(source)  # fmt: skip
        run_tool(args.mixtral, "build", "--model-config", source, "--output-dir", built, "--backend", "cpu",
                 "--max-seq-len", 2048, "--max-batch-size", 64)  # fmt: skip
    return built


def prompts(args, built, tokenizer, *flags):
    """The prompts and their outputs as the tool prints them."""
    said = run_tool(args.mixtral, "run", "--engine-dir", built, "--tokenizer-dir", tokenizer, "--json",
                    "--max-output-len", 1, *flags)  # fmt: skip
    return json.loads(said)["prompts"]


def encoded(args, built, tokenizer, given):
    """The ids of texts. One command line encodes some of them at a time."""
    ids = []
    for first in range(0, len(given), 500):
        ids += [p["ids"] for p in prompts(args, built, tokenizer, "--input-text", *given[first : first + 500])]
    return ids


def differences(what, given, found, expected):
    """Prints the first differences. Returns how many there are."""
    wrong = [n for n, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    for n in wrong[:5]:
        print(f"  {what}: {given[n]!r}: found {found[n]!r}, expected {expected[n]!r}")
    print(f"{what}: {len(given) - len(wrong)} of {len(given)} agree")
    return len(wrong)


def like_sentencepiece(theirs):
    """Orders the merges of a tokenizer.json by the scores of what they make, which is SentencePiece's order and that of
    the files on the Hub. transformers 5 orders them by id, and so cuts runs of spaces in another way."""
    model = MistralTokenizer.v1().instruct_tokenizer.tokenizer._model
    file = theirs / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["merges"].sort(key=lambda pair: -model.get_score(model.piece_to_id("".join(pair))))
    file.write_text(json.dumps(content), encoding="utf-8")


def conversations(rng, count):
    """Conversations that the model is to answer. What the two forms are known to see in another way is left out: names of
    control tokens, which are such tokens in transformers' form, and spaces around an answer, which the template removes."""
    drawn = [text for text in texts(rng, count) if not any(name in text for name in ("<s>", "</s>", "<unk>"))]
    answers = [text for text in map(str.strip, drawn) if text]
    for _ in range(count):
        system = [{"role": "system", "content": rng.choice(answers)}] if rng.random() < 0.5 else []
        roles = ["user", "assistant"] * rng.randint(0, 3) + ["user"]
        yield system + [{"role": r, "content": rng.choice(drawn if r == "user" else answers)} for r in roles]


def chats(args, work, rng, built, theirs):
    """Compares the ids of conversations with mistral-common's. Returns how many differ."""
    shutil.copy(TEMPLATE, theirs / "chat_template.jinja")
    like_sentencepiece(theirs)
    given = list(conversations(rng, args.count))
    file = work / "conversations.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in given))
    reference = MistralTokenizer.v1()
    expected = [reference.encode_chat_completion(ChatCompletionRequest.from_openai(messages)).tokens for messages in given]
    found = [prompt["ids"] for prompt in prompts(args, built, theirs, "--input-file", file)]
    return differences("conversations, ids", given, found, expected)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtral", required=True, help="the tool's binary")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--count", type=int, default=500)
    args = parser.parse_args()
    print(f"--seed {args.seed}")
    rng = random.Random(args.seed)
    wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        for name, (file, rows) in FILES.items():
            given = list(texts(rng, args.count))
            built, alone = engine(args, work, rows), work / name.replace(".", "-")
            alone.mkdir()
            shutil.copy(DATA / file, alone / name)
            if name == "tekken.json":
                reference = Tekkenizer.from_file(alone / name)
            else:
                reference = SentencePieceTokenizer(alone / name, tokenizer_version=TokenizerVersion.v3)
            expected = [reference.encode(text, bos=True, eos=False) for text in given]
            wrong += differences(f"{name}, ids", given, encoded(args, built, alone, given), expected)
            if name in ("tokenizer.model.v7", "tekken.json"):
                continue
            theirs = work / (alone.name + "-hf")
            shutil.copytree(alone, theirs)
            (theirs / name).rename(theirs / "tokenizer.model")
            config = dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True)
            (theirs / "tokenizer_config.json").write_text(json.dumps(config))
            AutoTokenizer.from_pretrained(theirs).save_pretrained(theirs)
            reference = AutoTokenizer.from_pretrained(theirs)
            expected = [reference(text)["input_ids"] for text in given]
            wrong += differences(f"{name} as tokenizer.json, ids", given, encoded(args, built, theirs, given), expected)
            drawn = [[rng.randrange(rng.choice((300, rows))) for _ in range(rng.randint(1, 20))] for _ in range(args.count)]
            (work / "ids.csv").write_text("".join(",".join(map(str, ids)) + "\n" for ids in drawn))
            found = [p["text"] for p in prompts(args, built, theirs, "--input-file", work / "ids.csv")]
            expected = [reference.decode(ids, skip_special_tokens=True) for ids in drawn]
            wrong += differences(f"{name} as tokenizer.json, text", drawn, found, expected)
            if name == "tokenizer.model":
                wrong += chats(args, work, rng, built, theirs)
    return min(wrong, 1)


if __name__ == "__main__":
    raise SystemExit(main())
