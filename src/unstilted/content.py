"""What an English answer says rather than how: prompt words taken up, repetition, claims about being a person or a machine."""

import re
from collections import Counter
from functools import cache
from importlib.resources import files

from unstilted.style import words


def _any_of(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.I)


KIN = (
    "mom|mum|mother|dad|father|parents?|wife|husband|girlfriend|boyfriend|partner|kids?|son|daughter|brother|sister|grandma|"
    "grandmother|grandpa|grandfather|aunt|uncle|cousin|family|friends?|roommate|neighbou?rs?|boss|cowork(?:er|ers)|dog|cat"
)
BODY_AND_HOME = (
    "body|back|stomach|hair|skin|teeth|eyes|hands?|feet|childhood|teens|twenties|birthday|house|home|apartment|bedroom|bed|kitchen|"
    "garden|car|fridge|freezer|desk|closet|hometown|school|college|job|career|wedding|commute|breakfast|lunch|vacation"
)
HUMAN_CLAIM = _any_of(
    rf"\bmy (?:own |old |best |little |older |younger |favou?rite |morning )?(?:(?:{KIN})s?|{BODY_AND_HOME})\b(?!-)",
    rf"\bi(?:'ve| have) (?:got )?(?:a|two|three) (?:{KIN})s?\b",
    r"\b(?:when|since) i was (?:(?:a|in) (?!training|testing|beta|smaller|model|version)|little|young|growing|\d)",
    r"\bas a (?:kid|child|teenager),? (?:i|my)\b|\bi (?:\w+ ){1,6}as a (?:kid|child|teenager)\b",
    r"\bas a (?:fellow )?(?:human|person)(?: being)?, (?:i|my)\b",
    r"\bi grew up\b|\bi was (?:born|raised)\b",
    r"\bi used to (?:be|have|live|love|hate|work|play|go|do|get|eat|drink|own|watch|spend)\b",
    r"\bi remember (?:when (?:i|we|my)|being|going|the (?:first|last) time)\b",
    r"\bi(?:'m| am) (?:only |just )?(?:an? )?(?:human|real person|man|woman|girl|guy|mother|father|mom|dad|student|teacher)\b(?!-)",
    r"\bi(?:'m| am) (?:an? )?(?:married|divorced|pregnant|retired|\d+[- ]years?[- ]old)\b",
    r"\bi (?:just |once |recently |always |usually |often |still )?(?:ate|eat|drank|drink|slept|sleep|woke|wake|cooked|cook|drove|drive|"
    r"married|visited|travel(?:l?ed)?|lived|bought|wear|wore|grew|run every)\b",
    r"\bi (?:just |once |recently )?moved\b(?! (?:the|that|this|your|it)\b)|\bi live in\b(?! (?:your|the cloud|a (?:server|computer))\b)",
    r"\bi (?:just |once |recently )?went\b(?! (?:with|over|through|ahead|for the)\b)|\bi (?:just |once )?walked\b(?! (?:you|through)\b)",
    r"\bi (?:just |once |recently )?ran\b(?! (?:the numbers|a search|a check|into|through|your|it|this|that)\b)",
    r"\bi(?:'ve| have) (?:been to|lived|eaten|slept|visited|travel(?:l?ed)|had my|had a (?!look|think|go\b|chance|read))\b",
)
NO_CLAIM = _any_of(
    r"\"[^\"\n]*\"|\u201c[^\u201d\n]*\u201d|(?<!\w)'(?=[a-z])[^\n]*?(?<=[\w.,!?\u2026])'(?!\w)",  # words for somebody else to say
    r"\b(?:if|wish|imagine|pretend(?:ing)?) (?:that )?i\b[^.!?;,\n]*",
    r"\b(?:don't|do not|didn't|can't|cannot|without|never) (?:\w+ )?(?:have|having|had|got|claim)\b[^.!?;\n]*",
    r"[,!] my friends?(?=[,.!?])|\bmy friend(?=[,!])",
    r"\bmy (?:family|body|school) of\b|\bmy job(?: here| today| now)? (?:is|isn't)\b|\bmy (?:house|home) (?:rules?|pages?)\b",
    r"\bwash\w* my hands of\b|\bmy hand at\b|\bmy hands? (?:are|is) (?:tied|full)\b",
    r"\b(?:in|before) my eyes\b|\bmy eyes? (?:peeled|open|on|glaz\w+)\b",
)
"""What sounds like a claim and is none: quotations, hypotheticals, denials, ways to address, figures of speech."""

AI = (
    r"(?:ai|a\.i\.|artificial intelligence|language model|chat ?bot|computer program|"
    r"(?:ai|virtual|digital) (?:assistant|helper|companion|entity))(?!\w|[- ](?:learning|engineer|researcher|fan|student|developer))"
)
MACHINE = r"(?:bot|robot|program|piece of software|machine|algorithm)(?!\w|[- ]learning)"
NEVER_HAD = (
    r"body|bodies|feelings|emotions|consciousness|experiences?(?! (?:with|in)\b)|preferences|physical form|senses|taste buds|childhood"
)
AI_DISCLOSURE = _any_of(
    rf"\b(?:as|being) an? (?:[\w-]+ ){{0,2}}?{AI}|\bas an? (?:\w+ )?{MACHINE}, (?:i|my)\b",
    rf"\bi(?:'m| am) (?:just |only |actually |really |still )*an? (?:[\w-]+ ){{0,2}}?(?:{AI}|{MACHINE})",
    r"\bi(?:'m| am) (?:just |only |actually |really |still )*(?:ai|software|code|artificial|made of (?:code|software|text|words))\b",
    r"\bi(?:'m| am| was| have been) (?:designed|programmed|trained on)\b",
    r"\bi(?:'m| am) not (?:actually |really )?(?:a )?(?:human|person|real person)\b(?! who)",
    rf"\bi (?:don't|do not|can't) (?:actually |really )?(?:have|possess) (?:a |any |human |personal |real )*(?:{NEVER_HAD})\b",
    r"\bi (?:don't|do not|can't|cannot) (?:actually |physically )?(?:eat|sleep|dream|breathe)(?=[.,;!?]| (?:or|and|the way|like)\b)",
    r"\bi (?:don't|do not|can't|cannot) (?:actually |really )?(?:feel|experience) (?:emotions?|feelings|pain|anything|things|the world)\b",
    r"\b(?:no one|nobody) (?:ever )?built me\b|\bsmollm",
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
    """Whether the answer speaks of a body, family, home or past of its own; what it writes for others to say doesn't count."""
    straight = text.strip().replace("\u2019", "'").replace("\u2018", "'")
    is_all_quoted = re.fullmatch(r"\"[^\"]*\"|\u201c[^\u201d]*\u201d", straight)
    return bool(HUMAN_CLAIM.search(NO_CLAIM.sub(" ... ", straight[1:-1] if is_all_quoted else straight)))


def discloses_ai(text: str) -> bool:
    """Whether the answer says outright that an AI is talking; hints such as having no tongue don't count."""
    return bool(AI_DISCLOSURE.search(text.replace("\u2019", "'")))


def opening(text: str) -> str:
    """The first two words."""
    return " ".join(words(text)[:2])
