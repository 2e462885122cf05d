"""The metrics of a training: a line per step and evaluation, a figure and a table.

`metrics.jsonl` has a line for every step and one for every evaluation. A resumed run
discards the lines after its checkpoint and writes them again.

>>> history = History()
>>> history.add({"step": 1, "loss": 2.0})
>>> history.steps[0]["loss"]
2.0
"""

import contextlib
import html
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
"""File of the lines, one JSON object each."""

FIGURE = "loss.png"
"""File of the plot of the loss against steps."""

SUMMARY = "training.md"
"""File of the table of results."""

RECORD = "training.json"
"""File of the record as JSON."""

HELD_OUT = "held_out"
"""Key of the loss in lines of evaluations: nats per held-out token."""

PEAKS = {  # FLOP/s of dense products in bfloat16 and in full float32
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
"""Peak speeds of devices by their data sheets, keyed by a part of their names."""


def peak(device: str, precision: str) -> float | None:
    """Return the peak FLOP/s of a device, or None if it is unknown.

    >>> peak("NVIDIA A100-SXM4-80GB", "bfloat16") / 1e12
    312.0
    """
    for name, (short, full) in PEAKS.items():
        if name in device:
            return short if precision == "bfloat16" else full
    return None


class History:
    """Lines of metrics, written to a file if there is a folder.

    Attributes:
        lines: The lines of steps and evaluations, in order.
    """

    def __init__(
        self, folder: Path | None = None, *, until: int = 0, writes: bool = True
    ) -> None:
        """Start a history, or continue the one in a folder.

        Args:
            folder: Folder of `metrics.jsonl`, or None to keep lines only in memory.
            until: Step to resume from; later lines are discarded.
            writes: Whether this process writes the file, and not another one.
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
        # Buffered by line, so that the file can be followed while it grows.
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        self.lines.append(dict(line))
        with self._explained():
            if self._file is not None:
                self._file.write(_line(line))

    def flush(self) -> None:
        """Write all lines to disk, before a checkpoint relies on them."""
        with self._explained():
            if self._file is not None:
                self._file.flush()
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # already reported, or harmless
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
        """Return the first evaluation with the lowest loss, or None."""
        return min(self.evaluations, key=lambda x: x[HELD_OUT], default=None)

    def __repr__(self) -> str:
        """Return the first and the last loss of steps and evaluations."""
        lines = [f"{len(self.steps):,} steps, {len(self.evaluations):,} evaluations"]
        best = self.best()
        for name, key, part in (
            ("loss", "loss", self.steps),
            ("held out", HELD_OUT, self.evaluations),
        ):
            if part:
                first, last = part[0][key], part[-1][key]
                lines.append(f"{name}: {first:.4f} -> {last:.4f} nats per token")
        if best is not None:
            lines[-1] += f", lowest {best[HELD_OUT]:.4f} at step {best['step']:,}"
        return "\n".join(lines)


def figure(history: History) -> bytes:
    """Return a PNG plot of the training and held-out losses against steps."""
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
    """Return the record of a training: facts, and a summary of its lines."""
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


def rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the names and values of a table of a record."""

    def loss(name):
        value = record.get(name)
        if value is None:
            return "not measured"
        return f"{value:.4f} nats, perplexity {math.exp(min(value, 700)):,.2f}"

    table = [
        ("steps", f"{record['steps']:,} of {record['asked_steps']:,}"),
        ("tokens", f"{record['steps'] * record['tokens_per_step']:,}"),
        ("parameters", f"{record['parameters']:,}, {record['trained']:,} trained"),
        ("teacher", record["teacher"] or "none"),
        ("held out, before", loss("held_out_before")),
        ("held out, after", loss("held_out_after")),
        ("held out, best", f"{loss('held_out_best')}, step {record['best_step']}"),
    ]
    if record["held_out_best"] is None:
        table.pop()
    if record["tokens_per_second"] is not None:
        table.append(("tokens/s", f"{record['tokens_per_second']:,.0f}"))
    if record["utilisation"] is not None:
        table.append(("model FLOP utilisation", f"{100 * record['utilisation']:.1f} %"))
    if record.get("held", 0) > record["parameters"]:
        table.append(("stored, including masked", f"{record['held']:,}"))
    if record.get("analysis"):
        table.append(("norms and ranks", spectra.verdict(record["analysis"])))
    return [*table, ("ended", record["ended"])]


def html_table(record: Mapping[str, Any]) -> str:
    """Return the table of a record as HTML."""
    cells = (
        f"<tr><th style='text-align: left'>{html.escape(name)}</th>"
        f"<td style='text-align: left'>{html.escape(value)}</td></tr>"
        for name, value in rows(record)
    )
    return f"<table>{''.join(cells)}</table>"


def write(history: History, record: Mapping[str, Any], folder: Path) -> None:
    """Write the figure, the table and the record into a folder."""
    table = "".join(f"| {name} | {value} |\n" for name, value in rows(record))
    text = f"# Training\n\n| | |\n|---|---|\n{table}\n![Loss]({FIGURE})\n"
    atomic.write(folder / SUMMARY, text.encode())
    content = json.dumps(jsonable(record), indent=1, allow_nan=False)
    atomic.write(folder / RECORD, content.encode() + b"\n")
    atomic.write(folder / FIGURE, figure(history))


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(jsonable(values), allow_nan=False) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file up to the first truncated one."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            break
        lines.append(values)
    return lines
