"""`kronjax factorize`: factors for the matrices of any safetensors file or folder."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from kronjax.cli.console import widen
from kronjax.cli.options import (
    Flag,
    Json,
    MaxProducts,
    NumStarts,
    Seed,
    Tolerance,
    option,
)

if TYPE_CHECKING:
    from kronjax.recipe import Recipe
    from kronjax.runs.engine import Inputs
    from kronjax.runs.plan import RunPlan
    from kronjax.runs.processes import Hosts
    from kronjax.runs.summary import Factorization

FAILURE = 3
"""Exit code where a matrix failed and stays dense."""


def factorize(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    *,
    recipe: Annotated[str, option("NAME|FILE")],
    out: Annotated[str, option("FOLDER")],
    tolerance: Tolerance = 1e-2,
    num_starts: NumStarts = 1,
    seed: Seed = 0,
    max_products: MaxProducts = None,
    dry_run: Flag = False,
    distributed: Flag = False,
    coordinator: Annotated[str | None, option("HOST:PORT")] = None,
    processes: Annotated[int | None, option("N")] = None,
    process: Annotated[int | None, option("I")] = None,
    force: Flag = False,
    as_json: Json = False,
) -> int:
    """Factorize the matrices of a safetensors file or folder by the rules of a recipe.

    Each matrix is taken as it is stored and gets a file of factors and a record, with
    proven gaps. Run the same command again to resume after an interruption. For a
    language model that ends as a model, see kronjax compress.

    Args:
        source: A .safetensors file, or a folder of them.
        recipe: The name of a recipe or a .yaml file; rules speak of names of tensors.
        out: Folder, or URL, for the factors.
        tolerance: Gap at which a matrix is good enough: 0.01 is one per cent.
        num_starts: Number of starts; the best is taken to the end.
        seed: Seed of the perturbed starts.
        max_products: Matrix products that a stage of a solve may spend.
        dry_run: Print matrices, memory and time, and stop.
        distributed: Share the work with the same command on other hosts: on Cloud TPU,
            under Slurm and Open MPI 4 they find each other.
        coordinator: Address of process 0, elsewhere.
        processes: Number of processes.
        process: Number of this process, from 0.
        force: Replace the results of another recipe in FOLDER.
        as_json: Print the records as one JSON object.

    Returns:
        0, or 3 if a matrix failed and stays dense.
    """
    from kronjax import recipe as recipes
    from kronjax.io.tensors import map_all
    from kronjax.runs import factorize as runs  # reserves threads before jax is there
    from kronjax.runs.engine import Inputs
    from kronjax.runs.plan import SolveSettings

    rules = recipes.load(recipe)
    settings = SolveSettings(tolerance, num_starts, seed, max_products)
    hosts = hosts_of(dry_run, distributed, coordinator, processes, process)
    if hosts.process == 0:
        tell_overlaps(rules, map_all(source))
    if dry_run:
        plan, tensors = runs.planned(source, rules, settings)
        forecast(plan, Inputs(tensors), as_json)
        return 0
    found = runs.factorize(
        source,
        rules,
        out,
        tolerance=tolerance,
        num_starts=num_starts,
        seed=seed,
        max_products=max_products,
        hosts=hosts,
        force=force,
    )
    if hosts.process == 0:
        show_matrices(found, as_json)
        if not as_json:
            print(f"The factors are in {out}.")
    return FAILURE if found.failed else 0


def hosts_of(
    dry_run: bool,
    distributed: bool,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
) -> "Hosts":
    """Return the processes that share the work of a command.

    Raises:
        ValueError: If options about processes have no effect, or the others cannot be
            found.
    """
    from kronjax.runs.processes import Hosts, meet

    if not dry_run:
        return meet(distributed, coordinator, processes, process)
    if distributed or (coordinator, processes, process) != (None, None, None):
        raise ValueError(
            "--dry-run is for one process: leave out --distributed, --coordinator, "
            "--processes and --process"
        )
    return Hosts(0, 1)


def forecast(plan: "RunPlan", inputs: "Inputs", as_json: bool) -> None:
    """Print the matrices, the memory and the time of a plan."""
    from kronjax.io.progress import bar
    from kronjax.io.storage import MemoryFolder
    from kronjax.runs import estimate
    from kronjax.runs.store import Store

    store = Store(MemoryFolder(), plan)
    with bar(len(plan.tasks), "trying", unit="matrices") as advance:
        found = list(
            estimate.of(inputs, store, tell=lambda text, count: advance(count, text))
        )
    if as_json:
        print(json.dumps(_forecast_fields(plan, found)))
    else:
        _show_forecast(plan, found)


def _forecast_fields(plan, found) -> dict[str, Any]:
    groups = [
        {
            "group": estimate.group.key,
            "matrices": estimate.group.count,
            "names": [task.name for task in estimate.group.tasks],
            "lanes": estimate.lanes,
            "memory": estimate.memory,
            "seconds": estimate.seconds,
            "before": sum(task.size for task in estimate.group.tasks),
            "after": sum(task.parameters for task in estimate.group.tasks),
        }
        for estimate in found
    ]
    return {
        "memory": max((estimate.memory for estimate in found), default=0),
        "seconds": sum(estimate.seconds for estimate in found),
        "plan": plan.hash,
        "before": plan.parameters,
        "after": plan.parameters - plan.saved,
        "groups": groups,
    }


def _show_forecast(plan, found) -> None:
    from rich.console import Console
    from rich.table import Table

    fields = _forecast_fields(plan, found)
    made = Table()
    made.add_column("group")
    for name in ("matrices", "before", "after", "at once", "MiB", "seconds"):
        made.add_column(name, justify="right", no_wrap=True)
    for group in fields["groups"]:
        made.add_row(
            group["group"],
            f"{group['matrices']:,}",
            f"{group['before']:,}",
            f"{group['after']:,}",
            f"{group['lanes']}" if group["lanes"] else "-",
            f"{group['memory'] / 2**20:,.0f}",
            f"{group['seconds']:,.0f}",
        )
    console = Console(highlight=False, markup=False)
    console.print(made)
    console.print(
        f"{len(plan.tasks):,} matrices; {fields['after']:,} of {fields['before']:,} "
        f"parameters; {fields['memory'] / 2**20:,.0f} MiB on every device at its peak, "
        f"as compiled; about {fields['seconds']:,.0f} s, by a short trial. Nothing was "
        "written.",
        soft_wrap=True,
    )


def tell_overlaps(
    rules: "Recipe", names: Iterable[str], tables: Iterable[str] = ()
) -> None:
    """Print which rules match names that other rules decide.

    Args:
        rules: The rules.
        names: Names of matrices.
        tables: Names of embeddings.
    """
    from kronjax import recipe as recipes
    from kronjax.io.atomic import printable
    from kronjax.runs.plan import pattern

    counts: dict[tuple[int, int], list[str]] = {}
    for name, matched in recipes.matches(rules, names, tables).items():
        for other in matched[1:]:
            counts.setdefault((matched[0], other), []).append(name)
    for (first, other), twice in sorted(counts.items()):
        a, b = (pattern(rules.rules[i]) for i in (first, other))
        more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
        print(
            f"The rules for {a} and for {b} both match {printable(twice[0])}{more}: "
            "the first decides.",
            file=sys.stderr,
        )


def show_matrices(found: "Factorization", as_json: bool) -> None:
    """Print the finished matrices of a run, as a table or as JSON."""
    from rich.console import Console

    from kronjax.runs import summary

    if as_json:
        print(json.dumps(found.plain(), allow_nan=False))
        return
    console = Console(highlight=False, markup=False)
    made = summary.table(found)
    widen(console, made)
    console.print(made)
    console.print(summary.verdict(found), soft_wrap=True)
    failures = summary.failures(found)
    if failures is not None:
        console.print(failures)
