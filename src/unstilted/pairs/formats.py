"""One row of somebody's preference data as a pair, or the reason why it is none.

The formats are TRL's: text or messages, with a prompt of its own or one that chosen and rejected begin with; and Anthropic's HH dialogues.
"""

import re
from typing import Any

from pydantic import ValidationError

from unstilted.errors import UserError
from unstilted.pairs.source import SourceRow
from unstilted.records import Message, Pair, parse_json

QUESTION_FIELDS = ("question", "instruction", "query", "input")
"""Names other formats give to the prompt; with one of them present, a prompt is never guessed from the answers' beginnings."""

SHAREGPT = "ShareGPT: write [{'role': ..., 'content': ...}] for 'from' and 'value', and give a 'prompt', a 'chosen' and a 'rejected'"
OTHER_FORMATS: tuple[tuple[set[str], str], ...] = (
    (
        {"completion", "label"},
        "TRL's unpaired (KTO) format: join a liked and a disliked completion of one prompt as 'chosen' and 'rejected'",
    ),
    ({"conversations"}, SHAREGPT),
    *(
        ({field, "chosen", "rejected"}, f"a preference file with another name for the prompt: rename '{field}'")
        for field in QUESTION_FIELDS
    ),
    ({"response_0", "response_1"}, "two ranked responses: put the better one in 'chosen' and the other in 'rejected'"),
    ({"response_j", "response_k"}, "two ranked responses: put response_j in 'chosen' and response_k in 'rejected'"),
    ({"question", "response"}, "questions with one response each: add a second response and name them 'chosen' and 'rejected'"),
    ({"instruction", "output"}, "Alpaca, with one output each: add a second output and name them 'chosen' and 'rejected'"),
    ({"prompt", "completion"}, "prompts with one completion each: add a second one and name them 'chosen' and 'rejected'"),
    ({"messages"}, "conversations with one answer each: put the last message in 'chosen', a dispreferred one in 'rejected'"),
)


class Unusable(Exception):
    """Why a row is no pair; it never leaves the stage."""

    def __init__(self, reason: str, hint: str = "") -> None:
        self.reason, self.hint = reason, hint
        super().__init__(reason)


def parse_pair(row: SourceRow) -> Pair:
    fields = _object(row)
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise _missing(name, fields)
        if fields[name] is None or not (fields[name].strip() if isinstance(fields[name], str) else fields[name]):
            raise Unusable(f"'{name}' is empty")
    try:
        prompt, chosen, rejected = _conversation(fields)
        _require_prompt(prompt, fields)
        _require_one_answer(chosen, "chosen")
        _require_one_answer(rejected, "rejected")
        if chosen[0].content.strip() == rejected[0].content.strip():
            raise Unusable("'chosen' and 'rejected' are the same")
        return Pair(
            id=_label(fields, "id") or f"{row.stem}-{row.number}",
            prompt=tuple(prompt),
            category=_label(fields, "category"),
            topic=_label(fields, "topic"),
            chosen=tuple(chosen),
            rejected=tuple(rejected),
            source=row.source,
        )
    except ValidationError as error:
        raise Unusable(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def _require_prompt(prompt: list[Message], fields: dict[str, Any]) -> None:
    if not prompt and fields.get("prompt") is None:
        raise _missing("prompt", fields)
    if not prompt or (prompt[-1].role == "user" and not prompt[-1].content.strip()):
        raise Unusable("'prompt' is empty")
    if prompt[-1].role != "user":
        raise Unusable("the prompt's last message isn't the user's")


def _require_one_answer(messages: list[Message], field: str) -> None:
    if len(messages) != 1:
        raise Unusable(f"'{field}' holds {len(messages)} messages after the prompt, not one")
    if messages[0].role != "assistant":
        raise Unusable(f"'{field}' is a {messages[0].role} message, not the assistant's")
    if not messages[0].content.strip():
        raise Unusable(f"'{field}' is empty")


def _object(row: SourceRow) -> dict[str, Any]:
    value = row.value
    if isinstance(value, bytes):
        try:
            value = parse_json(value.decode("utf-8-sig"), row.source)
        except UnicodeDecodeError:
            raise Unusable("this is not UTF-8 text") from None
        except UserError:
            raise Unusable("this is not JSON") from None
    if not isinstance(value, dict):
        raise Unusable("this is not a JSON object")
    return value


def _missing(name: str, fields: dict[str, Any]) -> Unusable:
    found = ", ".join([repr(field)[:40] for field in fields][:12] + ["..."] * (len(fields) > 12))
    hint = next((hint for known, hint in OTHER_FORMATS if known <= set(fields)), "")
    return Unusable(f"'{name}' is missing (found: {found or 'nothing'})", hint)


def _label(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Unusable(f"'{name}' is {_kind(value)}, not text")
    return str(value)


def _conversation(fields: dict[str, Any]) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt, chosen and rejected as messages, whichever way the row spells them."""
    prompt, chosen, rejected = (fields.get(name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str) and not (_is_dialogue(chosen) and _is_dialogue(rejected)):
        return _from_text(fields, chosen, rejected)
    answers = _messages(chosen, "chosen"), _messages(rejected, "rejected")
    given = _messages(prompt, "prompt") if prompt is not None else []
    if isinstance(prompt, list):
        repeated = len(given) if all(answer[: len(given)] == given for answer in answers) else 0
        return given, answers[0][repeated:], answers[1][repeated:]
    # As in TRL, a prompt given as text gives way to the messages that both sides begin with.
    n = _n_shared(*answers)
    return answers[0][:n] or given, answers[0][n:], answers[1][n:]


def _n_shared(chosen: list[Message], rejected: list[Message]) -> int:
    """Messages that both sides begin with; at least one is left over on each side."""
    limit = max(min(len(chosen), len(rejected)) - 1, 0)
    return next((n for n in range(limit) if chosen[n] != rejected[n]), limit)


def _from_text(fields: dict[str, Any], chosen: str, rejected: str) -> tuple[list[Message], list[Message], list[Message]]:
    prompt = fields.get("prompt")
    if prompt is None:
        if any(name in fields for name in QUESTION_FIELDS):
            raise _missing("prompt", fields)
        n = _n_shared_characters(chosen, rejected)
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    answers = [[Message(role="assistant", content=text.strip())] for text in (chosen, rejected)]
    return _messages(prompt, "prompt"), answers[0], answers[1]


def _n_shared_characters(chosen: str, rejected: str) -> int:
    """Characters both sides begin with, back to a space. TRL may cut inside a word ("b|lue", "b|right"); here words stay whole."""
    shared = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    space = re.search(r"\s\S*$", chosen[:shared])
    return space.start() if space else 0


def _messages(value: object, field: str) -> list[Message]:
    if isinstance(value, list):
        return [_message(item, field) for item in value]
    if not isinstance(value, str):
        raise Unusable(f"'{field}' is {_kind(value)}, neither text nor a list of messages", _hint_at(value))
    if _is_dialogue(value):
        return _dialogue(re.sub(r"\s*Assistant:\s*$", "", value) if field == "prompt" else value)
    return [Message(role="user" if field == "prompt" else "assistant", content=value.strip())] if value.strip() else []


def _message(value: object, field: str) -> Message:
    if not isinstance(value, dict) or not {"role", "content"} <= set(value):
        raise Unusable(f"'{field}' holds something else than messages with 'role' and 'content'", _hint_at(value))
    role, content = value["role"], value["content"]
    if role not in ("system", "user", "assistant"):
        raise Unusable(f"'{field}' has a message of role {repr(role)[:30]}; only system, user and assistant are known")
    if not isinstance(content, str):
        raise Unusable(f"'{field}' has a message whose content is {_kind(content)}, not text")
    return Message(role=role, content=content)


def _hint_at(value: object) -> str:
    return SHAREGPT if isinstance(value, dict) and {"from", "value"} <= set(value) else ""


def _is_dialogue(text: str) -> bool:
    """Whether this is written as in Anthropic's HH data."""
    return bool(re.match(r"\s*Human:", text)) and "\n\nAssistant:" in text


def _dialogue(text: str) -> list[Message]:
    _, *turns = re.split(r"(?:^|\n\n)(Human|Assistant):", "\n\n" + text.strip())
    return [
        Message(role="user" if speaker == "Human" else "assistant", content=words.strip())
        for speaker, words in zip(turns[::2], turns[1::2], strict=True)
    ]


def _kind(value: object) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), type(value).__name__)
