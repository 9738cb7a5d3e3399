"""Score continuations that share a prompt: exact log-probabilities of k continuations in one forward pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

MASKED_TYPES = frozenset({"llama", "qwen2", "qwen3", "mistral", "granite", "olmo2", "smollm3"})
"""Model types that honour a 4-D attention mask as given; every other type is scored one continuation at a time."""


def token_logps(model: Any, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Tensor]:
    """Log-probability in nats of each token of each continuation after the prompt: k tensors of shape (T_i,), float32 or wider.

    The prompt is computed once where the model allows it: one row holds prompt + continuation 1 + ... + continuation k, positions
    restart after the prompt, and a mask hides the continuations from each other. The prompt must hold at least one token.
    Differentiable in the model's parameters.
    """
    if not prompt or not all(continuations):
        raise ValueError("a prompt and every continuation need at least one token")
    if not shares_prompt(model.config):
        return [_row_logps(model, prompt, [continuation])[0] for continuation in continuations]
    return _row_logps(model, prompt, continuations)


def shares_prompt(config: Any) -> bool:
    """Whether continuations can share a row: full attention in every layer, with a mask that is honoured."""
    has_window = bool(getattr(config, "sliding_window", None)) and bool(getattr(config, "use_sliding_window", True))
    return config.model_type in MASKED_TYPES and not has_window


def _row_logps(model: Any, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Tensor]:
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[*prompt, *(token for continuation in continuations for token in continuation)]], device=device)
    lengths = [len(continuation) for continuation in continuations]
    shared = {} if len(continuations) == 1 else _shared_row(len(prompt), lengths, model.dtype, device)
    kept = torch.tensor(_predicting_positions(len(prompt), lengths), device=device)
    logits = model(input_ids=ids, logits_to_keep=kept, use_cache=False, **shared).logits[0]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logps = -cross_entropy(wide, ids[0, len(prompt) :], reduction="none")
    return list(torch.split(logps, lengths))


def _predicting_positions(n_prompt: int, lengths: Sequence[int]) -> list[int]:
    """The row's positions whose outputs predict the continuations' tokens; the last prompt position predicts each first token."""
    positions, start = [], n_prompt
    for length in lengths:
        positions += [n_prompt - 1, *range(start, start + length - 1)]
        start += length
    return positions


def _shared_row(n_prompt: int, lengths: Sequence[int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Position ids (1, T) and an additive mask (1, 1, T, T) for continuations laid behind one prompt."""
    owner = torch.cat([torch.zeros(n_prompt), *(torch.full((n,), float(k)) for k, n in enumerate(lengths, start=1))])
    positions = torch.cat([torch.arange(n_prompt), *(torch.arange(n_prompt, n_prompt + n) for n in lengths)])
    total = len(owner)
    causal = torch.ones(total, total).tril().bool()
    visible = causal & ((owner[None, :] == 0) | (owner[None, :] == owner[:, None]))
    mask = torch.zeros(total, total, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    return {"position_ids": positions[None].to(device), "attention_mask": mask[None, None].to(device)}
