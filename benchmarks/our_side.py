"""Trains with unstilted on starter pairs and says how long a pair takes and how much memory it needs: one side of train_vs_trl.py.

    python benchmarks/our_side.py [--pairs 8] [--tokens-per-forward 448] [--json FILE]

One core (OMP_NUM_THREADS=1 unless set otherwise), float32, sigmoid DPO, LoRA r 8 alpha 16 on all linear layers, learning rate 1e-4,
8 pairs a step, the embedded model; two other pairs for warming up.

Operations counted are those that the mathematics needs for the rows as they are laid out: multiply-adds of the linear layers, LoRA,
attention (only what a token sees) and head, forward for policy and reference, backward to activations and to LoRA's matrices; each
multiply-add is two. The GEMM peak is what products of 1024 x 1024 float32 matrices reach in this process, before and after.
"""

import argparse
import json
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from unstilted.lm.chat import ChatTokens, TokenPair
from unstilted.lm.score import packs
from unstilted.lm.tree import Request, Tree
from unstilted.models.load import load_tokenizer
from unstilted.models.resolve import resolve_model
from unstilted.recipe import ModelTable, TrainTable
from unstilted.starter import starter_pairs
from unstilted.train.trainer import WATCHING, Trainer

BATCH_SIZE = 8
LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
N_WARM_UP = 2


@dataclass(frozen=True)
class Work:
    """Operations (multiply-adds times two) that a batch needs, in GFLOP."""

    policy: float
    reference: float


def measure(n_pairs: int, tokens_per_forward: int) -> dict[str, Any]:
    """One cold and one warm pass over the first `n_pairs` starter pairs in steps of 8, after two other pairs for warming up."""
    files = resolve_model(ModelTable())
    pairs = benchmark_pairs(load_tokenizer(files), n_pairs + N_WARM_UP)
    settings = TrainTable(
        rank=LORA["r"],
        alpha=LORA["lora_alpha"],
        first_layer_share=0.0,
        learning_rate=1e-4,
        nll_weight=0.0,
        batch_size=BATCH_SIZE,
        tokens_per_forward=tokens_per_forward,
    )
    trainer = Trainer(settings, 0, files)
    peak = gemm_peak()
    with trainer.working():
        step(trainer, pairs[n_pairs:])
        step(trainer, pairs[n_pairs:])
        cold, warm = (epoch(trainer, pairs[:n_pairs]) for _ in range(2))
    peak = max(peak, gemm_peak())
    work = [needed(trainer, pairs[start : start + BATCH_SIZE]) for start in range(0, n_pairs, BATCH_SIZE)]
    policy, reference = sum(each.policy for each in work), sum(each.reference for each in work)
    return {
        "cold_seconds": cold,
        "warm_seconds": warm,
        "n_pairs": n_pairs,
        "n_threads": torch.get_num_threads(),
        "n_tokens": sum(len(tree.tokens) for tree in trees(pairs[:n_pairs], tokens_per_forward)),
        "cold_gflop": policy + reference,
        "warm_gflop": policy,
        "gemm_peak_gflops": peak,
        "peak_memory_gb": peak_memory_gb(),
        "reference_token_logps": {
            pair.id: dict(zip(("chosen", "rejected"), (side.tolist() for side in trainer.references[pair]), strict=True))
            for pair in pairs[:n_pairs]
        },
    }


def epoch(trainer: Trainer, pairs: list[TokenPair]) -> float:
    """Seconds of all optimizer steps over the pairs."""
    start = perf_counter()
    for first in range(0, len(pairs), BATCH_SIZE):
        step(trainer, pairs[first : first + BATCH_SIZE])
    return perf_counter() - start


def step(trainer: Trainer, batch: list[TokenPair]) -> None:
    trainer.learn(batch)
    torch.nn.utils.clip_grad_norm_(trainer.parameters, trainer.settings.max_gradient_norm)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def gemm_peak(seconds: float = 1.0) -> float:
    """GFLOP/s of float32 products of 1024 x 1024 matrices, sustained."""
    left, out = torch.randn(1024, 1024), torch.empty(1024, 1024)
    start, n = perf_counter(), 0
    while perf_counter() - start < seconds:
        torch.mm(left, left, out=out)
        n += 1
    return 2 * 1024**3 * n / (perf_counter() - start) / 1e9


def trees(pairs: list[TokenPair], tokens_per_forward: int) -> list[Tree]:
    requests = [Request(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs]
    return [Tree(tuple(requests[index] for index in pack)) for pack in packs(requests, tokens_per_forward)]


def needed(trainer: Trainer, batch: list[TokenPair]) -> Work:
    config, settings = trainer.scorer.model.config, trainer.settings
    weights = [p for name, p in trainer.scorer.model.named_parameters() if name.endswith("base_layer.weight")]
    dense = sum(weight.numel() for weight in weights)
    lora = sum(settings.rank * sum(weight.shape) for weight in weights)
    head = config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.hidden_size

    def forward(tree: Tree) -> float:
        return len(tree.tokens) * dense + 2 * attention * n_seen(tree) + len(tree.targets) * head

    rows, watched = (trees(batch, times * settings.tokens_per_forward) for times in (1, WATCHING))
    policy = sum(forward(tree) + len(tree.tokens) * lora for tree in rows)
    # to activations: as much as forward, attention twice; to LoRA's matrices: as much again
    policy += sum(forward(tree) + 2 * attention * n_seen(tree) + 2 * len(tree.tokens) * lora for tree in rows)
    return Work(2e-9 * policy, 2e-9 * sum(forward(tree) for tree in watched))


def n_seen(tree: Tree) -> int:
    """Pairs of places (query, key) that attention needs."""
    return sum(
        block.span.size * sum(span.size for span in block.ancestors) + block.span.size * (block.span.size + 1) // 2 for block in tree.blocks
    )


def benchmark_pairs(tokenizer: Any, n_pairs: int) -> list[TokenPair]:
    """The first starter pairs as token ids; both sides of the benchmark take them from here."""
    chat = ChatTokens(tokenizer, "embedded")
    return [chat.pair(pair) for pair in starter_pairs()[:n_pairs]]


def peak_memory_gb() -> float:
    """The largest resident size of this program, in 10^9 bytes.

    Linux hands ru_maxrss down from the process that started this one, so a large parent would be counted; VmHWM starts anew.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        kib = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kib) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=BATCH_SIZE, help="starter pairs to train on")
    parser.add_argument("--tokens-per-forward", type=int, default=TrainTable().tokens_per_forward)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    result = measure(chosen.pairs, chosen.tokens_per_forward)
    print(json.dumps({key: value for key, value in result.items() if key != "reference_token_logps"}, indent=1))
    if chosen.json:
        chosen.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
