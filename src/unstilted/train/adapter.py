"""What is trained: a LoRA adapter on chosen layers."""

import math
from pathlib import Path
from typing import Any

from unstilted.errors import UserError
from unstilted.recipe import TrainTable


def add_adapter(model: Any, settings: TrainTable) -> Any:
    """The model with a fresh LoRA adapter on the chosen layers; everything else is frozen."""
    from peft import LoraConfig, get_peft_model

    n_layers = model.config.get_text_config().num_hidden_layers
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        layers_to_transform=list(range(math.floor(n_layers * settings.first_layer_share), n_layers)),
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"no adapter can be put on this model ({error}).", where="train.target_modules", do="Name its linear layers."
        ) from None


def scale_adapter(model: Any, strength: float) -> None:
    """Turn the adapter down to `strength`, in its alpha, so that every loader applies it.

    Weights part of the way from base to tuned keep most of the change and more of what base knew (Wortsman et al. 2022,
    arXiv 2109.01903).
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(strength)
    model.peft_config["default"].lora_alpha *= strength


def save_adapter(model: Any, folder: Path) -> None:
    """A PEFT folder that `peft` loads unchanged."""
    # "auto" would ask the hub whether the vocabulary has grown; it never does here.
    model.save_pretrained(folder, save_embedding_layers=False)
