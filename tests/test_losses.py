import math
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unstilted.losses import (
    NEEDS_REFERENCE,
    TAKES_LABEL_SMOOTHING,
    PairLogps,
    chosen_nll,
    dpo_loss,
    dpo_margin,
    hinge_loss,
    ipo_loss,
    length_normalised_dpo_loss,
    odds_ratio_loss,
    orpo_loss,
    preference_loss,
    reward_margin,
    robust_dpo_loss,
    simpo_loss,
)
from unstilted.recipe import LossName

EVERY: tuple[LossName, ...] = get_args(LossName)
PER_TOKEN: tuple[LossName, ...] = ("ipo", "sigmoid_norm", "simpo", "orpo")
law = settings(deadline=None)  # torch takes longer the first time
FLIP_RATES = st.floats(0, 0.45)
MARGINS = st.floats(-30, 30)


def logps(chosen: float, rejected: float, n_chosen: int = 4, n_rejected: int = 10) -> PairLogps:
    wide = {"dtype": torch.float64}
    return PairLogps(torch.tensor([chosen], **wide), torch.tensor([rejected], **wide), torch.tensor([n_chosen]), torch.tensor([n_rejected]))


# The pair of most worked numbers. Log-ratios: chosen -18 - -20 = 2, rejected -33 - -30 = -3. Their difference is 5; with 4 and 10 tokens
# it is 2/4 - -3/10 = 0.8 a token.
POLICY, REFERENCE = logps(-18.0, -33.0), logps(-20.0, -30.0)


def at_margin(margin: float) -> tuple[PairLogps, PairLogps]:
    """Policy and reference of a pair whose DPO margin at beta 1 is this one."""
    return logps(margin, 0.0), logps(0.0, 0.0)


def swapped(pair: PairLogps) -> PairLogps:
    return PairLogps(pair.rejected, pair.chosen, pair.n_rejected, pair.n_chosen)


def loss_of(name: LossName, policy: PairLogps, reference: PairLogps, beta: float = 0.3, label_smoothing: float = 0.0) -> Tensor:
    return preference_loss(name, policy, reference, beta=beta, label_smoothing=label_smoothing, simpo_gamma=0.5)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[PairLogps, PairLogps]:
    """Policy and reference log-probabilities of 1 to 4 responses a side, of 1 to 300 tokens at -0.01 to -8 nats."""
    n_pairs = draw(st.integers(1, 4))
    counts = [torch.tensor(draw(st.lists(st.integers(1, 300), min_size=n_pairs, max_size=n_pairs))) for _ in range(2)]

    def sums(count: Tensor) -> Tensor:
        means = draw(st.lists(st.floats(-8, -0.01), min_size=n_pairs, max_size=n_pairs))
        return torch.tensor(means, dtype=torch.float64) * count

    policy, reference = (PairLogps(sums(counts[0]), sums(counts[1]), *counts) for _ in range(2))
    return policy, reference


# Worked numbers.


def test_the_dpo_loss_is_the_one_worked_out_by_hand() -> None:
    # Margin 0.1 * 5 = 0.5; -log sigmoid(0.5) = log(1 + e^-0.5).
    assert dpo_margin(POLICY, REFERENCE, beta=0.1).item() == pytest.approx(0.5)
    assert dpo_loss(POLICY, REFERENCE, beta=0.1).item() == pytest.approx(math.log(1 + math.exp(-0.5)))


def test_the_conservative_loss_mixes_both_readings_of_the_pair() -> None:
    # Margin 0.5, of ten labels one is wrong: 0.9 log(1 + e^-0.5) + 0.1 log(1 + e^0.5).
    expected = 0.9 * math.log(1 + math.exp(-0.5)) + 0.1 * math.log(1 + math.exp(0.5))
    assert dpo_loss(POLICY, REFERENCE, 0.1, label_smoothing=0.1).item() == pytest.approx(expected)


def test_the_robust_loss_takes_the_wrong_reading_away() -> None:
    # (0.9 log(1 + e^-0.5) - 0.1 log(1 + e^0.5)) / 0.8
    expected = (0.9 * math.log(1 + math.exp(-0.5)) - 0.1 * math.log(1 + math.exp(0.5))) / 0.8
    assert robust_dpo_loss(POLICY, REFERENCE, 0.1, flip_rate=0.1).item() == pytest.approx(expected)


def test_the_hinge_loss_is_what_the_margin_lacks_to_one() -> None:
    assert hinge_loss(POLICY, REFERENCE, beta=0.1).item() == pytest.approx(0.5)


def test_the_ipo_loss_is_the_squared_distance_to_its_target_in_nats_a_token() -> None:
    # 1 / (2 * 0.5) = 1; (0.8 - 1)^2 = 0.04.
    assert ipo_loss(POLICY, REFERENCE, tau=0.5).item() == pytest.approx(0.04)


def test_the_length_normalised_loss_averages_log_ratios_over_tokens() -> None:
    # 5 * 0.8 = 4.
    assert length_normalised_dpo_loss(POLICY, REFERENCE, beta=5.0).item() == pytest.approx(math.log(1 + math.exp(-4)))


def test_the_simpo_loss_asks_for_a_margin_without_a_reference() -> None:
    # -18/4 - -33/10 = -1.2 nats a token; 2 * -1.2 - 0.5 = -2.9.
    assert simpo_loss(POLICY, beta=2.0, gamma=0.5).item() == pytest.approx(math.log(1 + math.exp(2.9)))


def test_the_orpo_loss_is_the_chosen_nll_and_the_weighted_odds_ratio() -> None:
    # Chosen: 3 tokens of probability 1/2, odds 1. Rejected: 2 tokens of probability 1/5, odds 1/4. Ratio 4: -log(4 / (1 + 4)) = log 1.25.
    pair = logps(3 * math.log(0.5), 2 * math.log(0.2), n_chosen=3, n_rejected=2)
    assert odds_ratio_loss(pair).item() == pytest.approx(math.log(1.25))
    assert orpo_loss(pair, weight=0.1).item() == pytest.approx(math.log(2) + 0.1 * math.log(1.25))


def test_the_anchor_is_nats_a_token() -> None:
    assert chosen_nll(logps(-12.0, -1.0, n_chosen=4)).item() == 3.0


def test_each_name_stands_for_its_loss_with_its_settings() -> None:
    expected: dict[LossName, Tensor] = {
        "sigmoid": dpo_loss(POLICY, REFERENCE, 0.3, 0.1),
        "robust": robust_dpo_loss(POLICY, REFERENCE, 0.3, 0.1),
        "hinge": hinge_loss(POLICY, REFERENCE, 0.1),
        "ipo": ipo_loss(POLICY, REFERENCE, 0.3),
        "sigmoid_norm": length_normalised_dpo_loss(POLICY, REFERENCE, 0.3, 0.1),
        "simpo": simpo_loss(POLICY, 0.3, 0.5, 0.1),
        "orpo": orpo_loss(POLICY, 0.3),
    }
    assert set(expected) == set(EVERY)
    for name, loss in expected.items():
        beta = 0.1 if name == "hinge" else 0.3  # at 0.3 the hinge is past its kink and 0
        smoothing = 0.1 if name in TAKES_LABEL_SMOOTHING else 0.0
        assert torch.equal(loss_of(name, POLICY, REFERENCE, beta, smoothing), loss), name


def test_the_margin_is_a_response_s_with_a_reference_and_a_token_s_without() -> None:
    # 0.3 * 5 = 1.5 whatever the loss does with lengths, and 0.3 * -1.2 = -0.36.
    margins = {name: reward_margin(name, POLICY, REFERENCE, beta=0.3).item() for name in EVERY}
    assert margins == pytest.approx({name: 1.5 if name in NEEDS_REFERENCE else -0.36 for name in EVERY})


# Limits.


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
def test_a_model_that_equals_its_reference_has_loss_ln_2_and_margin_0(label_smoothing: float) -> None:
    for name in ("sigmoid", "robust", "sigmoid_norm"):
        assert loss_of(name, POLICY, POLICY, label_smoothing=label_smoothing).item() == pytest.approx(math.log(2), abs=1e-15), name
    for name in NEEDS_REFERENCE:
        assert reward_margin(name, POLICY, POLICY, beta=0.1).item() == 0, name
    assert hinge_loss(POLICY, POLICY, beta=0.1).item() == 1
    assert ipo_loss(POLICY, POLICY, tau=0.1).item() == pytest.approx(25)  # (1 / 0.2)^2


def test_without_label_noise_robust_and_conservative_are_plain_dpo_to_the_bit() -> None:
    plain = -torch.nn.functional.logsigmoid(dpo_margin(POLICY, REFERENCE, 0.1))
    assert torch.equal(dpo_loss(POLICY, REFERENCE, 0.1), plain)
    assert torch.equal(robust_dpo_loss(POLICY, REFERENCE, 0.1, flip_rate=0.0), plain)


def slope(loss: Callable[[PairLogps], Tensor], policy: PairLogps) -> float:
    """d loss / d chosen."""
    chosen = policy.chosen.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(replace(policy, chosen=chosen)).sum(), chosen)
    return gradient.item()


def test_the_gradient_is_minus_beta_times_sigmoid_of_minus_the_margin() -> None:
    # Rafailov et al. 2023, the gradient under eq. 7.
    gradient = slope(lambda policy: dpo_loss(policy, REFERENCE, beta=0.1), POLICY)
    assert gradient == pytest.approx(-0.1 / (1 + math.exp(0.5)))


def test_the_conservative_loss_is_least_where_the_model_is_as_sure_as_the_labels() -> None:
    policy, reference = at_margin(math.log(0.9 / 0.1))
    assert slope(lambda policy: dpo_loss(policy, reference, 1.0, label_smoothing=0.1), policy) == pytest.approx(0, abs=1e-15)


def test_the_robust_loss_never_stops_pushing() -> None:
    # Far out the slope is that of the linear part, -e / (1 - 2e) = -0.1 / 0.8.
    policy, reference = at_margin(50.0)
    assert slope(lambda policy: robust_dpo_loss(policy, reference, 1.0, flip_rate=0.1), policy) == pytest.approx(-0.125)


@pytest.mark.parametrize(("margin", "loss", "gradient"), [(0.999, 0.001, -1), (1.001, 0, 0), (40.0, 0, 0)])
def test_the_hinge_loss_lets_go_past_its_margin(margin: float, loss: float, gradient: float) -> None:
    policy, reference = at_margin(margin)
    assert hinge_loss(policy, reference, beta=1.0).item() == pytest.approx(loss)
    assert slope(lambda policy: hinge_loss(policy, reference, beta=1.0), policy) == gradient


def test_the_ipo_loss_is_zero_at_half_of_one_over_tau_and_pulls_back_beyond() -> None:
    # tau 0.25: 2 nats a token, which chosen reaches with 4 * 2 = 8 nats over its reference.
    reference = logps(0.0, 0.0)
    assert ipo_loss(logps(8.0, 0.0), reference, tau=0.25).item() == 0
    before, at, beyond = (slope(lambda policy: ipo_loss(policy, reference, tau=0.25), logps(chosen, 0.0)) for chosen in (7.0, 8.0, 9.0))
    assert (before, at, beyond) == (pytest.approx(-0.125), 0, pytest.approx(0.125))  # 2 * (-+1/4) * 1/4


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("chosen", "rejected"), [(-9000.0, -1.0), (-1.0, -9000.0)])
def test_huge_margins_give_finite_losses_and_gradients(name: LossName, chosen: float, rejected: float) -> None:
    logp = torch.tensor([chosen, rejected], requires_grad=True)
    one = torch.ones(1)
    policy, reference = PairLogps(logp[:1], logp[1:], one, one), PairLogps(-one, -one, one, one)
    loss = loss_of(name, policy, reference, label_smoothing=0.1 if name in TAKES_LABEL_SMOOTHING else 0.0)
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert gradient.isfinite().all()


def test_a_huge_negative_margin_costs_itself() -> None:
    assert dpo_loss(logps(-9000.0, 0.0), logps(0.0, 0.0), beta=0.1).item() == pytest.approx(900.0)


@pytest.mark.parametrize("logp", [0.0, -1e-38, -1e-12, -1e-4])
def test_a_response_that_became_certain_keeps_orpo_finite(logp: float) -> None:
    for chosen, rejected in ((logp, -30.0), (-30.0, logp), (logp, logp)):
        pair = torch.tensor([chosen, rejected], requires_grad=True)
        loss = odds_ratio_loss(PairLogps(pair[:1], pair[1:], torch.tensor([3]), torch.tensor([3])))
        assert loss.isfinite().all()
        (gradient,) = torch.autograd.grad(loss.sum(), pair)
        assert gradient.isfinite().all()


# Laws.


@law
@given(pairs(), FLIP_RATES)
def test_the_robust_loss_of_noisy_pairs_is_on_average_the_dpo_loss_of_clean_ones(
    pair: tuple[PairLogps, PairLogps], flip_rate: float
) -> None:
    policy, reference = pair
    seen_right = robust_dpo_loss(policy, reference, 0.1, flip_rate)
    seen_wrong = robust_dpo_loss(swapped(policy), swapped(reference), 0.1, flip_rate)
    torch.testing.assert_close((1 - flip_rate) * seen_right + flip_rate * seen_wrong, dpo_loss(policy, reference, 0.1))


@law
@given(MARGINS, FLIP_RATES)
def test_label_noise_adds_a_straight_line_to_dpo(margin: float, rate: float) -> None:
    # log sigmoid(-m) = log sigmoid(m) - m turns conservative into loss + e m and robust into loss - e m / (1 - 2e).
    policy, reference = at_margin(margin)
    plain = dpo_loss(policy, reference, 1.0).item()
    assert dpo_loss(policy, reference, 1.0, rate).item() == pytest.approx(plain + rate * margin)
    assert robust_dpo_loss(policy, reference, 1.0, rate).item() == pytest.approx(plain - rate * margin / (1 - 2 * rate))


@law
@given(pairs(), st.sampled_from(EVERY))
def test_swapping_the_two_sides_turns_the_margin_around(pair: tuple[PairLogps, PairLogps], name: LossName) -> None:
    policy, reference = pair
    margin = reward_margin(name, policy, reference, beta=0.3)
    torch.testing.assert_close(reward_margin(name, swapped(policy), swapped(reference), beta=0.3), -margin, atol=1e-12, rtol=0)


@law
@given(pairs(), st.sampled_from(("sigmoid", "sigmoid_norm")))
def test_swapping_the_two_sides_costs_the_margin(pair: tuple[PairLogps, PairLogps], name: LossName) -> None:
    # -log sigmoid(-m) = -log sigmoid(m) + m, and a label smoothing of one half can't tell the sides apart.
    policy, reference = pair
    other = swapped(policy), swapped(reference)
    ratios = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    margin = 0.3 * (ratios[0] - ratios[1] if name == "sigmoid" else ratios[0] / policy.n_chosen - ratios[1] / policy.n_rejected)
    torch.testing.assert_close(loss_of(name, *other), loss_of(name, policy, reference) + margin)
    torch.testing.assert_close(loss_of(name, *other, label_smoothing=0.5), loss_of(name, policy, reference, label_smoothing=0.5))


@law
@given(pairs(), st.sampled_from(sorted(NEEDS_REFERENCE)), st.floats(-50, 50))
def test_only_log_ratios_count_where_there_is_a_reference(pair: tuple[PairLogps, PairLogps], name: LossName, shift: float) -> None:
    policy, reference = pair
    moved = (replace(logp, chosen=logp.chosen + shift, rejected=logp.rejected - 2 * shift) for logp in pair)
    torch.testing.assert_close(loss_of(name, *moved), loss_of(name, policy, reference), atol=1e-9, rtol=1e-9)


@law
@given(pairs(), st.sampled_from(PER_TOKEN), st.integers(2, 9))
def test_losses_of_token_averages_dont_see_a_response_repeated(pair: tuple[PairLogps, PairLogps], name: LossName, times: int) -> None:
    longer = [PairLogps(times * p.chosen, times * p.rejected, times * p.n_chosen, times * p.n_rejected) for p in pair]
    torch.testing.assert_close(loss_of(name, *longer), loss_of(name, *pair))


@law
@given(pairs(), st.sampled_from(("sigmoid", "robust", "hinge")), st.integers(2, 9))
def test_losses_of_sums_dont_see_token_counts(pair: tuple[PairLogps, PairLogps], name: LossName, times: int) -> None:
    recounted = [replace(p, n_chosen=times * p.n_chosen) for p in pair]
    assert torch.equal(loss_of(name, *recounted), loss_of(name, *pair))


@law
@given(pairs(), st.sampled_from(sorted(set(EVERY) - {"ipo"})))
def test_a_likelier_chosen_or_unlikelier_rejected_response_never_costs_more(pair: tuple[PairLogps, PairLogps], name: LossName) -> None:
    # Not so for IPO, which pulls back beyond its target.
    policy, reference = pair
    logp = torch.stack([policy.chosen, policy.rejected]).requires_grad_()
    loss = loss_of(name, replace(policy, chosen=logp[0], rejected=logp[1]), reference)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert (gradient[0] <= 0).all()
    assert (gradient[1] >= 0).all()


@law
@given(pairs(), st.sampled_from(EVERY))
def test_a_pair_s_loss_doesnt_depend_on_its_batch(pair: tuple[PairLogps, PairLogps], name: LossName) -> None:
    def row(p: PairLogps, index: int) -> PairLogps:
        return PairLogps(*(part[index : index + 1] for part in (p.chosen, p.rejected, p.n_chosen, p.n_rejected)))

    alone = [loss_of(name, *(row(p, index) for p in pair)) for index in range(len(pair[0].chosen))]
    torch.testing.assert_close(torch.cat(alone), loss_of(name, *pair), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_gradients_are_those_of_finite_differences(name: LossName, label_smoothing: float) -> None:
    if label_smoothing and name not in TAKES_LABEL_SMOOTHING:
        return
    wide = {"dtype": torch.float64}
    counts = torch.tensor([3, 1, 4]), torch.tensor([7, 20, 10])
    # At beta 0.3 the hinge's three margins are 0.12, -0.6 and 1.5: both sides of its kink, none on it.
    chosen, rejected = torch.tensor([-9.1, -0.4, -18.0], **wide), torch.tensor([-12.5, -21.0, -33.0], **wide)
    reference = PairLogps(torch.tensor([-9.0, -0.3, -20.0], **wide), torch.tensor([-12.0, -22.9, -30.0], **wide), *counts)

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return loss_of(name, PairLogps(chosen, rejected, *counts), reference, label_smoothing=label_smoothing)

    assert torch.autograd.gradcheck(loss, (chosen.requires_grad_(), rejected.requires_grad_()))


# References and refusals.


@pytest.mark.parametrize("name", EVERY)
def test_a_reference_is_asked_for_exactly_where_it_is_needed(name: LossName) -> None:
    if name in NEEDS_REFERENCE:
        with pytest.raises(ValueError, match=f"the loss '{name}' needs a reference"):
            preference_loss(name, POLICY, None, beta=0.3, label_smoothing=0.0, simpo_gamma=0.5)
        with pytest.raises(ValueError, match=f"the loss '{name}' needs a reference"):
            reward_margin(name, POLICY, None, beta=0.3)
    else:
        alone = preference_loss(name, POLICY, None, beta=0.3, label_smoothing=0.0, simpo_gamma=0.5)
        assert torch.equal(alone, loss_of(name, POLICY, REFERENCE))
        assert torch.equal(reward_margin(name, POLICY, None, beta=0.3), reward_margin(name, POLICY, REFERENCE, beta=0.3))


@pytest.mark.parametrize("name", sorted(set(EVERY) - TAKES_LABEL_SMOOTHING))
def test_label_smoothing_is_refused_where_it_would_do_nothing(name: LossName) -> None:
    with pytest.raises(ValueError, match=f"the loss '{name}' has no label smoothing"):
        loss_of(name, POLICY, REFERENCE, label_smoothing=0.1)
