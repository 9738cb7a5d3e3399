"""Hugging Face weights, base or as `train` left them: runs any model, on a GPU where there is one."""

from collections.abc import Iterator, Sequence
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor

from unstilted.engines import Generated, Request, Sampling
from unstilted.lm.chat import ChatTokens
from unstilted.models.load import load_model, load_tokenizer, load_tuned
from unstilted.models.resolve import BaseModelFiles


class TransformersEngine:
    """Answers in batches of similar length; every request draws from a generator of its own, so batching changes no seed."""

    def __init__(self, files: BaseModelFiles, tuned: Path | None, strength: float, *, n_parallel: int) -> None:
        """tuned: a folder with an adapter or whole weights, applied at `strength`; None is the base model."""
        self.tokenizer, self.n_parallel = load_tokenizer(files), n_parallel
        self.end_of_turn = ChatTokens(self.tokenizer, files.name).end_of_turn
        model = load_model(files) if tuned is None else load_tuned(files, tuned, strength)
        inner = model.get_base_model() if hasattr(model, "peft_config") else model
        self.cache_name = "cache" if "cache" in signature(inner.forward).parameters else "past_key_values"  # until transformers 5.23
        # bitsandbytes has put its weights where they belong
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu") if files.load == "auto" else model

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Generated]:
        by_length = sorted(requests, key=lambda request: len(request.tokens))
        for start in range(0, len(by_length), self.n_parallel):
            yield from self._batch(by_length[start : start + self.n_parallel], sampling)

    @torch.inference_mode()
    def _batch(self, requests: Sequence[Request], sampling: Sampling) -> list[Generated]:
        device, padding = self.model.device, self.end_of_turn
        ends = {self.end_of_turn, self.tokenizer.eos_token_id}  # of Llama 3 and Gemma two different tokens
        width = max(len(request.tokens) for request in requests)
        ids = torch.tensor([[padding] * (width - len(r.tokens)) + r.tokens for r in requests], device=device)
        mask = torch.tensor([[0] * (width - len(r.tokens)) + [1] * len(r.tokens) for r in requests], device=device)
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        written: list[list[int]] = [[] for _ in requests]
        finished, cache = [False] * len(requests), None
        for _ in range(sampling.max_new_tokens):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1, **{self.cache_name: cache}
            )
            cache = out[self.cache_name]
            rows = out.logits[:, -1].float().cpu()
            tokens = [draw(row, sampling, generator) for row, generator in zip(rows, generators, strict=True)]
            for index, token in enumerate(tokens):
                finished[index] = finished[index] or token in ends
                if not finished[index]:
                    written[index].append(token)
            if all(finished):
                break
            ids = torch.tensor(tokens, device=device)[:, None]
            mask = torch.cat([mask, mask.new_ones(len(requests), 1)], dim=1)
        return [
            Generated(r.key, self.tokenizer.decode(tokens, skip_special_tokens=True).strip(), len(tokens), "stop" if done else "length")
            for r, tokens, done in zip(requests, written, finished, strict=True)
        ]


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token from logits of shape (V,): the likeliest at temperature 0, else from those of the top_k that hold top_p."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    kept, tokens = logits.topk(min(sampling.top_k, len(logits)))
    probabilities = (kept / sampling.temperature).softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
    return int(tokens[torch.multinomial(probabilities.masked_fill(outside, 0.0), 1, generator=generator)])
