"""Which pairs each optimizer step sees, and how far it goes."""

import math

import torch

from unstilted.recipe import TrainTable


def batches(n_pairs: int, batch_size: int, n_epochs: int, seed: int) -> list[list[int]]:
    """Indices of the pairs of each optimizer step; every epoch is a new permutation, and a last short batch is kept."""
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(n_pairs, generator=generator).tolist() for _ in range(n_epochs)]
    return [epoch[start : start + batch_size] for epoch in order for start in range(0, n_pairs, batch_size)]


def learning_rate(step: int, n_steps: int, settings: TrainTable) -> float:
    """Linear warm-up, then a cosine that would reach 0 one step after the last; `step` counts from 0."""
    if step < settings.n_warmup_steps:
        return settings.learning_rate * (step + 1) / settings.n_warmup_steps
    done = (step - settings.n_warmup_steps) / max(1, n_steps - settings.n_warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
