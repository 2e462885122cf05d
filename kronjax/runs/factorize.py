"""`factorize`: any tensors in, factors and a report out, one matrix after the other.

Rules speak of the names of tensors; a matrix `[m, n]` is taken as it is stored. Every
finished matrix has a file of factors and a record, so that the same call resumes after
an interruption, and several hosts can share the work.

>>> from kronjax import recipe
>>> rule = '{match: "*", method: low-rank, rank: 1, weighting: none}'
>>> rules, product = recipe.loads(f"rules: [{rule}]"), np.outer([1.0, 2.0], np.ones(9))
>>> factorize({"w": product}, rules, progress=False).names
['w']
"""

# ruff: noqa: E402
from kronjax import cpu_threads

# Before jax is imported. The command line does the same: the last bits of products
# depend on the number of threads.
cpu_threads.reserve()

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kronjax import recipe as recipes
from kronjax.io import storage
from kronjax.io.storage import MemoryFolder
from kronjax.io.tensors import is_float8, is_matrix, map_all
from kronjax.norm import Norm
from kronjax.recipe import Assignment, Recipe
from kronjax.runs import html
from kronjax.runs import plan as planning
from kronjax.runs.engine import Inputs
from kronjax.runs.execute import execute
from kronjax.runs.plan import RunPlan, pattern
from kronjax.runs.processes import Hosts
from kronjax.runs.settings import SolveSettings
from kronjax.runs.store import Store
from kronjax.runs.summary import Factorization

CONFIG = "config.json"
"""The file of a folder that holds a language model."""


def factorize(
    source: str | Path | Mapping[str, np.ndarray],
    recipe: Recipe | str | Path,
    out: str | Path | None = None,
    *,
    tolerance: float = 1e-2,
    num_starts: int = 1,
    seed: int = 0,
    max_products: int | None = None,
    hosts: Hosts | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> Factorization:
    """Approximate the matrices among any tensors by the rules of a recipe.

    On a CPU the last bits of the factors depend on the number of jax's threads, which
    this module raises when it is imported before jax, as the command line does.

    Args:
        source: A safetensors file, a folder of them, or arrays by name.
        recipe: Rules over the names of tensors, the path of their YAML, or the name of
            a built-in recipe. Rules with `weighting: none`; those for layers that see a
            text are for `lm.compress`.
        out: A folder, or a URL that fsspec opens; results are kept in memory if None.
            The same call resumes an interrupted one.
        tolerance: Proven gap at which a matrix is good enough: 0.01 is one per cent.
        num_starts: Number of starting points; the best is taken to the end.
        seed: Seed of the perturbed starts.
        max_products: Products of the size of `EᵀE` that a stage of the continuation may
            spend; chosen from the size of a matrix if None.
        hosts: The processes that share the work, from `processes.meet`.
        force: Whether to replace the results of another plan in `out`.
        progress: Whether to draw a bar; by default on a terminal, after two seconds.

    Returns:
        `Factorization`: the plan, a record for each matrix, and the factors.

    Raises:
        ValueError: If a rule matches nothing or no matrix, is weighted or does not fit,
            or `out` holds other results.
        OSError: If something cannot be read or written; finished matrices are kept.
    """
    hosts = hosts or Hosts(0, 1)
    settings = SolveSettings(tolerance, num_starts, seed, max_products)
    if out is None and hosts.processes > 1:
        raise ValueError("several processes share their results in a folder: give out")
    plan, tensors = hosts.together(lambda: planned(source, recipe, settings))
    place = MemoryFolder() if out is None else storage.find(str(out))

    kept = execute(
        plan,
        Inputs(tensors),
        place,
        hosts=hosts,
        force=force,
        check=lambda store: _refuse_model(store, source),
        progress=progress,
    )
    results = Factorization.of(kept)
    if hosts.process == 0 and out is not None:
        html.write(results)
    return results


def planned(
    source: str | Path | Mapping[str, np.ndarray],
    recipe: Recipe | str | Path,
    settings: SolveSettings,
) -> tuple[RunPlan, Mapping[str, np.ndarray]]:
    """Return the plan for the tensors of a source, and its tensors.

    Raises:
        ValueError: As `factorize`.
        OSError: If there is nothing to read.
    """
    rules = recipe if isinstance(recipe, Recipe) else recipes.load(recipe)
    if isinstance(source, Mapping):
        name, tensors = "arrays", {k: np.asarray(x) for k, x in source.items()}
    else:
        path = storage.expanded(source)
        name, tensors = str(path), map_all(path)
    every = assigned(rules, tensors)
    assignments, dense = [], {}
    for assignment in every:
        reason = _would_grow(assignment)
        if reason is None:
            assignments.append(assignment)
        else:
            dense[assignment.name] = reason
    refuse_unused_starts(assignments, settings)
    plan = planning.make(
        assignments,
        tensors,
        source=name,
        parameters=sum(int(x.size) for x in tensors.values()),
        as_layers=False,
        settings=settings,
        dense=dense,
    )
    return plan, tensors


def _would_grow(assignment: Assignment) -> str | None:
    """Return why a matrix stays dense, or None if its factors are smaller."""
    size = math.prod(assignment.shape)
    held = planning.num_stored(assignment, as_layers=False)
    return f"{held:,} parameters would replace {size:,}" if held >= size else None


def assigned(rules: Recipe, tensors: Mapping[str, np.ndarray]) -> list[Assignment]:
    """Apply rules to the matrices among tensors.

    Raises:
        ValueError: If a rule is weighted, begins elsewhere than with the fit, matches
            nothing or no matrix, or does not fit a matrix.
    """
    for rule in rules.rules:
        if not rule.is_plain:
            raise ValueError(
                f"the rule for {pattern(rule)} needs a language model that runs on a "
                "text or is trained later: write `weighting: none` into it and no "
                "start, or use kronjax compress"
            )
    shapes = {
        name: (int(tensors[name].shape[0]), int(tensors[name].shape[1]))
        for name in sorted(tensors, key=planning.natural)
        if is_matrix(tensors[name]) or is_float8(tensors[name])
    }
    others = [name for name in tensors if name not in shapes]
    matched = recipes.matches(rules, [*shapes, *others])
    for number, rule in enumerate(rules.rules):
        names = [name for name, numbers in matched.items() if number in numbers]
        if names and not set(names) & set(shapes):
            tensor = tensors[names[0]]
            raise ValueError(
                f"the rule for {pattern(rule)} matches no matrix: {names[0]} is a "
                f"tensor of shape {tensor.shape} and dtype {tensor.dtype}"
            )
    assignments = recipes.resolve(rules, shapes)
    for assignment in assignments:
        name, dtype = assignment.name, tensors[assignment.name].dtype
        if is_float8(tensors[name]):
            raise ValueError(
                f"{name} has dtype {dtype}, whose numbers mean nothing without their "
                "scales: keep it by a rule with `method: keep` before the one for "
                f"{pattern(assignment.rule)}, or give the model before quantisation"
            )
    return assignments


def refuse_unused_starts(
    assignments: Sequence[Assignment], settings: SolveSettings
) -> None:
    """Refuse several starts, or a seed, where all fits that iterate begin at one start.

    Fits at p = 2 have a single start. A closed form is exact with any settings.

    Raises:
        ValueError: If starts are asked for and have no effect.
    """
    if settings.num_starts == 1 and settings.seed == 0:
        return
    at_two = []
    for assignment in assignments:
        if not assignment.configurations:
            continue
        has_weights = assignment.rule.weighting != "none"
        norm = Norm.for_weights(assignment.rule.norm, has_weights)
        sides = (has_weights, assignment.rule.weighting == "input+gradient")
        if not norm.has_closed_form(assignment.shape, assignment.configurations, sides):
            at_two.append(norm.is_frobenius)
    if at_two and all(at_two):
        raise ValueError(
            "all sums of this recipe are fitted at p = 2 from one start: a number of "
            "starts and a seed would have no effect"
        )


def _refuse_model(store: Store, source) -> None:
    """Refuse a place that holds the source, or a model."""
    place = store.place
    is_source = not isinstance(source, Mapping) and storage.is_source(place, source)
    if is_source or place.read(CONFIG) is not None:
        raise ValueError(f"{place} holds a model: give another folder for --out")
