"""`kronjax compress` for whole models by rules without weights, and its report.

What is finished is kept one by one, so that the same line goes on after an interruption
and each of several hosts can do a part.
"""

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kronjax import recipe
from kronjax.io import storage
from kronjax.io.atomic import printable
from kronjax.io.progress import bar
from kronjax.lm.checkpoints import folder, hugging_face
from kronjax.lm.compression import whole_model
from kronjax.recipe import Recipe
from kronjax.runs import engine, estimate, processes, store, summary
from kronjax.runs.plan import SolveSettings, is_plain, make, pattern
from kronjax.runs.processes import Hosts
from kronjax.runs.store import Store
from kronjax.runs.summary import Outcome

CONFIG = "config.json"
"""What says that there is a model."""

FAILURE = 3
"""Exit code where a matrix failed and stays dense."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says beside model, rules and place.

    Attributes:
        settings: Of the solves.
        dtype: Of what is written of a model, or None for its own.
        dry_run: Whether to stop after the plan.
        force: Whether to replace what is there.
        as_json: Whether to print JSON.
    """

    settings: SolveSettings
    dtype: str | None = None
    dry_run: bool = False
    force: bool = False
    as_json: bool = False


def is_meant(path: Path, rules: Recipe) -> bool:
    """Say whether a model by its path and some rules are for this way.

    It is for whatever is no language model, and for those whose rules need nothing but
    the matrices.
    """
    if path.suffix == ".gguf":
        return False
    return not whole_model.is_supported(path) or all(map(is_plain, rules.rules))


def compress(
    path: Path, rules: Recipe, out: str, options: Options, group: Hosts
) -> int:
    """Solve all matrices that rules speak of, and make a model of them if it is one.

    Args:
        path: A safetensors file, or a folder.
        rules: None of them weighted.
        out: A folder, or a URL.
        options: Further ones.
        group: The processes that share the work.

    Returns:
        0, or `FAILURE` if a matrix failed.
    """
    opened, kept = group.together(lambda: _planned(path, rules, out, options))
    plan, place = kept.plan, kept.place
    matrices = {**opened.tables, **opened.tensors}
    if group.process == 0:
        _tell_overlaps(rules, opened.tensors, opened.tables)
    if options.dry_run:
        _forecast(kept, matrices, options.as_json)
        return 0
    with contextlib.ExitStack() as stack:
        _begin(kept, path, options, group, stack)
        with bar(len(plan.tasks), "solving", unit="matrices") as advance:
            engine.run(
                matrices,
                kept,
                process=group.process,
                processes=group.processes,
                tell=lambda text, count: advance(count, text),
            )
        if group.process > 0:
            own = [x for x in plan.tasks if x.index % group.processes == group.process]
            return _code(Outcome(plan, kept.records(own)))
        processes.wait(place, group, _missing(kept))
        found = Outcome.of(kept)
        if opened.model_type is not None:
            text = recipe.dumps(rules)
            _save(whole_model.merge(path, kept, text, options.dtype), place)
        else:  # the model of an earlier plan, up to here
            for name in (CONFIG, folder.WEIGHTS):
                place.remove(name)
        _draw(found, place)
    _show(found, options.as_json)
    if not options.as_json:
        what = "The model is" if opened.model_type else "The factors are"
        print(f"{what} in {place}.")
    return _code(found)


def _planned(
    path: Path, rules: Recipe, out: str, options: Options
) -> tuple[whole_model.Whole, Store]:
    """Return the model, and where the results of its plan are to be kept."""
    opened = whole_model.open_whole(path)
    plan = make(
        rules,
        opened.tensors,
        source=str(path),
        tables=opened.tables,
        model_type=opened.model_type,
        parameters=opened.parameters,
        settings=options.settings,
    )
    return opened, Store(storage.find(out), plan)


def report(
    place: storage.LocalFolder | storage.RemoteFolder, as_json: bool
) -> int | None:
    """Print what is finished at a place and draw it, or return None if it has no plan.

    Returns:
        As `compress` does.
    """
    plan = store.read_plan(place)
    if plan is None:
        return None
    found = Outcome.of(Store(place, plan))
    _show(found, as_json)
    if _draw(found, place) and not as_json:
        print(f"{place}/{summary.FIGURE} shows every matrix.")
    return _code(found)


def _begin(kept: Store, path: Path, options: Options, group: Hosts, stack) -> None:
    """Take hold of the place, and agree with all that is there and all who share it."""
    place, problem, lanes = kept.place, None, {}
    try:
        stack.enter_context(place.hold(group.process))
        if group.process == 0:
            storage.refuse_others(place, group.processes)
            _refuse_strangers(kept, path, options.force)
            lanes = engine.lanes_of(kept, _devices(), group.processes)
            kept.agree(lanes)
    except Exception as error:
        problem = error
    what = "sees another model or other rules"
    group.agree(kept.plan.hash, problem, what=what)
    keys = sorted(engine.lanes_of(kept, _devices(), group.processes))
    known = group.exchange([0, *(kept.plan.lanes.get(key, 0) for key in keys)])[0][1:]
    lanes = {**kept.plan.lanes, **dict(zip(keys, known, strict=True))}
    kept.plan = dataclasses.replace(kept.plan, lanes=lanes)
    group.part()


def _refuse_strangers(kept: Store, path: Path, force: bool) -> None:
    """Refuse a place with a model, or the results of another plan; or clear it."""
    place = kept.place
    if isinstance(place, storage.LocalFolder) and path.exists():
        folder = path if path.is_dir() else path.parent
        if place.path.exists() and place.path.samefile(folder):
            raise ValueError(f"{place} holds the model: give --out another folder")
    if force:
        with contextlib.suppress(ValueError):
            plan = store.read_plan(place)
            if plan is not None and plan.hash == kept.plan.hash:
                return
        kept.clear()
        return
    is_model = store.read_plan(place) is None and place.read(CONFIG) is not None
    if is_model and not kept.records(kept.plan.tasks):
        raise ValueError(f"{place} already holds a model; --force replaces it")


def _missing(kept: Store) -> Callable[[], list[int]]:
    """Return a function that tells what is not finished; nothing is read twice."""
    rest = list(kept.plan.tasks)

    def look() -> list[int]:
        done = kept.records(rest)
        rest[:] = [one for one in rest if one.index not in done]
        return [one.index for one in rest]

    return look


def _save(model: Any, place: storage.LocalFolder | storage.RemoteFolder) -> None:
    """Write a model into a folder, or through one into a bucket."""
    if isinstance(place, storage.LocalFolder):
        hugging_face.save(model, place.path)
        return
    with tempfile.TemporaryDirectory() as folder:
        hugging_face.save(model, folder)
        # Last what says that it is there.
        names = sorted(os.listdir(folder), key=lambda name: name == CONFIG)
        for name in names:
            place.write(name, (Path(folder) / name).read_bytes())


def _forecast(kept: Store, matrices, as_json: bool) -> None:
    """Print what a plan will take."""
    plan = kept.plan
    with bar(len(plan.tasks), "trying", unit="matrices") as advance:
        found = list(
            estimate.of(matrices, kept, tell=lambda text, count: advance(count, text))
        )
    seconds = sum(one.seconds for one in found)
    memory = max((one.memory for one in found), default=0)
    after = plan.parameters - plan.saved
    if as_json:
        groups = [
            {
                "group": one.group.key,
                "matrices": one.group.count,
                "names": [task.name for task in one.group.tasks],
                "lanes": one.lanes,
                "memory": one.memory,
                "seconds": one.seconds,
                "before": sum(task.size for task in one.group.tasks),
                "after": sum(task.parameters for task in one.group.tasks),
            }
            for one in found
        ]
        totals = {"memory": memory, "seconds": seconds, "plan": plan.hash}
        sizes = {"before": plan.parameters, "after": after}
        print(json.dumps({**totals, **sizes, "groups": groups}))
        return
    made = Table()
    made.add_column("group")
    for name in ("matrices", "before", "after", "at once", "MiB", "seconds"):
        made.add_column(name, justify="right", no_wrap=True)
    for one in found:
        made.add_row(
            one.group.key,
            f"{one.group.count:,}",
            f"{sum(task.size for task in one.group.tasks):,}",
            f"{sum(task.parameters for task in one.group.tasks):,}",
            f"{one.lanes}" if one.lanes else "-",
            f"{one.memory / 2**20:,.0f}",
            f"{one.seconds:,.0f}",
        )
    console = Console(highlight=False, markup=False)
    console.print(made)
    console.print(
        f"{len(plan.tasks):,} matrices; {after:,} of {plan.parameters:,} parameters; "
        f"{memory / 2**20:,.0f} MiB on every device at its peak, as compiled; about "
        f"{seconds:,.0f} s, by a short trial. Nothing was written.",
        soft_wrap=True,
    )


def _tell_overlaps(rules: Recipe, names: Iterable[str], tables: Iterable[str]) -> None:
    """Say which rules match what others decide."""
    counts: dict[tuple[int, int], list[str]] = {}
    for name, matched in recipe.matches(rules, names, tables).items():
        for other in matched[1:]:
            counts.setdefault((matched[0], other), []).append(name)
    for (first, other), some in sorted(counts.items()):
        a, b = (pattern(rules.rules[i]) for i in (first, other))
        print(
            f"The rules for {a} and for {b} both match {printable(some[0])}"
            f"{f' and {len(some) - 1} more' if len(some) > 1 else ''}: the first "
            "decides.",
            file=sys.stderr,
        )


def _show(found: Outcome, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found.plain(), allow_nan=False))
        return
    console = Console(highlight=False, markup=False)
    made = summary.table(found)
    # Rather a line that a terminal breaks than one without its last digits.
    wide = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(made, options=wide).minimum)
    console.print(made)
    console.print(summary.verdict(found), soft_wrap=True)
    failures = summary.failures(found)
    if failures is not None:
        console.print(failures)


def _draw(found: Outcome, place: storage.LocalFolder | storage.RemoteFolder) -> bool:
    """Write the figure, which is no reason to fail, and say whether it is there."""
    try:
        place.write(summary.FIGURE, summary.figure(found))
    except (OSError, ValueError) as error:
        print(f"There is no figure: {printable(str(error))}", file=sys.stderr)
        return False
    return True


def _code(found: Outcome) -> int:
    return FAILURE if found.failed else 0


def _devices() -> list[Any]:
    import jax

    return jax.local_devices()
