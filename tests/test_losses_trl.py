"""The losses beside TRL's own code, in float64, on random log-probabilities: TRL's loss methods run without a model or a trainer."""

import os
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # CPO and ORPO live in trl.experimental, which warns when imported

import pytest
import torch
from torch import Tensor
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from unstilted.losses import NEEDS_REFERENCE, PairLogps, chosen_nll, odds_ratio_loss, preference_loss, reward_margin
from unstilted.recipe import LossName

BETAS = (0.05, 0.1, 2.5)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class WideTensor(Tensor):
    """float64 that stays so: TRL's odds ratio narrows what it gets by `.float()`."""

    def float(self, *_: Any) -> Tensor:
        return self


@dataclass(frozen=True)
class TokenPair:
    """Token log-probabilities of one pair's two responses under policy (with gradient) and reference, each of shape (T,)."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor

    @property
    def policy(self) -> PairLogps:
        return PairLogps(self.chosen.sum()[None], self.rejected.sum()[None], *self._counts)

    @property
    def reference(self) -> PairLogps:
        return PairLogps(self.reference_chosen.sum()[None], self.reference_rejected.sum()[None], *self._counts)

    @property
    def _counts(self) -> tuple[Tensor, Tensor]:
        return torch.tensor([len(self.chosen)]), torch.tensor([len(self.rejected)])


def token_pairs() -> list[TokenPair]:
    """Twelve pairs of responses of 1 to 80 tokens; the policy's log-probabilities are about 30 % off the reference's, either way."""
    generator = torch.Generator().manual_seed(0)

    def side(length: int) -> tuple[Tensor, Tensor]:
        reference = -2 * torch.rand(length, dtype=torch.float64, generator=generator) ** 2 - 0.01
        moved = reference * torch.exp(0.3 * torch.randn(length, dtype=torch.float64, generator=generator))
        return moved.requires_grad_(), reference

    def pair(n_chosen: int, n_rejected: int) -> TokenPair:
        (chosen, reference_chosen), (rejected, reference_rejected) = side(n_chosen), side(n_rejected)
        return TokenPair(chosen, rejected, reference_chosen, reference_rejected)

    lengths = torch.randint(1, 81, (11, 2), generator=generator).tolist()
    return [pair(1, 30), *(pair(*both) for both in lengths)]


PAIRS = token_pairs()


def dpo_of_trl(pair: TokenPair, loss_type: str, beta: float, label_smoothing: float = 0.0) -> tuple[Tensor, float]:
    """Loss and `rewards/margins` of DPOTrainer._compute_loss for a batch of this pair behind a prompt of three tokens."""
    n_prompt, n_longest = 3, max(len(pair.chosen), len(pair.rejected))

    def row(logps: Tensor) -> tuple[Tensor, Tensor]:
        """Padded log-probabilities of the predicted positions, and the completion mask of all of them."""
        n_pad = n_longest - len(logps)
        nothing = logps.new_zeros
        mask = [0] * n_prompt + [1] * len(logps) + [0] * n_pad
        return torch.cat([nothing(n_prompt - 1), logps, nothing(n_pad)]), torch.tensor(mask)

    rows = [row(pair.chosen), row(pair.rejected)]
    log_probs, completion_mask = (torch.stack(part) for part in zip(*rows, strict=True))
    unused = torch.zeros_like(log_probs).detach()
    outputs = SimpleNamespace(log_probs=log_probs, entropy=unused, mean_logits=unused, is_top1=unused.bool())
    metrics: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics=metrics,
        _total_train_tokens=0,
    )
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": pair.reference.chosen,
        "ref_rejected_logps": pair.reference.rejected,
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return loss, metrics["eval"]["rewards/margins"][0]


def cpo_of_trl(pair: TokenPair, loss_type: str, beta: float, gamma: float, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Loss and margin of CPOTrainer.cpo_loss for token averages, which its SimPO is given."""
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        loss_type=loss_type,
        alpha=0.0,
        beta=beta,
        simpo_gamma=gamma,
        label_smoothing=label_smoothing,
    )
    losses, chosen_rewards, rejected_rewards = CPOTrainer.cpo_loss(trainer, pair.chosen.mean()[None], pair.rejected.mean()[None])
    return losses, chosen_rewards - rejected_rewards


def orpo_of_trl(pair: TokenPair, beta: float) -> tuple[Tensor, Tensor]:
    """Odds-ratio term (to be added to an NLL) and margin of ORPOTrainer.odds_ratio_loss."""
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=beta)
    means = (logps.mean()[None].as_subclass(WideTensor) for logps in (pair.chosen, pair.rejected))
    gains, chosen_rewards, rejected_rewards, *_ = ORPOTrainer.odds_ratio_loss(trainer, *means)
    return -gains.as_subclass(Tensor), (chosen_rewards - rejected_rewards).as_subclass(Tensor)


def assert_same(ours: Tensor, theirs: Tensor, pair: TokenPair) -> None:
    """Equal values and equal gradients in every token's log-probability."""
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), **EXACT)
    gradients = (torch.autograd.grad(loss.sum(), (pair.chosen, pair.rejected), retain_graph=True) for loss in (ours, theirs))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, **EXACT)


def loss_of(name: LossName, pair: TokenPair, beta: float, label_smoothing: float = 0.0, gamma: float = 0.5) -> Tensor:
    reference = pair.reference if name in NEEDS_REFERENCE else None
    return preference_loss(name, pair.policy, reference, beta=beta, label_smoothing=label_smoothing, simpo_gamma=gamma)


def test_the_pairs_meet_both_sides_of_every_kink() -> None:
    margins = torch.cat([reward_margin("hinge", pair.policy, pair.reference, beta=beta) for pair in PAIRS for beta in BETAS])
    assert (margins > 1).any()
    assert ((margins > 0) & (margins < 1)).any()
    assert (margins < 0).any()
    assert {len(pair.chosen) > len(pair.rejected) for pair in PAIRS} == {True, False}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "sigmoid_norm"])
def test_losses_with_a_reference_are_trl_s_of_the_same_name(name: LossName, beta: float) -> None:
    for pair in PAIRS:
        assert_same(loss_of(name, pair, beta), dpo_of_trl(pair, name, beta)[0], pair)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("flip_rate", [0.0, 0.1, 0.4])
def test_the_robust_loss_is_trl_s(flip_rate: float, beta: float) -> None:
    for pair in PAIRS:
        assert_same(loss_of("robust", pair, beta, flip_rate), dpo_of_trl(pair, "robust", beta, flip_rate)[0], pair)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("label_smoothing", [0.1, 0.4])
def test_the_conservative_loss_is_trl_s_aot_of_a_single_pair(label_smoothing: float, beta: float) -> None:
    # TRL 1.16 has no label smoothing for "sigmoid". Its "aot" has, on sorted log-ratios, and one pair is sorted.
    for pair in PAIRS:
        assert_same(loss_of("sigmoid", pair, beta, label_smoothing), dpo_of_trl(pair, "aot", beta, label_smoothing)[0], pair)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("gamma", "label_smoothing"), [(0.0, 0.0), (0.5, 0.0), (1.4, 0.1)])
def test_the_simpo_loss_is_trl_s(gamma: float, label_smoothing: float, beta: float) -> None:
    for pair in PAIRS:
        assert_same(loss_of("simpo", pair, beta, label_smoothing, gamma), cpo_of_trl(pair, "simpo", beta, gamma, label_smoothing)[0], pair)


@pytest.mark.parametrize("beta", BETAS)
def test_the_odds_ratio_of_orpo_is_trl_s(beta: float) -> None:
    for pair in PAIRS:
        assert_same(beta * odds_ratio_loss(pair.policy), orpo_of_trl(pair, beta)[0], pair)
        # TRL's NLL takes the prompt's tokens in; without them it is the "sft" loss of its DPO.
        theirs = dpo_of_trl(pair, "sft", beta)[0] + orpo_of_trl(pair, beta)[0]
        assert_same(loss_of("orpo", pair, beta), theirs, pair)


def test_the_anchor_is_trl_s_sft_loss_of_a_single_pair() -> None:
    for pair in PAIRS:
        loss, _ = dpo_of_trl(pair, "sft", 0.1)
        torch.testing.assert_close(chosen_nll(pair.policy), loss[None], **EXACT)


@pytest.mark.parametrize("beta", BETAS)
def test_margins_are_trl_s_for_every_loss(beta: float) -> None:
    for pair in PAIRS:
        theirs: dict[LossName, float] = {name: dpo_of_trl(pair, name, beta)[1] for name in NEEDS_REFERENCE}
        theirs["simpo"] = cpo_of_trl(pair, "simpo", beta, 0.5, 0.0)[1].item()
        theirs["orpo"] = orpo_of_trl(pair, beta)[1].item()
        ours = {name: reward_margin(name, pair.policy, pair.reference, beta=beta).item() for name in theirs}
        assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-12)
