"""Tiny random models in float64, and the plainest possible way to score with them."""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=False),
    "mistral with a sliding window": MistralConfig(**SIZES, sliding_window=6),
}


def tiny_model(kind: str = "llama") -> Any:
    """A random model in eval mode; the same weights at every call."""
    torch.manual_seed(7)
    return in_float64(AutoModelForCausalLM.from_config(CONFIGS[kind]).eval())


def in_float64(model: Any) -> Any:
    """The model in float64 throughout: transformers' norms round to float32 on the way, whatever the weights are."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_rms_norm, module)
    return model.double()


def _rms_norm(norm: Any, hidden: Tensor) -> Tensor:
    return norm.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def plain_token_logps(model: Any, prompt: Sequence[int], continuation: Sequence[int]) -> Tensor:
    """Log-probabilities of shape (T,) by one forward over prompt + continuation, nothing shared and nothing left out."""
    ids = torch.tensor([[*prompt, *continuation]])
    logps = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    return logps.gather(1, torch.tensor(continuation)[:, None])[:, 0]
