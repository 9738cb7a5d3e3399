"""What the terminal shows while a stage works."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from unstilted.processes import is_follower
from unstilted.records import HeldOut, TrainPoint

console = Console(stderr=True, highlight=False, emoji=False, quiet=is_follower())
"""Progress goes to stderr, results to stdout; of several processes only the main one shows any."""


def say(text: str) -> None:
    """One line about what is going on."""
    console.print(text, markup=False, soft_wrap=True)


def bar(unit: str) -> Progress:
    """A progress bar that counts `unit`s and tells the time left."""
    return Progress(
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


class TrainProgress:
    """A bar over optimizer steps with the figures that tell whether training goes well; one line a held-out look."""

    def __init__(self, n_steps: int, batch_size: int) -> None:
        self.bar, self.n_steps, self.batch_size = bar("steps"), n_steps, batch_size
        self.task = self.bar.add_task("training", total=n_steps)
        self.start = time.monotonic()
        self.n_pairs_before: int | None = None
        """Pairs of an earlier process whose training goes on here."""

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def show(self, point: TrainPoint) -> None:
        if self.n_pairs_before is None:
            self.n_pairs_before = point.n_pairs - self.batch_size
        rate = (point.n_pairs - self.n_pairs_before) / max(1e-9, time.monotonic() - self.start)
        self.bar.update(self.task, completed=point.step, description=f"loss {point.loss:.3f}  {rate:.2f} pairs/s")
        if point.held_out is not None:
            say(f"  step {point.step:3}/{self.n_steps}  loss {point.loss:.3f}  {_look(point.held_out)}, gradient {point.gradient_norm:.2f}")


def _look(held: HeldOut) -> str:
    kl = "" if held.kl is None else f", KL {held.kl:.3f} a token"
    return (
        f"held-out: margin {held.margin:.2f}, accuracy {held.accuracy:.2f}, chosen {held.chosen_logp_change:+.1f} nats, "
        f"rejected {held.rejected_logp_change:+.1f} nats{kl}"
    )
