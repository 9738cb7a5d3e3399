"""The shipped starter set: 512 prompts, each answered with the same content in two voices."""

import json
from functools import cache
from importlib.resources import files

from unstilted.records import Message, Pair


@cache
def starter_pairs() -> tuple[Pair, ...]:
    """All starter pairs in file order."""
    text = (files("unstilted") / "data" / "starter" / "pairs.jsonl").read_text(encoding="utf-8")
    return tuple(_pair(json.loads(line)) for line in text.splitlines())


def _pair(row: dict[str, str]) -> Pair:
    return Pair(
        id=row["id"],
        category=row["category"],
        topic=row["topic"],
        prompt=(Message(role="user", content=row["prompt"]),),
        chosen=(Message(role="assistant", content=row["chosen"]),),
        rejected=(Message(role="assistant", content=row["rejected"]),),
        source="starter",
    )
