"""The state of a continuation, its trace and its result.

A path is the carry of the loop over stages; every stage adds one line to the trace.
`gather` assembles the trace of the winner from the lines of all starts.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kronjax.kronecker import KroneckerTerms
from kronjax.solver import descent
from kronjax.solver.manifold import Point
from kronjax.solver.problem import Problem


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """The history of a solve, one entry per stage `[stages]`; the first is the start.

    Stages after an adaptive continuation has ended repeat its last entry, at no cost.

    Attributes:
        p: Exponent of the Schatten norm.
        value: `‖T − K‖_p` at the end of the stage.
        spectral_error: Lower bound of `‖T − K‖_2` at the end of the stage, from a few
            iterations.
        steps: Number of accepted steps.
        products: Number of products of the size of `EᵀE` in values and gradients,
            including those of rejected trials.
    """

    p: jax.Array
    value: jax.Array
    spectral_error: jax.Array
    steps: jax.Array
    products: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solution:
    """The result of `solve`.

    Attributes:
        terms: One `KroneckerTerms` for each configuration, with terms of falling norm.
        spectral_error: Lower bound of `‖T − K‖_2` by `spectral.estimate_norm`.
        frobenius: The terms at p = 2, where the continuation began: Van Loan's
            solution, one configuration after the other.
        trace: `Trace`.
        status: `Status` of the last stage.
    """

    terms: tuple[KroneckerTerms, ...]
    spectral_error: jax.Array
    frobenius: tuple[KroneckerTerms, ...]
    trace: Trace
    status: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Path:
    """The state of a continuation.

    Attributes:
        state: State of the descent at the current p.
        p: The current exponent.
        error: Spectral error at the current points, relative to `‖T‖_F`.
        done: Whether the solution is good enough; further stages do not change it.
        previous: The points at the end of the previous stage, in the geometry of
            `state`.
        previous_p: The exponent of the previous stage.
        champion: State of the best start so far, at the end of its part of the race;
            None if there is no race.
        running: Number of the current start.
        winner: Number of the start of the champion.
        frobenius: The points of the manifold at p = 2.
        best: The points, in the geometry of `state`, with the smallest spectral error
            at the end of a stage.
        best_error: Spectral error of `best`, relative to `‖T‖_F`.
    """

    state: descent.State
    p: jax.Array
    error: jax.Array
    done: jax.Array
    previous: tuple
    previous_p: jax.Array
    champion: descent.State | None
    running: jax.Array
    winner: jax.Array
    frobenius: tuple[Point, ...]
    best: tuple
    best_error: jax.Array


def gather(
    problem: Problem, winner: int | jax.Array, first: Trace, lines: Trace
) -> Trace:
    """Return the trace of the winner; the products of the others are added to it.

    Args:
        problem: The problem that was solved.
        winner: Number of the start that won the race.
        first: The line that `start` returns; scalars of jax or NumPy.
        lines: The lines that `advance` returns, stacked.
    """
    concatenate = jnp.concatenate
    if not isinstance(first.p, jax.Array):
        concatenate = np.concatenate  # on the host, where nothing is compiled
    first = jax.tree.map(lambda x: x[None], first)
    if not problem.squarings:
        return first
    count = problem.num_race_stages
    cut = count * problem.num_starts
    race = jax.tree.map(lambda x: x[:cut], lines)
    rest = jax.tree.map(lambda x: x[cut:], lines)
    if not count:
        return jax.tree.map(lambda *x: concatenate(x), first, rest)
    race = jax.tree.map(lambda x: x.reshape(problem.num_starts, count), race)
    won = jax.tree.map(lambda x: x[winner], race)
    won = dataclasses.replace(won, products=race.products.sum(0))
    return jax.tree.map(lambda *x: concatenate(x), first, won, rest)
