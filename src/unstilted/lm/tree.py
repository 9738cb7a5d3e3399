"""Layout of continuations and their prompts as one row of tokens in which whatever they share at the beginning stands once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

MIN_SHARED = 2
"""Shorter common beginnings are computed once for each; a block of its own costs about as much as a token."""


class Span(NamedTuple):
    """Places [start, end) of a row."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


class Request(NamedTuple):
    """A prompt and the k continuations whose tokens are to be scored after it, as token ids."""

    prompt: Sequence[int]
    continuations: Sequence[Sequence[int]]


class Block(NamedTuple):
    """Places that see the earlier ones among themselves, and all of their ancestors."""

    span: Span
    ancestors: tuple[Span, ...]


@dataclass
class Tree:
    """T tokens in one row: a prefix tree of all prompt + continuation sequences, each node a block.

    A token's position is its depth, and it sees only its own conversation, so every output is what a row of its own would give.
    Each continuation's last token predicts nothing and is left out. M counts the continuations' tokens of all requests.
    """

    requests: tuple[Request, ...]
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    predicting: list[int] = field(default_factory=list)
    """The M places whose outputs predict the continuations' tokens."""
    targets: list[int] = field(default_factory=list)
    """The M predicted tokens."""

    def __post_init__(self) -> None:
        if not all(request.prompt and request.continuations and all(request.continuations) for request in self.requests):
            raise ValueError("a prompt and every continuation need at least one token")
        asked = [(list(request.prompt), list(answer)) for request in self.requests for answer in request.continuations]
        places = self._grow([prompt + answer[:-1] for prompt, answer in asked])
        for (prompt, answer), own in zip(asked, places, strict=True):
            self.predicting += own[len(prompt) - 1 :]
            self.targets += answer

    def _grow(self, sequences: list[list[int]]) -> list[list[int]]:
        """Lay the sequences out; returns the place of each token of each."""
        places: list[list[int]] = [[] for _ in sequences]
        todo: list[tuple[list[int], int, tuple[Span, ...]]] = [(list(range(len(sequences))), 0, ())]
        while todo:
            members, depth, ancestors = todo.pop()
            groups: dict[object, list[int]] = {}
            for member in members:
                beginning = tuple(sequences[member][depth : depth + MIN_SHARED])
                groups.setdefault(beginning if len(beginning) == MIN_SHARED else (member,), []).append(member)
            for group in groups.values():
                first = sequences[group[0]]
                end = len(first) if len(group) == 1 else first_difference([sequences[member] for member in group], depth)
                if end == depth:
                    continue
                span = Span(len(self.tokens), len(self.tokens) + end - depth)
                self.tokens += first[depth:end]
                self.positions += range(depth, end)
                self.blocks.append(Block(span, ancestors))
                for member in group:
                    places[member] += range(*span)
                if len(group) > 1:
                    todo.append((group, end, (*ancestors, span)))
        return places

    def visible(self) -> Tensor:
        """Which places (columns) each place (rows) sees, bool of shape (T, T)."""
        seen = torch.zeros(len(self.tokens), len(self.tokens), dtype=torch.bool)
        for block in self.blocks:
            rows = slice(*block.span)
            seen[rows, rows] = torch.ones(block.span.size, block.span.size, dtype=torch.bool).tril()
            for ancestor in block.ancestors:
                seen[rows, slice(*ancestor)] = True
        return seen

    def per_continuation(self, values: Tensor) -> list[list[Tensor]]:
        """Values (M,) as a tensor (T_i,) for each continuation of each request."""
        lengths = [len(answer) for request in self.requests for answer in request.continuations]
        parts = iter(torch.split(values, lengths))
        return [[next(parts) for _ in request.continuations] for request in self.requests]


def first_difference(sequences: Sequence[Sequence[int]], start: int) -> int:
    """Where the sequences, equal before `start`, stop being equal."""
    shortest = min(len(sequence) for sequence in sequences)
    for place in range(start, shortest):
        if any(sequence[place] != sequences[0][place] for sequence in sequences):
            return place
    return shortest
