"""The output head without stored logits: log-probabilities of given tokens, and their gradient, chunk by chunk over the vocabulary."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 1024
"""Vocabulary entries at a time: logits of a few hundred positions then stay in a core's cache."""
HEADROOM = 40.0
"""Nats below the target's own logit that the sum of exponentials starts from: float32 holds it down to about -128 nats a token."""


@dataclass(frozen=True)
class Head:
    """A frozen output head: logit = cap * tanh(scale * hidden . weight / cap), or without cap scale * hidden . weight."""

    weight: Tensor
    """(V, H), also where it is tied to the embeddings."""
    scale: float = 1.0
    cap: float = 0.0
    """Soft cap of the logits (Gemma 2, arXiv 2408.00118, section 2); 0 is none."""


def head_of(model: Any) -> Head | None:
    """The head of a transformers causal language model, or None where it isn't one frozen matrix without bias."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    weight = getattr(head, "weight", None)
    if type(head) is not torch.nn.Linear or weight is None or weight.requires_grad or head.bias is not None:
        return None
    if type(weight) is not torch.nn.Parameter:  # a sharded weight is whole only inside the model's own forward
        return None
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return Head(weight, float(scale), float(getattr(config, "final_logit_softcapping", None) or 0))


def head_logps(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Log-probabilities (M,) in nats of `targets` (M,) after the final hidden states (M, H); float32 or wider.

    For a frozen head d(log p)/d(hidden) is one vector a position, w_target - sum_v p_v w_v, so the forward computes it at once:
    two matrix products a chunk, and never more than (M, CHUNK) logits in memory. Differentiable in `hidden` once.
    """
    logps: Tensor = _HeadLogps.apply(hidden, head, targets)  # type: ignore[no-untyped-call]
    return logps


class _HeadLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        logps, direction = logps_and_direction(hidden, head, targets, with_direction=ctx.needs_input_grad[0])
        if direction is not None:
            ctx.save_for_backward(direction)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (direction,) = ctx.saved_tensors
        return direction * upstream[:, None].to(direction.dtype), None, None


@torch.no_grad()
def head_kl(hidden: Tensor, base_hidden: Tensor, head: Head) -> Tensor:
    """KL divergence KL(p || q) in nats, (M,), float32 or wider: p after `hidden`, q after `base_hidden`, both (M, H). No gradient.

    Exact over the vocabulary, with never more than a few (M, CHUNK) matrices in memory. With d the change of the logits it is
    E_p[d] - log E_q[e^d]. d comes from the change of the hidden states, so that a small divergence isn't lost in rounded logits.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    change = hidden.to(wide) - base_hidden.to(wide)
    # Sums over v relative to the largest term so far of each: of e^(p's logit), d times that, e^(q's logit), e^d - 1 times that.
    of_p, pulled, of_q, growth = sums = torch.zeros(4, len(hidden), dtype=wide, device=hidden.device)
    top_p, top_q = torch.full((2, len(hidden)), -torch.inf, dtype=wide, device=hidden.device)
    for chunk in torch.split(head.weight, CHUNK):
        q = _product(base_hidden.to(wide), chunk.t(), wide) * head.scale
        d = _product(change, chunk.t(), wide) * head.scale
        p = q + d
        if head.cap:
            p, q = (logits.div_(head.cap).tanh_().mul_(head.cap) for logits in (p, q))
            d = p - q
        higher_p, higher_q = torch.maximum(top_p, p.amax(1)), torch.maximum(top_q, q.amax(1))
        sums[:2] *= (top_p - higher_p).exp()
        sums[2:] *= (top_q - higher_q).exp()
        top_p, top_q = higher_p, higher_q
        p, q = p.sub_(top_p[:, None]).exp_(), q.sub_(top_q[:, None]).exp_()
        of_p += p.sum(1)
        of_q += q.sum(1)
        pulled += p.mul_(d).sum(1)
        growth += q.mul_(d.expm1_()).sum(1)
    rise = growth / of_q  # e^(log of p's sum - log of q's) - 1, exact where it is small; where it isn't it may be off, even no number
    log_rise = torch.where(rise.abs() < 0.5, rise.log1p(), top_p - top_q + of_p.log() - of_q.log())
    return torch.as_tensor((pulled / of_p - log_rise).clamp(min=0))


@torch.no_grad()
def logps_and_direction(hidden: Tensor, head: Head, targets: Tensor, with_direction: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (M,) and, where asked for, d(log p)/d(hidden) (M, H) in the dtype of `hidden`."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    toward = head.weight[targets].to(wide)
    own = _logits_of(hidden.to(wide), toward, head)
    sums, pull = _sums(hidden, head, own + HEADROOM, with_direction)
    logps = -sums.log() - HEADROOM
    if not bool(torch.isfinite(sums).all()):  # a token under about -128 nats
        highest = _highest(hidden, head, wide)
        sums, pull = _sums(hidden, head, highest, with_direction)
        logps = own - highest - sums.log()
    if pull is None:
        return logps, None
    if head.cap:
        toward *= _slope(own, head.cap)[:, None]
    return logps, ((toward - pull / sums[:, None]) * head.scale).to(hidden.dtype)


def _sums(hidden: Tensor, head: Head, start: Tensor, with_pull: bool) -> tuple[Tensor, Tensor | None]:
    """sum_v exp(z_v - start), (M,), and sum_v exp(z_v - start) dz_v/du_v w_v, (M, H), from `start` (M,), in its dtype."""
    sums = torch.zeros_like(start)
    pull = torch.zeros(hidden.shape, dtype=start.dtype, device=hidden.device) if with_pull else None
    for chunk in torch.split(head.weight, CHUNK):
        logits = _logits(hidden, chunk, head, start.dtype)
        slope = _slope(logits, head.cap) if head.cap and pull is not None else None
        weights = logits.sub_(start[:, None]).exp_()
        sums += weights.sum(1)
        if pull is not None:
            _add_product(pull, weights if slope is None else weights.mul_(slope), chunk)
    return sums, pull


def _highest(hidden: Tensor, head: Head, wide: torch.dtype) -> Tensor:
    """The highest logit of each position, (M,)."""
    return torch.stack([_logits(hidden, chunk, head, wide).amax(1) for chunk in torch.split(head.weight, CHUNK)]).amax(0)


def _logits(hidden: Tensor, chunk: Tensor, head: Head, wide: torch.dtype) -> Tensor:
    """Logits of some vocabulary entries, (M, entries)."""
    logits = _product(hidden, chunk.t(), wide)
    if head.scale != 1:
        logits *= head.scale
    return logits.div_(head.cap).tanh_().mul_(head.cap) if head.cap else logits


def _logits_of(hidden: Tensor, rows: Tensor, head: Head) -> Tensor:
    """Logit of each position's own vocabulary entry, (M,)."""
    plain = (hidden * rows).sum(1) * head.scale
    return (plain / head.cap).tanh() * head.cap if head.cap else plain


def _slope(logits: Tensor, cap: float) -> Tensor:
    """Derivative of the soft cap where it gave `logits`."""
    return 1 - (logits / cap) ** 2


def _product(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """left @ right in `wide`; bfloat16 on a GPU is multiplied as it is and summed in float32."""
    if left.is_cuda and left.dtype == right.dtype != wide == torch.float32:
        return torch.mm(left, right, out_dtype=wide)
    return left.to(wide) @ right.to(wide)


def _add_product(total: Tensor, weights: Tensor, chunk: Tensor) -> None:
    if chunk.dtype == total.dtype:
        total.addmm_(weights, chunk)
    else:
        total += _product(weights.to(chunk.dtype) if chunk.is_cuda else weights, chunk, total.dtype)
