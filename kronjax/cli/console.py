"""Messages that commands print."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kronjax.io.atomic import printable
from kronjax.io.notes import Note

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@contextlib.contextmanager
def notes_in_lines() -> Iterator[None]:
    """Print every note once, as one line on standard error, while this is open."""
    with warnings.catch_warnings():
        show, told = warnings.showwarning, set()

        def tell(message, category, *args, **kwargs):
            if not issubclass(category, Note):
                show(message, category, *args, **kwargs)
            elif str(message) not in told:
                told.add(str(message))
                print(f"kronjax: {printable(str(message))}", file=sys.stderr)

        warnings.showwarning = tell
        warnings.simplefilter("always", Note)
        yield


def widen(console: "Console", table: "Table") -> None:
    """Give a console at least the width that a table needs.

    A line that a terminal wraps is better than one without its last digits.
    """
    wide = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(table, options=wide).minimum)


def one_line(error: Exception) -> str:
    """Return the message of an error on one line, with the file of a system error."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
        if error.filename:
            text = f"{error.filename}: {text}"
    return printable(" ".join(text.split())).rstrip(".")
