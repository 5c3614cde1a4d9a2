#!/usr/bin/env python3
"""Writes tests/goldens/chat/rendered.json: what transformers makes of every conversation with every template there.

    make_chat_goldens.py            # writes the file again
    make_chat_goldens.py --check    # checks that transformers still says the same

Each template is applied by the tokenizer of examples/tiny-mixtral. An entry is the text and its token ids, or null where
transformers raises an error. If the template itself refused, the entry is its message.
"""

import argparse
import json
import sys
from pathlib import Path

from jinja2.exceptions import TemplateError, TemplateRuntimeError, TemplateSyntaxError
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
GOLDENS = ROOT / "tests" / "goldens" / "chat"


def entry(tokenizer, conversation):
    """What transformers makes of a conversation."""
    try:
        text = tokenizer.apply_chat_template(conversation["messages"], tokenize=False, **rest(conversation))
        ids = tokenizer.apply_chat_template(conversation["messages"], return_dict=False, **rest(conversation))
    except (TemplateRuntimeError, TemplateSyntaxError):
        return None  # the engine's own errors, such as an undefined variable
    except TemplateError as error:
        return {"refused": error.message}
    except (ValueError, TypeError, AttributeError, KeyError):
        return None
    return {"text": text, "ids": ids}


def rest(conversation):
    return {key: value for key, value in conversation.items() if key != "messages"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny-mixtral")
    conversations = json.loads((GOLDENS / "conversations.json").read_text(encoding="utf-8"))
    rendered = {}
    for path in sorted(GOLDENS.glob("*.jinja")):
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        rendered[path.stem] = {name: entry(tokenizer, conversation) for name, conversation in conversations.items()}
    lines = [f"{json.dumps(template)}: {{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(made)}" for name, made in made.items()) + "\n}"
             for template, made in rendered.items()]  # fmt: skip
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    path = GOLDENS / "rendered.json"
    if not args.check:
        path.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        sys.exit(f"transformers says something else than {path}; write it again and read the difference")


if __name__ == "__main__":
    main()
