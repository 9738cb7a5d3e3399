"""Which answers the report shows, by rules that it states: the most changed ones and the worst ones."""

from dataclasses import dataclass

from unstilted.records import Arm
from unstilted.report.contents import Answer, Answered
from unstilted.report.wording import decimal

VOICE, UPTAKE, REPETITION, HUMAN_CLAIM = "voice", "uptake", "repetition", "human_claim"
"""Names of the scores that the rules look at."""

MAX_VOICE = 1.2

MOST_CHANGED_RULE = (
    "Chosen by rule: the largest rise of voice from base to tuned, among tuned answers that came to their own end, use a content "
    "word of the prompt, repeat no four-word run and don't overshoot 1.2."
)
WORST_RULE = (
    "Chosen by rule: badness adds 1 for an answer that doesn't take up its prompt, 1 for one cut off at the token limit, 1 for a "
    "claim to a human life, 1 for an empty answer, and the share of its four-word runs that it has said before."
)


@dataclass(frozen=True)
class BadAnswer:
    """A tuned answer among the worst, with the words that say why."""

    answered: Answered
    answer: Answer
    badness: float
    reasons: tuple[str, ...]


def most_changed(answered: tuple[Answered, ...], n: int) -> list[Answered]:
    """Up to `n` prompts by MOST_CHANGED_RULE, the largest rise first; a missing uptake lets a prompt through."""
    rises = [(rise, row) for row in answered if (rise := voice_rise(row)) is not None and _is_sound(row)]
    return [row for rise, row in sorted(rises, key=lambda item: (-item[0], item[1].id))[:n]]


def voice_rise(row: Answered) -> float | None:
    """Voice of tuned minus voice of base, or None when either wasn't measured."""
    base, tuned = _score(row, "base", VOICE), _score(row, "tuned", VOICE)
    return None if base is None or tuned is None else tuned - base


def worst(answered: tuple[Answered, ...], n: int) -> list[BadAnswer]:
    """Up to `n` tuned answers by WORST_RULE, the worst first."""
    tuned = [(row, row.arms["tuned"]) for row in answered if "tuned" in row.arms]
    judged = [_judge(row, answer) for row, answer in tuned]
    return sorted(judged, key=lambda bad: (-bad.badness, bad.answered.id))[:n]


def _judge(row: Answered, answer: Answer) -> BadAnswer:
    uptake, repetition = answer.score(UPTAKE), answer.score(REPETITION) or 0.0
    counts = {
        "doesn't take up the prompt": 0.0 if uptake is None else 1 - uptake,
        "cut off at the token limit": float(answer.is_cut_off),
        "claims a human life": answer.score(HUMAN_CLAIM) or 0.0,
        "empty": float(not answer.response.text.strip()),
        f"repeats {decimal(100 * repetition, 0)} % of its four-word runs": repetition,
    }
    return BadAnswer(row, answer, sum(counts.values()), tuple(reason for reason, count in counts.items() if count > 0))


def _is_sound(row: Answered) -> bool:
    """Whether the tuned answer may stand as an example; what wasn't measured is no objection."""
    uptake, repetition, voice = (_score(row, "tuned", name) for name in (UPTAKE, REPETITION, VOICE))
    return not row.arms["tuned"].is_cut_off and uptake != 0 and not repetition and (voice is None or voice <= MAX_VOICE)


def _score(row: Answered, arm: Arm, name: str) -> float | None:
    answer = row.arms.get(arm)
    return None if answer is None else answer.score(name)
