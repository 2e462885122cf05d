"""What is to be done about a model: one task for each matrix that changes.

A plan is made of rules and of the tensors themselves. It is the same whenever these
are: tasks come in the order of names, with numbers as numbers, and the hash is that of
what decides the results (rules, settings, every number of every matrix). A folder of
results belongs to one plan, which is written into it first.

>>> rule = '{match: "*", method: low-rank, rank: 1, weighting: none}'
>>> recipe = recipes.loads(f"rules: [{rule}]")
>>> plan = make(recipe, {"b.10": np.eye(4), "b.9": np.eye(4), "bias": np.ones(4)})
>>> [(task.index, task.name, task.parameters) for task in plan.tasks]
[(0, 'b.9', 8), (1, 'b.10', 8)]
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from kronjax import recipe as recipes
from kronjax.io.tensors import is_matrix, parse_json
from kronjax.kronecker import Configuration
from kronjax.recipe import Assignment, Recipe

FORMAT = 1
"""Version of plans; a reader refuses later ones."""


@dataclasses.dataclass(frozen=True)
class SolveSettings:
    """How all matrices are solved.

    Attributes:
        tolerance: As for `continuation.solve`.
        starts: Starting points in the race.
        seed: Of the perturbed starts; each matrix adds its number.
    """

    tolerance: float = 2e-4
    starts: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a tolerance that nothing can be solved to."""
        if not 0 < self.tolerance < math.inf:
            raise ValueError(
                f"the tolerance is {self.tolerance}: it must be positive and finite"
            )


@dataclasses.dataclass(frozen=True)
class MatrixTask:
    """One matrix, and what it becomes.

    Attributes:
        index: Its number in the plan, which names its files.
        name: Of the layer or tensor; never part of the name of a file.
        shape: `(m, n)`.
        dtype: Of the tensor.
        digest: Of its numbers.
        method: `kronecker`, `low-rank` or `interpolative`.
        configurations: Of its sum.
        norm: `spectral`, `frobenius` or `schatten:P`.
        scalars: Whether terms get scalars of their own.
        parameters: Numbers that will be stored.
        rule: The pattern that decided.
    """

    index: int
    name: str
    shape: tuple[int, int]
    dtype: str
    digest: str
    method: str
    configurations: tuple[Configuration, ...]
    norm: str
    scalars: bool
    parameters: int
    rule: str = dataclasses.field(compare=False)

    @property
    def is_closed(self) -> bool:
        """Whether truncated SVD is the answer: low rank alone, in any of the norms."""
        m, n = self.shape
        (m1, n1), *rest = (one.a_shape for one in self.configurations)
        return not rest and (m1, n1) in ((m, 1), (1, n))

    @property
    def is_wide(self) -> bool:
        """Whether the matrix has fewer rows than columns."""
        return self.shape[0] < self.shape[1]

    @property
    def precision(self) -> str:
        """What is computed in."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def size(self) -> int:
        """Entries of the matrix."""
        return self.shape[0] * self.shape[1]


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """All tasks.

    Attributes:
        source: What the model was called.
        model_type: Of a model that can be loaded in the end, or None.
        settings: Of all.
        tasks: In order.
        parameters: Of all tensors before.
        lanes: Matrices of a device in one call, by group, as they were chosen first:
            what comes out depends on them in its last bits.
    """

    source: str
    model_type: str | None
    settings: SolveSettings
    tasks: tuple[MatrixTask, ...]
    parameters: int
    lanes: Mapping[str, int] = dataclasses.field(default_factory=dict, compare=False)

    @functools.cached_property
    def hash(self) -> str:
        """Digest of everything that decides what comes out, but the machine."""
        told = self.plain()
        facts = [told[name] for name in ("format", "model_type", "settings", "tasks")]
        for one in facts[-1]:
            del one["rule"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def saved(self) -> int:
        """Numbers that are no longer stored in the end."""
        return sum(one.size - one.parameters for one in self.tasks)

    def plain(self) -> dict[str, Any]:
        """Return everything as values that JSON holds."""
        return {
            "format": FORMAT,
            **dataclasses.asdict(self),
            "tasks": [dataclasses.asdict(one) for one in self.tasks],
        }

    def to_json(self) -> bytes:
        """Return the plan as JSON, with its hash."""
        facts = {"hash": self.hash, **self.plain()}
        return json.dumps(facts, indent=1, allow_nan=False).encode() + b"\n"

    @classmethod
    def of_json(cls, content: bytes, where: str) -> "RunPlan":
        """Read a plan back.

        Args:
            content: The JSON.
            where: What messages call it.

        Raises:
            ValueError: If it is damaged, or of a later version.
        """
        try:
            values = parse_json(content)
            version = values["format"]
            if version == FORMAT:
                return _plan(values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{where} is damaged ({error}): remove it to keep what is finished of "
                "this plan; --force begins anew"
            ) from error
        raise ValueError(
            f"{where} is of format {version}, and this kronjax reads format {FORMAT}: "
            "update kronjax"
        )


def _plan(values: dict[str, Any]) -> RunPlan:
    tasks = []
    for one in values["tasks"]:
        terms = [Configuration(**x) for x in one["configurations"]]
        m, n = one["shape"]
        given = one | {"shape": (m, n), "configurations": tuple(terms)}
        tasks.append(MatrixTask(**given))
    plan = RunPlan(
        source=values["source"],
        model_type=values["model_type"],
        settings=SolveSettings(**values["settings"]),
        tasks=tuple(tasks),
        parameters=values["parameters"],
        lanes=dict(values["lanes"]),
    )
    if plan.hash != values["hash"]:
        raise ValueError("its hash is that of something else")
    return plan


def make(
    recipe: Recipe,
    tensors: Mapping[str, np.ndarray],
    *,
    source: str = "",
    tables: Mapping[str, np.ndarray] | None = None,
    model_type: str | None = None,
    parameters: int | None = None,
    settings: SolveSettings | None = None,
) -> RunPlan:
    """Apply rules to tensors, and read all that they change once.

    Args:
        recipe: The rules; none may be weighted.
        tensors: By name; of a model `[n_in, n_out]`. Rules see the matrices alone.
        source: What to call the model.
        tables: Embeddings, which are meant only by rules that give their very names.
        model_type: Of a model that can be loaded, or None for anything else.
        parameters: Of the whole model; of all tensors if None.
        settings: Of the solves.

    Raises:
        ValueError: If a rule is weighted, matches nothing or no matrix, or does not fit
            a matrix.
    """
    tables = tables or {}
    for rule in recipe.rules:
        if not is_plain(rule):
            raise ValueError(
                f"the rule for {pattern(rule)} needs a model that runs on a text, or "
                "is trained later: write `weighting: none` into it, and no start"
            )
    names = sorted(tensors, key=_natural)
    matrices = {name: tensors[name] for name in names if is_matrix(tensors[name])}
    _refuse_vectors(recipe, tensors, matrices, tables)
    shapes, rows = (
        {name: (int(x.shape[0]), int(x.shape[1])) for name, x in some.items()}
        for some in (matrices, tables)
    )
    assigned = recipes.resolve(recipe, shapes, tables=rows, model_type=model_type)
    every = {**tables, **matrices}
    if parameters is None:
        parameters = sum(int(x.size) for x in tensors.values())
    return RunPlan(
        source=source,
        model_type=model_type,
        settings=settings or SolveSettings(),
        tasks=tuple(
            _task(i, one, every[one.name], model_type is not None)
            for i, one in enumerate(assigned)
        ),
        parameters=parameters,
    )


def differences(old: RunPlan, new: RunPlan, most: int = 4) -> list[str]:
    """Return lines that say in what two plans differ, the first few of them."""
    found = []
    for field in dataclasses.fields(SolveSettings):
        ours, theirs = (getattr(x.settings, field.name) for x in (new, old))
        if ours != theirs:
            found.append(f"{field.name} was {theirs}, now {ours}")
    if old.model_type != new.model_type:
        found.append(f"the model was a {old.model_type}, now a {new.model_type}")
    before, after = ({one.name: one for one in x.tasks} for x in (old, new))
    for word, some in (("new", after.keys() - before), ("gone", before.keys() - after)):
        if some:
            first, *rest = sorted(some, key=_natural)
            found.append(f"{first}{f' and {len(rest)} more' if rest else ''}: {word}")
    for name in sorted(before.keys() & after, key=_natural):
        found += _changed(before[name], after[name])
    if not found:
        found = ["the order of the matrices"]
    more = len(found) - most
    return found[:most] + ([f"and {more} more"] if more > 0 else [])


def digest(matrix: np.ndarray) -> str:
    """Return the digest of a matrix: of its shape, its dtype and its numbers."""
    found = hashlib.sha256(repr((matrix.shape, str(matrix.dtype))).encode())
    found.update(np.ascontiguousarray(matrix).view(np.uint8).data)
    return found.hexdigest()


def _changed(old: MatrixTask, new: MatrixTask) -> list[str]:
    for field in dataclasses.fields(MatrixTask):
        if field.name in ("index", "rule"):
            continue
        ours, theirs = getattr(new, field.name), getattr(old, field.name)
        if ours != theirs:
            if field.name == "digest":
                return [f"{new.name} holds other numbers"]
            return [
                f"{field.name} of {new.name} was {_short(theirs)}, now {_short(ours)}"
            ]
    return []


def _short(value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], Configuration):
        return " + ".join(describe(value).split("; "))
    return str(value)


def describe(configurations: tuple[Configuration, ...]) -> str:
    """Return configurations in few letters: `24x32, 192; 768x1, 4`."""
    return "; ".join(
        f"{one.a_shape[0]}x{one.a_shape[1]}, {one.rank}" for one in configurations
    )


def _task(
    index: int, one: Assignment, matrix: np.ndarray, is_model: bool
) -> MatrixTask:
    rule = one.rule
    norm = "spectral" if rule.norm == "auto" else rule.norm
    parameters = one.num_parameters
    if rule.method == "interpolative" and not is_model:
        # What has no layers keeps both factors.
        parameters = sum(x.num_parameters(one.shape) for x in one.configurations)
    return MatrixTask(
        index=index,
        name=one.name,
        shape=one.shape,
        dtype=str(matrix.dtype),
        digest=digest(matrix),
        method=rule.method,
        configurations=one.configurations,
        norm=norm,
        scalars=rule.scalars,
        parameters=parameters,
        rule=pattern(rule),
    )


def is_plain(rule: recipes.Rule) -> bool:
    """Say whether a matrix alone decides what a rule makes of it."""
    plain = rule.weighting == "none" and rule.start == "van-loan"
    return plain or rule.method == "keep"


def pattern(rule: recipes.Rule) -> str:
    """Return what a rule matches, in words."""
    return rule.match if isinstance(rule.match, str) else ", ".join(rule.match)


def _refuse_vectors(recipe, tensors, matrices, tables) -> None:
    """Refuse rules that match tensors, and no matrix among them."""
    others = {k: x for k, x in tensors.items() if k not in matrices and k not in tables}
    matched = recipes.matches(recipe, [*matrices, *others, *tables])
    for i, rule in enumerate(recipe.rules):
        names = [name for name, rules in matched.items() if i in rules]
        if names and all(name in others for name in names):
            one = others[names[0]]
            what = f"a tensor of shape {one.shape} and dtype {one.dtype}"
            raise ValueError(
                f"the rule for {pattern(rule)} matches no matrix: {names[0]} is {what}"
            )


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort numbers in names as numbers."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(x), x) if x.isdecimal() else (1, 0, x) for x in parts]
