"""The `train` stage: preference optimization of an adapter on `pairs.jsonl`."""

import hashlib
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from unstilted.errors import UserError
from unstilted.files import sha256, whole_folder
from unstilted.lm.chat import ChatTokens, TokenPair
from unstilted.models.embedded import cache_folder
from unstilted.models.load import load_tokenizer
from unstilted.models.resolve import BaseModelFiles, resolve_model
from unstilted.progress import say
from unstilted.recipe import Recipe, TrainTable
from unstilted.records import Pair, read_jsonl, write_jsonl
from unstilted.rundir import RunDir
from unstilted.train import references
from unstilted.train.trainer import Trainer

CHECKPOINT = "train.checkpoint.pt"


def run(recipe: Recipe, run_dir: RunDir) -> dict[str, Any]:
    """Tune an adapter on `pairs.jsonl`; writes `adapter/` (a PEFT folder) and `train.jsonl`. Returns facts for the manifest."""
    files = resolve_model(recipe.model, say)
    chat = ChatTokens(load_tokenizer(files), files.name)
    pairs, too_long = token_pairs(run_dir.require("pairs.jsonl", "pairs"), chat, recipe.train)
    held_out, _ = token_pairs(run_dir.require("held_out.jsonl", "pairs"), chat, recipe.train)
    trainer = Trainer(recipe.train, recipe.seed, files, cache_folder() / references.FILE)
    key = _checkpoint_key(recipe, files, run_dir)
    checkpoint = run_dir.file(CHECKPOINT)
    trainer.resume(checkpoint, key)
    stopped = trainer.train(pairs, held_out, checkpoint, key)
    finished = trainer.scale(held_out)
    with whole_folder(run_dir.file("adapter")) as folder:
        trainer.save(folder)
    write_jsonl(run_dir.file("train.jsonl"), trainer.points)
    checkpoint.unlink(missing_ok=True)
    return {
        "model": files.name,
        "licence": files.licence,
        "n_parameters_trained": trainer.n_parameters,
        "n_steps": len(trainer.points),
        "stopped": stopped,
        "held_out": finished.model_dump(),
        "too_long": too_long,
        "peak_memory_gb": round(_peak_memory_gb(), 2),
    }


def token_pairs(path: Path, chat: ChatTokens, settings: TrainTable) -> tuple[list[TokenPair], list[str]]:
    """Tokenized pairs of a file, and the ids of those that were too long; raises UserError when any is and the recipe refuses."""
    pairs = [chat.pair(pair) for pair in read_jsonl(path, Pair)]
    too_long = [pair.id for pair in pairs if pair.n_tokens > settings.max_tokens]
    if too_long and settings.long_pairs == "refuse":
        raise UserError(
            f"{len(too_long)} pairs are longer than train.max_tokens ({settings.max_tokens}): {', '.join(too_long[:10])}.",
            where=str(path),
            do='Raise train.max_tokens, or leave them out with train.long_pairs = "drop".',
        )
    kept = [pair for pair in pairs if pair.n_tokens <= settings.max_tokens]
    if not kept:
        raise UserError("no pair is short enough to train on.", where=str(path), do="Raise train.max_tokens.")
    return kept, too_long


def _checkpoint_key(recipe: Recipe, files: BaseModelFiles, run_dir: RunDir) -> str:
    inputs = [sha256(run_dir.file("pairs.jsonl")), sha256(run_dir.file("held_out.jsonl")), files.fingerprint, torch.__version__]
    return hashlib.sha256(json.dumps([recipe.seed, recipe.train.model_dump(), inputs]).encode()).hexdigest()


def _peak_memory_gb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)
