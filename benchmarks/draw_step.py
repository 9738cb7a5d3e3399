"""Draws docs/step.svg: how two real starter pairs are laid out in one row, who sees whom, and what runs once.

python benchmarks/draw_step.py > docs/step.svg
"""

from collections.abc import Iterator
from html import escape

from unstilted.lm.chat import ChatTokens
from unstilted.lm.tree import Request, Tree
from unstilted.models.load import load_tokenizer
from unstilted.models.resolve import resolve_model
from unstilted.recipe import ModelTable
from unstilted.starter import starter_pairs

WIDTH, MASK = 940, 300
SHARED, PROMPT, CHOSEN, REJECTED, INK, PALE = "#8a8f98", "#4f6db8", "#2f8f6b", "#b5632f", "#22262e", "#eef0f3"


def main() -> None:
    chat = ChatTokens(load_tokenizer(resolve_model(ModelTable())), "embedded")
    pairs = [chat.pair(pair) for pair in starter_pairs()[:2]]
    tree = Tree(tuple(Request(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs))
    alone = sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
    print("\n".join(picture(tree, named(tree, [(pair.prompt, pair.chosen) for pair in pairs]), alone)))


def named(tree: Tree, chosen: list[tuple[list[int], list[int]]]) -> list[tuple[str, str]]:
    """Words and colour of each block."""
    names = []
    for block in tree.blocks:
        tokens = tree.tokens[slice(*block.span)]
        if not block.ancestors:
            names.append(("system prompt", SHARED))
        elif any(prompt[-len(tokens) :] == tokens for prompt, _ in chosen):
            names.append(("prompt", PROMPT))
        else:
            names.append(("chosen", CHOSEN) if any(answer[: len(tokens)] == tokens for _, answer in chosen) else ("rejected", REJECTED))
    return names


def picture(tree: Tree, names: list[tuple[str, str]], alone: int) -> Iterator[str]:
    n = len(tree.tokens)
    title = f"Two preference pairs in one row: {n} tokens instead of {alone}"
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 552" font-family="system-ui, sans-serif" role="img">'
    yield f"<title>{escape(title)}</title>"
    yield f'<rect width="{WIDTH}" height="552" fill="#ffffff"/>'
    yield text(20, 34, title, size=19, weight=600)
    yield text(
        20, 58, "Whatever conversations share at their beginning stands once; each token keeps the position it has in its own conversation."
    )
    yield from row(tree, names)
    yield text(20, 132, "Grey: the system prompt that both pairs share. Blue: their prompts. Green and brown: the answers.")
    yield from mask(tree, names)
    yield from stages(tree)
    yield "</svg>"


def row(tree: Tree, names: list[tuple[str, str]]) -> Iterator[str]:
    scale = (WIDTH - 40) / len(tree.tokens)
    for block, (name, colour) in zip(tree.blocks, names, strict=True):
        x, width = 20 + block.span.start * scale, block.span.size * scale
        yield f'<rect x="{x:.1f}" y="76" width="{width - 1.5:.1f}" height="38" rx="3" fill="{colour}"/>'
        if width > 70:
            yield text(x + width / 2, 100, f"{name} · {block.span.size}", size=13, colour="#ffffff", anchor="middle")
        elif width > 40:
            yield text(x + width / 2, 100, str(block.span.size), size=12, colour="#ffffff", anchor="middle")


def mask(tree: Tree, names: list[tuple[str, str]]) -> Iterator[str]:
    left, top, scale = 20, 190, MASK / len(tree.tokens)
    yield text(left, top - 14, "Who sees whom", size=15, weight=600)
    yield f'<rect x="{left}" y="{top}" width="{MASK}" height="{MASK}" fill="{PALE}"/>'
    for block, (_, colour) in zip(tree.blocks, names, strict=True):
        y, height = top + block.span.start * scale, block.span.size * scale
        for span in block.ancestors:
            x, width = left + span.start * scale, span.size * scale
            yield f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'
        yield triangle(left + block.span.start * scale, y, height, colour)
    n_seen = sum(
        block.span.size * sum(span.size for span in block.ancestors) + block.span.size * (block.span.size + 1) // 2 for block in tree.blocks
    )
    yield text(left, top + MASK + 24, "Row: a token. Column: what it sees.")
    yield text(left, top + MASK + 44, f"{n_seen / len(tree.tokens) ** 2:.0%} of the square; blank isn't computed.")


def triangle(x: float, y: float, size: float, colour: str) -> str:
    return f'<path d="M{x:.1f} {y:.1f} L{x:.1f} {y + size:.1f} L{x + size:.1f} {y + size:.1f} Z" fill="{colour}"/>'


def stages(tree: Tree) -> Iterator[str]:
    left = 380
    yield text(left, 176, "What runs", size=15, weight=600)
    boxes = [
        ("Layers below the first adapter", "once for base and tuned model; nothing kept, no backward"),
        ("Upper layers, adapter off", "only while a pair's reference is in no cache; nothing kept"),
        ("Upper layers, adapter on", "LoRA rides along in the base's matrix products; activations kept"),
        (
            "Head, 1,024 words of the vocabulary at a time",
            f"where the {len(tree.targets)} answer tokens are predicted: log p and its gradient",
        ),
        ("Loss and backward", "through the upper layers only, one product for base and LoRA"),
    ]
    for number, (name, what) in enumerate(boxes):
        y = 190 + 66 * number
        yield f'<rect x="{left}" y="{y}" width="{WIDTH - left - 20}" height="52" rx="5" fill="#ffffff" stroke="{PALE}" stroke-width="2"/>'
        yield text(left + 16, y + 22, name, size=15, weight=600)
        yield text(left + 16, y + 41, what)
        if number < len(boxes) - 1:
            yield f'<path d="M{left + 24} {y + 53} l0 11 m-4 -5 l4 5 l4 -5" fill="none" stroke="{INK}"/>'


def text(x: float, y: float, words: str, *, size: int = 13, weight: int = 400, colour: str = INK, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{colour}" text-anchor="{anchor}">{escape(words)}</text>'
    )


if __name__ == "__main__":
    main()
