"""The `report` stage: a self-contained page, a model card and a picture, made from the run folder's files alone."""

from typing import Any

from unstilted.files import write_text
from unstilted.recipe import Recipe
from unstilted.report.before_after import draw_before_after
from unstilted.report.card import render_card
from unstilted.report.contents import read_contents
from unstilted.report.page import render_page
from unstilted.rundir import RunDir


def run(recipe: Recipe, run_dir: RunDir) -> dict[str, Any]:
    """Write `report.html`, `README.md` (the model card) and `before_after.svg`. Returns facts for the manifest.

    Raises UserError when `measures.json`, `scores.jsonl` or `responses.jsonl` is missing or no record; anything else that is
    absent is said as 'not measured'. The same files give the same bytes.
    """
    contents = read_contents(recipe, run_dir)
    page = render_page(contents)
    write_text(run_dir.file("report.html"), page)
    write_text(run_dir.file("before_after.svg"), draw_before_after(contents))
    write_text(run_dir.file("README.md"), render_card(contents))
    return {"page_kb": round(len(page.encode()) / 1000)}
