"""Curves sent to experiment trackers while training, by the names that accelerate gives them."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from unstilted.errors import UserError
from unstilted.recipe import TrackerName
from unstilted.records import TrainPoint

PROJECT = "unstilted"


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raise UserError for the first tracker whose package isn't installed; imports none of them."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"the tracker '{name}' is not installed.",
                where="train.trackers",
                do=f"pip install {name}, or leave it out: the report has the same curves.",
            )


class Trackers:
    """The chosen trackers of one training, open."""

    def __init__(self, trackers: Sequence[Any]) -> None:
        self._trackers = trackers

    def log(self, point: TrainPoint) -> None:
        for tracker in self._trackers:
            tracker.log(figures(point), step=point.step)


def figures(point: TrainPoint) -> dict[str, float]:
    """A step's figures by the names under which trackers show them; what wasn't measured is left out."""
    seen = {f"train/{name}": getattr(point, name) for name in ("loss", "margin", "learning_rate", "gradient_norm")}
    held_out = point.held_out.model_dump(exclude_none=True) if point.held_out else {}
    return seen | {f"held_out/{name}": value for name, value in held_out.items()}


@contextmanager
def open_trackers(names: Sequence[TrackerName], folder: Path, n_done: int, settings: dict[str, Any]) -> Iterator[Trackers]:
    """Start trackers that log into `folder` where they log into files at all; what an earlier training left there is deleted.

    n_done: steps of this training already done by a process before; they are kept, and what that process logged after them goes.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if n_done == 0 and folder.exists():
        shutil.rmtree(folder)
    own: dict[str, dict[str, Any]] = {
        "tensorboard": {"logging_dir": str(folder), "purge_step": n_done + 1},
        "wandb": {"dir": str(folder)},
    }
    if names:
        folder.mkdir(parents=True, exist_ok=True)
    trackers = [LOGGER_TYPE_TO_CLASS[name](PROJECT, **own.get(name, {})) for name in names]
    for tracker in trackers:
        tracker.start()
        if tracker.name != "tensorboard":  # its form of settings is a run of its own in every view
            tracker.store_init_configuration(settings)
    try:
        yield Trackers(trackers)
    finally:
        for tracker in trackers:
            tracker.finish()
