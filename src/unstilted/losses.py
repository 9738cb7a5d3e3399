"""The preference losses: pure functions of log-probabilities, all of shape (B,) and in nats, chosen by name in `preference_loss`."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from unstilted.recipe import LossName

NEEDS_REFERENCE: frozenset[LossName] = frozenset({"sigmoid", "robust", "hinge", "ipo", "sigmoid_norm"})
"""Losses that compare with the base model; the others never ask for its log-probabilities."""

TAKES_LABEL_SMOOTHING: frozenset[LossName] = frozenset({"sigmoid", "robust", "sigmoid_norm", "simpo"})
"""Losses that have a form for pairs whose two sides are swapped now and then."""


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of B pairs in nats, summed over each response's tokens, and how many tokens those are; all of shape (B,)."""

    chosen: Tensor
    rejected: Tensor
    n_chosen: Tensor
    n_rejected: Tensor

    @property
    def gap(self) -> Tensor:
        """Chosen minus rejected, shape (B,), in nats a response."""
        return self.chosen - self.rejected

    @property
    def gap_per_token(self) -> Tensor:
        """Chosen minus rejected, each averaged over its own tokens, shape (B,), in nats a token."""
        return self.chosen / self.n_chosen - self.rejected / self.n_rejected


def preference_loss(
    name: LossName, policy: PairLogps, reference: PairLogps | None, *, beta: float, label_smoothing: float, simpo_gamma: float
) -> Tensor:
    """Per-pair loss of this name, shape (B,), in nats ("hinge" and "ipo": no unit).

    beta: for "ipo" it is tau, for "orpo" lambda. label_smoothing: 0 <= e < 0.5. simpo_gamma: read by "simpo" only.
    Raises ValueError where the loss needs a reference and gets none, or gets label smoothing and has no form for it.
    """
    if label_smoothing and name not in TAKES_LABEL_SMOOTHING:
        raise ValueError(f"the loss {name!r} has no label smoothing")
    if name == "simpo":
        return simpo_loss(policy, beta, simpo_gamma, label_smoothing)
    if name == "orpo":
        return orpo_loss(policy, beta)
    if reference is None:
        raise ValueError(f"the loss {name!r} needs a reference")
    match name:
        case "sigmoid":
            return dpo_loss(policy, reference, beta, label_smoothing)
        case "robust":
            return robust_dpo_loss(policy, reference, beta, label_smoothing)
        case "hinge":
            return hinge_loss(policy, reference, beta)
        case "ipo":
            return ipo_loss(policy, reference, beta)
        case "sigmoid_norm":
            return length_normalised_dpo_loss(policy, reference, beta, label_smoothing)


def reward_margin(name: LossName, policy: PairLogps, reference: PairLogps | None, *, beta: float) -> Tensor:
    """What the training curve calls margin, shape (B,): TRL's `rewards/margins`, the chosen response's reward minus the rejected one's.

    The reward is beta times the log-ratio to the reference, summed over the response even where the loss averages it; without a
    reference it is beta times the log-probability a token. Raises ValueError where the loss needs a reference and gets none.
    """
    if name not in NEEDS_REFERENCE:
        return beta * policy.gap_per_token
    if reference is None:
        raise ValueError(f"the loss {name!r} needs a reference")
    return dpo_margin(policy, reference, beta)


def log_ratios(policy: PairLogps, reference: PairLogps) -> PairLogps:
    """Policy minus reference log-probability of each response, with the policy's token counts."""
    return PairLogps(policy.chosen - reference.chosen, policy.rejected - reference.rejected, policy.n_chosen, policy.n_rejected)


def dpo_margin(policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
    """Reward margin beta * (log-ratio of chosen - log-ratio of rejected), shape (B,). Rafailov et al. 2023, argument of eq. 7."""
    return beta * log_ratios(policy, reference).gap


def dpo_loss(policy: PairLogps, reference: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Per-pair DPO loss -log sigmoid(margin), shape (B,), in nats. Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.

    With label smoothing e it is conservative DPO, -(1 - e) log sigmoid(margin) - e log sigmoid(-margin), which stops at the margin
    log((1 - e) / e). Mitchell 2023 (ericmitchell.ai/cdpo.pdf), eq. 3.
    """
    return _cross_entropy(dpo_margin(policy, reference, beta), label_smoothing)


def robust_dpo_loss(policy: PairLogps, reference: PairLogps, beta: float, flip_rate: float) -> Tensor:
    """Per-pair robust DPO loss, shape (B,), in nats: ((1 - e) loss(margin) - e loss(-margin)) / (1 - 2e), 0 <= e < 0.5.

    Averaged over pairs of which a share e has its sides swapped, it is the DPO loss of the unswapped pairs; unlike that one it has no
    lower bound. Chowdhury et al. 2024 (arXiv 2403.00409), the unbiased loss of section 3.
    """
    margin = dpo_margin(policy, reference, beta)
    return (-(1 - flip_rate) * logsigmoid(margin) + flip_rate * logsigmoid(-margin)) / (1 - 2 * flip_rate)


def hinge_loss(policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
    """Per-pair hinge loss max(0, 1 - margin), shape (B,). Liu et al. 2023 (RSO, arXiv 2309.06657), eq. 10.

    It is the rank calibration loss of SLiC (Zhao et al. 2023, arXiv 2305.10425) on log-ratios; 1 / beta is SLiC's delta.
    """
    return relu(1 - dpo_margin(policy, reference, beta))


def ipo_loss(policy: PairLogps, reference: PairLogps, tau: float) -> Tensor:
    """Per-pair IPO loss (difference of log-ratios a token - 1 / (2 tau))^2, shape (B,). Azar et al. 2023 (arXiv 2310.12036), eq. 17.

    The paper writes sums over tokens; averages are the form that its authors confirmed to TRL. The target is thus in nats a token:
    tau 0.1 asks for 5.
    """
    return (log_ratios(policy, reference).gap_per_token - 1 / (2 * tau)) ** 2


def length_normalised_dpo_loss(policy: PairLogps, reference: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Per-pair DPO loss on log-ratios averaged over each response's tokens, shape (B,), in nats.

    Lambert et al. 2024 (Tulu 3, arXiv 2411.15124), section 5, with beta 5; "DPO w/ LN" in Meng et al. 2024 (arXiv 2405.14734).
    """
    return _cross_entropy(beta * log_ratios(policy, reference).gap_per_token, label_smoothing)


def simpo_loss(policy: PairLogps, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """Per-pair SimPO loss -log sigmoid(beta * difference of log-probabilities a token - gamma), shape (B,), in nats.

    Meng et al. 2024 (arXiv 2405.14734), eq. 6; their Llama-3-8B-Instruct has beta 2.5 and gamma 1.4.
    """
    return _cross_entropy(beta * policy.gap_per_token - gamma, label_smoothing)


def orpo_loss(policy: PairLogps, weight: float) -> Tensor:
    """Per-pair ORPO loss, chosen NLL a token + weight * odds-ratio loss, shape (B,), in nats.

    Hong et al. 2024 (arXiv 2403.07691), eq. 6; the weight is their lambda. TRL's NLL also counts the prompt's tokens; this one doesn't.
    """
    return chosen_nll(policy) + weight * odds_ratio_loss(policy)


def odds_ratio_loss(policy: PairLogps) -> Tensor:
    """Per-pair -log sigmoid(log odds of chosen - log odds of rejected), shape (B,), in nats. Hong et al. 2024, eq. 7.

    A response's probability is the geometric mean over its tokens (their eq. 3), its odds are p / (1 - p) (their eq. 4).
    """
    return -logsigmoid(_log_odds(policy.chosen / policy.n_chosen) - _log_odds(policy.rejected / policy.n_rejected))


def chosen_nll(policy: PairLogps) -> Tensor:
    """Mean negative log-likelihood of the chosen answer's tokens, shape (B,), in nats a token.

    The anchor of Pang et al. 2024 (arXiv 2404.19733), eq. 1: it keeps the chosen answer from losing probability while the margin grows.
    """
    return -policy.chosen / policy.n_chosen


def _cross_entropy(margin: Tensor, label_smoothing: float) -> Tensor:
    """Of sigmoid(margin), the probability that chosen wins, against the label 1 - label_smoothing."""
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(logp), logp <= 0."""
    # A response that got certain (p = 1) has infinite odds and would make the gradient NaN; this close to it both are finite.
    logp = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    return logp - torch.log(-torch.expm1(logp))
