"""Trains with TRL on starter pairs and says how long a pair takes and how much memory it needs: the other side of train_vs_trl.py.

    python benchmarks/trl_side.py --config default|tuned [--pairs 16] [--steps 2] [--json FILE]

One core (OMP_NUM_THREADS=1 unless set otherwise), float32, LoRA r 8 alpha 16 on all linear layers, learning rate 1e-4, 8 pairs a step,
the embedded model. Both configurations see the same token ids; only the steps are timed, after one pair of warming up.
"""

import argparse
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # these three are read when torch and huggingface_hub are imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer

from our_side import BATCH_SIZE, LORA, benchmark_pairs, peak_memory_gb
from unstilted.lm.chat import TokenPair
from unstilted.models.load import load_model, load_tokenizer
from unstilted.models.resolve import resolve_model
from unstilted.recipe import ModelTable

CONFIGS: dict[str, dict[str, Any]] = {
    # TRL's own: 8 pairs a forward, padded to the longest, with gradient checkpointing.
    "default": {},
    # The fastest that its settings allow on a CPU: no padding but between the two answers of a pair, nothing computed twice.
    "tuned": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH_SIZE, "activation_checkpointing": False},
}
COMMON: dict[str, Any] = {
    "use_cpu": True,  # without it, TRL's default bf16 is refused where there is no GPU ...
    "bf16": False,  # ... and with it, bf16 would be another maths, and far slower on most CPUs
    "max_length": None,  # the default cuts at 1024 tokens, silently
    "learning_rate": 1e-4,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}
PACKAGES = ("trl", "torch", "transformers", "peft", "accelerate")


def measure(config: str, n_pairs: int, n_steps: int) -> dict[str, Any]:
    """Train `n_steps` optimizer steps of 8 pairs on the first `n_pairs` starter pairs; seconds are those of the steps."""
    disable_progress_bars()
    files = resolve_model(ModelTable())
    tokenizer = load_tokenizer(files)
    pairs = benchmark_pairs(tokenizer, n_pairs)
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            load_model(files),
            args=DPOConfig(output_dir=folder, max_steps=n_steps, **COMMON, **CONFIGS[config]),
            train_dataset=Dataset.from_list([text_row(pair, tokenizer) for pair in pairs]),
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA),
            callbacks=[watch],
        )
        for row, pair in zip(trainer.train_dataset, pairs, strict=True):
            assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == (pair.prompt, pair.chosen, pair.rejected), pair.id
        trainer.remove_callback(PrinterCallback)
        warm_up(trainer)
        trainer.model.register_forward_hook(watch.see, with_kwargs=True)
        trainer.train()
    return {
        "config": config,
        "seconds": watch.seconds,
        "cpu_seconds": watch.cpu_seconds,
        "n_pairs": watch.n_pairs,
        "seconds_per_pair": watch.seconds / watch.n_pairs,
        "peak_memory_gb": peak_memory_gb(),
        "n_tokens_padded": watch.n_tokens_padded,
        "versions": {package: version(package) for package in PACKAGES},
        "reference_token_logps": reference_token_logps(watch.references, pairs),
    }


def text_row(pair: TokenPair, tokenizer: Any) -> dict[str, str]:
    """A pair as plain text; its own way with messages would train one token more, the line feed after the end of a turn."""
    return {side: tokenizer.decode(getattr(pair, side)) for side in ("prompt", "chosen", "rejected")}


def warm_up(trainer: DPOTrainer) -> None:
    """One pair forward and backward, then forgotten: libraries pick their kernels and pages are touched before the clock runs."""
    batch = trainer.data_collator([trainer.train_dataset[0]])
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    trainer.model.zero_grad()


class Watch(TrainerCallback):
    """Seconds in optimizer steps, pairs and padded tokens in the policy's forwards, and what the reference said.

    Where `seconds` is well above `cpu_seconds` of a single thread, something else had the core.
    """

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self.n_pairs = self.n_tokens_padded = 0
        self.started = (0.0, 0.0)
        self.references: list[tuple[Tensor, Tensor]] = []

    def on_step_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        self.started = perf_counter(), process_time()

    def on_step_end(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        self.seconds += perf_counter() - self.started[0]
        self.cpu_seconds += process_time() - self.started[1]

    def see(self, model: Any, _: tuple[Any, ...], inputs: dict[str, Tensor], output: Any) -> None:
        ids = inputs["input_ids"]
        if not output.log_probs.requires_grad:
            self.references.append((ids, output.log_probs))
            return
        self.n_pairs += len(ids) // 2
        self.n_tokens_padded += ids.numel()


def reference_token_logps(seen: list[tuple[Tensor, Tensor]], pairs: list[TokenPair]) -> dict[str, dict[str, list[float]]]:
    """The base model's log-probability of each response token by pair id and side, as TRL had it while training."""
    found: dict[str, dict[str, list[float]]] = {}
    for ids, logps in seen:
        for row, row_logps in zip(ids.tolist(), logps.tolist(), strict=True):
            for pair in pairs:
                for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                    whole = pair.prompt + response
                    if row[: len(whole)] == whole:
                        found.setdefault(pair.id, {})[side] = row_logps[len(pair.prompt) - 1 : len(whole) - 1]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=list(CONFIGS), required=True)
    parser.add_argument("--pairs", type=int, default=2 * BATCH_SIZE, help="starter pairs to train on")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of 8 pairs")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    result = measure(chosen.config, chosen.pairs, chosen.steps)
    print(json.dumps({key: value for key, value in result.items() if key != "reference_token_logps"}, indent=1))
    if chosen.json:
        chosen.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
