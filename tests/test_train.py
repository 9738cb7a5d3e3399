import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import tiny_model
from unstilted.errors import UserError
from unstilted.lm.chat import TokenPair
from unstilted.models.resolve import BaseModelFiles
from unstilted.recipe import TrainTable
from unstilted.train.schedule import batches, learning_rate
from unstilted.train.trainer import Trainer

PAIRS = [TokenPair(f"p{n}", [3 + n, 4, 5 + n], [6, 7 + n, 8, 2], [9 + n, 10, 2]) for n in range(6)]


@pytest.fixture
def tiny_files(tmp_path: Path) -> BaseModelFiles:
    """A tiny Llama on disk, as the resolver would give it."""
    tiny_model().float().save_pretrained(tmp_path / "tiny")
    return BaseModelFiles("tiny", tmp_path / "tiny", "tiny", "none")


def settings(**changes: Any) -> TrainTable:
    few: dict[str, Any] = {
        "batch_size": 2,
        "eval_every": 1,
        "first_layer_share": 0.3,
        "rank": 4,
        "learning_rate": 1e-2,
        "n_warmup_steps": 1,
    }
    return TrainTable(**(few | changes))


def trained(files: BaseModelFiles, folder: Path, table: TrainTable, seed: int = 0) -> Trainer:
    trainer = Trainer(table, seed, files)
    trainer.train(PAIRS, PAIRS[:2], folder / "checkpoint.pt", "key")
    return trainer


def weights(trainer: Trainer) -> list[bytes]:
    return [parameter.detach().numpy().tobytes() for parameter in trainer.parameters]


def test_before_the_first_step_policy_and_reference_agree(tiny_files: BaseModelFiles) -> None:
    outcome = Trainer(settings(nll_weight=0.0), 0, tiny_files).learn(PAIRS)
    assert outcome.loss.tolist() == pytest.approx([math.log(2)] * len(PAIRS), abs=1e-6)
    assert outcome.margin.tolist() == pytest.approx([0] * len(PAIRS), abs=1e-6)


def test_training_widens_the_held_out_margin(tiny_files: BaseModelFiles, tmp_path: Path) -> None:
    points = trained(tiny_files, tmp_path, settings(n_epochs=3)).points
    margins = [point.held_out.margin for point in points if point.held_out]
    assert margins[-1] > margins[0] + 0.01
    assert [point.n_pairs for point in points] == [2, 4, 6, 8, 10, 12, 14, 16, 18]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tiny_files: BaseModelFiles, tmp_path: Path) -> None:
    first, again = (trained(tiny_files, tmp_path, settings(dropout=0.2)) for _ in range(2))
    assert weights(first) == weights(again)
    assert first.points == again.points
    assert weights(trained(tiny_files, tmp_path, settings(dropout=0.2), seed=1)) != weights(first)


def test_a_resumed_training_ends_in_the_same_bytes_as_an_uninterrupted_one(tiny_files: BaseModelFiles, tmp_path: Path) -> None:
    table = settings(dropout=0.2, n_epochs=2)
    whole = trained(tiny_files, tmp_path, table)
    checkpoint = tmp_path / "killed.pt"
    kept = tmp_path / "references.sqlite"  # another order of pairs would compute them in other packs, which shows in the last bit
    killed = Trainer(table, 0, tiny_files, kept)
    save = killed._save_checkpoint

    def save_and_die(path: Path, key: str) -> None:
        save(path, key)
        if len(killed.points) == 2:
            raise KeyboardInterrupt

    killed._save_checkpoint = save_and_die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        killed.train(PAIRS, PAIRS[:2], checkpoint, "key")
    resumed = Trainer(table, 0, tiny_files, kept)
    resumed.resume(checkpoint, "key")
    assert len(resumed.points) == 2
    resumed.train(PAIRS, PAIRS[:2], checkpoint, "key")
    assert weights(resumed) == weights(whole)
    assert resumed.points == whole.points


def test_a_checkpoint_of_another_training_is_left_alone(tiny_files: BaseModelFiles, tmp_path: Path) -> None:
    trained(tiny_files, tmp_path, settings())
    other = Trainer(settings(), 0, tiny_files)
    other.resume(tmp_path / "checkpoint.pt", "another key")
    assert other.points == []


def test_only_layers_from_the_share_up_are_adapted_and_peft_loads_the_folder(tiny_files: BaseModelFiles, tmp_path: Path) -> None:
    from peft import PeftModel

    trainer = trained(tiny_files, tmp_path, settings(first_layer_share=0.5))
    trainer.save(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [1, 2]
    loaded = PeftModel.from_pretrained(tiny_model().float(), tmp_path / "adapter")
    ids = torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_an_unknown_target_module_is_refused(tiny_files: BaseModelFiles) -> None:
    with pytest.raises(UserError, match=r"train.target_modules: no adapter can be put on this model"):
        Trainer(settings(target_modules=("wq",)), 0, tiny_files)


def test_every_epoch_sees_every_pair_once_in_a_new_order() -> None:
    steps = batches(n_pairs=7, batch_size=3, n_epochs=2, seed=4)
    assert [len(step) for step in steps] == [3, 3, 1, 3, 3, 1]
    first, second = ([index for step in epoch for index in step] for epoch in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second


def test_the_learning_rate_warms_up_then_falls_along_a_cosine() -> None:
    table = settings(learning_rate=1.0, n_warmup_steps=2)
    rates = [learning_rate(step, 6, table) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.5 * (1 + math.cos(3 * math.pi / 4))])


def test_strength_goes_into_the_saved_adapter_and_into_the_last_look(tiny_files: BaseModelFiles, tmp_path: Path) -> None:
    from peft import PeftModel

    trainer = trained(tiny_files, tmp_path, settings(strength=0.25, n_epochs=2))
    before = trainer.evaluate(PAIRS[:2])
    after = trainer.scale(PAIRS[:2])
    assert 0 < after.margin < before.margin
    trainer.save(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model().float(), tmp_path / "adapter")

    by_hand = trained(tiny_files, tmp_path, settings(n_epochs=2))
    with torch.no_grad():
        for name, parameter in by_hand.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.25)
    ids = torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(loaded(ids).logits, by_hand.model.eval()(ids).logits)


def test_a_damaged_checkpoint_means_starting_anew(tiny_files: BaseModelFiles, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pt"
    for content in (b"garbage", b""):
        damaged.write_bytes(content)
        trainer = Trainer(settings(), 0, tiny_files)
        trainer.resume(damaged, "key")
        assert trainer.points == []
