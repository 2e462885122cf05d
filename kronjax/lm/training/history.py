"""What happened in a training, line by line: kept, drawn and summed up.

`metrics.jsonl` has a line for every step and one for every evaluation. A run that goes
on after an interruption forgets the lines after its checkpoint, which are written once
more.

>>> history = History()
>>> history.add({"step": 1, "loss": 2.0})
>>> history.steps[0]["loss"]
2.0
"""

import contextlib
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kronjax.io import atomic
from kronjax.io.json_values import jsonable
from kronjax.lm.evaluation import spectra

METRICS = "metrics.jsonl"
"""The lines."""

FIGURE = "loss.png"
"""Loss against steps."""

SUMMARY = "training.md"
"""A table of what came of it."""

RECORD = "training.json"
"""The same for machines."""

HELD_OUT = "held_out"
"""In the lines of evaluations: nats per held-out token."""

PEAKS = {  # dense products: FLOP/s in bfloat16 and in float32 in full
    "V100": (125e12, 15.7e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "H100": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "B200": (2250e12, 80e12),
    "TPU v4": (275e12, None),
    "TPU v5 lite": (197e12, None),
    "TPU v5p": (459e12, None),
    "TPU v6 lite": (918e12, None),
}
"""What devices reach by the data sheets of their makers, by a part of their names."""


def peak(device: str, precision: str) -> float | None:
    """Return the FLOP/s that a device could do, or None where that is not known.

    >>> peak("NVIDIA A100-SXM4-80GB", "bfloat16") / 1e12
    312.0
    """
    for name, (short, full) in PEAKS.items():
        if name in device:
            return short if precision == "bfloat16" else full
    return None


class History:
    """Lines of numbers, kept in a file if there is a folder.

    Attributes:
        lines: In order.
    """

    def __init__(
        self, folder: Path | None = None, *, until: int = 0, writes: bool = True
    ) -> None:
        """Begin, or go on.

        Args:
            folder: For `metrics.jsonl`, or None to keep lines in memory alone.
            until: The step to go on from; what comes after it is forgotten.
            writes: Whether lines are kept there by this process, and not by another.
        """
        self.lines: list[dict[str, Any]] = []
        self._file: io.TextIOBase | None = None
        if folder is None:
            return
        path = folder / METRICS
        if until and path.is_file():
            self.lines = [x for x in _read(path) if x["step"] <= until]
        if not writes:
            return
        atomic.write(path, "".join(map(_line, self.lines)).encode())
        # Line by line, for whoever looks on.
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        self.lines.append(dict(line))
        with self._explained():
            if self._file is not None:
                self._file.write(_line(line))

    def flush(self) -> None:
        """Have all lines on disk, before a checkpoint counts on them."""
        with self._explained():
            if self._file is not None:
                self._file.flush()
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # said before, or of no consequence
                self._file.close()
            self._file = None

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise type(error)(f"cannot write {METRICS}: {reason}") from error

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of steps."""
        return [line for line in self.lines if HELD_OUT not in line]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of evaluations."""
        return [line for line in self.lines if HELD_OUT in line]

    def best(self) -> dict[str, Any] | None:
        """Return the evaluation with the lowest loss, the first of several."""
        return min(self.evaluations, key=lambda x: x[HELD_OUT], default=None)


def figure(history: History) -> bytes:
    """Return a plot of the loss and of held-out loss against steps, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chart = Figure(figsize=(6, 3.4), layout="constrained")
    axes = chart.subplots()
    steps = history.steps
    places = [line["step"] for line in steps]
    for name, color in (("loss", "tab:gray"), ("next_token", "tab:blue")):
        values = [line[name] for line in steps if name in line]
        if values and (name != "loss" or values != [x["next_token"] for x in steps]):
            label = "loss" if name == "loss" else "next token"
            axes.plot(places, values, color=color, linewidth=0.8, label=label)
    tests = history.evaluations
    if tests:
        axes.plot(
            [line["step"] for line in tests],
            [line[HELD_OUT] for line in tests],
            "o-",
            color="tab:orange",
            label="held out",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    content = io.BytesIO()
    FigureCanvasAgg(chart).print_png(content)
    return content.getvalue()


def record(history: History, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what came of a training: facts, and numbers from its lines."""
    steps, tests = history.steps, history.evaluations
    speeds = sorted(line["tokens_per_second"] for line in steps[1:])
    shares = [line["utilisation"] for line in steps[1:] if "utilisation" in line]
    best = history.best()
    return {
        **facts,
        "steps": steps[-1]["step"] if steps else 0,
        "loss": steps[-1]["loss"] if steps else None,
        "held_out_before": tests[0][HELD_OUT] if tests else None,
        "held_out_after": tests[-1][HELD_OUT] if tests else None,
        "held_out_best": best and best[HELD_OUT],
        "best_step": best and best["step"],
        "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
        "utilisation": sorted(shares)[len(shares) // 2] if shares else None,
    }


def rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a record as words and values, for tables."""

    def loss(name):
        value = found.get(name)
        if value is None:
            return "not measured"
        return f"{value:.4f} nats, perplexity {math.exp(min(value, 700)):,.2f}"

    made = [
        ("steps", f"{found['steps']:,} of {found['asked_steps']:,}"),
        ("tokens", f"{found['steps'] * found['tokens_per_step']:,}"),
        ("parameters", f"{found['parameters']:,}, {found['trained']:,} trained"),
        ("teacher", found["teacher"] or "none"),
        ("held out, before", loss("held_out_before")),
        ("held out, after", loss("held_out_after")),
        ("held out, best", f"{loss('held_out_best')}, step {found['best_step']}"),
    ]
    if found["held_out_best"] is None:
        made.pop()
    if found["tokens_per_second"] is not None:
        made.append(("tokens/s", f"{found['tokens_per_second']:,.0f}"))
    if found["utilisation"] is not None:
        made.append(("model FLOP utilisation", f"{100 * found['utilisation']:.1f} %"))
    if found.get("held", 0) > found["parameters"]:
        made.append(("held, masked ones included", f"{found['held']:,}"))
    if found.get("analysis"):
        made.append(("norms and ranks", spectra.verdict(found["analysis"])))
    return [*made, ("ended", found["ended"])]


def write(history: History, found: Mapping[str, Any], folder: Path) -> None:
    """Write the figure, the table and the record into a folder."""
    table = "".join(f"| {name} | {value} |\n" for name, value in rows(found))
    text = f"# Training\n\n| | |\n|---|---|\n{table}\n![Loss]({FIGURE})\n"
    atomic.write(folder / SUMMARY, text.encode())
    content = json.dumps(jsonable(found), indent=1, allow_nan=False)
    atomic.write(folder / RECORD, content.encode() + b"\n")
    atomic.write(folder / FIGURE, figure(history))


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(jsonable(values), allow_nan=False) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, without one that was cut off."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            break
        lines.append(values)
    return lines
