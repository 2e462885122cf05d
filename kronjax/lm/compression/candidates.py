"""Candidates for every layer: the sizes it could have, and the damage of each.

A layer can stay dense, or become at a number of sizes low rank (interpolative, with the
fewest parameters), a sum of near-square Kronecker products, or a mixture of both,
whichever does the least damage. The damage of low rank is known at every size from the
singular values of the whitened kernel. The damage of sums relative to it is measured by
joint fits in a few blocks, for every kind of layer.

>>> kind_of_layer("h.3.mlp.c_fc")
('h.*.mlp.c_fc', 3)
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kronjax import methods
from kronjax.io.cache import Cache
from kronjax.kronecker import Configuration
from kronjax.lm.compression import mixture
from kronjax.methods import Method
from kronjax.recipe import Rule, Weighting
from kronjax.runs.closed_form import LowRank
from kronjax.runs.joint import Prepared, Target

FRACTIONS = tuple(round(0.05 * k, 2) for k in range(2, 18))
"""Sizes of the candidates, as fractions of the dense kernel."""

PROBES = (0.15, 0.3, 0.5)
"""Sizes at which sums are fitted to compare their damage with that of low rank. They
are tried in ascending order, until there is no gain: the larger a sum, the smaller its
gain."""

SHARES = (0.5, 0.0)
"""Mixtures that are probed, by the fraction of their parameters that is low rank. In
the bundled model near-square terms alone did not gain in any layer whose mixture did
not."""

WORTH, NEAR = 0.9, 0.1
"""Sums are candidates where probes predict at most this fraction of the damage of low
rank, and at sizes no further than this from the size of a probe. At larger sizes they
lose: for SmolLM2-135M at 0.8 all mixtures that were fitted at 0.65 to 0.85 of a kernel,
more than thirty, did more damage than low rank, though probes at 0.5 had predicted 2 to
12 % less."""

BLOCKS = 2
"""Number of blocks in which every kind of layer is probed, spread evenly."""

DAMAGED = "it holds NaN or infinite entries"
"""Reason for a layer that stays dense because nothing can be fitted to it."""

Probe = tuple[str, float, float, float]
"""A layer, the share of low rank in a mixture, the size of the mixture as a fraction of
the kernel, and its damage divided by that of low rank."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A size and a method for a layer.

    Attributes:
        name: Name of the layer.
        shape: `(n_in, n_out)`.
        rule: The rule that makes it.
        fraction: Parameters of the kernel over those of the dense kernel.
        damage: Predicted damage, in nats per token if there are gradients.
        low_rank: Damage of low rank at the same size, from its closed form.
        reason: The reason for the method, in words.
    """

    name: str
    shape: tuple[int, int]
    rule: Rule
    fraction: float
    damage: float
    low_rank: float
    reason: str

    @property
    def method(self) -> Method:
        """The method of the rule."""
        return methods.find(self.rule.method)

    @property
    def configurations(self) -> tuple[Configuration, ...]:
        """The Kronecker sum to fit; none where the layer stays dense."""
        return self.method.configurations(self.rule, self.shape)


def kind_of_layer(name: str) -> tuple[str, int]:
    """Return the name with `*` for the number of its block, and that number."""
    block = re.search(r"\.(\d+)\.", name)
    if block is None:
        return name, 0
    return name[: block.start()] + ".*." + name[block.end() :], int(block[1])


def probed(names: Iterable[str]) -> set[str]:
    """Return the layers to probe: of every kind those of a few blocks."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of_layer(name)[0], []).append(name)
    chosen = set()
    for members in kinds.values():
        places = (np.arange(BLOCKS) + 0.5) * len(members) / BLOCKS
        chosen |= {members[int(place)] for place in places}
    return chosen


def probe(
    target: Target, low_rank: LowRank, work: Cache, max_products: int
) -> list[Probe]:
    """Fit mixtures at a few sizes; return their damages over those of low rank.

    Args:
        target: A kernel with its weights.
        low_rank: Its low-rank sums.
        work: Cache of the results.
        max_products: Products that each fit may spend.
    """

    def make():
        return {}, {"ratios": list(_ratios(target, low_rank, max_products))}

    key = *target.arrays, PROBES, SHARES, max_products
    _, facts = work.get_or_compute("probe", make, *key)
    return [(target.name, *ratio) for ratio in facts["ratios"]]


def _ratios(target, low_rank, max_products):
    """Yield shares, sizes and damages over those of low rank, while there is gain."""
    prepared = Prepared(target)
    for fraction in PROBES:
        tail = low_rank.tail(fraction)
        for share in SHARES:
            ranks = mixture.mix(target.shape, fraction, share)
            if tail == 0 or not all(ranks[share == 0 :]):
                continue
            fitted = prepared.fit(
                mixture.configurations(target.shape, ranks), max_products=max_products
            )
            ratio = fitted.relative**2 / tail
            yield share, fraction, ratio
            if share and ratio > 1:
                return


def of_layer(
    name: str,
    layer: Any,
    total: float,
    tails: np.ndarray,
    ratios: Sequence[Probe],
    weighting: Weighting = "none",
) -> list[Candidate]:
    """Return the candidates of a layer: dense, and the best method of every size.

    Args:
        name: Name of the layer.
        layer: The dense layer.
        total: Damage of leaving the layer out.
        tails: `[k + 1]`, relative squared error of low rank, of every rank from 0 on.
        ratios: Results of all probes.
        weighting: Weighting of the error in the rules.
    """
    shape = layer.in_features, layer.out_features
    whole, width = math.prod(shape), layer.kernel.get_value().dtype.itemsize
    keep = Rule(match=name, method="keep")
    candidates = [Candidate(name, shape, keep, 1.0, 0.0, 0.0, "worth its parameters")]
    for fraction in FRACTIONS:
        low = Rule(match=name, method="interpolative", fraction=fraction)
        method = methods.find(low.method)
        (low_rank,) = method.configurations(low, shape)
        tail = float(tails[min(low_rank.rank, len(tails) - 1)])
        expected = {x: _ratio(name, x, fraction, ratios) for x in SHARES}
        share = min(SHARES, key=lambda x: expected[x])
        ratio, held, reason = 1.0, (low_rank,), "low rank is best here"
        if expected[share] <= WORTH:
            method, ratio = methods.find("kronecker"), expected[share]
            held = mixture.configurations(shape, mixture.mix(shape, fraction, share))
            reason = f"{1 - ratio:.0%} less damage than low rank, by probes"
        if not held:
            continue
        made = rule(name, method, held, weighting)
        parameters = method.num_parameters(made, shape)
        # An order of the outputs, too: low rank may take the place of a sum.
        if width * parameters + 4 * shape[1] < width * whole:
            damage = total * tail
            size = parameters / whole
            candidates.append(
                Candidate(name, shape, made, size, damage * ratio, damage, reason)
            )
    return candidates


def damaged(name: str, layer: Any) -> Candidate:
    """Return the only candidate of a layer whose kernel is not finite: dense."""
    shape = layer.in_features, layer.out_features
    keep = Rule(match=name, method="keep")
    return Candidate(name, shape, keep, 1.0, 0.0, 0.0, DAMAGED)


def rule(
    name: str,
    method: Method,
    configurations: Sequence[Configuration],
    weighting: Weighting,
) -> Rule:
    """Return the rule that fits given configurations to a layer.

    Args:
        name: Name of the layer.
        method: A method that fits Kronecker sums.
        configurations: The sum.
        weighting: Weighting of the error.
    """
    fields = method.fields(configurations)
    return Rule(
        match=name,
        method=method.name,
        norm="frobenius",
        weighting=weighting,
        **fields,
    )


def _ratio(
    name: str,
    share: float,
    fraction: float,
    ratios: Sequence[Probe],
) -> float:
    """Return the damage over that of low rank: the mean of probes, by their distance.

    Infinite without a probe of that share and about that size.
    """
    kind, block = kind_of_layer(name)
    logs, weights = [], []
    for probed_layer, probed_share, size, ratio in ratios:
        other, place = kind_of_layer(probed_layer)
        is_near = abs(size - fraction) <= NEAR + 1e-9
        if (other, probed_share) == (kind, share) and is_near:
            distance = abs(place - block) + 30 * abs(size - fraction)
            logs.append(math.log(max(ratio, 1e-12)))
            weights.append(1 / (1 + distance) ** 2)
    if not logs:
        return math.inf
    return math.exp(float(np.average(logs, weights=weights)))
