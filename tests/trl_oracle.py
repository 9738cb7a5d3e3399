"""TRL as a second opinion: its own trainers, collators and loss methods on given token ids, with the gradient of every LoRA parameter.

Nothing is trained: each trainer is asked for the loss of one pair after another, and the gradients add up as its gradient accumulation
adds them. Pairs go one a batch, because TRL reduces two of its losses over the batch's tokens or ranks instead of over its pairs.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # CPO and ORPO live in trl.experimental, which warns when imported

import torch
from datasets import Dataset
from huggingface_hub import constants
from peft import LoraConfig
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from unstilted.lm.chat import TokenPair

constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL's trainers report themselves to the hub; the environment is only read at import

SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class TokenLogps:
    """Log-probability in nats of each token of a pair's two responses, shapes (T_chosen,) and (T_rejected,)."""

    chosen: Tensor
    rejected: Tensor


@dataclass(frozen=True)
class Opinion:
    """What TRL says about some pairs."""

    losses: Tensor
    """Of each pair, in nats, shape (B,)."""
    gradients: dict[str, Tensor]
    """Of the mean loss, by the parameter's name in the PEFT model."""
    policy: list[TokenLogps]
    reference: list[TokenLogps]


class TrlOracle:
    """TRL's DPO, CPO (for SimPO) and ORPO trainers around one adapted model.

    model: a float32 causal model without adapter; it is adapted in place. folder: where the trainers may write; they don't.
    Raises AssertionError when TRL's tokens would be others than the pairs'.
    """

    def __init__(self, model: Any, tokenizer: Any, pairs: Sequence[TokenPair], lora: LoraConfig, folder: Path) -> None:
        settings = {**SETTINGS, "output_dir": str(folder)}
        # CPO and ORPO have no "never cut": None becomes 512.
        short = {**settings, "max_length": max(pair.n_tokens for pair in pairs)}
        whole = [whole_text(pair) for pair in pairs]
        rows, whole_rows = (Dataset.from_list([text_row(pair, tokenizer) for pair in some]) for some in (pairs, whole))
        self.dpo_trainer = DPOTrainer(
            model, args=DPOConfig(**settings, max_length=None), train_dataset=rows, processing_class=tokenizer, peft_config=lora
        )
        self.model = self.dpo_trainer.model
        self.cpo_trainer = CPOTrainer(
            self.model, args=CPOConfig(**short, loss_type="simpo", cpo_alpha=0.0), train_dataset=rows, processing_class=tokenizer
        )
        self.orpo_trainer = ORPOTrainer(self.model, args=ORPOConfig(**short), train_dataset=whole_rows, processing_class=tokenizer)
        _check_dpo_tokens(self.dpo_trainer.train_dataset, pairs)
        _check_labels(self.cpo_trainer.train_dataset, pairs)
        _check_labels(self.orpo_trainer.train_dataset, whole)

    def dpo(self, which: Iterable[int], weights: dict[str, float], *, beta: float = 0.1, label_smoothing: float = 0.0) -> Opinion:
        """TRL's DPO losses by name, each times its weight, on the pairs with these indices; `beta` is tau for "ipo"."""
        trainer = self.dpo_trainer
        trainer.loss_types, trainer.loss_weights = list(weights), list(weights.values())
        trainer.beta, trainer.label_smoothing = beta, label_smoothing
        return self._opinion(trainer, which)

    def simpo(self, which: Iterable[int], *, beta: float, gamma: float) -> Opinion:
        """SimPO with target margin `gamma`; no reference, and no log-probabilities by token."""
        self.cpo_trainer.beta, self.cpo_trainer.simpo_gamma = beta, gamma
        return self._opinion(self.cpo_trainer, which)

    def orpo(self, which: Iterable[int], *, weight: float) -> Opinion:
        """ORPO on the `whole_text` of each pair, the odds-ratio term times `weight`."""
        self.orpo_trainer.beta = weight
        return self._opinion(self.orpo_trainer, which)

    def _opinion(self, trainer: Any, which: Iterable[int]) -> Opinion:
        indices, losses = list(which), []
        policy: list[TokenLogps] = []
        reference: list[TokenLogps] = []
        self.model.train()
        self.model.zero_grad()
        for index in indices:
            batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[index]]))
            scored: list[Tensor] = []
            hook = self.model.register_forward_hook(lambda _module, _args, output, kept=scored: kept.append(output.get("log_probs")))
            loss = trainer.compute_loss(self.model, batch)
            hook.remove()
            (loss / len(indices)).backward()
            losses.append(loss.detach())
            if trainer is self.dpo_trainer:  # its first forward is the policy's, its second the reference's
                for logps, into in zip(scored, (policy, reference), strict=True):
                    into.append(_by_response(logps.detach(), batch["completion_mask"]))
        return Opinion(torch.stack(losses), {name: value.grad.clone() for name, value in adapter(self.model).items()}, policy, reference)


def adapter(model: Any) -> dict[str, Tensor]:
    """The adapter's parameters by name, in a PEFT model."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole_text(pair: TokenPair) -> TokenPair:
    """The pair with all but the first token of its prompt moved into both responses.

    TRL's ORPO takes the NLL of the prompt's tokens, too, and the odds ratio of the response's. Where the prompt is one token, which
    nothing predicts, both are over the same tokens, as in the paper.
    """
    return TokenPair(pair.id, pair.prompt[:1], pair.prompt[1:] + pair.chosen, pair.prompt[1:] + pair.rejected)


def text_row(pair: TokenPair, tokenizer: Any) -> dict[str, str]:
    """A pair as the plain text that TRL tokenizes into the same ids.

    Its own way with messages would train one token more, the line feed that this template writes after the end of a turn.
    """
    return {side: tokenizer.decode(getattr(pair, side)) for side in ("prompt", "chosen", "rejected")}


def _by_response(logps: Tensor, completion_mask: Tensor) -> TokenLogps:
    chosen, rejected = (row[mask.bool()] for row, mask in zip(logps, completion_mask[:, 1:], strict=True))
    return TokenLogps(chosen, rejected)


def _check_dpo_tokens(rows: Dataset, pairs: Sequence[TokenPair]) -> None:
    for row, pair in zip(rows, pairs, strict=True):
        assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == (pair.prompt, pair.chosen, pair.rejected), pair.id


def _check_labels(rows: Dataset, pairs: Sequence[TokenPair]) -> None:
    for row, pair in zip(rows, pairs, strict=True):
        for side in ("chosen", "rejected"):
            response = getattr(pair, side)
            assert row[f"{side}_input_ids"] == pair.prompt + response, pair.id
            assert row[f"{side}_labels"] == [-100] * len(pair.prompt) + response, pair.id
