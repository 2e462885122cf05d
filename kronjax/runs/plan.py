"""A plan: one task for each matrix that changes.

A plan is made of assignments (the rules of a recipe, applied to names) and of the
matrices themselves. It is the same whenever these are: tasks come in the order of
names, with numbers as numbers, and the hash is that of what decides the results (rules,
settings, every number of every matrix and weight). A folder of results belongs to one
plan, which is written into it first.

>>> rule = '{match: "*", method: low-rank, rank: 1, weighting: none}'
>>> rules = recipes.loads(f"rules: [{rule}]")
>>> matrices = {"b.10": np.eye(4), "b.9": np.eye(4)}
>>> shapes = {name: x.shape for name, x in matrices.items()}
>>> made = make(recipes.resolve(rules, shapes), matrices)
>>> [(task.index, task.name, task.parameters) for task in made.tasks]
[(0, 'b.9', 8), (1, 'b.10', 8)]
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from kronjax import recipe as recipes
from kronjax.io.json_values import parse_json
from kronjax.kronecker import Configuration
from kronjax.norm import Norm
from kronjax.recipe import Assignment, Rule
from kronjax.runs.settings import SolveSettings

FORMAT = 3
"""Version of plans; a reader refuses any other."""

Weights = tuple[np.ndarray | None, np.ndarray | None]
"""Weights of the rows `[m, m]` and of the columns `[n, n]` of a matrix, or None."""


@dataclasses.dataclass(frozen=True)
class MatrixTask:
    """One matrix, and the approximation that it becomes.

    Attributes:
        index: Number of the task in the plan, which names its files.
        name: Name of the layer or tensor; never part of the name of a file.
        shape: `(m, n)`.
        dtype: Dtype of the tensor.
        digest: Digest of its numbers.
        weights: Digests of the weights of its rows and columns; "" without one.
        method: Name of the method in recipes.
        configurations: Configurations of its sum; none if the method fits by itself.
        norm: "spectral", "frobenius" or "schatten:P".
        parameters: Number of parameters that will be stored.
        rule: The rule that decided, for methods that fit by themselves.
    """

    index: int
    name: str
    shape: tuple[int, int]
    dtype: str
    digest: str
    weights: tuple[str, str]
    method: str
    configurations: tuple[Configuration, ...]
    norm: str
    parameters: int
    rule: Rule

    @property
    def is_low_rank(self) -> bool:
        """Whether truncated SVD is the answer: low rank alone, in any of the norms."""
        m, n = self.shape
        shapes = [configuration.a_shape for configuration in self.configurations]
        return shapes in ([(m, 1)], [(1, n)])

    @property
    def weighted(self) -> tuple[bool, bool]:
        """Whether the rows and the columns have a weight."""
        left, right = self.weights
        return bool(left), bool(right)

    @property
    def is_wide(self) -> bool:
        """Whether the matrix has fewer rows than columns."""
        return self.shape[0] < self.shape[1]

    @property
    def precision(self) -> str:
        """Dtype of the computation."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def size(self) -> int:
        """Number of entries of the matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes of the factors, which are stored in the dtype of the matrix."""
        return (
            self.parameters
            * np.dtype(getattr(ml_dtypes, self.dtype, self.dtype)).itemsize
        )


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """All tasks of a run.

    Attributes:
        source: Path or name of the model.
        settings: Settings of all solves.
        tasks: The tasks, in order.
        parameters: Number of parameters of all tensors before.
        lanes: Number of matrices that a device computes at once, by group, as they were
            chosen first: the last bits of the results depend on them.
        dense: Reasons of the matrices that rules would not make smaller, by name.
    """

    source: str
    settings: SolveSettings
    tasks: tuple[MatrixTask, ...]
    parameters: int
    lanes: Mapping[str, int] = dataclasses.field(default_factory=dict, compare=False)
    dense: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)

    @functools.cached_property
    def hash(self) -> str:
        """Digest of everything that decides the results, except the machine."""
        plain = self.plain()
        facts = [plain[name] for name in ("format", "settings", "tasks")]
        for task, given in zip(facts[-1], self.tasks, strict=True):
            if given.configurations:
                del task["rule"]
            else:  # a pattern decides nothing
                del task["rule"]["match"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def saved(self) -> int:
        """Number of parameters that are no longer stored in the end."""
        return sum(task.size - task.parameters for task in self.tasks)

    def plain(self) -> dict[str, Any]:
        """Return everything as values that JSON holds."""
        return {
            "format": FORMAT,
            **dataclasses.asdict(self),
            "tasks": [
                dataclasses.asdict(task) | {"rule": task.rule.model_dump(mode="json")}
                for task in self.tasks
            ],
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
            ValueError: If it is damaged, or of another version.
        """
        try:
            values = parse_json(content)
            version = int(values["format"])
            if version == FORMAT:
                return _plan(values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{where} is damaged ({error}): remove it to keep the finished "
                "matrices of this plan; --force starts anew"
            ) from error
        if version < FORMAT:
            raise ValueError(
                f"{where} was written by an earlier version of kronjax, whose results "
                "cannot be continued: start anew in another folder, or with --force"
            )
        raise ValueError(
            f"{where} has format {version}, and this kronjax reads format {FORMAT}: "
            "update kronjax"
        )


def _plan(values: dict[str, Any]) -> RunPlan:
    tasks = []
    for task in values["tasks"]:
        terms = [Configuration(**x) for x in task["configurations"]]
        fields = {
            "shape": tuple(task["shape"]),
            "weights": tuple(task["weights"]),
            "configurations": tuple(terms),
            "rule": Rule.model_validate(task["rule"]),
        }
        tasks.append(MatrixTask(**(task | fields)))
    plan = RunPlan(
        source=values["source"],
        settings=SolveSettings(**values["settings"]),
        tasks=tuple(tasks),
        parameters=values["parameters"],
        lanes=dict(values["lanes"]),
        dense=dict(values["dense"]),
    )
    if plan.hash != values["hash"]:
        raise ValueError("its hash does not fit its content")
    return plan


def make(
    assignments: Sequence[Assignment],
    matrices: Mapping[str, np.ndarray],
    *,
    weights: Mapping[str, Weights] | None = None,
    source: str = "",
    parameters: int | None = None,
    settings: SolveSettings | None = None,
    as_layers: bool = True,
    dense: Mapping[str, str] | None = None,
) -> RunPlan:
    """Make the plan of a run; every matrix and weight is read once.

    Args:
        assignments: The matrices that change, and the rule for each.
        matrices: The matrices by name.
        weights: Their weights by name; names that are missing have none.
        source: Path or name of the model.
        parameters: Number of parameters of the whole model; by default the entries of
            the matrices.
        settings: Settings of the solves.
        as_layers: Whether the factors become layers, which may hold fewer parameters,
            or are stored as they are.
        dense: Reasons of the matrices that stay dense, by name.
    """
    weights = weights or {}
    if parameters is None:
        parameters = sum(int(x.size) for x in matrices.values())
    ordered = sorted(assignments, key=lambda assignment: natural(assignment.name))
    tasks = []
    for index, assignment in enumerate(ordered):
        name, rule = assignment.name, assignment.rule
        left, right = weights.get(name, (None, None))
        has_weights = left is not None or right is not None
        tasks.append(
            MatrixTask(
                index=index,
                name=name,
                shape=assignment.shape,
                dtype=str(matrices[name].dtype),
                digest=digest(matrices[name]),
                weights=digests((left, right)),
                method=assignment.method.name,
                configurations=assignment.configurations,
                norm=str(Norm.for_weights(rule.norm, has_weights)),
                parameters=num_stored(assignment, as_layers=as_layers),
                rule=rule,
            )
        )
    return RunPlan(
        source=source,
        settings=settings or SolveSettings(),
        tasks=tuple(tasks),
        parameters=parameters,
        dense=dict(dense or {}),
    )


def num_stored(assignment: Assignment, *, as_layers: bool) -> int:
    """Return the number of parameters that are stored in place of a matrix.

    Args:
        assignment: The matrix and its rule.
        as_layers: As for `make`.
    """
    if assignment.configurations and not as_layers:
        shape = assignment.shape
        return sum(x.num_parameters(shape) for x in assignment.configurations)
    return assignment.num_parameters


def differences(old: RunPlan, new: RunPlan, most: int = 4) -> list[str]:
    """Return lines that say in what two plans differ, the first few of them."""
    lines = []
    for field in dataclasses.fields(SolveSettings):
        ours, theirs = (getattr(x.settings, field.name) for x in (new, old))
        if ours != theirs:
            lines.append(f"{field.name} was {theirs}, now {ours}")
    before, after = ({task.name: task for task in x.tasks} for x in (old, new))
    for word, names in (
        ("new", after.keys() - before),
        ("gone", before.keys() - after),
    ):
        if names:
            first, *rest = sorted(names, key=natural)
            lines.append(f"{first}{f' and {len(rest)} more' if rest else ''}: {word}")
    for name in sorted(before.keys() & after, key=natural):
        lines += _changed(before[name], after[name])
    if not lines:
        lines = ["the order of the matrices"]
    more = len(lines) - most
    return lines[:most] + ([f"and {more} more"] if more > 0 else [])


def digest(matrix: np.ndarray) -> str:
    """Return the digest of a matrix: its shape, its dtype and its numbers."""
    sha = hashlib.sha256(repr((matrix.shape, str(matrix.dtype))).encode())
    sha.update(np.ascontiguousarray(matrix).view(np.uint8).data)
    return sha.hexdigest()


def digests(weights: Weights) -> tuple[str, str]:
    """Return the digests of both weights; "" for one that is missing."""
    left, right = ("" if x is None else digest(x) for x in weights)
    return left, right


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
    return "; ".join(f"{x.a_shape[0]}x{x.a_shape[1]}, {x.rank}" for x in configurations)


def pattern(rule: recipes.Rule) -> str:
    """Return what a rule matches, in words."""
    return rule.match if isinstance(rule.match, str) else ", ".join(rule.match)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort numbers in names as numbers."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(x), x) if x.isdecimal() else (1, 0, x) for x in parts]
