"""Which pairs are trained on and which are held out: by the seed alone, the same on every machine."""

import random
from collections import defaultdict
from dataclasses import dataclass

from unstilted.errors import UserError
from unstilted.records import Pair


@dataclass(frozen=True)
class Split:
    """Pairs to train on and pairs kept back, each in the order of the source."""

    training: list[Pair]
    held_out: list[Pair]


def split_pairs(pairs: list[Pair], n_pairs: int, n_held_out: int, seed: int) -> Split:
    """Hold out exactly `n_held_out` pairs and train on at most `n_pairs` of the others (0: all of them).

    Pairs with the same last user message stay on one side. The held-out pairs depend on the seed and not on `n_pairs`, and a smaller
    `n_pairs` takes a part of what a larger one takes, so runs with more or less data compare. Raises UserError when that can't be had.
    """
    if len(pairs) <= n_held_out:
        raise UserError(
            f"the number of usable pairs is {len(pairs)}, but n_held_out is {n_held_out} and at least one must be left to train on.",
            do="Bring more pairs or lower `--pairs.n-held-out`.",
        )
    shuffled = random.Random(seed)
    held_out = _held_out_indices(pairs, n_held_out, shuffled)
    rest = [index for index in range(len(pairs)) if index not in held_out]
    shuffled.shuffle(rest)
    taken = sorted(rest[:n_pairs] if n_pairs else rest)
    return Split(training=[pairs[index] for index in taken], held_out=[pairs[index] for index in sorted(held_out)])


def _held_out_indices(pairs: list[Pair], n_held_out: int, shuffled: random.Random) -> set[int]:
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        groups[" ".join(pair.text.casefold().split())].append(index)
    if len(groups) == 1:
        raise UserError("all pairs share one prompt, so none can be held out.", do="Bring pairs with different prompts.")
    order = list(groups.values())
    shuffled.shuffle(order)
    held_out: set[int] = set()
    for group in order:
        if len(held_out) + len(group) <= n_held_out:
            held_out.update(group)
    if len(held_out) < n_held_out:
        # Taking the same groups in the same order reaches this number exactly.
        possible = len(held_out) or min(len(group) for group in order)
        raise UserError(
            f"n_held_out is {n_held_out}, but pairs with the same prompt stay together and don't add up to that.",
            do=f"Set `--pairs.n-held-out {possible}` or another seed.",
        )
    return held_out
