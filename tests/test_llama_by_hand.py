"""The hand-written trunk against transformers and PEFT in float64, and against everything that can happen to a model meanwhile."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiny import CONFIGS, in_float64, plain_token_logps, tiny_model, with_lora
from unstilted.lm.llama import can_run
from unstilted.lm.score import Scorer
from unstilted.lm.tree import Request, Tree

BY_HAND = [kind for kind in CONFIGS if kind.split()[0] in ("llama", "qwen2", "mistral", "multi-head", "multi-query")]
BY_HAND = [kind for kind in BY_HAND if kind not in ("llama with dynamic positions", "qwen2 with some sliding windows")]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
REQUESTS = [
    Request([5, 6, 7, 8], [[9, 10, 11, 2], [9, 10, 12, 13, 14, 2], [2]]),
    Request([5, 6, 7, 8], [[9, 10, 11, 2], [20]]),
    Request([5, 6], [[7, 8, 9]]),
    Request([], [[30, 31]]),
]
few_tokens = st.lists(st.integers(3, 5), min_size=0, max_size=5)
some_requests = st.lists(st.builds(Request, few_tokens, st.lists(few_tokens.filter(bool), min_size=1, max_size=6)), min_size=1, max_size=3)


def plain_scores(model: Any, requests: list[Request]) -> list[list[Tensor]]:
    return [[plain_token_logps(model, prompt or [1], answer) for answer in answers] for prompt, answers in requests]


def objective(scores: list[list[Tensor]]) -> Tensor:
    """Something in which every token has a weight of its own and conversations are multiplied with each other."""
    joined = torch.cat([answer for answers in scores for answer in answers])
    return joined @ torch.linspace(-1, 2, len(joined), dtype=joined.dtype) + joined[0] * joined[-1]


def lora_of(model: Any) -> list[Tensor]:
    return [weight for name, weight in model.named_parameters() if "lora_" in name]


def assert_exact(model: Any, requests: list[Request], scorer: Scorer | None = None) -> None:
    """Values within 1e-10 nats a token, gradients within 1e-9 of their norm."""
    scorer = scorer or Scorer(model)
    assert scorer.trunk is not None
    found, expected = scorer.token_logps(requests), plain_scores(model, requests)
    for ones, others in zip(found, expected, strict=True):
        for one, other in zip(ones, others, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    weights = lora_of(model)
    for one, other in zip(*(torch.autograd.grad(objective(scores), weights) for scores in (found, expected)), strict=True):
        assert (one - other).norm() <= 1e-9 * other.norm() + 1e-13  # a gradient may be nothing but rounding


def bits(scores: list[list[Tensor]]) -> list[bytes]:
    return [answer.detach().numpy().tobytes() for answers in scores for answer in answers]


# --- exactness ---


@pytest.mark.parametrize("kind", BY_HAND)
def test_values_and_gradients_are_those_of_plain_forwards(kind: str) -> None:
    assert_exact(with_lora(tiny_model(kind)), REQUESTS)


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["k_proj"]},
        {"target_modules": ["o_proj"]},
        {"target_modules": ["up_proj"]},
        {"target_modules": ["down_proj"], "r": 1},
        {"layers_to_transform": [1, 2]},
        {"layers_to_transform": [2]},
        {"layers_to_transform": [0]},
        {"layers_to_transform": [0, 2]},
        {"rank_pattern": {"k_proj": 5, "up_proj": 1}, "alpha_pattern": {"v_proj": 1.0}},
        {"use_rslora": True, "r": 8},
    ],
    ids=str,
)
def test_adapters_on_some_modules_and_layers_of_unequal_ranks_are_exact(adapter: dict[str, Any]) -> None:
    assert_exact(with_lora(tiny_model("qwen2"), **adapter), REQUESTS)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(BY_HAND),
    requests=some_requests,
    modules=st.lists(st.sampled_from(LINEAR), min_size=1, unique=True),
    layers=st.lists(st.integers(0, 2), min_size=1, unique=True),
    rank=st.integers(1, 9),
)
def test_any_adapter_is_exact_on_any_requests(kind: str, requests: list[Request], modules: list[str], layers: list[int], rank: int) -> None:
    assert_exact(with_lora(tiny_model(kind), target_modules=modules, layers_to_transform=layers, r=rank), requests)


@settings(max_examples=60, deadline=None)
@given(requests=some_requests)
def test_requests_of_every_shape_are_exact_one_after_another_in_the_same_buffers(requests: list[Request]) -> None:
    model, scorer = REUSED
    assert_exact(model, requests, scorer)


REUSED = (lambda model: (model, Scorer(model)))(with_lora(tiny_model("mistral with a sliding window"), layers_to_transform=[1, 2]))


def test_a_window_hides_what_lies_before_it_by_hand_too() -> None:
    model = tiny_model("mistral with a sliding window").requires_grad_(False)
    request = [Request([5, 6, 7, 8], [[9, 10, 11, 12, 13], [9, 20, 21, 22, 23]])]
    wide = in_float64(type(model)(type(model.config)(**(model.config.to_dict() | {"sliding_window": None}))).eval())
    wide.load_state_dict(model.state_dict())
    windowed, unwindowed = Scorer(model).token_logps(request), plain_scores(wide, request)
    assert Scorer(model).trunk is not None
    torch.testing.assert_close(windowed[0][0], plain_scores(model, request)[0][0], rtol=0, atol=1e-10)
    assert (windowed[0][0] - unwindowed[0][0]).abs().max() > 1e-4  # the test can tell them apart
    assert_exact(with_lora(model), request)


def test_gradients_are_what_finite_differences_say() -> None:
    model = with_lora(tiny_model("qwen2"), layers_to_transform=[1, 2], r=1, target_modules=["q_proj", "v_proj", "down_proj"])
    scorer, tree = Scorer(model), Tree((Request([5, 6, 7], [[8, 9], [8, 10, 11]]),))
    weights = lora_of(model)

    def hidden(*values: Tensor) -> Tensor:
        with torch.no_grad():
            for weight, value in zip(weights, values, strict=True):
                weight.copy_(value)
        return scorer.hidden(tree)

    direction = torch.randn(scorer.hidden(tree).shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = torch.autograd.grad((scorer.hidden(tree) * direction).sum(), weights)
    start = [weight.detach().clone() for weight in weights]
    for which, gradient in enumerate(exact):
        along, step = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(which), dtype=torch.float64), 1e-5
        ends = [[value + sign * step * along if n == which else value for n, value in enumerate(start)] for sign in (1, -1)]
        high, low = ((hidden(*end) * direction).sum() for end in ends)
        assert ((high - low) / (2 * step)).item() == pytest.approx((gradient * along).sum().item(), rel=1e-5, abs=1e-7)


# --- base and adapted model ---


def test_the_base_is_bit_for_bit_an_adapter_of_zeros() -> None:
    model = with_lora(tiny_model())
    scorer = Scorer(model)
    base = scorer.token_logps(REQUESTS, adapted=False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.zero_()
        assert bits(scorer.token_logps(REQUESTS)) == bits(base)


@pytest.mark.parametrize("layers", [[0, 1, 2], [1, 2], [2]])
def test_both_is_bit_for_bit_two_calls(layers: list[int]) -> None:
    model = with_lora(tiny_model(), layers_to_transform=layers)
    scorer = Scorer(model)
    assert scorer.shares_trunk == (0 not in layers)
    adapted, base = scorer.both(REQUESTS)
    assert bits(adapted) == bits(scorer.token_logps(REQUESTS))
    assert bits(base) == bits(scorer.token_logps(REQUESTS, adapted=False))
    assert bits(base) != bits(adapted)
    one, other = (torch.autograd.grad(objective(scores), lora_of(model)) for scores in (adapted, scorer.token_logps(REQUESTS)))
    assert [gradient.numpy().tobytes() for gradient in one] == [gradient.numpy().tobytes() for gradient in other]


def test_with_pefts_adapter_turned_off_it_is_the_base_and_a_gradient_under_way_isnt_disturbed() -> None:
    model = with_lora(tiny_model(), layers_to_transform=[1, 2])
    scorer = Scorer(model)
    policy = scorer.token_logps(REQUESTS)
    with model.disable_adapter():
        reference = scorer.token_logps(REQUESTS)
    assert bits(reference) == bits(scorer.token_logps(REQUESTS, adapted=False))
    assert not reference[0][0].requires_grad
    found = torch.autograd.grad(objective(policy), lora_of(model))
    expected = torch.autograd.grad(objective(plain_scores(model, REQUESTS)), lora_of(model))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-9 * other.norm()


def test_an_adapter_turned_off_in_some_layers_only_is_refused() -> None:
    model = with_lora(tiny_model())
    scorer = Scorer(model)
    model.get_base_model().model.layers[1].mlp.up_proj.enable_adapters(False)
    with pytest.raises(RuntimeError, match="some of the adapter's layers are disabled"):
        scorer.token_logps(REQUESTS)


# --- what may happen to the adapter between two calls ---


def test_changes_of_the_adapter_are_seen() -> None:
    model = with_lora(tiny_model())
    scorer = Scorer(model)
    scorer.token_logps(REQUESTS)
    optimizer = torch.optim.AdamW(lora_of(model), lr=0.1)
    for _ in range(2):
        objective(scorer.token_logps(REQUESTS)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_exact(model, REQUESTS, scorer)
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.3)
    assert_exact(model, REQUESTS, scorer)
    model.load_state_dict(copy.deepcopy(with_lora(tiny_model(), seed=9).state_dict()))
    assert_exact(model, REQUESTS, scorer)
    for weight in lora_of(model):
        weight.data = weight.data * 1.5
    assert_exact(model, REQUESTS, scorer)


def test_new_base_weights_and_biases_loaded_in_place_are_seen() -> None:
    model = with_lora(tiny_model("llama with biases"))
    scorer = Scorer(model)
    before = scorer.token_logps(REQUESTS, adapted=False)
    model.load_state_dict({name: weight * 1.1 for name, weight in model.state_dict().items()})
    assert_exact(model, REQUESTS, scorer)
    assert bits(scorer.token_logps(REQUESTS, adapted=False)) != bits(before)


@pytest.mark.parametrize("change", ["optimizer step", "scale_layer", "optimizer step and another forward"])
def test_an_adapter_changed_between_forward_and_backward_is_refused(change: str) -> None:
    model = with_lora(tiny_model())
    scorer = Scorer(model)
    scores = scorer.token_logps(REQUESTS)
    if change == "scale_layer":
        model.get_base_model().model.layers[0].mlp.up_proj.scale_layer(2.0)
    else:
        with torch.no_grad():
            lora_of(model)[0].add_(1.0)
            if "another" in change:
                scorer.token_logps(REQUESTS)
    with pytest.raises(RuntimeError, match="changed between this forward and its backward"):
        objective(scores).backward()


def test_a_second_backward_is_refused() -> None:
    scorer = Scorer(with_lora(tiny_model()))
    loss = objective(scorer.token_logps(REQUESTS))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="it can be differentiated only once"):
        loss.backward()


def test_gradients_of_gradients_are_refused() -> None:
    model = with_lora(tiny_model())
    loss = objective(Scorer(model).token_logps(REQUESTS))
    gradients = torch.autograd.grad(loss, lora_of(model), create_graph=True)
    with pytest.raises(RuntimeError):
        sum(gradient.square().sum() for gradient in gradients).backward()


def test_two_forwards_may_be_under_way_and_go_back_in_any_order() -> None:
    model = with_lora(tiny_model(), layers_to_transform=[1, 2])
    scorer, weights = Scorer(model), lora_of(model)
    alone = [torch.autograd.grad(objective(scorer.token_logps([request])), weights) for request in REQUESTS[:2]]
    first, second = (scorer.token_logps([request]) for request in REQUESTS[:2])
    scorer.token_logps(REQUESTS, adapted=False)
    dropped = scorer.token_logps(REQUESTS)
    del dropped
    for scores, expected in ((first, alone[0]), (second, alone[1])):
        for one, other in zip(torch.autograd.grad(objective(scores), weights), expected, strict=True):
            assert torch.equal(one, other)


def test_a_loss_of_the_hidden_states_changed_in_place_is_exact_all_the_same() -> None:
    model = with_lora(tiny_model())
    scorer, tree, weights = Scorer(model), Tree(tuple(REQUESTS[:2])), lora_of(model)
    (plain,) = torch.autograd.grad(scorer.hidden(tree).square().sum(), weights[:1])
    hidden = scorer.hidden(tree) * 1.0
    (in_place,) = torch.autograd.grad(hidden.square_().sum(), weights[:1])
    torch.testing.assert_close(in_place, plain, rtol=1e-12, atol=0)


# --- modes and threads ---


@pytest.mark.parametrize("order", [("inference", "no_grad", "grad"), ("grad", "inference", "grad"), ("no_grad", "inference", "grad")])
def test_every_gradient_mode_gives_the_same_bits_and_leaves_the_buffers_to_the_others(order: tuple[str, ...]) -> None:
    model = with_lora(tiny_model(), layers_to_transform=[1, 2])
    scorer = Scorer(model)
    modes = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
    found = []
    for mode in order:
        with modes[mode]():
            found.append(bits(scorer.token_logps(REQUESTS)))
            found.append(bits(scorer.both(REQUESTS)[0]))
    assert all(one == found[0] for one in found)
    assert_exact(model, REQUESTS, scorer)


def test_training_mode_changes_nothing_without_dropout() -> None:
    model = with_lora(tiny_model())
    scorer = Scorer(model)
    assert bits(scorer.token_logps(REQUESTS)) == bits((model.train(), scorer.token_logps(REQUESTS))[1])


def test_two_threads_give_the_bits_of_one_right_after_the_adapter_has_changed() -> None:
    model = with_lora(tiny_model(), layers_to_transform=[1, 2])
    scorer, weights = Scorer(model), lora_of(model)
    packs = [[request, REQUESTS[0]] for request in REQUESTS] * 4

    def work(pack: list[Request]) -> list[bytes]:
        scores, base = scorer.both(pack)
        return bits(base) + bits(scores) + [gradient.numpy().tobytes() for gradient in torch.autograd.grad(objective(scores), weights)]

    with ThreadPoolExecutor(2) as threads:
        for _ in range(3):
            with torch.no_grad():
                for weight in weights:
                    weight.mul_(1.1)
            at_once = list(threads.map(work, packs))
            assert at_once == [work(pack) for pack in packs]


def test_a_thread_waits_until_another_has_taken_over_the_adapters_values() -> None:
    """Held at the first of them, the other must not compute with the old ones."""
    from threading import Event

    model = with_lora(tiny_model())
    scorer = Scorer(model)
    assert scorer.trunk is not None
    with torch.no_grad():
        for weight in lora_of(model):
            weight.mul_(2)
        expected = bits(Scorer(model, by_hand=False).token_logps(REQUESTS))
        assert expected
        held, go_on = Event(), Event()
        projection = scorer.trunk.layers[1].down
        refresh = projection.refresh

        def slow() -> bool:
            held.set()
            go_on.wait(10)
            return refresh()

        projection.refresh = slow  # type: ignore[method-assign]
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(torch.no_grad()(scorer.token_logps), REQUESTS)
            assert held.wait(10)
            projection.refresh = refresh  # type: ignore[method-assign]
            second = threads.submit(torch.no_grad()(scorer.token_logps), REQUESTS)
            with pytest.raises(TimeoutError):
                second.result(timeout=0.2)
            go_on.set()
            assert bits(second.result()) == bits(first.result()) == bits(scorer.token_logps(REQUESTS))


# --- the model it runs on ---


def test_the_models_weights_are_views_and_nothing_is_copied_twice() -> None:
    model = with_lora(tiny_model("llama with biases"))
    trunk = Scorer(model).trunk
    assert trunk is not None
    stacked = {part.weight.untyped_storage().data_ptr() for layer in trunk.layers for part in layer.projections}
    linear = [weight for name, weight in model.named_parameters() if "base_layer.weight" in name]
    assert len(linear) == 3 * 7
    assert all(weight.untyped_storage().data_ptr() in stacked for weight in linear)
    beside = sum(part.rank * part.n_out for layer in trunk.layers for part in layer.projections)
    assert sum(part.weight.untyped_storage().nbytes() for layer in trunk.layers for part in layer.projections) == 8 * (
        sum(weight.numel() for weight in linear) + beside
    )


def test_a_second_scorer_shares_the_firsts_matrices_and_both_stay_right() -> None:
    model = with_lora(tiny_model("llama with biases"), target_modules=["q_proj", "v_proj", "o_proj"])
    first, second = Scorer(model), Scorer(model)
    assert first.trunk is not None
    assert second.trunk is not None
    for one, other in zip(first.trunk.layers, second.trunk.layers, strict=True):
        for mine, yours in zip(one.projections, other.projections, strict=True):
            assert mine.weight.data_ptr() == yours.weight.data_ptr()
    third = Scorer(model)
    assert_exact(model, REQUESTS, first)
    with torch.no_grad():
        for weight in lora_of(model):
            weight.mul_(2)
    for scorer in (second, first, third, Scorer(model)):
        assert_exact(model, REQUESTS, scorer)


def test_a_new_adapter_on_other_modules_finds_none_of_the_old_one_beside_the_weights() -> None:
    model = with_lora(tiny_model(), target_modules=["q_proj", "up_proj"])
    Scorer(model).token_logps(REQUESTS)
    base = model.unload()
    assert_exact(with_lora(base, target_modules=["k_proj", "gate_proj"]), REQUESTS)


def test_transformers_own_forward_is_what_it_was() -> None:
    model = with_lora(tiny_model("llama with biases"))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    before = model(ids).logits
    Scorer(model).token_logps(REQUESTS)
    assert torch.equal(model(ids).logits, before)
    loss = model(ids).logits.square().sum()
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(loss, lora_of(model)))


def test_adapter_and_merged_model_are_saved_as_ever(tmp_path: Path) -> None:
    from peft import PeftModel

    model = with_lora(tiny_model("qwen2"))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected = model(ids).logits
        scorer = Scorer(model)
        scorer.token_logps(REQUESTS)
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        loaded = PeftModel.from_pretrained(tiny_model("qwen2"), tmp_path / "adapter")
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-12)
        assert torch.equal(copy.deepcopy(model)(ids).logits, expected)
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged", state_dict={name: weight.contiguous() for name, weight in merged.state_dict().items()})
        again = in_float64(type(merged).from_pretrained(tmp_path / "merged", dtype=torch.float64))
        for which in (merged, again):
            torch.testing.assert_close(which(ids).logits, expected, rtol=0, atol=1e-12)
        found = Scorer(merged).token_logps(REQUESTS)
        torch.testing.assert_close(found[0][0], plain_scores(again, REQUESTS)[0][0], rtol=0, atol=1e-10)


def merge(model: Any) -> None:
    model.merge_adapter()


def merge_and_unload(model: Any) -> None:
    model.merge_and_unload()


def unload(model: Any) -> None:
    model.unload()


def to_float32(model: Any) -> None:
    model.float()


def assign_weights(model: Any) -> None:
    model.load_state_dict({name: weight.clone() for name, weight in model.state_dict().items()}, assign=True)


def unfreeze(model: Any) -> None:
    model.requires_grad_(True)


def add_a_second_adapter(model: Any) -> None:
    from peft import LoraConfig

    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("change", [merge, merge_and_unload, unload, to_float32, assign_weights, unfreeze, add_a_second_adapter])
def test_a_model_that_isnt_any_more_what_the_scorer_was_made_for_is_refused(change: Any) -> None:
    model = with_lora(tiny_model(), layers_to_transform=[1, 2])
    scorer = Scorer(model)
    scores = scorer.token_logps(REQUESTS)
    change(model)
    for call in (scorer.token_logps, scorer.both, lambda requests: scorer.token_logps(requests, adapted=False)):
        with pytest.raises(RuntimeError, match="since this scorer was made: make a new one"):
            call(REQUESTS)
    with pytest.raises(RuntimeError, match="since this scorer was made"):
        objective(scores).backward()


def test_an_adapter_put_on_after_the_scorer_was_made_is_refused() -> None:
    model = tiny_model().requires_grad_(False)
    scorer = Scorer(model)
    with_lora(model)
    with pytest.raises(RuntimeError, match="make a new one"):
        scorer.token_logps(REQUESTS)


def test_everything_is_freed_with_the_model_also_while_a_backward_is_due() -> None:
    model = with_lora(tiny_model())
    scorer = Scorer(model)
    loss = objective(scorer.token_logps(REQUESTS))
    loss.backward()
    alive = [weakref.ref(scorer.trunk), weakref.ref(model), weakref.ref(lora_of(model)[0])]
    due = objective(scorer.token_logps(REQUESTS))
    del scorer, model, loss, due
    gc.collect()
    assert [reference() for reference in alive] == [None, None, None]


def test_without_anything_to_train_nothing_is_kept_for_a_backward() -> None:
    model = with_lora(tiny_model()).requires_grad_(False)
    scorer = Scorer(model)
    assert scorer.trunk is not None
    assert not scorer.token_logps(REQUESTS)[0][0].requires_grad
    assert len(scorer.trunk._short_tapes) == 1
    assert {slot for slot, _, _ in scorer.trunk._short_tapes[0].buffers} == {-1}


def test_a_frozen_part_of_the_adapter_gets_no_gradient_and_the_rest_the_right_one() -> None:
    model = with_lora(tiny_model())
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_B" in name)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found, expected = (
        torch.autograd.grad(objective(scores), weights) for scores in (Scorer(model).token_logps(REQUESTS), plain_scores(model, REQUESTS))
    )
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-9 * other.norm()


# --- what it leaves to transformers ---


def with_two_adapters() -> Any:
    from peft import LoraConfig

    model = with_lora(tiny_model())
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    return model


def merged_in_place() -> Any:
    model = with_lora(tiny_model())
    model.merge_adapter()
    return model


def with_dropout_in_attention() -> Any:
    model = with_lora(tiny_model())
    model.get_base_model().config.attention_dropout = 0.1
    return model


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: tiny_model(), id="a base that is trained"),
        pytest.param(lambda: with_lora(tiny_model().bfloat16()), id="bfloat16"),
        pytest.param(lambda: with_lora(tiny_model().half()), id="float16"),
        pytest.param(lambda: with_lora(tiny_model(), lora_dropout=0.1), id="dropout"),
        pytest.param(lambda: with_lora(tiny_model(), use_dora=True), id="DoRA"),
        pytest.param(lambda: with_lora(tiny_model("llama with biases"), lora_bias=True), id="biases in the adapter"),
        pytest.param(lambda: with_lora(tiny_model("llama with biases"), bias="lora_only"), id="trained biases"),
        pytest.param(lambda: with_lora(tiny_model(), modules_to_save=["norm"]), id="trained norms"),
        pytest.param(lambda: with_lora(tiny_model(), modules_to_save=["norm"]).requires_grad_(False), id="once trained norms"),
        pytest.param(lambda: with_lora(tiny_model("mistral"), target_modules=["embed_tokens"]), id="adapted embeddings"),
        pytest.param(with_two_adapters, id="two adapters"),
        pytest.param(merged_in_place, id="a merged adapter"),
        pytest.param(with_dropout_in_attention, id="dropout in attention"),
        pytest.param(lambda: with_lora(tiny_model("llama with dynamic positions")), id="dynamic positions"),
        pytest.param(lambda: with_lora(tiny_model("qwen2 with some sliding windows")), id="different layers"),
        pytest.param(lambda: with_lora(tiny_model("qwen3")), id="another type"),
        pytest.param(lambda: with_lora(tiny_model("gemma")), id="another type of norm"),
    ],
)
def test_whatever_is_more_than_plain_lora_on_a_plain_llama_isnt_run_by_hand(make: Any) -> None:
    model = make()
    assert not can_run(model.get_base_model() if hasattr(model, "get_base_model") else model)


def test_other_kinds_of_adapters_arent_run_by_hand() -> None:
    from peft import IA3Config, LoHaConfig, get_peft_model

    for config in (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), LoHaConfig(target_modules=["k_proj"])):
        model = get_peft_model(tiny_model(), config)
        assert not can_run(model.get_base_model())
        with torch.no_grad():
            found = Scorer(model).token_logps(REQUESTS)
            torch.testing.assert_close(found[0][0], plain_scores(model, REQUESTS)[0][0], rtol=0, atol=1e-10)
