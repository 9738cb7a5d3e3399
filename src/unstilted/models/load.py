"""Weights and tokenizer in memory."""

from typing import Any

from unstilted.models.resolve import BaseModelFiles


def load_tokenizer(files: BaseModelFiles) -> Any:
    """The model's tokenizer with its chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(files.folder)


def load_model(files: BaseModelFiles) -> Any:
    """The causal language model, frozen in eval mode: float32 on CPU, bfloat16 on a GPU that has it."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    model = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.bfloat16 if on_gpu else torch.float32)
    model.name_or_path = files.name  # peft writes it into the adapter: a name that others can load, no path of this machine
    return model.requires_grad_(False).eval()
