"""What a model looks like before its weights are here: its configuration, and the model itself without storage."""

from pathlib import Path
from typing import Any

from unstilted.errors import UserError
from unstilted.models import embedded
from unstilted.models.resolve import TOKENIZERS, check_config, fetch_config, is_hub_id
from unstilted.recipe import ModelTable

FACTS: dict[str, dict[str, Any]] = {
    embedded.HUB_ID: {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "mistralai/Mistral-Nemo-Instruct-2407": {
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 14336,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
        "tie_word_embeddings": False,
    },
}
"""From the config.json of each, so that a dry run of the shipped recipes needs no network."""


def local_folder(table: ModelTable) -> Path | None:
    """Where this disk has the model's config.json, or None. Raises UserError for a folder without one and for no source at all."""
    if is_hub_id(table.source):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(table.source, "config.json", revision=table.revision or None)
        return Path(cached).parent if isinstance(cached, str) else None
    if table.source == "embedded":
        folder = embedded.cache_folder() / embedded.NAME.lower() / embedded.WEIGHTS_FOLDER
        return folder if (folder / "config.json").is_file() else None
    folder = Path(table.source).expanduser()
    check_config(folder)
    return folder


def model_config(table: ModelTable) -> Any:
    """The model's transformers configuration: from this disk, from `FACTS`, or config.json alone from the hub.

    Raises UserError where none of them has it.
    """
    from transformers import AutoConfig

    folder, facts = local_folder(table), FACTS.get(embedded.HUB_ID if table.source == "embedded" else table.source)
    if folder is None and facts is not None and not table.revision:
        return AutoConfig.for_model(**facts)
    folder = folder or fetch_config(table.source, table.revision).parent
    try:
        return AutoConfig.from_pretrained(folder)
    except ValueError as error:
        raise UserError(
            f"this version of transformers doesn't know the model ({str(error).splitlines()[0]}).",
            where=str(folder / "config.json"),
            do="Upgrade transformers, or choose another model.",
        ) from None


def empty_model(config: Any) -> Any:
    """The model with the shapes of all its weights and without their memory, frozen as `load_model` gives it."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()


def local_tokenizer(table: ModelTable) -> Any | None:
    """The model's tokenizer where it is on this disk."""
    folder = local_folder(table)
    if folder is None or not any((folder / name).is_file() for name in TOKENIZERS):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
