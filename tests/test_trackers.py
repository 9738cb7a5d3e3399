"""Curves in TensorBoard's own files, read back with its own reader, and trackers that aren't there."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from small_chat import write_small_llama
from unstilted import train
from unstilted.errors import UserError
from unstilted.models.resolve import BaseModelFiles
from unstilted.recipe import recipe_from
from unstilted.records import HeldOut, TrainPoint, write_jsonl
from unstilted.rundir import RunDir
from unstilted.starter import starter_pairs
from unstilted.train.trackers import check_trackers, figures, open_trackers

LOOK = HeldOut(loss=2.0, margin=0.5, accuracy=0.75, chosen_logp_change=1.5, rejected_logp_change=-2.5, loss_margin=0.5, kl=0.125)


def point(step: int, held_out: HeldOut | None = None, loss: float = 3.0) -> TrainPoint:
    return TrainPoint(
        step=step,
        n_steps=9,
        n_pairs=8 * step,
        loss=loss,
        margin=0.25,
        learning_rate=0.001,
        gradient_norm=4.0,
        held_out=held_out,
    )


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve that TensorBoard shows of a folder: (step, value)s by name."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer  # type: ignore[import-untyped]

    reader = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    (run,) = reader.Runs()
    return {tag: [(event.step, event.value) for event in reader.Scalars(run, tag)] for tag in reader.Runs()[run]["scalars"]}


def test_tensorboard_shows_every_figure_at_its_step(tmp_path: Path) -> None:
    with open_trackers(["tensorboard"], tmp_path / "trackers", 0, {"beta": 0.1}) as trackers:
        trackers.log(point(1))
        trackers.log(point(2, LOOK))
    shown = curves(tmp_path / "trackers")
    assert shown == {
        "train/loss": [(1, 3.0), (2, 3.0)],
        "train/margin": [(1, 0.25), (2, 0.25)],
        "train/learning_rate": [(1, pytest.approx(0.001)), (2, pytest.approx(0.001))],
        "train/gradient_norm": [(1, 4.0), (2, 4.0)],
    } | {f"held_out/{name}": [(2, value)] for name, value in LOOK.model_dump().items()}


def test_what_was_not_measured_is_no_curve() -> None:
    assert "held_out/kl" not in figures(point(1, LOOK.model_copy(update={"kl": None})))
    assert not any(name.startswith("held_out") for name in figures(point(1)))


def test_a_training_that_goes_on_continues_its_curves_and_what_was_lost_is_not_shown_twice(tmp_path: Path) -> None:
    folder = tmp_path / "trackers"
    with open_trackers(["tensorboard"], folder, 0, {}) as trackers:
        for step in (1, 2, 3, 4):
            trackers.log(point(step, loss=5.0))
    with open_trackers(["tensorboard"], folder, 2, {}) as trackers:  # killed after step 4, its checkpoint was that of step 2
        for step in (3, 4, 5):
            trackers.log(point(step, loss=6.0))
    assert curves(folder)["train/loss"] == [(1, 5.0), (2, 5.0), (3, 6.0), (4, 6.0), (5, 6.0)]


def test_a_new_training_takes_the_place_of_the_curves_before(tmp_path: Path) -> None:
    for loss in (5.0, 6.0):
        with open_trackers(["tensorboard"], tmp_path / "trackers", 0, {}) as trackers:
            trackers.log(point(1, loss=loss))
    assert curves(tmp_path / "trackers")["train/loss"] == [(1, 6.0)]
    assert len([file for file in (tmp_path / "trackers").rglob("*") if file.is_file()]) == 1


def test_without_trackers_there_is_no_folder(tmp_path: Path) -> None:
    with open_trackers([], tmp_path / "trackers", 0, {}) as trackers:
        trackers.log(point(1))
    assert not (tmp_path / "trackers").exists()


@pytest.mark.parametrize("is_resumed", [False, True])
def test_the_stage_logs_into_the_run_folder(
    embedded_model: BaseModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_resumed: bool
) -> None:
    write_small_llama(tmp_path / "model", embedded_model)
    pairs, run_dir = starter_pairs()[:8], RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    write_jsonl(run_dir.file("pairs.jsonl"), pairs[:6])
    write_jsonl(run_dir.file("held_out.jsonl"), pairs[6:])
    recipe = recipe_from({"model": {"source": str(tmp_path / "model")}, "train": {"batch_size": 2, "eval_every": 1, "rank": 2}})
    assert recipe.train.trackers == ("tensorboard",)
    if is_resumed:

        def die(*words: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(train, "write_jsonl", die)  # after the last step
            with pytest.raises(KeyboardInterrupt):
                train.run(recipe, run_dir)
    train.run(recipe, run_dir)
    losses = [json.loads(line)["loss"] for line in run_dir.file("train.jsonl").read_text().splitlines()]
    assert curves(run_dir.file("trackers"))["train/loss"] == [(step, pytest.approx(loss)) for step, loss in enumerate(losses, start=1)]


def test_an_unknown_tracker_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'train\.trackers'.*'tensorboard', 'wandb', 'trackio' or 'mlflow'"):
        recipe_from({"train": {"trackers": ["tensorflow"]}})


def test_a_tracker_that_is_not_installed_is_refused_with_the_line_that_installs_it() -> None:
    missing = next((name for name in ("trackio", "mlflow", "wandb") if find_spec(name) is None), None)
    if missing is None:
        pytest.skip("every tracker is installed here")
    check_trackers(["tensorboard"])
    with pytest.raises(UserError) as refused:
        train.check(recipe_from({"train": {"trackers": ["tensorboard", missing]}}))
    assert str(refused.value) == (
        f"train.trackers: the tracker '{missing}' is not installed. pip install {missing}, or leave it out: the report has the same curves."
    )
