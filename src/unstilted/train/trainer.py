"""The training loop: preference optimization, deterministic, watched on held-out pairs, resumable."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unstilted.lm.chat import TokenPair
from unstilted.lm.score import Scorer, packs
from unstilted.lm.tree import Request
from unstilted.losses import NEEDS_REFERENCE, PairLogps, chosen_nll, preference_loss, reward_margin
from unstilted.models.load import load_model, make_optimizer
from unstilted.models.resolve import BaseModelFiles
from unstilted.progress import TrainProgress, say
from unstilted.recipe import TrainTable
from unstilted.records import HeldOut, TrainPoint
from unstilted.train.adapter import Tuned, keeps_base, tune
from unstilted.train.checkpoint import Checkpoint, load_checkpoint
from unstilted.train.distributed import Share, make_team
from unstilted.train.divergence import N_PAIRS, Divergence
from unstilted.train.guards import loss_margin, require_finite_gradient, require_finite_losses, stop_reason, training_warnings
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

    def __init__(
        self, settings: TrainTable, seed: int, files: BaseModelFiles, references: Path | None = None, pairs: Sequence[TokenPair] = ()
    ) -> None:
        """references: where reference log-probabilities are kept on disk; None keeps them in memory.

        pairs: all that will be trained on or looked at. Read only where the training changes the base itself (all weights, PiSSA):
        their references are computed before it does.
        """
        from accelerate.utils import set_seed

        set_seed(seed)
        self.settings, self.seed, self.files, self.points = settings, seed, files, list[TrainPoint]()
        self._map: Callable[..., Iterator[Any]] = map
        self.team = make_team(settings, files)
        model = load_model(files, wide=settings.tuning == "full")
        self.references = References(references, files.fingerprint, str(model.dtype))
        self._has_base = True
        if not keeps_base(settings) and not self.team.is_sharded:
            # by hand only below an adapter: weights that are trained and saved must not be views into larger ones
            self._ask_base(Scorer(model.to(self.team.accelerator.device), by_hand=settings.tuning == "lora"), pairs)
        self.tuned = tune(model, settings, files)
        self.model = self.tuned.model
        self.model, self.optimizer = self.team.prepare(self.model, make_optimizer(_trained(self.model), settings))
        self.parameters = _trained(self.model)
        self.scorer = self.team.scorer(self.model, settings)
        if not keeps_base(settings) and self.team.is_sharded:  # one device can't hold the base; it is what it was until the first step
            self._ask_base(self.scorer, pairs)
        self.divergence = Divergence(self.scorer, keeps_base(settings))

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    def train(
        self,
        pairs: list[TokenPair],
        held_out: list[TokenPair],
        checkpoint: Path | None,
        key: str,
        log: Callable[[TrainPoint], None] = lambda point: None,
    ) -> str:
        """Train to the end or to a stop rule, and say in words which it was. Goes on from `resume`d points; `log` gets each new one.

        checkpoint: None on all but the main process.
        Raises UserError when a loss or a gradient is no number; the last checkpoint then stays.
        """
        order = batches(len(pairs), self.settings.batch_size, self.settings.n_epochs, self.seed)
        self._load_references([*pairs, *held_out])
        with TrainProgress(len(order), self.settings.batch_size) as progress, self.working():
            for step in range(len(self.points), len(order)):
                point = self._step(step, [pairs[index] for index in order[step]], len(order))
                if (step + 1) % self.settings.eval_every == 0 or step + 1 == len(order):
                    point = point.model_copy(update={"held_out": self.evaluate(held_out)})
                n_warnings = len(self.warnings(len(held_out)))
                self.points.append(point)
                progress.show(point)
                log(point)
                for warning in self.warnings(len(held_out))[n_warnings:]:
                    say(f"  Warning: {warning}")
                if point.held_out is not None:
                    reason: str = self.team.from_main(stop_reason(point.held_out, self.settings))
                    if reason:
                        return reason
                    self._save_checkpoint(checkpoint, key)
        return "all pairs seen"

    def warnings(self, n_held_out: int) -> list[str]:
        """What this training's looks at `n_held_out` pairs gave reason to warn of."""
        return training_warnings(self.points, self.settings, n_held_out)

    def _step(self, step: int, batch: list[TokenPair], n_steps: int) -> TrainPoint:
        rate = learning_rate(step, n_steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        outcome = self.learn(batch)
        ids, where = [pair.id for pair in batch], f"train, step {step + 1}"
        require_finite_losses(ids, outcome.loss, where, self.points, self.settings)
        norm = self.team.clip(self.parameters, self.settings.max_gradient_norm)
        require_finite_gradient(ids, norm, where, self.points, self.settings)
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
            gradient_norm=norm,
        )

    def learn(self, batch: Sequence[TokenPair]) -> Outcome:
        """Give the parameters the gradient of the batch's mean loss, in which every pair weighs the same however they are packed."""
        self.model.train()
        if self.settings.loss in NEEDS_REFERENCE and not (self._has_base and self.scorer.shares_trunk):
            self._complete_references(batch)
        parts = self._packed(batch)
        mine = self.team.own(parts)
        total, learnt = self.team.gradient_sum(self.parameters), list[tuple[Any, ...]]()
        for seen, gradients in self._map(lambda share: self._gradients(parts[share.part], share, len(batch)), mine):
            total.add(gradients)
            learnt.append(seen)
        total.finish()
        learnt = self.team.join(mine, learnt)
        for part, (_, _, base_scores) in zip(parts, learnt, strict=True):
            if base_scores and part[0] not in self.references:  # another process computed them
                self.references.add(part, base_scores)
        self.references.flush()
        return Outcome(torch.cat([loss for loss, _, _ in learnt]), torch.cat([margin for _, margin, _ in learnt]))

    def _gradients(self, part: Sequence[TokenPair], share: Share, n_pairs: int) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
        """Loss, margin and, if they are new, base scores of a pack of a batch of n_pairs; and its gradients."""
        if self.settings.dropout:
            torch.manual_seed(_dropout_seed(self.seed, len(self.points), share.part))
        base_scores = list[list[Tensor]]()
        if self.settings.loss not in NEEDS_REFERENCE or all(pair in self.references for pair in part):
            policy = self._policy(part)
        else:
            scores, base_scores = self.scorer.both(_requests(part))
            policy = _pair_logps(scores)
            self.references.add(part, base_scores)
        loss, margin = self._loss(part, policy)
        gradients = self.team.differentiate(loss.sum() * share.counts / n_pairs, self.parameters)
        return (loss.detach(), margin.detach(), base_scores), gradients

    def _policy(self, part: Sequence[TokenPair]) -> PairLogps:
        return _pair_logps(self._scores(part))

    def _scores(self, part: Sequence[TokenPair]) -> list[list[Tensor]]:
        return self.scorer.token_logps(_requests(part))

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

    def _load_references(self, pairs: Sequence[TokenPair]) -> None:
        """Take those that are known; the main process has them on its disk."""
        self.references.load(pairs)
        self.references.known = self.team.from_main(self.references.known)

    def _ask_base(self, scorer: Scorer, pairs: Sequence[TokenPair]) -> None:
        """Compute the references of all pairs by the base model, which is gone afterwards."""
        self._load_references(pairs)
        self.scorer = scorer
        with self.working():
            self._complete_references(pairs)
        self._has_base = False

    def _complete_references(self, pairs: Iterable[TokenPair]) -> None:
        """Compute the references that are missing, with the adapter off and without dropout."""
        missing = [pair for pair in pairs if pair not in self.references]
        if missing and not self._has_base:
            raise ValueError(f"the base model is gone, and pair {missing[0].id!r} was not among the trainer's `pairs`")
        parts = self._packed(missing, WATCHING)
        for part, scores in zip(parts, self.team.each(self._base_scores, parts, self._map), strict=True):
            self.references.add(part, scores)
        self.references.flush()

    def _base_scores(self, part: Sequence[TokenPair]) -> list[list[Tensor]]:
        return self.scorer.token_logps(_requests(part), adapted=False)

    def _packed(self, pairs: Sequence[TokenPair], times: int = 1) -> list[list[TokenPair]]:
        """Pairs as they share forwards of `times` the usual number of tokens."""
        parts = [[pairs[index] for index in pack] for pack in packs(_requests(pairs), times * self.settings.tokens_per_forward)]
        return self.team.spread(parts, self.scorer)

    @torch.no_grad()
    def evaluate(self, pairs: list[TokenPair]) -> HeldOut:
        """Means over held-out pairs, dropout off. Raises UserError when one of them has a loss that is no number."""
        self.model.eval()
        self._complete_references(pairs)
        n_watched = N_PAIRS if self.divergence.is_known else 0
        # threads have a gradient mode of their own
        watched = self.team.each(torch.no_grad()(self.divergence.look), self._packed(pairs[:n_watched], WATCHING), self._map)
        others = self.team.each(torch.no_grad()(self._scores), self._packed(pairs[n_watched:], WATCHING), self._map)
        policy = _pair_logps([pair for scores in (*(scores for scores, _ in watched), *others) for pair in scores])
        loss, margin = self._loss(pairs, policy)
        where = f"train, held-out pairs at step {self.points[-1].step + 1 if self.points else 1}"
        require_finite_losses([pair.id for pair in pairs], loss, where, self.points, self.settings)
        reference = self._reference(pairs)
        argument = loss_margin(policy, reference, self.settings)
        return HeldOut(
            loss=float(loss.mean()),
            margin=float(margin.mean()),
            accuracy=float((margin > 0).float().mean()),
            chosen_logp_change=float((policy.chosen - reference.chosen).mean()),
            rejected_logp_change=float((policy.rejected - reference.rejected).mean()),
            loss_margin=None if argument is None else float(argument.mean()),
            kl=float(torch.cat([kl for _, kl in watched]).mean()) if watched else None,
        )

    def scale(self, held_out: list[TokenPair]) -> HeldOut:
        """Turn the adapter down to `strength` and look at the held-out pairs once more."""
        self.team.put_away(self.model)
        self.tuned.scale(self.settings.strength)
        return self.evaluate(held_out)

    def save(self, folder: Path | None) -> None:
        """Write what was tuned; on all but the main process `folder` is None."""
        whole, tuned = self.team.whole([parameter.detach() for parameter in self.parameters]), self.tuned
        if folder is None:
            return
        if self.team.is_sharded:  # nothing writes a model in pieces: put what was learnt into a whole one
            tuned = tune(load_model(self.files, wide=self.settings.tuning == "full"), self.settings, self.files)
            for parameter, value in zip(_trained(tuned.model), whole, strict=True):
                parameter.data.copy_(value)
            if isinstance(tuned, Tuned):
                tuned.model.peft_config = self.tuned.model.peft_config
        tuned.save(folder)

    def resume(self, checkpoint: Path | None, key: str) -> None:
        """Take up a checkpoint of exactly this training, which the main process has; any other is left alone."""
        saved = load_checkpoint(checkpoint, key) if checkpoint is not None else None
        points = self.team.from_main(saved and saved.points)
        if points is None:
            return
        self.team.hand_out(saved, self.parameters, self.optimizer)
        self.points = list(points)
        say(f"Going on from step {len(self.points)} of an earlier training.")

    def _save_checkpoint(self, checkpoint: Path | None, key: str) -> None:
        parameters, optimizer = self.team.whole([p.detach() for p in self.parameters]), self.team.whole(self.optimizer.state_dict())
        if checkpoint is not None:
            Checkpoint(key, parameters, optimizer, self.points).save(checkpoint)

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


def _trained(model: Any) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _requests(pairs: Sequence[TokenPair]) -> list[Request]:
    return [Request(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs]


def _pair_logps(scores: Sequence[Sequence[Tensor]]) -> PairLogps:
    """Sums over tokens of (chosen, rejected) token log-probabilities of B pairs."""
    chosen, rejected = (torch.stack([pair[side].sum() for pair in scores]) for side in (0, 1))
    counts = (torch.tensor([len(pair[side]) for pair in scores], device=chosen.device) for side in (0, 1))
    return PairLogps(chosen, rejected, *counts)


def _dropout_seed(seed: int, step: int, pack: int) -> int:
    """Each pack has dropout of its own, whichever process computes it and wherever a training was taken up."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{step}\0{pack}".encode()).digest()[:8]) >> 1
