"""The training curves: which lines of `train.jsonl` are drawn, and how to read each plot."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from unstilted.recipe import WITHOUT_REFERENCE, LossName
from unstilted.records import HeldOut, TrainPoint
from unstilted.report.plots import Chart, Line, moving_mean

WINDOW = 5
"""Steps in the moving mean of noisy batch figures."""


def training_charts(points: tuple[TrainPoint, ...], loss: LossName) -> list[Chart]:
    """Small multiples over optimizer steps; a plot without a value is left out."""
    return [chart for chart in _charts(points, loss) if chart.lines]


def _charts(points: tuple[TrainPoint, ...], loss: LossName) -> Iterator[Chart]:
    margin = _held_out_line(points, "held-out", "tuned", lambda held: held.margin)
    accuracy = _held_out_line(points, "held-out", "tuned", lambda held: held.accuracy)
    if loss not in WITHOUT_REFERENCE:  # against base no margin is above 0 yet
        margin, accuracy = _from_zero(margin), _from_zero(accuracy)
    yield Chart(
        "loss",
        "Loss",
        f"Falling is learning; held-out turning up while training falls is memorizing. Training: mean of {WINDOW} steps.",
        _lines(_train_line(points, lambda point: point.loss), _held_out_line(points, "held-out", "tuned", lambda held: held.loss)),
    )
    yield Chart(
        "margin",
        "Margin (nats, times beta)",
        f"Above 0 the model prefers the human-like answer more than base does. Training: mean of {WINDOW} steps.",
        _lines(_train_line(points, lambda point: point.margin), margin),
    )
    yield Chart(
        "accuracy",
        "Held-out pairs told apart (share)",
        "Pairs whose margin is above 0. At 1 after a few steps the two sides differ on the surface, and this says no more.",
        _lines(accuracy),
    )
    yield Chart(
        "logps",
        "Held-out log-probability against base (nats)",
        "Chosen should stay near 0 or rise while rejected falls; chosen far below 0 means that good answers were unlearned as well.",
        _lines(
            _from_zero(_held_out_line(points, "rejected", "base", lambda held: held.rejected_logp_change)),
            _from_zero(_held_out_line(points, "chosen", "tuned", lambda held: held.chosen_logp_change)),
        ),
    )
    yield Chart(
        "kl",
        "Distance from base (KL, nats a token)",
        "How far the tuned model's word choices are from base on held-out answers. The less it takes for the same margin, the better.",
        _lines(_from_zero(_kl_line(points))),
    )
    yield Chart(
        "gradient",
        "Gradient norm",
        "Before it is cut to the recipe's max_gradient_norm. Spikes or steady growth: the learning rate is too high.",
        _lines(Line("gradient", tuple((float(point.step), point.gradient_norm) for point in points), "base")),
    )
    yield Chart(
        "rate",
        "Learning rate",
        "The step size that was scheduled, up to where training ended.",
        _lines(Line("rate", tuple((float(point.step), point.learning_rate) for point in points), "base")),
    )


def _train_line(points: tuple[TrainPoint, ...], value: Callable[[TrainPoint], float]) -> Line:
    means = moving_mean([value(point) for point in points], WINDOW)
    return Line("training", tuple((float(point.step), mean) for point, mean in zip(points, means, strict=True)), "base")


def _held_out_line(points: tuple[TrainPoint, ...], label: str, css: str, value: Callable[[HeldOut], float]) -> Line:
    looks = tuple((float(point.step), value(point.held_out)) for point in points if point.held_out is not None)
    return Line(label, looks, css, has_dots=True)


def _kl_line(points: tuple[TrainPoint, ...]) -> Line:
    looks = [(point.step, point.held_out.kl) for point in points if point.held_out is not None]
    return Line("tuned", tuple((float(step), kl) for step, kl in looks if kl is not None), "tuned", has_dots=True)


def _from_zero(line: Line) -> Line:
    """The line from step 0 on, where the adapter changes nothing yet and so the value is 0 by definition."""
    return replace(line, points=((0.0, 0.0), *line.points)) if line.points else line


def _lines(*lines: Line) -> tuple[Line, ...]:
    return tuple(line for line in lines if line.points)
