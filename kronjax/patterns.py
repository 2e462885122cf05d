"""Patterns of the names of layers, as in a shell.

`*` is any text and `?` any character, `{fc,proj}` one of several, `{0..5}` a number in
a range, `{odd}` and `{even}` the numbers of blocks, `{early}`, `{middle}` and `{late}`
a third of them.
"""

import difflib
import re
from collections.abc import Iterable

Patterns = str | tuple[str, ...]


def matching(patterns: str | Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the names that any of the patterns matches, in their order.

    >>> matching("h.{early}.*", ["h.0.fc", "h.1.fc", "h.2.fc", "lm_head"])
    ['h.0.fc']

    Raises:
        ValueError: If a pattern matches none of them.
    """
    names = list(names)
    patterns = as_tuple(patterns)
    expressions = [compiled(pattern, names) for pattern in patterns]
    for pattern, expression in zip(patterns, expressions, strict=True):
        if not any(map(expression.fullmatch, names)):
            raise ValueError(unused(pattern, expression, names))
    return [name for name in names if any(x.fullmatch(name) for x in expressions)]


def compiled(patterns: Iterable[str], names: Iterable[str]) -> re.Pattern[str]:
    """Return patterns as one regular expression; without any it matches nothing.

    Args:
        patterns: A pattern, or several.
        names: Names of all layers, by which blocks are counted.
    """
    numbers = [
        int(part) for name in names for part in name.split(".") if part.isdigit()
    ]
    blocks = max(numbers, default=-1) + 1
    text = "|".join(_translate(pattern, blocks) for pattern in as_tuple(patterns))
    # Names of tensors may contain line ends.
    return re.compile(text if as_tuple(patterns) else "(?!)", re.DOTALL)


def as_tuple(patterns: Iterable[str]) -> tuple[str, ...]:
    """Return patterns as a tuple, a single one too."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _translate(pattern: str, blocks: int) -> str:
    third = range(0, blocks + 1)
    first, second = (round(blocks * k / 3) for k in (1, 2))
    words = {
        "odd": third[1:blocks:2],
        "even": third[0:blocks:2],
        "early": third[:first],
        "middle": third[first:second],
        "late": third[second:blocks],
    }
    parts = []
    for token in re.findall(r"\{[^{}]*\}|.", pattern, re.DOTALL):
        if token == "*":
            parts.append(".*")
        elif token == "?":
            parts.append(".")
        elif not token.startswith("{"):
            parts.append(re.escape(token))
        else:
            inside = token[1:-1]
            numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
            if numbers:
                low, high = map(int, numbers.groups())
                options = [str(i) for i in range(low, min(high, blocks) + 1)]
            elif inside in words:
                options = [str(i) for i in words[inside]]
            else:
                options = [_translate(word, blocks) for word in inside.split(",")]
            parts.append(f"(?:{'|'.join(options)})" if options else "(?!)")
    return "".join(parts)


def unused(match: Patterns, expression: re.Pattern[str], names: Iterable[str]) -> str:
    """Return why a rule decides nothing: it matches no name, or only decided ones.

    Args:
        match: The pattern of the rule, or several.
        expression: The same, from `compiled`.
        names: Names of all layers.
    """
    names = list(names)
    if any(expression.fullmatch(name) or name in as_tuple(match) for name in names):
        return (
            f"the rule for {match} decides nothing: rules before it match all of its "
            "layers, or they are ignored; put it before them"
        )
    close = difflib.get_close_matches("".join(as_tuple(match)[:1]), names, 3, 0.3)
    hint = f"layers are named like {', '.join(close or names[:3])}"
    return f"the rule for {match} matches no layer; {hint}"
