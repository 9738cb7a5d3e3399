"""Trains the default recipe and variants of it in one run folder and prints what each does to the answers.

    python benchmarks/recipe_sweep.py --n-prompts 128 --out runs/sweep --json sweep.json [--only NAME ...]

Base and prompted base answer once; only the tuned model's answers are written again for each variant.
"""

import argparse
import json
from pathlib import Path

from unstilted.pipeline import run_pipeline
from unstilted.recipe import MeasureTable, Recipe, RespondTable, TrainTable
from unstilted.records import Measures

VARIANTS = {
    "default": TrainTable(),
    "default, strength 1": TrainTable(strength=1.0),
    "no anchor, strength 1": TrainTable(nll_weight=0.0, strength=1.0, stop_margin=99, stop_chosen_drop=999),
    "small anchor, strength 1": TrainTable(nll_weight=1.0, strength=1.0, stop_margin=99),
    "learning rate 2e-4, strength 1": TrainTable(learning_rate=2e-4, strength=1.0),
    "all layers": TrainTable(first_layer_share=0.0),
}
SHOWN = ("voice", "uptake", "words", "repetition", "cut_off", "ai_disclosure", "human_claim", "opening")


def sweep(names: list[str], n_prompts: int, out: Path) -> dict[str, dict[str, float]]:
    """Means of every measure, by variant and for base and prompted base."""
    rows: dict[str, dict[str, float]] = {}
    for name in names:
        recipe = Recipe(train=VARIANTS[name], respond=RespondTable(n_prompts=n_prompts), measure=MeasureTable(n_bootstrap=200))
        run_pipeline(recipe, out)
        measures = Measures.model_validate_json((out / "measures.json").read_text(encoding="utf-8"))
        for arm, row in (("base", "base"), ("prompted", "prompted base"), ("tuned", name)):
            rows[row] = {measure.name: measure.arms[arm].mean for measure in measures.measures if arm in measure.arms}
        (out / "responses.jsonl").rename(out / f"responses.{name}.jsonl")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-prompts", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    chosen = parser.parse_args()
    table = sweep(chosen.only, chosen.n_prompts, chosen.out)
    print(f"| {'':<32} | " + " | ".join(SHOWN) + " |\n|---|" + "---|" * len(SHOWN))
    for name, row in table.items():
        print(f"| {name:<32} | " + " | ".join(f"{row[measure]:.3f}" for measure in SHOWN) + " |")
    if chosen.json:
        chosen.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
