"""How far the tuned model has gone from base: exact KL divergence per token on held-out responses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unstilted.lm.chat import TokenPair
from unstilted.lm.head import head_kl, head_logps
from unstilted.lm.score import Scorer
from unstilted.lm.tree import Request, Tree

N_PAIRS = 8
"""Pairs it is measured on: of starter pairs they are ~1,200 positions, which cost an eighth of a look at 24 and leave an error of 4 %."""


class Divergence:
    """KL(policy || base) over the whole vocabulary at the responses' tokens of some pairs; base's hidden states are kept in memory."""

    def __init__(self, scorer: Scorer, keeps_base: bool) -> None:
        """keeps_base: whether the base model is there once the adapter is off."""
        self.scorer, self.keeps_base = scorer, keeps_base
        self._base: dict[tuple[str, ...], list[Tensor]] = {}

    @property
    def is_known(self) -> bool:
        """Whether base can run beside the policy and its head is one frozen matrix."""
        return self.keeps_base and self.scorer.head is not None

    def look(self, pairs: Sequence[TokenPair]) -> tuple[list[list[Tensor]], Tensor]:
        """Token log-probabilities as by `Scorer.token_logps`, and the KL divergence in nats at each of their M tokens, from one forward."""
        head = self.scorer.head
        assert head is not None
        whole = Tree(tuple(Request(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs))
        trees = [whole] if self.scorer.runs_as_one(whole) else _apart(whole)
        key = tuple(pair.id for pair in pairs)
        if key not in self._base:
            self._base[key] = [self.scorer.hidden(tree, adapted=False) for tree in trees]
        states = [self.scorer.hidden(tree) for tree in trees]
        targets = [torch.tensor(tree.targets, device=hidden.device) for tree, hidden in zip(trees, states, strict=True)]
        logps = [head_logps(hidden, head, target) for hidden, target in zip(states, targets, strict=True)]
        kl = [head_kl(hidden, base, head) for hidden, base in zip(states, self._base[key], strict=True)]
        return whole.per_continuation(torch.cat(logps)), torch.cat(kl)


def _apart(tree: Tree) -> list[Tree]:
    """Each continuation with its prompt, alone."""
    return [Tree((Request(prompt, [answer]),)) for prompt, answers in tree.requests for answer in answers]
