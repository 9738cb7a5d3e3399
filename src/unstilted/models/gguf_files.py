"""GGUF files for llama.cpp: the embedded model re-encoded, and PEFT adapters converted."""

import json
import math
import re
from pathlib import Path
from typing import Any

from unstilted.errors import UserError
from unstilted.files import whole_file

LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Llama's linear layers in transformers and in GGUF."""
UNCONVERTIBLE = (
    *("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication", "trainable_token_indices"),
    *("target_parameters", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)
"""PEFT settings that make an adapter more than one B A of one scale per linear layer."""
PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Ways to start an adapter that leave the base model's own weights alone; the others (PiSSA, OLoRA, ...) change them."""
TENSOR_NAME = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight")


def supports_llama_cpp(config: dict[str, Any]) -> bool:
    """Whether adapters of a model with this `config.json` can be converted here."""
    return config.get("model_type") == "llama"


def write_lora_gguf(adapter: Path, base_config: dict[str, Any], target: Path, strength: float = 1.0) -> None:
    """Convert a PEFT LoRA folder into a GGUF LoRA that llama.cpp applies at `strength` times what was trained.

    Raises UserError for another architecture than Llama and for what a GGUF LoRA can't hold.
    """
    import gguf
    from safetensors.torch import load_file  # its NumPy twin can't read bfloat16

    for file in (settings := adapter / "adapter_config.json", weights := adapter / "adapter_model.safetensors"):
        if not file.is_file():
            raise UserError("this file of the adapter is missing.", where=str(file), do="Point at a folder that PEFT or `train` wrote.")
    config = json.loads(settings.read_text(encoding="utf-8"))
    _check_convertible(adapter, config, base_config)
    tensors = {name: tensor.float().numpy() for name, tensor in load_file(weights).items()}
    names = {name: _gguf_name(name, adapter) for name in tensors}
    alpha = strength * _scale(config) * config["r"]  # llama.cpp multiplies by alpha / rank
    if alpha == 0:  # which it reads as "no alpha given", and then applies the adapter in full
        tensors, alpha = {name: tensor * 0 for name, tensor in tensors.items()}, config["r"]
    with whole_file(target) as part:
        writer = gguf.GGUFWriter(part, "llama")
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, tensor in tensors.items():
            writer.add_tensor(names[name], _rows_for_llama_cpp(names[name], tensor, base_config))
        _write(writer)


def _check_convertible(adapter: Path, config: dict[str, Any], base_config: dict[str, Any]) -> None:
    if not supports_llama_cpp(base_config):
        raise _not_convertible(f"its base model's architecture is '{base_config.get('model_type')}', not 'llama'", adapter)
    if config.get("peft_type") != "LORA":
        raise _not_convertible(f"it is of the kind '{config.get('peft_type')}', not 'LORA'", adapter)
    plain = {"bias": (None, "none"), "init_lora_weights": PLAIN_INITS}
    for setting, value in config.items():
        is_plain = value in plain[setting] if setting in plain else setting not in UNCONVERTIBLE or not value
        if not is_plain:
            raise _not_convertible(f"it was trained with {setting} = {json.dumps(value)}", adapter)


def _not_convertible(problem: str, adapter: Path) -> UserError:
    return UserError(
        f"llama.cpp can't run this adapter: {problem}.", where=str(adapter), do="Set respond.engine to 'transformers', which runs it."
    )


def _gguf_name(name: str, adapter: Path) -> str:
    found = TENSOR_NAME.fullmatch(name)
    if found is None or found[2] not in LAYER_NAMES:
        raise _not_convertible(f"it has a tensor '{name}'", adapter)
    return f"blk.{found[1]}.{LAYER_NAMES[found[2]]}.weight.lora_{found[3].lower()}"


def _scale(config: dict[str, Any]) -> float:
    """What PEFT multiplies B A with: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023)."""
    rank = config["r"]
    return float(config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _rows_for_llama_cpp(name: str, tensor: Any, base_config: dict[str, Any]) -> Any:
    """Reorder the rows of q's and k's B as llama.cpp keeps those of q and k.

    transformers rotates a head's first half against its second, llama.cpp each even row against the odd one after it.
    """
    n_heads = base_config["num_attention_heads"]
    heads = {"attn_q.weight.lora_b": n_heads, "attn_k.weight.lora_b": base_config.get("num_key_value_heads") or n_heads}
    n = heads.get(name.split(".", 2)[2])
    if n is None:
        return tensor
    n_rows, rank = tensor.shape
    return tensor.reshape(n, 2, n_rows // n // 2, rank).swapaxes(1, 2).reshape(n_rows, rank)


def reencode_q8_0(source: Path, target: Path) -> None:
    """Write `source` with its Q4_1 matrices as Q8_0 and copy the rest.

    llama.cpp then needs two thirds of the time, and is neither nearer to nor farther from the float32 model: it rounds the
    activations to 8 bits for both kinds, and that is most of the difference.
    """
    import gguf

    q8_0 = gguf.GGMLQuantizationType.Q8_0
    reader = gguf.GGUFReader(source)
    with whole_file(target) as part:
        writer = gguf.GGUFWriter(part, reader.fields["general.architecture"].contents())
        _copy_fields(reader, writer, file_type=gguf.LlamaFileType.MOSTLY_Q8_0)
        for tensor in reader.tensors:
            data, kind = tensor.data, tensor.tensor_type
            if kind not in (q8_0, gguf.GGMLQuantizationType.F32):
                data, kind = gguf.quants.quantize(gguf.quants.dequantize(data, kind), q8_0), q8_0
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
        _write(writer)


def _copy_fields(reader: Any, writer: Any, file_type: int) -> None:
    """Copy all metadata but the architecture, which the writer has set, and the header's own counts."""
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = int(file_type) if key == "general.file_type" else field.contents()
        writer.add_key_value(key, value, field.types[0], *field.types[1:][-1:])


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
