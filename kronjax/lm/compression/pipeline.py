"""A model, a recipe or a budget, and some text: a smaller model, and the reasons.

    moments of the text → plan → one fit for every layer → layers swapped

`compress` returns the smaller model; `run` what happened beside it. With a folder for
its work every layer is stored as it is finished, under the hash of everything that it
depends on: the same call then goes on after an interruption.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kronjax import methods, nn
from kronjax import recipe as recipes
from kronjax.io.cache import Work
from kronjax.io.progress import bar, timed
from kronjax.kronecker import Configuration, KroneckerTerms
from kronjax.lm.checkpoints import hugging_face
from kronjax.lm.compression import candidates, fit, fit_groups, plan
from kronjax.lm.compression import refine as refinement
from kronjax.lm.compression import sequential as in_turn
from kronjax.lm.compression.budget import Budget
from kronjax.lm.compression.moments import Moments, measure_moments, pack, unpack
from kronjax.lm.compression.plan import Plan
from kronjax.lm.models import sizes
from kronjax.lm.models.base import LanguageModel, fingerprint, parameter_dtype
from kronjax.lm.models.reading import tokens_of
from kronjax.lm.text.documents import Text
from kronjax.recipe import Recipe

TOKENS = 32_768
"""Tokens of the text that calibration reads, at most."""

_WEIGHTINGS: tuple[recipes.Weighting, ...] = ("none", "input", "input+gradient")

Calibration = str | Path | Text | np.ndarray | Moments


@dataclasses.dataclass(frozen=True)
class Layer:
    """What became of one layer.

    Attributes:
        name: Of the layer.
        configurations: Of its sum.
        kind: The method of the rule, or `interpolative` where that was better.
        parameters: Numbers that are stored for its kernel.
        dense_parameters: Of the dense kernel.
        relative: Weighted Frobenius error over the norm of the kernel.
        damage: As `fit.Fit` has it.
        predicted: By the plan; None without one.
        low_rank: Relative weighted error of low rank of the same size.
        status: Of the solve, in lower case.
        seconds: Spent.
        reason: Why it is so.
    """

    name: str
    configurations: tuple[Configuration, ...]
    kind: str
    parameters: int
    dense_parameters: int
    relative: float
    damage: float
    predicted: float | None
    low_rank: float
    status: str
    seconds: float
    reason: str


@dataclasses.dataclass(frozen=True)
class Result:
    """A smaller model, and how it came about.

    Attributes:
        model: The smaller one.
        recipe: What was done, in rules.
        plan: Why, if there was a budget.
        layers: What became of those that changed, before any refinement.
        blocks: What refinement did, or None without it.
        moments: What they were weighted by, or None.
        before: Sizes of the model given.
        after: Sizes of the smaller one.
        seconds: By stage.
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


def compress(
    model: LanguageModel,
    recipe: Recipe | Budget | str | Path | float,
    calibration: Calibration | None = None,
    **options: Any,
) -> LanguageModel:
    """Return a smaller model.

    Args:
        model: Dense in all layers; left as it is.
        recipe: Rules, the path of their YAML, the name of a built-in recipe, or a
            budget: `0.8` of the linear layers, `"81M"` parameters, `"160MB"`.
        calibration: A text, a path, tokens `[n]`, or moments; needed for weights.
        options: Those of `run`.

    Returns:
        A model with `KroneckerLinear` and `InterpolativeLinear` layers, and the recipe
        as its `recipe`.

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
    evaluations: int = fit.EVALUATIONS,
    refine: int = 0,
    sequential: bool = False,
    work: Path | None = None,
    progress: bool | None = None,
) -> Result:
    """Compress a model, and return what happened.

    Args:
        model: As for `compress`, and so are `recipe` and `calibration`.
        recipe: Rules or a budget.
        calibration: Text or moments.
        weighting: What a budget is planned by: by default `input+gradient` where there
            is a text, `none` where there is not.
        tokens: Of the text that are read, from its beginning.
        evaluations: That a fit of a mixture may spend.
        refine: Steps of `refine.refine` for every block; 0 for none.
        sequential: Whether every block is weighted by what the compressed blocks
            before it hand on: see `sequential`.
        work: A folder in which moments and finished layers are kept, and from which
            they are taken if they are there.
        progress: Whether to draw bars; by default on a terminal, after two seconds.
    """
    read = _read(model, calibration, tokens, refine, sequential)
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
    kept = Work(work)
    working = precise(model)
    with timed(seconds, "calibrate"):
        moments = _moments(working, calibration, weighting, tokens, kept, progress)
    made = None
    if isinstance(asked, Budget):
        with timed(seconds, "plan"):
            made = plan.make(
                model,
                asked,
                moments,
                weighting=weighting,
                evaluations=evaluations,
                work=kept,
                progress=progress,
            )
        rules = made.recipe()
        assignments = plan.resolve(rules, model)
    smaller = nnx.merge(*nnx.split(working))
    with (
        timed(seconds, "fit"),
        bar(len(assignments), "fitting", unit="layers", wanted=progress) as advance,
    ):
        put = functools.partial(_put, smaller, made, evaluations, kept, advance)
        done = _fit_all(assignments, moments, put, sequential, smaller, read)
    assert isinstance(rules, Recipe)
    if made is not None:
        rules = _as_fitted(rules, done)
    blocks = None
    if refine and read is not None:
        with timed(seconds, "refine"):
            blocks = refinement.refine(
                smaller, working, read, steps=refine, work=kept, progress=progress
            )
    if working is not model:
        smaller = hugging_face.cast(smaller, str(parameter_dtype(model)))
    smaller.tokenizer, smaller.recipe = model.tokenizer, recipes.dumps(rules)
    return Result(
        model=smaller,
        recipe=rules,
        plan=made,
        layers=tuple(done),
        blocks=blocks,
        moments=moments,
        before=sizes.count(model),
        after=sizes.count(smaller),
        seconds=seconds,
    )


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

    return unpack(*work.once("moments", measured, fingerprint(model), read, needed))


def _fit_all(assignments, moments, put, sequential, model, read):
    """Fit every assignment; return what became of each layer, in their order."""
    if not sequential or moments is None:
        done = put(moments, assignments)
    else:
        # What comes before the first block comes first.
        tables = nn.tables(model)
        done = put(moments, [x for x in assignments if x.name in tables])
        assignments = [x for x in assignments if x.name not in tables]

        def fit_block(i, moments):
            own = [x for x in assignments if candidates.kind_of_layer(x.name)[1] == i]
            done.extend(put(moments, own))

        in_turn.fit(model, moments, read, fit_block)
    order = [*nn.tables(model), *nn.linear_layers(model)]
    return sorted(done, key=lambda layer: order.index(layer.name))


def _put(model, made, evaluations, work, advance, moments, assignments) -> list[Layer]:
    """Put the sums that are assigned to layers into their places; say what they are."""
    layers: dict[str, Any] = {**nn.tables(model), **nn.linear_layers(model)}
    done = []
    free = made is not None
    for group in fit_groups.of(assignments):
        begun = time.perf_counter()
        targets = [
            plan.target(layers[one.name], one.name, moments, one.rule.weighting)
            for one in group
        ]
        pieces = work.together(
            "layer",
            functools.partial(
                fit_groups.fit_some, targets, group, evaluations, free, work
            ),
            [
                (*target.parts, one, evaluations, free)
                for target, one in zip(targets, group, strict=True)
            ],
        )
        seconds = (time.perf_counter() - begun) / len(group)
        for one, (arrays, facts) in zip(group, pieces, strict=True):
            done.append(_replaced(model, one, arrays, facts, made, seconds))
        advance(len(group))
    return done


def put(
    model: LanguageModel,
    name: str,
    kind: str,
    terms: Sequence[KroneckerTerms],
    scalars: bool = False,
) -> nn.Layer | nn.Table:
    """Put a sum into the place of a dense layer or table, and return what it became.

    Args:
        model: Changed in place.
        name: Of the layer.
        kind: `interpolative`, or anything else for the sum itself.
        terms: One for each configuration.
        scalars: Whether terms get scalars of their own.
    """
    layer: Any = {**nn.tables(model), **nn.linear_layers(model)}[name]
    dtype = parameter_dtype(model)
    if isinstance(layer, nnx.Embed):
        found = nn.KroneckerEmbedding(_held(terms, dtype))
    else:
        bias = None if layer.bias is None else layer.bias[...]
        found = _layer(kind, terms, bias, dtype, scalars)
    nn.replace(model, name, found)
    return found


def _replaced(model, one, arrays, facts, made, seconds) -> Layer:
    """Put one sum into the place of a layer, and say what it is."""
    terms = _terms(arrays)
    scalars = one.rule.scalars and facts["kind"] == "kronecker"
    found = put(model, one.name, facts["kind"], terms, scalars)
    bias = getattr(found, "bias", None)
    chosen = [x for x in made.choices if x.name == one.name] if made else []
    return Layer(
        name=one.name,
        configurations=tuple(map(_configuration, terms)),
        parameters=nn.cost(found).parameters - (0 if bias is None else one.shape[1]),
        dense_parameters=int(np.prod(one.shape)),
        predicted=chosen[0].damage if chosen else None,
        seconds=seconds,
        reason=chosen[0].reason if chosen else f"rule for {one.rule.match}",
        **facts,
    )


def _terms(arrays) -> tuple[KroneckerTerms, ...]:
    """Return the factors of a layer from what `_fit` named."""
    return tuple(
        KroneckerTerms(arrays[f"{i}.a"], arrays[f"{i}.b"])
        for i in range(len(arrays) // 2)
    )


def _layer(kind: str, terms, bias, dtype, scalars: bool = False) -> nn.Layer:
    """Return the layer of a kind that holds `terms` as numbers of `dtype`."""
    if kind == "interpolative":
        (low,) = terms
        return nn.InterpolativeLinear.of(low.a[:, :, 0].T, low.b[:, 0], bias, dtype)
    scales = [jnp.ones(len(one.a), dtype) for one in terms] if scalars else None
    return nn.KroneckerLinear(_held(terms, dtype), bias, scales=scales)


def _held(terms, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), terms)


def _configuration(terms: KroneckerTerms) -> Configuration:
    rank, m1, n1 = terms.a.shape
    return Configuration((m1, n1), rank)


def _as_fitted(rules: Recipe, done) -> Recipe:
    """Return the rules of a plan with the terms that were taken in the end."""
    taken = {layer.name: layer for layer in done}

    def rule(old):
        if not isinstance(old.match, str) or old.match not in taken:
            return old
        layer = taken[old.match]
        method = methods.find(layer.kind)
        return candidates.rule(layer.name, method, layer.configurations, old.weighting)

    return rules.model_copy(update={"rules": tuple(map(rule, rules.rules))})
