"""What keeps a training from going wrong unseen: rules that stop or warn, in words, before it and while it runs."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from unstilted.errors import UserError
from unstilted.losses import NEEDS_REFERENCE, PairLogps, dpo_margin, log_ratios, odds_ratio_loss
from unstilted.recipe import LossName, TrainTable
from unstilted.records import HeldOut, TrainPoint
from unstilted.train.schedule import learning_rate

BETAS: dict[LossName, tuple[float, float]] = {
    # 0.1 and 0.5 in Rafailov et al. 2023, from 0.01 on in the baselines of Meng et al. 2024
    "sigmoid": (0.01, 0.5),
    "robust": (0.01, 0.5),
    "hinge": (0.01, 0.5),
    # 0.1 to 1 in Azar et al. 2023, from 0.01 on in the baselines of Meng et al. 2024
    "ipo": (0.01, 1.0),
    # Lambert et al. 2024 (Tulu 3) settle on 5
    "sigmoid_norm": (2.0, 10.0),
    # Meng et al. 2024 use 2 to 2.5, and 10 for their later models
    "simpo": (2.0, 10.0),
    # lambda 0.1 to 1 in Hong et al. 2024, up to 2 in the baselines of Meng et al. 2024
    "orpo": (0.1, 2.0),
}
"""Values of `train.beta` with which each loss is used in print."""
LEARNING_RATES = {
    # in print 5e-6 (Zephyr's QLoRA recipe) to 2e-4 (arXiv 2501.05032) on models of billions; our own is 1e-3 on 135 million
    "lora": (1e-6, 5e-3),
    # in print 3e-7 (Meng et al. 2024) to 1e-6; ten times less than LoRA's best (Schulman et al. 2025, "LoRA Without Regret")
    "full": (1e-8, 1e-4),
}
"""Peak step sizes by what is tuned: a decade or so beyond what preferences are tuned with in print."""
MIN_STEPS = 10
"""Fewer optimizer steps and Adam's running means of the gradient (0.9: ten steps) haven't settled."""
FEW_STEPS, ENOUGH_HELD_OUT = 10, 8
"""Held-out pairs all told apart after so few steps, and so many that it isn't luck: 2^-8."""
DISPLACED = 1.0
"""Nats that chosen answers may lose before a word is said: half of that is what one step's wobble makes of them."""


def loss_margin(policy: PairLogps, reference: PairLogps | None, settings: TrainTable) -> Tensor | None:
    """The argument of the loss, (B,), which saturates alike for every loss; None for "ipo", whose loss pulls back what goes too far.

    "sigmoid", "robust", "hinge": beta times nats a response; "sigmoid_norm", "simpo": beta times nats a token (less gamma); "orpo": the
    log odds ratio. Raises ValueError where the loss needs a reference and gets none.
    """
    if settings.loss == "ipo":
        return None
    if settings.loss == "simpo":
        return settings.beta * policy.gap_per_token - settings.simpo_gamma
    if settings.loss == "orpo":
        loss = odds_ratio_loss(policy)
        return -torch.expm1(loss.clamp(min=torch.finfo(loss.dtype).tiny)).log()
    if reference is None:
        raise ValueError(f"the loss {settings.loss!r} needs a reference")
    if settings.loss == "sigmoid_norm":
        return settings.beta * log_ratios(policy, reference).gap_per_token
    return dpo_margin(policy, reference, settings.beta)


def stop_reason(held_out: HeldOut, settings: TrainTable) -> str:
    """Why training should end here, in words, or nothing."""
    if held_out.loss_margin is not None and held_out.loss_margin >= settings.stop_margin:
        return f"held-out margin {held_out.loss_margin:.2f} reached train.stop_margin {settings.stop_margin:g}"
    if held_out.chosen_logp_change <= -settings.stop_chosen_drop:
        lost = -held_out.chosen_logp_change
        return f"held-out chosen answers lost {lost:.1f} nats, train.stop_chosen_drop is {settings.stop_chosen_drop:g}"
    return ""


def setting_warnings(settings: TrainTable, n_pairs: int, n_steps: int) -> list[str]:
    """What in the recipe can't work well with so many pairs and optimizer steps, a sentence each; empty when nothing is odd."""
    return list(_setting_warnings(settings, n_pairs, n_steps))


def _setting_warnings(settings: TrainTable, n_pairs: int, n_steps: int) -> Iterator[str]:
    low, high = LEARNING_RATES[settings.tuning]
    rate = settings.learning_rate
    if rate < low:
        yield f"train.learning_rate {rate:g} is too small to change anything: {low:g} to {high:g} is what works."
    if rate > high:
        yield f"train.learning_rate {rate:g} is likely to break the model: {low:g} to {high:g} is what works."
    low, high = BETAS[settings.loss]
    if not low <= settings.beta <= high:
        side = "below" if settings.beta < low else "above"
        yield f"train.beta {settings.beta:g} is {side} what the loss '{settings.loss}' is known to work with: {low:g} to {high:g}."
    if settings.batch_size > n_pairs:
        yield f"train.batch_size {settings.batch_size} is more than the {n_pairs} pairs there are: every step sees all of them."
    if n_steps < MIN_STEPS:
        yield f"only {n_steps} optimizer steps: take more pairs or epochs, or a smaller train.batch_size."
    if settings.n_warmup_steps >= n_steps:
        reached = learning_rate(n_steps - 1, n_steps, settings)
        warm_up = f"train.n_warmup_steps {settings.n_warmup_steps} is the whole run of {n_steps} steps"
        yield f"{warm_up}: the learning rate gets to {reached:.2g} and never falls."


def training_warnings(points: Sequence[TrainPoint], settings: TrainTable, n_held_out: int) -> list[str]:
    """What the held-out looks so far warn of, each thing once and at the step where it first showed, in that order."""
    found: dict[str, str] = {}
    before = HeldOut(loss=0, margin=0, accuracy=0, chosen_logp_change=0, rejected_logp_change=0)  # the changes are 0 at the start
    for point in points:
        if point.held_out is not None:
            for name, text in _warnings(point, point.held_out, before, settings, n_held_out):
                found.setdefault(name, f"step {point.step}: {text}")
            before = point.held_out
    return list(found.values())


def _warnings(point: TrainPoint, now: HeldOut, before: HeldOut, settings: TrainTable, n_held_out: int) -> Iterator[tuple[str, str]]:
    is_falling = now.chosen_logp_change <= -DISPLACED and now.chosen_logp_change < before.chosen_logp_change
    if is_falling and _gap(now) > _gap(before):
        # Razin et al. 2024 (arXiv 2410.08847)
        yield (
            "displacement",
            f"held-out chosen answers lost {-now.chosen_logp_change:.1f} nats while the margin grew: both answers are unlearnt, the "
            "rejected one faster, and what gets likelier instead is neither (likelihood displacement). Raise train.nll_weight or "
            "train.beta, or lower train.learning_rate.",
        )
    if settings.loss in NEEDS_REFERENCE and point.step <= FEW_STEPS and now.accuracy == 1 and n_held_out >= ENOUGH_HELD_OUT:
        yield (
            "shortcut",
            f"all {n_held_out} held-out pairs are told apart after {point.n_pairs} pairs: something on the surface (length, emoji, a fixed "
            "opening) is enough for that. Accuracy and margin now say nothing about how good the answers are; read them.",
        )
    if now.kl is not None and now.kl > settings.warn_kl:
        yield (
            "kl",
            f"the tuned model is {now.kl:.2f} nats a token away from base, more than train.warn_kl {settings.warn_kl:g}: expect it to have "
            "forgotten things. Raise train.beta, or lower train.learning_rate or train.strength.",
        )


def _gap(held_out: HeldOut) -> float:
    return held_out.chosen_logp_change - held_out.rejected_logp_change


def require_finite_losses(ids: Sequence[str], losses: Tensor, where: str, points: Sequence[TrainPoint], settings: TrainTable) -> None:
    """Raise UserError naming each of the B pairs whose loss (B,) is no number."""
    broken = {pair: value for pair, value in zip(ids, losses.tolist(), strict=True) if not _is_finite(value)}
    if broken:
        named = ", ".join(f"'{pair}' is {value}" for pair, value in broken.items())
        raise _broken(f"the loss of pair {named}.", where, points, settings)


def require_finite_gradient(ids: Sequence[str], norm: float, where: str, points: Sequence[TrainPoint], settings: TrainTable) -> None:
    """Raise UserError naming the batch's pairs when the norm of their gradient is no number though their losses are."""
    if not _is_finite(norm):
        named = ", ".join(f"'{pair}'" for pair in ids)
        raise _broken(f"the gradient norm is {norm} in the batch of the pairs {named}.", where, points, settings)


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def _broken(what: str, where: str, points: Sequence[TrainPoint], settings: TrainTable) -> UserError:
    kept = max((point.step for point in points if point.held_out is not None), default=0)
    again = f"goes on from step {kept}, whose checkpoint is kept" if kept else "starts anew, no checkpoint was saved yet"
    do = (
        f"Was it the machine? The same command {again}. Otherwise lower train.learning_rate ({settings.learning_rate:g}), "
        "or take the pair out if there is something odd about it."
    )
    return UserError(what, where=where, do=do)
