import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from small_chat import write_adapter, write_small_llama
from unstilted.engines import Engine, Generated, Request, Sampling
from unstilted.engines.embedded import EmbeddedEngine
from unstilted.engines.transformers import TransformersEngine, draw
from unstilted.errors import UserError
from unstilted.lm.chat import ChatTokens
from unstilted.models.gguf_files import write_lora_gguf
from unstilted.models.load import load_model, load_tokenizer
from unstilted.models.resolve import BaseModelFiles, resolve_model
from unstilted.recipe import ModelTable
from unstilted.records import Message

ASKED = (
    "hey",
    "my train is late again, what now",
    "i can't sleep and it is three in the morning, what should i do about it do you think, please be honest with me",
    "why do cats knead",
)
SAMPLED = Sampling(temperature=0.8, top_p=0.9, max_new_tokens=8)
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=8)


def by_key(engine: Engine, requests: Sequence[Request], sampling: Sampling) -> dict[str, Generated]:
    done = list(engine.generate(requests, sampling))
    assert sorted(answer.key for answer in done) == sorted(request.key for request in requests)
    return {answer.key: answer for answer in done}


@pytest.fixture(scope="module")
def requests(embedded_model: BaseModelFiles) -> list[Request]:
    chat = ChatTokens(load_tokenizer(embedded_model), embedded_model.name)
    return [Request(f"p{row}", chat.prompt([Message(role="user", content=text)]), seed=100 + row) for row, text in enumerate(ASKED)]


# llama.cpp


def embedded_engine(model: BaseModelFiles, adapter: Path | None = None, *, n_parallel: int = 4, n_servers: int = 2) -> EmbeddedEngine:
    assert model.gguf is not None
    return EmbeddedEngine(model.gguf, adapter, n_parallel=n_parallel, n_context=256, n_servers=n_servers)


@pytest.fixture(scope="module")
def base_answers(embedded_model: BaseModelFiles, requests: list[Request]) -> dict[str, Generated]:
    return by_key(embedded_engine(embedded_model), requests, SAMPLED)


@pytest.mark.parametrize(("n_parallel", "n_servers"), [(2, 1), (8, 1), (8, 2)])
def test_llama_cpp_answers_alike_however_many_slots_and_servers_there_are(
    embedded_model: BaseModelFiles, requests: list[Request], base_answers: dict[str, Generated], n_parallel: int, n_servers: int
) -> None:
    engine = embedded_engine(embedded_model, n_parallel=n_parallel, n_servers=n_servers)
    assert by_key(engine, requests, SAMPLED) == base_answers


def test_llama_cpp_answers_alike_in_any_order_and_when_asked_again(
    embedded_model: BaseModelFiles, requests: list[Request], base_answers: dict[str, Generated]
) -> None:
    engine = embedded_engine(embedded_model)
    shuffled = random.Random(0).sample(requests, len(requests))
    assert by_key(engine, shuffled, SAMPLED) == base_answers
    assert by_key(engine, requests, SAMPLED) == base_answers  # by now every prompt has been in some slot's cache
    assert by_key(engine, requests[2:3], SAMPLED) == {"p2": base_answers["p2"]}


def test_llama_cpp_stops_at_the_length_limit_or_by_itself_and_counts_its_tokens(
    embedded_model: BaseModelFiles, requests: list[Request], base_answers: dict[str, Generated]
) -> None:
    cut = [answer for answer in base_answers.values() if answer.finish_reason == "length"]
    assert cut
    assert all(answer.n_tokens == SAMPLED.max_new_tokens for answer in cut)
    assert all(answer.text == answer.text.strip() for answer in base_answers.values())
    (short,) = by_key(embedded_engine(embedded_model), requests[:1], Sampling(0.0, 1.0, 200)).values()
    assert short.finish_reason == "stop"
    assert short.n_tokens < 200
    assert "<|im_end|>" not in short.text


def test_another_seed_samples_another_answer_and_greedy_answers_have_no_seed(
    embedded_model: BaseModelFiles, requests: list[Request], base_answers: dict[str, Generated]
) -> None:
    reseeded = [Request(request.key, request.tokens, request.seed + 1) for request in requests]
    engine = embedded_engine(embedded_model)
    assert by_key(engine, reseeded, SAMPLED) != base_answers
    assert by_key(engine, reseeded, GREEDY) == by_key(engine, requests, GREEDY)


def test_an_adapter_at_strength_0_answers_exactly_as_base_and_at_1_doesnt(
    embedded_model: BaseModelFiles, requests: list[Request], base_answers: dict[str, Generated], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", embedded_model.folder, size=0.1)
    config = json.loads((embedded_model.folder / "config.json").read_text())
    for strength, is_same in [(0.0, True), (1.0, False)]:
        write_lora_gguf(adapter, config, tmp_path / "adapter.gguf", strength)
        answers = by_key(embedded_engine(embedded_model, tmp_path / "adapter.gguf"), requests, SAMPLED)
        assert (answers == base_answers) == is_same


def test_a_prompt_longer_than_the_context_is_refused_with_its_id(embedded_model: BaseModelFiles) -> None:
    engine = embedded_engine(embedded_model, n_parallel=1, n_servers=1)
    with pytest.raises(UserError, match=r"^respond, prompt 'long': llama\.cpp answered: .* Shorten that prompt or raise the context\.$"):
        list(engine.generate([Request("long", [5] * 300, 1)], GREEDY))


# transformers


@pytest.fixture(scope="module")
def small_model(embedded_model: BaseModelFiles, tmp_path_factory: pytest.TempPathFactory) -> BaseModelFiles:
    return resolve_model(ModelTable(source=str(write_small_llama(tmp_path_factory.mktemp("small") / "model", embedded_model))))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_transformers_answers_alike_one_by_one_in_batches_and_in_any_order(
    small_model: BaseModelFiles, requests: list[Request], sampling: Sampling
) -> None:
    alone = by_key(TransformersEngine(small_model, None, 1.0, n_parallel=1), requests, sampling)
    assert by_key(TransformersEngine(small_model, None, 1.0, n_parallel=4), requests, sampling) == alone
    assert by_key(TransformersEngine(small_model, None, 1.0, n_parallel=64), requests[::-1], sampling) == alone
    assert len({answer.text for answer in alone.values()}) == len(ASKED)


def test_greedy_answers_of_transformers_are_those_of_its_own_generate(small_model: BaseModelFiles, requests: list[Request]) -> None:
    answers = by_key(TransformersEngine(small_model, None, 1.0, n_parallel=3), requests, GREEDY)
    model, tokenizer = load_model(small_model), load_tokenizer(small_model)
    for request in requests:
        prompt = torch.tensor([request.tokens])
        written = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=GREEDY.max_new_tokens, pad_token_id=2
        )[0, len(request.tokens) :]
        assert answers[request.key].text == tokenizer.decode(written, skip_special_tokens=True).strip()


@pytest.mark.parametrize("which", ["of the turn, as the template has it", "of the text"])
def test_transformers_ends_at_the_end_token_while_others_go_on(small_model: BaseModelFiles, requests: list[Request], which: str) -> None:
    """The end token is made one that greedy decoding happens to write third."""
    engine = TransformersEngine(small_model, None, 1.0, n_parallel=6)
    before = by_key(engine, requests, GREEDY)
    model = engine.model
    prompt = torch.tensor([requests[0].tokens])
    third = int(model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=3, pad_token_id=2)[0, -1])
    if which == "of the text":
        engine.tokenizer.eos_token = engine.tokenizer.convert_ids_to_tokens(third)
    else:
        engine.end_of_turn = third
    after = by_key(engine, requests, GREEDY)
    assert (after["p0"].finish_reason, after["p0"].n_tokens) == ("stop", 2)
    assert before["p0"].finish_reason == "length"
    assert before["p0"].n_tokens == GREEDY.max_new_tokens
    assert any(after[key] == before[key] for key in before)


def test_a_peft_adapter_counts_by_its_strength(small_model: BaseModelFiles, requests: list[Request], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", small_model.folder)
    base = by_key(TransformersEngine(small_model, None, 1.0, n_parallel=4), requests, GREEDY)
    answers = [by_key(TransformersEngine(small_model, adapter, strength, n_parallel=4), requests, GREEDY) for strength in (0.0, 0.5, 1.0)]
    assert answers[0] == base
    assert answers[1] != base
    assert answers[2] != answers[1]


# Drawing a token


LOGITS = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()


def shares(sampling: Sampling, n: int = 4000) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(LOGITS, sampling, generator) for _ in range(n)]
    return [drawn.count(token) / n for token in range(4)]


def test_tokens_are_drawn_with_their_probabilities() -> None:
    assert shares(Sampling(1.0, 1.0, 1)) == pytest.approx([0.5, 0.1, 0.3, 0.1], abs=0.03)


def test_temperature_sharpens_the_probabilities() -> None:
    squares = [0.25, 0.01, 0.09, 0.01]  # temperature 0.5 squares them
    assert shares(Sampling(0.5, 1.0, 1)) == pytest.approx([value / sum(squares) for value in squares], abs=0.03)


@pytest.mark.parametrize(("top_p", "expected"), [(0.5, [1, 0, 0, 0]), (0.6, [0.625, 0, 0.375, 0]), (0.79, [0.625, 0, 0.375, 0])])
def test_top_p_keeps_the_likeliest_tokens_that_together_hold_it(top_p: float, expected: list[float]) -> None:
    assert shares(Sampling(1.0, top_p, 1)) == pytest.approx(expected, abs=0.03)


def test_temperature_0_takes_the_likeliest_token() -> None:
    assert shares(Sampling(0.0, 1.0, 1), n=5) == [1, 0, 0, 0]
