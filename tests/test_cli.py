import json
import statistics
import subprocess
import sys
import time
import tomllib
from errno import EDQUOT, ENOSPC
from pathlib import Path

import pytest

from unstilted import pipeline
from unstilted.cli import main
from unstilted.recipe import Recipe, load_recipe, recipe_from, recipe_toml
from unstilted.records import Pair, read_jsonl

HEAVY = ("torch", "transformers", "peft", "accelerate", "numpy", "sklearn", "xllamacpp", "gguf", "rich.progress", "jinja2")
HELP = f"""
import sys
from unstilted.cli import main
try:
    main(["--help"])
except SystemExit as left:
    assert left.code == 0, left.code
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
"""


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command that fails with exit code 1 says on stderr; it says nothing on stdout."""
    assert main(words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def unparsed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What tyro says of a command line with exit code 2, without its boxes."""
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Recipe, Path, str]]:
    """What `unstilted run` was going to do; nothing is done."""
    calls: list[tuple[Recipe, Path, str]] = []
    monkeypatch.setattr(pipeline, "run_pipeline", lambda *call: calls.append(call))
    monkeypatch.setattr("unstilted.cli._print_result", lambda out: None)
    monkeypatch.chdir(tmp_path)
    return calls


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    """0.25 s on an idle machine of 2025; the bound is wide because tests also run where everything else wants the cores."""
    times = []
    for _ in range(5):
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False)
        times.append(time.monotonic() - start)
        assert done.returncode == 0, done.stderr
        assert "run" in done.stdout
    assert statistics.median(times) < 0.6


def test_help_names_every_stage_and_every_setting_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for table_name, table in Recipe():
        for field_name in getattr(table, "model_fields_set", ()) or getattr(type(table), "model_fields", ()):
            assert f"--{table_name}.{field_name}".replace("_", "-") in text
    assert "How strongly the tuned model is held to the base model" in text


def test_the_commands_are_the_stages_and_run_and_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    text = unparsed(capsys, "rnu")
    assert f"Available subcommands: run, {', '.join(stage.name for stage in pipeline.STAGES)}, recipe" in text


def test_a_misspelled_option_is_answered_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    text = unparsed(capsys, "run", "--train.batch-sise", "3")
    assert "Unrecognized options: --train.batch-sise" in text
    assert "Perhaps you meant: --train.batch-size INT" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--train.rank", "1.5"), "--train.rank: invalid literal"), (("--train.beta", "-1"), "Input should be greater than 0")],
)
def test_a_value_that_a_setting_cannot_have_is_refused(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str) -> None:
    assert said in unparsed(capsys, "run", *words)


def test_a_seed_out_of_range_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "run", "--seed", "99999999999") == (
        "unstilted: --seed is 99999999999: input should be less than 2147483648. Change the value.\n"
    )


def test_a_misspelled_setting_in_the_recipe_is_refused_with_its_line_and_the_nearest_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("seed = 4\n[train]\nlearnin_rate = 1.0\n")
    assert refused(capsys, "run", str(file)) == (
        f"unstilted: {file} line 3: 'train.learnin_rate' is not a setting. Did you mean 'learning_rate'?\n"
    )


def test_a_missing_recipe_is_refused_before_anything_is_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = refused(capsys, "run", str(tmp_path / "nothing.toml"), "--out", str(tmp_path / "run"))
    assert text == f"unstilted: {tmp_path}/nothing.toml: there is no such recipe. `unstilted recipe` prints one to start from.\n"
    assert not (tmp_path / "run").exists()


def test_an_unknown_stage_cannot_be_redone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = refused(capsys, "run", "--out", str(tmp_path / "run"), "--redo", "tarin")
    assert text == "unstilted: --redo: 'tarin' is no stage. Stages: pairs, train, respond, measure, report.\n"
    assert not (tmp_path / "run").exists()


def test_what_is_left_out_keeps_its_default(ran: list[tuple[Recipe, Path, str]]) -> None:
    assert main(["run"]) == 0
    assert ran == [(Recipe(), Path("runs/default"), "")]


def test_options_override_the_recipe_file_which_overrides_the_defaults(ran: list[tuple[Recipe, Path, str]]) -> None:
    Path("mine.toml").write_text("seed = 4\n[train]\nbeta = 0.3\nrank = 2\n[respond]\nprompts = 'p.jsonl'\n")
    words = ["--train.rank", "5", "--train.target-modules", "q_proj", "v_proj", "--out", "there", "--redo", "train"]
    assert main(["run", "mine.toml", *words]) == 0
    wanted = {"rank": 5, "beta": 0.3, "target_modules": ["q_proj", "v_proj"]}
    assert ran == [(recipe_from({"seed": 4, "train": wanted, "respond": {"prompts": "p.jsonl"}}), Path("there"), "train")]


def test_a_recipe_behind_an_option_is_refused_and_never_left_unread(
    capsys: pytest.CaptureFixture[str], ran: list[tuple[Recipe, Path, str]]
) -> None:
    Path("mine.toml").write_text("seed = 4\n")
    assert refused(capsys, "run", "--train.rank", "5", "mine.toml") == (
        "unstilted: command line: 'mine.toml' stands behind an option. Write `unstilted run mine.toml`, then options.\n"
    )
    assert refused(capsys, "train", "--train.rank", "5", "there") == (
        "unstilted: command line: 'there' stands behind an option. Write `unstilted train there`, then options.\n"
    )
    assert ran == []


def test_a_stage_is_done_with_the_recipe_of_its_folder_and_the_options(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.toml").write_text("seed = 4\n[pairs]\nn_pairs = 20\n")
    assert main(["pairs", str(folder), "--pairs.n-held-out", "8"]) == 0
    used = load_recipe(folder / "recipe.toml")
    assert (used.seed, used.pairs.n_pairs, used.pairs.n_held_out) == (4, 20, 8)
    assert len(read_jsonl(folder / "pairs.jsonl", Pair)) == 20
    assert len(read_jsonl(folder / "held_out.jsonl", Pair)) == 8
    assert list(json.loads((folder / "manifest.json").read_text())["stages"]) == ["pairs"]


def test_a_stage_of_a_folder_that_is_no_run_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert refused(capsys, "measure", str(tmp_path)).startswith(f"unstilted: {tmp_path}: this is no run folder.")


def test_a_stage_without_what_it_reads_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("")
    text = refused(capsys, "measure", str(tmp_path))
    assert text.splitlines()[-1] == f"unstilted: {tmp_path}: stage 'measure' needs 'responses.jsonl'. Run the stage before it."


def test_the_printed_recipe_loads_back_as_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe"]) == 0
    text = capsys.readouterr().out
    assert text == recipe_toml(Recipe())
    assert recipe_from(tomllib.loads(text)) == Recipe()


@pytest.mark.parametrize(("error", "place"), [(OSError(ENOSPC, "", "/r/x.jsonl"), "/r/x.jsonl: "), (OSError(EDQUOT, ""), "")])
def test_a_full_disk_is_told_in_one_line_without_a_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, error: OSError, place: str
) -> None:
    """A disk that is really full is in test_pipeline."""

    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run_pipeline", failing)
    assert refused(capsys, "run", "--out", str(tmp_path / "run")) == (
        f"unstilted: {place}the disk is full. Free some space and run the same command again; finished work is kept.\n"
    )


def test_ctrl_c_is_answered_with_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_pipeline", interrupted)
    assert main(["run", "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "\nStopped. Run the same command again to go on from here.\n"


def test_any_other_error_of_the_system_keeps_its_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pipeline, "run_pipeline", failing)
    with pytest.raises(PermissionError):
        main(["run", "--out", str(tmp_path / "run")])
