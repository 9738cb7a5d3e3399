import math

import pytest
import torch
from torch import Tensor

from unstilted.losses import PairLogps, chosen_nll, dpo_loss, dpo_margin


def logps(chosen: float, rejected: float) -> PairLogps:
    return PairLogps(torch.tensor([chosen], dtype=torch.float64), torch.tensor([rejected], dtype=torch.float64))


def test_a_model_that_equals_its_reference_has_loss_ln_2_and_margin_0() -> None:
    same = logps(-20.0, -30.0)
    assert dpo_loss(same, same, beta=0.1).item() == pytest.approx(math.log(2), abs=1e-15)
    assert dpo_margin(same, same, beta=0.1).item() == 0


def test_the_loss_is_the_one_worked_out_by_hand() -> None:
    # Log-ratios: chosen -18 - -20 = 2, rejected -33 - -30 = -3; margin 0.1 * (2 - -3) = 0.5; -log sigmoid(0.5) = log(1 + e^-0.5).
    policy, reference = logps(-18.0, -33.0), logps(-20.0, -30.0)
    assert dpo_margin(policy, reference, beta=0.1).item() == pytest.approx(0.5)
    assert dpo_loss(policy, reference, beta=0.1).item() == pytest.approx(math.log(1 + math.exp(-0.5)))


def test_swapping_the_two_sides_turns_the_margin_around() -> None:
    policy, reference = logps(-18.0, -33.0), logps(-20.0, -30.0)
    swapped = dpo_margin(PairLogps(policy.rejected, policy.chosen), PairLogps(reference.rejected, reference.chosen), beta=0.1)
    assert swapped.item() == -dpo_margin(policy, reference, beta=0.1).item()


def test_the_gradient_is_minus_beta_times_sigmoid_of_minus_the_margin() -> None:
    # Rafailov et al. 2023, the gradient under eq. 7.
    chosen = torch.tensor([-18.0], dtype=torch.float64, requires_grad=True)
    policy, reference = PairLogps(chosen, torch.tensor([-33.0], dtype=torch.float64)), logps(-20.0, -30.0)
    dpo_loss(policy, reference, beta=0.1).sum().backward()
    assert isinstance(chosen.grad, Tensor)
    assert chosen.grad.item() == pytest.approx(-0.1 / (1 + math.exp(0.5)))


def test_a_huge_negative_margin_gives_a_finite_loss() -> None:
    assert dpo_loss(logps(-9000.0, 0.0), logps(0.0, 0.0), beta=0.1).item() == pytest.approx(900.0)


def test_the_anchor_is_nats_a_token() -> None:
    assert chosen_nll(logps(-12.0, -1.0), torch.tensor([4])).item() == 3.0
