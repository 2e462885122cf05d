"""A model, a recipe or a budget, and some text in; a smaller model and a report out.

    moments of the text → plan → one run of fits for all layers → layers replaced

`compress` returns the smaller model, `run` everything that is known about it. The fits
are those of `kronjax.runs`: with a folder for the work every layer is stored as it is
finished, so that the same call resumes after an interruption, and several hosts can
share the layers.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from kronjax import nn
from kronjax import recipe as recipes
from kronjax.io import storage
from kronjax.io.cache import Cache
from kronjax.io.progress import timed
from kronjax.io.storage import MemoryFolder, Storage
from kronjax.kronecker import (
    Configuration,
    from_arrays,
    interpolative_rank,
    to_arrays,
)
from kronjax.lm.checkpoints import hugging_face
from kronjax.lm.compression import candidates, initial_factors, plan
from kronjax.lm.compression import refine as refinement
from kronjax.lm.compression import sequential as in_turn
from kronjax.lm.compression.budget import Budget
from kronjax.lm.compression.moments import Moments, measure_moments, pack, unpack
from kronjax.lm.compression.plan import Plan
from kronjax.lm.models import sizes
from kronjax.lm.models.base import LanguageModel, fingerprint, parameter_dtype
from kronjax.lm.models.reading import tokens_of
from kronjax.lm.text.documents import Text
from kronjax.recipe import Assignment, Recipe
from kronjax.runs import plan as runs
from kronjax.runs.closed_form import LowRank
from kronjax.runs.engine import Inputs
from kronjax.runs.execute import execute
from kronjax.runs.joint import Target
from kronjax.runs.plan import MatrixTask, RunPlan, SolveSettings, Weights
from kronjax.runs.processes import Hosts
from kronjax.runs.store import SOLVED, Store

TOKENS = 32_768
"""Number of tokens of the text that calibration reads at most."""

FITS = "fits"
"""Folder of the fits inside the folder of the work."""

_WEIGHTINGS: tuple[recipes.Weighting, ...] = ("none", "input", "input+gradient")

Calibration = str | Path | Text | np.ndarray | Moments


@dataclasses.dataclass(frozen=True)
class Layer:
    """The compression of one layer.

    Attributes:
        name: Name of the layer.
        rule: The rule that made it: of the recipe, or the one for low rank of the same
            size where the plan was free to choose and that was better.
        configurations: Configurations of its sum; none for other methods.
        parameters: Number of parameters of its kernel.
        dense_parameters: Number of entries of the dense kernel.
        relative: Weighted Frobenius error over the weighted norm of the kernel.
        damage: Half the squared weighted error, an estimate of the increase of the loss
            per token; `relative**2` without gradients.
        predicted: The damage that the plan predicted; None without a plan.
        low_rank: Relative weighted error of low rank of the same size.
        gap: Proven gap: no change of all left or of all right factors lowers the
            spectral error by more than this part of it. None where nothing is proven.
        status: Status of the solver, or "failed": then the layer stays dense.
        seconds: Seconds of the fit.
        reason: The reason for the choice.
    """

    name: str
    rule: recipes.Rule
    configurations: tuple[Configuration, ...]
    parameters: int
    dense_parameters: int
    relative: float | None
    damage: float | None
    predicted: float | None
    low_rank: float
    gap: float | None
    status: str
    seconds: float
    reason: str


@dataclasses.dataclass(frozen=True)
class Result:
    """A smaller model, and the record of its compression.

    Attributes:
        model: The smaller model.
        recipe: The rules that were carried out.
        plan: The plan, if there was a budget.
        layers: The layers that changed, before any refinement.
        blocks: The results of refinement, or None without it.
        moments: Moments that the errors were weighted by, or None.
        before: Sizes of the given model.
        after: Sizes of the smaller model.
        seconds: Seconds by stage.
    """

    model: LanguageModel
    recipe: Recipe
    plan: Plan | None
    layers: tuple[Layer, ...]
    blocks: tuple[refinement.Block | None, ...] | None
    moments: Moments | None
    before: sizes.Sizes
    after: sizes.Sizes
    seconds: Mapping[str, float]

    @property
    def failed(self) -> list[Layer]:
        """The layers that stay dense because their fit has failed."""
        return [layer for layer in self.layers if layer.status == "failed"]

    def __repr__(self) -> str:
        """Return the sizes, errors and times in at most ten lines."""
        before, after = self.before, self.after
        changed = [x.relative for x in self.layers if x.relative is not None]
        gaps = [x.gap for x in self.layers if x.gap is not None]
        lines = [
            f"{len(changed)} layers compressed; {after.parameters:,} of "
            f"{before.parameters:,} parameters ({_percent(after, before)})",
            f"{after.bytes / 2**20:,.1f} of {before.bytes / 2**20:,.1f} MiB; "
            f"{after.flops / 1e6:,.1f} of {before.flops / 1e6:,.1f} MFLOP a token",
        ]
        if changed:
            lines.append(
                f"relative weighted errors: median {np.median(changed):.3f}, "
                f"worst {max(changed):.3f}"
            )
        if gaps:
            lines.append(f"proven gaps: worst {max(gaps):.2%}, of {len(gaps)} layers")
        if self.plan is not None:
            lines.append(f"predicted damage {self.plan.damage:.3g}")
        if self.failed:
            lines.append(f"{len(self.failed)} layers failed and stay dense")
        times = ", ".join(f"{name} {s:,.1f} s" for name, s in self.seconds.items())
        return "\n".join([*lines, times])


@dataclasses.dataclass(frozen=True)
class _Fits:
    """How the fits of a compression are run.

    Attributes:
        settings: Settings of the solves.
        where: Folder or URL of the work, or None to keep it in memory.
        cache: Cache of moments and decompositions.
        hosts: The processes that share the layers.
        force: Whether to remove results of another plan.
        progress: Whether to draw bars.
    """

    settings: SolveSettings
    where: str | None
    cache: Cache
    hosts: Hosts
    force: bool
    progress: bool | None

    def place(self, name: str) -> Storage:
        """Return the place of the results of one run."""
        if self.where is None:
            return MemoryFolder()
        return storage.find(f"{self.where}/{name}")


def compress(
    model: LanguageModel,
    recipe: Recipe | Budget | str | Path | float,
    calibration: Calibration | None = None,
    **options: Any,
) -> LanguageModel:
    """Return a smaller model.

    Args:
        model: A model whose layers are all dense; left as it is.
        recipe: Rules, the path of their YAML, the name of a built-in recipe, or a
            budget: `0.8` of the linear layers, `"81M"` parameters, `"160MB"`.
        calibration: A text, a path, tokens `[n]`, or moments; needed for weights.
        options: Those of `run`.

    Returns:
        A model with the layers of the recipe's methods, and the recipe as its `recipe`.

    Raises:
        ValueError: If the budget is impossible, the recipe does not fit the model, or
            there is no text where one is needed.
    """
    return run(model, recipe, calibration, **options).model


def run(
    model: LanguageModel,
    recipe: Recipe | Budget | str | Path | float,
    calibration: Calibration | None = None,
    *,
    weighting: recipes.Weighting | None = None,
    tokens: int = TOKENS,
    tolerance: float = 1e-2,
    num_starts: int = 1,
    seed: int = 0,
    max_products: int | None = None,
    refine: int = 0,
    sequential: bool = False,
    work: str | Path | None = None,
    hosts: Hosts | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> Result:
    """Compress a model, and return the result with its record.

    Args:
        model: As for `compress`, and so are `recipe` and `calibration`.
        recipe: Rules or a budget.
        calibration: Text or moments.
        weighting: Moments that a budget is planned by: by default `input+gradient`
            where there is a text, `none` where there is not.
        tokens: Number of tokens of the text to read, from its beginning.
        tolerance: Relative gap at which a fit is good enough: 0.01 is one per cent.
        num_starts: Number of starting points of a fit; the best is taken to the end.
        seed: Seed of the perturbed starts.
        max_products: Products of the size of `EᵀE` that a stage of a fit may spend;
            chosen from the size of the kernel if None.
        refine: Steps of `refine.refine` for every block; 0 for none.
        sequential: Whether every block is weighted by the outputs of the compressed
            blocks before it: see `sequential`.
        work: A folder, or a URL, in which moments and finished layers are stored, and
            from which the same call resumes.
        hosts: The processes that share the fits, from `processes.meet`.
        force: Whether to replace the results of another plan in `work`.
        progress: Whether to draw bars; by default on a terminal, after two seconds.

    Returns:
        `Result`, in process 0; in the others the model is left as it was.
    """
    prepared = prepare(
        model,
        recipe,
        calibration,
        weighting=weighting,
        tokens=tokens,
        settings=SolveSettings(tolerance, num_starts, seed, max_products),
        refine=refine,
        sequential=sequential,
        work=work,
        hosts=hosts,
        force=force,
        progress=progress,
    )
    return prepared.run()


def prepare(
    model: LanguageModel,
    recipe: Recipe | Budget | str | Path | float,
    calibration: Calibration | None,
    *,
    weighting: recipes.Weighting | None,
    tokens: int,
    settings: SolveSettings,
    refine: int,
    sequential: bool,
    work: str | Path | None,
    hosts: Hosts | None,
    force: bool,
    progress: bool | None,
) -> "Prepared":
    """Measure moments and plan; arguments as of `run`.

    Returns:
        `Prepared`, from which the fits can be estimated or run.
    """
    hosts = hosts or Hosts(0, 1)
    read = _read(model, calibration, tokens, refine, sequential)
    if sequential and hosts.processes > 1:
        raise ValueError(
            "fits in sequence cannot be shared by several processes: every block needs "
            "the one before it"
        )
    seconds: dict[str, float] = {}
    plan.compressible(model)
    asked = rules = _understood(recipe)
    if isinstance(rules, Recipe):
        # A mistake in the rules shows before anything takes time.
        assignments = plan.resolve(rules, model)
        order = (_WEIGHTINGS.index(x.rule.weighting) for x in assignments)
        weighting = _WEIGHTINGS[max(order, default=0)]
    elif weighting is None:
        weighting = "none" if calibration is None else "input+gradient"
    where = None if work is None else str(work)
    fits = _Fits(settings, where, _cache(where, force), hosts, force, progress)
    working = precise(model)
    with timed(seconds, "calibrate"):
        moments = _moments(
            working, calibration, weighting, tokens, fits.cache, progress
        )
    made = None
    if isinstance(asked, Budget):
        with timed(seconds, "plan"):
            made = plan.make(
                model,
                asked,
                moments,
                weighting=weighting,
                max_products=settings.max_products,
                work=fits.cache,
                progress=progress,
            )
        rules = made.recipe()
        assignments = plan.resolve(rules, model)
    assert isinstance(rules, Recipe)
    return Prepared(
        model,
        working,
        rules,
        assignments,
        made,
        moments,
        fits,
        read,
        refine,
        sequential,
        seconds,
    )


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A compression before its fits.

    Attributes:
        model: The given model.
        working: The model in float32.
        rules: The rules of the recipe, or of the plan.
        assignments: The layers that change, and their rules.
        plan: The plan, if there was a budget.
        moments: Moments that errors are weighted by, or None.
        fits: How the fits are run.
        read: Tokens for refinement and fits in sequence, or None.
        refine: Steps of refinement.
        sequential: Whether blocks are fitted in sequence.
        seconds: Seconds by stage.
    """

    model: LanguageModel
    working: LanguageModel
    rules: Recipe
    assignments: Sequence[Assignment]
    plan: Plan | None
    moments: Moments | None
    fits: _Fits
    read: np.ndarray | None
    refine: int
    sequential: bool
    seconds: dict[str, float]

    def run(self) -> Result:
        """Fit all layers, refine them if asked to, and return the smaller model."""
        model, working, seconds = self.model, self.working, self.seconds
        smaller = nnx.merge(*nnx.split(working))
        with timed(seconds, "fit"):
            done = self._fit_all(smaller)
        rules, blocks = self.rules, None
        if self.plan is not None:
            rules = _as_fitted(rules, done)
        is_first = self.fits.hosts.process == 0
        if self.refine and self.read is not None and is_first:
            with timed(seconds, "refine"):
                blocks = refinement.refine(
                    smaller,
                    working,
                    self.read,
                    steps=self.refine,
                    work=self.fits.cache,
                    progress=self.fits.progress,
                )
        if working is not model:
            smaller = hugging_face.cast(smaller, str(parameter_dtype(model)))
        smaller.tokenizer, smaller.recipe = model.tokenizer, recipes.dumps(rules)
        return Result(
            model=smaller,
            recipe=rules,
            plan=self.plan,
            layers=tuple(done),
            blocks=blocks,
            moments=self.moments,
            before=sizes.count(model),
            after=sizes.count(smaller),
            seconds=seconds,
        )

    def planned(
        self, model: LanguageModel, assignments: Sequence[Assignment], moments
    ) -> tuple[RunPlan, Inputs]:
        """Return the plan of the run that fits some layers, and its inputs."""
        targets = _Targets(model, assignments, moments)
        plan = runs.make(
            assignments,
            targets.matrices,
            weights=targets.weights,
            settings=self.fits.settings,
            parameters=sizes.count(self.model).parameters,
        )
        return plan, Inputs(targets.matrices, targets.weights, self.fits.cache)

    def _fit_all(self, model: LanguageModel) -> list[Layer]:
        """Fit every layer that changes; return what they become, in their order."""
        if not self.sequential or self.moments is None:
            done = self._fit(model, self.assignments, self.moments, FITS)
        else:
            # Embeddings come before the first block.
            tables = nn.tables(model)
            first = [x for x in self.assignments if x.name in tables]
            rest = [x for x in self.assignments if x.name not in tables]
            done = self._fit(model, first, self.moments, f"{FITS}-tables")

            def fit_block(number, moments):
                own = [x for x in rest if candidates.kind_of_layer(x.name)[1] == number]
                done.extend(self._fit(model, own, moments, f"{FITS}-{number}"))

            assert self.read is not None
            in_turn.fit(model, self.moments, self.read, fit_block)
        order = [*nn.tables(model), *nn.linear_layers(model)]
        return sorted(done, key=lambda layer: order.index(layer.name))

    def _fit(self, model, assignments, moments, name) -> list[Layer]:
        """Fit some layers in one run, and put the results into the model."""
        if not assignments:
            return []
        plan, inputs = self.planned(model, assignments, moments)
        store = execute(
            plan,
            inputs,
            self.fits.place(name),
            hosts=self.fits.hosts,
            force=self.fits.force,
            progress=self.fits.progress,
            unit="layers",
        )
        if self.fits.hosts.process > 0:
            return []
        records = store.records(plan.tasks)
        by_name = {assignment.name: assignment for assignment in assignments}
        return [
            self._replaced(
                model, by_name[task.name], inputs, store, task, records[task.index]
            )
            for task in plan.tasks
        ]

    def _replaced(
        self,
        model: LanguageModel,
        assignment: Assignment,
        inputs: Inputs,
        store: Store,
        task: MatrixTask,
        record: Mapping[str, Any],
    ) -> Layer:
        """Put one result into the place of its layer."""
        name, rule, shape = assignment.name, assignment.rule, assignment.shape
        target = Target(name, inputs.matrices[name], *inputs.weights[name])
        low_rank = LowRank.kept(target, self.fits.cache)
        rank = interpolative_rank(shape, assignment.num_parameters)
        choice = [x for x in self.plan.choices if x.name == name] if self.plan else []
        facts: dict[str, Any] = {
            "name": name,
            "dense_parameters": int(np.prod(shape)),
            "predicted": choice[0].damage if choice else None,
            "low_rank": float(np.sqrt(low_rank.tails[rank])),
            "seconds": record.get("seconds", 0.0),
            "reason": choice[0].reason if choice else f"rule for {rule.match}",
        }
        if record["status"] != SOLVED:
            facts["reason"] = f"stays dense: {record['reason']}"
            return Layer(
                **facts,
                rule=rule,
                configurations=(),
                parameters=int(np.prod(shape)),
                relative=None,
                damage=None,
                gap=None,
                status="failed",
            )
        errors = record["errors"]
        relative = errors.get("relative_weighted", errors["relative_frobenius"])
        gap, factors = record["bounds"]["gap"], store.factors(task)
        tail = float(low_rank.tails[rank])
        if self.plan and task.configurations and relative**2 > tail * (1 + 1e-6):
            # The plan is free to take low rank of the same size where that is better.
            terms, relative = low_rank.fit(rank)
            rule = plan.low_rank_rule(name, rank, rule.weighting)
            factors, gap = to_arrays((terms,)), 0.0
        if rule.start != "van-loan":
            terms = initial_factors.by_name(
                target.matrix, from_arrays(factors), rule.start
            )
            factors, gap = to_arrays(terms), None
        layers: dict[str, Any] = {**nn.tables(model), **nn.linear_layers(model)}
        method = recipes.methods.find(rule.method)
        layer = method.layer(factors, layers[name], parameter_dtype(model), rule)
        nn.replace(model, name, layer)
        unit = low_rank.total if target.right is not None else 1.0
        return Layer(
            **facts,
            rule=rule,
            configurations=method.configurations(rule, shape),
            parameters=method.num_parameters(rule, shape),
            relative=relative,
            damage=unit * relative**2,
            gap=gap,
            status=str(record["solver"]),
        )


class _Targets:
    """Kernels and weights of layers by name, computed when they are needed."""

    def __init__(self, model, assignments, moments):
        """Keep the layers as they are now; they are replaced later."""
        layers: dict[str, Any] = {**nn.tables(model), **nn.linear_layers(model)}
        self._rules = {x.name: x.rule for x in assignments}
        self._layers = {name: layers[name] for name in self._rules}
        self._moments = moments

    @property
    def matrices(self) -> Mapping[str, np.ndarray]:
        """The kernels `[n_in, n_out]`, float32."""
        return _Computed(self._rules, lambda name: self._target(name).matrix)

    @property
    def weights(self) -> Mapping[str, Weights]:
        """Moments of inputs and of output gradients."""

        def sides(name) -> Weights:
            target = self._target(name)
            return target.left, target.right

        return _Computed(self._rules, sides)

    def _target(self, name) -> Target:
        rule = self._rules[name]
        return plan.target(self._layers[name], name, self._moments, rule.weighting)


class _Computed(Mapping):
    """A mapping whose values are computed at each access."""

    def __init__(self, names, compute):
        """Keep the names and the function."""
        self._names, self._compute = list(names), compute

    def __getitem__(self, name) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _percent(after: sizes.Sizes, before: sizes.Sizes) -> str:
    return f"{100 * after.parameters / max(before.parameters, 1):.1f} %"


def _cache(where: str | None, force: bool) -> Cache:
    """Return the cache in the folder of the work; in memory for a URL.

    Raises:
        ValueError: If the folder holds the layers of an earlier version.
    """
    if where is None or "://" in where:
        return Cache()
    folder = Path(where)
    if not force and any(folder.glob("layer-*.safetensors")):
        raise ValueError(
            f"{folder} holds the half-finished work of an earlier version of kronjax, "
            "which cannot be continued: start anew in another folder, or with --force"
        )
    return Cache(folder)


def precise(model: LanguageModel) -> LanguageModel:
    """Return a model that computes in float32: itself if it does."""
    if parameter_dtype(model) == np.float32:
        return model
    copy = hugging_face.cast(model, "float32")
    copy.tokenizer = model.tokenizer
    return copy


def _read(model, calibration, tokens, refine, sequential):
    """Return the tokens of the text that goes through the model again, or None."""
    if not refine and not sequential:
        return None
    if calibration is None or isinstance(calibration, Moments):
        what = "refinement" if refine else "fitting in sequence"
        raise ValueError(f"{what} needs the text: give one to calibrate with")
    read = tokens_of(model, calibration)[:tokens]
    if refine:
        refinement.check(model, read, refine)
    return read


def _understood(recipe) -> Budget | Recipe:
    """Return the budget or the rules that are meant."""
    if isinstance(recipe, Recipe | Budget):
        return recipe
    try:
        return Budget.parse(recipe)
    except ValueError:
        if isinstance(recipe, int | float):
            raise
    return recipes.load(recipe)


def _moments(model, calibration, needed, tokens, work, progress):
    """Return the moments that are needed: as given, as kept, or measured."""
    if needed == "none":
        return None
    if isinstance(calibration, Moments):
        return calibration
    if calibration is None:
        raise ValueError(
            f"layers are weighted by {needed}: give a text to calibrate with "
            "(--calibrate FILE), or write `weighting: none` into the rules"
        )
    read = tokens_of(model, calibration)[: tokens + 1]
    gradients = needed == "input+gradient"

    def measured():
        return pack(
            measure_moments(model, read, gradients=gradients, progress=progress)
        )

    return unpack(
        *work.get_or_compute("moments", measured, fingerprint(model), read, needed)
    )


def _as_fitted(rules: Recipe, done: Sequence[Layer]) -> Recipe:
    """Return the rules of a plan with the methods that were taken in the end."""
    taken = {layer.name: layer.rule for layer in done}
    changed = (
        taken.get(rule.match, rule) if isinstance(rule.match, str) else rule
        for rule in rules.rules
    )
    return rules.model_copy(update={"rules": tuple(changed)})
