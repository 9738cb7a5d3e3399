"""One file from which a training goes on bit by bit as if it had never stopped."""

import shutil
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
    points: list[TrainPoint]

    def save(self, path: Path) -> None:
        """Written whole or not at all; it takes the place of the one before."""
        state = {name: getattr(self, name) for name in ("key", "parameters", "optimizer")}
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


def clear_parts(path: Path) -> None:
    """Delete what processes that were killed while writing `path` have left beside it. Only for a folder that one process holds."""
    for part in path.parent.glob(f".{path.name}.*.part"):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()
