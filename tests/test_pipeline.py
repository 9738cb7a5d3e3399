"""Whole runs: one on the embedded model, and many on a small random model in processes that get killed."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from small_chat import write_small_llama
from unstilted.cli import main
from unstilted.errors import UserError
from unstilted.models.load import load_model, load_tokenizer
from unstilted.models.resolve import BaseModelFiles
from unstilted.pipeline import STAGES, run_pipeline
from unstilted.recipe import Recipe, recipe_from, recipe_toml
from unstilted.records import ARMS, Measures, Response, TrainPoint, read_jsonl
from unstilted.rundir import StageEntry

NAMES = [stage.name for stage in STAGES]


def merged(recipe: Recipe, **tables: dict[str, Any]) -> Recipe:
    """The recipe with some settings of some tables changed."""
    values = recipe.model_dump(mode="json")
    return recipe_from(values | {name: values[name] | changes for name, changes in tables.items()})


# One run on the embedded model


@pytest.fixture(scope="session")
def embedded_recipe() -> Recipe:
    return recipe_from(
        {
            "pairs": {"n_pairs": 8, "n_held_out": 2},
            "train": {"batch_size": 2, "eval_every": 2},
            "respond": {"n_prompts": 4, "max_new_tokens": 24},
            "measure": {"n_bootstrap": 200},
        }
    )


@pytest.fixture(scope="session")
def whole_run(embedded_model: BaseModelFiles, embedded_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedded") / "run"
    run_pipeline(embedded_recipe, folder)
    return folder


def manifest(folder: Path) -> dict[str, StageEntry]:
    stages = json.loads((folder / "manifest.json").read_text())["stages"]
    return {name: StageEntry.model_validate(entry) for name, entry in stages.items()}


def test_a_whole_run_writes_every_file_and_enters_every_stage(whole_run: Path) -> None:
    entries = manifest(whole_run)
    assert list(entries) == NAMES
    for stage in STAGES:
        assert set(entries[stage.name].outputs) == set(stage.writes)
        assert all((whole_run / name).exists() for name in stage.writes)
    assert not list(whole_run.glob(".*.part"))
    assert not (whole_run / "train.checkpoint.pt").exists()
    points = read_jsonl(whole_run / "train.jsonl", TrainPoint)
    assert [point.step for point in points] == list(range(1, points[0].n_steps + 1))
    assert points[-1].held_out is not None
    assert [row.arm for row in read_jsonl(whole_run / "responses.jsonl", Response)][::4] == list(ARMS)
    assert Measures.model_validate_json((whole_run / "measures.json").read_text()).n_prompts == 4


def test_peft_loads_the_adapter_unchanged_and_it_moves_the_model(whole_run: Path, embedded_model: BaseModelFiles) -> None:
    from peft import PeftModel

    base = load_model(embedded_model)
    ids = torch.tensor([load_tokenizer(embedded_model)("my train is late again")["input_ids"]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
        after = PeftModel.from_pretrained(base, whole_run / "adapter")(input_ids=ids).logits
    assert 0 < float((after - before).abs().max()) < 10


def test_report_and_model_card_name_the_licence_of_the_weights(whole_run: Path) -> None:
    assert "Apache-2.0" in (whole_run / "report.html").read_text()
    assert "license: apache-2.0" in (whole_run / "README.md").read_text()


RUN_AGAIN = """
import sys, time
from unstilted.cli import main
start = time.monotonic()
code = main(sys.argv[1:])
assert "torch" not in sys.modules and "transformers" not in sys.modules, "heavy"
print("seconds", time.monotonic() - start)
sys.exit(code)
"""


def test_a_second_run_finds_every_stage_unchanged_at_once_and_without_torch(whole_run: Path) -> None:
    words = ["run", str(whole_run / "recipe.toml"), "--out", str(whole_run)]
    done = subprocess.run([sys.executable, "-c", RUN_AGAIN, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stderr.splitlines()] == [[name, "unchanged"] for name in NAMES]
    assert f"{whole_run / 'report.html'}" in done.stdout
    assert float(done.stdout.split("seconds")[1]) < 5


def test_a_changed_setting_redoes_its_stage_and_all_behind_it_and_nothing_before(
    whole_run: Path, embedded_recipe: Recipe, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    before = manifest(folder)
    run_pipeline(merged(embedded_recipe, respond={"temperature": 0.9, "n_prompts": 2, "max_new_tokens": 8}), folder)
    after = manifest(folder)
    assert [name for name in NAMES if before[name] == after[name]] == ["pairs", "train"]
    assert [name for name in NAMES if before[name].inputs != after[name].inputs] == ["measure", "report"]


def test_redo_does_a_stage_and_all_behind_it_again(whole_run: Path, embedded_recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    before = manifest(folder)
    run_pipeline(embedded_recipe, folder, redo="measure")
    after = manifest(folder)
    assert [name for name in NAMES if before[name].outputs == after[name].outputs] == ["pairs", "train", "respond", "measure"]
    assert list(after) == NAMES


# A small random model, short pairs, and processes of their own


@pytest.fixture(scope="module")
def small_recipe(embedded_model: BaseModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("small")
    write_small_llama(folder / "model", embedded_model)
    rows = [
        {"prompt": f"what about the number {n}", "chosen": f"Sure, {n} is a nice one, isn't it.", "rejected": f"{n} is considered."}
        for n in range(90)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe_from(
        {
            "model": {"source": str(folder / "model")},
            "pairs": {"source": str(folder / "pairs.jsonl"), "n_held_out": 2},
            "train": {"batch_size": 2, "n_epochs": 6, "eval_every": 4, "rank": 32, "stop_margin": 1e6, "stop_chosen_drop": 1e6},
            "respond": {"n_prompts": 60, "max_new_tokens": 6, "n_parallel": 2, "temperature": 0.8},
            "measure": {"n_bootstrap": 200},
        }
    )


@pytest.fixture(scope="module")
def uninterrupted(small_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_pipeline(small_recipe, folder)
    return folder


def process_of(recipe: Recipe, folder: Path) -> subprocess.Popen[str]:
    """`unstilted run` as a user starts it."""
    file = folder.parent / "recipe.toml"
    file.write_text(recipe_toml(recipe))
    words = [sys.executable, "-W", "ignore", "-c", "import sys; from unstilted.cli import main; sys.exit(main())"]
    return subprocess.Popen([*words, "run", str(file), "--out", str(folder)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not is_so():
        assert process.poll() is None, f"ended before it could be stopped: {process.communicate()[1]}"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def stop(process: subprocess.Popen[str], by: signal.Signals) -> str:
    """End exactly this process and return what it said on stderr."""
    process.send_signal(by)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == (130 if by == signal.SIGINT else -by), said
    return said


def contents(folder: Path) -> dict[str, bytes]:
    """All that the run made and that may not depend on when it was interrupted: everything but times and places."""
    names = ("pairs.jsonl", "held_out.jsonl", "train.jsonl", "responses.jsonl", "measures.json", "scores.jsonl")
    adapter = {f"adapter/{file.name}": file.read_bytes() for file in (folder / "adapter").iterdir()}
    return adapter | {name: (folder / name).read_bytes() for name in names}


def test_a_training_interrupted_and_killed_goes_on_to_the_same_bytes(small_recipe: Recipe, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    checkpoint = folder / "train.checkpoint.pt"
    first = process_of(small_recipe, folder)
    wait_until(checkpoint.exists, first)
    with pytest.raises(UserError) as refused:
        run_pipeline(small_recipe, folder)
    assert str(refused.value) == f"{folder}: another unstilted process is using this run folder. Wait for it, or choose another with --out."
    assert stop(first, signal.SIGINT).endswith("\nStopped. Run the same command again to go on from here.\n")
    assert checkpoint.exists()

    saved = checkpoint.stat().st_mtime_ns
    second = process_of(small_recipe, folder)
    wait_until(lambda: checkpoint.stat().st_mtime_ns != saved, second)
    assert "Going on from step " in stop(second, signal.SIGKILL)
    assert list(manifest(folder)) == ["pairs"]

    run_pipeline(small_recipe, folder)
    assert contents(folder) == contents(uninterrupted)
    assert not checkpoint.exists()


def test_answers_written_before_a_kill_are_kept(small_recipe: Recipe, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder, ignore=shutil.ignore_patterns("answers"))
    recipe = merged(small_recipe, respond={"max_new_tokens": 7})
    process = process_of(recipe, folder)
    wait_until(lambda: any(journal.stat().st_size > 2000 for journal in folder.glob("answers/base-*")), process)
    stop(process, signal.SIGKILL)
    (journal,) = folder.glob("answers/base-*")
    kept = journal.read_bytes().rpartition(b"\n")[0] + b"\n"
    n_kept = kept.count(b"\n")
    assert 0 < n_kept < 60
    assert list(manifest(folder)) == ["pairs", "train", "measure", "report"]  # respond's old entry is gone, its answers no longer count

    marked = [json.loads(line) | {"text": "kept as it was"} for line in kept.splitlines()]  # a mark that no model writes
    journal.write_text("".join(json.dumps(row) + "\n" for row in marked))
    run_pipeline(recipe, folder)
    texts = [row.text for row in read_jsonl(folder / "responses.jsonl", Response)]
    assert texts.count("kept as it was") == n_kept
    assert len(texts) == 3 * 60


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB; skipped where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def leave(disk: Path, n_bytes: int) -> None:
    """Fill the disk up to `n_bytes`."""
    (disk / "ballast").unlink(missing_ok=True)
    (disk / "ballast").write_bytes(b"\0" * (shutil.disk_usage(disk).free - n_bytes))


@pytest.mark.parametrize(("stage", "n_bytes"), [("train", 90_000), ("respond", 50_000)])
def test_a_full_disk_is_told_and_the_next_run_goes_on(
    small_recipe: Recipe,
    uninterrupted: Path,
    small_disk: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    n_bytes: int,
) -> None:
    file, folder = tmp_path / "recipe.toml", small_disk / "run"
    file.write_text(recipe_toml(small_recipe))
    if stage == "respond":  # from where training is done
        shutil.copytree(uninterrupted, folder, ignore=shutil.ignore_patterns("answers", "responses.jsonl", "train.checkpoint.pt"))
    leave(small_disk, n_bytes)
    assert main(["run", str(file), "--out", str(folder)]) == 1
    said = capsys.readouterr().err
    assert f"{stage}    ..." in said or f"{stage}  ..." in said
    assert said.endswith("the disk is full. Free some space and run the same command again; finished work is kept.\n")
    assert stage not in manifest(folder)
    assert not list(folder.glob(".*.part"))

    (small_disk / "ballast").unlink()
    assert main(["run", str(file), "--out", str(folder)]) == 0
    assert "pairs    unchanged" in capsys.readouterr().err
    assert contents(folder) == contents(uninterrupted)


# Refused before any model is loaded


NO_MODEL = {"source": "/nowhere/at/all"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pairs": {"source": "{tmp}/none.jsonl"}, "model": NO_MODEL}, "{tmp}/none.jsonl: there is no such file. "),
        ({"pairs": {"source": "{tmp}/bad.jsonl"}, "model": NO_MODEL}, "{tmp}/bad.jsonl: 2 of 2 rows are no usable pair."),
        ({"pairs": {"n_held_out": 512}, "model": NO_MODEL}, "starter: the number of usable pairs is 512, but n_held_out is 512"),
        ({"respond": {"prompts": "{tmp}/none.jsonl"}, "model": NO_MODEL}, "{tmp}/none.jsonl: there is no such file. "),
        ({"respond": {"prompts": "{tmp}/bad.jsonl"}, "model": NO_MODEL}, "bad.jsonl line 1: this row has no 'prompt'."),
        ({"model": NO_MODEL}, "/nowhere/at/all: there is no such folder. "),
    ],
)
def test_what_the_recipe_names_wrongly_is_refused_before_anything_else_is_done(
    tmp_path: Path, settings: dict[str, dict[str, Any]], said: str
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"question": 1}\n{"prompt": "x", "chosen": "y"}\n')
    recipe = recipe_from(json.loads(json.dumps(settings).replace("{tmp}", str(tmp_path))))
    with pytest.raises(UserError) as refused:
        run_pipeline(recipe, tmp_path / "run")
    assert str(refused.value).startswith(said.replace("{tmp}", str(tmp_path)))
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]


def test_llama_cpp_for_a_model_without_gguf_is_refused_before_training(small_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^respond\.engine: llama\.cpp needs a GGUF file"):
        run_pipeline(merged(small_recipe, respond={"engine": "embedded"}), tmp_path / "run")
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_refusal_loads_no_heavy_library(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom unstilted.cli import main\n"
        "assert main(['run', '--pairs.source', 'nothing.jsonl']) == 1\n"
        "assert not {'torch', 'transformers', 'xllamacpp', 'sklearn'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("unstilted: nothing.jsonl: there is no such file.")
