"""Tiny random models in float64, and the plainest possible way to score with them."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softmax
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RwkvConfig,
    SmolLM3Config,
)

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA: dict[str, Any] = SIZES | {"head_dim": 8, "hidden_activation": "gelu_pytorch_tanh"}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama with wide heads": LlamaConfig(**SIZES, head_dim=12),
    "llama with llama3 positions": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "llama with dynamic positions": LlamaConfig(
        **(SIZES | {"max_position_embeddings": 8}), rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    ),
    "multi-head llama": LlamaConfig(**(SIZES | {"num_key_value_heads": 4})),
    "multi-query llama": LlamaConfig(**(SIZES | {"num_key_value_heads": 1})),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=False, tie_word_embeddings=True),
    "qwen2 with some sliding windows": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=12, use_sliding_window=False),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral with a sliding window": MistralConfig(**SIZES, sliding_window=6),
    "gemma": GemmaConfig(**GEMMA),
    "gemma2": Gemma2Config(**GEMMA, sliding_window=9, final_logit_softcapping=3.0, attn_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**GEMMA, sliding_window=9),
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0, embedding_multiplier=6.0, residual_multiplier=0.5, attention_multiplier=0.3),
    "olmo2": Olmo2Config(**SIZES),
    "phi3": Phi3Config(**SIZES),
    "phi3 with long positions": Phi3Config(
        **(SIZES | {"original_max_position_embeddings": 9}),
        rope_parameters={"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]},
    ),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1], use_sliding_window=False),
    "mamba": MambaConfig(vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.1, bos_token_id=1),
    "rwkv": RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, bos_token_id=1),
}


def tiny_model(kind: str = "llama") -> Any:
    """A random model in eval mode; the same weights at every call, with norms and biases that do something."""
    torch.manual_seed(7)
    model = in_float64(AutoModelForCausalLM.from_config(deepcopy(CONFIGS[kind])).eval())
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += 0.2 * torch.randn_like(weight)
    return model


def with_lora(model: Any, seed: int = 3, **settings: Any) -> Any:
    """The model with a LoRA adapter that has been trained a little: B isn't 0. The base is frozen."""
    from peft import LoraConfig, get_peft_model

    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(**({"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6.0, "target_modules": linear} | settings))
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return adapted


def in_float64(model: Any) -> Any:
    """The model in float64 throughout: transformers' norms round to float32 on the way, whatever the weights are."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_gemma_norm if "Gemma" in type(module).__name__ else _rms_norm, module)
    if model.config._attn_implementation == "eager":
        model.get_decoder().forward = _WideSoftmax.around(model.get_decoder().forward)
    return model.double()


class _WideSoftmax(TorchFunctionMode):
    """Attention that is written out asks for a softmax in float32."""

    @staticmethod
    def around(forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def wide(*args: Any, **kwargs: Any) -> Any:
            with _WideSoftmax():
                return forward(*args, **kwargs)

        return wide

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **((kwargs or {}) | ({"dtype": torch.float64} if func is softmax else {})))


def _rms_norm(norm: Any, hidden: Tensor) -> Tensor:
    return norm.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def _gemma_norm(norm: Any, hidden: Tensor) -> Tensor:
    return (1 + norm.weight) * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.eps)


def plain_token_logps(model: Any, prompt: Sequence[int], continuation: Sequence[int]) -> Tensor:
    """Log-probabilities of shape (T,) by one forward over prompt + continuation, nothing shared and nothing left out."""
    ids = torch.tensor([[*prompt, *continuation]])
    logps = model(ids, use_cache=False).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    return logps.gather(1, torch.tensor(continuation)[:, None])[:, 0]
