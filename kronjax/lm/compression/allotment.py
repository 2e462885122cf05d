"""Division of a budget among the layers, so that the whole model keeps to it.

Costs of candidates add up, but for bytes: the file has a header, whose length depends
on all of its entries. So a plan in bytes is measured as a whole, and what it exceeds
the budget by is taken from the room that the layers share.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kronjax import nn
from kronjax.lm.checkpoints import dtypes
from kronjax.lm.compression.budget import Budget, share
from kronjax.lm.compression.candidates import Candidate
from kronjax.lm.models import sizes
from kronjax.lm.models.base import LanguageModel

_ENTRY = 70
"""Bytes of a tensor in the header of a file, besides its name; an estimate."""

Size = Callable[[Sequence[Candidate]], float]
"""A function from the choices for all layers to the size of the file, in bytes."""


def allot(
    model: LanguageModel,
    budget: Budget,
    offered: Mapping[str, Sequence[Candidate]],
    file_size: Size,
) -> tuple[Candidate, ...]:
    """Return the candidates with the least total damage within a budget.

    Args:
        model: The dense model.
        budget: The budget of the whole model, or of its linear layers.
        offered: The candidates of each layer.
        file_size: The size of the file of a plan.

    Raises:
        ValueError: If the budget is below the smallest possible size, which the message
            gives, in the form of a budget that is possible.
    """
    cost = _costs(model, budget)
    costs = [[(cost(x), x.damage) for x in layer] for layer in offered.values()]

    def chosen(picked):
        layers = zip(offered.values(), picked, strict=True)
        return tuple(layer[i] for layer, i in layers)

    def size(choices):
        if budget.measure == "bytes":
            return file_size(choices) + sum(map(_allowance, choices))
        return rest + sum(map(cost, choices))

    rest = _rest(model, offered, budget)
    limit = budget.amount * (_kernels(offered) if budget.measure == "fraction" else 1)
    smallest = [min(range(len(x)), key=lambda i: x[i][0]) for x in costs]  # noqa: B023
    least = size(chosen(smallest))
    if least > limit * (1 + 1e-12):
        raise ValueError(_refusal(budget, least, _kernels(offered)))
    room = limit - rest
    while True:
        try:
            choices = chosen(share(costs, room))
        except ValueError:  # estimated costs of headers
            return chosen(smallest)
        excess = size(choices) - limit
        if excess <= limit * 1e-12:
            return choices
        room = sum(map(cost, choices)) - excess


def size_of(model: LanguageModel, budget: Budget) -> float | None:
    """Return the size of a model in the measure of a budget; None for a fraction."""
    if budget.measure == "fraction":
        return None
    if budget.measure == "bytes":
        return dtypes.file_size(model)
    return getattr(sizes.count(model), budget.measure)


def check_room(
    model: LanguageModel,
    budget: Budget,
    offered: Mapping[str, Sequence[Candidate]],
    file_size: Size,
) -> None:
    """Refuse a budget below the size of what no plan changes.

    Args:
        model: The dense model.
        budget: The budget.
        offered: Candidates of each layer, before anything is measured.
        file_size: The size of the file of a plan.

    Raises:
        ValueError: If nothing is left for the linear layers; the message gives a
            budget that is possible.
    """
    rest = _rest(model, offered, budget)
    if budget.measure == "fraction" or rest < budget.amount:
        return
    cost = _costs(model, budget)
    choices = [min(layer, key=cost) for layer in offered.values()]
    least = rest + sum(map(cost, choices))
    if budget.measure == "bytes":
        least = file_size(choices)
    raise ValueError(
        f"a budget of {budget} leaves nothing for the linear layers: the rest of the "
        f"model takes {rest:,.0f}; write {_possible(budget, least)} or more"
    )


def _rest(model: LanguageModel, layers: Mapping[str, Any], budget: Budget) -> float:
    """Return the size of everything but the kernels of the layers."""
    counted = sizes.count(model)
    every: Any = nn.linear_layers(model)
    dense = [every[name].kernel.get_value() for name in layers]
    kernels = sum(math.prod(x.shape) for x in dense)
    held = sum(math.prod(x.shape) * x.dtype.itemsize for x in dense)
    return {
        "fraction": 0,
        "parameters": counted.parameters - kernels,
        "bytes": counted.bytes - held,
        "flops": counted.flops - 2 * kernels,
    }[budget.measure]


def _costs(model: LanguageModel, budget: Budget) -> Callable[[Candidate], float]:
    """Return the function that measures the kernel of a candidate."""
    layers: Any = nn.linear_layers(model)

    def parameters(choice):
        return round(choice.fraction * math.prod(choice.shape))

    def flops(choice):
        return choice.method.flops(choice.rule, choice.shape)

    def held(choice):
        width = layers[choice.name].kernel.get_value().dtype.itemsize
        tensors = 1
        if choice.method.changes:
            # An order of the outputs, too, where the layer is interpolative.
            tensors = max(2 * len(choice.configurations), 3)
        entries = tensors * (len(choice.name) + _ENTRY)
        return parameters(choice) * width + entries + _allowance(choice)

    costs = {"flops": flops, "bytes": held}
    return costs.get(budget.measure, parameters)


def _allowance(choice: Candidate) -> int:
    """Return the bytes by which the layer of a fit may exceed that of its plan.

    Low rank takes the place of a sum that fits worse; it has an order of the outputs.
    """
    if choice.rule.method in ("keep", "interpolative"):
        return 0
    return 4 * choice.shape[1] + 3 * (len(choice.name) + _ENTRY)


def _kernels(offered: Mapping[str, Sequence[Candidate]]) -> int:
    """Return the number of entries of all dense kernels."""
    return sum(math.prod(layer[0].shape) for layer in offered.values())


def _refusal(budget: Budget, least: float, kernels: int) -> str:
    """Return why a budget is impossible, and the smallest that is possible."""
    if budget.measure == "fraction":
        possible = f"{math.ceil(1e4 * least / kernels) / 1e4:g}"
        return f"a budget of {budget} is below the smallest possible, {possible}"
    return (
        f"a budget of {budget} is below the smallest possible, {least:,.0f}: "
        f"write {_possible(budget, least)} or more"
    )


def _possible(budget: Budget, least: float) -> str:
    """Return the smallest possible budget, as it is to be written."""
    units = {"bytes": "KB", "parameters": "K", "flops": "KFLOP"}
    return f"{math.ceil(least / 100) / 10:.1f}{units[budget.measure]}"
