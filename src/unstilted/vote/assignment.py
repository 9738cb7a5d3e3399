"""Who sees which pair on which side: permuted blocks per item and per rater. Pure; randomness is passed in."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Literal

from unstilted.vote.study import Study

Role = Literal["training", "qualification", "main", "attention", "repeat", "blinding"]
COUNTED: tuple[Role, ...] = ("main", "attention", "repeat")
"""What a rater sees as one row of pairs after qualification."""
MIN_GAP = 4
"""Pairs between a pair and its repeat, where the plan is long enough."""


@dataclass(frozen=True)
class Cell:
    """Which arm stands on which side."""

    left: str
    right: str

    def exchanged(self) -> "Cell":
        return Cell(self.right, self.left)


@dataclass(frozen=True)
class Step:
    """One page of a rater's plan."""

    role: Role
    index: int
    """Which gold item of its role (training, qualification, attention), which main pair (main), or which main pair again."""


@dataclass(frozen=True)
class Need:
    """An item that could be shown, with the slots of its plan that are in use."""

    item: str
    taken: frozenset[int]


@dataclass(frozen=True)
class Choice:
    """What to show: an item, the slot of its plan, and the sides that the slot fixes."""

    item: str
    slot: int
    cell: Cell


def cells(study: Study) -> tuple[Cell, ...]:
    """Every pair of arms on both sides: what one block holds once."""
    return tuple(cell for first, second in study.pairs for cell in (Cell(first, second), Cell(second, first)))


def cell_of(slot: int, item: str, all_cells: Sequence[Cell], seed: int) -> Cell:
    """The sides of an item's n-th vote: blocks of `all_cells`, each in an order of its own that follows from the seed."""
    block, place = divmod(slot, len(all_cells))
    return all_cells[_order(f"{seed}/{item}/{block}", len(all_cells))[place]]


@lru_cache(maxsize=65_536)
def _order(seed: str, size: int) -> tuple[int, ...]:
    return tuple(Random(seed).sample(range(size), size))


def open_slots(taken: frozenset[int], block_size: int, n_slots: int) -> list[int]:
    """Free slots of the first block that has any, so that a block is filled before the next begins."""
    for start in range(0, n_slots, block_size):
        free = [slot for slot in range(start, min(start + block_size, n_slots)) if slot not in taken]
        if free:
            return free
    return []


def choose(needs: Sequence[Need], seen: Iterable[Cell], study: Study, random: Random) -> Choice | None:
    """The neediest item's free slot whose sides the rater's own block still lacks; None when no item has a free slot.

    seen: the cells of the rater's pairs so far. Among items of equal need chance decides. An item with as many full blocks as the
    neediest may be taken for the sake of the rater's balance; one that is further ahead never.
    """
    block = cells(study)
    lacking = _lacking(seen, block)
    options = [
        (len(need.taken), cell not in lacking, random.random(), Choice(need.item, slot, cell))
        for need in needs
        for slot in open_slots(need.taken, len(block), study.votes_per_item)
        for cell in (cell_of(slot, need.item, block, study.seed),)
    ]
    if not options:
        return None
    least = min(option[0] for option in options) // len(block)
    near = [option for option in options if option[0] // len(block) == least]
    return min(near, key=lambda option: (option[1], option[0], option[2]))[3]


def _lacking(seen: Iterable[Cell], block: Sequence[Cell]) -> set[Cell]:
    """Cells that the rater has seen least: what is left of their running block."""
    counts = Counter(seen)
    least = min(counts[cell] for cell in block)
    return {cell for cell in block if counts[cell] == least}


@lru_cache
def _main_steps(n_main: int) -> tuple[Step, ...]:
    return tuple(Step("main", index) for index in range(n_main))


def plan(study: Study, rater: str, n_attention_items: int) -> tuple[Step, ...]:
    """A rater's pages in order; follows from the study's seed and the rater's id alone.

    Training, qualification, then the main pairs with attention checks and repeats strewn among them, then the blinding question.
    """
    random = Random(f"{study.seed}/{rater}/plan")
    before = [Step("training", index) for index in range(study.qualification.n_training)]
    before += [Step("qualification", index) for index in range(study.qualification.n_items)]
    n_main, checks = study.votes_per_rater, study.checks
    row = list(_main_steps(n_main))
    for index in random.sample(range(n_attention_items), checks.n_attention):
        row.insert(random.randint(min(2, len(row)), len(row)), Step("attention", index))
    again = random.sample(range(n_main), checks.n_repeats + checks.n_blinding)
    for index in again[: checks.n_repeats]:
        first = row.index(Step("main", index))
        row.insert(random.randint(min(first + 1 + MIN_GAP, len(row)), len(row)), Step("repeat", index))
    return (*before, *row, *(Step("blinding", index) for index in again[checks.n_repeats :]))
