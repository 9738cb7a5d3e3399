"""Ours against TRL on the embedded model and real pairs, in float32, with an adapter that changes what the model says.

What this costs decides its size: on one core a pair takes TRL three seconds and us up to two. So plain DPO is compared on 32 pairs spread
over the whole starter set, token by token and with its gradient. Every other loss is a formula over the same log-probabilities, and
`test_losses_trl.py` compares the formulas on many values: one pair shows that loss and gradient arrive, with a forward and a backward of
its own on both sides, since a fast implementation may do part of the backward in the forward.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from trl_oracle import Opinion, TokenLogps, TrlOracle, adapter, whole_text
from unstilted.lm.chat import ChatTokens, TokenPair
from unstilted.lm.score import Scorer, packs
from unstilted.lm.tree import Request
from unstilted.losses import PairLogps, chosen_nll, preference_loss
from unstilted.models.load import load_model, load_tokenizer
from unstilted.models.resolve import BaseModelFiles
from unstilted.recipe import LossName, TrainTable
from unstilted.starter import starter_pairs
from unstilted.train.adapter import add_adapter

N_PAIRS = 32
ONE = (1,)  # its margin is negative, so that no loss is flat there
Loss = Callable[[TokenLogps, TokenLogps], Tensor]
"""A pair's loss, shape (1,), from its policy and its reference log-probabilities."""


@dataclass(frozen=True)
class Sides:
    """The same pairs and the same weights, held by us and by TRL."""

    pairs: list[TokenPair]
    scorer: Scorer
    trl: TrlOracle

    def ours(self, which: Iterable[int], loss: Loss) -> Opinion:
        """What our functions say where TRL is asked the same; pairs share forwards as they do in training."""
        model = self.scorer.adapted_model.train()
        model.zero_grad()
        losses, policy, reference = [], list[TokenLogps](), list[TokenLogps]()
        requests = [Request(pair.prompt, [pair.chosen, pair.rejected]) for pair in (self.pairs[index] for index in which)]
        for pack in packs(requests, TrainTable().tokens_per_forward):
            part = [requests[index] for index in pack]
            base = [TokenLogps(*logps) for logps in self.scorer.token_logps(part, adapted=False)]
            own = [TokenLogps(*logps) for logps in self.scorer.token_logps(part)]
            values = torch.cat([loss(*both) for both in zip(own, base, strict=True)])
            (values.sum() / len(requests)).backward()
            losses.append(values.detach())
            policy, reference = policy + own, reference + base
        return Opinion(torch.cat(losses), {name: value.grad for name, value in adapter(model).items()}, policy, reference)


@pytest.fixture(scope="module")
def sides(embedded_model: BaseModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    tokenizer = load_tokenizer(embedded_model)
    chat = ChatTokens(tokenizer, embedded_model.name)
    rows = starter_pairs()
    pairs = [chat.pair(row) for row in rows[:: len(rows) // N_PAIRS]]
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    trl = TrlOracle(load_model(embedded_model).float(), tokenizer, pairs, lora, tmp_path_factory.mktemp("trl"))
    model = add_adapter(load_model(embedded_model).float(), TrainTable(rank=8, alpha=16, first_layer_share=0.0))
    fill(adapter(model), adapter(trl.model))
    return Sides(pairs, Scorer(model), trl)


def fill(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """One random adapter for both sides; it moves the log-probability of a token by 0.2 nats, of a response by a few, either way."""
    assert ours.keys() == theirs.keys()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in ours.items():
        random = torch.randn(parameter.shape, generator=generator) * (0.02 if "lora_B" in name else parameter.shape[1] ** -0.5)
        with torch.no_grad():
            parameter.copy_(random)
            theirs[name].copy_(random)


def named(
    name: LossName, *, beta: float = 0.1, label_smoothing: float = 0.0, gamma: float = 0.0, weight: float = 1.0, nll_weight: float = 0.0
) -> Loss:
    """Our loss of this name times `weight`, plus the anchor times `nll_weight`."""

    def loss(policy: TokenLogps, reference: TokenLogps) -> Tensor:
        own, base = pair_logps(policy), pair_logps(reference)
        value = preference_loss(name, own, base, beta=beta, label_smoothing=label_smoothing, simpo_gamma=gamma)
        return weight * value + nll_weight * chosen_nll(own)

    return loss


def pair_logps(logps: TokenLogps) -> PairLogps:
    counts = (torch.tensor([len(side)]) for side in (logps.chosen, logps.rejected))
    return PairLogps(logps.chosen.sum()[None], logps.rejected.sum()[None], *counts)


def assert_agree(ours: Opinion, trl: Opinion) -> None:
    """Loss to 1e-5 and gradient (L2 over all parameters) to 1e-4, both relative."""
    assert ours.losses.mean().item() == pytest.approx(trl.losses.mean().item(), rel=1e-5)
    torch.testing.assert_close(ours.losses, trl.losses, rtol=1e-4, atol=0)
    mine, other = (torch.cat([side.gradients[name].flatten() for name in trl.gradients]) for side in (ours, trl))
    assert other.norm() > 0
    assert (mine - other).norm() <= 1e-4 * other.norm()


def test_dpo_on_real_pairs_is_trl_s_token_by_token_and_in_its_gradient(sides: Sides) -> None:
    ours, trl = sides.ours(range(N_PAIRS), named("sigmoid")), sides.trl.dpo(range(N_PAIRS), {"sigmoid": 1.0})
    for mine, other in zip([*ours.policy, *ours.reference], [*trl.policy, *trl.reference], strict=True):
        torch.testing.assert_close(mine.chosen, other.chosen, rtol=0, atol=1e-4)
        torch.testing.assert_close(mine.rejected, other.rejected, rtol=0, atol=1e-4)
    assert_agree(ours, trl)
    assert sides.scorer.trunk is not None  # that was the fast way


def test_dpo_by_way_of_transformers_is_trl_s_too(sides: Sides) -> None:
    plain = replace(sides, scorer=Scorer(sides.scorer.adapted_model, by_hand=False))
    assert_agree(plain.ours(ONE, named("sigmoid")), sides.trl.dpo(ONE, {"sigmoid": 1.0}))


CASES: dict[str, tuple[Loss, Callable[[TrlOracle], Opinion]]] = {
    # TRL 1.16 has label smoothing for "aot" only, which sorts a batch's log-ratios; with one pair a batch it is conservative DPO.
    "conservative": (named("sigmoid", label_smoothing=0.1), lambda trl: trl.dpo(ONE, {"aot": 1.0}, label_smoothing=0.1)),
    "robust": (named("robust", label_smoothing=0.1), lambda trl: trl.dpo(ONE, {"robust": 1.0}, label_smoothing=0.1)),
    "ipo": (named("ipo"), lambda trl: trl.dpo(ONE, {"ipo": 1.0})),
    "hinge": (named("hinge"), lambda trl: trl.dpo(ONE, {"hinge": 1.0})),
    "length-normalised": (named("sigmoid_norm", beta=5.0), lambda trl: trl.dpo(ONE, {"sigmoid_norm": 1.0}, beta=5.0)),
    "with an NLL term": (named("sigmoid", weight=0.5, nll_weight=2.0), lambda trl: trl.dpo(ONE, {"sigmoid": 0.5, "sft": 2.0})),
    "simpo": (named("simpo", beta=2.5, gamma=1.4), lambda trl: trl.simpo(ONE, beta=2.5, gamma=1.4)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_other_loss_is_trl_s_with_its_gradient(sides: Sides, case: str) -> None:
    loss, ask = CASES[case]
    assert_agree(sides.ours(ONE, loss), ask(sides.trl))


def test_orpo_on_the_whole_text_is_trl_s_with_its_gradient(sides: Sides) -> None:
    whole = replace(sides, pairs=[whole_text(pair) for pair in sides.pairs])
    assert_agree(whole.ours(ONE, named("orpo", beta=0.5)), sides.trl.orpo(ONE, weight=0.5))
