"""From `model.source` of the recipe to files on this disk."""

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unstilted.errors import UserError
from unstilted.files import is_disk_full, sha256
from unstilted.models import embedded
from unstilted.progress import say as say_on_terminal
from unstilted.recipe import ModelTable, Recipe

INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", "model-*.safetensors")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
TEXT_FILES = (
    *("config.json", "generation_config.json", "chat_template*", "additional_chat_templates/*"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
)
"""What decides, besides the weights, which tokens go in and come out."""
HUB_FILES = (*TEXT_FILES, *WEIGHTS, INDEX, "README.md")

WHOLE_HASH_BYTES, END_BYTES = 2_000_000_000, 16_000_000


@dataclass(frozen=True)
class BaseModelFiles:
    """A base model on this disk."""

    name: str
    folder: Path
    """Safetensors, config and tokenizer, as transformers reads them."""
    fingerprint: str
    """Changes when weights, tokenizer, chat template, `load` or (for a hub id) the commit do."""
    licence: str
    """As its model card states it, or 'not stated'."""
    licence_url: str = ""
    is_embedded: bool = False
    gguf: Path | None = None
    """The same model in Q8_0 for llama.cpp; only the embedded model has one."""
    load: str = "auto"
    """How the weights are to be held in memory, as `model.load` says."""


def resolve_model(table: ModelTable, say: Callable[[str], None] = say_on_terminal) -> BaseModelFiles:
    """The base model's files, fetched first when they aren't here; `say` gets a line for each thing that takes long.

    An existing folder wins over a hub id of the same spelling. Raises UserError, before any heavy import, for a source in none
    of the three forms, for a folder that lacks something, and when a download fails.
    """
    files = _resolve(table, say)
    if table.load == "auto":
        return files
    return replace(files, load=table.load, fingerprint=f"{files.fingerprint}-{table.load}")


def _resolve(table: ModelTable, say: Callable[[str], None]) -> BaseModelFiles:
    source, revision = table.source, table.revision
    if is_hub_id(source):
        return _from_hub(source, revision)
    if revision:
        raise UserError(f"'{revision}' is set, but only a hub id has revisions.", where="model.revision", do="Leave it empty.")
    if source == "embedded":
        files = embedded.embedded_files(say)
        return BaseModelFiles(embedded.HUB_ID, files.folder, files.fingerprint, embedded.LICENCE, embedded.LICENCE_URL, True, files.gguf)
    if _is_folder(source):
        return _from_folder(source, Path(source).expanduser())
    raise UserError(
        f"'{source}' is no base model.",
        where="model.source",
        do="Write 'embedded', a folder with Hugging Face weights (such as './my-model'), or a hub id (such as 'owner/name').",
    )


def sources(recipe: Recipe) -> dict[str, str]:
    """Fingerprint of the base model, which is fetched first when it isn't here."""
    return {f"model: {recipe.model.source}": resolve_model(recipe.model).fingerprint}


def is_hub_id(source: str) -> bool:
    """Whether `source` means a model of the hub: it is spelled 'owner/name', and no folder here is."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", source)) and not _is_folder(source)


def _is_folder(source: str) -> bool:
    """Whether `source` is a folder, or is spelled like one that could be missing."""
    return bool(source) and (
        Path(source).is_dir() or source.startswith((".", "~")) or Path(source).is_absolute() or source.count(os.sep) > 1
    )


def _from_folder(name: str, folder: Path, commit: str = "") -> BaseModelFiles:
    check_config(folder)
    shards = _shards(folder)
    for shard in shards:
        _check_whole(shard)
    if not any((folder / file).is_file() for file in TOKENIZERS):
        raise UserError(
            f"the tokenizer is missing: there is none of {', '.join(TOKENIZERS)}.",
            where=str(folder),
            do="Copy the base model's tokenizer files there, or `AutoTokenizer.from_pretrained(...).save_pretrained(folder)`.",
        )
    licence, url = _licence(folder / "README.md")
    return BaseModelFiles(name, folder, _fingerprint(folder, shards, commit), licence, url)


def check_config(folder: Path) -> None:
    """Raise UserError unless the folder holds the config.json of a model."""
    config = folder / "config.json"
    if not folder.is_dir():
        raise UserError("there is no such folder.", where=str(folder), do="Correct model.source.")
    if not config.is_file():
        kind = "it holds an adapter, not a base model" if (folder / "adapter_config.json").is_file() else "config.json is missing"
        raise UserError(f"{kind}.", where=str(folder), do="Point model.source at a folder that `model.save_pretrained` wrote.")
    if "model_type" not in _json_object(config):
        raise UserError("'model_type' is missing.", where=str(config), do="Take config.json from the model's own repository.")


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        reason = "it is no object"
    except ValueError as error:
        reason = str(error)
    raise UserError(f"this is not usable JSON ({reason}).", where=str(path), do="Copy the file again.")


def _shards(folder: Path) -> list[Path]:
    """The weight files that transformers would load, which all exist."""
    if (folder / WEIGHTS[0]).is_file():
        return [folder / WEIGHTS[0]]
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    names = _json_object(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError("'weight_map' is missing or empty.", where=str(folder / INDEX), do="Copy the file again.")
    shards = [folder / str(name) for name in sorted(set(names.values()))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise UserError(
            f"{len(missing)} of {len(shards)} weight files are missing: {', '.join(missing[:5])}.", where=str(folder), do="Copy them too."
        )
    return shards


def _no_weights(folder: Path) -> UserError:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return UserError(
            "the weights are pickled (.bin, .pt), and loading a pickle can run any code in it.",
            where=str(folder),
            do="Where you trust them, convert them with `model.save_pretrained(folder)`, which writes safetensors.",
        )
    return UserError(
        f"the weights are missing: there is neither {WEIGHTS[0]} nor {INDEX}.",
        where=str(folder),
        do="Choose a model with safetensors weights, or write them with `model.save_pretrained(folder)`.",
    )


def _check_whole(shard: Path) -> None:
    """Raise UserError unless the file is as long as its own header says: a cut copy, an empty file, a Git LFS pointer aren't."""
    n_bytes = shard.stat().st_size
    with shard.open("rb") as file:
        start = file.read(8)
        n_header = struct.unpack("<Q", start)[0] if len(start) == 8 else n_bytes
        try:
            header = json.loads(file.read(n_header)) if n_header < n_bytes else {}
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            ends = []
    if not ends or n_bytes != 8 + n_header + max(ends):
        raise UserError(
            f"this is no whole safetensors file ({n_bytes} bytes).", where=str(shard), do="Copy it again (with Git LFS: `git lfs pull`)."
        )


def _licence(card: Path) -> tuple[str, str]:
    """Licence name and URL from the front matter of a model card."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    found: dict[str, str] = (
        dict(re.findall(r"^(license\w*):[ \t]*(?:\n\s*-\s*)?[\"']?([^\s\"'#]+)", front[1], re.MULTILINE)) if front else {}
    )
    name = found.get("license", "not stated")
    return found.get("license_name", name) if name == "other" else name, found.get("license_link", "")


def _fingerprint(folder: Path, shards: list[Path], commit: str) -> str:
    texts = {file for pattern in TEXT_FILES for file in folder.glob(pattern) if file.is_file()}
    digest = hashlib.sha256(f"{commit}\n".encode())
    for file in sorted(texts):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{sha256(file)}\n".encode())
    for shard in shards:
        digest.update(f"{shard.relative_to(folder).as_posix()}\0{shard.stat().st_size}\0{_weights_hash(shard)}\n".encode())
    return digest.hexdigest()


def _weights_hash(shard: Path) -> str:
    """Hex sha256 of a weight file.

    Over 2 GB it covers only the first and last 16 MB: training moves every tensor, so another model differs there too, and
    a change made by hand in the middle of such a file goes unseen.
    """
    n_bytes = shard.stat().st_size
    if n_bytes <= WHOLE_HASH_BYTES:
        return sha256(shard)
    with shard.open("rb") as file:
        digest = hashlib.sha256(file.read(END_BYTES))
        file.seek(n_bytes - END_BYTES)
        digest.update(file.read(END_BYTES))
    return digest.hexdigest()


def _from_hub(name: str, revision: str) -> BaseModelFiles:
    """Fetch a hub model into the hub's own cache, or take it from there when the hub can't be reached."""
    from huggingface_hub import snapshot_download

    with _telling_hub_errors(name, revision):
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(HUB_FILES)))
    return _from_folder(name, folder, commit=folder.name)


def fetch_config(name: str, revision: str) -> Path:
    """A hub model's config.json, alone; raises UserError as `resolve_model` does."""
    from huggingface_hub import hf_hub_download

    with _telling_hub_errors(name, revision):
        return Path(hf_hub_download(name, "config.json", revision=revision or None))


@contextmanager
def _telling_hub_errors(name: str, revision: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, XetDownloadError

    transport_error: Any = HfHubHTTPError.__bases__[0]  # of httpx or httpx2, whichever this version of the library uses
    try:
        yield
    except (transport_error, OSError, HFValidationError, XetDownloadError) as error:
        raise _hub_error(error, name, revision) from None


def _hub_error(error: BaseException, name: str, revision: str) -> UserError:
    from huggingface_hub import errors

    where = f"model.source = '{name}'"
    local = "or set model.source to a folder with the model's files, or to 'embedded'"
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    match cause:
        case errors.GatedRepoError():
            return UserError(
                "this model is gated.", where=where, do="Ask for access on its page, then `hf auth login` with that account's token."
            )
        case errors.RepositoryNotFoundError():
            return UserError(
                "the hub has no such model, or it is private.", where=where, do="Correct the id, or `hf auth login` if it is private."
            )
        case errors.RevisionNotFoundError():
            return UserError(f"the model has no revision '{revision}'.", where="model.revision", do="Name a branch, a tag or a commit.")
        case errors.HFValidationError():
            return UserError(f"this is no hub id ({cause}).", where=where, do="A hub id is 'owner/name'.")
        case errors.HfHubHTTPError() if cause.response.status_code in (401, 403):
            return UserError(
                f"the hub refuses this model (HTTP {cause.response.status_code}).", where=where, do="Renew your token with `hf auth login`."
            )
        case errors.HfHubHTTPError():
            return UserError(f"the hub answers HTTP {cause.response.status_code}.", where=where, do=f"Try again later, {local}.")
        case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError():
            return UserError(
                "HF_HUB_OFFLINE is set and the whole model isn't in the hub's cache.", where=where, do=f"Unset it to download, {local}."
            )
        case OSError() if is_disk_full(cause):
            return UserError("the disk is full.", where=where, do="Free some space, or set HF_HOME to a folder on another disk.")
    return UserError(
        f"the model can't be fetched ({type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else 'no details'}).",
        where=where,
        do=f"Check the network and HF_ENDPOINT and run again, {local}.",
    )
