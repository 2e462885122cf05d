"""Conversations with a language model, on a terminal or from standard input."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kronjax.lm.models.base import LanguageModel

MAX_NEW_TOKENS = 512
"""Largest number of tokens of a reply, by default."""


def converse(
    model: "LanguageModel",
    *,
    prompt: str | None,
    system: str | None,
    max_new_tokens: int | None,
    quiet: bool,
    options: Mapping[str, Any],
) -> list[dict[str, str]]:
    """Reply to every turn of the user, and return the conversation.

    Args:
        model: A model whose tokenizer has a chat template.
        prompt: The only turn; None to read turns from standard input.
        system: A text before the first turn, or None.
        max_new_tokens: Largest number of tokens of a reply, which also ends where the
            positions of the model do; None for `MAX_NEW_TOKENS`.
        quiet: Whether to print no replies.
        options: Further options of `generate_tokens`.

    Raises:
        ValueError: If there is no chat template, no turn, or no position left for a
            reply: nothing of a conversation is dropped.
    """
    from kronjax.lm.models import base, generation
    from kronjax.lm.models.session import Session
    from kronjax.lm.text import chat
    from kronjax.lm.text.streaming import TextStream

    tokenizer = base.tokenizer_of(model)
    chat.choose(tokenizer.files)  # before the user writes anything
    stop = generation.stop_tokens(model, tokenizer, chat=True)
    most = MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    messages: list[dict[str, str]] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    given, session = len(messages), Session()
    for turn in _turns() if prompt is None else [prompt]:
        messages.append({"role": "user", "content": turn})
        tokens = generation.chat_tokens(tokenizer, messages)
        room = model.config.context - len(tokens)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(tokens)} tokens and the model "
                f"{model.config.context} positions, so that none is left for a reply; "
                "begin a new conversation"
            )
        printer = None if quiet else Printer(TextStream(tokenizer), stop)
        (new,) = generation.generate_tokens(
            model,
            [tokens],
            max_new_tokens=min(most, room),
            stop=stop,
            on_token=printer,
            session=session,
            **options,
        )
        if printer is not None:
            printer.end()
        if len(new) == min(most, room):
            why = "--max-new-tokens" if most <= room else "all positions are used"
            note = f"kronjax: the reply was cut after {len(new)} tokens ({why})"
            print(note, file=sys.stderr)
        messages.append({"role": "assistant", "content": tokenizer.decode(new)})
    if len(messages) == given:
        raise ValueError(
            "standard input is empty; give one turn for each line, or --prompt TEXT"
        )
    return messages


class Printer:
    """A function of new tokens that prints their text at once.

    Args:
        stream: A `TextStream` that decodes the tokens.
        stop: Tokens that are not printed.
        head: Text to print before the first token.
    """

    def __init__(self, stream: Any, stop: Sequence[int], head: str = "") -> None:
        """Store the arguments."""
        self._stream, self._stop, self._head = stream, stop, head

    def __call__(self, tokens: Sequence[int]) -> None:
        """Print the text that the first of the tokens completes."""
        text = "" if tokens[0] in self._stop else self._stream.add(tokens[0])
        self._print(text)

    def end(self) -> None:
        """Print what is left, and a newline."""
        self._print(self._stream.end() + "\n")

    def _print(self, text: str) -> None:
        print(self._head + text, end="", flush=True)
        self._head = ""


def _turns() -> Iterator[str]:
    """Yield the lines of standard input that are not blank."""
    if not sys.stdin.isatty():
        yield from filter(str.strip, (line.rstrip("\n") for line in sys.stdin))
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # which lets `input` edit and recall lines
    print("One turn for each line; Ctrl-D ends the conversation.", file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if line.strip():
            yield line
