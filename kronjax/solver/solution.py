"""Where a continuation stands, what it tells on the way, and what it returns.

A path is the carry of the loop over stages, one line of the trace is what every stage
leaves behind. `gather` makes the trace of the winner from the lines of all starts.
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
    """What happened, one entry for each stage `[stages]`; the first is the start.

    Stages after an adaptive continuation has ended repeat its last entry, at no cost.

    Attributes:
        p: Exponent of the Schatten norm.
        value: `‖T − K‖_p` at the end of the stage.
        spectral_error: Lower bound of `‖T − K‖_2` there, from a few iterations.
        steps: Accepted steps.
        gemms: Products of the size of `EᵀE` in values and gradients, those of rejected
            trials included.
    """

    p: jax.Array
    value: jax.Array
    spectral_error: jax.Array
    steps: jax.Array
    gemms: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solution:
    """What `solve` returns.

    Attributes:
        terms: One `KroneckerTerms` for each configuration, of falling norm.
        spectral_error: Lower bound of `‖T − K‖_2` by `spectral.estimate_norm`.
        frobenius: The terms at p = 2, where the continuation began: Van Loan's, one
            configuration after the other.
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
    """Where a continuation stands.

    Attributes:
        state: Of the descent at the present p.
        p: Its exponent.
        error: Spectral error there, relative to `‖T‖_F`.
        done: Whether that is good enough: further stages change nothing.
        previous: The points at the p before, as those of the state.
        previous_p: That p.
        champion: State of the best start so far, at the end of its part of the race;
            None if there is no race.
        running: Number of the start that runs.
        winner: Number of the champion's start.
        frobenius: The points of the manifold at p = 2.
        best: The points, as those of the state, of the smallest spectral error at the
            end of a stage.
        best_error: That error, relative to `‖T‖_F`.
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
        first: The line of `start`; scalars of jax or NumPy.
        lines: The lines of all stages that were run, stacked.
    """
    concatenate = jnp.concatenate
    if not isinstance(first.p, jax.Array):
        concatenate = np.concatenate  # on the host, where nothing is compiled
    first = jax.tree.map(lambda x: x[None], first)
    if not problem.squarings:
        return first
    count = problem.num_race_stages
    cut = count * problem.starts
    race = jax.tree.map(lambda x: x[:cut], lines)
    rest = jax.tree.map(lambda x: x[cut:], lines)
    if not count:
        return jax.tree.map(lambda *x: concatenate(x), first, rest)
    race = jax.tree.map(lambda x: x.reshape(problem.starts, count), race)
    won = dataclasses.replace(
        jax.tree.map(lambda x: x[winner], race), gemms=race.gemms.sum(0)
    )
    return jax.tree.map(lambda *x: concatenate(x), first, won, rest)
