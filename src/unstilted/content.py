"""What an English answer says rather than how: prompt words taken up, repetition, claims about being a person or a machine."""

import re
from collections import Counter
from functools import cache
from importlib.resources import files

from unstilted.style import words

ANIMATE = (
    "mom|mum|mother|dad|father|parents|wife|husband|girlfriend|boyfriend|partner|kids?|son|daughter|brother|sister|grandma|"
    "grandmother|grandpa|grandfather|aunt|uncle|cousin|family|friends?|roommate|neighbou?rs?|boss|cowork(?:er|ers)|dog|cat"
)
BODY_AND_HOME = (
    "body|back|stomach|hair|skin|teeth|eyes|hands?|feet|childhood|birthday|house|home|apartment|bedroom|bed|kitchen|garden|car|"
    "fridge|freezer|desk|closet|hometown|school|college|job|career|wedding"
)
HUMAN_CLAIM = re.compile(
    rf"\b(?:my (?:own |old |best |little |older |younger )?(?:{ANIMATE}|{BODY_AND_HOME})\b|"
    r"(?:when|since) i was (?:a |in |little|young|growing|\d)|as a (?:kid|child|teenager)\b|i grew up|i was (?:born|raised)|"
    r"i(?:'m| am) (?:only |just )?(?:a )?(?:human|real person|man|woman|girl|guy|mother|father|mom|dad|student|teacher|\d+ years old)\b|"
    r"i (?:just |once |recently |always |usually |often |never |still )?(?:ate|eat|drank|drink|slept|sleep|woke|wake|cooked|cook|"
    r"drove|drive|married|visited|travel(?:l?ed)?|moved|lived|live in|went|bought|wear|wore|grew|walked|run every|ran)\b|"
    r"i(?:'ve| have) (?:been to|lived|eaten|slept|visited|travel(?:l?ed)|had (?:a|my)|got (?:a|two|three) (?:kids?|dogs?|cats?))\b)",
    re.I,
)
AI_DISCLOSURE = re.compile(
    r"\b(?:(?:as|i'm|i am|being|just) (?:just )?(?:an? )?(?:\w+ )?(?:ai|a\.i\.|artificial intelligence|chatbot|bot|language model|robot|"
    r"computer program|virtual assistant|digital assistant|program|machine)\b|i(?:'m| am) not (?:a )?(?:human|person|real person)\b|"
    r"i (?:don't|do not|can't|cannot) (?:actually |really |physically |personally )?(?:have (?:a |any )?(?:body|bodies|feelings|emotions|"
    r"personal experiences?|physical form|opinions?)|eat|sleep|feel|experience)|no one built me|nobody (?:ever )?built me|smollm)",
    re.I,
)


@cache
def stopwords() -> frozenset[str]:
    """Words that carry no topic: function words and the small talk around them."""
    return frozenset((files("unstilted") / "data" / "stopwords.txt").read_text(encoding="utf-8").split())


def stem(word: str) -> str:
    """A word without its commonest English endings, so that 'alarms' meets 'alarm' and 'sleeping' meets 'sleep'."""
    bare = word.removesuffix("'s")
    for ending in ("ingly", "ings", "ing", "edly", "ies", "ed", "ly", "es", "s", "y", "e"):
        if bare.endswith(ending) and len(bare) - len(ending) >= 3:
            bare = bare[: -len(ending)]
            break
    return bare[:-1] if len(bare) > 3 and bare[-1] == bare[-2] else bare


def content_stems(text: str) -> set[str]:
    """Stems of the words that carry a text's topic: no function words, at least three letters."""
    return {stem(word) for word in words(text) if word not in stopwords() and len(word) >= 3}


def takes_up(answer: str, prompt: str) -> bool | None:
    """Whether the answer uses at least one content word of the prompt; None when the prompt has none."""
    wanted = content_stems(prompt)
    return bool(wanted & content_stems(answer)) if wanted else None


def repeated_share(text: str, n: int = 4) -> float:
    """Share of the text's n-grams of words that occurred before in it: 0 for normal prose, near 1 for a loop."""
    found = words(text)
    grams = Counter(zip(*(found[start:] for start in range(n)), strict=False))
    total = sum(grams.values())
    return 1 - len(grams) / total if total else 0.0


def claims_human_life(text: str) -> bool:
    """Whether the answer speaks of a body, family, home or past of its own."""
    return bool(HUMAN_CLAIM.search(text.replace("\u2019", "'")))


def discloses_ai(text: str) -> bool:
    """Whether the answer says that an AI is talking."""
    return bool(AI_DISCLOSURE.search(text.replace("\u2019", "'")))


def opening(text: str) -> str:
    """The first two words."""
    return " ".join(words(text)[:2])
