"""The results of a run: a table, and values that JSON holds.

Everything is made from the records of a store, at any moment of a run.
"""

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table

from kronjax.io.atomic import printable
from kronjax.kronecker import KroneckerTerms, from_arrays
from kronjax.runs import plan
from kronjax.runs.plan import MatrixTask, RunPlan
from kronjax.runs.store import FAILED, SOLVED, Store


@dataclasses.dataclass(frozen=True)
class Factorization:
    """The results of a run, as far as it is finished.

    Attributes:
        store: Store of the results.
        records: Records of the finished matrices, by index.
    """

    store: Store
    records: Mapping[int, Mapping[str, Any]]

    @classmethod
    def of(cls, store: Store) -> "Factorization":
        """Read all records of a store."""
        return cls(store, store.records(store.plan.tasks))

    def __repr__(self) -> str:
        """Return the state of the run in at most ten lines."""
        failed = [f"  {printable(task.name)}: {why}" for task, why in self.failed]
        more = [f"  and {len(failed) - 5} more"] if len(failed) > 5 else []
        return "\n".join([*verdict(self).split("\n"), *failed[:5], *more])

    def _repr_html_(self) -> str:
        """Return the table of groups for a notebook."""
        from rich.console import Console

        console = Console(record=True, file=io.StringIO(), width=100)
        console.print(table(self))
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")

    @property
    def plan(self) -> RunPlan:
        """The plan of the run."""
        return self.store.plan

    @property
    def names(self) -> list[str]:
        """Names of the matrices that have factors."""
        return [task.name for task, _ in self.solved]

    def record(self, name: str) -> Mapping[str, Any]:
        """Return the record of a finished matrix: errors, bounds, effort.

        Raises:
            KeyError: If there is none.
        """
        return self.records[self._task(name).index]

    def factors(self, name: str) -> dict[str, np.ndarray]:
        """Return the factors of a finished matrix: `a`, `b`, then `a1`, `b1`, ...

        Raises:
            KeyError: If there are none.
        """
        if self.record(name)["status"] != SOLVED:
            raise KeyError(f"{name} has failed and has no factors")
        return self.store.factors(self._task(name))

    def terms(self, name: str) -> tuple[KroneckerTerms, ...]:
        """Return the factors of a Kronecker sum, one stack for each configuration."""
        return from_arrays(self.factors(name))

    def _task(self, name: str) -> MatrixTask:
        for task in self.plan.tasks:
            if task.name == name:
                return task
        raise KeyError(f"no rule changes {name}")

    @property
    def failed(self) -> list[tuple[MatrixTask, str]]:
        """The tasks that stay dense, and the reasons."""
        return [
            (task, self.records[task.index]["reason"])
            for task in self.plan.tasks
            if self._status(task) == FAILED
        ]

    @property
    def dense(self) -> Mapping[str, str]:
        """Reasons of the matrices whose factors would not be smaller, by name."""
        return self.plan.dense

    @property
    def solved(self) -> list[tuple[MatrixTask, Mapping[str, Any]]]:
        """The tasks that have factors, with their records."""
        return [
            (task, self.records[task.index])
            for task in self.plan.tasks
            if self._status(task) == SOLVED
        ]

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model, finished matrices factored."""
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
            "dense": dict(self.plan.dense),
            "matrices": [dict(record) for _, record in sorted(self.records.items())],
        }

    def _status(self, task):
        return self.records.get(task.index, {}).get("status")


def table(results: Factorization) -> Table:
    """Return a table with a row for each group of matrices that are alike."""
    made = Table()
    made.add_column("matrices", no_wrap=True)
    made.add_column("becomes", min_width=9)
    for name in ("done", "bytes", "size", "error", "worst", "gap", "worst", "products"):
        made.add_column(name, justify="right", no_wrap=True)
    groups: dict[Any, list[MatrixTask]] = {}
    for task in results.plan.tasks:
        key = task.shape, plan.describe(task.configurations), task.norm
        groups.setdefault(key, []).append(task)
    records = {task.index: record for task, record in results.solved}
    for (shape, what, _), members in groups.items():
        done = [records[x.index] for x in members if x.index in records]
        share = sum(x.parameters for x in members) / sum(x.size for x in members)
        errors = [record["errors"]["relative_spectral"] for record in done]
        gaps = [record["bounds"]["gap"] for record in done]
        products = [record.get("products", 0) for record in done]
        made.add_row(
            f"{shape[0]}x{shape[1]}",
            what,
            f"{len(done)}/{len(members)}",
            f"{sum(task.bytes for task in members):,}",
            f"{share:.0%}",
            *_mean_and_worst(errors, ".3f"),
            *_mean_and_worst(gaps, ".1%"),
            f"{np.mean(products):,.0f}" if products else "",
        )
    return made


def verdict(results: Factorization) -> str:
    """Return lines that say what is finished, and how much smaller it is."""
    total, done = len(results.plan.tasks), len(results.records)
    before, after = results.plan.parameters, results.parameters
    lines = [
        f"{done:,} of {total:,} matrices are finished; {after:,} of {before:,} "
        f"parameters ({100 * after / max(before, 1):.1f} %)."
    ]
    if any(record["bounds"]["gap"] is not None for _, record in results.solved):
        lines.append(
            "Errors are spectral, over the norm of the matrix; no change of all A_k or "
            "of all B_k can lower them by more than the gap."
        )
    if results.failed:
        lines.append(f"{len(results.failed)} failed and stay dense.")
    if results.dense:
        lines.append(f"{len(results.dense)} would not shrink and stay dense.")
    return "\n".join(lines)


def failures(results: Factorization) -> Table | None:
    """Return a table of the matrices that stay dense, or None if there is none."""
    if not results.failed and not results.dense:
        return None
    made = Table()
    for name in ("matrix", "stays dense because"):
        made.add_column(name, overflow="fold")
    for name, reason in results.dense.items():
        made.add_row(printable(name), reason)
    for task, reason in results.failed:
        made.add_row(printable(task.name), reason)
    return made


def _mean_and_worst(values, form):
    values = [x for x in values if x is not None]
    if not values:
        return "", ""
    return format(float(np.mean(values)), form), format(max(values), form)
