"""Log-probabilities without stored logits against log_softmax over stored ones."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiny import tiny_model
from unstilted.lm.head import CHUNK, Head, head_logps, head_of

WIDTH = 12


def states(n: int, seed: int = 0, size: float = 1.0, width: int = WIDTH) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size


def stored_logps(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    logits = hidden @ head.weight.to(hidden.dtype).t() * head.scale
    if head.cap:
        logits = head.cap * torch.tanh(logits / head.cap)
    return logits.log_softmax(1).gather(1, targets[:, None])[:, 0]


def values_and_gradient(logps: Any, hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    hidden = hidden.clone().requires_grad_()
    found = logps(hidden, head, targets)
    (gradient,) = torch.autograd.grad((found * torch.linspace(-1, 2, len(found), dtype=found.dtype)).sum(), hidden)
    return found.detach(), gradient


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 7),
    n_vocabulary=st.sampled_from([1, 2, 97, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 37]),
    scale=st.sampled_from([1.0, 0.125, 2.0]),
    cap=st.sampled_from([0.0, 0.5, 5.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_exact_in_float64(n: int, n_vocabulary: int, scale: float, cap: float, seed: int) -> None:
    head = Head(states(n_vocabulary, seed + 1), scale, cap)
    targets = torch.randint(n_vocabulary, (n,), generator=torch.Generator().manual_seed(seed))
    found, expected = (values_and_gradient(logps, states(n, seed), head, targets) for logps in (head_logps, stored_logps))
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.5, 0.0), (1.0, 2.0), (0.7, 3.0)])
def test_gradcheck_agrees(scale: float, cap: float) -> None:
    head, targets = Head(states(CHUNK + 5, 1), scale, cap), torch.tensor([0, CHUNK, CHUNK + 4, 3])
    assert torch.autograd.gradcheck(lambda hidden: head_logps(hidden, head, targets), states(4).requires_grad_())


def test_one_token_of_two_is_the_logistic_function_worked_out_by_hand() -> None:
    head = Head(torch.tensor([[2.0], [0.0]], dtype=torch.float64))
    found, gradient = values_and_gradient(head_logps, torch.tensor([[1.5]], dtype=torch.float64), head, torch.tensor([0]))
    assert found.item() == pytest.approx(-0.0485873515737420588, abs=1e-13)  # -log(1 + e^-3)
    assert gradient.item() == pytest.approx(-1 * 2 * 0.047425873177566781, abs=1e-13)  # d/dh, weighted -1: 2 (1 - sigmoid(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("nats", [30, 100, 128, 200, 740, 800, 5000])
def test_tokens_however_unlikely_keep_a_finite_and_right_value_and_gradient(nats: float, dtype: torch.dtype) -> None:
    """One of them, beside ordinary ones, which must not suffer."""
    weight = states(CHUNK + 9, 1, 0.3)
    weight[CHUNK + 3] = 0
    weight[CHUNK + 3, 0], weight[5] = -float(nats), 0
    hidden = states(4, 2, 0.3)
    hidden[:, 0] = 0
    hidden[1] = 0
    hidden[1, 0] = 1.0  # its logit of the target is -nats, of the others about 0
    hidden, head, targets = hidden.to(dtype), Head(weight.to(dtype)), torch.tensor([7, CHUNK + 3, 5, CHUNK])
    found = values_and_gradient(head_logps, hidden, head, targets)
    expected = values_and_gradient(stored_logps, hidden.double(), head, targets)
    assert expected[0][1] < -0.99 * nats
    within = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found[0].double(), expected[0], rtol=within, atol=within)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=max(within, torch.finfo(dtype).eps), atol=2 * torch.finfo(dtype).eps)


def test_logits_of_thousands_dont_overflow() -> None:
    head = Head(states(CHUNK + 9, 1, 40.0).float())
    hidden, targets = states(6, 2, 40.0).float(), torch.tensor([0, 1, 2, CHUNK, CHUNK + 1, 700])
    found = values_and_gradient(head_logps, hidden, head, targets)
    expected = values_and_gradient(stored_logps, hidden.double(), head, targets)
    assert expected[0].min() < -5000
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-6, atol=1e-2)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_bfloat16_is_summed_in_float32(cap: float) -> None:
    hidden, head = states(9, 2).bfloat16(), Head(states(3 * CHUNK, 1).bfloat16(), cap=cap)
    targets = torch.arange(9) * 300
    found, gradient = values_and_gradient(head_logps, hidden, head, targets)
    expected, exact = values_and_gradient(stored_logps, hidden.double(), head, targets)
    assert found.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)  # sums in bfloat16 would be wrong by 0.1
    torch.testing.assert_close(gradient.double(), exact, rtol=2**-7, atol=2**-7)


def test_nothing_wider_than_the_hidden_states_is_kept_for_the_backward() -> None:
    kept = list[torch.Size]()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    head = Head(states(5 * CHUNK, 1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = head_logps(states(3).requires_grad_(), head, torch.tensor([1, 2, 3]))
    assert kept == [torch.Size([3, WIDTH])]
    logps.sum().backward()


def test_no_tensor_of_the_forward_is_wider_than_a_chunk() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    widths = set[int]()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dim() == 2 and len(result) == 3:
                widths.add(result.shape[1])
            return result

    hidden, head = states(3).requires_grad_(), Head(states(5 * CHUNK, 1), cap=3.0)
    with Watch():
        head_logps(hidden, head, torch.tensor([1, 2, 3])).sum().backward()
    assert max(widths) == CHUNK


def test_without_a_gradient_none_is_computed() -> None:
    with torch.no_grad():
        assert not head_logps(states(3).requires_grad_(), Head(states(9, 1)), torch.tensor([1, 2, 3])).requires_grad
    assert not head_logps(states(3), Head(states(9, 1)), torch.tensor([1, 2, 3])).requires_grad


def test_gradients_of_gradients_are_refused() -> None:
    hidden = states(3).requires_grad_()
    (gradient,) = torch.autograd.grad(
        head_logps(hidden, Head(states(9, 1)), torch.tensor([1, 2, 3])).square().sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()


def test_the_head_is_read_from_the_model_with_its_scale_and_cap() -> None:
    tied = tiny_model("llama").requires_grad_(False)
    head = head_of(tied)
    assert head is not None
    assert head.weight is tied.get_input_embeddings().weight
    assert (head.scale, head.cap) == (1.0, 0.0)
    granite, gemma2 = (head_of(tiny_model(kind).requires_grad_(False)) for kind in ("granite", "gemma2"))
    assert granite is not None
    assert gemma2 is not None
    assert (granite.scale, granite.cap) == (0.25, 0.0)
    assert (gemma2.scale, gemma2.cap) == (1.0, 3.0)


def test_a_head_that_is_trained_or_has_a_bias_isnt_one_frozen_matrix() -> None:
    assert head_of(tiny_model()) is None
    model = tiny_model().requires_grad_(False)
    model.lm_head = torch.nn.Linear(32, 97).requires_grad_(False)
    assert head_of(model) is None
