"""Which raters are excluded, by the rules of the study file alone. No rule sees arms, so none can punish a preference."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from unstilted.vote.study import Checks

MIN_VOTES_FOR_SIDE = 15
MIN_REPEATS = 3


@dataclass(frozen=True)
class RaterRecord:
    """What the rules look at: primary criterion only, votes taken back left out."""

    attention: tuple[bool, ...]
    """Whether each attention check was right."""
    seconds: tuple[float, ...]
    """Time on each main pair; unknown times are left out."""
    winners: tuple[str, ...]
    """Of the main pairs: left, right, tie or both_bad."""
    repeats: tuple[bool, ...]
    """Whether each repeat was answered as the first time."""


def reasons(record: RaterRecord, rules: Checks) -> list[str]:
    """Why a rater's votes are excluded, each with the value and the bound; empty for most raters."""
    found = []
    n_wrong = record.attention.count(False)
    if n_wrong > rules.max_attention_failures:
        found.append(f"attention: {n_wrong} wrong, at most {rules.max_attention_failures}")
    if record.seconds and median(record.seconds) < rules.min_median_seconds:
        found.append(f"speed: median {median(record.seconds):.1f} s, at least {rules.min_median_seconds:g} s")
    if (share := _one_side(record.winners)) > rules.max_one_side:
        found.append(f"side: {share:.2f} on one side, at most {rules.max_one_side:g}")
    if len(record.repeats) >= MIN_REPEATS and _share(record.repeats) < rules.min_consistency:
        found.append(f"consistency: {_share(record.repeats):.2f}, at least {rules.min_consistency:g}")
    return found


def _one_side(winners: Sequence[str]) -> float:
    if len(winners) < MIN_VOTES_FOR_SIDE:
        return 0.0
    return max(winners.count("left"), winners.count("right")) / len(winners)


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
