"""Score continuations that share a prompt: exact log-probabilities of k continuations in one forward pass."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from unstilted.lm import llama
from unstilted.lm.head import Head, head_logps, head_of
from unstilted.lm.tree import Request, Tree

KNOWN_TYPES = frozenset({"llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "granite", "olmo2", "phi3", "smollm3"})
"""Model types that honour a 4-D attention mask as given and have no more to their logits than `head_of` reads from the configuration.
Every other type is scored one continuation at a time, by its own logits."""
MASKED_ATTENTION = frozenset({"eager", "sdpa"})
NO_TOKEN = -1
"""Stands for a model's first token where the model isn't known."""

log = logging.getLogger(__name__)


def token_logps(model: Any, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Tensor]:
    """Log-probability in nats of each token of each continuation after the prompt: k tensors of shape (T_i,), float32 or wider.

    For more than one call make a `Scorer`. Differentiable in the model's parameters.
    """
    (scores,) = Scorer(model, by_hand=False).token_logps([Request(prompt, continuations)])
    return scores


class Scorer:
    """Log-probabilities by one model, in the fastest way that gives exactly what a forward over each single continuation would.

    On a CPU, Llama-type models run by hand (`unstilted.lm.llama`); their linear layers' weights then are views into larger matrices,
    which `save_pretrained` of the whole model (not of an adapter) takes only as `state_dict` of `.contiguous()` copies.
    Others run in transformers, all continuations in one row under a mask that hides them from each other, or one by one where the
    model doesn't honour such a mask (recurrent layers, a sliding window shorter than the conversation) or where that costs less.
    """

    def __init__(self, model: Any, *, by_hand: bool = True) -> None:
        """model: a transformers causal language model, or one with PEFT adapters on it.

        Raises ValueError for adapters that aren't part of the layers: prompt tuning, and those that only PEFT's own forward turns on.
        """
        self.adapted_model = model
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        for config in getattr(model, "peft_config", {}).values():
            if self.model is model or config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
                raise ValueError(f"an adapter of type {config.peft_type} can't be scored; it takes one that `peft` puts into the layers")
        by_hand = by_hand and self.head is not None and llama.can_run(self.model)
        self.trunk = llama.LlamaTrunk(self.model) if by_hand else None
        self._has_said = False

    def token_logps(self, requests: Sequence[Request], *, adapted: bool = True) -> list[list[Tensor]]:
        """Log-probabilities in nats, float32 or wider, of shape (T_i,) for each continuation of each request.

        adapted=False is the base model, without gradient and without dropout.
        Where a prompt is empty, the model's first token (BOS, or where it has none EOS) stands for it. Raises ValueError for an empty
        continuation. Runs all requests at once; see `packs`.
        """
        tree = self._tree(requests)
        if adapted:
            return self._score(tree, adapted=True)
        with torch.no_grad(), self._without_dropout():
            return self._score(tree, adapted=False)

    @property
    def head(self) -> Head | None:
        """The frozen output head that makes the log-probabilities from `hidden`; None where only the model's own logits are right."""
        return head_of(self.model) if self.model.config.get_text_config().model_type in KNOWN_TYPES else None

    @property
    def shares_trunk(self) -> bool:
        """Whether `both` saves the layers below the first adapted one."""
        return self.trunk is not None and 0 < self.trunk.first_adapted < len(self.trunk.layers)

    def both(self, requests: Sequence[Request]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """What `token_logps` gives with and without the adapter, the layers that both have in common run once where `shares_trunk`."""
        if self.trunk is None or not self.shares_trunk:
            return self.token_logps(requests), self.token_logps(requests, adapted=False)
        tree, trunk = self._tree(requests), self.trunk
        lower = trunk.lower(tree)
        hidden = (trunk.hidden(tree, adapted, lower) for adapted in (True, False))
        adapted, base = (tree.per_continuation(self._by_head(states, tree)) for states in hidden)
        return adapted, base

    def hidden(self, tree: Tree, *, adapted: bool = True) -> Tensor:
        """Final hidden states (M, H) at the predicting places of a tree that `runs_as_one`."""
        if self.trunk is not None:
            return self.trunk.hidden(tree, adapted)
        with nullcontext() if adapted else self._without_adapter():
            states = self.model.get_decoder()(**self._inputs(tree), use_cache=False).last_hidden_state[0]
        return torch.as_tensor(states[tree.predicting])

    def runs_as_one(self, tree: Tree) -> bool:
        """Whether the whole tree can run in one row and should."""
        if self.trunk is not None:
            return True
        if len(tree.blocks) == 1:
            return True
        config = self.model.config.get_text_config()
        reason = why_not(config, max(tree.positions) + 1)
        if reason and not self._has_said:
            log.warning("Continuations are scored one by one: %s.", reason)
            self._has_said = True
        return not reason and _cost(config, [len(tree.tokens)]) <= _cost(config, _lengths(tree))

    def _score(self, tree: Tree, *, adapted: bool) -> list[list[Tensor]]:
        if not self.runs_as_one(tree):
            alone = [Tree((Request(prompt, [answer]),)) for prompt, answers in tree.requests for answer in answers]
            return tree.per_continuation(torch.cat([self._logps(one, adapted) for one in alone]))
        return tree.per_continuation(self._logps(tree, adapted))

    def _logps(self, tree: Tree, adapted: bool) -> Tensor:
        if self.trunk is not None or self.head is not None:
            return self._by_head(self.hidden(tree, adapted=adapted), tree)
        kept = torch.tensor(tree.predicting, device=self._device)
        keeps = "logits_to_keep" in signature(self.model.forward).parameters
        with nullcontext() if adapted else self._without_adapter():
            logits = self.adapted_model(**self._inputs(tree), use_cache=False, **({"logits_to_keep": kept} if keeps else {})).logits[0]
        wide = (logits if keeps else logits[kept]).to(torch.promote_types(logits.dtype, torch.float32))
        # not cross_entropy: over a large vocabulary its float32 gradient is several times less exact on a CPU
        return torch.as_tensor(wide.gather(1, torch.tensor(tree.targets, device=self._device)[:, None])[:, 0] - wide.logsumexp(1))

    def _by_head(self, hidden: Tensor, tree: Tree) -> Tensor:
        if self.head is None:
            raise RuntimeError("the output head has been replaced or unfrozen since this scorer was made: make a new one")
        return head_logps(hidden, self.head, torch.tensor(tree.targets, device=self._device))

    def _tree(self, requests: Sequence[Request]) -> Tree:
        return Tree(tuple(Request(request.prompt or self._first_token(), request.continuations) for request in requests))

    def _inputs(self, tree: Tree) -> dict[str, Tensor]:
        """Token ids (1, T) and, where the tree has several blocks, positions (1, T) and an additive mask (1, 1, T, T)."""
        ids = torch.tensor([tree.tokens], device=self._device)
        if len(tree.blocks) == 1:
            return {"input_ids": ids}
        dtype = self.model.dtype
        mask = torch.zeros(len(tree.tokens), len(tree.tokens), dtype=dtype).masked_fill(~tree.visible(), torch.finfo(dtype).min)
        positions = torch.tensor([tree.positions], device=self._device)
        return {"input_ids": ids, "position_ids": positions, "attention_mask": mask[None, None].to(self._device)}

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def _without_adapter(self) -> Any:
        return nullcontext() if self.model is self.adapted_model else self.adapted_model.disable_adapter()

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """By hand there is none."""
        training = [module for module in self.model.modules() if module.training] if self.trunk is None else []
        try:
            if training:
                self.model.eval()
            yield
        finally:
            for module in training:
                module.training = True

    def _first_token(self) -> list[int]:
        config = self.model.config.get_text_config()
        token = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
        first = token[0] if isinstance(token, list) else token
        if first is None:
            raise ValueError("an empty prompt needs a model with a BOS or EOS token")
        return [first]


def packs(requests: Sequence[Request], n_tokens: int) -> Iterator[list[int]]:
    """Indices of requests, in order, that fit into one row of at most `n_tokens` different tokens; a longer one is alone."""
    pack = list[int]()
    started = [Request(request.prompt or [NO_TOKEN], request.continuations) for request in requests]
    for index in range(len(requests)):
        if pack and len(Tree(tuple(started[i] for i in (*pack, index))).tokens) > n_tokens:
            yield pack
            pack = []
        pack.append(index)
    if pack:
        yield pack


def why_not(config: Any, n_positions: int) -> str:
    """Why continuations can't share a row of so many positions, or nothing."""
    if config.model_type not in KNOWN_TYPES:
        return f"models of type '{config.model_type}' are not known to honour a mask of their own"
    if config._attn_implementation not in MASKED_ATTENTION:
        return f"attention '{config._attn_implementation}' doesn't honour a mask of its own"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and n_positions > window:
        return f"{n_positions} tokens are more than the attention window of {window}"
    rope = config.rope_parameters
    if rope.get("rope_type") in llama.CHANGING_ROPE:
        trained = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if n_positions > trained:
            return f"{n_positions} tokens are more than the {trained} from which on positions depend on a conversation's length"
    return ""


def _lengths(tree: Tree) -> list[int]:
    """Tokens of each conversation in a row of its own."""
    return [len(request.prompt) + len(answer) - 1 for request in tree.requests for answer in request.continuations]


def _cost(config: Any, lengths: Sequence[int]) -> int:
    """Multiplications of a forward over rows of these lengths, roughly: dense layers and attention, which a mask doesn't make cheaper."""
    width, inner = config.hidden_size, config.intermediate_size
    per_token = config.num_hidden_layers * (4 * width**2 + 3 * width * inner)
    return sum(n * per_token + config.num_hidden_layers * 2 * n**2 * width for n in lengths)
