"""The runs that fit the layers of a compression, and put the factors into the model.

All layers are one run of `kronjax.runs`; fits in sequence are one run for every block.
In a folder each run has a subfolder, in which every layer is stored as it is finished.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kronjax import methods, nn
from kronjax.io import storage
from kronjax.io.cache import Cache
from kronjax.io.storage import LocalFolder, MemoryFolder, Storage
from kronjax.kronecker import from_arrays, interpolative_rank, to_arrays
from kronjax.lm.compression import candidates, initial_factors, plan
from kronjax.lm.compression import sequential as in_turn
from kronjax.lm.compression.candidates import Candidate
from kronjax.lm.compression.moments import Moments
from kronjax.lm.compression.result import Layer
from kronjax.lm.compression.targets import Targets
from kronjax.lm.models.base import LanguageModel, parameter_dtype
from kronjax.recipe import Assignment, Rule
from kronjax.runs import plan as runs
from kronjax.runs.closed_form import LowRank
from kronjax.runs.engine import Inputs
from kronjax.runs.execute import execute
from kronjax.runs.joint import Target
from kronjax.runs.plan import RunPlan, natural
from kronjax.runs.processes import Hosts
from kronjax.runs.settings import SolveSettings
from kronjax.runs.store import SOLVED

FITS = "fits"
"""Folder of a run inside the folder of the work: `fits`, or `fits-0`, `fits-1`, ..."""

_FORMER = "layer-*.safetensors"
"""Files of versions before 0.1.0, whose results cannot be continued."""


@dataclasses.dataclass(frozen=True)
class Fits:
    """The fits of one compression.

    Attributes:
        settings: Settings of the solves.
        work: Folder or URL of the work, or None to keep it in memory.
        cache: Cache of moments and decompositions.
        hosts: The processes that share the layers.
        force: Whether to remove results of another plan.
        progress: Whether to draw bars.
        parameters: Number of parameters of the dense model.
        choices: The choices of the plan by layer; none without a budget.
    """

    settings: SolveSettings
    work: str | None
    cache: Cache
    hosts: Hosts
    force: bool
    progress: bool | None
    parameters: int
    choices: Mapping[str, Candidate]

    def planned(
        self,
        model: LanguageModel,
        assignments: Sequence[Assignment],
        moments: Moments | None,
    ) -> tuple[RunPlan, Inputs]:
        """Return the plan of the run that fits some layers, and its inputs."""
        targets = Targets(model, assignments, moments)
        made = runs.make(
            assignments,
            targets.matrices,
            weights=targets.weights,
            settings=self.settings,
            parameters=self.parameters,
        )
        return made, Inputs(targets.matrices, targets.weights, self.cache)

    def at_once(
        self,
        model: LanguageModel,
        assignments: Sequence[Assignment],
        moments: Moments | None,
    ) -> list[Layer]:
        """Fit layers in one run; the model gets the results."""
        return in_order(model, self._fit(model, assignments, moments, FITS))

    def in_sequence(
        self,
        model: LanguageModel,
        assignments: Sequence[Assignment],
        moments: Moments,
        tokens: np.ndarray,
    ) -> list[Layer]:
        """Fit block after block, each with moments of the compressed ones before it."""
        tables = nn.tables(model)
        # Embeddings come before the first block.
        first = [x for x in assignments if x.name in tables]
        done = self._fit(model, first, moments, f"{FITS}-0")

        def fit_block(number, moments):
            block = [
                x
                for x in assignments
                if x.name not in tables
                and candidates.kind_of_layer(x.name)[1] == number
            ]
            done.extend(self._fit(model, block, moments, f"{FITS}-{number + 1}"))

        in_turn.fit(model, moments, tokens, fit_block)
        return in_order(model, done)

    def _fit(self, model, assignments, moments, name) -> list[Layer]:
        """Fit layers in one run, and put the results into the model."""
        if not assignments:
            return []
        made, inputs = self.planned(model, assignments, moments)
        place = MemoryFolder()
        if self.work is not None:
            place = storage.find(f"{self.work}/{name}")
        store = execute(
            made,
            inputs,
            place,
            hosts=self.hosts,
            force=self.force,
            progress=self.progress,
            unit="layers",
        )
        if self.hosts.process > 0:
            return []
        records = store.records(made.tasks)
        rules = {assignment.name: assignment for assignment in assignments}
        done = []
        for task in made.tasks:
            record, name = records[task.index], task.name
            if record["status"] != SOLVED:
                done.append(self._failed(rules[name], record))
                continue
            matrix, weights = inputs.matrices[name], inputs.weights[name]
            target, factors = Target(name, matrix, *weights), store.factors(task)
            done.append(self._replace(model, rules[name], target, record, factors))
        return done

    def _failed(self, assignment: Assignment, record: Mapping[str, Any]) -> Layer:
        """Return the layer of a fit that failed, which stays dense."""
        choice = self.choices.get(assignment.name)
        return Layer.left_dense(
            assignment,
            "failed",
            f"stays dense: {record['reason']}",
            predicted=choice.damage if choice else None,
            seconds=record.get("seconds", 0.0),
        )

    def _replace(
        self,
        model: LanguageModel,
        assignment: Assignment,
        target: Target,
        record: Mapping[str, Any],
        factors: dict[str, np.ndarray],
    ) -> Layer:
        """Put factors into the place of a layer; return what it has become."""
        name, rule, shape = assignment.name, assignment.rule, assignment.shape
        choice, errors = self.choices.get(name), record["errors"]
        low_rank = LowRank.kept(target, self.cache)
        rank = interpolative_rank(shape, assignment.num_parameters)
        tail = float(low_rank.tails[rank])
        relative = errors.get("relative_weighted", errors["relative_frobenius"])
        gap = record["bounds"]["gap"]
        is_free = choice is not None and bool(assignment.configurations)
        if is_free and relative**2 > tail * (1 + 1e-6):
            # The plan is free to take low rank of the same size where that is better.
            terms, relative = low_rank.fit(rank)
            rule = plan.low_rank_rule(name, rank, rule.weighting)
            factors, gap = to_arrays((terms,)), 0.0
        if rule.start != "van-loan":
            terms = from_arrays(factors)
            terms = initial_factors.by_name(target.matrix, terms, rule.start)
            factors, gap = to_arrays(terms), None
        method = methods.find(rule.method)
        _put(model, name, rule, factors)
        return Layer(
            name=name,
            rule=rule,
            configurations=method.configurations(rule, shape),
            parameters=method.num_parameters(rule, shape),
            dense_parameters=int(np.prod(shape)),
            relative=relative,
            damage=plan.damage_unit(target, low_rank) * relative**2,
            predicted=choice.damage if choice else None,
            low_rank=float(np.sqrt(tail)),
            gap=gap,
            status=str(record["solver"]),
            seconds=record.get("seconds", 0.0),
            reason=choice.reason if choice else f"rule for {runs.pattern(rule)}",
        )


def open_cache(work: str | None, force: bool = False) -> Cache:
    """Return the cache in the folder of the work; in memory for a URL, or without one.

    Args:
        work: Folder or URL of the work, or None.
        force: Whether to remove the files of an earlier version.

    Raises:
        ValueError: If the folder holds the layers of an earlier version.
        OSError: If the folder is not writable.
    """
    place = None if work is None else storage.find(work)
    if not isinstance(place, LocalFolder):
        return Cache()
    former = list(place.path.glob(_FORMER))
    if former and not force:
        raise ValueError(
            f"{place} holds the half-finished work of an earlier version of kronjax, "
            "which cannot be continued: start anew in another folder, or with --force"
        )
    for path in former:
        path.unlink(missing_ok=True)
    return Cache(place.path)


def stores(work: str) -> list[Storage]:
    """Return the places of all runs in a folder or URL of the work, in order."""
    names = storage.find(work).names("")
    held = [name for name in names if re.fullmatch(rf"{FITS}(-\d+)?", name)]
    return [storage.find(f"{work}/{name}") for name in sorted(held, key=natural)]


def _put(model: LanguageModel, name: str, rule: Rule, factors) -> None:
    layers: dict[str, Any] = {**nn.tables(model), **nn.linear_layers(model)}
    method, dtype = methods.find(rule.method), parameter_dtype(model)
    nn.replace(model, name, method.layer(factors, layers[name], dtype, rule))


def in_order(model: LanguageModel, layers: list[Layer]) -> list[Layer]:
    """Return layers in the order of the model."""
    order = [*nn.tables(model), *nn.linear_layers(model)]
    return sorted(layers, key=lambda layer: order.index(layer.name))
