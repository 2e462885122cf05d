"""`kronjax factorize`: factors for the matrices of any safetensors file or folder."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from kronjax.cli.console import widen
from kronjax.cli.options import Flag, HostOptions, Json, Sharing, Solving, option

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
    solving: Solving,
    dry_run: Flag = False,
    sharing: Sharing,
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
        solving: Options of the fits.
        dry_run: Print matrices, memory and time, and stop.
        sharing: Options about other processes.
        force: Replace the results of another recipe in FOLDER.
        as_json: Print the records as one JSON object.

    Returns:
        0, or 3 if a matrix failed and stays dense.
    """
    from kronjax import recipe as recipes
    from kronjax.io.tensors import map_all
    from kronjax.runs import factorize as runs  # reserves threads before jax is there
    from kronjax.runs.engine import Inputs
    from kronjax.runs.settings import SolveSettings

    rules = recipes.load(recipe)
    settings = SolveSettings(**vars(solving))
    hosts = hosts_of(dry_run, sharing)
    if hosts.process == 0:
        tell_overlaps(rules, map_all(source))
    if dry_run:
        plan, tensors = runs.planned(source, rules, settings)
        forecast(plan, Inputs(tensors), as_json)
        return 0
    results = runs.factorize(
        source,
        rules,
        out,
        **vars(solving),
        hosts=hosts,
        force=force,
    )
    if hosts.process == 0:
        show_matrices(results, as_json)
        if not as_json:
            print(f"The factors are in {out}.")
    return FAILURE if results.failed else 0


def hosts_of(dry_run: bool, sharing: Any) -> "Hosts":
    """Return the processes that share the work of a command.

    Args:
        dry_run: Whether nothing is computed, so that this process is alone.
        sharing: Options of the names of `HostOptions`.

    Raises:
        ValueError: If options about processes have no effect, or the others cannot be
            found.
    """
    from kronjax.runs.processes import Hosts, meet

    if not dry_run:
        return meet(**vars(sharing))
    if vars(sharing) != vars(HostOptions()):
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
        estimates = list(
            estimate.of(inputs, store, tell=lambda text, count: advance(count, text))
        )
    if as_json:
        print(json.dumps(_forecast_fields(plan, estimates)))
    else:
        _show_forecast(plan, estimates)


def _forecast_fields(plan, estimates) -> dict[str, Any]:
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
        for estimate in estimates
    ]
    return {
        "memory": max((estimate.memory for estimate in estimates), default=0),
        "seconds": sum(estimate.seconds for estimate in estimates),
        "plan": plan.hash,
        "before": plan.parameters,
        "after": plan.parameters - plan.saved,
        "groups": groups,
    }


def _show_forecast(plan, estimates) -> None:
    from rich.console import Console
    from rich.table import Table

    fields = _forecast_fields(plan, estimates)
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


def show_matrices(results: "Factorization", as_json: bool) -> None:
    """Print the finished matrices of a run, as a table or as JSON."""
    from rich.console import Console

    from kronjax.runs import summary

    if as_json:
        print(json.dumps(results.plain(), allow_nan=False))
        return
    console = Console(highlight=False, markup=False)
    made = summary.table(results)
    widen(console, made)
    console.print(made)
    console.print(summary.verdict(results), soft_wrap=True)
    failures = summary.failures(results)
    if failures is not None:
        console.print(failures)
