"""A progress bar on standard error, and a timer.

>>> with bar(10, "scoring", wanted=False) as advance:
...     advance(4)
...     advance(0.5, "half of the fifth")
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Protocol

DELAY = 2.0
"""Seconds of work before a bar is drawn."""

SILENCE = 30.0
"""Seconds between two lines where standard error is not a terminal."""


class Advance(Protocol):
    """The function that `bar` yields."""

    def __call__(self, amount: float, text: str | None = None, /) -> None:
        """Report progress.

        Args:
            amount: Units of work done since the last call; 0 and fractions are allowed.
            text: Description of the current work; unchanged by default.
        """


@contextlib.contextmanager
def bar(
    total: float,
    text: str,
    *,
    unit: str | None = "tokens",
    wanted: bool | None = None,
    lines: bool = True,
) -> Iterator[Advance]:
    """Yield a function that reports progress.

    Args:
        total: Units of work in total.
        text: Description of the work.
        unit: Name of the units; the bar shows units per second, or no rate if None.
        wanted: Whether to draw the bar. By default it is drawn on a terminal after
            `DELAY` seconds.
        lines: Whether to print a line every `SILENCE` seconds by default where standard
            error is not a terminal.
    """
    if wanted is None and not sys.stderr.isatty():
        if lines:
            yield _printer(total, text, unit)
            return
        wanted = False
    if wanted is False:
        yield lambda amount, text=None: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        transient=console.is_terminal,  # a file keeps the last state as one line
    )
    task = progress.add_task(text, total=total, rate="")

    def advance(amount: float, text: str | None = None, /) -> None:
        progress.update(task, advance=amount, description=text or None)
        speed = progress.tasks[0].speed
        if speed and unit is not None:
            digits = ",.0f" if speed >= 10 else ".2g"
            progress.update(task, rate=f"{speed:{digits}} {unit}/s")

    timer = threading.Timer(0 if wanted else DELAY, progress.start)
    timer.start()
    try:
        yield advance
    finally:
        timer.cancel()
        timer.join()
        progress.stop()


def _printer(total: float, description: str, unit: str | None) -> Advance:
    """Return a function that prints at most one line every `SILENCE` seconds."""
    done, last = 0.0, time.perf_counter()

    def advance(amount: float, text: str | None = None, /) -> None:
        nonlocal done, last
        done += amount
        if time.perf_counter() - last >= SILENCE:
            last = time.perf_counter()
            count = f"{done:,.1f}".removesuffix(".0")
            line = f"{text or description}; {count} of {total:,} {unit or ''}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    return advance


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Store the seconds spent in the `with` block under `name`."""
    begun = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begun
