import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from small_chat import TOKENIZER_FILES, write_small_llama
from tiny import tiny_model
from train_together import Task, train
from unstilted.errors import UserError
from unstilted.models.resolve import BaseModelFiles
from unstilted.pipeline import run_pipeline
from unstilted.recipe import TrainTable, recipe_from
from unstilted.train.distributed import GradientSum, deal, make_team, split_up

REPLICAS = ("--multi_gpu",)
SHARDS = ("--use_fsdp", "--fsdp_version", "2")
LORA: dict[str, Any] = {
    "batch_size": 4,
    "eval_every": 2,
    "rank": 4,
    "first_layer_share": 0.3,
    "n_epochs": 2,
    "n_warmup_steps": 1,
    "tokens_per_forward": 30,
}
FULL: dict[str, Any] = LORA | {"tuning": "full", "learning_rate": 1e-4, "strength": 0.5}
DORA: dict[str, Any] = LORA | {"dora": True, "dropout": 0.1, "strength": 0.5}


def launch(kind: tuple[str, ...], *words: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` of two processes without a configuration file, and what came of it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *kind, "--num_processes", "2", "--main_process_port", "0", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def launched(kind: tuple[str, ...], task: Task) -> Path:
    done = launch(kind, str(Path(__file__).parent / "train_together.py"), task.words())
    assert done.returncode == 0, done.stderr
    return Path(task.out)


def alone(task: Task) -> Path:
    Path(task.out).mkdir(exist_ok=True)
    with suppress(KeyboardInterrupt):
        train(task)
    return Path(task.out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, embedded_model: BaseModelFiles) -> Path:
    """Holds tiny models with a tokenizer."""
    made = tmp_path_factory.mktemp("together")
    for name, kind in (("llama", "llama"), ("window", "mistral with a sliding window")):
        tiny_model(kind).float().save_pretrained(made / name)
        for file in TOKENIZER_FILES:
            shutil.copy(embedded_model.folder / file, made / name / file)
    return made


def largest_difference(one: Path, other: Path) -> float:
    """Over what was learnt and what was written, strength applied."""
    (file,) = (one / "tuned").glob("*.safetensors")
    written, learnt = (
        (load_file(file), load_file(other / "tuned" / file.name)),
        [torch.load(path / "weights.pt") for path in (one, other)],
    )
    assert written[0].keys() == written[1].keys()
    pairs = [*zip(*learnt, strict=True), *((written[0][name], written[1][name]) for name in written[0])]
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def losses(out: Path) -> list[float]:
    return [point["loss"] for point in json.loads((out / "result.json").read_text())["points"]]


def test_two_processes_give_the_adapter_of_one(folder: Path, tmp_path: Path) -> None:
    one = alone(Task(str(folder / "llama"), str(tmp_path / "one"), LORA))
    (tmp_path / "two").mkdir()
    two = launched(REPLICAS, Task(str(folder / "llama"), str(tmp_path / "two"), LORA))
    assert largest_difference(one, two) <= 1e-7
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)
    assert len(losses(one)) == 6


@pytest.mark.parametrize(
    ("model", "settings", "wide", "tolerance"),
    [
        ("llama", LORA, False, 1e-6),
        ("llama", DORA, True, 1e-12),
        ("llama", FULL, True, 1e-12),
        ("window", LORA, True, 1e-12),
    ],
    ids=["LoRA in float32", "DoRA with dropout", "all weights", "one answer a forward"],
)
def test_a_model_in_two_shards_learns_what_a_whole_one_does(
    folder: Path, tmp_path: Path, model: str, settings: dict[str, Any], wide: bool, tolerance: float
) -> None:
    one = alone(Task(str(folder / model), str(tmp_path / "one"), settings, wide))
    (tmp_path / "two").mkdir()
    two = launched(SHARDS, Task(str(folder / model), str(tmp_path / "two"), settings, wide))
    assert largest_difference(one, two) <= tolerance
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)


@pytest.mark.parametrize("kind", [REPLICAS, SHARDS], ids=["replicas", "shards"])
@pytest.mark.parametrize("first", ["alone", "together"])
def test_a_training_is_taken_up_by_another_number_of_processes(folder: Path, tmp_path: Path, kind: tuple[str, ...], first: str) -> None:
    whole = alone(Task(str(folder / "llama"), str(tmp_path / "whole"), DORA, True))
    begun, rest = (Task(str(folder / "llama"), str(tmp_path / "in_parts"), DORA, True, n_steps) for n_steps in (2, 0))
    (tmp_path / "in_parts").mkdir()
    if first == "alone":
        alone(begun)
        launched(kind, rest)
    else:
        launched(kind, begun)
        alone(rest)
    assert largest_difference(whole, tmp_path / "in_parts") <= 1e-12
    assert len(losses(tmp_path / "in_parts")) == 6


@pytest.mark.parametrize("killed", [0, 1], ids=["the main one", "another"])
def test_when_a_process_is_killed_all_end_and_the_checkpoint_serves(folder: Path, tmp_path: Path, killed: int) -> None:
    whole = alone(Task(str(folder / "llama"), str(tmp_path / "whole"), LORA))
    (tmp_path / "killed").mkdir()
    task = Task(str(folder / "llama"), str(tmp_path / "killed"), LORA, n_steps=4, killed=killed)
    done = launch(REPLICAS, str(Path(__file__).parent / "train_together.py"), task.words())
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    again = alone(Task(str(folder / "llama"), str(tmp_path / "killed"), LORA))
    assert largest_difference(whole, again) <= 1e-7


def test_deepspeed_is_refused_with_what_does_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="--use_fsdp --fsdp_version 2"):
        make_team(TrainTable(), BaseModelFiles("tiny", tmp_path, "tiny", "none"))


def test_a_whole_run_under_a_launcher_is_that_of_one_process_and_talks_once(tmp_path: Path, embedded_model: BaseModelFiles) -> None:
    write_small_llama(tmp_path / "model", embedded_model)
    values: dict[str, Any] = {
        "model": {"source": str(tmp_path / "model")},
        "pairs": {"n_pairs": 10, "n_held_out": 4},
        "train": {"batch_size": 4, "eval_every": 1, "first_layer_share": 0.0},
        "respond": {"n_prompts": 4, "engine": "transformers", "max_new_tokens": 8},
        "measure": {"n_bootstrap": 100},
    }
    (tmp_path / "recipe.toml").write_text(
        "\n".join(
            f"[{table}]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in rest.items()) for table, rest in values.items()
        )
    )
    run_pipeline(recipe_from(values), tmp_path / "one")
    done = launch(REPLICAS, "-m", "unstilted", "run", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    said = Counter(line.split()[0] for line in done.stderr.splitlines() if line.endswith(" s") and " done in " in line)
    assert said == dict.fromkeys(("pairs", "train", "respond", "measure", "report"), 1)
    adapters = [load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("one", "two")]
    assert all(torch.allclose(adapters[0][name], adapters[1][name], rtol=0, atol=1e-7) for name in adapters[0])
    again = launch(REPLICAS, "-m", "unstilted", "run", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "two"))
    assert again.returncode == 0, again.stderr
    assert "train    unchanged" in again.stderr


@given(st.lists(st.integers(1, 1000), max_size=30), st.integers(1, 8))
def test_every_part_is_dealt_once_and_no_process_gets_two_more_than_another(sizes: list[int], n: int) -> None:
    dealt = deal(sizes, n)
    assert sorted(index for process in dealt for index in process) == list(range(len(sizes)))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_parts_are_dealt_so_that_sums_are_near() -> None:
    assert deal([2, 1, 2, 1, 2], 2) == [[0, 1, 3], [2, 4]]


@given(st.lists(st.integers(1, 5), max_size=8), st.integers(1, 12))
def test_parts_are_split_until_each_process_has_one_and_keep_their_order(sizes: list[int], n: int) -> None:
    items = iter(range(sum(sizes)))
    parts = split_up([[next(items) for _ in range(size)] for size in sizes], n)
    assert [item for part in parts for item in part] == list(range(sum(sizes)))
    assert len(parts) >= min(n, sum(sizes))
    assert all(parts)
    assert len(parts) == max(len(sizes), min(n, sum(sizes)))


def test_the_order_of_packs_does_not_show_in_a_sum_of_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [(torch.randn(50, 3, generator=generator) * 10.0**n, torch.randn(7, generator=generator)) for n in range(-4, 5)]
    parameters = [torch.zeros(50, 3), torch.zeros(7)]
    sums = []
    for order in (gradients, gradients[::-1]):
        total = GradientSum(parameters, across=False)
        for each in order:
            total.add(each)
        total.finish()
        sums.append([parameter.grad for parameter in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*sums, strict=True) if a is not None and b is not None)
    assert sums[0][1] is not None
    torch.testing.assert_close(sums[0][1], torch.stack([each[1] for each in gradients]).sum(0))
