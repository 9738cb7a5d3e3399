"""How often intervals hold the true share when raters and items differ, and how often looking after every rater raises a false alarm.

    python benchmarks/coverage.py --n-runs 4000 --json coverage.json

All intervals are nominally 95 %. Votes are simulated with normal rater and item effects on the log-odds; the truth is the share over
all raters and items. `Wilson` and `raters only` stand beside the interval that `tally` gives.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from unstilted.plan import Design, PlanSettings, SimulatedVotes, simulated_votes
from unstilted.stats.clusters import clustered_share
from unstilted.stats.intervals import wilson
from unstilted.stats.sequential import anytime_interval


@dataclass(frozen=True)
class Case:
    """A design, and how much raters and items differ in it."""

    name: str
    n_raters: int
    n_items: int
    votes_per_rater: int
    share: float
    rater_sd: float
    item_sd: float
    leavers: float = 0.0
    """Share of raters who leave after three votes."""

    def settings(self, seed: int) -> PlanSettings:
        return PlanSettings(share=self.share, rater_sd=self.rater_sd, item_sd=self.item_sd, ties=0.0, seed=seed)

    def votes(self, run: int, seed: int = 0) -> SimulatedVotes:
        design = Design(n_raters=self.n_raters, n_items=self.n_items, votes_per_rater=self.votes_per_rater)
        votes = simulated_votes(design, self.settings(seed), run)
        stays = np.random.default_rng((seed, run, 1)).random(self.n_raters) >= self.leavers
        kept = stays[votes.rater] | (np.arange(len(votes.rater)) % self.votes_per_rater < 3)
        return SimulatedVotes(votes.gains[kept], votes.rater[kept], votes.item[kept])


CASES = (
    Case("forty raters, fifty items", 40, 50, 20, 0.73, 0.8, 0.6),
    Case("the same, raters and items alike", 40, 50, 20, 0.73, 0.0, 0.0),
    Case("the same, small differences", 40, 50, 20, 0.73, 0.3, 0.2),
    Case("the same, nearly all agree", 40, 50, 20, 0.95, 1.0, 0.5),
    Case("the same, half leave early", 40, 50, 20, 0.73, 0.8, 0.6, leavers=0.5),
    Case("a dozen raters", 12, 60, 30, 0.7, 0.8, 0.5),
    Case("five raters", 5, 40, 40, 0.7, 0.8, 0.5),
    Case("few items", 60, 10, 10, 0.7, 0.8, 0.5),
    Case("a crowd, few votes each", 200, 100, 5, 0.7, 1.0, 0.5),
    Case("raters who differ much", 30, 40, 10, 0.65, 1.5, 0.5),
    Case("only items differ", 30, 200, 20, 0.7, 0.0, 0.8),
)


def coverage(case: Case, n_runs: int) -> dict[str, float]:
    """Share of runs whose interval holds the truth, by interval, and the mean width of ours and Wilson's."""
    held = dict.fromkeys(("two-way", "raters only", "Wilson"), 0)
    widths = {"width": 0.0, "Wilson width": 0.0}
    for run in range(n_runs):
        votes = case.votes(run)
        each_alone = np.arange(len(votes.gains))
        intervals = {
            "two-way": clustered_share(votes.gains, votes.rater, votes.item, 0.95),
            "raters only": clustered_share(votes.gains, votes.rater, each_alone, 0.95),
        }
        for name, share in intervals.items():
            assert share is not None
            assert share.low is not None
            assert share.high is not None
            held[name] += share.low <= case.share <= share.high
            widths["width"] += (share.high - share.low) * (name == "two-way") / n_runs
        naive = wilson(int(votes.gains.sum()), len(votes.gains), 0.95)
        held["Wilson"] += naive.low <= case.share <= naive.high
        widths["Wilson width"] += (naive.high - naive.low) / n_runs
    return {**{name: count / n_runs for name, count in held.items()}, **widths}


def false_alarms(rater_sd: float, n_raters: int, votes_per_rater: int, n_runs: int) -> dict[str, float]:
    """Share of runs at a true half in which one half is ever ruled out, looking after every rater from the fifth on."""
    case = Case("", n_raters, 400, votes_per_rater, 0.5, rater_sd, 0.0)
    ours = wilsons = 0
    for run in range(n_runs):
        gains = case.votes(run).gains.reshape(n_raters, votes_per_rater)
        result = anytime_interval(gains.mean(axis=1), 0.95)
        ours += result is not None and result.decided_after is not None
        looks = [(int(gains[:k].sum()), k * votes_per_rater) for k in range(5, n_raters + 1)]
        wilsons += any(not naive.low <= 0.5 <= naive.high for hits, n in looks for naive in [wilson(hits, n, 0.95)])
    return {"e-process": ours / n_runs, "Wilson at every look": wilsons / n_runs}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-runs", type=int, default=4000)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    results: dict[str, object] = {}
    print("| design | raters x items x votes each | share | sd raters / items | two-way | raters only | Wilson | width / Wilson's |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        row = coverage(case, chosen.n_runs)
        results[case.name] = {**asdict(case), **row}
        size = f"{case.n_raters} x {case.n_items} x {case.votes_per_rater}"
        figures = " | ".join(f"{100 * row[name]:.1f} %" for name in ("two-way", "raters only", "Wilson"))
        widths = f"{100 * row['width']:.1f} / {100 * row['Wilson width']:.1f}"
        print(f"| {case.name} | {size} | {case.share} | {case.rater_sd} / {case.item_sd} | {figures} | {widths} |", flush=True)
    print("\n| looking after every rater at a true half | e-process | Wilson at every look |\n|---|---|---|")
    for rater_sd in (0.0, 0.8, 1.5):
        alarms = false_alarms(rater_sd, 100, 10, max(chosen.n_runs // 4, 1))
        results[f"false alarms, rater sd {rater_sd}"] = alarms
        print(f"| raters differ by {rater_sd} | " + " | ".join(f"{100 * value:.1f} %" for value in alarms.values()) + " |", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
