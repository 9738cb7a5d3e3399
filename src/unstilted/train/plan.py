"""What a training would do and how much memory it would need, from the model's shapes alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from unstilted.errors import UserError
from unstilted.lm.chat import ChatTokens
from unstilted.lm.head import CHUNK
from unstilted.lm.llama import MODEL_TYPES
from unstilted.models.load import check_loadable
from unstilted.models.shapes import empty_model, local_tokenizer, model_config
from unstilted.recipe import Recipe, TrainTable
from unstilted.records import Pair
from unstilted.train.adapter import chosen_layers, make_trainable
from unstilted.train.guards import setting_warnings

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits a weight: 4, an 8-bit scale for each 64, a 32-bit one for each 256 of those. Dettmers et al. 2023 (arXiv 2305.14314), section 3."""
STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256}
"""AdamW's two running means of each trained weight: float32, or 8-bit with a float32 scale for each 256 (arXiv 2110.02861, section 2)."""
LIBRARIES_BYTES = 460_000_000
"""Python with torch, transformers and peft, as measured on Linux. About as much as a CUDA context, which this stands for on a GPU."""
CPU_SLACK = 0.6
"""What the C library keeps of freed activations, as a share of them, measured; where weights run by hand their buffers are used again."""


@dataclass(frozen=True)
class Tokens:
    """Lengths of the training pairs' conversations (prompt plus the longer answer)."""

    median: int
    longest: int
    n_too_long: int
    longest_row: int
    """Prompt and both answers, which stand in one row."""


@dataclass(frozen=True)
class Memory:
    """Peak memory of one process, by what takes it, in bytes."""

    place: str
    """Such as "CPU, float32"."""
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    rest: int
    """Libraries, and on a GPU the CUDA context."""

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations + self.rest


@dataclass(frozen=True)
class Plan:
    """One training before it starts."""

    recipe: Recipe
    n_parameters: int
    n_layers: int
    layers: range
    n_trained: int
    n_pairs: int
    is_counted: bool
    """Whether the pairs were here to be counted; else n_pairs is the most that the recipe takes."""
    tokens: Tokens | None
    memories: list[Memory]
    warnings: list[str]

    @property
    def n_steps(self) -> int:
        return _n_steps(self.recipe.train, self.n_pairs)

    def __str__(self) -> str:
        rows = "\n".join(f"{name:<10} {text}" for name, text in self._rows())
        warnings = "".join(f"\nWarning: {warning}" for warning in self.warnings)
        return f"{rows}\n\n{self._memory_table()}\n{SOURCES}{warnings}"

    def _rows(self) -> list[tuple[str, str]]:
        train, share = self.recipe.train, self.n_trained / self.n_parameters
        layers = f"layers {self.layers.start + 1} to {self.layers.stop} of {self.n_layers}"
        at_most = "" if self.is_counted else "at most "
        rows = [
            ("model", f"{self.recipe.model.source}, {self.n_parameters:,} parameters"),
            ("trained", f"{_tuning(train)} on {layers}: {self.n_trained:,} parameters ({share:.2%})"),
            ("loss", f"{train.loss}, beta {train.beta:g}, nll_weight {train.nll_weight:g}"),
            ("pairs", f"{at_most}{self.n_pairs:,} from {self.recipe.pairs.source}" + ("" if self.is_counted else " (not read)")),
            ("batch", f"{train.batch_size} pairs an optimizer step over all processes, forwards of {train.tokens_per_forward:,} tokens"),
            ("steps", f"{at_most}{self.n_steps:,} in {train.n_epochs} epoch{'s' * (train.n_epochs > 1)}, {train.optimizer}"),
            ("rate", f"{train.learning_rate:g} after {train.n_warmup_steps} steps of warm-up, then a cosine to 0"),
        ]
        if self.tokens is not None:
            cut = f"; {self.tokens.n_too_long} over train.max_tokens ({train.max_tokens:,})" if self.tokens.n_too_long else ""
            rows.append(("tokens", f"a pair's longer conversation: median {self.tokens.median:,}, longest {self.tokens.longest:,}{cut}"))
        return rows

    def _memory_table(self) -> str:
        lines = [f"{'memory a process, GB':<32}" + "".join(f"{memory.place:>24}" for memory in self.memories)]
        for name, label in PARTS.items():
            lines.append(f"  {label:<30}" + "".join(f"{getattr(memory, name) / 1e9:>24.2f}" for memory in self.memories))
        return "\n".join(lines)


SOURCES = (
    "Weights and states are counted (4-bit: arXiv 2305.14314, section 3; 8-bit states: 2110.02861, section 2). Activations are those of\n"
    "one forward, by the tensors that a Llama-type layer keeps (docs/training.md); a longer pair runs alone and takes more in proportion."
)

PARTS = {
    "weights": "base weights",
    "adapter": "adapter, float32",
    "gradients": "gradients, twice: sum and part",
    "optimizer": "optimizer states",
    "activations": "activations",
    "rest": "libraries",
    "total": "peak",
}


def make_plan(recipe: Recipe, pairs: Sequence[Pair] | None) -> Plan:
    """The plan of a training on these pairs; None where they aren't here to be read.

    Raises UserError where the model's shapes can't be had, its layers aren't those of the recipe, or nothing says how many pairs there are.
    """
    train, config = recipe.train, model_config(recipe.model)
    n_pairs = len(pairs) if pairs is not None else recipe.pairs.n_pairs
    if not n_pairs:
        raise UserError("how many pairs the hub's dataset has isn't known here.", where="pairs.n_pairs", do="Set it to a number.")
    base = empty_model(config)
    n_parameters = sum(weight.numel() for weight in base.parameters())
    layers = chosen_layers(base, train)
    tuned = make_trainable(base, train.model_copy(update={"pissa": False}))  # there is nothing to take directions from
    tokens = _tokens(recipe, pairs)
    return Plan(
        recipe=recipe,
        n_parameters=n_parameters,
        n_layers=config.get_text_config().num_hidden_layers,
        layers=layers,
        n_trained=sum(weight.numel() for weight in tuned.parameters() if weight.requires_grad),
        n_pairs=n_pairs,
        is_counted=pairs is not None,
        tokens=tokens,
        memories=[estimate_memory(tuned, recipe, tokens, on_gpu=on_gpu) for on_gpu in _devices(recipe)],
        warnings=[*setting_warnings(train, n_pairs, _n_steps(train, n_pairs)), *_machine_warnings(recipe)],
    )


def estimate_memory(tuned: Any, recipe: Recipe, tokens: Tokens | None, *, on_gpu: bool) -> Memory:
    """Peak memory of a training of `tuned`, a model that may have no storage.

    Base weights, adapter, gradients and optimizer states are counted. Activations are what autograd keeps of a Llama-type layer, tensor
    by tensor, or the buffers of `lm/llama.py`; of other architectures they are about as large.
    """
    train, load = recipe.train, recipe.model.load
    n_bytes = 2 if on_gpu and train.tuning == "lora" else 4
    n_trained = sum(weight.numel() for weight in tuned.parameters() if weight.requires_grad)
    n_adapter = n_trained if train.tuning == "lora" else 0
    row = Row.of(tuned, train, tokens)
    by_hand = not on_gpu and row.config.model_type in MODEL_TYPES and train.tuning == "lora" and not train.dora and train.dropout == 0
    held = {"auto": "bfloat16" if n_bytes == 2 else "float32"}.get(load, load)
    return Memory(
        place=f"{'GPU' if on_gpu else 'CPU'}, {held}",
        weights=_weight_bytes(tuned, load, n_bytes),
        adapter=4 * n_adapter * (2 if by_hand else 1),  # by hand it also stands beside the base weights
        gradients=4 * n_trained * 2,
        optimizer=int(STATE_BYTES[train.optimizer] * n_trained),
        activations=_bytes_by_hand(row) if by_hand else int(_autograd_bytes(row, train, n_bytes) * (1 if on_gpu else 1 + CPU_SLACK)),
        rest=LIBRARIES_BYTES,
    )


@dataclass(frozen=True)
class Row:
    """One forward with gradient: T tokens through the layers from the first trained one up. Widths are in numbers a token."""

    config: Any
    n_tokens: int
    n_layers: int
    """Layers that keep activations."""
    inputs: tuple[int, ...]
    """Input width of each adapted linear layer of one decoder layer."""
    outputs: tuple[int, ...]
    rank: int

    @classmethod
    def of(cls, tuned: Any, train: TrainTable, tokens: Tokens | None) -> "Row":
        from peft.tuners.lora import LoraLayer

        config = tuned.config.get_text_config()
        chosen = chosen_layers(tuned, train)
        decoder = (tuned.get_base_model() if hasattr(tuned, "peft_config") else tuned).get_decoder()
        adapted = [module for module in decoder.layers[chosen.start].modules() if isinstance(module, LoraLayer)]
        inputs, outputs = (tuple(getattr(module, side) for module in adapted) for side in ("in_features", "out_features"))
        n_tokens = max(train.tokens_per_forward, tokens.longest_row if tokens else 0)
        return cls(config, n_tokens, config.num_hidden_layers - chosen.start, inputs, outputs, train.rank)

    @property
    def width(self) -> int:
        return int(self.config.hidden_size)

    @property
    def inner(self) -> int:
        return int(getattr(self.config, "intermediate_size", None) or 4 * self.config.hidden_size)

    @property
    def attention(self) -> int:
        """All heads' queries."""
        return self.n_heads * self._head

    @property
    def n_heads(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def keys(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.n_heads) * self._head

    @property
    def _head(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.n_heads)


def layer_bytes(row: Row, train: TrainTable, n_bytes: int) -> int:
    """What autograd keeps of one Llama-type layer for its backward, over all T tokens.

    Queries, repeated keys and values, attention's output; gate, silu(gate), up; both norms' inputs, widened to float32; and what the
    trained matrices multiply with: in float32 the layers' own inputs, in bfloat16 a float32 copy for each adapter.
    """
    kept = n_bytes * (4 * row.attention + 3 * row.inner) + 4 * (2 * row.width + 2 + row.n_heads)
    own = 4 * (2 * row.width + row.inner)
    if train.tuning == "full":
        return row.n_tokens * (kept + own + 4 * 2 * row.width)
    if train.dropout:
        kept += sum(row.inputs) * (4 + (4 if n_bytes == 4 else 1))  # each adapter's own input and its mask
    else:
        kept += own if n_bytes == 4 else 4 * sum(row.inputs)
    kept += 4 * len(row.inputs) * row.rank
    if train.dora:  # both products of each layer, and B A worked out with a unit matrix
        return row.n_tokens * (kept + 4 * 2 * sum(row.outputs)) + 4 * sum(width**2 for width in row.inputs)
    return row.n_tokens * kept


def _autograd_bytes(row: Row, train: TrainTable, n_bytes: int) -> int:
    trains_head = train.tuning == "full" and (
        train.last_layer_share == 1 and not (row.config.tie_word_embeddings and train.first_layer_share)
    )
    head = 3 * row.config.vocab_size if trains_head else 4 * row.width + 2 * CHUNK  # logits, their exponentials and their gradient
    return row.n_layers * layer_bytes(row, train, n_bytes) + 4 * row.n_tokens * head


def _bytes_by_hand(row: Row) -> int:
    """The buffers of `lm/llama.py`, for each thread: a forward with gradient, and a look at twice as many tokens without."""
    qkv = row.attention + 2 * row.keys
    layer = 4 * row.width + 2 * row.attention + 2 * row.keys + 2 * row.inner + 7 * row.rank + 2
    layer += row.n_heads * row.n_tokens // 4  # attention's probabilities, of places that see half of half a row
    shared = 3 * qkv + 5 * row.inner + 4 * row.width + row.attention
    look = 2 * (layer + qkv + 2 * row.inner + 4 * row.width + 5 * CHUNK)
    return 4 * row.n_tokens * (row.n_layers * layer + shared + look) * torch.get_num_threads()


def _weight_bytes(model: Any, load: str, n_bytes: int) -> int:
    """Of the base: bitsandbytes quantizes the decoder layers' linear weights and leaves embeddings, norms and head."""
    names = [(name, weight) for name, weight in model.named_parameters() if "lora_" not in name]
    total = 0.0
    for name, weight in names:
        if load == "auto" or ".layers." not in name or weight.dim() < 2:
            total += n_bytes * weight.numel()
        elif load == "8bit":
            total += weight.numel() + 4 * weight.shape[0]
        else:
            total += NF4_BITS / 8 * weight.numel()
    return int(total)


def _tokens(recipe: Recipe, pairs: Sequence[Pair] | None) -> Tokens | None:
    """Lengths, where both the pairs and the tokenizer are on this disk."""
    tokenizer = local_tokenizer(recipe.model) if pairs is not None else None
    if tokenizer is None or pairs is None:
        return None
    chat = ChatTokens(tokenizer, recipe.model.source)
    found = [chat.pair(pair) for pair in pairs]
    lengths = [pair.n_tokens for pair in found]
    rows = [len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in found]
    return Tokens(int(median(lengths)), max(lengths), sum(length > recipe.train.max_tokens for length in lengths), max(rows))


def _n_steps(train: TrainTable, n_pairs: int) -> int:
    return train.n_epochs * math.ceil(n_pairs / train.batch_size)


def _devices(recipe: Recipe) -> list[bool]:
    """Whether to estimate for a GPU: for both where the recipe suits both."""
    needs_gpu = recipe.model.load != "auto" or recipe.train.optimizer == "adamw_8bit"
    return [True] if needs_gpu else [False, True]


def _machine_warnings(recipe: Recipe) -> list[str]:
    try:
        check_loadable(recipe)
    except UserError as error:
        return [f"not on this machine: {error}"]
    return []


def _tuning(train: TrainTable) -> str:
    if train.tuning == "full":
        return "all weights"
    kinds = [name for name in ("dora", "rslora", "pissa") if getattr(train, name)]
    extras = [*kinds, *([f"dropout {train.dropout:g}"] if train.dropout else [])]
    return (
        f"LoRA of rank {train.rank}, alpha {train.alpha:g}{''.join(f', {extra}' for extra in extras)}, on {', '.join(train.target_modules)}"
    )
