"""The output head against plain softmax over stored logits, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unstilted.lm.head import CHUNK, Head, head_kl, head_logps

WIDTH = 16


def states(n: int, seed: int = 0, size: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size).to(dtype)


def head(n_vocabulary: int = CHUNK + 37, scale: float = 1.0, cap: float = 0.0, dtype: torch.dtype = torch.float64) -> Head:
    """More than one chunk, and a last one that isn't full."""
    return Head(states(n_vocabulary, seed=1, dtype=dtype), scale, cap)


def stored_logits(hidden: Tensor, head: Head) -> Tensor:
    logits = hidden.double() @ head.weight.double().t() * head.scale
    return head.cap * torch.tanh(logits / head.cap) if head.cap else logits


def plain_kl(hidden: Tensor, base_hidden: Tensor, head: Head) -> Tensor:
    policy, base = (stored_logits(states, head).log_softmax(1) for states in (hidden, base_hidden))
    return (policy.exp() * (policy - base)).sum(1)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.25, 0.0), (1.0, 3.0), (2.0, 10.0)])
def test_kl_is_that_of_two_softmaxes_over_stored_logits(scale: float, cap: float) -> None:
    policy, base, by_chunks = states(9, seed=2), states(9, seed=3), head(scale=scale, cap=cap)
    torch.testing.assert_close(head_kl(policy, base, by_chunks), plain_kl(policy, base, by_chunks), rtol=1e-10, atol=1e-12)


def test_kl_of_two_outcomes_is_the_sum_worked_out_by_hand() -> None:
    two = Head(torch.tensor([[1.0], [0.0]], dtype=torch.float64))
    p, q = torch.tensor([[3.0]], dtype=torch.float64).log(), torch.zeros(1, 1, dtype=torch.float64)  # odds 3 : 1 and 1 : 1
    expected = 0.75 * torch.log(torch.tensor(0.75 / 0.5)) + 0.25 * torch.log(torch.tensor(0.25 / 0.5))
    assert head_kl(p, q, two).item() == pytest.approx(expected.item(), rel=1e-6)
    assert head_kl(q, p, two).item() == pytest.approx(0.5 * torch.log(torch.tensor(0.5 / 0.75)) + 0.5 * torch.log(torch.tensor(2.0)))


def test_kl_of_a_model_from_itself_is_exactly_0() -> None:
    same = states(5)
    assert head_kl(same, same.clone(), head()).tolist() == [0.0] * 5


def test_float32_keeps_a_divergence_far_smaller_than_the_rounding_of_a_logit() -> None:
    base = states(7, size=0.3, dtype=torch.float32)
    policy, by_chunks = base + states(7, seed=5, size=1e-4, dtype=torch.float32), head(dtype=torch.float32)
    exact = plain_kl(policy, base, by_chunks)
    assert 1e-8 < exact.min() < exact.max() < 1e-6
    torch.testing.assert_close(head_kl(policy, base, by_chunks).double(), exact, rtol=2e-2, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 60), st.floats(0.01, 60), st.integers(1, 3 * CHUNK))
def test_kl_in_float32_is_right_and_finite_for_mild_and_wild_logits(seed: int, size: float, base_size: float, n_vocabulary: int) -> None:
    policy, base = states(3, seed, size, torch.float32), states(3, seed + 1, base_size, torch.float32)
    by_chunks = head(n_vocabulary, dtype=torch.float32)
    found = head_kl(policy, base, by_chunks)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), plain_kl(policy, base, by_chunks), rtol=1e-4, atol=1e-4)


def test_kl_survives_a_base_that_gives_the_policys_words_no_chance() -> None:
    policy, base = states(4, seed=6, size=300.0, dtype=torch.float32), states(4, seed=7, size=300.0, dtype=torch.float32)
    by_chunks = head(dtype=torch.float32)
    torch.testing.assert_close(head_kl(policy, base, by_chunks).double(), plain_kl(policy, base, by_chunks), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.5, 4.0)])
def test_logps_are_those_of_a_softmax_over_stored_logits(scale: float, cap: float) -> None:
    hidden, by_chunks = states(6), head(scale=scale, cap=cap)
    targets = torch.tensor([0, 5, CHUNK - 1, CHUNK, CHUNK + 36, 700])
    expected = stored_logits(hidden, by_chunks).log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(head_logps(hidden, by_chunks, targets), expected, rtol=1e-12, atol=1e-12)
