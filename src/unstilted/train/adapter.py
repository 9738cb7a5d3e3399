"""What is trained: an adapter on chosen layers, or those layers' own weights; and how it is turned down and written."""

import json
import math
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unstilted.errors import UserError
from unstilted.models.load import draw_back, load_model, load_tokenizer, scale_adapter
from unstilted.models.resolve import BaseModelFiles
from unstilted.recipe import TrainTable

ALL_LINEAR = ("all-linear",)
PISSA = "pissa_niter_16"
"""PEFT's name of PiSSA by a randomised SVD, which takes seconds where the whole one takes hours; what it misses stays in the base."""


def keeps_base(settings: TrainTable) -> bool:
    """Whether the base model is still there while training, with the adapter off; else its answers are needed before."""
    return settings.tuning == "lora" and not settings.pissa


@dataclass
class Tuned:
    """A model with a LoRA or DoRA adapter."""

    model: Any

    def scale(self, strength: float) -> None:
        """Turn down what was learnt to `strength`, in alpha, so that every loader applies it; once, after training."""
        scale_adapter(self.model, strength)
        self.model.peft_config["default"].lora_alpha *= strength

    def save(self, folder: Path) -> None:
        """A PEFT folder that `peft` loads unchanged onto the base model."""
        # "auto" would ask the hub whether the vocabulary has grown; it never does here.
        self.model.save_pretrained(folder, save_embedding_layers=False)
        _in_one_order(folder / "adapter_config.json")


class PissaTuned(Tuned):
    """A model with an adapter B A that was started as B0 A0 from the base weights, from which the same was taken away.

    Meng et al. 2024 (arXiv 2404.02948), eqs. 2 to 4. What was learnt is B A - B0 A0, an adapter of twice the rank on the untouched base.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.start = {name: weight.clone() for name, weight in self._adapter().items()}

    def scale(self, strength: float) -> None:
        """W0 + k (B A - B0 A0) = (W0 - B0 A0) + (1 - k) B0 A0 + k B A."""
        for name, module in self.model.named_modules():
            if f"{name}.lora_A.weight" in self.start:
                product = self.start[f"{name}.lora_B.weight"] @ self.start[f"{name}.lora_A.weight"]
                module.get_base_layer().weight.data += (module.scaling["default"] * (1 - strength) * product).to(self.model.dtype)
        super().scale(strength)

    def save(self, folder: Path) -> None:
        """B A - B0 A0 as [B, -B0] [A; A0]. By hand, because PEFT's own way asks the hub whether the vocabulary has grown."""
        from safetensors.torch import save_file

        super().save(folder)
        config = copy(self.model.peft_config["default"])
        config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
        config.r, config.init_lora_weights, config.inference_mode = 2 * config.r, True, True
        config.save_pretrained(folder)
        _in_one_order(folder / "adapter_config.json")
        both = {
            name: torch.cat([weight, self.start[name]], 0) if "lora_A" in name else torch.cat([weight, -self.start[name]], 1)
            for name, weight in self._adapter().items()
        }
        save_file({name: weight.contiguous() for name, weight in both.items()}, folder / "adapter_model.safetensors", {"format": "pt"})

    def _adapter(self) -> dict[str, Any]:
        from peft import get_peft_model_state_dict

        return {name: weight.detach() for name, weight in get_peft_model_state_dict(self.model, save_embedding_layers=False).items()}


@dataclass
class WholeTuned:
    """A model whose own weights are trained."""

    model: Any
    files: BaseModelFiles

    def scale(self, strength: float) -> None:
        """Move the weights back towards base; that takes a second copy of the model for a moment."""
        if strength != 1:
            draw_back(self.model, load_model(self.files, wide=True), strength)

    def save(self, folder: Path) -> None:
        """A folder with float32 weights and tokenizer, which transformers loads as it does any model."""
        self.model.save_pretrained(folder)
        load_tokenizer(self.files).save_pretrained(folder)


def _in_one_order(file: Path) -> None:
    """PEFT keeps the names of modules as a set and writes them in any order; the same training must give the same bytes."""
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"target_modules": sorted(config["target_modules"])}, indent=2) + "\n", encoding="utf-8")


def tune(model: Any, settings: TrainTable, files: BaseModelFiles) -> Tuned | WholeTuned:
    """The model made ready to be trained as the settings say; everything else in it is frozen.

    Raises UserError where the settings name layers that this model doesn't have.
    """
    trainable = make_trainable(model, settings)
    if settings.tuning == "full":
        return WholeTuned(trainable, files)
    return PissaTuned(trainable) if settings.pissa else Tuned(trainable)


def make_trainable(model: Any, settings: TrainTable) -> Any:
    """The model with a fresh adapter, or with its own weights unfrozen; nothing else in it asks for a gradient."""
    return _unfreeze(model, settings) if settings.tuning == "full" else add_adapter(model, settings)


def add_adapter(model: Any, settings: TrainTable) -> Any:
    """The model with a fresh adapter on the chosen layers; everything else is frozen."""
    from peft import LoraConfig, get_peft_model

    names = settings.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_linear_layers(model) if names == ALL_LINEAR else list(names),
        layers_to_transform=list(chosen_layers(model, settings)),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        init_lora_weights=PISSA if settings.pissa else True,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"no adapter can be put on this model ({error}).", where="train.target_modules", do='Name its linear layers, or "all-linear".'
        ) from None


def chosen_layers(model: Any, settings: TrainTable) -> range:
    """Indices of the decoder layers between the two shares of the depth; at least one."""
    n_layers = model.config.get_text_config().num_hidden_layers
    first = math.floor(n_layers * settings.first_layer_share)
    return range(first, max(first + 1, math.ceil(n_layers * settings.last_layer_share)))


def _linear_layers(model: Any) -> list[str]:
    """Names of the linear layers in decoder layers (bitsandbytes' are of this class, too). PEFT's shorthand takes no range of layers."""
    modules = model.get_decoder().layers.named_modules()
    return sorted({name.rpartition(".")[2] for name, module in modules if isinstance(module, torch.nn.Linear)})


def _unfreeze(model: Any, settings: TrainTable) -> Any:
    """The chosen layers; embeddings where they start at the first, final norm and head where they end with the last."""
    chosen, layers = chosen_layers(model, settings), model.get_decoder().layers
    model.requires_grad_(chosen.stop == len(layers))
    for index, layer in enumerate(layers):
        layer.requires_grad_(index in chosen)
    model.get_input_embeddings().requires_grad_(chosen.start == 0)  # last: the head may be the same matrix
    return model
