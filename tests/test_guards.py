"""Rules that stop or warn, before a training and while it runs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from small_chat import write_small_llama
from tiny import tiny_model
from unstilted import train
from unstilted.errors import UserError
from unstilted.lm.chat import TokenPair
from unstilted.losses import NEEDS_REFERENCE, TAKES_LABEL_SMOOTHING, PairLogps, odds_ratio_loss, preference_loss, reward_margin
from unstilted.models.resolve import BaseModelFiles
from unstilted.recipe import WITHOUT_LABEL_SMOOTHING, LossName, Recipe, TrainTable, recipe_from
from unstilted.records import HeldOut, Message, Pair, TrainPoint, read_jsonl, write_jsonl
from unstilted.rundir import RunDir
from unstilted.train.guards import (
    BETAS,
    LEARNING_RATES,
    loss_margin,
    require_finite_gradient,
    require_finite_losses,
    setting_warnings,
    stop_reason,
    training_warnings,
)
from unstilted.train.trainer import Trainer

LOSSES: tuple[LossName, ...] = tuple(BETAS)
PAIRS = [TokenPair(f"p{n}", [3 + n, 4, 5 + n], [6, 7 + n, 8, 2], [9 + n, 10, 2]) for n in range(6)]
FINE = HeldOut(loss=0.1, margin=1.0, accuracy=0.9, chosen_logp_change=1.0, rejected_logp_change=-5.0, loss_margin=1.0, kl=0.1)


def settings(**changes: Any) -> TrainTable:
    few: dict[str, Any] = {
        "batch_size": 2,
        "eval_every": 1,
        "first_layer_share": 0.3,
        "rank": 4,
        "learning_rate": 1e-2,
        "n_warmup_steps": 1,
    }
    return TrainTable(**(few | changes))


def held_out(**changes: float | None) -> HeldOut:
    return FINE.model_copy(update=changes)


def points(*looks: HeldOut | None, pairs_a_step: int = 8) -> list[TrainPoint]:
    return [
        TrainPoint(
            step=n,
            n_steps=len(looks),
            n_pairs=n * pairs_a_step,
            loss=1.0,
            margin=1.0,
            learning_rate=1e-3,
            gradient_norm=1.0,
            held_out=look,
        )
        for n, look in enumerate(looks, start=1)
    ]


def logps(*values: float) -> PairLogps:
    return PairLogps(*(torch.tensor([value], dtype=torch.float64) for value in values))


POLICY, REFERENCE = logps(-20.0, -30.0, 10, 5), logps(-24.0, -28.0, 10, 5)


# The margin by which training stops


def test_the_margin_is_the_argument_of_each_loss() -> None:
    def margin(loss: LossName) -> float:
        value = loss_margin(POLICY, REFERENCE, TrainTable(loss=loss, beta=2.0, simpo_gamma=0.5))
        assert value is not None
        return value.item()

    assert margin("sigmoid") == margin("robust") == margin("hinge") == 2 * (4 + 2)
    assert margin("sigmoid_norm") == pytest.approx(2 * (0.4 + 0.4))
    assert margin("simpo") == pytest.approx(2 * (-2 + 6) - 0.5)
    odds = [math.exp(logp) / (1 - math.exp(logp)) for logp in (-2, -6)]
    assert margin("orpo") == pytest.approx(math.log(odds[0] / odds[1]))
    assert loss_margin(POLICY, REFERENCE, TrainTable(loss="ipo")) is None


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "simpo", "orpo"])
def test_at_the_default_stop_margin_a_pair_pulls_less_than_a_hundredth_of_what_it_can(loss: LossName) -> None:
    table = TrainTable(loss=loss, beta=5.0 if loss in ("sigmoid_norm", "simpo") else 1.0)
    gap = torch.linspace(-40, 59, 400, dtype=torch.float64)
    count = torch.full_like(gap, 10.0)
    policy = PairLogps((-60 + gap).requires_grad_(), torch.full_like(gap, -60.0), count, count)
    reference = PairLogps(torch.full_like(gap, -60.0), torch.full_like(gap, -60.0), count, count)
    argument = loss_margin(policy, reference, table)
    assert argument is not None
    pull = (
        odds_ratio_loss(policy)
        if loss == "orpo"
        else preference_loss(loss, policy, reference, beta=table.beta, label_smoothing=0, simpo_gamma=table.simpo_gamma)
    )
    (wanted,) = torch.autograd.grad(pull.sum(), policy.chosen, retain_graph=True)
    (slope,) = torch.autograd.grad(argument.sum(), policy.chosen)
    is_past = argument > table.stop_margin
    assert is_past.any()
    assert bool(((wanted / slope).abs()[is_past] < 0.01).all())  # |d loss / d argument|, 1 at most
    assert bool(((wanted / slope).abs()[argument < 0] > 0.4).all())


def test_training_stops_at_the_margin_or_when_chosen_answers_get_unlikely() -> None:
    table = settings(stop_margin=2.0, stop_chosen_drop=3.0)
    assert stop_reason(FINE, table) == ""
    assert stop_reason(held_out(loss_margin=2.0), table) == "held-out margin 2.00 reached train.stop_margin 2"
    assert stop_reason(held_out(margin=50.0), table) == ""  # the curve's margin is in another unit for some losses
    assert "chosen answers lost 3.5 nats" in stop_reason(held_out(chosen_logp_change=-3.5), table)
    assert stop_reason(held_out(loss_margin=None, margin=99.0), table) == ""


# Warnings before the run


def test_the_default_recipe_and_every_known_beta_give_no_warning() -> None:
    assert setting_warnings(TrainTable(), n_pairs=160, n_steps=20) == []
    for loss, ends in BETAS.items():
        for beta in ends:
            assert setting_warnings(TrainTable(loss=loss, beta=beta), 160, 20) == [], (loss, beta)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 5e-7}, "train.learning_rate 5e-07 is too small to change anything: 1e-06 to 0.005 is what works."),
        ({"learning_rate": 0.05}, "train.learning_rate 0.05 is likely to break the model: 1e-06 to 0.005 is what works."),
        ({"tuning": "full"}, "train.learning_rate 0.001 is likely to break the model: 1e-08 to 0.0001 is what works."),
        ({"beta": 5.0}, "train.beta 5 is above what the loss 'sigmoid' is known to work with: 0.01 to 0.5."),
        ({"loss": "simpo"}, "train.beta 0.1 is below what the loss 'simpo' is known to work with: 2 to 10."),
        ({"loss": "ipo", "beta": 5.0}, "train.beta 5 is above what the loss 'ipo' is known to work with: 0.01 to 1."),
        ({"batch_size": 200}, "train.batch_size 200 is more than the 160 pairs there are: every step sees all of them."),
        (
            {"n_warmup_steps": 40},
            "train.n_warmup_steps 40 is the whole run of 20 steps: the learning rate gets to 0.0005 and never falls.",
        ),
    ],
)
def test_a_setting_that_cannot_work_is_told_with_what_does(changes: dict[str, Any], said: str) -> None:
    assert setting_warnings(TrainTable(**changes), n_pairs=160, n_steps=20) == [said]


def test_too_few_steps_are_told() -> None:
    assert setting_warnings(TrainTable(), 24, 3)[0] == "only 3 optimizer steps: take more pairs or epochs, or a smaller train.batch_size."
    assert setting_warnings(TrainTable(), 80, 10) == []


def test_the_ranges_leave_room_for_what_each_kind_of_tuning_is_known_to_need() -> None:
    assert LEARNING_RATES["lora"][0] <= 5e-6 <= 1e-3 <= LEARNING_RATES["lora"][1]
    assert LEARNING_RATES["full"][0] <= 3e-7 <= 1e-6 <= LEARNING_RATES["full"][1]


def test_label_smoothing_with_a_loss_that_has_none_is_refused_where_it_is_written() -> None:
    text = '[train]\nloss = "ipo"\nlabel_smoothing = 0.1\n'
    with pytest.raises(UserError) as refused:
        recipe_from({"train": {"loss": "ipo", "label_smoothing": 0.1}}, text)
    assert (
        str(refused.value) == "recipe line 3: 'train.label_smoothing' is 0.1: hinge, ipo, orpo have no label smoothing. Change the value."
    )
    assert recipe_from({"train": {"loss": "robust", "label_smoothing": 0.1}}).train.label_smoothing == 0.1
    assert set(WITHOUT_LABEL_SMOOTHING) == set(LOSSES) - TAKES_LABEL_SMOOTHING


# Warnings while it runs


def test_a_good_training_gives_no_warning() -> None:
    looks = [held_out(chosen_logp_change=float(n), rejected_logp_change=-4.0 * n, loss_margin=0.3 * n) for n in range(6)]
    assert training_warnings(points(None, *looks), settings(), 24) == []


def test_chosen_answers_getting_unlikely_while_the_margin_grows_is_told_once_at_its_first_step() -> None:
    looks = [held_out(chosen_logp_change=-0.8 * n, rejected_logp_change=-3.0 * n) for n in range(1, 6)]
    (said,) = training_warnings(points(*looks), settings(), 24)
    assert said.startswith("step 2: held-out chosen answers lost 1.6 nats while the margin grew: both answers are unlearnt")
    assert "likelihood displacement" in said
    recovering = [held_out(chosen_logp_change=-3.0 + n, rejected_logp_change=-9.0 - n) for n in range(3)]
    assert len(training_warnings(points(*recovering), settings(), 24)) == 1  # the fall was before the first look
    losing_both = [held_out(chosen_logp_change=-3.0 * n, rejected_logp_change=-3.0 * n) for n in range(4)]
    assert training_warnings(points(*losing_both), settings(), 24) == []


def test_all_pairs_told_apart_at_once_says_that_accuracy_means_nothing() -> None:
    (said,) = training_warnings(points(None, held_out(accuracy=1.0)), settings(), 24)
    assert said.startswith("step 2: all 24 held-out pairs are told apart after 16 pairs: something on the surface")
    assert training_warnings(points(None, held_out(accuracy=1.0)), settings(), 4) == []  # luck
    assert training_warnings(points(*[None] * 40, held_out(accuracy=1.0)), settings(), 24) == []  # learnt
    assert training_warnings(points(None, held_out(accuracy=1.0)), settings(loss="simpo"), 24) == []  # base may do as well


def test_a_model_far_from_base_is_told_with_the_limit() -> None:
    (said,) = training_warnings(points(FINE, held_out(kl=0.61), held_out(kl=0.9)), settings(warn_kl=0.6), 24)
    assert said.startswith("step 2: the tuned model is 0.61 nats a token away from base, more than train.warn_kl 0.6:")
    assert training_warnings(points(held_out(kl=None)), settings(warn_kl=0.6), 24) == []


# Numbers that are none


def test_each_pair_without_a_finite_loss_is_named_and_the_checkpoint_that_is_kept() -> None:
    losses = torch.tensor([0.5, math.nan, math.inf])
    with pytest.raises(UserError) as refused:
        require_finite_losses(["a", "b", "c"], losses, "train, step 9", points(None, FINE, None), settings())
    assert str(refused.value) == (
        "train, step 9: the loss of pair 'b' is nan, 'c' is inf. Was it the machine? The same command goes on from step 2, whose "
        "checkpoint is kept. Otherwise lower train.learning_rate (0.01), or take the pair out if there is something odd about it."
    )
    require_finite_losses(["a"], losses[:1], "train, step 9", [], settings())


def test_a_gradient_without_a_number_names_the_pairs_of_its_batch() -> None:
    with pytest.raises(
        UserError, match=r"^train, step 1: the gradient norm is nan in the batch of the pairs 'a', 'b'\. .* starts anew, no"
    ):
        require_finite_gradient(["a", "b"], math.nan, "train, step 1", [], settings())


@pytest.fixture
def files(tmp_path: Path) -> BaseModelFiles:
    tiny_model().float().save_pretrained(tmp_path / "tiny")
    return BaseModelFiles("tiny", tmp_path / "tiny", "tiny", "none")


def test_a_loss_that_is_no_number_stops_and_names_the_pair(files: BaseModelFiles, tmp_path: Path) -> None:
    trainer = Trainer(settings(), 0, files)
    with torch.no_grad():
        trainer.parameters[0].fill_(math.nan)
    with pytest.raises(UserError, match=r"train, step 1: the loss of pair 'p\d' is nan"):
        trainer.train(PAIRS, PAIRS[:2], tmp_path / "checkpoint.pt", "key")


@pytest.mark.parametrize("what", ["gradient", "weights"])
def test_a_training_that_broke_goes_on_from_its_last_good_checkpoint_to_the_same_end(
    files: BaseModelFiles, tmp_path: Path, what: str
) -> None:
    table, checkpoint = settings(n_epochs=2), tmp_path / "checkpoint.pt"
    whole = Trainer(table, 0, files)
    whole.train(PAIRS, PAIRS[:2], tmp_path / "whole.pt", "key")

    broken = Trainer(table, 0, files)
    learn = broken.learn

    def learn_badly(batch: Any) -> Any:
        outcome = learn(batch)
        if len(broken.points) == 3:
            (broken.parameters[1].grad if what == "gradient" else broken.parameters[1].data).view(-1)[0] = math.nan
        return outcome

    broken.learn = learn_badly  # type: ignore[method-assign]
    # broken weights show at the next look, which comes before the next checkpoint
    said = (
        r"step 4: the gradient norm is nan in the batch"
        if what == "gradient"
        else r"held-out pairs at step 4: the loss of pair 'p0' is nan"
    )
    with pytest.raises(UserError, match=rf"{said}(.|\n)*goes on from step 3, whose"):
        broken.train(PAIRS, PAIRS[:2], checkpoint, "key")

    again = Trainer(table, 0, files)
    again.resume(checkpoint, "key")
    assert len(again.points) == 3
    again.train(PAIRS, PAIRS[:2], checkpoint, "key")
    assert all(torch.equal(one, other) for one, other in zip(again.parameters, whole.parameters, strict=True))
    assert again.points == whole.points


# Looks at the held-out pairs


@pytest.mark.parametrize("loss", LOSSES)
def test_a_look_holds_what_the_loss_calls_margin_and_kl_from_the_whole_softmax(
    files: BaseModelFiles, tmp_path: Path, loss: LossName
) -> None:
    table = settings(loss=loss, beta=2.0 if loss not in NEEDS_REFERENCE else 0.3, n_epochs=2, stop_chosen_drop=1e6, stop_margin=1e6)
    trainer = Trainer(table, 0, files)
    trainer.train(PAIRS, PAIRS[:3], tmp_path / "checkpoint.pt", "key")
    look = trainer.evaluate(PAIRS)

    model, divergences, sums = trainer.model.eval(), [], []
    for pair in PAIRS:
        for answer in (pair.chosen, pair.rejected):
            ids, places = torch.tensor([pair.prompt + answer]), slice(len(pair.prompt) - 1, -1)
            with torch.no_grad():
                policy = model(ids).logits[0, places].double().log_softmax(-1)
                with model.disable_adapter():
                    base = model(ids).logits[0, places].double().log_softmax(-1)
            divergences.append((policy.exp() * (policy - base)).sum(1))
            sums.append([logps.gather(1, torch.tensor(answer)[:, None]).sum() for logps in (policy, base)])
    assert look.kl == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-3)
    assert look.kl > 1e-4

    values = torch.tensor(sums)
    counts = [torch.tensor([float(len(getattr(pair, side))) for pair in PAIRS]) for side in ("chosen", "rejected")]
    policy, reference = (PairLogps(values[0::2, column], values[1::2, column], *counts) for column in (0, 1))
    assert look.chosen_logp_change == pytest.approx((policy.chosen - reference.chosen).mean().item(), rel=1e-3, abs=1e-5)
    assert look.margin == pytest.approx(reward_margin(loss, policy, reference, beta=table.beta).mean().item(), rel=1e-3, abs=1e-5)
    argument = loss_margin(policy, reference, table)
    assert (look.loss_margin is None) == (argument is None)
    if argument is not None:
        assert look.loss_margin == pytest.approx(argument.mean().item(), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("changes", [{"tuning": "full", "learning_rate": 1e-4}, {"pissa": True}])
def test_where_base_is_gone_kl_is_left_out_and_never_a_number_that_it_is_not(
    files: BaseModelFiles, tmp_path: Path, changes: dict[str, Any]
) -> None:
    trainer = Trainer(settings(**changes), 0, files, None, PAIRS)
    trainer.train(PAIRS, PAIRS[:2], tmp_path / "checkpoint.pt", "key")
    assert all(point.held_out is not None and point.held_out.kl is None for point in trainer.points)
    write_jsonl(tmp_path / "train.jsonl", trainer.points)
    assert "kl" not in (tmp_path / "train.jsonl").read_text()


def test_kl_of_a_model_that_hides_nothing_between_continuations_is_the_same() -> None:
    """A sliding window shorter than the conversation: each continuation runs alone."""
    from unstilted.lm.score import Scorer
    from unstilted.train.adapter import add_adapter
    from unstilted.train.divergence import Divergence

    model = add_adapter(tiny_model("mistral with a sliding window"), settings())
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    pairs = [TokenPair("long", list(range(3, 15)), [6, 7, 8, 2], [9, 10, 2])]
    scorer = Scorer(model, by_hand=False)
    with torch.no_grad():
        together, kl = Divergence(scorer, keeps_base=True).look(pairs)
        alone = []
        for answer in (pairs[0].chosen, pairs[0].rejected):
            ids, places = torch.tensor([pairs[0].prompt + answer]), slice(len(pairs[0].prompt) - 1, -1)
            policy = model(ids).logits[0, places].log_softmax(-1)
            with model.disable_adapter():
                base = model(ids).logits[0, places].log_softmax(-1)
            alone.append((policy.exp() * (policy - base)).sum(1))
    torch.testing.assert_close(kl, torch.cat(alone), rtol=1e-8, atol=1e-10)
    assert [len(side) for side in together[0]] == [4, 3]


# Nothing is cut


@pytest.fixture
def chat_model(embedded_model: BaseModelFiles, tmp_path: Path) -> Path:
    return write_small_llama(tmp_path / "model", embedded_model)


def run_folder(tmp_path: Path, n_words: dict[str, int]) -> RunDir:
    """Pairs whose chosen answer has so many words, and two short held-out ones."""

    def pair(name: str, n: int) -> Pair:
        chosen, rejected = " ".join(["yes"] * n), "no"
        return Pair(
            id=name,
            prompt=(Message(role="user", content="well?"),),
            chosen=(Message(role="assistant", content=chosen),),
            rejected=(Message(role="assistant", content=rejected),),
        )

    folder = tmp_path / "run"
    folder.mkdir()
    write_jsonl(folder / "pairs.jsonl", [pair(name, n) for name, n in n_words.items()])
    write_jsonl(folder / "held_out.jsonl", [pair("h1", 4), pair("h2", 40)])
    return RunDir(folder)


def recipe(model: Path, **changes: Any) -> Recipe:
    few = {"batch_size": 2, "eval_every": 2, "rank": 2, "max_tokens": 48, "trackers": []} | changes
    return recipe_from({"model": {"source": str(model)}, "train": few})


def test_pairs_that_are_too_long_are_refused_with_their_lengths(chat_model: Path, tmp_path: Path) -> None:
    run_dir = run_folder(tmp_path, {"a": 5, "b": 200, "c": 100})
    with pytest.raises(UserError) as refused:
        train.run(recipe(chat_model), run_dir)
    head, lengths = str(refused.value).split("train.max_tokens is 48: ")
    assert head == f"{run_dir.file('pairs.jsonl')}: 2 of 3 pairs are too long, "
    assert lengths == (
        "b (233 tokens), c (133 tokens). They are never cut: raise train.max_tokens, shorten them, or leave them out with "
        'train.long_pairs = "drop".'
    )


def test_pairs_that_are_too_long_are_dropped_whole_when_the_recipe_says_so_and_listed(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = run_folder(tmp_path, {"a": 5, "b": 200, "c": 6})
    facts = train.run(recipe(chat_model, long_pairs="drop"), run_dir)
    assert facts["too_long"] == ["b (233 tokens)", "h2 (73 tokens)"]
    said = " ".join(capsys.readouterr().err.split())
    assert "pairs.jsonl: 1 of 3 pairs are left out, train.max_tokens is 48: b (233 tokens)" in said
    assert "held_out.jsonl: 1 of 2 pairs are left out, train.max_tokens is 48: h2 (73 tokens)" in said
    assert read_jsonl(run_dir.file("train.jsonl"), TrainPoint)[-1].n_pairs == 2


def test_a_conversation_longer_than_the_models_positions_is_refused_with_that_reason(chat_model: Path, tmp_path: Path) -> None:
    config = json.loads((chat_model / "config.json").read_text())
    (chat_model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    run_dir = run_folder(tmp_path, {"a": 5, "b": 100})
    with pytest.raises(UserError) as refused:
        train.run(recipe(chat_model, max_tokens=4096), run_dir)
    assert str(refused.value).endswith(
        "1 of 2 pairs are too long, the model reads at most 100 tokens (max_position_embeddings): b (133 tokens). They are never cut: "
        'shorten them, or leave them out with train.long_pairs = "drop".'
    )
    facts = train.run(recipe(chat_model, max_tokens=4096, long_pairs="drop"), run_dir)
    assert facts["too_long"] == ["b (133 tokens)"]


def test_both_answers_of_every_pair_end_with_the_end_of_turn_token_also_at_the_limit(chat_model: Path, tmp_path: Path) -> None:
    from unstilted.lm.chat import ChatTokens
    from unstilted.models.load import load_tokenizer
    from unstilted.models.resolve import resolve_model

    settings = recipe(chat_model).train
    files = resolve_model(recipe(chat_model).model)
    chat = ChatTokens(load_tokenizer(files), files.name)
    run_dir = run_folder(tmp_path, {f"{n} words": n for n in range(1, 16)})
    kept, too_long = train.token_pairs(run_dir.file("pairs.jsonl"), chat, settings, train.longest(files, settings))
    assert too_long == []
    assert max(pair.n_tokens for pair in kept) == 48
    assert all(answer[-1] == chat.end_of_turn for pair in kept for answer in (pair.chosen, pair.rejected))


# What the stage leaves


def test_warnings_before_and_while_training_are_facts_of_the_stage_and_said(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = run_folder(tmp_path, dict.fromkeys("abcd", 5))
    facts = train.run(recipe(chat_model, max_tokens=256, warn_kl=1e-12), run_dir)
    assert facts["warnings"][0] == "only 2 optimizer steps: take more pairs or epochs, or a smaller train.batch_size."
    assert any("away from base, more than train.warn_kl 1e-12" in text for text in facts["warnings"])
    said = " ".join(capsys.readouterr().err.split())
    assert all(f"Warning: {text}" in said for text in facts["warnings"])
    assert "KL 0." in said
    assert json.loads(json.dumps(facts)) == facts
    assert None not in facts["held_out"].values()
