"""The trainer's gradient against the plainest DPO step: one forward a conversation, every loss written out, float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from tiny import in_float64, plain_token_logps, tiny_model
from unstilted.lm.chat import TokenPair
from unstilted.lm.score import Scorer
from unstilted.models.resolve import BaseModelFiles
from unstilted.recipe import TrainTable
from unstilted.train.references import References
from unstilted.train.trainer import Trainer

PAIRS = [  # lengths far apart: a mean over tokens or over packs would differ from one over pairs
    TokenPair("a", [5, 6, 7, 8], [9, 10, 2], [9, 11, 12, 2]),
    TokenPair("b", [5, 6, 7, 8], [9, 10, 2], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 2]),
    TokenPair("c", [50], [2], [51, 2]),
    TokenPair("d", [5, 6], list(range(20, 50)), [7, 8, 2]),
    TokenPair("e", [60, 61, 62], [63, 2], [63, 2, 64]),
    TokenPair("f", [70, 71], [72, 73, 74, 2], [75, 2]),
    TokenPair("g", [70, 71], [72, 73, 76, 2], [2]),
    TokenPair("h", list(range(3, 40)), [41, 2], [42, 43, 2]),
]
LOSSES: list[dict[str, Any]] = [
    {"loss": "sigmoid"},
    {"loss": "sigmoid", "label_smoothing": 0.2},
    {"loss": "robust", "label_smoothing": 0.1},
    {"loss": "hinge"},
    {"loss": "ipo"},
    {"loss": "sigmoid_norm", "beta": 3.0},
    {"loss": "simpo", "beta": 2.0, "simpo_gamma": 0.7},
    {"loss": "orpo"},
]


@pytest.fixture(scope="module", params=[0.0, 0.4], ids=["all layers adapted", "the upper two"])
def trainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """In float64, with an adapter that has been trained a little."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama with biases").float().save_pretrained(folder)
    table = TrainTable(first_layer_share=request.param, rank=3)
    made = Trainer(table, 0, BaseModelFiles("tiny", folder, "tiny", "none"))
    in_float64(made.model.get_base_model())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    made.scorer = Scorer(made.model)
    assert made.scorer.trunk is not None
    assert made.scorer.shares_trunk == (request.param > 0)
    return made


def learnt(trainer: Trainer, is_cold: bool = True, **changes: Any) -> tuple[Tensor, list[Tensor]]:
    """Losses (B,) and gradients of one batch of all pairs; references computed on the way, or known before."""
    trainer.settings = TrainTable(**(trainer.settings.model_dump() | {"tokens_per_forward": 30, "label_smoothing": 0.0} | changes))
    trainer.references = References(None, "tiny", "float64")
    if not is_cold:
        trainer._complete_references(PAIRS)
    outcome = trainer.learn(PAIRS)
    gradients = [parameter.grad for parameter in trainer.parameters if parameter.grad is not None]
    assert len(gradients) == len(trainer.parameters)
    trainer.optimizer.zero_grad()
    return outcome.loss, gradients


def plain(trainer: Trainer) -> tuple[Tensor, list[Tensor]]:
    model = trainer.model
    with torch.no_grad(), model.disable_adapter():
        base = [[plain_token_logps(model, pair.prompt, answer).sum() for answer in (pair.chosen, pair.rejected)] for pair in PAIRS]
    losses = torch.stack([plain_loss(trainer, pair, reference) for pair, reference in zip(PAIRS, base, strict=True)])
    return losses.detach(), list(torch.autograd.grad(losses.mean(), trainer.parameters))


def plain_loss(trainer: Trainer, pair: TokenPair, reference: list[Tensor]) -> Tensor:
    settings, e, beta = trainer.settings, trainer.settings.label_smoothing, trainer.settings.beta
    chosen, rejected = (plain_token_logps(trainer.model, pair.prompt, answer) for answer in (pair.chosen, pair.rejected))
    won, lost = chosen.sum() - reference[0], rejected.sum() - reference[1]
    n_won, n_lost = len(pair.chosen), len(pair.rejected)

    def smoothed(margin: Tensor) -> Tensor:
        return -(1 - e) * logsigmoid(margin) - e * logsigmoid(-margin)

    def odds(logps: Tensor) -> Tensor:
        return logps.mean().exp() / (1 - logps.mean().exp())

    match settings.loss:
        case "sigmoid":
            loss = smoothed(beta * (won - lost))
        case "robust":
            margin = beta * (won - lost)
            loss = (-(1 - e) * logsigmoid(margin) + e * logsigmoid(-margin)) / (1 - 2 * e)
        case "hinge":
            loss = relu(1 - beta * (won - lost))
        case "ipo":
            loss = (won / n_won - lost / n_lost - 1 / (2 * beta)) ** 2
        case "sigmoid_norm":
            loss = smoothed(beta * (won / n_won - lost / n_lost))
        case "simpo":
            loss = smoothed(beta * (chosen.mean() - rejected.mean()) - settings.simpo_gamma)
        case "orpo":
            loss = -chosen.mean() - beta * logsigmoid((odds(chosen) / odds(rejected)).log())
    return loss - settings.nll_weight * chosen.mean()


def assert_same(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]], within: float = 1e-9) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=within)
    for one, other in zip(found[1], expected[1], strict=True):
        assert (one - other).norm() <= within * other.norm()


@pytest.mark.parametrize("is_cold", [True, False], ids=["cold", "warm"])
@pytest.mark.parametrize("nll_weight", [0.0, 0.7])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: " ".join(map(str, loss.values())))
def test_the_gradient_is_that_of_the_plain_mean_over_pairs(
    trainer: Trainer, loss: dict[str, Any], nll_weight: float, is_cold: bool
) -> None:
    found = learnt(trainer, is_cold, nll_weight=nll_weight, **({"beta": 0.1} | loss))
    assert_same(found, plain(trainer))


@pytest.mark.parametrize("tokens_per_forward", [1, 60, 100_000])
def test_one_forward_of_eight_pairs_equals_eight_forwards_of_one(trainer: Trainer, tokens_per_forward: int) -> None:
    table = {"loss": "sigmoid", "beta": 0.1, "nll_weight": 0.7}
    one_by_one = learnt(trainer, tokens_per_forward=1, **table)
    assert len(trainer._packed(PAIRS)) == len(PAIRS)
    found = learnt(trainer, tokens_per_forward=tokens_per_forward, **table)
    assert tokens_per_forward < 100_000 or len(trainer._packed(PAIRS)) == 1
    assert_same(found, one_by_one, 1e-10)


def test_in_float32_packing_changes_the_gradient_by_no_more_than_rounding(tmp_path: Path) -> None:
    tiny_model("llama with biases").float().save_pretrained(tmp_path / "tiny")
    trainer = Trainer(TrainTable(rank=3), 0, BaseModelFiles("tiny", tmp_path / "tiny", "tiny", "none"))
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    assert trainer.model.dtype == torch.float32
    eight, one = (learnt(trainer, tokens_per_forward=n) for n in (1, 100_000))
    whole = [torch.cat([gradient.flatten() for gradient in gradients]) for _, gradients in (eight, one)]
    assert (whole[0] - whole[1]).norm() <= 1e-6 * whole[1].norm()


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("is_cold", [True, False], ids=["cold", "warm"])
def test_one_and_two_worker_threads_give_the_same_bits(trainer: Trainer, is_cold: bool) -> None:
    results = []
    for n_threads in (1, 2, 2):
        with torch_threads(n_threads), trainer.working():
            assert (trainer._map is not map) == (n_threads == 2)
            loss, gradients = learnt(trainer, is_cold, loss="sigmoid", beta=0.1, nll_weight=0.7)
        results.append([tensor.numpy().tobytes() for tensor in (loss, *gradients)])
    assert results[0] == results[1] == results[2]
