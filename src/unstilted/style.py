"""Interpretable rates of style in one English text: what the voice axis and the style profile are made of."""

import re
from functools import cache
from importlib.resources import files
from statistics import fmean, pstdev

LETTER = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f"
WORD = re.compile(rf"[{LETTER}]+(?:['\u2019][{LETTER}]+)*")
SENTENCE_END = re.compile(r"(?<=[.!?\u2026])[\"'\u201d\u2019)]*\s+|\n+")
EMOJI = re.compile("[\U0001f1e6-\U0001f1ff\U0001f300-\U0001faff\u231a\u231b\u23e9-\u23fa\u2600-\u27bf\u2b50\u2b55]")

CONTRACTION = re.compile(
    r"\b(?:\w+(?:n't|'(?:re|ve|ll|d|m))|(?:it|he|she|that|there|here|what|who|where|when|how|why|let|\w+(?:body|thing))'s|"
    r"gonna|wanna|gotta|kinda|dunno|lemme)\b|"
    r"\b\w+'s(?= (?:a|an|the|not|been|got|gone|just|too|very|so|still|already|never|always|no|going|getting|doing|being|having)\b)",
    re.I,
)
"""A noun's 's counts only before a word that makes it 'is' or 'has': a possessive is no contraction."""
SECOND_PERSON = re.compile(r"\b(?:you|your|yours|yourself|you'\w+)\b", re.I)
FIRST_PERSON = re.compile(r"\b(?:i|me|my|mine|i'\w+)\b", re.I)
HEDGE = re.compile(
    r"\b(?:maybe|probably|perhaps|kind of|sort of|i think|i guess|i'd|pretty much|more or less|usually|mostly|a bit)\b", re.I
)
FILLER = re.compile(r"\b(?:well|so|yeah|yep|oh|hey|look|honestly|actually|just|really|anyway|sure|okay|ok|right|plus|though)\b", re.I)
FORMAL_CONNECTIVE = re.compile(
    r"\b(?:however|therefore|furthermore|moreover|additionally|consequently|thus|hence|nevertheless|accordingly|in addition|"
    r"as well as|such as|in order to|due to|with regard to|provided that|prior to|upon)\b",
    re.I,
)
FORMAL_MODAL = re.compile(r"\b(?:may|should|shall|must|can be|may be|should be|is to be|are to be|ought)\b", re.I)
PASSIVE = re.compile(r"\b(?:is|are|was|were|be|been|being)\s+(?:\w+ly\s+)?\w+(?:ed|en|wn|lt|nt)\b", re.I)
EXPLETIVE = re.compile(r"\b(?:it is|it may|it can|there is|there are|this is|these are)\b", re.I)
ABSTRACT = re.compile(r"\b\w{3,}(?:tion|tions|ment|ments|ness|ity|ities|ance|ence|ism|sion|sions)\b", re.I)
ADVERB = re.compile(r"\b\w{3,}ly\b", re.I)
PARTICLE_VERB = re.compile(
    r"\b(?:get|got|put|take|go|come|pick|figure|turn|set|keep|give|let|make)\w*\s+(?:\w+\s+)?"
    r"(?:up|out|off|in|on|down|over|back)\b",
    re.I,
)
LINKED_OPENING = re.compile(r"^(?:and|but|so|or|because|plus)\b", re.I)
WHICH_CLAUSE = re.compile(r"(?<=[\w,;)])\s+(?:which|whom|whose|wherein|whereby)\b", re.I)


def words(text: str) -> list[str]:
    """The text's words in lower case with straight apostrophes."""
    return [word.lower().replace("\u2019", "'") for word in WORD.findall(text)]


def sentences(text: str) -> list[str]:
    """The text's sentences; a line break ends one too."""
    return [part.strip() for part in SENTENCE_END.split(text) if WORD.search(part)]


@cache
def plain_words() -> frozenset[str]:
    """The 1,000 words that people use most in real chat (see benchmarks/plain_words.py)."""
    return frozenset((files("unstilted") / "data" / "plain_words.txt").read_text(encoding="utf-8").split())


def style_rates(text: str) -> dict[str, float]:
    """Twenty-two rates of a text, by name. Counts are per word or per sentence, so length itself has no say.

    Raises ValueError for a text without a word.
    """
    found = words(text)
    if not found:
        raise ValueError("no words to take rates of")
    straight, parts = text.replace("\u2019", "'"), sentences(text)
    lengths = [len(WORD.findall(part)) for part in parts]
    rates = {name: len(pattern.findall(straight)) / len(found) for name, pattern in _PER_WORD.items()}
    return rates | {
        "plain words": fmean(word in plain_words() for word in found),
        "letters a word": fmean(len(word) for word in found),
        "long words": fmean(len(word) >= 8 for word in found),
        "words a sentence": fmean(lengths),
        "sentence length spread": pstdev(lengths) / fmean(lengths),
        "short sentences": fmean(length <= 5 for length in lengths),
        "linked openings": fmean(bool(LINKED_OPENING.match(part)) for part in parts),
    }


_PER_WORD: dict[str, re.Pattern[str]] = {
    "contractions": CONTRACTION,
    "second person": SECOND_PERSON,
    "first person": FIRST_PERSON,
    "hedges": HEDGE,
    "fillers": FILLER,
    "formal connectives": FORMAL_CONNECTIVE,
    "formal modals": FORMAL_MODAL,
    "passives": PASSIVE,
    "expletives": EXPLETIVE,
    "abstract nouns": ABSTRACT,
    "adverbs": ADVERB,
    "particle verbs": PARTICLE_VERB,
    "which clauses": WHICH_CLAUSE,
    "commas": re.compile(","),
    "semicolons and colons": re.compile("[;:]"),
}
STYLE_RATES = tuple(style_rates("One word."))
"""Names of the rates, in their fixed order."""
