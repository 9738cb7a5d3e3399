"""The `train` stage as a process of its own that is killed without a word, again and again."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from small_chat import write_small_llama
from unstilted.files import sha256
from unstilted.models.resolve import BaseModelFiles
from unstilted.recipe import recipe_from, recipe_toml
from unstilted.records import write_jsonl
from unstilted.starter import starter_pairs
from unstilted.train import CHECKPOINT


@pytest.fixture
def model(embedded_model: BaseModelFiles, tmp_path: Path) -> Path:
    return write_small_llama(tmp_path / "model", embedded_model)


def run_folder(folder: Path, model: Path) -> Path:
    """A run folder as the `pairs` stage leaves it."""
    folder.mkdir()
    train = {"batch_size": 2, "eval_every": 1, "n_epochs": 4, "rank": 2, "stop_margin": 1e6, "stop_chosen_drop": 1e6, "trackers": []}
    recipe = recipe_from({"model": {"source": str(model)}, "train": train})
    (folder / "recipe.toml").write_text(recipe_toml(recipe))
    pairs = starter_pairs()[:14]
    write_jsonl(folder / "pairs.jsonl", pairs[:12])
    write_jsonl(folder / "held_out.jsonl", pairs[12:])
    return folder


def start(run: Path, cache: Path, n_threads: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {"UNSTILTED_CACHE": str(cache), "OMP_NUM_THREADS": str(n_threads), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "unstilted", "train", str(run)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_killed_at_any_moment_and_run_again_it_ends_in_the_bytes_of_an_uninterrupted_training(
    model: Path, tmp_path: Path, n_threads: int
) -> None:
    whole, killed = run_folder(tmp_path / "whole", model), run_folder(tmp_path / "killed", model)
    whole_process = start(whole, tmp_path / "cache of whole", n_threads)
    whole_process.communicate(timeout=120)
    assert whole_process.returncode == 0
    chance, n_killed = random.Random(n_threads), 0
    for _ in range(3):
        process = start(killed, tmp_path / "cache of killed", n_threads)
        checkpoint, seen = killed / CHECKPOINT, time.time()
        while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime > seen):
            time.sleep(0.002)
        time.sleep(chance.random() * 0.1)  # into a step, a look or the writing of the next checkpoint
        process.kill()
        process.communicate()
        n_killed += process.returncode < 0
    assert n_killed >= 2
    last = start(killed, tmp_path / "cache of killed", n_threads)
    words = last.communicate(timeout=120)[1].decode()
    assert last.returncode == 0, words
    assert "Going on from step" in words
    assert sha256(killed / "adapter") == sha256(whole / "adapter")
    assert (killed / "train.jsonl").read_bytes() == (whole / "train.jsonl").read_bytes()
    assert not (killed / CHECKPOINT).exists()
