"""unstilted's preference step against TRL 1.16's on the same pairs, weights and maths, side by side in one run.

    python benchmarks/train_vs_trl.py [--pairs 8] [--rounds 3] [--tokens-per-forward 448] [--json FILE]

One core (OMP_NUM_THREADS=1 unless set otherwise), float32, sigmoid DPO, LoRA r 8 alpha 16 on all linear layers of the embedded model,
8 pairs a step. Every round runs TRL tuned, unstilted, and TRL default, each in a process of its own, so that drift of a shared machine
hits all; times are medians over rounds, ratios are medians of the ratios within a round. Cold computes the reference log-probabilities
of all pairs, warm finds them known. What is counted as an operation and as the peak: see our_side.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from our_side import BATCH_SIZE
from unstilted.recipe import TrainTable
from unstilted.rundir import machine


def run(script: str, *words: object) -> dict[str, Any]:
    """What a side writes, from a process of its own, so that memory and warm caches are its own too."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "side.json"
        command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, words), "--json", str(file)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONWARNINGS": "ignore"})
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return result


def compare(n_pairs: int, n_rounds: int, tokens_per_forward: int) -> dict[str, Any]:
    n_steps = -(-n_pairs // BATCH_SIZE)
    rounds = []
    for number in range(n_rounds):
        print(f"round {number + 1} of {n_rounds}", file=sys.stderr)
        tuned = run("trl_side.py", "--config", "tuned", "--pairs", n_pairs, "--steps", n_steps)
        ours = run("our_side.py", "--pairs", n_pairs, "--tokens-per-forward", tokens_per_forward)
        default = run("trl_side.py", "--config", "default", "--pairs", n_pairs, "--steps", n_steps)
        rounds.append({"tuned": tuned, "ours": ours, "default": default})
    per_pair = {
        "unstilted, cold": [one["ours"]["cold_seconds"] / n_pairs for one in rounds],
        "unstilted, warm": [one["ours"]["warm_seconds"] / n_pairs for one in rounds],
        "TRL tuned": [one["tuned"]["seconds_per_pair"] for one in rounds],
        "TRL default": [one["default"]["seconds_per_pair"] for one in rounds],
    }

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(one / other for one, other in zip(per_pair[slow], per_pair[fast], strict=True))

    ours = [one["ours"] for one in rounds]
    return {
        "ratio_vs_trl_default": ratio("TRL default", "unstilted, cold"),
        "ratio_vs_trl_tuned": ratio("TRL tuned", "unstilted, cold"),
        "ratio_warm_vs_trl_tuned": ratio("TRL tuned", "unstilted, warm"),
        "share_of_gemm_peak": statistics.median(one["cold_gflop"] / one["cold_seconds"] / one["gemm_peak_gflops"] for one in ours),
        "share_of_gemm_peak_warm": statistics.median(one["warm_gflop"] / one["warm_seconds"] / one["gemm_peak_gflops"] for one in ours),
        "peak_memory_gb": max(one["peak_memory_gb"] for one in ours),
        "max_abs_token_logp_diff": difference(ours[0], rounds[0]["tuned"]),
        "n_pairs": n_pairs,
        "n_rounds": n_rounds,
        "seconds_per_pair": {name: statistics.median(times) for name, times in per_pair.items()},
        "memory_gb": {
            "unstilted, cold": max(one["peak_memory_gb"] for one in ours),
            "TRL tuned": max(one["tuned"]["peak_memory_gb"] for one in rounds),
            "TRL default": max(one["default"]["peak_memory_gb"] for one in rounds),
        },
        "tokens": {
            "unstilted, cold": ours[0]["n_tokens"],
            "TRL tuned": rounds[0]["tuned"]["n_tokens_padded"],
            "TRL default": rounds[0]["default"]["n_tokens_padded"],
        },
        "gflop": {"unstilted, cold": ours[0]["cold_gflop"], "unstilted, warm": ours[0]["warm_gflop"]},
        "gemm_peak_gflops": statistics.median(one["gemm_peak_gflops"] for one in ours),
        "tokens_per_forward": tokens_per_forward,
        "n_threads": ours[0]["n_threads"],
        "versions": rounds[0]["tuned"]["versions"],
        "machine": machine(),
    }


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Largest |difference| of a token's reference log-probability, in nats."""
    return max(
        abs(one - other)
        for pair, sides in theirs["reference_token_logps"].items()
        for side, logps in sides.items()
        for one, other in zip(ours["reference_token_logps"][pair][side], logps, strict=True)
    )


def table(result: dict[str, Any]) -> Table:
    view = Table(title=f"{result['n_pairs']} starter pairs, {result['n_threads']} thread(s), median of {result['n_rounds']} rounds")
    for name in ("", "s / pair", "pairs / s", "tokens", "GFLOP", "of GEMM peak", "memory, GB"):
        view.add_column(name, justify="left" if not name else "right")
    shares = {"unstilted, cold": result["share_of_gemm_peak"], "unstilted, warm": result["share_of_gemm_peak_warm"]}
    for name, seconds in result["seconds_per_pair"].items():
        view.add_row(
            name,
            f"{seconds:.2f}",
            f"{1 / seconds:.2f}",
            str(result["tokens"].get(name, "")),
            f"{result['gflop'][name]:.0f}" if name in result["gflop"] else "",
            f"{shares[name]:.0%}" if name in shares else "",
            f"{result['memory_gb'][name]:.2f}" if name in result["memory_gb"] else "",
        )
    return view


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=BATCH_SIZE)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens-per-forward", type=int, default=TrainTable().tokens_per_forward)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    result = compare(chosen.pairs, chosen.rounds, chosen.tokens_per_forward)
    Console(width=100).print(table(result))
    for key in ("ratio_vs_trl_default", "ratio_vs_trl_tuned", "ratio_warm_vs_trl_tuned", "gemm_peak_gflops", "max_abs_token_logp_diff"):
        print(f"{key:<26} {result[key]:.4g}")
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
