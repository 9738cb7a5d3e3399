"""Widths and line breaks of text in SVG, which wraps nothing by itself.

Widths are those of DejaVu Sans, among the widest of the fonts that a system font stack ends in, so that text set narrower still fits.
"""

import unicodedata

_NARROW = frozenset(" iljtfrI.,:;'|!()[]/\\`\u2018\u2019")
_WIDE = frozenset("mwMW@%—…")


def text_width(text: str, size: float) -> float:
    """Width of a line in the units of `size`, on the safe side."""
    return size * sum(_em(char) for char in text)


def wrap(text: str, width: float, size: float) -> list[str]:
    """Lines no wider than `width`; breaks at spaces, inside a word only when it is wider than a line, and at line ends of the text."""
    return [line for paragraph in text.splitlines() for line in _wrap_paragraph(paragraph, width, size)]


def clip(lines: list[str], n_lines: int) -> list[str]:
    """At most `n_lines` lines; a cut is shown by an ellipsis."""
    if len(lines) <= n_lines:
        return lines
    last = lines[n_lines - 1]
    return [*lines[: n_lines - 1], last[: max(1, len(last) - 2)].rstrip() + " …"]


def printable(text: str) -> str:
    """Text without the characters that XML 1.0 and YAML refuse; tabs become spaces, line ends stay."""
    return "".join(char for char in text.replace("\t", " ") if char == "\n" or not _is_refused(char))


def one_line(text: str) -> str:
    """Printable text with every run of white space, line ends too, made one space."""
    return printable(" ".join(text.split()))


def _is_refused(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs") or char in "\ufffe\uffff"


def _wrap_paragraph(paragraph: str, width: float, size: float) -> list[str]:
    lines: list[str] = []
    line = ""
    for word in (piece for raw in paragraph.split() for piece in _pieces(raw, width, size)):
        longer = f"{line} {word}" if line else word
        if line and text_width(longer, size) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line] if line else lines


def _pieces(word: str, width: float, size: float) -> list[str]:
    """A word cut so that each piece fits on a line; always at least one character a piece."""
    pieces = [""]
    for char in word:
        if pieces[-1] and text_width(pieces[-1] + char, size) > width:
            pieces.append("")
        pieces[-1] += char
    return pieces


def _em(char: str) -> float:
    if unicodedata.combining(char) or char == "\N{ZERO WIDTH JOINER}":
        return 0.0
    if char in _NARROW:
        return 0.4
    if char in _WIDE or unicodedata.east_asian_width(char) in "WF" or ord(char) > 0x1F000:
        return 1.05
    return 0.75 if char.isupper() else 0.64
