"""Text generation. An engine takes tokenized requests and returns them answered, in the order in which they end."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Request:
    """One answer to write."""

    key: str
    tokens: list[int]
    """The templated conversation up to where the answer begins."""
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 takes the likeliest; of the top_k likeliest, those that hold top_p are kept."""

    temperature: float
    top_p: float
    max_new_tokens: int
    top_k: int = 40


@dataclass(frozen=True)
class Generated:
    """One answer written."""

    key: str
    text: str
    n_tokens: int
    finish_reason: Literal["stop", "length"]


class Engine(Protocol):
    """Writes answers with one set of weights; another adapter or strength is another engine."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Generated]: ...
