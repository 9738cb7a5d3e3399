"""A small training as one of a launcher's processes: `train_together.py JSON`, with the fields of `Task`."""

import json
import os
import signal
import sys
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tiny import in_float64
from unstilted.lm.chat import TokenPair
from unstilted.models.load import load_model
from unstilted.models.resolve import BaseModelFiles
from unstilted.processes import is_follower, n_processes
from unstilted.recipe import TrainTable
from unstilted.train import trainer as trainer_module
from unstilted.train.distributed import together
from unstilted.train.trainer import Trainer

warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)

PAIRS = [TokenPair(f"p{n}", [3 + n, 4, 5 + n], [6, 7 + n, 8, 2] * (1 + n % 3), [9 + n, 10, 2]) for n in range(9)]


@dataclass(frozen=True)
class Task:
    model: str
    out: str
    """Folder for `weights.pt`, `result.json` and `tuned/`; a checkpoint found there is gone on from."""
    settings: dict[str, Any]
    wide: bool = False
    """Whether to compute in float64."""
    n_steps: int = 0
    """End after the checkpoint of this step, as if ended from outside."""
    killed: int = -1
    """The process that is killed instead, with no time for a last word."""

    def words(self) -> str:
        return json.dumps(asdict(self))


def train(task: Task) -> None:
    out = Path(task.out)
    with patch.object(trainer_module, "load_model", _wide) if task.wide else nullcontext():
        trainer = Trainer(TrainTable(**task.settings), 0, BaseModelFiles("tiny", Path(task.model), "tiny", "none"), None, PAIRS)
        checkpoint = None if is_follower() else out / "checkpoint.pt"
        trainer.resume(checkpoint, "key")
        save = trainer._save_checkpoint

        def save_and_end(path: Path | None, key: str) -> None:
            save(path, key)
            if len(trainer.points) == task.n_steps:
                if task.killed == trainer.team.index:
                    os.kill(os.getpid(), signal.SIGKILL)
                if task.killed < 0:
                    raise KeyboardInterrupt

        trainer._save_checkpoint = save_and_end  # type: ignore[method-assign]
        trainer.train(PAIRS, PAIRS[:3], checkpoint, "key")
        learnt = trainer.team.whole([parameter.detach().clone() for parameter in trainer.parameters])
        finished = trainer.scale(PAIRS[:3])
        trainer.save(None if is_follower() else out / "tuned")
    if not is_follower():
        torch.save(learnt, out / "weights.pt")
        points = [point.model_dump(mode="json") for point in trainer.points]
        (out / "result.json").write_text(json.dumps({"points": points, "finished": finished.model_dump(mode="json")}))


def _wide(files: BaseModelFiles, *, wide: bool = False) -> Any:
    return in_float64(load_model(files))


if __name__ == "__main__":
    with together() if n_processes() > 1 else nullcontext():
        try:
            train(Task(**json.loads(sys.argv[1])))
        except KeyboardInterrupt:
            print("ended")
