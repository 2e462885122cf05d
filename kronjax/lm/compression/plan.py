"""Plans: what every layer gets for a budget, and why.

Every layer has something to offer (`offers`), and `budget.share` spreads the budget so
that the sum of all damages is least.

With moments of inputs and gradients a damage is an estimate of the loss it costs, and
fragile layers, often those of the first block, stay dense because their estimates say
so. With those of inputs alone it is the relative error of the outputs, and without any
that of the kernel: layers are then compared by guess.

The estimate ranks damages well and is too small for large ones: errors of several
layers meet, and the loss is not quadratic. Reports show both beside each other.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from kronjax import nn
from kronjax import recipe as recipes
from kronjax.io.cache import Work
from kronjax.io.progress import bar
from kronjax.kronecker import Configuration, KroneckerTerms, matmul_cost
from kronjax.lm.compression import candidates, fit
from kronjax.lm.compression.budget import Budget, share
from kronjax.lm.compression.candidates import Candidate, Probe
from kronjax.lm.compression.moments import Moments
from kronjax.lm.models import sizes
from kronjax.lm.models.base import LanguageModel, parameter_dtype
from kronjax.recipe import Assignment, Recipe, Rule, Term, Weighting


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all layers get.

    Attributes:
        budget: What was asked for.
        weighting: What damages are weighted by.
        choices: One for every layer, in the order of the model.
        damage: Sum of all.
        ratios: Of all probes.
    """

    budget: Budget
    weighting: Weighting
    choices: tuple[Candidate, ...]
    damage: float
    ratios: tuple[Probe, ...]

    def recipe(self, name: str = "plan") -> Recipe:
        """Return the plan as rules, one for every layer that changes."""
        rules = [
            rule(one.name, one.kind, one.configurations, self.weighting)
            for one in self.choices
            if one.configurations
        ]
        rules.append(Rule(match="*", method="keep"))
        if len(rules) > len(self.choices):  # nothing is left for the last one
            rules.pop()
        return Recipe(
            rules=tuple(rules), name=name, source=f"planned for {self.budget}"
        )


def rule(
    name: str,
    kind: str,
    configurations: Sequence[Configuration],
    weighting: Weighting,
) -> Rule:
    """Return the rule for one layer.

    Args:
        name: Of the layer.
        kind: `interpolative`, or anything else for a sum.
        configurations: What it consists of.
        weighting: Of its error.
    """
    what: dict[str, Any] = {"method": "interpolative", "rank": configurations[0].rank}
    if kind != "interpolative":
        terms = tuple(Term(a_shape=c.a_shape, rank=c.rank) for c in configurations)
        what = {"method": "kronecker", "terms": terms}
    return Rule(match=name, norm="frobenius", weighting=weighting, **what)


def make(
    model: LanguageModel,
    budget: Budget | str | float,
    moments: Moments | None = None,
    *,
    weighting: Weighting | None = None,
    evaluations: int = fit.EVALUATIONS,
    work: Work | None = None,
    progress: bool | None = None,
) -> Plan:
    """Plan a model for a budget.

    Args:
        model: Dense in all layers; left as it is.
        budget: See `budget.Budget`.
        moments: From calibration.
        weighting: What to weight by; by default all that the moments hold.
        evaluations: That fits of mixtures will spend; those that probe take half of
            it, so that what they promise is kept.
        work: Keeps what the fits to come need again.
        progress: Whether to draw bars; by default on a terminal, after two seconds.

    Raises:
        ValueError: If the budget is below the smallest possible or a layer is
            compressed already.
    """
    if not isinstance(budget, Budget):
        budget = Budget.parse(budget)
    weighting = weighting or best_weighting(moments)
    work = work or Work()
    layers = compressible(model)
    room = _room(model, layers, budget)  # before anything takes time
    names = list(layers)
    ratios: list[Probe] = []
    tails: dict[str, tuple[float, np.ndarray]] = {}
    probed = candidates.probed(names)
    with bar(len(names), "planning", unit="layers", wanted=progress) as advance:
        for name in names:
            wanted = target(layers[name], name, moments, weighting)
            low_rank = fit.LowRank.kept(wanted, work)
            tails[name] = low_rank.total, low_rank.tails
            if name in probed:
                prepared = fit.Prepared(wanted, low_rank)
                ratios += candidates.probe(prepared, work, evaluations // 2)
            advance(1)
    offered = {
        name: candidates.of_layer(name, layers[name], *tails[name], ratios)
        for name in names
    }
    width = layers[names[0]].kernel[...].dtype.itemsize
    measure = _cost_of(budget, width)
    costs = [[(measure(one), one.damage) for one in offered[name]] for name in names]
    picked = share(costs, room)
    choices = tuple(offered[name][i] for name, i in zip(names, picked, strict=True))
    return Plan(
        budget, weighting, choices, sum(x.damage for x in choices), tuple(ratios)
    )


def outline(model: LanguageModel, recipe: Recipe) -> LanguageModel:
    """Return a model as a recipe makes it, with abstract arrays: for its sizes.

    Args:
        model: Dense; its arrays may be abstract. Left as it is.
        recipe: Rules.

    Raises:
        ValueError: If the rules do not fit the model.
    """
    layers = compressible(model)
    graph, state = nnx.split(model)
    made = nnx.merge(graph, jax.eval_shape(lambda: state))
    for one in resolve(recipe, model):
        bias = one.name in layers and layers[one.name].bias is not None
        described: dict[str, Any] = {"bias": bias}
        if one.rule.method == "interpolative":
            rank = one.configurations[0].rank
            described |= {"kind": "interpolative", "shape": one.shape, "rank": rank}
        else:
            terms = [
                {"a": [c.rank, *c.a_shape], "b": [c.rank, *c.b_shape(one.shape)]}
                for c in one.configurations
            ]
            sum_of = "kronecker" if one.name in layers else "kronecker-embedding"
            scales = one.rule.scalars
            described |= {"kind": sum_of, "terms": terms, "scales": scales}
        nn.replace(made, one.name, nn.from_description(described))
    dtype = parameter_dtype(model)
    graph, state, rest = nnx.split(made, nnx.Param, ...)
    cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), state)
    return nnx.merge(graph, cast, rest)


def best_weighting(moments: Moments | None) -> Weighting:
    """Return what moments allow."""
    if moments is None:
        return "none"
    return "input+gradient" if moments.outputs else "input"


def resolve(recipe: Recipe, model: LanguageModel) -> list[Assignment]:
    """Apply rules to the linear layers of a model, its head left out, and its tables.

    Raises:
        ValueError: If the rules do not fit the model, or it is compressed already.
    """
    shapes, tables = (
        {name: nn.shape_of(one) for name, one in named.items()}
        for named in (compressible(model), nn.tables(model))
    )
    kind = model.config.model_type
    return recipes.resolve(recipe, shapes, tables=tables, model_type=kind)


def compressible(model: LanguageModel) -> dict[str, Any]:
    """Return the layers that a plan decides on: all linear ones but the head.

    Raises:
        ValueError: If one is compressed already.
    """
    layers = {k: v for k, v in nn.linear_layers(model).items() if k != "lm_head"}
    every = {**layers, **nn.tables(model)}
    done = [k for k, v in every.items() if nn.describe(v)["kind"] != "dense"]
    if done:
        raise ValueError(
            f"the model is compressed already ({len(done)} layers, {done[0]} is one); "
            "begin with the dense one, or multiply it out with kronjax export"
        )
    return layers


def target(
    layer: Any, name: str, moments: Moments | None, weighting: Weighting
) -> fit.Target:
    """Return the kernel of a layer with its weights.

    Raises:
        ValueError: If the moments lack what the weighting asks for.
    """
    held = layer.embedding if isinstance(layer, nnx.Embed) else layer.kernel
    kernel = np.asarray(held[...], np.float32)
    if weighting == "none":
        return fit.Target(name, kernel)
    if moments is None or name not in moments.sources:
        raise ValueError(
            f"{name} is to be weighted by its {weighting}, and there are no moments of "
            "it; give a text to calibrate with"
        )
    left, right = moments.input(name), None
    if weighting == "input+gradient":
        if name not in moments.outputs:
            raise ValueError("the moments were measured without gradients")
        right = moments.output(name)
    for moment, size in zip((left, right), kernel.shape, strict=True):
        if moment is not None and moment.shape != (size, size):
            raise ValueError(f"the moments of {name} are those of another model")
    return fit.Target(name, kernel, left, right)


def _room(model: LanguageModel, layers: Mapping[str, Any], budget: Budget) -> float:
    """Return what the kernels of the layers may cost together."""
    counted = sizes.count(model)
    dense = [x for x in counted.layers if x.name in layers]
    kernels = sum(math.prod(one.shape) for one in dense)
    if budget.measure == "fraction":
        return budget.amount * kernels
    if budget.measure == "flops":
        return budget.amount - (counted.flops - 2 * kernels)
    per = 1.0
    if budget.measure == "bytes":
        # All layers in the dtype of the first: mixed ones are rounded to it.
        per = next(iter(layers.values())).kernel[...].dtype.itemsize
    whole = counted.parameters if budget.measure == "parameters" else counted.bytes
    room = budget.amount - (whole - per * kernels)
    if room <= 0:
        raise ValueError(
            f"a budget of {budget} leaves nothing for the linear layers: the rest of "
            f"the model takes {whole - per * kernels:,.0f}"
        )
    return room / per


def _cost_of(budget: Budget, width: int) -> Callable[[Candidate], float]:
    """Return what a choice costs, in the measure of `_room`.

    Args:
        budget: What is measured.
        width: Bytes of a parameter; an order is held in integers of four.
    """

    def parameters(choice):
        return choice.fraction * math.prod(choice.shape)

    def flops(choice):
        if choice.kind in ("dense", "interpolative"):
            return 2 * parameters(choice)
        held = choice.configurations
        products = sum(2 * _multiply_adds(choice.shape, one) for one in held)
        return products + (len(held) - 1) * choice.shape[1]

    def with_orders(choice):
        # Of sums, too: an interpolative layer takes the place of a fit that fails.
        order = 4 / width * choice.shape[1]
        return parameters(choice) + order * (choice.kind != "dense")

    costs = {"flops": flops, "bytes": with_orders}
    return costs.get(budget.measure, parameters)


def _multiply_adds(shape, configuration):
    a, b = configuration.a_shape, configuration.b_shape(shape)
    sides = (jax.ShapeDtypeStruct((configuration.rank, *x), np.float32) for x in (a, b))
    stand_ins: Any = tuple(sides)
    return matmul_cost(KroneckerTerms(*stand_ins))
