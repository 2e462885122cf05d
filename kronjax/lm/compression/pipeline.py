"""A model, a recipe or a budget, and some text in; a smaller model and a report out.

    moments of the text → plan → one run of fits for all layers → layers replaced

`compress` returns the smaller model, `run` everything that is known about it. The fits
are those of `kronjax.runs`: with a folder for the work every layer is stored as it is
finished, so that the same call resumes after an interruption, and several hosts can
share the layers.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from kronjax import recipe as recipes
from kronjax.io.progress import timed
from kronjax.lm.checkpoints import dtypes, hugging_face
from kronjax.lm.compression import allotment, candidates, plan
from kronjax.lm.compression import refine as refinement
from kronjax.lm.compression.budget import Budget
from kronjax.lm.compression.fits import Fits, in_order, open_cache
from kronjax.lm.compression.moments import Moments, measure_moments, pack, unpack
from kronjax.lm.compression.options import (
    TextOptions,
    refuse_starts_of_budgets,
    understood,
)
from kronjax.lm.compression.plan import Plan
from kronjax.lm.compression.result import Layer, Result
from kronjax.lm.models import sizes
from kronjax.lm.models.base import LanguageModel, fingerprint
from kronjax.lm.models.reading import tokens_of
from kronjax.lm.text.documents import Text
from kronjax.recipe import Assignment, Recipe, Weighting
from kronjax.runs.engine import Inputs
from kronjax.runs.factorize import refuse_unused_starts
from kronjax.runs.plan import RunPlan, SolveSettings
from kronjax.runs.processes import Hosts

Calibration = str | Path | Text | np.ndarray | Moments


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
        ValueError: If the budget is impossible, the recipe does not fit the model,
            there is no text where one is needed, or an option has no effect.
    """
    return run(model, recipe, calibration, **options).model


def run(
    model: LanguageModel,
    recipe: Recipe | Budget | str | Path | float,
    calibration: Calibration | None = None,
    *,
    tolerance: float = 1e-2,
    num_starts: int = 1,
    seed: int = 0,
    max_products: int | None = None,
    **options: Any,
) -> Result:
    """Compress a model, and return the result with its record.

    Args:
        model: As for `compress`, and so are `recipe` and `calibration`.
        recipe: Rules or a budget.
        calibration: Text or moments.
        tolerance: Relative gap at which a fit is good enough: 0.01 is one per cent.
        num_starts: Number of starting points of a fit; the best is taken to the end.
        seed: Seed of the perturbed starts.
        max_products: Products of the size of `EᵀE` that a stage of a fit may spend;
            chosen from the size of the kernel if None.
        options: Those of `prepare`.

    Returns:
        `Result`, in process 0; in the others the model is left as it was.
    """
    settings = SolveSettings(tolerance, num_starts, seed, max_products)
    return prepare(model, recipe, calibration, settings=settings, **options).run()


def prepare(
    model: LanguageModel,
    recipe: Recipe | Budget | str | Path | float,
    calibration: Calibration | None = None,
    *,
    settings: SolveSettings | None = None,
    weighting: Weighting | None = None,
    tokens: int | None = None,
    refine: int = 0,
    sequential: bool = False,
    work: str | Path | None = None,
    hosts: Hosts | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> "Prepared":
    """Measure moments and plan.

    Args:
        model: As for `compress`, and so are `recipe` and `calibration`.
        recipe: Rules or a budget.
        calibration: Text or moments.
        settings: Settings of the solves.
        weighting: Moments that a budget is planned by: by default `input+gradient`
            where there is a text, `none` where there is not.
        tokens: Number of tokens of the text to read, from its beginning; `TOKENS` by
            default.
        refine: Steps of `refine.refine` for every block; 0 for none.
        sequential: Whether every block is weighted by the outputs of the compressed
            blocks before it: see `sequential`.
        work: A folder, or a URL, in which moments and finished layers are stored, and
            from which the same call resumes.
        hosts: The processes that share the fits, from `processes.meet`.
        force: Whether to replace the results of another plan in `work`.
        progress: Whether to draw bars; by default on a terminal, after two seconds.

    Returns:
        `Prepared`, from which the fits can be estimated or run.
    """
    settings, hosts = settings or SolveSettings(), hosts or Hosts(0, 1)
    if sequential and hosts.processes > 1:
        raise ValueError(
            "fits in sequence cannot be shared by several processes: every block needs "
            "the one before it"
        )
    if work is None and hosts.processes > 1:
        raise ValueError("several processes share their results in a folder: give work")
    rules = understood(recipe)
    options = TextOptions(weighting, tokens, refine, sequential)
    options.check(rules, calibration)
    refuse_starts_of_budgets(rules, settings)
    budget = rules if isinstance(rules, Budget) else None
    plan.compressible(model)
    # A mistake in the rules shows before anything takes time.
    assignments = []
    if isinstance(rules, Recipe):
        assignments = plan.resolve(rules, model)
    refuse_unused_starts(assignments, settings)
    needed = options.needed(rules, assignments, calibration)
    read = options.read(model, calibration)
    where = None if work is None else str(work).rstrip("/")
    cache, working = open_cache(where, force), precise(model)
    seconds: dict[str, float] = {}
    with timed(seconds, "calibrate"):
        count = options.num_tokens
        moments = _moments(working, calibration, needed, count, cache, progress)
    made = None
    if budget is not None:
        with timed(seconds, "plan"):
            made = plan.make(
                model,
                budget,
                moments,
                weighting=needed,
                max_products=settings.max_products,
                work=cache,
                progress=progress,
            )
        rules = made.recipe()
        assignments = plan.resolve(rules, model)
    assert isinstance(rules, Recipe)
    choices = {choice.name: choice for choice in made.choices} if made else {}
    total = sizes.count(model).parameters
    fits = Fits(settings, where, cache, hosts, force, progress, total, choices)
    return Prepared(
        model, working, rules, assignments, made, moments, fits, options, read, seconds
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
        fits: The runs of the fits.
        options: The options that need a text.
        read: Tokens for refinement and fits in sequence, or None.
        seconds: Seconds by stage.
    """

    model: LanguageModel
    working: LanguageModel
    rules: Recipe
    assignments: Sequence[Assignment]
    plan: Plan | None
    moments: Moments | None
    fits: Fits
    options: TextOptions
    read: np.ndarray | None
    seconds: dict[str, float]

    def planned(self) -> tuple[RunPlan, Inputs]:
        """Return the plan of the run of all fits, and its inputs; nothing is solved."""
        return self.fits.planned(self.working, self.assignments, self.moments)

    def run(self) -> Result:
        """Fit all layers, refine them if asked to, and return the smaller model."""
        model, working, seconds = self.model, self.working, self.seconds
        smaller = nnx.merge(*nnx.split(working))
        with timed(seconds, "fit"):
            done = self._fit(smaller)
        rules = self.rules if self.plan is None else _as_fitted(self.rules, done)
        blocks = None
        is_first = self.fits.hosts.process == 0
        if self.options.refine and self.read is not None and is_first:
            with timed(seconds, "refine"):
                blocks = refinement.refine(
                    smaller,
                    working,
                    self.read,
                    steps=self.options.refine,
                    work=self.fits.cache,
                    progress=self.fits.progress,
                )
        if working is not model:
            smaller = dtypes.restored(smaller, model)
        smaller.tokenizer, smaller.recipe = model.tokenizer, recipes.dumps(rules)
        layers = in_order(model, [*done, *self._left_dense()])
        if self.plan is not None and is_first:
            _check_budget(smaller, self.plan.budget, layers)
        return Result(
            model=smaller,
            recipe=rules,
            plan=self.plan,
            layers=tuple(layers),
            blocks=blocks,
            moments=self.moments,
            before=sizes.count(model),
            after=sizes.count(smaller),
            seconds=seconds,
        )

    def _left_dense(self) -> list[Layer]:
        """Return the layers that rules would not make smaller, and damaged ones."""
        layers = [
            Layer.left_dense(assignment, "dense", reason)
            for assignment, reason in plan.staying_dense(self.rules, self.model)
        ]
        for x in self.plan.choices if self.plan else ():
            if x.reason == candidates.DAMAGED:
                kept = Assignment(x.name, x.shape, x.method, (), x.rule)
                reason = f"stays dense: {x.reason}"
                layers.append(Layer.left_dense(kept, "failed", reason))
        return layers

    def _fit(self, model: LanguageModel) -> list[Layer]:
        """Fit every layer that changes; return what they become, in their order."""
        if not self.options.sequential:
            return self.fits.at_once(model, self.assignments, self.moments)
        assert self.moments is not None and self.read is not None
        return self.fits.in_sequence(model, self.assignments, self.moments, self.read)


def _check_budget(
    model: LanguageModel, budget: Budget, layers: Sequence[Layer]
) -> None:
    """Refuse a model that exceeds its budget because fits have failed.

    Raises:
        ValueError: If it does; the message names a layer and the reason.
    """
    size = allotment.size_of(model, budget)
    failed = [layer for layer in layers if layer.status == "failed"]
    if failed and size is not None and size > budget.amount:
        raise ValueError(
            f"the model takes {size:,.0f}, more than its budget of {budget}, for "
            f"{len(failed)} layers could not be compressed: {failed[0].name} "
            f"{failed[0].reason}; raise the budget, or mend the checkpoint"
        )


def precise(model: LanguageModel) -> LanguageModel:
    """Return a model that computes in float32: itself if it does."""
    if all(x.dtype == np.float32 for x in jax.tree.leaves(nnx.state(model, nnx.Param))):
        return model
    copy = hugging_face.cast(model, "float32")
    copy.tokenizer = model.tokenizer
    return copy


def _moments(model, calibration, needed, tokens, cache, progress) -> Moments | None:
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

    key = fingerprint(model), read, needed
    return unpack(*cache.get_or_compute("moments", measured, *key))


def _as_fitted(rules: Recipe, done: Sequence[Layer]) -> Recipe:
    """Return the rules of a plan with the methods that were taken in the end."""
    taken = {layer.name: layer.rule for layer in done}
    changed = (
        taken.get(rule.match, rule) if isinstance(rule.match, str) else rule
        for rule in rules.rules
    )
    return rules.model_copy(update={"rules": tuple(changed)})
