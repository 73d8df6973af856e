"""Nectar's prompts as messages, for `storm-7b.yaml`.

    python -m fastdpo.recipes.nectar nectar.jsonl

The dataset (berkeley-nest/Nectar on the Hugging Face hub) has its prompts as one text, in which
turns begin with "Human: " and "Assistant: " after an empty line.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastdpo.data.rows import read_rows
from fastdpo.storage import write_jsonl_atomic

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \n]?")


def messages(prompt: str) -> list[dict[str, str]] | None:
    """The turns of one prompt; None where they don't alternate or don't end in the user's."""
    start, *parts = _TURN.split(prompt)
    roles, texts = parts[0::2], [text.strip() for text in parts[1::2]]
    if start.strip() or not roles or roles.pop() != "Assistant" or texts.pop():
        return None
    expected = ["Human", "Assistant"] * len(roles)
    if roles != expected[: len(roles)] or len(roles) % 2 == 0 or not all(texts):
        return None
    names = {"Human": "user", "Assistant": "assistant"}
    return [{"role": names[role], "content": text} for role, text in zip(roles, texts)]


def convert(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Rows with a `prompt` of messages, each prompt once, and how many rows had none."""
    prompts: dict[str, list[dict[str, str]]] = {}
    unread = 0
    for row in rows:
        turns = messages(row["prompt"])
        unread += turns is None
        if turns is not None:
            prompts.setdefault(row["prompt"], turns)
    return [{"prompt": turns} for turns in prompts.values()], unread


def main(argv: list[str]) -> int:
    if len(argv) not in (1, 2):
        print("usage: python -m fastdpo.recipes.nectar OUT.jsonl [DATASET]", file=sys.stderr)
        return 2
    name = argv[1] if len(argv) == 2 else "berkeley-nest/Nectar"
    prompts, unread = convert(read_rows(name).rows)
    write_jsonl_atomic(Path(argv[0]), prompts)
    print(f"{len(prompts)} prompts in {argv[0]}; {unread} rows left out, not in Nectar's format")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
