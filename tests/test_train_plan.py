import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from unstilted import pairs
from unstilted.cli import main
from unstilted.errors import UserError
from unstilted.lm.score import Scorer
from unstilted.lm.tree import Request
from unstilted.models.resolve import BaseModelFiles
from unstilted.models.shapes import FACTS, empty_model, model_config
from unstilted.recipe import ModelTable, Recipe, TrainTable, find_recipe, load_recipe, recipe_from, shipped_recipes
from unstilted.train.adapter import make_trainable
from unstilted.train.plan import Plan, Row, layer_bytes, make_plan

PAPER = ["paper-llama-3-8b", "paper-mistral-nemo", "paper-qwen2.5-7b"]


def plan_of(name: str) -> Plan:
    return make_plan(load_recipe(find_recipe(name)), None)


# the shipped recipes


def test_the_papers_settings_are_shipped_for_its_three_base_models() -> None:
    assert shipped_recipes() == PAPER
    for name in PAPER:
        recipe = load_recipe(find_recipe(name))
        train = recipe.train
        assert (train.rank, train.alpha, train.dropout, train.target_modules) == (8, 4.0, 0.05, ("all-linear",))
        assert (train.loss, train.beta, train.nll_weight, train.strength) == ("sigmoid", 0.1, 0.0, 1.0)
        assert (train.learning_rate, train.n_warmup_steps, train.n_epochs, train.batch_size) == (2e-4, 10, 1, 2 * 8 * 2)
        assert (recipe.model.load, train.optimizer, train.first_layer_share) == ("8bit", "adamw_8bit", 0.0)


@pytest.mark.parametrize(
    ("name", "n_parameters", "n_layers", "n_adapter"),
    [
        # the first two columns as their makers and the hub give them, the third by hand: 8 * (inputs + outputs) of the 7 layers
        ("paper-llama-3-8b", 8_030_261_248, 32, 32 * 8 * (2 * 8192 + 2 * 5120 + 3 * (4096 + 14336))),
        ("paper-qwen2.5-7b", 7_615_616_512, 28, 28 * 8 * (2 * 7168 + 2 * 4096 + 3 * (3584 + 18944))),
        ("paper-mistral-nemo", 12_247_782_400, 40, 40 * 8 * (2 * 9216 + 2 * 6144 + 3 * (5120 + 14336))),
    ],
)
def test_the_plan_of_a_shipped_recipe_needs_neither_weights_nor_network(
    name: str, n_parameters: int, n_layers: int, n_adapter: int
) -> None:
    plan = plan_of(name)
    assert (plan.n_parameters, plan.n_layers, plan.layers) == (n_parameters, n_layers, range(n_layers))
    assert plan.n_trained == n_adapter
    assert (plan.n_pairs, plan.n_steps, plan.is_counted) == (10_860, 340, False)
    (memory,) = plan.memories
    assert memory.place == "GPU, 8bit"
    assert memory.adapter == 4 * n_adapter
    assert memory.optimizer == pytest.approx(2.03 * n_adapter, rel=0.01)


def test_weights_are_counted_as_bitsandbytes_holds_them() -> None:
    """Of Llama-3-8B 32 layers' matrices are quantized; embeddings, head and norms stay bfloat16."""
    in_layers = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)
    others = 8_030_261_248 - in_layers
    recipe = load_recipe(find_recipe("paper-llama-3-8b"))
    for load, n_bytes in {"8bit": 1.0, "4bit": (4 + 0.127) / 8}.items():
        held = recipe.model_copy(update={"model": recipe.model.model_copy(update={"load": load})})
        (memory,) = make_plan(held, None).memories
        assert memory.weights == pytest.approx(in_layers * n_bytes + 2 * others, rel=1e-3)


def test_a_recipe_extends_a_shipped_one_and_says_where_it_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('extends = "paper-llama-3-8b"\nseed = 3\n[train]\nrank = 16\n')
    recipe = load_recipe(file)
    assert (recipe.seed, recipe.train.rank, recipe.train.alpha, recipe.model.load) == (3, 16, 4.0, "8bit")
    file.write_text('extends = "paper-llama-3-8b"\n[train]\nrnak = 16\n')
    with pytest.raises(UserError, match=r"mine.toml line 3: 'train.rnak' is not a setting. Did you mean 'rank'"):
        load_recipe(file)
    file.write_text('extends = "papr"\n')
    with pytest.raises(UserError, match=rf"mine.toml: 'extends' is 'papr'. Name a shipped recipe: {', '.join(PAPER)}."):
        load_recipe(file)


# the command


def test_recipes_are_listed_and_printed_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--list"]) == 0
    assert capsys.readouterr().out.split() == PAPER
    assert main(["recipe", "paper-qwen2.5-7b"]) == 0
    assert 'source = "Qwen/Qwen2.5-7B-Instruct"' in capsys.readouterr().out
    assert main(["recipe", "paper"]) == 1
    assert capsys.readouterr().err == f"unstilted: paper: there is no such recipe. Give a TOML file, or one of {', '.join(PAPER)}.\n"


def test_a_dry_run_prints_the_plan_with_the_options_and_makes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "paper-llama-3-8b", "--dry-run", "--train.rank", "16", "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "LoRA of rank 16, alpha 4, dropout 0.05, on all-linear on layers 1 to 32 of 32: 41,943,040 parameters" in text
    assert "at most 340 in 1 epoch, adamw_8bit" in text
    assert re.search(r"peak +\d\d\.\d\d\n", text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can")
def test_what_this_machine_cannot_run_is_planned_with_a_warning() -> None:
    assert any(warning.startswith("not on this machine: model.load = '8bit'") for warning in plan_of("paper-llama-3-8b").warnings)


def test_warnings_about_the_settings_are_part_of_the_plan() -> None:
    recipe = recipe_from({"train": {"learning_rate": 1.0}})
    assert any("train.learning_rate 1 " in warning for warning in make_plan(recipe, pairs.check(recipe).training).warnings)


def test_pairs_and_tokens_are_counted_where_they_are_here(embedded_model: BaseModelFiles) -> None:
    recipe = recipe_from({"pairs": {"n_pairs": 50}, "train": {"batch_size": 8, "n_epochs": 3, "max_tokens": 120}})
    plan = make_plan(recipe, pairs.check(recipe).training)
    assert (plan.n_pairs, plan.n_steps, plan.is_counted) == (50, 21, True)
    assert plan.tokens is not None
    assert 50 < plan.tokens.median < plan.tokens.longest < plan.tokens.longest_row
    assert 0 < plan.tokens.n_too_long < 50
    assert f"{plan.tokens.n_too_long} over train.max_tokens (120)" in str(plan)


def test_a_hub_dataset_without_a_number_of_pairs_cannot_be_planned() -> None:
    recipe = load_recipe(find_recipe("paper-llama-3-8b"))
    endless = recipe.model_copy(update={"pairs": recipe.pairs.model_copy(update={"n_pairs": 0})})
    with pytest.raises(UserError, match=r"pairs.n_pairs: how many pairs the hub's dataset has isn't known here. Set it to a number."):
        make_plan(endless, None)


def test_layers_that_the_model_does_not_have_are_refused_without_its_weights() -> None:
    with pytest.raises(UserError, match=r"train.target_modules: no adapter can be put on this model"):
        make_plan(load_recipe(find_recipe(PAPER[0])).model_copy(update={"train": TrainTable(target_modules=("wq",))}), None)


# configurations


def test_the_facts_of_the_embedded_model_are_those_of_its_file(embedded_model: BaseModelFiles) -> None:
    config = json.loads((embedded_model.folder / "config.json").read_text())
    assert FACTS["HuggingFaceTB/SmolLM2-135M-Instruct"].items() <= config.items()


def test_an_embedded_model_that_is_not_here_yet_is_planned_from_the_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSTILTED_CACHE", str(tmp_path))
    recipe = Recipe()
    plan = make_plan(recipe, pairs.check(recipe).training)
    assert (plan.n_parameters, plan.tokens) == (134_515_008, None)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_model_has_shapes_and_no_memory() -> None:
    model = empty_model(model_config(ModelTable(source="meta-llama/Meta-Llama-3-8B-Instruct")))
    assert {weight.device.type for weight in model.parameters()} == {"meta"}


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json is missing"):
        model_config(ModelTable(source=str(tmp_path)))


class Hub(BaseHTTPRequestHandler):
    """A hub with the config.json of one model; it remembers what it was asked for."""

    asked: list[str]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keep the test's output clean."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        is_there = path.startswith("/o/good/resolve/") and path.endswith("/config.json")
        body = json.dumps(FACTS["Qwen/Qwen2.5-7B-Instruct"]).encode() if is_there else b"{}"
        self.send_response(200 if is_there else 404)
        headers = {"ETag": '"' + "a" * 40 + '"', "X-Repo-Commit": "b" * 40} if is_there else {"X-Error-Code": "RepoNotFound"}
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def dry_run(endpoint: str, home: Path, source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a fresh process: the hub's library reads its settings when it is imported."""
    clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy") and not name.startswith("HF_")}
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "unstilted", "run", "--dry-run", "--model.source", source]
    return subprocess.run(command, env=clean | settings | environment, capture_output=True, text=True, check=False)


def test_of_another_hub_model_only_the_configuration_is_fetched(hub: str, tmp_path: Path) -> None:
    done = dry_run(hub, tmp_path, "o/good")
    assert done.returncode == 0, done.stderr
    assert "model      o/good, 7,615,616,512 parameters" in done.stdout
    assert {path.rsplit("/", 1)[1] for path in Hub.asked if "o/good" in path} == {"config.json"}
    again = dry_run("http://127.0.0.1:1", tmp_path, "o/good", HF_HUB_OFFLINE="1")
    assert again.stdout == done.stdout


def test_a_hub_model_whose_configuration_cannot_be_had_is_refused_in_one_line(hub: str, tmp_path: Path) -> None:
    missing = dry_run(hub, tmp_path, "o/missing")
    assert missing.returncode == 1
    assert missing.stderr.startswith("unstilted: model.source = 'o/missing': the hub has no such model, or it is private.")
    away = dry_run("http://127.0.0.1:1", tmp_path, "o/good")
    assert "\nunstilted: model.source = 'o/good': the model can't be fetched (ConnectError" in away.stderr


# memory

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def saved_bytes(n_layers: int, train: TrainTable, dtype: torch.dtype) -> tuple[int, Row]:
    """What autograd really keeps of a forward for its backward, each storage once."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, num_hidden_layers=n_layers)).to(dtype).requires_grad_(False)
    tuned = make_trainable(model, train).train()
    ours = {weight.untyped_storage().data_ptr() for weight in tuned.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(3, 97, (240,)).tolist()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Scorer(tuned, by_hand=False).token_logps([Request(ids[:40], [ids[40:140], ids[140:]])])
    return sum(size for size, _ in kept.values()), Row.of(tuned, train, None)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"dropout": 0.1}, torch.float32),
        ({"dora": True}, torch.float32),
        ({"target_modules": ("q_proj", "down_proj")}, torch.bfloat16),
        ({"tuning": "full"}, torch.float32),
    ],
)
def test_a_layers_activations_are_what_autograd_keeps(changes: dict[str, Any], dtype: torch.dtype) -> None:
    train = TrainTable(rank=4, first_layer_share=0.0, tokens_per_forward=238, **changes)
    three, row = saved_bytes(3, train, dtype)
    one, _ = saved_bytes(1, train, dtype)
    assert layer_bytes(row, train, dtype.itemsize) == pytest.approx((three - one) / 2, rel=0.03)


MEASURE = """
import json, sys
from pathlib import Path
from unstilted import pairs
from unstilted.lm.chat import ChatTokens
from unstilted.models.load import load_tokenizer
from unstilted.models.resolve import resolve_model
from unstilted.recipe import recipe_from
from unstilted.train import _peak_memory_gb
from unstilted.train.trainer import Trainer
recipe = recipe_from(json.loads(sys.argv[1]))
files = resolve_model(recipe.model)
chat = ChatTokens(load_tokenizer(files), files.name)
split = pairs.check(recipe)
training, held_out = ([chat.pair(pair) for pair in part] for part in (split.training, split.held_out))
trainer = Trainer(recipe.train, 0, files, None, [*training, *held_out])
trainer.train(training, held_out, Path(sys.argv[2]), "key")
print(_peak_memory_gb())
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is told by Linux")
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.05}, {"first_layer_share": 0.0, "dropout": 0.05}, {"tuning": "full"}])
def test_the_estimate_is_within_a_fifth_of_the_measured_peak(
    embedded_model: BaseModelFiles, tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"pairs": {"n_pairs": 8, "n_held_out": 8}, "train": {"batch_size": 4, "trackers": [], **changes}}
    recipe = recipe_from(values)
    command = [sys.executable, "-c", MEASURE, json.dumps(values), str(tmp_path / "checkpoint.pt")]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    estimate = make_plan(recipe, pairs.check(recipe).training).memories[0].total / 1e9
    torch.set_num_threads(n_threads)
    with capsys.disabled():
        print(f"\n{changes}: estimate {estimate:.2f} GB, measured {float(done.stdout):.2f} GB")
    assert estimate == pytest.approx(float(done.stdout), rel=0.2)
