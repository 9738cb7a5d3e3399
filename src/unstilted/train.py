"""The `train` stage: Direct Preference Optimization of a LoRA adapter, deterministic, watched on held-out pairs, resumable."""

import hashlib
import json
import math
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from unstilted.errors import UserError
from unstilted.files import sha256, whole_file, whole_folder
from unstilted.lm.chat import ChatTokens, TokenPair
from unstilted.lm.score import token_logps
from unstilted.losses import PairLogps, chosen_nll, dpo_loss, dpo_margin
from unstilted.models.load import load_model, load_tokenizer
from unstilted.models.resolve import BaseModelFiles, resolve_model
from unstilted.progress import TrainProgress, say
from unstilted.recipe import Recipe, TrainTable
from unstilted.records import HeldOut, Pair, TrainPoint, read_jsonl, write_jsonl
from unstilted.rundir import RunDir

CHECKPOINT = "train.checkpoint.pt"


def run(recipe: Recipe, run_dir: RunDir) -> dict[str, Any]:
    """Tune an adapter on `pairs.jsonl`; writes `adapter/` (a PEFT folder) and `train.jsonl`. Returns facts for the manifest."""
    files = resolve_model(recipe.model, say)
    chat = ChatTokens(load_tokenizer(files), files.name)
    pairs, too_long = _token_pairs(run_dir.require("pairs.jsonl", "pairs"), chat, recipe.train)
    held_out, _ = _token_pairs(run_dir.require("held_out.jsonl", "pairs"), chat, recipe.train)
    trainer = Trainer(recipe.train, recipe.seed, files)
    key = _checkpoint_key(recipe, files, run_dir)
    checkpoint = run_dir.file(CHECKPOINT)
    trainer.resume(checkpoint, key)
    stopped = trainer.train(pairs, held_out, checkpoint, key)
    finished = trainer.scale(held_out)
    with whole_folder(run_dir.file("adapter")) as folder:
        trainer.save_adapter(folder)
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


@dataclass(frozen=True)
class PairScores:
    """One pair under the policy and under the reference, before anything is reduced."""

    policy: PairLogps
    reference: PairLogps
    n_chosen_tokens: Tensor


class Trainer:
    """Holds model, optimizer and schedule of one training."""

    def __init__(self, settings: TrainTable, seed: int, files: BaseModelFiles) -> None:
        from accelerate import Accelerator
        from accelerate.utils import set_seed

        set_seed(seed)
        self.settings, self.seed, self.points = settings, seed, list[TrainPoint]()
        self.references: dict[str, PairLogps] = {}
        self.accelerator = Accelerator()
        self.model = add_adapter(load_model(files), settings)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, weight_decay=0.0)
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    def train(self, pairs: list[TokenPair], held_out: list[TokenPair], checkpoint: Path, key: str) -> str:
        """Train to the end or to a stop rule, and say in words which it was. Goes on from `resume`d points."""
        order = batches(len(pairs), self.settings.batch_size, self.settings.n_epochs, self.seed)
        with TrainProgress(len(order), self.settings.batch_size) as progress:
            for step in range(len(self.points), len(order)):
                point = self._step(step, [pairs[index] for index in order[step]], len(order))
                if (step + 1) % self.settings.eval_every == 0 or step + 1 == len(order):
                    point = point.model_copy(update={"held_out": self.evaluate(held_out)})
                self.points.append(point)
                progress.show(point)
                if point.held_out is not None:
                    reason = stop_reason(point.held_out, self.settings)
                    if reason:
                        return reason
                    self._save_checkpoint(checkpoint, key)
        return "all pairs seen"

    def _step(self, step: int, batch: list[TokenPair], n_steps: int) -> TrainPoint:
        rate = learning_rate(step, n_steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss_sum = margin_sum = 0.0
        self.model.train()
        for pair in batch:
            scores = self.score(pair)
            loss, margin = pair_loss(scores, self.settings)
            if not torch.isfinite(loss):
                raise UserError(
                    f"the loss of pair '{pair.id}' is {loss.item()}.",
                    where=f"train, step {step + 1}",
                    do="Lower train.learning_rate; the last checkpoint is kept.",
                )
            self.accelerator.backward(loss / len(batch))
            loss_sum, margin_sum = loss_sum + loss.item(), margin_sum + margin.item()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seen = self.points[-1].n_pairs if self.points else 0
        return TrainPoint(
            step=step + 1,
            n_steps=n_steps,
            n_pairs=seen + len(batch),
            loss=loss_sum / len(batch),
            margin=margin_sum / len(batch),
            learning_rate=rate,
            gradient_norm=float(norm),
        )

    def score(self, pair: TokenPair) -> PairScores:
        """Policy (with gradient) and reference (adapter off, no dropout) on one pair; each reference is computed once."""
        if pair.id not in self.references:
            with torch.no_grad(), _reference(self.model):
                self.references[pair.id] = _pair_logps(self.model, pair)
        policy = _pair_logps(self.model, pair)
        return PairScores(policy, self.references[pair.id], torch.tensor([len(pair.chosen)], device=policy.chosen.device))

    @torch.no_grad()
    def evaluate(self, pairs: list[TokenPair]) -> HeldOut:
        """Means over held-out pairs, dropout off."""
        self.model.eval()
        scores = [self.score(pair) for pair in pairs]
        losses, margins = zip(*(pair_loss(score, self.settings) for score in scores), strict=True)
        return HeldOut(
            loss=_mean(losses),
            margin=_mean(margins),
            accuracy=_mean([(margin > 0).float() for margin in margins]),
            chosen_logp_change=_mean([score.policy.chosen - score.reference.chosen for score in scores]),
            rejected_logp_change=_mean([score.policy.rejected - score.reference.rejected for score in scores]),
        )

    def scale(self, held_out: list[TokenPair]) -> HeldOut:
        """Turn the adapter down to `strength` and look at the held-out pairs once more.

        Weights part of the way from base to tuned keep most of the change and more of what base knew (Wortsman et al. 2022,
        arXiv 2109.01903). The strength goes into the adapter's alpha, so every loader applies it.
        """
        from peft.tuners.lora import LoraLayer

        model = self.accelerator.unwrap_model(self.model)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.scale_layer(self.settings.strength)
        model.peft_config["default"].lora_alpha *= self.settings.strength
        return self.evaluate(held_out)

    def save_adapter(self, folder: Path) -> None:
        """A PEFT folder that `peft` loads unchanged."""
        # "auto" would ask the hub whether the vocabulary has grown; it never does here.
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, save_embedding_layers=False)

    def resume(self, checkpoint: Path, key: str) -> None:
        """Take up a checkpoint of exactly this training; any other is left alone."""
        if not checkpoint.exists():
            return
        try:
            state = torch.load(checkpoint, weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError):
            say("The checkpoint of an earlier training is damaged; starting anew.")
            return
        if state["key"] != key:
            return
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.points = [TrainPoint.model_validate_json(line) for line in state["points"]]
        say(f"Going on from step {len(self.points)} of an earlier training.")

    def _save_checkpoint(self, checkpoint: Path, key: str) -> None:
        state = {
            "key": key,
            "parameters": [parameter.detach() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "points": [point.model_dump_json() for point in self.points],
        }
        with whole_file(checkpoint) as part:
            torch.save(state, part)


def add_adapter(model: Any, settings: TrainTable) -> Any:
    """The model with a fresh LoRA adapter on the chosen layers; everything else is frozen."""
    from peft import LoraConfig, get_peft_model

    n_layers = model.config.get_text_config().num_hidden_layers
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        layers_to_transform=list(range(math.floor(n_layers * settings.first_layer_share), n_layers)),
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"no adapter can be put on this model ({error}).", where="train.target_modules", do="Name its linear layers."
        ) from None


def batches(n_pairs: int, batch_size: int, n_epochs: int, seed: int) -> list[list[int]]:
    """Indices of the pairs of each optimizer step; every epoch is a new permutation, and a last short batch is kept."""
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(n_pairs, generator=generator).tolist() for _ in range(n_epochs)]
    return [epoch[start : start + batch_size] for epoch in order for start in range(0, n_pairs, batch_size)]


def learning_rate(step: int, n_steps: int, settings: TrainTable) -> float:
    """Linear warm-up, then a cosine that would reach 0 one step after the last; `step` counts from 0."""
    if step < settings.n_warmup_steps:
        return settings.learning_rate * (step + 1) / settings.n_warmup_steps
    done = (step - settings.n_warmup_steps) / max(1, n_steps - settings.n_warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def pair_loss(scores: PairScores, settings: TrainTable) -> tuple[Tensor, Tensor]:
    """Loss and margin of one pair, both scalars: DPO plus the weighted chosen NLL."""
    preference = dpo_loss(scores.policy, scores.reference, settings.beta)
    anchor = settings.nll_weight * chosen_nll(scores.policy, scores.n_chosen_tokens)
    return (preference + anchor).squeeze(0), dpo_margin(scores.policy, scores.reference, settings.beta).squeeze(0)


def stop_reason(held_out: HeldOut, settings: TrainTable) -> str:
    """Why training should end here, in words, or nothing."""
    if held_out.margin >= settings.stop_margin:
        return f"held-out margin {held_out.margin:.2f} reached train.stop_margin {settings.stop_margin:g}"
    if held_out.chosen_logp_change <= -settings.stop_chosen_drop:
        lost = -held_out.chosen_logp_change
        return f"held-out chosen answers lost {lost:.1f} nats, train.stop_chosen_drop is {settings.stop_chosen_drop:g}"
    return ""


def _pair_logps(model: Any, pair: TokenPair) -> PairLogps:
    chosen, rejected = token_logps(model, pair.prompt, [pair.chosen, pair.rejected])
    return PairLogps(chosen.sum()[None], rejected.sum()[None])


@contextmanager
def _reference(model: Any) -> Iterator[None]:
    """The base model inside an adapted one: adapter off, dropout off."""
    was_training = model.training
    model.eval()
    with model.disable_adapter():
        yield
    model.train(was_training)


def _token_pairs(path: Path, chat: ChatTokens, settings: TrainTable) -> tuple[list[TokenPair], list[str]]:
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


def _mean(values: Any) -> float:
    return float(torch.stack([value.squeeze() for value in values]).mean())


def _peak_memory_gb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)
