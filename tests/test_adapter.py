import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from tiny import SIZES, plain_token_logps, tiny_model
from unstilted.errors import UserError
from unstilted.lm.chat import TokenPair
from unstilted.lm.score import Scorer
from unstilted.lm.tree import Request
from unstilted.losses import PairLogps, dpo_loss
from unstilted.models.load import check_loadable, load_tuned
from unstilted.models.resolve import BaseModelFiles
from unstilted.pipeline import check
from unstilted.recipe import ModelTable, Recipe, RespondTable, TrainTable, recipe_from
from unstilted.respond import engine_name
from unstilted.train.adapter import Tuned, WholeTuned, tune
from unstilted.train.trainer import Trainer

PAIRS = [TokenPair(f"p{n}", [3 + n, 4, 5 + n], [6, 7 + n, 8, 2], [9 + n, 10, 2]) for n in range(6)]
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])
FEW: dict[str, Any] = {"batch_size": 2, "eval_every": 1, "first_layer_share": 0.0, "rank": 4, "learning_rate": 1e-2, "n_warmup_steps": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one layer of three": {"first_layer_share": 0.34, "last_layer_share": 0.66, "target_modules": ("all-linear",)},
    "dropout": {"dropout": 0.2},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "dora, rslora, dropout": {"dora": True, "rslora": True, "dropout": 0.2},
    "pissa": {"pissa": True},
    "pissa, rslora, upper layers": {"pissa": True, "rslora": True, "first_layer_share": 0.5},
    "full": {"tuning": "full", "learning_rate": 1e-3},
    "full, upper layers": {"tuning": "full", "learning_rate": 1e-3, "first_layer_share": 0.34},
}
BY_HAND = {"plain", "one layer of three", "rslora", "pissa", "pissa, rslora, upper layers"}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def settings(variant: str, **changes: Any) -> TrainTable:
    return TrainTable(**(FEW | VARIANTS[variant] | changes))


@pytest.fixture
def tiny_files(tmp_path: Path, embedded_model: BaseModelFiles) -> BaseModelFiles:
    """A tiny Llama on disk, as the resolver would give it, with some tokenizer beside it."""
    tiny_model().float().save_pretrained(tmp_path / "tiny")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "tiny" / name).write_bytes((embedded_model.folder / name).read_bytes())
    return BaseModelFiles("tiny", tmp_path / "tiny", "tiny", "none")


def trainer_of(table: TrainTable, files: BaseModelFiles, references: Path | None = None) -> Trainer:
    return Trainer(table, 0, files, references, PAIRS)


def trained(table: TrainTable, files: BaseModelFiles, folder: Path, references: Path | None = None) -> Trainer:
    trainer = trainer_of(table, files, references)
    trainer.train(PAIRS, PAIRS[:2], folder / "checkpoint.pt", "key")
    return trainer


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model.eval()(IDS).logits)


def base_model(files: BaseModelFiles) -> Any:
    return AutoModelForCausalLM.from_pretrained(files.folder)


def loaded_plainly(folder: Path, files: BaseModelFiles) -> Any:
    """What anyone gets from the saved folder with peft or transformers alone."""
    if (folder / "adapter_config.json").exists():
        return PeftModel.from_pretrained(base_model(files), folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def linear_weights(model: Any) -> dict[str, Tensor]:
    """The linear layers' weights with the adapter worked in."""
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return {name: module.weight.detach() for name, module in merged.named_modules() if isinstance(module, torch.nn.Linear)}


# what every variant has to keep


@each_variant
def test_before_the_first_step_every_loss_is_ln_2(tiny_files: BaseModelFiles, variant: str) -> None:
    outcome = trainer_of(settings(variant, nll_weight=0.0), tiny_files).learn(PAIRS)
    assert outcome.loss.tolist() == pytest.approx([math.log(2)] * len(PAIRS), abs=2e-6)


@each_variant
def test_training_widens_the_held_out_margin(tiny_files: BaseModelFiles, tmp_path: Path, variant: str) -> None:
    points = trained(settings(variant, n_epochs=3), tiny_files, tmp_path).points
    margins = [point.held_out.margin for point in points if point.held_out]
    assert margins[-1] > margins[0] + 0.01


@each_variant
def test_gradients_are_those_of_two_plain_forwards(tiny_files: BaseModelFiles, variant: str) -> None:
    tuned = tune(tiny_model().float(), settings(variant), tiny_files)
    model = tuned.model.double().eval()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    torch.manual_seed(5)
    for name, parameter in parameters.items():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    scorer = Scorer(model)
    assert (scorer.trunk is not None) == (variant in BY_HAND)
    shared = scorer.token_logps([Request(pair.prompt, (pair.chosen, pair.rejected)) for pair in PAIRS])
    gradients = torch.autograd.grad(loss_of(shared), list(parameters.values()))
    plain = [[plain_token_logps(model, pair.prompt, side) for side in (pair.chosen, pair.rejected)] for pair in PAIRS]
    wanted = torch.autograd.grad(loss_of(plain), list(parameters.values()))
    for name, gradient, true in zip(parameters, gradients, wanted, strict=True):
        assert torch.linalg.vector_norm(gradient - true) <= 1e-9 * torch.linalg.vector_norm(true), name
        assert true.abs().max() > 0, name


def loss_of(scores: list[list[Tensor]]) -> Tensor:
    chosen, rejected = (torch.stack([pair[side].sum() for pair in scores]) for side in (0, 1))
    counts = torch.tensor([3, 4])
    reference = PairLogps(torch.full_like(chosen, -18.0), torch.full_like(rejected, -13.0), counts, counts)
    return dpo_loss(PairLogps(chosen, rejected, counts, counts), reference, beta=0.5).sum()


@each_variant
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_the_saved_folder_is_the_trained_model_for_anyone(
    tiny_files: BaseModelFiles, tmp_path: Path, variant: str, strength: float
) -> None:
    trainer = trained(settings(variant, strength=strength), tiny_files, tmp_path)
    trainer.scale(PAIRS[:2])
    trainer.save(tmp_path / "adapter")
    after = logits(trainer.model)
    assert (after - logits(base_model(tiny_files))).abs().max() > 1e-3
    torch.testing.assert_close(logits(loaded_plainly(tmp_path / "adapter", tiny_files)), after, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(logits(load_tuned(tiny_files, tmp_path / "adapter", 1.0)), after, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(logits(load_tuned(tiny_files, tmp_path / "adapter", 0.0)), logits(base_model(tiny_files)), atol=2e-6, rtol=0)


@each_variant
@pytest.mark.parametrize("when", ["before it is saved", "when it is loaded"])
def test_strength_goes_part_of_the_way_from_base_to_tuned(tiny_files: BaseModelFiles, tmp_path: Path, variant: str, when: str) -> None:
    strength = 0.25
    trainer = trained(settings(variant, strength=strength, learning_rate=0.02), tiny_files, tmp_path)
    trainer.save(tmp_path / "whole")
    base = linear_weights(base_model(tiny_files))
    tuned = linear_weights(loaded_plainly(tmp_path / "whole", tiny_files))
    if when == "before it is saved":
        trainer.scale(PAIRS[:2])
        trainer.save(tmp_path / "part")
        part = linear_weights(loaded_plainly(tmp_path / "part", tiny_files))
    else:
        part = linear_weights(load_tuned(tiny_files, tmp_path / "whole", strength))
    moved = [name for name in base if (tuned[name] - base[name]).abs().max() > 1e-3]
    assert len(moved) >= 7
    for name in moved:
        if "dora" not in variant:
            torch.testing.assert_close(part[name], torch.lerp(base[name], tuned[name], strength), atol=1e-6, rtol=1e-5)
            continue
        # the length of each output's weights goes back as it is, whatever their direction does
        length, before, after = (torch.linalg.vector_norm(weights[name], dim=1) for weights in (part, base, tuned))
        torch.testing.assert_close(length, torch.lerp(before, after, strength), atol=1e-6, rtol=1e-5)
        assert (part[name] - base[name]).norm() < 0.5 * (tuned[name] - base[name]).norm()


@each_variant
def test_a_resumed_training_ends_in_the_same_bytes_as_an_uninterrupted_one(
    tiny_files: BaseModelFiles, tmp_path: Path, variant: str
) -> None:
    table = settings(variant, n_epochs=2)
    whole = trained(table, tiny_files, tmp_path, tmp_path / "whole.sqlite")
    whole.save(tmp_path / "whole")
    killed = trainer_of(table, tiny_files, tmp_path / "killed.sqlite")
    save = killed._save_checkpoint

    def save_and_die(path: Path, key: str) -> None:
        save(path, key)
        if len(killed.points) == 2:
            raise KeyboardInterrupt

    killed._save_checkpoint = save_and_die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        killed.train(PAIRS, PAIRS[:2], tmp_path / "killed.pt", "key")
    resumed = trainer_of(table, tiny_files, tmp_path / "killed.sqlite")
    resumed.resume(tmp_path / "killed.pt", "key")
    resumed.train(PAIRS, PAIRS[:2], tmp_path / "killed.pt", "key")
    resumed.save(tmp_path / "resumed")
    assert resumed.points == whole.points
    weights = "model.safetensors" if VARIANTS[variant].get("tuning") == "full" else "adapter_model.safetensors"
    assert (tmp_path / "resumed" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


# references


def plain_references(files: BaseModelFiles) -> list[list[Tensor]]:
    model = base_model(files)
    with torch.no_grad():
        return [[plain_token_logps(model.eval(), pair.prompt, side).double() for side in (pair.chosen, pair.rejected)] for pair in PAIRS]


@each_variant
@pytest.mark.parametrize("model_dropout", [0.0, 0.5])
def test_the_reference_is_the_untouched_base_without_any_dropout(
    tiny_files: BaseModelFiles, tmp_path: Path, variant: str, model_dropout: float
) -> None:
    config = json.loads((tiny_files.folder / "config.json").read_text()) | {"attention_dropout": model_dropout}
    (tiny_files.folder / "config.json").write_text(json.dumps(config))
    lora = {} if VARIANTS[variant].get("tuning") == "full" else {"dropout": 0.5}
    trainer = trainer_of(settings(variant, **lora), tiny_files)
    trainer.learn(PAIRS)  # in training mode
    for pair, wanted in zip(PAIRS, plain_references(tiny_files), strict=True):
        for have, want in zip(trainer.references[pair], wanted, strict=True):
            torch.testing.assert_close(have, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["pissa", "full"])
def test_a_pair_that_the_base_was_not_asked_about_in_time_is_an_error(tiny_files: BaseModelFiles, variant: str) -> None:
    trainer = Trainer(settings(variant), 0, tiny_files, pairs=PAIRS[:5])
    trainer.learn(PAIRS[:5])
    with pytest.raises(ValueError, match="the base model is gone, and pair 'p5' was not among"):
        trainer.learn(PAIRS)


def test_references_of_one_way_to_tune_serve_all_the_others(tiny_files: BaseModelFiles, tmp_path: Path) -> None:
    kept = tmp_path / "references.sqlite"
    Trainer(settings("full"), 0, tiny_files, kept, PAIRS)
    lora = Trainer(settings("dora"), 0, tiny_files, kept)
    assert lora.references.load(PAIRS) == len(PAIRS)


# which weights are trained


def changed_weights(trainer: Trainer, files: BaseModelFiles) -> set[str]:
    before = dict(base_model(files).named_parameters())
    return {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}


@pytest.mark.parametrize("tied", [True, False])
def test_full_tuning_moves_the_chosen_layers_and_what_lies_beyond_them(tiny_files: BaseModelFiles, tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=tied)).save_pretrained(tiny_files.folder)
    whole = changed_weights(trained(settings("full"), tiny_files, tmp_path), tiny_files)
    assert whole == set(dict(base_model(tiny_files).named_parameters()))
    upper = changed_weights(trained(settings("full", first_layer_share=0.34), tiny_files, tmp_path), tiny_files)
    assert upper == {name for name in whole if not re.search(r"embed_tokens|layers\.0\.", name)}
    middle = changed_weights(trained(settings("full", first_layer_share=0.34, last_layer_share=0.6), tiny_files, tmp_path), tiny_files)
    assert middle == {name for name in whole if "layers.1." in name}


def test_all_linear_is_every_linear_layer_of_the_chosen_layers_but_not_the_head(tiny_files: BaseModelFiles) -> None:
    names = [name for name, _ in trainer_of(settings("one layer of three"), tiny_files).model.named_parameters() if "lora_A" in name]
    assert {name.split(".layers.")[1].split(".")[0] for name in names} == {"1"}
    assert sorted(name.split(".")[-4] if name.endswith("default.weight") else name for name in names) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_rslora_divides_alpha_by_the_root_of_the_rank(tiny_files: BaseModelFiles) -> None:
    model = trainer_of(settings("rslora", rank=4, alpha=6.0), tiny_files).model
    assert {module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer)} == {3.0}


def test_a_finished_pissa_adapter_is_plain_lora_of_twice_the_rank(tiny_files: BaseModelFiles, tmp_path: Path) -> None:
    trainer = trained(settings("pissa", strength=0.5, alpha=8.0), tiny_files, tmp_path)
    trainer.scale(PAIRS[:2])
    trainer.save(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"], config["lora_alpha"]) == (True, 8, 8.0)  # alpha 8 * 0.5, doubled with the rank


def test_a_full_tuning_leaves_a_folder_with_a_tokenizer(tiny_files: BaseModelFiles, tmp_path: Path) -> None:
    trained(settings("full"), tiny_files, tmp_path).save(tmp_path / "adapter")
    names = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names


def test_tune_says_what_it_made(tiny_files: BaseModelFiles) -> None:
    assert isinstance(tune(tiny_model().float(), settings("full"), tiny_files), WholeTuned)
    assert isinstance(tune(tiny_model().float(), settings("pissa"), tiny_files), Tuned)


# what is refused


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"dora": True, "pissa": True}, "'train.pissa' is True: an adapter with dora can't start from the base weights."),
        ({"first_layer_share": 0.5, "last_layer_share": 0.5}, "'train.last_layer_share' is 0.5: it must be more than first_layer_share."),
    ],
)
def test_settings_that_exclude_each_other_are_refused(train: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        recipe_from({"train": train})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": {"load": "4bit"}}, r"model.load = '4bit': this needs (the package bitsandbytes|a CUDA GPU).* model.load = \"auto\""),
        ({"train": {"optimizer": "adamw_8bit"}}, r"train.optimizer = 'adamw_8bit': this needs .* train.optimizer = \"adamw\""),
        (
            {"model": {"load": "8bit"}, "train": {"tuning": "full"}},
            r"model.load: train.tuning = \"full\" changes the base weights, which it can't while they are held in 8bit",
        ),
        ({"model": {"load": "4bit"}, "train": {"pissa": True}}, "model.load: train.pissa = true changes the base weights"),
        ({"model": {"load": "8bit"}, "train": {"dora": True}}, "model.load: train.dora fails over 8-bit weights"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can")
@pytest.mark.parametrize("ask", [check_loadable, check])
def test_what_this_machine_cannot_hold_is_refused_before_any_download(
    values: dict[str, Any], said: str, ask: Callable[[Recipe], None]
) -> None:
    recipe = recipe_from(values | {"model": {"source": "nobody/nothing"} | values.get("model", {})})
    with pytest.raises(UserError, match=said):
        ask(recipe)


@pytest.mark.parametrize("variant", ["dora", "full"])
def test_what_llama_cpp_cannot_run_is_answered_by_transformers(embedded_model: BaseModelFiles, variant: str) -> None:
    assert engine_name(RespondTable(), embedded_model, settings(variant)) == "transformers"
    assert engine_name(RespondTable(), embedded_model, settings("pissa")) == "embedded"
    with pytest.raises(UserError, match=r"respond.engine: llama.cpp (can't run an adapter with train.dora|has only adapters here)"):
        engine_name(RespondTable(engine="embedded"), embedded_model, settings(variant))


def test_the_way_weights_are_held_is_part_of_the_fingerprint(tiny_files: BaseModelFiles) -> None:
    from unstilted.models.resolve import resolve_model

    plain, held = (resolve_model(ModelTable(source=str(tiny_files.folder), load=load)) for load in ("auto", "8bit"))
    assert held == replace(plain, load="8bit", fingerprint=f"{plain.fingerprint}-8bit")
