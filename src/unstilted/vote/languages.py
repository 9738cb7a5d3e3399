"""What the site says, in the languages that have a catalogue: one TOML file each in `catalogues/`, keys as in `en.toml`."""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from string import Formatter

DEFAULT = "en"


@dataclass(frozen=True)
class Language:
    """A catalogue; `catalogue(key, name=value)` is the text with its placeholders filled."""

    code: str
    name: str
    """In itself."""
    direction: str
    """ltr or rtl."""
    texts: dict[str, str]

    def __call__(self, key: str, **values: object) -> str:
        return self.texts[key].format(**values)

    def has(self, key: str) -> bool:
        return key in self.texts


@cache
def languages() -> dict[str, Language]:
    """All catalogues by code, the default first; raises ValueError for one that doesn't fit the default's keys and placeholders."""
    folder = files("unstilted.vote") / "catalogues"
    found = {}
    for file in sorted(folder.iterdir(), key=lambda file: (file.name != f"{DEFAULT}.toml", file.name)):
        if not file.name.endswith(".toml"):
            continue
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
        code = file.name.removesuffix(".toml")
        found[code] = Language(code, raw.pop("name"), raw.pop("direction"), raw)
    for language in found.values():
        _require_same(found[DEFAULT], language)
    return found


def best(wanted: Iterable[str]) -> Language:
    """The first of the wanted codes that has a catalogue, else the default."""
    known = languages()
    return next((known[code] for code in wanted if code in known), known[DEFAULT])


def accepted(header: str) -> list[str]:
    """Language codes of an Accept-Language header, best first, without regions."""
    weighed: list[tuple[float, int, str]] = []
    for part in header[:500].split(","):
        tag, _, weight = part.strip().partition(";q=")
        try:
            weighed.append((-float(weight or 1), len(weighed), tag.split("-")[0].lower()))
        except ValueError:
            continue
    return [code for _, _, code in sorted(weighed)]


def _require_same(one: Language, other: Language) -> None:
    if one.texts.keys() != other.texts.keys():
        raise ValueError(f"catalogue {other.code}: keys differ: {sorted(one.texts.keys() ^ other.texts.keys())}")
    for key, text in one.texts.items():
        if _placeholders(text) != _placeholders(other.texts[key]):
            raise ValueError(f"catalogue {other.code}: '{key}' has other placeholders")


def _placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name}
