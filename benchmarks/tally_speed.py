"""How long a tally of a million votes takes, and Bradley-Terry on 135,000 battles beside arena-rank 0.1.1.

    python benchmarks/tally_speed.py --json tally_speed.json

Run with OMP_NUM_THREADS=1. arena-rank needs its own environment (it pins numpy and jax): install `arena-rank==0.1.1` and this package
there; without it only our times are shown. Both fits start from the same lists of names; times are the best of `--n-repeats`.
`with_errors`: ours clustered by rater, arena-rank's for independent votes, which are all it has.
"""

import argparse
import csv
import json
import resource
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from unstilted.stats.bradley_terry import battles_of, clustered_covariance, fit_bradley_terry
from unstilted.tally import tally_file

Table = dict[str, list[str]]
Strengths = dict[str, float]
Fit = Callable[[Table], Strengths]
SIDES = {"model_a": "left", "model_b": "right", "tie": "tie"}


HEADER = ("rater", "item", "left", "right", "winner", "order", "criterion", "domain", "left_words", "right_words")


def write_votes(path: Path, n_votes: int) -> None:
    """Votes of 5,000 raters on 2,000 items with a domain and lengths."""
    generator = np.random.default_rng(0)
    rater, item = generator.integers(0, 5000, n_votes), generator.integers(0, 2000, n_votes)
    is_left, chance, words = generator.random(n_votes) < 0.5, generator.random(n_votes), generator.integers(5, 300, (n_votes, 2))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for n in range(n_votes):
            sides = ("tuned", "base") if is_left[n] else ("base", "tuned")
            winner = "tie" if chance[n] < 0.1 else sides.index("tuned" if chance[n] < 0.8 else "base")
            name = winner if isinstance(winner, str) else ("left", "right")[winner]
            row = [f"rater{rater[n]}", f"item{item[n]}", *sides, name, n // 5000 + 1, "thoughtful", f"domain{item[n] % 8}", *words[n]]
            writer.writerow(row)


def tally_million(n_votes: int) -> dict[str, float]:
    """Seconds from the CSV file to `tally.json`, and the peak of memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "votes.csv"
        write_votes(path, n_votes)
        start = time.perf_counter()
        result = tally_file(path, Path(folder) / "tally.json")
        seconds = time.perf_counter() - start
    assert result.panels[0].n_votes == n_votes
    return {"seconds": seconds, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def battles_table(n_battles: int, n_models: int = 100, n_raters: int = 20_000) -> Table:
    """Battles of models whose strengths are normal, one in five a tie."""
    generator = np.random.default_rng(1)
    strengths = generator.standard_normal(n_models)
    left = generator.integers(0, n_models, n_battles)
    right = (left + generator.integers(1, n_models, n_battles)) % n_models
    chance = generator.random(n_battles)
    is_left = chance < 1 / (1 + np.exp(strengths[right] - strengths[left]))
    winner = np.where(generator.random(n_battles) < 0.2, "tie", np.where(is_left, "model_a", "model_b"))
    names = np.array([f"model-{k:03}" for k in range(n_models)])
    raters = np.array([f"rater-{k}" for k in range(n_raters)])[generator.integers(0, n_raters, n_battles)]
    return {"model_a": names[left].tolist(), "model_b": names[right].tolist(), "winner": winner.tolist(), "rater": raters.tolist()}


def ours(table: Table) -> Strengths:
    winner = [SIDES[name] for name in table["winner"]]
    battles = battles_of(table["model_a"], table["model_b"], winner)
    fit = fit_bradley_terry(battles.counts(), battles.names)
    return dict(zip(battles.names, fit.strengths.tolist(), strict=True))


def ours_with_errors(table: Table) -> Strengths:
    """The same with a covariance clustered by rater, which arena-rank does not have."""
    winner = [SIDES[name] for name in table["winner"]]
    battles = battles_of(table["model_a"], table["model_b"], winner)
    fit = fit_bradley_terry(battles.counts(), battles.names)
    codes: dict[str, int] = {}
    rater = np.array([codes.setdefault(name, len(codes)) for name in table["rater"]])
    errors = clustered_covariance(fit, battles, rater).errors(np.eye(len(battles.names)))
    assert np.isfinite(errors).all()
    return dict(zip(battles.names, fit.strengths.tolist(), strict=True))


def arena_rank(table: Table, errors: bool = False) -> Strengths:
    """Fitted with the ridge off; its robust errors need a tiny one, without which their matrix is singular."""
    import pandas as pd
    from arena_rank.models.bradley_terry import BradleyTerry
    from arena_rank.utils.data_utils import PairDataset

    dataset = PairDataset.from_pandas(pd.DataFrame({name: table[name] for name in ("model_a", "model_b", "winner")}))
    model = BradleyTerry(len(dataset.competitors), hessian_reg=1e-9 if errors else 0.0, ftol=1e-14, gtol=1e-10)
    model.fit(dataset)
    if errors:
        model.compute_ratings_and_cis(dataset)["rating_upper"].block_until_ready()
    strengths = np.asarray(model.params["ratings"], dtype=np.float64)
    return dict(zip(dataset.competitors, (strengths - strengths.mean()).tolist(), strict=True))


def arena_rank_with_errors(table: Table) -> Strengths:
    return arena_rank(table, errors=True)


def seconds_of(fit: Fit, table: Table, n_repeats: int) -> tuple[float, Strengths]:
    """The fastest of some runs, so that imports and a cold start count for nobody."""
    fastest, strengths = np.inf, {}
    for _ in range(n_repeats):
        start = time.perf_counter()
        strengths = fit(table)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest, strengths


def compare(n_battles: int, n_repeats: int) -> dict[str, float]:
    """Seconds of both, their ratios and the largest difference of strengths in logits."""
    table = battles_table(n_battles)
    row = {}
    pairs: dict[str, tuple[Fit, Fit]] = {"": (ours, arena_rank), "_with_errors": (ours_with_errors, arena_rank_with_errors)}
    for name, (our_fit, their_fit) in pairs.items():
        row[f"ours{name}"], strengths = seconds_of(our_fit, table, n_repeats)
        if find_spec("arena_rank") is None:
            continue
        row[f"arena_rank{name}"], theirs = seconds_of(their_fit, table, n_repeats)
        row[f"ratio{name}"] = row[f"arena_rank{name}"] / row[f"ours{name}"]
        row[f"largest_difference{name}"] = max(abs(strengths[arm] - theirs[arm]) for arm in strengths)
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-votes", type=int, default=1_000_000)
    parser.add_argument("--n-battles", type=int, default=135_000)
    parser.add_argument("--n-repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    results = {"tally": tally_million(chosen.n_votes), "bradley_terry": compare(chosen.n_battles, chosen.n_repeats)}
    for name, row in results.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()))
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
