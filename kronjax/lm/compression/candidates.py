"""What layers offer to a plan: how large they could be, and at what damage.

Dense; and at a number of sizes low rank (interpolative, which takes the fewest
numbers), a sum of near-square Kronecker products, or a mixture of both, whichever does
the least damage. That of low rank is known at every size from the singular values of
the whitened kernel. What the others leave of it is measured: joint fits in a few
blocks, for every kind of layer.

>>> kind_of_layer("h.3.mlp.c_fc")
('h.*.mlp.c_fc', 3)
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kronjax.io.cache import Work
from kronjax.kronecker import Configuration, interpolative_rank
from kronjax.lm.compression import fit, mixture

FRACTIONS = tuple(round(0.05 * k, 2) for k in range(2, 18))
"""Sizes that are offered, as parts of the dense kernel."""

PROBES = (0.15, 0.3, 0.5)
"""Sizes at which sums are fitted to learn what they leave of low rank's damage. From
the smallest up, and no further than they gain: the larger a sum, the less it does."""

SHARES = {"mixture": 0.5, "kronecker": 0.0}
"""Kinds of sums that are probed, and the part of them that is low rank. Of the bundled
model no layer whose mixture lost had near-square terms alone that won."""

WORTH, NEAR = 0.9, 0.1
"""Other sums are offered where probes promise so much of low rank's damage at most, and
at sizes so near to a probe's. At larger ones they lose: of SmolLM2-135M at 0.8 all
mixtures that were fitted at 0.65 to 0.85 of a kernel, more than thirty, came out behind
low rank, though probes at 0.5 had promised 2 to 12 % less."""

BLOCKS = 2
"""Blocks in which every kind of layer is probed, spread evenly."""

Probe = tuple[str, str, float, float]
"""A layer, a kind of sum, a fraction, and its damage over that of low rank."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What a layer gets.

    Attributes:
        name: Of the layer.
        shape: `(n_in, n_out)`.
        kind: `dense`, `interpolative`, `kronecker` or `mixture`.
        configurations: Of its sum; none where it is dense.
        fraction: Parameters of the kernel over those of the dense one.
        damage: Predicted, in nats per token if there are gradients.
        low_rank: Damage of low rank at the same size, from its closed form.
        reason: In words.
    """

    name: str
    shape: tuple[int, int]
    kind: str
    configurations: tuple[Configuration, ...]
    fraction: float
    damage: float
    low_rank: float
    reason: str


def kind_of_layer(name: str) -> tuple[str, int]:
    """Return the name without the number of its block, and that number."""
    found = re.search(r"\.(\d+)\.", name)
    if found is None:
        return name, 0
    return name[: found.start()] + ".*." + name[found.end() :], int(found[1])


def probed(names: Iterable[str]) -> set[str]:
    """Return the layers of every kind in a few blocks, spread evenly."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of_layer(name)[0], []).append(name)
    found = set()
    for members in kinds.values():
        places = (np.arange(BLOCKS) + 0.5) * len(members) / BLOCKS
        found |= {members[int(place)] for place in places}
    return found


def probe(prepared: fit.Prepared, work: Work, evaluations: int) -> list[Probe]:
    """Fit the kinds of sums at a few sizes; return their damages over low rank's.

    Args:
        prepared: A kernel.
        work: Keeps what is found.
        evaluations: That each fit may spend.
    """
    target = prepared.target

    def make():
        return {}, {"ratios": list(_ratios(prepared, evaluations))}

    _, facts = work.once("probe", make, *target.parts, PROBES, SHARES, evaluations)
    return [(target.name, *ratio) for ratio in facts["ratios"]]


def _ratios(prepared, evaluations):
    """Yield kinds, sizes and damages over those of low rank, while there is gain."""
    for fraction in PROBES:
        tail = prepared.low_rank.tail(fraction)
        for kind, share in SHARES.items():
            ranks = mixture.mix(prepared.target.shape, fraction, share)
            if tail == 0 or not all(ranks[share == 0 :]):
                continue
            found = prepared.mixture(ranks, evaluations=evaluations)
            ratio = found.relative**2 / tail
            yield kind, fraction, ratio
            if kind == "mixture" and ratio > 1:
                return


def of_layer(
    name: str,
    layer: Any,
    total: float,
    tails: np.ndarray,
    ratios: Sequence[Probe],
) -> list[Candidate]:
    """Return what a layer offers: dense, and the best kind of every size."""
    shape = layer.in_features, layer.out_features
    whole = math.prod(shape)
    offers = [Candidate(name, shape, "dense", (), 1.0, 0.0, 0.0, "what it holds pays")]
    for fraction in FRACTIONS:
        rank = max(interpolative_rank(shape, fraction * whole), 1)
        tail = float(tails[min(rank, len(tails) - 1)])
        factors = {"interpolative": 1.0}
        for other in SHARES:
            ratio = _ratio(name, other, fraction, ratios)
            if ratio <= WORTH:
                factors[other] = ratio
        kind = min(factors, key=lambda k: factors[k])
        if kind == "interpolative":
            held: tuple[Configuration, ...] = (Configuration((shape[0], 1), rank),)
            parameters = rank * (sum(shape) - rank)
            reason = "low rank is best here"
        else:
            held = mixture.configurations(
                shape, mixture.mix(shape, fraction, SHARES[kind])
            )
            parameters = sum(one.num_parameters(shape) for one in held)
            reason = f"{1 - factors[kind]:.0%} less damage than low rank, by probes"
        if held and parameters < whole:
            damage = total * tail
            share = parameters / whole
            offers.append(
                Candidate(
                    name,
                    shape,
                    kind,
                    held,
                    share,
                    damage * factors[kind],
                    damage,
                    reason,
                )
            )
    return offers


def _ratio(
    name: str,
    kind: str,
    fraction: float,
    ratios: Sequence[Probe],
) -> float:
    """Return the damage over low rank's: the mean of probes, nearest ones most.

    Infinite without a probe of that kind and about that size.
    """
    same, block = kind_of_layer(name)
    logs, weights = [], []
    for probe, probed_kind, size, ratio in ratios:
        other, place = kind_of_layer(probe)
        is_near = abs(size - fraction) <= NEAR + 1e-9
        if (other, probed_kind) == (same, kind) and is_near:
            far = abs(place - block) + 30 * abs(size - fraction)
            logs.append(math.log(max(ratio, 1e-12)))
            weights.append(1 / (1 + far) ** 2)
    if not logs:
        return math.inf
    return math.exp(float(np.average(logs, weights=weights)))
