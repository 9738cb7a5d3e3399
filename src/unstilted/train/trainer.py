"""The training loop: preference optimization, deterministic, watched on held-out pairs, resumable."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unstilted.errors import UserError
from unstilted.lm.chat import TokenPair
from unstilted.lm.score import Scorer, packs
from unstilted.lm.tree import Request
from unstilted.losses import NEEDS_REFERENCE, PairLogps, chosen_nll, preference_loss, reward_margin
from unstilted.models.load import load_model
from unstilted.models.resolve import BaseModelFiles
from unstilted.progress import TrainProgress, say
from unstilted.recipe import TrainTable
from unstilted.records import HeldOut, TrainPoint
from unstilted.train.adapter import add_adapter, save_adapter, scale_adapter
from unstilted.train.checkpoint import Checkpoint, copy_into, load_checkpoint, random_state, set_random_state
from unstilted.train.guards import stop_reason
from unstilted.train.references import References
from unstilted.train.schedule import batches, learning_rate

WATCHING = 2
"""Tokens a forward without gradient takes for each token of one with: it keeps no activations."""


@dataclass(frozen=True)
class Outcome:
    """Loss and reward margin of each of B pairs, (B,); without gradient."""

    loss: Tensor
    margin: Tensor


class Trainer:
    """Holds model, optimizer and schedule of one training."""

    def __init__(self, settings: TrainTable, seed: int, files: BaseModelFiles, references: Path | None = None) -> None:
        """references: where reference log-probabilities are kept on disk; None keeps them in memory."""
        from accelerate import Accelerator
        from accelerate.utils import set_seed

        set_seed(seed)
        self.settings, self.seed, self.points = settings, seed, list[TrainPoint]()
        self._map: Callable[..., Iterator[Any]] = map
        self.accelerator = Accelerator()
        self.model = add_adapter(load_model(files), settings)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, weight_decay=0.0)
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.scorer = Scorer(self.model)
        self.references = References(references, files.fingerprint, str(self.model.dtype))

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    def train(self, pairs: list[TokenPair], held_out: list[TokenPair], checkpoint: Path, key: str) -> str:
        """Train to the end or to a stop rule, and say in words which it was. Goes on from `resume`d points."""
        order = batches(len(pairs), self.settings.batch_size, self.settings.n_epochs, self.seed)
        self.references.load([*pairs, *held_out])
        with TrainProgress(len(order), self.settings.batch_size) as progress, self.working():
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
        outcome = self.learn(batch)
        for pair, loss in zip(batch, outcome.loss.tolist(), strict=True):
            if not abs(loss) < float("inf"):
                raise UserError(
                    f"the loss of pair '{pair.id}' is {loss}.",
                    where=f"train, step {step + 1}",
                    do="Lower train.learning_rate; the last checkpoint is kept.",
                )
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seen = self.points[-1].n_pairs if self.points else 0
        return TrainPoint(
            step=step + 1,
            n_steps=n_steps,
            n_pairs=seen + len(batch),
            loss=float(outcome.loss.mean()),
            margin=float(outcome.margin.mean()),
            learning_rate=rate,
            gradient_norm=float(norm),
        )

    def learn(self, batch: Sequence[TokenPair]) -> Outcome:
        """Give the parameters the gradient of the batch's mean loss, in which every pair weighs the same however they are packed."""
        self.model.train()
        if not self.scorer.shares_trunk:
            self._complete_references(batch)
        total: list[Tensor] = []
        outcomes = list[Outcome]()
        # In this order, whatever ends first: a sum of floats depends on it.
        for outcome, gradients in self._map(lambda part: self._gradients(part, len(batch)), self._packed(batch)):
            outcomes.append(outcome)
            total = [one.add_(other) for one, other in zip(total, gradients, strict=True)] if total else list(gradients)
        for parameter, gradient in zip(self.parameters, total, strict=True):
            parameter.grad = gradient
        self.references.flush()
        return Outcome(torch.cat([outcome.loss for outcome in outcomes]), torch.cat([outcome.margin for outcome in outcomes]))

    def _gradients(self, part: Sequence[TokenPair], n_pairs: int) -> tuple[Outcome, tuple[Tensor, ...]]:
        if all(pair in self.references for pair in part):
            policy = self._policy(part)
        else:
            scores, base_scores = self.scorer.both(_requests(part))
            policy = _pair_logps(scores)
            self.references.add(part, base_scores)
        loss, margin = self._loss(part, policy)
        return Outcome(loss.detach(), margin.detach()), torch.autograd.grad(loss.sum() / n_pairs, self.parameters)

    def _policy(self, part: Sequence[TokenPair]) -> PairLogps:
        return _pair_logps(self.scorer.token_logps(_requests(part)))

    def _reference(self, part: Sequence[TokenPair]) -> PairLogps:
        logps = _pair_logps([self.references[pair] for pair in part])
        device, dtype = self.parameters[0].device, torch.promote_types(self.model.dtype, torch.float32)
        return PairLogps(*(value.to(device, dtype) for value in (logps.chosen, logps.rejected, logps.n_chosen, logps.n_rejected)))

    def _loss(self, part: Sequence[TokenPair], policy: PairLogps) -> tuple[Tensor, Tensor]:
        """Loss and reward margin of each pair, (B,)."""
        settings = self.settings
        reference = self._reference(part) if settings.loss in NEEDS_REFERENCE else None
        loss = preference_loss(
            settings.loss,
            policy,
            reference,
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
            simpo_gamma=settings.simpo_gamma,
        )
        return loss + settings.nll_weight * chosen_nll(policy), reward_margin(settings.loss, policy, reference, beta=settings.beta)

    def _complete_references(self, pairs: Iterable[TokenPair]) -> None:
        """Compute the references that are missing, with the adapter off and without dropout."""
        missing = [pair for pair in pairs if pair not in self.references]
        parts = self._packed(missing, WATCHING)
        for part, scores in zip(parts, self._map(self._base_scores, parts), strict=True):
            self.references.add(part, scores)
        self.references.flush()

    def _base_scores(self, part: Sequence[TokenPair]) -> list[list[Tensor]]:
        return self.scorer.token_logps(_requests(part), adapted=False)

    def _packed(self, pairs: Sequence[TokenPair], times: int = 1) -> list[list[TokenPair]]:
        """Pairs as they share forwards of `times` the usual number of tokens."""
        return [[pairs[index] for index in pack] for pack in packs(_requests(pairs), times * self.settings.tokens_per_forward)]

    @torch.no_grad()
    def evaluate(self, pairs: list[TokenPair]) -> HeldOut:
        """Means over held-out pairs, dropout off."""
        self.model.eval()
        self._complete_references(pairs)
        policy = list(self._map(torch.no_grad()(self._policy), self._packed(pairs, WATCHING)))  # threads have a gradient mode of their own
        joined = PairLogps(*(torch.cat([getattr(part, side.name) for part in policy]) for side in fields(PairLogps)))
        loss, margin = self._loss(pairs, joined)
        reference = self._reference(pairs)
        return HeldOut(
            loss=float(loss.mean()),
            margin=float(margin.mean()),
            accuracy=float((margin > 0).float().mean()),
            chosen_logp_change=float((joined.chosen - reference.chosen).mean()),
            rejected_logp_change=float((joined.rejected - reference.rejected).mean()),
        )

    def scale(self, held_out: list[TokenPair]) -> HeldOut:
        """Turn the adapter down to `strength` and look at the held-out pairs once more."""
        scale_adapter(self.accelerator.unwrap_model(self.model), self.settings.strength)
        return self.evaluate(held_out)

    def save(self, folder: Path) -> None:
        save_adapter(self.accelerator.unwrap_model(self.model), folder)

    def resume(self, checkpoint: Path, key: str) -> None:
        """Take up a checkpoint of exactly this training; any other is left alone."""
        saved = load_checkpoint(checkpoint, key)
        if saved is None:
            return
        copy_into(self.parameters, saved.parameters)
        self.optimizer.load_state_dict(saved.optimizer)
        set_random_state(saved.rng)
        self.points = list(saved.points)
        say(f"Going on from step {len(self.points)} of an earlier training.")

    def _save_checkpoint(self, checkpoint: Path, key: str) -> None:
        parameters = [parameter.detach() for parameter in self.parameters]
        Checkpoint(key, parameters, self.optimizer.state_dict(), random_state(), self.points).save(checkpoint)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Where packs run by hand, give each core a thread that takes whole packs: better than all cores at one."""
        n_threads = torch.get_num_threads()
        if self.scorer.trunk is None or n_threads == 1:
            yield
            return
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as workers:
                self._map = workers.map
                yield
        finally:
            self._map = map
            torch.set_num_threads(n_threads)


def _requests(pairs: Sequence[TokenPair]) -> list[Request]:
    return [Request(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs]


def _pair_logps(scores: Sequence[Sequence[Tensor]]) -> PairLogps:
    """Sums over tokens of (chosen, rejected) token log-probabilities of B pairs."""
    chosen, rejected = (torch.stack([pair[side].sum() for pair in scores]) for side in (0, 1))
    counts = (torch.tensor([len(pair[side]) for pair in scores], device=chosen.device) for side in (0, 1))
    return PairLogps(chosen, rejected, *counts)
