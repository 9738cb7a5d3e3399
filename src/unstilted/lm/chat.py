"""Conversations as tokens: what the model reads before its answer, and the tokens of the answer itself."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError

from unstilted.errors import UserError
from unstilted.records import Message, Pair

DATE = "26 Jul 2024"
"""The day that Llama 3's templates write into every prompt by default. Those of 3.2 take today's unless they are told one: then cached
and resumed work would not fit the prompts of the next day."""


@dataclass(frozen=True)
class TokenPair:
    """A pair as token ids. Each response ends with the end-of-turn token."""

    id: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def n_tokens(self) -> int:
        """Tokens of the longer of the two conversations."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class ChatTokens:
    """Splits templated conversations into prompt and response so that no token spans the boundary.

    tokenizer: a transformers tokenizer with a chat template. Raises UserError when it has none; its methods raise UserError for a
    template that can't be split, drops words or ends an answer with nothing to stop on, and for words that hold a special token.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("its tokenizer has no chat template.", where=name, do="Use an instruction-tuned model.")
        self.tokenizer, self.name = tokenizer, name
        # Not `all_special_tokens`: that lists those with a role of their own, of Llama 3 neither <|eot_id|> nor <|start_header_id|>.
        self._special: dict[str, int] = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}

    @property
    def end_of_turn(self) -> int:
        """Id of the token that the template writes after an answer: generation must stop on it. Often it isn't `eos_token`."""
        return self._special[self._end]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the answer begins."""
        return self._ids(self._waiting(messages))

    def response(self, messages: Sequence[Message], answer: Message) -> list[int]:
        """Token ids of an answer in the place where the template puts it, its end-of-turn token included and nothing after."""
        before = self._waiting(messages)
        return self._response(messages, before, self._ids(before), answer)

    def under_system(self, text: str, messages: Sequence[Message]) -> list[Message]:
        """The conversation under this system prompt; where the template takes none (Gemma), its text opens the first user message."""
        rest = [message for message in messages if message.role != "system"]
        told = [Message(role="system", content=text), *rest]
        try:
            self._waiting(told)
        except UserError:
            return [Message(role="user", content=f"{text}\n\n{rest[0].content}"), *rest[1:]]
        return told

    def pair(self, pair: Pair) -> TokenPair:
        """Both responses of a pair as `response` gives them."""
        before = self._waiting(pair.prompt)
        prompt = self._ids(before)
        chosen, rejected = (self._response(pair.prompt, before, prompt, answer) for answer in (pair.chosen[0], pair.rejected[0]))
        return TokenPair(pair.id, prompt, chosen, rejected)

    def _response(self, messages: Sequence[Message], before: str, prompt: list[int], answer: Message) -> list[int]:
        self._refuse_special([answer])
        after = self._cut(before, self._text([*messages, answer], waiting=False))
        text = "".join(after.partition(self._end)[:2])  # no answer holds a special token, so the first is the template's
        if answer.content.strip() not in text:
            raise UserError(
                f"its chat template leaves out a part of this answer: {answer.content[:60]!r}.",
                where=self.name,
                do="Take what the template treats specially (such as `<think>` blocks) out of the answer.",
            )
        ids = self._ids_after(before, prompt, text)
        if ids.count(self.end_of_turn) != 1 or ids[-1] != self.end_of_turn:
            raise UserError(
                f"its tokenizer doesn't read {self._end!r} exactly once, at the end of this answer: {answer.content[:60]!r}.",
                where=self.name,
                do="Let the template write that token after every answer, and add it with single_word = false and normalized = false.",
            )
        return ids

    def _waiting(self, messages: Sequence[Message]) -> str:
        """The text up to where the answer begins, with everything in it that system and user said."""
        self._refuse_special(messages)
        text = self._text(messages, waiting=True)
        for message in messages:
            if message.role != "assistant" and message.content.strip() not in text:
                raise UserError(
                    f"its chat template leaves out this {message.role} message: {message.content[:60]!r}.",
                    where=self.name,
                    do="Use a model whose template keeps it; a system message's text can go into the first user message instead.",
                )
        return text

    @cached_property
    def _end(self) -> str:
        """The first special token that the template writes after an answer, seen from two answers that differ in every letter."""
        asked = [Message(role="user", content="0")]
        before = self._text(asked, waiting=True)
        answered = [self._cut(before, self._text([*asked, Message(role="assistant", content=digit)], waiting=False)) for digit in "01"]
        head, tail = commonprefix(answered), commonprefix([text[::-1] for text in answered])[::-1]  # noqa: RUF071 (no paths, letters)
        if head.strip() and before == self._text(asked, waiting=False):
            raise UserError(
                f"its chat template has no generation prompt, so the model would have to write {head!r} itself before every answer.",
                where=self.name,
                do="Let the template write it when `add_generation_prompt` is set.",
            )
        found = min(((tail.index(token), token) for token in self._special if token in tail), default=None)
        if found is None:
            raise UserError(
                f"its chat template doesn't end an answer with a special token but with {tail!r}, so the model could not learn to stop.",
                where=self.name,
                do="Use a template that writes one, and have that token marked as special in tokenizer_config.json.",
            )
        return found[1]

    def _cut(self, before: str, whole: str) -> str:
        if not whole.startswith(before):
            raise UserError(
                "its chat template writes an answered conversation differently from one that waits for its answer, "
                "so prompt and response can't be told apart.",
                where=self.name,
                do="Use a model whose template keeps the beginning of a conversation as it is. Where only a system message is treated "
                "so (Mistral-Nemo), put its text into the user's message.",
            )
        return whole[len(before) :]

    def _text(self, messages: Sequence[Message], *, waiting: bool) -> str:
        rows = [message.model_dump() for message in messages]
        try:
            return str(self.tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=waiting, date_string=DATE))
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise UserError(
                f"its chat template refuses a conversation of {roles}: {str(error).rstrip('.')}.",
                where=self.name,
                do="Put a system message's text into the first user message, and let user and assistant take turns, the user first.",
            ) from None

    def _refuse_special(self, messages: Sequence[Message]) -> None:
        for message in messages:
            forged = next((token for token in self._special if token in message.content), None)
            if forged is not None:
                raise UserError(
                    f"a message holds the model's special token {forged!r}: {message.content[:60]!r}.",
                    where=self.name,
                    do="Take it out of the text; it would end or forge a turn.",
                )

    def _ids(self, text: str) -> list[int]:
        # The template has already written every special token, BOS included.
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ids_after(self, before: str, prompt: list[int], text: str) -> list[int]:
        # A piece tokenized alone isn't what it is in its place: SentencePiece-like tokenizers write a space before it. So the whole is
        # tokenized, and what follows the prompt's tokens is taken. Only where a token of the whole reaches over the boundary (a
        # prompt ending and an answer beginning with a newline) the piece is tokenized alone, without that space: when the model
        # answers, the prompt is already tokens, so the joint one can't occur.
        whole = self._ids(before + text)
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        return list(self._without_prefix_space.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _without_prefix_space(self) -> Any:
        from tokenizers import Tokenizer

        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                "its tokenizer joins the end of the prompt and the beginning of the answer in one token, and has no tokenizer.json.",
                where=self.name,
                do="Save the model's tokenizer in the fast format.",
            )
        state = json.loads(backend.to_str())
        for step in ("normalizer", "pre_tokenizer"):
            state[step] = _without_prefix_space(state[step])
        return Tokenizer.from_str(json.dumps(state | {"truncation": None, "padding": None}))


def _without_prefix_space(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer of tokenizer.json, changed so that it writes no space before its text."""
    if step is None or step["type"] == "Prepend":
        return None
    changes = {"prepend_scheme": "never", "add_prefix_space": False}
    changed = step | {name: value for name, value in changes.items() if name in step}
    for parts in ("normalizers", "pretokenizers"):
        if parts in step:
            changed[parts] = [part for part in map(_without_prefix_space, step[parts]) if part is not None]
    return changed
