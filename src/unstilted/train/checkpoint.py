"""One file from which a training goes on bit by bit as if it had never stopped."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from unstilted.files import whole_file
from unstilted.progress import say
from unstilted.records import TrainPoint


@dataclass(frozen=True)
class Checkpoint:
    """A training after `len(points)` optimizer steps."""

    key: str
    """Hash of everything that decides how this training goes; another key means another training."""
    parameters: list[Tensor]
    optimizer: dict[str, Any]
    rng: dict[str, Any]
    points: list[TrainPoint]

    def save(self, path: Path) -> None:
        """Written whole or not at all; it takes the place of the one before."""
        state = {name: getattr(self, name) for name in ("key", "parameters", "optimizer", "rng")}
        with whole_file(path) as part:
            torch.save(state | {"points": [point.model_dump_json() for point in self.points]}, part)


def load_checkpoint(path: Path, key: str) -> Checkpoint | None:
    """The checkpoint of exactly this training, or None; a damaged one is left alone with a line that says so."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        points = [TrainPoint.model_validate_json(line) for line in state.pop("points")]
    except (UnpicklingError, RuntimeError, EOFError, KeyError, ValueError):
        say("The checkpoint of an earlier training is damaged; starting anew.")
        return None
    return Checkpoint(**state, points=points) if state["key"] == key else None


def random_state() -> dict[str, Any]:
    """State of every generator that dropout draws from."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def copy_into(parameters: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """Take over saved values."""
    with torch.no_grad():
        for parameter, value in zip(parameters, saved, strict=True):
            parameter.copy_(value)
