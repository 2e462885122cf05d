"""Layers that are alike, fitted together.

A group is what one program fits in one way: kernels of one shape (of mixtures, or of
its transpose) with weights of the same sides. On an accelerator it goes through as a
batch, in parts that its memory holds. On a CPU a batch is no gain: six kernels of
192x576 took 1.4 times as long as one after the other, as every one is then carried on
until the slowest is done. There a part is one layer, and the group shares the program.

>>> from kronjax import recipe
>>> rules = recipe.loads('rules: [{match: "*", method: low-rank, rank: 2}]')
>>> layers = recipe.resolve(rules, {"a": (8, 8), "b": (8, 8), "c": (8, 4)})
>>> [[one.name for one in group] for group in of(layers, limit=10**9)]
[['a', 'b'], ['c']]
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kronjax.io.cache import Piece, Work
from kronjax.kronecker import interpolative_rank
from kronjax.lm.compression import fit, initial_factors, mixture
from kronjax.lm.compression.fit import Fit, LowRank, Prepared, Target
from kronjax.recipe import Assignment
from kronjax.solver.descent import Status

COPIES = 40
"""Arrays of the size of a kernel that its fit may hold: those of quasi-Newton steps."""


def of(
    assignments: Sequence[Assignment], limit: int | None = None
) -> list[list[Assignment]]:
    """Return the assignments in groups, each in parts that fit into memory.

    Args:
        assignments: In any order; groups are in that of their first members.
        limit: Bytes that a part may take; by default half of what the device has, and
            room for one layer where it does not say.
    """
    if limit is None:
        facts = jax.local_devices()[0].memory_stats() or {}
        limit = int(facts.get("bytes_limit", 0)) // 2
    alike: dict[Any, list[Assignment]] = {}
    for one in assignments:
        alike.setdefault(_way(one), []).append(one)
    parts = []
    for group in alike.values():
        m, n = group[0].shape
        size = max(limit // (4 * (COPIES * m * n + 4 * (m * m + n * n))), 1)
        parts += [group[i : i + size] for i in range(0, len(group), size)]
    return parts


def fit_some(
    targets: Sequence[Target],
    group: Sequence[Assignment],
    evaluations: int,
    free: bool,
    work: Work,
    places: Sequence[int],
) -> list[Piece]:
    """Return the factors of some layers of a group, and what there is to say of them.

    Args:
        targets: The kernels of the group.
        group: One part of `of`.
        evaluations: That a fit of a mixture may spend.
        free: Whether a plan was free to choose: low rank of the same size then takes
            the place of a sum that turns out to be worse.
        work: Keeps what is decomposed.
        places: Which of the group to fit.
    """
    targets, group = [targets[i] for i in places], [group[i] for i in places]
    several = [Prepared(one, LowRank.kept(one, work)) for one in targets]
    way, *_ = _way(group[0])
    ranks: list[Any] = [
        mixture.ranks_of(one.shape, one.configurations) for one in group
    ]
    if way == "low rank":
        found = [x.low_rank.fit(r) for x, (r, _) in zip(several, ranks, strict=True)]
    elif way == "van loan":
        found = [
            prepared.van_loan(one.configurations[0])
            for prepared, one in zip(several, group, strict=True)
        ]
    elif way == "mixture":
        found = fit.mixtures(several, ranks, evaluations=evaluations)
    else:
        found = fit.solve(several, group[0].configurations, group[0].rule.norm)
    return [_piece(*one, free) for one in zip(several, group, found, strict=True)]


def _way(one: Assignment) -> tuple:
    """Return how a layer is fitted; layers are alike if all of it is equal."""
    rule, (m, n) = one.rule, one.shape
    has_weights = rule.weighting != "none"
    is_joint = rule.norm == "frobenius" or (rule.norm == "auto" and has_weights)
    ranks = mixture.ranks_of(one.shape, one.configurations)
    if is_joint and ranks is not None and ranks[1] == 0:
        return "low rank", one.shape, rule.weighting
    if rule.norm == "frobenius" and len(one.configurations) == 1 and not has_weights:
        return "van loan", one.shape
    if is_joint and ranks is not None:
        # Tall kernels are fitted as wide ones; their input is on the other side.
        sides = rule.weighting, rule.weighting == "input" and m > n
        wide = min(m, n), max(m, n)
        return "mixture", mixture.program(wide, ranks), sides
    return "solve", one.shape, one.configurations, rule.norm, rule.weighting


def _piece(prepared: Prepared, one: Assignment, found: Fit, free: bool) -> Piece:
    """Return what is kept of a fit."""
    low_rank, kind = prepared.low_rank, one.rule.method
    rank = interpolative_rank(one.shape, one.num_parameters)
    if free and kind == "kronecker" and found.relative**2 > low_rank.tails[rank]:
        found, kind = low_rank.fit(rank), "interpolative"
    terms = initial_factors.by_name(prepared.target.kernel, found.terms, one.rule.start)
    arrays = {}
    for i, factors in enumerate(terms):
        arrays |= {f"{i}.a": np.asarray(factors.a), f"{i}.b": np.asarray(factors.b)}
    return arrays, {
        "kind": kind,
        "relative": found.relative,
        "damage": found.damage,
        "low_rank": float(np.sqrt(low_rank.tails[rank])),
        "status": Status(found.status).name.lower(),
    }
