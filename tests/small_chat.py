"""A random Llama of 0.2 MB in each layer that chats (in gibberish) with the embedded model's tokenizer, and adapters for it."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from unstilted.models.resolve import BaseModelFiles

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write_small_llama(folder: Path, embedded: BaseModelFiles) -> Path:
    """A folder as `save_pretrained` leaves it; the same weights at every call."""
    config = LlamaConfig(
        vocab_size=json.loads((embedded.folder / "config.json").read_text())["vocab_size"],
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.5,  # logits far enough apart that rounding turns no token
    )
    torch.manual_seed(3)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(embedded.folder / name, folder / name)
    return folder


def write_adapter(folder: Path, base: Path, seed: int = 0, size: float = 0.5) -> Path:
    """A LoRA of rank 4 on q_proj of every layer, as PEFT writes it, with random weights."""
    config = json.loads((base / "config.json").read_text())
    n_heads, width = config["num_attention_heads"], config["hidden_size"]
    n_outputs = n_heads * (config.get("head_dim") or width // n_heads)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, width, generator=generator) * size
        tensors[f"{name}.lora_B.weight"] = torch.randn(n_outputs, 4, generator=generator) * size
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
