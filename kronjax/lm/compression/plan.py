"""Plans: the method and the size of every layer for a budget, and the reasons.

Every layer has candidates (`candidates`), and `budget.share` divides the budget so that
the sum of all damages is least.

With moments of inputs and gradients a damage is an estimate of the growth of the loss,
and fragile layers, often those of the first block, stay dense because of it. With
moments of inputs alone it is the relative error of the outputs, and without any that of
the kernel: the comparison of layers is then a guess.

The estimate ranks damages well and is too small for large ones: errors of several
layers add up, and the loss is not quadratic. Reports show the estimate beside the
measurement.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from kronjax import nn
from kronjax import recipe as recipes
from kronjax.io.cache import Cache
from kronjax.io.progress import bar
from kronjax.lm.checkpoints import dtypes
from kronjax.lm.compression import allotment, candidates
from kronjax.lm.compression.budget import Budget
from kronjax.lm.compression.candidates import Candidate, Probe
from kronjax.lm.compression.moments import Moments
from kronjax.lm.models.base import LanguageModel, inner_layers
from kronjax.recipe import Assignment, Recipe, Rule, Weighting
from kronjax.runs import joint
from kronjax.runs.closed_form import LowRank
from kronjax.runs.joint import Target
from kronjax.runs.settings import SolveSettings


@dataclasses.dataclass(frozen=True)
class Plan:
    """One candidate for every layer of a model.

    Attributes:
        budget: The budget of the model.
        weighting: Moments that damages are weighted by.
        choices: The candidates chosen, in the order of the model.
        damage: Sum of their damages.
        ratios: Results of all probes.
    """

    budget: Budget
    weighting: Weighting
    choices: tuple[Candidate, ...]
    damage: float
    ratios: tuple[Probe, ...]

    def recipe(self, name: str = "plan") -> Recipe:
        """Return the plan as rules, one for every layer that changes."""
        return _rules(self.choices, self.budget, name)


def make(
    model: LanguageModel,
    budget: Budget | str | float,
    moments: Moments | None = None,
    *,
    weighting: Weighting | None = None,
    settings: SolveSettings | None = None,
    work: Cache | None = None,
    progress: bool | None = None,
) -> Plan:
    """Plan a model for a budget.

    Args:
        model: A model whose layers are all dense; left as it is.
        budget: A `budget.Budget`, or its text.
        moments: Moments from calibration.
        weighting: Moments to weight by; by default all that there are.
        settings: Settings of the fits. Probes spend half of their products, so that
            the fits are at least as good as predicted.
        work: Cache of decompositions, which the fits need again.
        progress: Whether to draw bars; by default on a terminal, after two seconds.

    Raises:
        ValueError: If the budget is below the smallest possible or a layer is
            compressed already.
    """
    if not isinstance(budget, Budget):
        budget = Budget.parse(budget)
    weighting = weighting or best_weighting(moments)
    work, settings = work or Cache(), settings or SolveSettings()
    products = max((settings.max_products or joint.PRODUCTS) // 2, 1)
    halved = dataclasses.replace(settings, max_products=products)
    layers = compressible(model)
    names = list(layers)

    def file_size(choices):
        return dtypes.file_size(outline(model, _rules(choices, budget)))

    def offers(name, total, tails, ratios):
        return candidates.of_layer(name, layers[name], total, tails, ratios, weighting)

    # Before anything takes time.
    untried = {name: offers(name, 1.0, np.zeros(1), []) for name in names}
    allotment.check_room(model, budget, untried, file_size)
    ratios: list[Probe] = []
    tails: dict[str, tuple[float, np.ndarray]] = {}
    probed = candidates.probed(names)
    with bar(len(names), "planning", unit="layers", wanted=progress) as advance:
        for name in names:
            wanted = target(layers[name], name, moments, weighting)
            if not np.isfinite(wanted.matrix).all():
                advance(1)
                continue
            low_rank = LowRank.kept(wanted, work)
            tails[name] = damage_unit(wanted, low_rank), low_rank.tails
            if name in probed:
                ratios += candidates.probe(wanted, low_rank, work, halved)
            advance(1)
    offered = {
        name: offers(name, *tails[name], ratios)
        if name in tails
        else [candidates.damaged(name, layers[name])]
        for name in names
    }
    choices = allotment.allot(model, budget, offered, file_size)
    return Plan(
        budget, weighting, choices, sum(x.damage for x in choices), tuple(ratios)
    )


def outline(model: LanguageModel, recipe: Recipe) -> LanguageModel:
    """Return a model as a recipe makes it, with abstract arrays: for its sizes.

    Args:
        model: A dense model; its arrays may be abstract. Left as it is.
        recipe: The rules.

    Raises:
        ValueError: If the rules do not fit the model.
    """
    layers: dict[str, Any] = {**compressible(model), **nn.tables(model)}
    graph, state = nnx.split(model)
    made = nnx.merge(graph, jax.eval_shape(lambda: state))
    for assignment in resolve(recipe, model):
        name, rule = assignment.name, assignment.rule
        nn.replace(made, name, assignment.method.outline(rule, layers[name]))
    return dtypes.restored(made, model)


def _rules(choices: Sequence[Candidate], budget: Budget, name: str = "plan") -> Recipe:
    """Return choices as rules, one for every layer that changes."""
    rules = [x.rule for x in choices if x.method.changes]
    if len(rules) < len(choices):
        rules.append(Rule(match="*", method="keep"))
    return Recipe(rules=tuple(rules), name=name, source=f"planned for {budget}")


def damage_unit(target: Target, low_rank: LowRank) -> float:
    """Return the damage of leaving a layer out.

    With gradients it is half the squared weighted norm, an estimate of the increase of
    the loss per token. Without them damages of layers compare only as parts of a whole:
    it is 1.
    """
    return 1.0 if target.right is None else low_rank.total


def low_rank_rule(name: str, rank: int, weighting: Weighting) -> Rule:
    """Return the rule for low rank with the fewest parameters."""
    return Rule(
        match=name,
        method="interpolative",
        rank=rank,
        norm="frobenius",
        weighting=weighting,
    )


def best_weighting(moments: Moments | None) -> Weighting:
    """Return the weighting that uses all of the moments."""
    if moments is None:
        return "none"
    return "input+gradient" if moments.outputs else "input"


def resolve(recipe: Recipe, model: LanguageModel) -> list[Assignment]:
    """Apply rules to the linear layers of a model, without its head, and its tables.

    Returns:
        The layers that become smaller, in order.

    Raises:
        ValueError: If the rules do not fit the model, or it is compressed already.
    """
    return _split(recipe, model)[0]


def staying_dense(recipe: Recipe, model: LanguageModel) -> list[tuple[Assignment, str]]:
    """Return the layers that rules would not make smaller, with the reasons.

    Raises:
        ValueError: As `resolve`.
    """
    return _split(recipe, model)[1]


def _split(recipe, model):
    layers: dict[str, Any] = {**nn.tables(model), **compressible(model)}
    shapes, tables = (
        {name: nn.shape_of(layer) for name, layer in named.items()}
        for named in (compressible(model), nn.tables(model))
    )
    kind = model.config.model_type
    smaller, dense = [], []
    for x in recipes.resolve(recipe, shapes, tables=tables, model_type=kind):
        reason = x.stays_dense(_width(layers[x.name]))
        if reason is None:
            smaller.append(x)
        else:
            dense.append((x, f"stays dense: {reason}"))
    return smaller, dense


def _width(layer: Any) -> int:
    """Return the bytes of an entry of a dense kernel or table."""
    matrix = getattr(layer, "embedding" if isinstance(layer, nn.Table) else "kernel")
    return matrix.get_value().dtype.itemsize


def compressible(model: LanguageModel) -> dict[str, Any]:
    """Return the layers that a plan decides on: all linear layers but the head.

    Raises:
        ValueError: If a layer is compressed already.
    """
    layers = inner_layers(model)
    every = {**layers, **nn.tables(model)}
    done = [k for k, v in every.items() if not nn.is_dense(v)]
    if done:
        raise ValueError(
            f"the model is compressed already ({len(done)} layers, {done[0]} is one); "
            "begin with the dense one, or multiply it out with kronjax export"
        )
    return layers


def target(
    layer: Any, name: str, moments: Moments | None, weighting: Weighting
) -> Target:
    """Return the kernel of a layer with its weights.

    Raises:
        ValueError: If there are no moments of the layer for the weighting.
    """
    kernel = np.asarray(nn.materialize(layer), np.float32)
    if weighting == "none":
        return Target(name, kernel)
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
    return Target(name, kernel, left, right)
