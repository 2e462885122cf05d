"""What came of a plan so far: a table, a figure, and values that JSON holds.

Made of what a store holds and of nothing else, at any moment of a run.
"""

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table

from kronjax.io.atomic import printable
from kronjax.runs import plan
from kronjax.runs.plan import MatrixTask, RunPlan
from kronjax.runs.store import FAILED, SOLVED, Store

FIGURE = "report.png"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A plan with the records of what is finished.

    Attributes:
        plan: All that was to be done.
        records: By index.
    """

    plan: RunPlan
    records: Mapping[int, Mapping[str, Any]]

    @classmethod
    def of(cls, store: Store) -> "Outcome":
        """Read all records of a store."""
        return cls(store.plan, store.records(store.plan.tasks))

    @property
    def failed(self) -> list[tuple[MatrixTask, str]]:
        """What stays dense, and why."""
        return [
            (task, self.records[task.index]["reason"])
            for task in self.plan.tasks
            if self._status(task) == FAILED
        ]

    @property
    def solved(self) -> list[tuple[MatrixTask, Mapping[str, Any]]]:
        """What has factors, with its records."""
        return [
            (task, self.records[task.index])
            for task in self.plan.tasks
            if self._status(task) == SOLVED
        ]

    @property
    def parameters(self) -> int:
        """Of the whole model, what is finished in its new form."""
        return self.plan.parameters - sum(x.size - x.parameters for x, _ in self.solved)

    def plain(self) -> dict[str, Any]:
        """Return everything as values that JSON holds."""
        return {
            "source": self.plan.source,
            "plan": self.plan.hash,
            "settings": dataclasses.asdict(self.plan.settings),
            "before": {"parameters": self.plan.parameters},
            "after": {"parameters": self.parameters},
            "planned": len(self.plan.tasks),
            "matrices": [dict(one) for _, one in sorted(self.records.items())],
        }

    def _status(self, task):
        return self.records.get(task.index, {}).get("status")


def table(outcome: Outcome) -> Table:
    """Return a line for each group of matrices that are alike."""
    made = Table()
    made.add_column("matrices", no_wrap=True)
    made.add_column("becomes", min_width=9)
    for name in ("done", "size", "error", "worst", "gap", "worst", "GEMMs"):
        made.add_column(name, justify="right", no_wrap=True)
    groups: dict[Any, list[MatrixTask]] = {}
    for task in outcome.plan.tasks:
        key = task.shape, plan.describe(task.configurations), task.norm
        groups.setdefault(key, []).append(task)
    records = {task.index: one for task, one in outcome.solved}
    for (shape, what, _), members in groups.items():
        done = [records[x.index] for x in members if x.index in records]
        share = sum(x.parameters for x in members) / sum(x.size for x in members)
        errors = [one["errors"]["relative_spectral"] for one in done]
        gaps = [one["bounds"]["gap"] for one in done]
        products = [one.get("gemms", 0) for one in done]
        made.add_row(
            f"{shape[0]}x{shape[1]}",
            what,
            f"{len(done)}/{len(members)}",
            f"{share:.0%}",
            *_mean_and_worst(errors, ".3f"),
            *_mean_and_worst(gaps, ".1%"),
            f"{np.mean(products):,.0f}" if products else "",
        )
    return made


def verdict(outcome: Outcome) -> str:
    """Say in lines what is finished, what it saves, and what is missing."""
    total, done = len(outcome.plan.tasks), len(outcome.records)
    before, after = outcome.plan.parameters, outcome.parameters
    lines = [
        f"{done:,} of {total:,} matrices are finished; {after:,} of {before:,} "
        f"parameters ({100 * after / max(before, 1):.1f} %).",
        "Errors are spectral, over the norm of the matrix; no change of all A_k or of "
        "all B_k can lower them by more than the gap.",
    ]
    if outcome.failed:
        lines.append(f"{len(outcome.failed)} failed and stay dense.")
    return "\n".join(lines)


def failures(outcome: Outcome) -> Table | None:
    """Return a line for each matrix that stays dense, or None if there is none."""
    if not outcome.failed:
        return None
    made = Table("matrix", "stays dense because")
    for task, reason in outcome.failed:
        made.add_row(printable(task.name), reason)
    return made


def figure(outcome: Outcome) -> bytes:
    """Return a PNG: the errors of all finished matrices, and their gaps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chart = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    left, right = chart.subplots(1, 2)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for task, one in outcome.solved:
        label = f"{task.shape[0]}x{task.shape[1]}"
        groups.setdefault(label, []).append(one)
    for label, some in groups.items():
        x = [one["index"] for one in some]
        left.plot(
            x, [one["errors"]["relative_spectral"] for one in some], ".", label=label
        )
        gaps = [100 * max(one["bounds"]["gap"] or 0, 0) for one in some]
        right.plot(x, gaps, ".", label=label)
    left.set(ylabel="spectral error / norm", xlabel="number of the matrix")
    right.set(ylabel="gap, per cent", xlabel="number of the matrix")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if groups:
        left.legend(frameon=False)
    chart.suptitle(f"{len(outcome.records)} of {len(outcome.plan.tasks)} matrices")
    buffer = io.BytesIO()
    FigureCanvasAgg(chart).print_png(buffer)
    return buffer.getvalue()


def _mean_and_worst(values, form):
    values = [x for x in values if x is not None]
    if not values:
        return "", ""
    return format(float(np.mean(values)), form), format(max(values), form)
