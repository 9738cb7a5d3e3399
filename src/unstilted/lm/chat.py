"""Conversations as tokens: what the model reads before its answer, and the tokens of the answer itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unstilted.errors import UserError
from unstilted.records import Message, Pair


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

    tokenizer: a transformers tokenizer with a chat template. Raises UserError when it has none, or when the template writes an
    answered conversation differently from the same conversation waiting for its answer.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("its tokenizer has no chat template.", where=name, do="Use an instruction-tuned model.")
        if tokenizer.eos_token_id is None:
            raise UserError("its tokenizer has no end-of-turn token.", where=name, do="Set `eos_token` in tokenizer_config.json.")
        self.tokenizer, self.name = tokenizer, name

    @property
    def end_of_turn(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the answer begins."""
        return self._ids(self._text(messages, waiting=True))

    def response(self, messages: Sequence[Message], answer: Message) -> list[int]:
        """Token ids of an answer in the place where the template puts it, its end-of-turn token included and nothing after."""
        before = self._text(messages, waiting=True)
        whole = self._text([*messages, answer], waiting=False)
        if not whole.startswith(before):
            raise UserError(
                "its chat template writes an answered conversation differently from one that waits for its answer, "
                "so prompt and response can't be told apart.",
                where=self.name,
                do="Use a model whose template keeps the beginning of a conversation as it is.",
            )
        ids = self._ids(whole[len(before) :])
        if self.end_of_turn not in ids:
            raise UserError(
                f"its chat template doesn't end an answer with {self.tokenizer.eos_token!r}, so the model could not learn to stop.",
                where=self.name,
                do="Set `eos_token` to the token that ends a turn.",
            )
        return ids[: len(ids) - ids[::-1].index(self.end_of_turn)]

    def pair(self, pair: Pair) -> TokenPair:
        return TokenPair(
            pair.id,
            self.prompt(pair.prompt),
            self.response(pair.prompt, pair.chosen[0]),
            self.response(pair.prompt, pair.rejected[0]),
        )

    def _text(self, messages: Sequence[Message], *, waiting: bool) -> str:
        for message in messages:
            forged = next((token for token in self.tokenizer.all_special_tokens if token in message.content), None)
            if forged is not None:
                raise UserError(
                    f"a message holds the model's special token {forged!r}: {message.content[:60]!r}.",
                    where=self.name,
                    do="Take it out of the text; it would end or forge a turn.",
                )
        rows = [message.model_dump() for message in messages]
        return str(self.tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=waiting))

    def _ids(self, text: str) -> list[int]:
        # The template has already written every special token, BOS included.
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
