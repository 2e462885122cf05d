"""Named protocols of perplexities: the windows of a long text, and the mean over them.

    exp( Σ_windows Σ_i nll_i / Σ_windows Σ_i 1 )        average "tokens"
    exp( mean over windows of the mean of nll_i )       average "windows"

Perplexities under different protocols cannot be compared: the documentation of
transformers has 19.44 and 16.45 for one model on one text at strides 1024 and 512.

In all protocols here, the text is tokenised as a whole, with the tokens that its
tokenizer puts around a text; rows are joined by blank lines
(`kronjax.lm.text.documents`); and the first token of a window is read but not scored
there. For a model with a smaller context, windows and strides shrink in proportion.

References: Frantar et al. (2023) for GPTQ; Ben Ayad et al. (2024) for Krony-PT; the
page on perplexity in the documentation of transformers for strides.

>>> [(w.begin, w.first, w.end) for w in PROTOCOLS["hf-strided"].windows(1200, 1024)]
[(0, 1, 1024), (512, 1024, 1200)]
"""

import dataclasses
import difflib
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Window:
    """Part of a text: the tokens `begin:end` are read, `first:end` are scored."""

    begin: int
    first: int
    end: int

    @property
    def scored(self) -> int:
        """Number of tokens scored."""
        return self.end - self.first


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A way to compute a perplexity.

    Attributes:
        name: Name of the protocol in reports.
        version: Version, which grows when the same name stands for different numbers.
        context: Number of tokens in a window.
        stride: Number of tokens from one window to the next; each window scores the
            tokens that no earlier window has scored.
        average: `"tokens"` for the mean over tokens, `"windows"` for the mean over the
            means of windows.
        remainder: Treatment of an incomplete last window: `"score"` or `"drop"`.
        description: Description in words.
    """

    name: str
    version: int
    context: int
    stride: int
    average: Literal["tokens", "windows"]
    remainder: Literal["score", "drop"]
    description: str = dataclasses.field(repr=False)

    def fitted(self, context: int) -> "Protocol":
        """Return the protocol for a model whose context may be smaller."""
        if context >= self.context:
            return self
        stride = max(self.stride * context // self.context, 1)
        return dataclasses.replace(self, context=context, stride=stride)

    def windows(self, tokens: int, context: int) -> list[Window]:
        """Cut a text into windows.

        Args:
            tokens: Number of tokens in the text.
            context: Largest number of positions of the model.

        Returns:
            The windows in which tokens are scored, in order.
        """
        size, stride = (fitted := self.fitted(context)).context, fitted.stride
        windows, scored = [], 0
        for begin in range(0, tokens, stride):
            end = min(begin + size, tokens)
            if end - begin < size and self.remainder == "drop":
                break
            first = max(scored, begin + 1)
            if first < end:
                windows.append(Window(begin, first, end))
            scored = end
            if end == tokens:
                break
        return windows


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "krony-pt",
            1,
            context=1024,
            stride=1024,
            average="windows",
            remainder="score",
            description="windows of 1024 side by side; mean of the means of windows, "
            "in which a shorter last window counts as much as the others",
        ),
        Protocol(
            "gptq-2048",
            1,
            context=2048,
            stride=2048,
            average="tokens",
            remainder="drop",
            description="windows of 2048 side by side, an incomplete last one dropped; "
            "mean over tokens",
        ),
        Protocol(
            "hf-strided",
            1,
            context=1024,
            stride=512,
            average="tokens",
            remainder="score",
            description="windows of 1024 every 512 tokens; every token but the first "
            "is scored once, in the first window that holds it; mean over tokens",
        ),
    )
}
"""The protocols by name."""


def find(name: str) -> Protocol:
    """Return a protocol by its name.

    Raises:
        ValueError: If the name is unknown; the message lists the known ones.
    """
    if name not in PROTOCOLS:
        close = difflib.get_close_matches(name, PROTOCOLS, n=1)
        guess = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"no protocol {name!r}; there are {', '.join(PROTOCOLS)}{guess}"
        )
    return PROTOCOLS[name]
