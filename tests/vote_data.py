"""Public votes and published values, kept outside the project; tests that need them are skipped where they are absent."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(os.environ.get("UNSTILTED_VOTE_DATA", Path(__file__).parents[2] / "shared/data/votes"))

needs_vote_data = pytest.mark.skipif(
    not (FOLDER / "reference_values.json").is_file(),
    reason=f"the public votes are not in {FOLDER}; set UNSTILTED_VOTE_DATA to their folder",
)


def vote_file(name: str) -> Path:
    return FOLDER / name


@cache
def reference() -> dict[str, Any]:
    """The published values, by study."""
    values: dict[str, Any] = json.loads(vote_file("reference_values.json").read_text(encoding="utf-8"))
    return values
