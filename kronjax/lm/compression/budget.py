"""Budgets for whole models, and their division among the layers.

A budget is a fraction of the linear layers (`0.8`), or a limit for the whole model:
parameters (`81M`), bytes (`160MB`, `150MiB`) or floating-point operations for a token
(`170MFLOP`). Every layer has several sizes with a damage each; `share` chooses the
sizes with the least total damage that the budget allows: greedily on the lower convex
hulls, which is optimal but for the last layer.

>>> Budget.parse("81M")
Budget(measure='parameters', amount=81000000.0)
>>> share([[(1, 5.0), (4, 1.0)], [(1, 9.0), (4, 0.0)]], 5)
[0, 1]
"""

import dataclasses
import heapq
import math
import re
from collections.abc import Sequence
from typing import Literal

Measure = Literal["fraction", "parameters", "bytes", "flops"]

_SCALES = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_BYTES = {"KB": 1e3, "MB": 1e6, "GB": 1e9}
_BYTES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit for the size of a model.

    Attributes:
        measure: `fraction` of the parameters of the linear layers, or `parameters`,
            `bytes` or `flops` of the whole model.
        amount: The limit, in that measure.
    """

    measure: Measure
    amount: float

    @classmethod
    def parse(cls, text: str | float) -> "Budget":
        """Read a budget.

        Raises:
            ValueError: If the text is not a budget; says how to write it.
        """
        match = re.fullmatch(
            r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", str(text)
        )
        try:
            amount = float(match[1]) if match else math.nan
        except ValueError:
            amount = math.nan
        unit = match[2].upper() if match else "?"
        if amount > 0 and unit == "" and amount <= 1:
            return cls("fraction", amount)
        if amount > 0 and unit in _SCALES and amount * _SCALES[unit] > 1:
            return cls("parameters", amount * _SCALES[unit])
        if amount > 0 and unit in _BYTES:
            return cls("bytes", amount * _BYTES[unit])
        stem = re.fullmatch(r"([KMGT]?)FLOPS?", unit)
        if amount > 0 and stem:
            return cls("flops", amount * _SCALES[stem[1]])
        raise ValueError(
            f"budget {text!r}: write a fraction of the linear layers (0.8), or for the "
            "whole model parameters (81M), bytes (160MB) or operations for a token "
            "(170MFLOP)"
        )

    def __str__(self) -> str:
        """Return the budget in words."""
        if self.measure == "fraction":
            return f"{self.amount:g} of the linear layers"
        words = {"parameters": "parameters", "bytes": "bytes", "flops": "FLOP a token"}
        return f"{self.amount:,.0f} {words[self.measure]}"


Offer = tuple[float, float]
"""The cost of a size of a layer, and its damage."""


def share(offers: Sequence[Sequence[Offer]], budget: float) -> list[int]:
    """Choose an offer for every layer.

    Args:
        offers: For each layer its offers, in any order.
        budget: The largest total cost.

    Returns:
        The index of the chosen offer of every layer.

    Raises:
        ValueError: If the cheapest offers cost more; says how much.
    """
    hulls = [_hull(of_layer) for of_layer in offers]
    spent = sum(offers[i][hull[0]][0] for i, hull in enumerate(hulls))
    if spent > budget * (1 + 1e-12):
        raise ValueError(
            f"the budget of {budget:,.0f} is below the smallest possible, {spent:,.0f}"
        )
    places = [0] * len(hulls)
    queue: list[tuple[float, int]] = []

    def push(i):
        if places[i] + 1 < len(hulls[i]):
            (cost, damage), (more, less) = (
                offers[i][hulls[i][place]] for place in (places[i], places[i] + 1)
            )
            heapq.heappush(queue, (-(damage - less) / (more - cost), i))

    for i in range(len(hulls)):
        push(i)
    while queue:
        _, i = heapq.heappop(queue)
        step = offers[i][hulls[i][places[i] + 1]][0] - offers[i][hulls[i][places[i]]][0]
        if spent + step <= budget * (1 + 1e-12):
            spent += step
            places[i] += 1
            push(i)
    return [hull[place] for hull, place in zip(hulls, places, strict=True)]


def _hull(offers: Sequence[Offer]) -> list[int]:
    """Return the indices of offers on the lower convex hull, in order of cost."""
    hull: list[int] = []
    for i in sorted(range(len(offers)), key=lambda i: offers[i]):
        cost, damage = offers[i]
        if hull and damage >= offers[hull[-1]][1]:
            continue
        while len(hull) > 1:
            (c0, d0), (c1, d1) = offers[hull[-2]], offers[hull[-1]]
            if (d0 - d1) * (cost - c1) > (d1 - damage) * (c1 - c0):
                break
            hull.pop()
        if hull and offers[hull[-1]][0] == cost:
            hull.pop()
        hull.append(i)
    return hull
