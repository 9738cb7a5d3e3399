"""The `respond` stage: base, prompted base and tuned model answer the same held-out prompts with the same seeds."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path
from random import Random
from typing import Any

from pydantic import ValidationError

from unstilted.engines import Engine, Request, Sampling
from unstilted.errors import UserError
from unstilted.files import sha256
from unstilted.lm.chat import ChatTokens
from unstilted.models.gguf_files import write_lora_gguf
from unstilted.models.load import load_tokenizer
from unstilted.models.resolve import BaseModelFiles, resolve_model
from unstilted.progress import bar, say
from unstilted.recipe import Recipe, RespondTable, TrainTable
from unstilted.records import ARMS, Arm, Prompt, Response, parse_row, read_json_rows, write_jsonl
from unstilted.rundir import RunDir


def run(recipe: Recipe, run_dir: RunDir) -> dict[str, Any]:
    """Answer the prompts with all arms; writes `responses.jsonl`. Answers already written for the same weights are kept."""
    model = resolve_model(recipe.model, say)
    chat = ChatTokens(load_tokenizer(model), model.name)
    prompts = held_out_prompts(recipe)
    adapter = run_dir.require("adapter", "train")
    settings = recipe.respond.model_copy(update={"engine": engine_name(recipe.respond, model, recipe.train)})
    if (reason := _why_not_llama_cpp(model, recipe.train)) and model.gguf is not None and recipe.respond.engine == "auto":
        say(f"  Answers come from transformers: {reason}.")
    responses = []
    for arm in ARMS:
        requests = [_request(prompt, arm, chat, recipe) for prompt in prompts]
        journal = Journal(run_dir.file("answers") / f"{arm}-{_key(arm, settings, requests, model, adapter)}.jsonl")
        left = [request for request in requests if request.key not in journal.rows]
        if left:
            with _engine(arm, settings, model, adapter, requests) as engine:
                _answer(arm, engine, left, settings, {prompt.id: prompt for prompt in prompts}, journal)
        responses += [journal.rows[prompt.id] for prompt in prompts]
    write_jsonl(run_dir.file("responses.jsonl"), responses)
    return {"engine": settings.engine, "weights": _weights(settings, model), "n_prompts": len(prompts)}


def sources(recipe: Recipe) -> dict[str, str]:
    """Fingerprint of the prompts, which come from outside the run folder; raises UserError as `held_out_prompts` does."""
    if len(held_out_prompts(recipe)) < 2:
        raise UserError("one answer has no interval.", where="respond.n_prompts", do="Answer at least 2 prompts.")
    with _prompts_file(recipe.respond) as file:
        return {f"prompts: {recipe.respond.prompts}": sha256(file)}


def held_out_prompts(recipe: Recipe) -> list[Prompt]:
    """The prompts to answer, in file order.

    A row holds `prompt` as text or as messages that end with the user's; `id`, `category` and `topic` are optional. Raises UserError
    naming file and line for any other row and for an empty file.
    """
    settings = recipe.respond
    with _prompts_file(settings) as file:
        prompts = [_prompt(row, f"{file.stem}-{line}", f"{file.name} line {line}") for line, row in read_json_rows(file)]
        if not prompts:
            raise UserError("the file holds no prompts.", where=str(file), do="Put one JSON object with 'prompt' on each line.")
        if len({prompt.id for prompt in prompts}) < len(prompts):
            raise UserError("two rows have the same 'id'.", where=str(file), do="Give every prompt its own id, or none.")
    if not settings.n_prompts or settings.n_prompts >= len(prompts):
        return prompts
    kept = set(Random(recipe.seed).sample(range(len(prompts)), settings.n_prompts))
    return [prompt for index, prompt in enumerate(prompts) if index in kept]


def engine_name(settings: RespondTable, model: BaseModelFiles, train: TrainTable | None = None) -> str:
    """The engine that `auto` stands for; raises UserError when `embedded` is asked for a model that has no GGUF.

    train: how the tuned model is made; `embedded` is refused for what a GGUF LoRA can't hold, too.
    """
    reason = _why_not_llama_cpp(model, train)
    if settings.engine == "embedded" and reason:
        raise UserError(f"{reason}.", where="respond.engine", do='Set respond.engine = "transformers".')
    if settings.engine != "auto":
        return settings.engine
    return "transformers" if reason else "embedded"


def _why_not_llama_cpp(model: BaseModelFiles, train: TrainTable | None) -> str:
    if model.gguf is None:
        return "llama.cpp needs a GGUF file, and this model has none"
    if train is not None and train.tuning == "full":
        return 'llama.cpp has only adapters here, and train.tuning = "full" writes whole weights'
    return "llama.cpp can't run an adapter with train.dora" if train is not None and train.dora else ""


class Journal:
    """Answers of one arm, kept as they come: a killed run goes on behind the last whole line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Response] = {}
        if path.exists():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            for line in content[:whole].splitlines():
                with suppress(ValidationError):  # a damaged line costs one answer, which is written again
                    response = Response.model_validate_json(line)
                    self.rows[response.id] = response
            if whole < len(content):
                os.truncate(path, whole)

    @contextmanager
    def writing(self) -> Iterator["Journal"]:
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a", encoding="utf-8") as self.file:
            yield self
            self.file.flush()
            os.fsync(self.file.fileno())

    def add(self, response: Response) -> None:
        self.rows[response.id] = response
        self.file.write(response.model_dump_json() + "\n")
        self.file.flush()


def _answer(
    arm: Arm, engine: Engine, requests: Sequence[Request], settings: RespondTable, prompts: dict[str, Prompt], journal: Journal
) -> None:
    sampling = Sampling(settings.temperature, settings.top_p, settings.max_new_tokens, settings.top_k)
    seeds = {request.key: request.seed for request in requests}
    with bar("answers") as progress, journal.writing():
        task = progress.add_task(f"{arm:<9}", total=len(requests))
        for done in engine.generate(requests, sampling):
            prompt = prompts[done.key]
            journal.add(
                Response(
                    id=prompt.id,
                    arm=arm,
                    prompt=prompt.text,
                    category=prompt.category,
                    text=done.text,
                    n_tokens=done.n_tokens,
                    finish_reason=done.finish_reason,
                    seed=seeds[done.key],
                )
            )
            progress.advance(task)


def _request(prompt: Prompt, arm: Arm, chat: ChatTokens, recipe: Recipe) -> Request:
    messages = chat.under_system(recipe.respond.system_prompt, prompt.prompt) if arm == "prompted" else prompt.prompt
    digest = hashlib.sha256(f"{recipe.seed}\0{prompt.id}".encode()).digest()
    return Request(prompt.id, chat.prompt(messages), int.from_bytes(digest[:4]) >> 1)


def _key(arm: Arm, settings: RespondTable, requests: Sequence[Request], model: BaseModelFiles, adapter: Path) -> str:
    """Everything that an arm's answers depend on, and nothing else: a new adapter leaves the base's answers as they are."""
    engine = engine_name(settings, model)
    library = version("xllamacpp" if engine == "embedded" else "transformers")
    parts: list[Any] = [engine, library, model.fingerprint, settings.temperature, settings.top_p, settings.top_k, settings.max_new_tokens]
    parts.append([(request.key, request.tokens, request.seed) for request in requests])
    if arm == "tuned":
        parts += [sha256(adapter), settings.adapter_strength]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@contextmanager
def _engine(arm: Arm, settings: RespondTable, model: BaseModelFiles, adapter: Path, requests: Sequence[Request]) -> Iterator[Engine]:
    tuned = arm == "tuned"
    if engine_name(settings, model) == "transformers":
        from unstilted.engines.transformers import TransformersEngine

        yield TransformersEngine(model, adapter if tuned else None, settings.adapter_strength, n_parallel=settings.n_parallel)
        return
    from unstilted.engines.embedded import EmbeddedEngine

    n_context = max(len(request.tokens) for request in requests) + settings.max_new_tokens + 8
    lora = adapter.parent / "adapter.gguf" if tuned else None
    if lora is not None:
        write_lora_gguf(adapter, json.loads((model.folder / "config.json").read_text()), lora, settings.adapter_strength)
    assert model.gguf is not None
    yield EmbeddedEngine(model.gguf, lora, n_parallel=settings.n_parallel, n_context=n_context)


@contextmanager
def _prompts_file(settings: RespondTable) -> Iterator[Path]:
    if settings.prompts == "starter":
        with as_file(files("unstilted") / "data" / "starter" / "eval_prompts.jsonl") as file:
            yield file
    else:
        yield Path(settings.prompts).expanduser()


def _weights(settings: RespondTable, model: BaseModelFiles) -> str:
    """Which weights answer, in words: llama.cpp's differ a little from those that were trained."""
    if engine_name(settings, model) == "embedded" and model.gguf is not None:
        return f"{model.gguf.name} in llama.cpp, the adapter as a float32 GGUF LoRA at strength {settings.adapter_strength:g}"
    return f"{model.name} in transformers, the adapter at strength {settings.adapter_strength:g}"


def _prompt(row: object, default_id: str, where: str) -> Prompt:
    if not isinstance(row, dict) or "prompt" not in row:
        raise UserError("this row has no 'prompt'.", where=where, do='Each line needs {"prompt": ...}.')
    text = row["prompt"]
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    wanted = {"id": default_id, "prompt": messages} | {
        name: str(row[name]) for name in ("id", "category", "topic") if row.get(name) is not None
    }
    prompt = parse_row(wanted, Prompt, where)
    if prompt.prompt[-1].role != "user" or not prompt.text.strip():
        raise UserError("the prompt doesn't end with words of the user.", where=where, do="Let the last message be the user's.")
    return prompt
