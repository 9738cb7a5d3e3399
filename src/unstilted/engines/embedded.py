"""llama.cpp in this process: one single-threaded server a core, each with its own slots.

Two threads in one server wait for each other after every matrix product; two servers of one thread don't, which is as fast on
idle cores and much faster on busy ones. An engine holds one adapter at one strength for its whole life: llama.cpp's prompt cache
is not keyed by adapter, so changing the strength of a live server would reuse keys and values of another model.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from unstilted.engines import Generated, Request, Sampling
from unstilted.errors import UserError
from unstilted.rundir import usable_cores

UBATCH = 32
"""Tokens of one prompt computed at once. From 64 on llama.cpp's attention takes another path, so that answers would depend on which
tokens of which requests happened to meet."""


class EmbeddedEngine:
    """A GGUF model, with a GGUF LoRA at full strength when `adapter` is given."""

    def __init__(self, gguf: Path, adapter: Path | None, *, n_parallel: int, n_context: int, n_servers: int = 0) -> None:
        n_servers = n_servers or usable_cores()
        self.n_slots = max(1, n_parallel // n_servers)
        self.servers = [_server(gguf, adapter, self.n_slots, n_context) for _ in range(n_servers)]

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Generated]:
        """Answers as they end. Each request always goes to the same server, so results don't depend on timing."""
        pools = [ThreadPoolExecutor(self.n_slots) for _ in self.servers]
        try:
            futures = [
                pools[index % len(pools)].submit(_complete, self.servers[index % len(pools)], request, sampling)
                for index, request in enumerate(requests)
            ]
            for future in as_completed(futures):
                yield future.result()
        finally:
            for pool in pools:
                pool.shutdown(wait=True, cancel_futures=True)


def _server(gguf: Path, adapter: Path | None, n_slots: int, n_context: int) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_parallel, params.n_ctx = n_slots, n_slots * n_context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.slot_prompt_similarity, params.cache_ram_mib, params.n_cache_reuse = 0.0, 0, 0
    params.n_ubatch = UBATCH
    params.warmup, params.verbosity = False, -1
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return xllamacpp.Server(params)


def _complete(server: Any, request: Request, sampling: Sampling) -> Generated:
    answer = server.handle_completions(
        {
            "prompt": request.tokens,
            "n_predict": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "seed": request.seed,
            "cache_prompt": True,  # the template's beginning is the same in every request
        }
    )
    if "choices" not in answer:
        raise UserError(
            f"llama.cpp answered: {answer}.", where=f"respond, prompt '{request.key}'", do="Shorten that prompt or raise the context."
        )
    choice = answer["choices"][0]
    return Generated(
        request.key,
        choice["text"].strip(),
        answer["usage"]["completion_tokens"],
        "stop" if choice["finish_reason"] == "stop" else "length",
    )
