"""Weights and tokenizer in memory: a base model, or one with what `train` made of it."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from unstilted.errors import UserError
from unstilted.models.resolve import BaseModelFiles
from unstilted.recipe import Recipe, TrainTable

ADAPTER_CONFIG = "adapter_config.json"
"""The file by which a folder holds a PEFT adapter; without it, it holds whole weights."""


def check_loadable(recipe: Recipe) -> None:
    """Raise UserError for weights that this machine can't hold or that can't be trained so; looks at nothing but the machine."""
    model, train = recipe.model, recipe.train
    plain = [name for name, is_set in (('tuning = "full"', train.tuning == "full"), ("pissa = true", train.pissa)) if is_set]
    if model.load != "auto" and plain:
        raise UserError(
            f"train.{plain[0]} changes the base weights, which it can't while they are held in {model.load}.",
            where="model.load",
            do='Set model.load = "auto".',
        )
    if model.load == "8bit" and train.dora:
        raise UserError(
            "train.dora fails over 8-bit weights (with peft 0.21 and bitsandbytes 0.50).", where="model.load", do='Set model.load = "4bit".'
        )
    if model.load != "auto":
        _require_bitsandbytes(f"model.load = '{model.load}'", 'model.load = "auto"')
    if train.optimizer == "adamw_8bit":
        _require_bitsandbytes("train.optimizer = 'adamw_8bit'", 'train.optimizer = "adamw"')


def _require_bitsandbytes(where: str, instead: str) -> None:
    if find_spec("bitsandbytes") is None:
        raise UserError("this needs the package bitsandbytes.", where=where, do=f"`pip install bitsandbytes`, or set {instead}.")
    import torch

    if not torch.cuda.is_available():
        raise UserError("this needs a CUDA GPU, and none is here.", where=where, do=f"Set {instead}.")


def load_tokenizer(files: BaseModelFiles) -> Any:
    """The model's tokenizer with its chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(files.folder)


def load_model(files: BaseModelFiles, *, wide: bool = False) -> Any:
    """The causal language model, frozen in eval mode, held as `files.load` says: "auto" is float32 on CPU, bfloat16 on a GPU that has it.

    wide: float32 there, too, for weights that are themselves trained: bfloat16 would round most of an optimizer's steps away.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    dtype = torch.bfloat16 if on_gpu and not wide else torch.float32
    model = AutoModelForCausalLM.from_pretrained(files.folder, dtype=dtype, **_quantized(files.load, dtype))
    model.name_or_path = files.name  # peft writes it into the adapter: a name that others can load, no path of this machine
    return model.requires_grad_(False).eval()


def load_tuned(files: BaseModelFiles, folder: Path, strength: float) -> Any:
    """The base model with an adapter, or the whole weights, that `train` wrote into `folder`: at strength 0 base, at 1 as written."""
    if not (folder / ADAPTER_CONFIG).is_file():
        tuned = load_model(replace(files, folder=folder))
        if strength != 1:
            draw_back(tuned, load_model(files), strength)
        return tuned
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load_model(files), folder)
    scale_adapter(adapted, strength)
    return adapted.eval()


def scale_adapter(model: Any, strength: float) -> None:
    """Turn all LoRA and DoRA adapters on a model down to `strength`: 0 is the base model, 1 leaves them as they are.

    Weights part of the way from base to tuned keep most of the change and more of what base knew (Wortsman et al. 2022,
    arXiv 2109.01903). Of DoRA, direction and length go back each by themselves.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        module.scale_layer(strength)
        for magnitude in module.lora_magnitude_vector.values():
            base = torch.linalg.vector_norm(dequantize_module_weight(module.get_base_layer()), dim=1)
            magnitude.weight.data.lerp_(base.to(magnitude.weight.dtype), 1 - strength)


def draw_back(tuned: Any, base: Any, strength: float) -> None:
    """Move the weights of `tuned` towards `base` until `strength` of their difference is left (Wortsman et al. 2022, eq. 1)."""
    from torch.distributed.tensor import distribute_tensor

    pairs = zip(tuned.parameters(), base.parameters(), strict=True)
    for weight, original in pairs:
        near = original.data.to(weight.device, weight.dtype)
        if hasattr(weight, "device_mesh"):  # sharded: this process's part of its own copy
            near = distribute_tensor(near, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.data.lerp_(near, 1 - strength)


def make_optimizer(parameters: list[Any], settings: TrainTable) -> Any:
    """AdamW without weight decay (Loshchilov & Hutter 2019), or the same with 8-bit states (Dettmers et al. 2022, arXiv 2110.02861)."""
    if settings.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=settings.learning_rate, weight_decay=0.0)
    from torch.optim import AdamW

    return AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)


def _quantized(load: str, dtype: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` for 8-bit (Dettmers et al. 2022, arXiv 2208.07339) and 4-bit (2023, arXiv 2305.14314) weights."""
    if load == "auto":
        return {}
    from accelerate import PartialState
    from transformers import BitsAndBytesConfig

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    config = BitsAndBytesConfig(load_in_8bit=True) if load == "8bit" else BitsAndBytesConfig(load_in_4bit=True, **nf4)
    return {"quantization_config": config, "device_map": {"": PartialState().device}}
