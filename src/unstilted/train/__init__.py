"""The `train` stage: preference optimization of an adapter on `pairs.jsonl`."""

import hashlib
import json
import math
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from unstilted.errors import UserError
from unstilted.files import sha256, whole_folder
from unstilted.lm.chat import ChatTokens, TokenPair
from unstilted.models.embedded import cache_folder
from unstilted.models.load import check_loadable, load_tokenizer
from unstilted.models.resolve import BaseModelFiles, resolve_model
from unstilted.progress import say
from unstilted.recipe import Recipe, TrainTable
from unstilted.records import Pair, read_jsonl, write_jsonl
from unstilted.rundir import RunDir
from unstilted.train.trackers import check_trackers, open_trackers

CHECKPOINT = "train.checkpoint.pt"
WATCHERS = frozenset({"trackers", "warn_kl"})
"""Settings that change what is seen of a training and not how it goes."""


def check(recipe: Recipe) -> None:
    """Raise UserError for what can be known to be wrong before anything is loaded."""
    check_loadable(recipe)
    check_trackers(recipe.train.trackers)


def run(recipe: Recipe, run_dir: RunDir) -> dict[str, Any]:
    """Tune an adapter on `pairs.jsonl`; writes `adapter/` (a PEFT folder) and `train.jsonl`. Returns facts for the manifest."""
    from unstilted.train import references
    from unstilted.train.checkpoint import clear_parts
    from unstilted.train.distributed import Called, call
    from unstilted.train.guards import setting_warnings
    from unstilted.train.trainer import Trainer

    check(recipe)
    settings = recipe.train
    checkpoint, adapter, curves = (run_dir.file(name) for name in (CHECKPOINT, "adapter", "train.jsonl"))
    for path in (checkpoint, adapter, curves):
        clear_parts(path)
    files = resolve_model(recipe.model, say)
    chat = ChatTokens(load_tokenizer(files), files.name)
    limit = longest(files, settings)
    pairs, too_long = token_pairs(run_dir.require("pairs.jsonl", "pairs"), chat, settings, limit)
    held_out, too_long_held_out = token_pairs(run_dir.require("held_out.jsonl", "pairs"), chat, settings, limit)
    warnings = setting_warnings(settings, len(pairs), settings.n_epochs * math.ceil(len(pairs) / settings.batch_size))
    for warning in warnings:
        say(f"  Warning: {warning}")
    call(Called(recipe, pairs, held_out))
    trainer = Trainer(settings, recipe.seed, files, cache_folder() / references.FILE, [*pairs, *held_out])
    key = _checkpoint_key(recipe, files, run_dir)
    trainer.resume(checkpoint, key)
    shown = settings.model_dump(mode="json")
    with open_trackers(settings.trackers, run_dir.file("trackers"), len(trainer.points), shown) as trackers:
        stopped = trainer.train(pairs, held_out, checkpoint, key, trackers.log)
    finished = trainer.scale(held_out)
    with whole_folder(adapter) as folder:
        trainer.save(folder)
    write_jsonl(curves, trainer.points)
    checkpoint.unlink(missing_ok=True)
    return {
        "model": files.name,
        "licence": files.licence,
        "n_parameters_trained": trainer.n_parameters,
        "n_steps": len(trainer.points),
        "stopped": stopped,
        "warnings": warnings + trainer.warnings(len(held_out)),
        "held_out": finished.model_dump(exclude_none=True),
        "too_long": too_long + too_long_held_out,
        "peak_memory_gb": round(_peak_memory_gb(), 2),
    }


def follow() -> None:
    """What a process does that only helps (see `is_follower`): its part in the training of the main one, if that has any to do."""
    from unstilted.train.distributed import called
    from unstilted.train.trainer import Trainer

    what = called()
    if what is None:
        return
    recipe, pairs, held_out = what
    trainer = Trainer(recipe.train, recipe.seed, resolve_model(recipe.model, say), None, [*pairs, *held_out])
    trainer.resume(None, "")
    trainer.train(pairs, held_out, None, "")
    trainer.scale(held_out)
    trainer.save(None)


def longest(files: BaseModelFiles, settings: TrainTable) -> tuple[int, str]:
    """Most tokens that a conversation may have, and what says so: `train.max_tokens`, or the positions that the model has."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(files.folder).get_text_config()
    n_positions = getattr(config, "max_position_embeddings", None) or settings.max_tokens
    if n_positions < settings.max_tokens:
        return n_positions, f"the model reads at most {n_positions:,} tokens (max_position_embeddings)"
    return settings.max_tokens, f"train.max_tokens is {settings.max_tokens:,}"


def token_pairs(path: Path, chat: ChatTokens, settings: TrainTable, limit: tuple[int, str]) -> tuple[list[TokenPair], list[str]]:
    """Tokenized pairs of a file that keep the limit (see `longest`), and id and length of each of the others, which is also said.

    Never cuts a pair. Raises UserError when one is too long and the recipe refuses that, or when none is left.
    """
    n_most, reason = limit
    pairs = [chat.pair(pair) for pair in read_jsonl(path, Pair)]
    too_long = [f"{pair.id} ({pair.n_tokens:,} tokens)" for pair in pairs if pair.n_tokens > n_most]
    raising = "" if n_most < settings.max_tokens else "raise train.max_tokens, "
    if too_long and settings.long_pairs == "refuse":
        raise UserError(
            f"{len(too_long)} of {len(pairs)} pairs are too long, {reason}: {_listed(too_long)}.",
            where=str(path),
            do=f'They are never cut: {raising}shorten them, or leave them out with train.long_pairs = "drop".',
        )
    kept = [pair for pair in pairs if pair.n_tokens <= n_most]
    if not kept:
        raise UserError(f"no pair is short enough to train on, {reason}.", where=str(path), do=f"{raising.capitalize()}shorten them.")
    if too_long:
        say(f"  {path.name}: {len(too_long)} of {len(pairs)} pairs are left out, {reason}: {_listed(too_long)}")
    return kept, too_long


def _listed(pairs: list[str], n: int = 20) -> str:
    return ", ".join(pairs[:n]) + (f" and {len(pairs) - n} more" if len(pairs) > n else "")


def _checkpoint_key(recipe: Recipe, files: BaseModelFiles, run_dir: RunDir) -> str:
    inputs = [sha256(run_dir.file("pairs.jsonl")), sha256(run_dir.file("held_out.jsonl")), files.fingerprint, version("torch")]
    return hashlib.sha256(json.dumps([recipe.seed, recipe.train.model_dump(exclude=set(WATCHERS)), inputs]).encode()).hexdigest()


def _peak_memory_gb() -> float:
    """The largest resident size of this process, in 10^9 bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux hands ru_maxrss down from the process that started this one; VmHWM starts anew
        kib = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kib) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
