"""Demonstration of kronjax on random matrices and on a small language model.

The package contains the language model (`model`), for uses without a network, and
`held_out` returns text to evaluate it on. Its data sheet is `model/README.md`.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kronjax.demo import corpus

if TYPE_CHECKING:
    from kronjax.lm.models.base import LanguageModel

MODEL = Path(__file__).parent / "model"
"""The folder of the bundled model."""


def model(dtype: str = "float32") -> "LanguageModel":
    """Return the bundled language model, a GPT-2 of two million parameters.

    Args:
        dtype: The dtype of the parameters, which are stored as float16.

    Returns:
        The model with its tokenizer.
    """
    from kronjax import lm

    return lm.load(MODEL, dtype=dtype)


def held_out() -> str:
    """Return text that the bundled model was not trained on.

    Raises:
        FileNotFoundError: If the sources of the standard library are not installed.
    """
    return corpus.held_out()


def run(
    out: Path, matrices: int = 20, seed: int = 0, *, as_json: bool = False
) -> dict[str, Any]:
    """Solve random matrices and compress the model; print tables and draw figures.

    Args:
        out: The folder for `matrices.png`, `language.png`, `report.html` and
            `report.json`; created if it is missing.
        matrices: Number of matrices.
        seed: Seed of the matrices.
        as_json: Print one JSON object instead of the tables.

    Returns:
        The numbers of both tables, as values that JSON holds.
    """
    from rich.console import Console

    from kronjax.demo import language
    from kronjax.demo import matrices as random
    from kronjax.io import atomic

    if matrices < 1:
        raise ValueError(f"--matrices must be at least 1; got {matrices}")
    out.mkdir(parents=True, exist_ok=True)
    atomic.check_output(out / "matrices.png", ".png")
    console = Console(highlight=False, markup=False, quiet=as_json)
    begun = time.perf_counter()
    with _spinner() as say:
        errors = random.run(say, matrices, seed)
    atomic.write(out / "matrices.png", random.figure(errors))
    console.print(random.table(errors))
    with _spinner() as say:
        rows = language.run(out, say)
    atomic.write(out / "language.png", language.figure(rows))
    console.print(language.table(rows))
    seconds = time.perf_counter() - begun
    console.print(
        f"{seconds:.0f} s. The figures are {out / 'matrices.png'} and "
        f"{out / 'language.png'}; {out / 'report.html'} shows the method and size of "
        "each layer of the planned model, and the reasons.",
        soft_wrap=True,
    )
    results = {
        "matrices": [random.plain(each) for each in errors],
        "language": [dataclasses.asdict(row) for row in rows],
        "seconds": seconds,
    }
    if as_json:
        print(json.dumps(results, allow_nan=False))
    return results


@contextlib.contextmanager
def _spinner() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the name of the next step and its seconds."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def say(step: str) -> None:
            for task in progress.tasks:
                progress.update(task.id, completed=1)
            progress.add_task(step, total=1)

        yield say
        for task in progress.tasks:
            progress.update(task.id, completed=1)
