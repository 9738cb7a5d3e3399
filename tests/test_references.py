"""Reference log-probabilities on disk: found by content alone, and never a crash or a wrong number."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from small_chat import write_small_llama
from tiny import tiny_model
from unstilted.lm.chat import TokenPair
from unstilted.lm.score import Scorer
from unstilted.models.resolve import BaseModelFiles, resolve_model
from unstilted.recipe import ModelTable, TrainTable
from unstilted.train.references import References
from unstilted.train.trainer import Trainer

PAIRS = [TokenPair(f"p{n}", [3 + n, 4, 5 + n], [6, 7 + n, 8, 2], [9 + n, 10, 2]) for n in range(6)]


def some_scores(pair: TokenPair) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers that belong to this pair and no other."""
    start = float(pair.prompt[0])
    return -start - torch.arange(len(pair.chosen)) / 7, -start - torch.arange(len(pair.rejected)) / 3


def filled(path: Path, pairs: list[TokenPair] = PAIRS) -> Path:
    """A database with the scores of some pairs."""
    kept = References(path, "model", "float32")
    kept.add(pairs, [some_scores(pair) for pair in pairs])
    kept.flush()
    return path


def known(path: Path, pairs: list[TokenPair] = PAIRS) -> References:
    found = References(path, "model", "float32")
    found.load(pairs)
    for pair in pairs:
        if pair in found:
            for read, written in zip(found[pair], some_scores(pair), strict=True):
                assert read.tolist() == written.double().tolist()
    return found


# What hits and what misses: counted in forwards of the base model


class CountingScorer(Scorer):
    """Counts the conversations that the base model reads."""

    n_base = 0

    def token_logps(self, requests: Any, *, adapted: bool = True) -> Any:
        if not adapted:
            self.n_base += len(requests)
        return super().token_logps(requests, adapted=adapted)

    def both(self, requests: Any) -> Any:
        self.n_base += len(requests)
        return super().both(requests)


def base_reads(files: BaseModelFiles, cache: Path, pairs: list[TokenPair] = PAIRS, seed: int = 0, **settings: Any) -> int:
    """How many pairs the base model had to read in a training of one epoch."""
    few: dict[str, Any] = {"batch_size": 2, "eval_every": 1, "first_layer_share": 0.3, "rank": 4, "learning_rate": 1e-3}
    trainer = Trainer(TrainTable(**(few | settings)), seed, files, cache / "references.sqlite")
    trainer.scorer = CountingScorer(trainer.model)
    trainer.divergence.keeps_base = False  # it asks for hidden states, once a training
    trainer.train(pairs, pairs[:2], cache / "checkpoint.pt", "key")
    return trainer.scorer.n_base


@pytest.fixture
def files(tmp_path: Path) -> BaseModelFiles:
    tiny_model().float().save_pretrained(tmp_path / "tiny")
    return BaseModelFiles("tiny", tmp_path / "tiny", "tiny", "none")


def test_a_second_training_asks_the_base_model_nothing_whatever_its_settings(files: BaseModelFiles, tmp_path: Path) -> None:
    assert base_reads(files, tmp_path) == len(PAIRS)
    for changed in ({"rank": 2}, {"learning_rate": 3e-4}, {"beta": 0.3}, {"loss": "ipo"}, {"n_epochs": 2}, {"dropout": 0.1}):
        assert base_reads(files, tmp_path, **changed) == 0, changed
    assert base_reads(files, tmp_path, seed=1) == 0


def test_one_changed_token_makes_the_base_model_read_that_pair(files: BaseModelFiles, tmp_path: Path) -> None:
    base_reads(files, tmp_path)
    for side in ("prompt", "chosen", "rejected"):
        ids = [*getattr(PAIRS[3], side)[:-1], 50]
        changed = TokenPair(
            **({"id": "p3", "prompt": PAIRS[3].prompt, "chosen": PAIRS[3].chosen, "rejected": PAIRS[3].rejected} | {side: ids})
        )
        assert base_reads(files, tmp_path, [*PAIRS[:3], changed, *PAIRS[4:]]) == 1, side


def test_the_same_tokens_divided_otherwise_are_another_pair() -> None:
    kept = References(None, "model", "float32")
    assert kept.key(TokenPair("a", [1, 2], [3], [4])) != kept.key(TokenPair("a", [1], [2, 3], [4]))
    assert kept.key(TokenPair("a", [1, 2], [3], [4])) == kept.key(TokenPair("another id", [1, 2], [3], [4]))


def change_a_weight(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def change_the_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text() + "{# changed #}")


def change_the_vocabulary(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"truncation": None}, indent=1))


@pytest.mark.parametrize("change", [change_a_weight, change_the_template, change_the_vocabulary])
def test_another_model_finds_nothing(embedded_model: BaseModelFiles, tmp_path: Path, change: Callable[[Path], None]) -> None:
    folder = write_small_llama(tmp_path / "model", embedded_model)

    def found() -> int:
        kept = References(tmp_path / "references.sqlite", resolve_model(ModelTable(source=str(folder))).fingerprint, "float32")
        n_known = kept.load(PAIRS)
        kept.add(PAIRS, [some_scores(pair) for pair in PAIRS])
        kept.flush()
        return n_known

    assert [found(), found()] == [0, len(PAIRS)]
    change(folder)
    assert found() == 0


def test_another_precision_finds_nothing(tmp_path: Path) -> None:
    filled(tmp_path / "references.sqlite")
    assert References(tmp_path / "references.sqlite", "model", "bfloat16").load(PAIRS) == 0


# Damage


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE reference SET logps = zeroblob(56)",
        "UPDATE reference SET logps = substr(logps, 1, 48)",
        "UPDATE reference SET logps = 'words'",
        "UPDATE reference SET logps = (SELECT logps FROM reference LIMIT 1), sha256 = (SELECT sha256 FROM reference LIMIT 1)",
        "UPDATE reference SET sha256 = ''",
        "UPDATE reference SET sha256 = CAST(x'ff' AS TEXT)",
    ],
)
def test_rows_that_are_not_what_was_written_count_as_missing(tmp_path: Path, damage: str) -> None:
    path = filled(tmp_path / "references.sqlite")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(damage)
    found = known(path)
    assert sum(pair in found for pair in PAIRS) <= 1  # the row that was copied onto the others is still right for itself
    filled(path)
    assert all(pair in known(path) for pair in PAIRS)


@pytest.mark.parametrize("n_kept", [0, 5, 4096, 5000])
def test_a_damaged_file_is_said_and_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str], n_kept: int) -> None:
    path = filled(tmp_path / "references.sqlite")
    path.write_bytes(path.read_bytes()[:n_kept] + os.urandom(20_000))
    found = known(path)
    assert not any(pair in found for pair in PAIRS)
    assert f"{path} is damaged (" in " ".join(capsys.readouterr().err.split())
    filled(path)
    assert all(pair in known(path) for pair in PAIRS)


def test_bytes_turned_anywhere_in_the_file_never_give_a_wrong_number(tmp_path: Path) -> None:
    good = filled(tmp_path / "good.sqlite", [TokenPair(f"p{n}", [n], [n, 2], [n + 1, 2]) for n in range(60)]).read_bytes()
    generator, path = torch.Generator().manual_seed(0), tmp_path / "bad.sqlite"
    for place in torch.randint(len(good), (60,), generator=generator).tolist():
        bad = bytearray(good)
        bad[place : place + 40] = bytes(byte ^ 0x5A for byte in bad[place : place + 40])
        path.write_bytes(bad)
        known(path, [TokenPair(f"p{n}", [n], [n, 2], [n + 1, 2]) for n in range(60)])


def test_numbers_that_are_none_are_not_kept_for_later_runs(tmp_path: Path) -> None:
    path = tmp_path / "references.sqlite"
    kept = References(path, "model", "float32")
    kept.add(PAIRS[:1], [(torch.full((4,), float("nan")), torch.zeros(3))])
    kept.flush()
    assert References(path, "model", "float32").load(PAIRS) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KB; skipped where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(folder)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def keep_in_memory_only(path: Path, said: Callable[[], str]) -> None:
    """Two flushes that can't reach the disk: no error, right numbers, one line that tells."""
    kept = References(path, "model", "float32")
    for pair in PAIRS[:2]:
        kept.add([pair], [some_scores(pair)])
        kept.flush()
    assert kept[PAIRS[1]][0].tolist() == some_scores(PAIRS[1])[0].double().tolist()
    text = " ".join(said().split())
    assert text.count("reference log-probabilities are kept in memory only.") == 1
    assert f"{path} can't be used (" in text


def test_a_folder_that_cannot_be_made_or_a_folder_in_the_place_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cache").write_text("a file")
    keep_in_memory_only(tmp_path / "cache" / "references.sqlite", lambda: capsys.readouterr().err)
    (tmp_path / "references.sqlite").mkdir()
    keep_in_memory_only(tmp_path / "references.sqlite", lambda: capsys.readouterr().err)


def test_a_full_disk_keeps_the_numbers_in_memory(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = filled(small_disk / "references.sqlite", PAIRS[3:])
    (small_disk / "ballast").write_bytes(b"\0" * shutil.disk_usage(small_disk).free)
    keep_in_memory_only(path, lambda: capsys.readouterr().err)
    assert [pair in known(path) for pair in PAIRS] == [False] * 3 + [True] * 3


def test_a_disk_that_may_only_be_read_still_serves(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = filled(small_disk / "references.sqlite", PAIRS[3:])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert [pair in known(path) for pair in PAIRS] == [False] * 3 + [True] * 3
    assert capsys.readouterr().err == ""
    keep_in_memory_only(path, lambda: capsys.readouterr().err)


WRITE_MANY = """
import sys, torch
from pathlib import Path
from unstilted.lm.chat import TokenPair
from unstilted.train.references import References
kept = References(Path(sys.argv[1]), "model", "float32")
for n in range(int(sys.argv[2]), 400, 2):
    pair = TokenPair("p", [n], [4, 2], [5, 2])
    kept.add([pair], [(torch.tensor([-1.0 * n, -2.0]), torch.tensor([-3.0, -4.0]))])
    kept.flush()
"""


def test_two_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "references.sqlite"
    processes = [subprocess.Popen([sys.executable, "-c", WRITE_MANY, str(path), str(first)], stderr=subprocess.PIPE) for first in (0, 1)]
    assert [(process.communicate()[1], process.returncode) for process in processes] == [(b"", 0)] * 2
    pairs = [TokenPair("p", [n], [4, 2], [5, 2]) for n in range(400)]
    found = References(path, "model", "float32")
    assert found.load(pairs) == 400
    assert all(found[pair][0].tolist() == [-n, -2] for n, pair in enumerate(pairs))


def test_ten_thousand_pairs_are_looked_up_in_a_second(tmp_path: Path) -> None:
    pairs = [TokenPair(f"p{n}", [n, *range(50)], list(range(80)), list(range(84))) for n in range(10_000)]
    path = tmp_path / "references.sqlite"
    kept = References(path, "model", "float32")
    kept.add(pairs, [(torch.zeros(80), torch.zeros(84))] * len(pairs))
    kept.flush()
    start = time.process_time()
    assert References(path, "model", "float32").load(pairs) == len(pairs)
    assert time.process_time() - start < 1
