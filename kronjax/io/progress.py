"""A progress bar on standard error for what may take long, and a clock.

>>> with bar(10, "scoring", wanted=False) as advance:
...     advance(4)
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Protocol

SILENCE = 30.0
"""Seconds between two lines where there is no terminal."""


class Advance(Protocol):
    """What `bar` yields."""

    def __call__(self, amount: int, text: str | None = None, /) -> None:
        """Tell how much work was just done, and what is being done now."""


@contextlib.contextmanager
def bar(
    total: int, text: str, *, unit: str = "tokens", wanted: bool | None = None
) -> Iterator[Advance]:
    """Yield a function to call with the amount of work that was just done.

    Args:
        total: All of the work.
        text: What is being done.
        unit: Of the work; the bar shows how much of it is done in a second.
        wanted: Whether to draw the bar. By default it is drawn on a terminal, once
            the work has taken two seconds; elsewhere a line tells now and then how far
            it is.
    """
    if wanted is False:
        yield lambda amount, text=None: None
        return
    if wanted is None and not sys.stderr.isatty():
        yield _lines(total, text, unit)
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
    drawn = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        transient=console.is_terminal,  # a file is left one line to say what was done
    )
    task = drawn.add_task(text, total=total, rate="")

    def advance(amount: int, text: str | None = None, /) -> None:
        drawn.update(task, advance=amount, description=text or None)
        speed = drawn.tasks[0].speed
        if speed:
            digits = ",.0f" if speed >= 10 else ".2g"
            drawn.update(task, rate=f"{speed:{digits}} {unit}/s")

    timer = threading.Timer(0 if wanted else 2, drawn.start)
    timer.start()
    try:
        yield advance
    finally:
        timer.cancel()
        timer.join()
        drawn.stop()


def _lines(total: int, what: str, unit: str) -> Advance:
    """Return what prints a line every `SILENCE` seconds at most."""
    done, last = 0, time.perf_counter()

    def advance(amount: int, text: str | None = None, /) -> None:
        nonlocal done, last
        done += amount
        if time.perf_counter() - last >= SILENCE:
            last = time.perf_counter()
            so_far = f"{text or what}; {done:,} of {total:,} {unit}"
            print(so_far, file=sys.stderr, flush=True)

    return advance


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note under `name` how many seconds were spent inside."""
    begun = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begun
