"""The places in a chat template where a user and an assistant speak, as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keeptune.errors import MethodError
from keeptune.method import IGNORED
from keeptune.methods._writing.whole_rows import Row

ASKED, ANSWERED = "QUESTION", "ANSWER"  # stand in for what is said, to find its place
Ids = list[int]


@dataclass(frozen=True)
class Turns:
    """What a chat template puts around a question and its answer.

    Attributes:
        head: Up to where the user speaks.
        between: From there to where the assistant speaks.
        end: What ends the assistant's turn.
        eos: Ids that end a turn too.
    """

    head: Ids
    between: Ids
    end: Ids
    eos: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, name: str) -> Turns:
        """Ask a tokenizer's template.

        Args:
            tokenizer: The model's.
            name: The method's, for the message.

        Raises:
            MethodError: There is no template, or it does not show what is said as it is.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise MethodError(
                f"The method {name!r} asks the model for chats, but its tokenizer has no chat "
                "template. Take an instruct model, or set `general: 0`."
            )
        messages = [
            {"role": "user", "content": ASKED},
            {"role": "assistant", "content": ANSWERED},
        ]
        asking = tokenizer.apply_chat_template(
            messages[:1], tokenize=False, add_generation_prompt=True
        )
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        head, _, between = asking.partition(ASKED)
        _, found, end = whole.rpartition(ANSWERED)
        if not (between and found and end.strip()):
            raise MethodError(
                f"The method {name!r} cannot see in the chat template where a turn ends. Give the "
                "tokenizer another chat template, or remove the method."
            )
        parts = [tokenizer.encode(t, add_special_tokens=False) for t in (head, between, end)]
        eos = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        # White space after the token that ends a turn is never generated.
        special = parts[2][0] in set(tokenizer.get_added_vocab().values())
        return cls(parts[0], parts[1], parts[2][:1] if special else parts[2], eos)

    def asked(self, ids: Ids) -> bool:
        """Whether the user has finished."""
        return ids[-1] == self.between[0] or ids[-1] in self.eos

    def answered(self, ids: Ids) -> bool:
        """Whether the assistant has finished."""
        return ids[-1] == self.end[0] or ids[-1] in self.eos

    def prompt(self, question: Ids) -> Ids:
        """Where the assistant speaks, after a question."""
        return [*self.head, *question, *self.between]

    def row(self, question: Ids, answer: Ids) -> Row:
        """A question and its answer as a row that learns the answer and its end."""
        prompt, learned = self.prompt(question), [*answer, *self.end]
        return Row(prompt + learned, [IGNORED] * len(prompt) + learned)
