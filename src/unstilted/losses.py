"""The preference losses: pure functions of log-probabilities."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of B pairs in nats, summed over each response's tokens; both of shape (B,)."""

    chosen: Tensor
    rejected: Tensor


def dpo_margin(policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
    """Reward margin beta * (log-ratio of chosen - log-ratio of rejected), shape (B,). Rafailov et al. 2023, argument of eq. 7."""
    return beta * ((policy.chosen - reference.chosen) - (policy.rejected - reference.rejected))


def dpo_loss(policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
    """Per-pair DPO loss -log sigmoid(margin), shape (B,), in nats. Rafailov et al. 2023 (arXiv 2305.18290), eq. 7."""
    return -logsigmoid(dpo_margin(policy, reference, beta))


def chosen_nll(policy: PairLogps, n_chosen_tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of the chosen answer's tokens, shape (B,), in nats a token.

    The anchor of Pang et al. 2024 (arXiv 2404.19733), eq. 1: it keeps the chosen answer from losing probability while the margin grows.
    """
    return -policy.chosen / n_chosen_tokens
