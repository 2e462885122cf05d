"""Search for the best sum of Kronecker products with a given number of parameters.

`search` solves low rank, the most promising homogeneous sums and a few heterogeneous
sums of equal parameters in the norm of the user, and returns the best approximation
with the table of all trials: it is never worse than low rank, nor than the homogeneous
sums that were tried. The homogeneous sums are the two with the least Frobenius error of
all that the budget allows, and the one with the smallest terms; in another norm a third
may be the best. For a large matrix all sums are first tried with one start and a part
of the budget, and the most promising are then solved in full: the best two and the best
homogeneous sum. (Low rank needs only a singular value decomposition, and is always
solved in full.)

>>> import numpy as np
>>> matrix = np.kron(np.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(3, 2))
>>> found = search(matrix, 12, norm="frobenius")
>>> [(c.a_shape, c.rank) for c in found.configurations]
[((2, 3), 1)]
"""

import dataclasses
import math
import operator
import time
from typing import Any

from kronjax import display, greedy, validation
from kronjax.approximation import Approximation, approximate
from kronjax.io.progress import bar
from kronjax.kronecker import Configuration, matmul_cost
from kronjax.norm import Norm
from kronjax.runs.batch import compile_ahead
from kronjax.runs.pool_programs import Kind
from kronjax.solver.problem import Problem

REDUCTION = 4
"""Factor by which the budget of a trial of a large matrix is reduced."""

FINALISTS = 2
"""Number of trials solved in full, besides the best homogeneous one."""


COLUMNS = "kind", "left factors, terms", "parameters", "multiply-adds", "error", "s"
"""Names of the cells of a trial."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One sum that was solved during a search.

    Attributes:
        kind: "low rank", "homogeneous", "heterogeneous" or "dense".
        configurations: The configurations of the sum.
        num_parameters: Number of stored numbers.
        multiply_adds: Multiply-adds of `x @ K` for one row of `x`.
        error: Error in the norm of the search, weighted if there are weights.
        relative: The error over the norm of the matrix.
        seconds: Seconds spent on solving, without compilation.
        is_full: True if it was solved as `approximate` would, not with a reduced
            budget.
        is_efficient: True if no other trial has less error for no more parameters and
            no more multiply-adds (the Pareto front).
    """

    kind: str
    configurations: tuple[Configuration, ...]
    num_parameters: int
    multiply_adds: int
    error: float
    relative: float
    seconds: float
    is_full: bool = True
    is_efficient: bool = False

    def cells(self) -> tuple[str, ...]:
        """Return the row of this trial in the table of trials, as named by `COLUMNS`.

        A star marks a trial on the Pareto front, a tilde the error of a reduced budget.
        """
        parts = (
            f"{m}x{n}, {c.rank}" for c in self.configurations for m, n in [c.a_shape]
        )
        return (
            self.kind + " *" * self.is_efficient,
            "; ".join(parts),
            f"{self.num_parameters:,}",
            f"{self.multiply_adds:,}",
            f"{self.error:.5g}" + "~" * (not self.is_full),
            f"{self.seconds:.2f}",
        )


@dataclasses.dataclass(frozen=True)
class Search:
    """The result of `search`.

    Attributes:
        approximation: The best approximation.
        configurations: Its configurations.
        trials: All sums that were solved, by rising error.
        notes: Decisions made on behalf of the user.
        seconds: Seconds spent on choosing, solving and measuring, without compilation.
        compile_seconds: Seconds spent on tracing and compiling.
    """

    approximation: Approximation
    configurations: tuple[Configuration, ...]
    trials: tuple[Trial, ...]
    notes: tuple[str, ...]
    seconds: float
    compile_seconds: float

    def __repr__(self) -> str:
        """Return the best sum, and the least error of every other kind."""
        best, shape = self.trials[0], self.approximation.shape
        parts = ((c.rank, c.a_shape, c.b_shape(shape)) for c in self.configurations)
        rows = [
            ("best", f"{best.kind}: {display.formula(parts)}"),
            ("parameters", display.parameters(best.num_parameters, shape)),
            ("multiply-adds", f"{best.multiply_adds:,} for one row of x @ K"),
            ("error", f"{best.error:.5g} (relative: {best.relative:.4g})"),
        ]
        least = {trial.kind: trial.error for trial in reversed(self.trials)}
        others = [f"{kind} {x:.5g}" for kind, x in least.items() if kind != best.kind]
        if others:
            rows.append(("other kinds", "; ".join(sorted(others))))
        compiling = f"{self.compile_seconds:.2f} s to compile"
        rows.append(("time", f"{self.seconds:.2f} s, and {compiling}"))
        if self.notes:
            rows.append(("notes", "; ".join(self.notes)))
        return "\n".join(display.lines(self._title(), rows))

    def _repr_html_(self) -> str:
        rows = [trial.cells() for trial in self.trials]
        return display.table(self._title(), rows, COLUMNS)

    def _title(self) -> str:
        m, n = self.approximation.shape
        return f"Search: best of {len(self.trials)} sums for a {m}x{n} matrix"


def search(
    matrix,
    parameters: int | None = None,
    *,
    norm: float | str | Norm = "spectral",
    left_weight=None,
    right_weight=None,
    dtype: str | None = None,
    **options,
) -> Search:
    """Find the best sum of Kronecker products with a given number of parameters.

    Args:
        matrix: `[m, n]`, NumPy or jax, real.
        parameters: Largest number of parameters; None leaves the number of terms to the
            information criterion of `greedy`, which is made for a sum in white noise
            (weights mislead it).
        norm: Norm of the error, as for `approximate`.
        left_weight: Weight of the rows, `[m, m]`, as for `approximate`.
        right_weight: Weight of the columns, `[n, n]`, as for `approximate`.
        dtype: Precision of the computation, as for `approximate`.
        **options: `num_starts`, `max_products`, `tolerance`, `seed` and `progress`, for
            `approximate`.

    Returns:
        `Search`. If `parameters` reaches the size of the dense matrix, the result is
        that matrix, up to rounding, as a matrix times a number (one parameter more),
        and the notes say so.

    Raises:
        ValueError: If `parameters` is too small for one term (the message gives the
            smallest possible number), or an input is invalid for `approximate`.
    """
    begun = time.perf_counter()
    notes: list[str] = []
    target = validation.matrix(matrix, dtype, notes)
    if target.ndim != 2:
        raise ValueError(
            f"search takes one matrix [m, n]; got shape {target.shape}. Search for one "
            "of the batch and pass its configurations to kronjax.approximate."
        )
    shape: tuple[int, int] = target.shape
    weights = (
        validation.weight(left_weight, "left_weight", shape[0], (), target.dtype),
        validation.weight(right_weight, "right_weight", shape[1], (), target.dtype),
    )
    parameters = _checked_budget(parameters, shape)
    given = {"left_weight": left_weight, "right_weight": right_weight, "dtype": dtype}
    options = {"norm": norm, **given, **options}
    if parameters is not None and parameters >= math.prod(shape):
        notes.append(
            f"{parameters} parameters reach the {math.prod(shape)} of the dense "
            "matrix, which is returned unchanged"
        )
        wanted = [("dense", (Configuration(shape, 1),))]
    else:
        _note_primes(shape, notes)
        wanted = _proposals(target, parameters, weights, Norm.parse(norm))
    compile_seconds = _compile(target, wanted, weights, options)
    solved = _compete(matrix, wanted, options, target.size > greedy.THOROUGH)
    trials = [trial for trial, _ in solved]
    approximation = solved[0][1]
    return Search(
        approximation=approximation,
        configurations=trials[0].configurations,
        trials=tuple(_with_front(trial, trials) for trial in trials),
        notes=(*notes, *(x for x in approximation.notes if x not in notes)),
        seconds=time.perf_counter() - begun - compile_seconds,
        compile_seconds=compile_seconds,
    )


def _compile(target, wanted, weights, options):
    """Compile the programs of all sums at the same time; return the seconds."""
    weighted = weights[0] is not None, weights[1] is not None
    kinds = [
        Kind(
            Problem.of(target.shape, cs, _norm(kind, options), weighted=weighted),
            target.dtype,
            weighted,
            proves=False,
            traces=True,
        )
        for kind, cs in wanted
    ]
    progress = options.get("progress")
    with bar(len(kinds), "compiling", unit="sums", wanted=progress) as tick:
        return compile_ahead(kinds, tick)


def _norm(kind, options):
    """Return the norm in which a sum is solved."""
    norm = Norm.parse(options["norm"])
    # The (whitened) singular value decomposition solves every norm.
    is_svd = kind in ("low rank", "dense") and norm.is_spectral
    return Norm(2) if is_svd else norm


def _compete(matrix, wanted, options, is_large):
    """Return trials and their approximations by rising error; the first is full."""
    solved = [_solve(matrix, kind, cs, options, is_large) for kind, cs in wanted]
    solved.sort(key=_error)
    alone = [pair for pair in solved if pair[0].kind == "homogeneous"]
    promising = [pair[0].configurations for pair in solved[:FINALISTS] + alone[:1]]
    for i, (trial, reduced) in enumerate(solved):
        if trial.configurations in promising and not trial.is_full:
            full, best = _solve(matrix, trial.kind, trial.configurations, options)
            full = dataclasses.replace(full, seconds=full.seconds + trial.seconds)
            if full.error > trial.error:  # more starts may end elsewhere
                best = reduced
                full = dataclasses.replace(
                    full, error=trial.error, relative=trial.relative
                )
            solved[i] = full, best
    return sorted(solved, key=_error)


def _error(pair):
    return pair[0].error


def _checked_budget(parameters: Any, shape) -> int | None:
    if parameters is None:
        return None
    least = min((c.num_parameters(shape), c.a_shape) for c in greedy.candidates(shape))
    whole = isinstance(parameters, float) and parameters.is_integer()
    try:
        number: Any = int(parameters) if whole else parameters
        count = operator.index(number)
    except TypeError:
        count = None
    if count is None or isinstance(parameters, bool):
        raise ValueError(f"parameters must be a whole number; got {parameters!r}.")
    if count < min(least[0], math.prod(shape)):
        raise ValueError(
            f"parameters={parameters} is less than one term of a matrix of shape "
            f"{shape} takes: the smallest possible is {least[0]}, with left factors of "
            f"shape {least[1]}."
        )
    return count


def _note_primes(shape, notes):
    if len(greedy.candidates(shape)) == 1:
        notes.append(
            f"a matrix of shape {shape} has no other Kronecker products than low rank "
            "and trivial products"
        )


def _proposals(target, parameters, weights, norm):
    """Return the sums to solve: pairs of a kind and a tuple of configurations."""
    shape = target.shape
    everything = greedy.candidates(shape)
    among = [
        c
        for c in (
            everything
            if target.size <= greedy.THOROUGH
            else greedy.candidates(shape, greedy.SPREAD)
        )
        if parameters is None or c.num_parameters(shape) <= parameters
    ]
    mixed = greedy.choose(target, parameters, among, *weights)
    if parameters is None:
        # Compare at the size that the criterion chose; at one term if it chose none.
        mixed = mixed or (min(among, key=lambda c: c.num_parameters(shape)),)
        parameters = sum(c.num_parameters(shape) for c in mixed)
    low_rank = everything[0]
    # Expensive configurations are proposed, too: alone, one term may suffice.
    affordable = [c for c in everything if c.num_parameters(shape) <= parameters]
    full = {c.a_shape: _filled(c, parameters, shape) for c in affordable}
    products = [c for c in affordable if c != low_rank]
    wanted = []
    if low_rank.a_shape in full:
        wanted.append((full[low_rank.a_shape],))
    if products:
        wholes = [full[c.a_shape] for c in products]
        left = greedy.tails(target, wholes, *weights)
        order = sorted(range(len(wholes)), key=lambda i: left[i])
        balanced = sorted(products, key=lambda c: _imbalance(c, shape))
        first = full[balanced[0].a_shape]
        if norm.is_frobenius and all(
            x is None for x in weights
        ):  # then the tails are the errors
            wanted.append((wholes[order[0]],))
        else:
            wanted += [(wholes[i],) for i in order[:2]] + [(first,)]
        if low_rank.a_shape in full:
            wanted.append(_split((low_rank, products[order[0]]), parameters, shape))
        if not norm.is_frobenius:  # products of distinct shapes have more freedom
            wanted.append(_split(tuple(balanced[:3]), parameters, shape))
            wanted.append(_split(tuple(balanced[1:3]), parameters, shape))
    wanted.append(mixed)
    unique = list(dict.fromkeys(tuple(x) for x in wanted if x))
    return [(_kind(x, low_rank.a_shape), x) for x in unique]


def _filled(configuration, parameters, shape):
    """Return the configuration with as many terms as the budget allows."""
    rank = parameters // configuration.num_parameters(shape)
    rank = min(max(rank, 1), configuration.max_rank(shape))
    return Configuration(configuration.a_shape, rank)


def _split(configurations, parameters, shape):
    """Return the configurations with equal shares of the budget.

    The last one gets the remainder; the result is empty if a share is too small.
    """
    filled, left = [], parameters
    for i, c in enumerate(configurations):
        share = left // (len(configurations) - i)
        if c.num_parameters(shape) > share:
            return ()
        filled.append(_filled(c, share, shape))
        left -= filled[-1].num_parameters(shape)
    return tuple(filled)


def _imbalance(configuration, shape):
    """Return a sort key: parameters of a term, then how far from square it is."""
    (m1, n1), (m2, n2) = configuration.a_shape, configuration.b_shape(shape)
    skew = abs(math.log(m1 / n1)) + abs(math.log(m2 / n2))
    return configuration.num_parameters(shape), round(skew, 9), configuration.a_shape


def _kind(configurations, low_rank):
    if len(configurations) > 1:
        return "heterogeneous"
    return "low rank" if configurations[0].a_shape == low_rank else "homogeneous"


def _solve(matrix, kind, configurations, options, is_reduced=False):
    """Return a trial and its approximation, with a reduced budget if asked."""
    norm = Norm.parse(options["norm"])
    options = {**options, "norm": _norm(kind, options)}
    weighted = tuple(
        options[f"{side}_weight"] is not None for side in ("left", "right")
    )
    problem = Problem.of(
        matrix.shape, configurations, options["norm"], weighted=weighted
    )
    is_reduced = is_reduced and bool(problem.squarings)
    if is_reduced:
        max_products = options.get("max_products") or problem.max_products
        options = {
            **options,
            "num_starts": 1,
            "max_products": max(1, max_products // REDUCTION),
        }
    solved = approximate(matrix, configurations, **options)
    errors, relative = solved.error, solved.relative
    if solved.weighted is not None and solved.weighted_relative is not None:
        errors, relative = solved.weighted, solved.weighted_relative
    if norm.is_frobenius:
        error, ratio = errors.frobenius, relative.frobenius
    elif norm.is_spectral:
        error, ratio = errors.spectral, relative.spectral
    else:
        error, ratio = solved.trace.value[-1], math.nan
    trial = Trial(
        kind=kind,
        configurations=configurations,
        num_parameters=solved.num_parameters,
        multiply_adds=sum(matmul_cost(terms) for terms in solved.terms),
        error=float(error),
        relative=float(ratio),
        seconds=solved.seconds,
        is_full=not is_reduced,
    )
    return trial, solved


def _with_front(trial, trials):
    """Return the trial with `is_efficient` set."""

    def beats(other):
        ours = trial.error, trial.num_parameters, trial.multiply_adds
        theirs = other.error, other.num_parameters, other.multiply_adds
        return theirs != ours and all(x <= y for x, y in zip(theirs, ours, strict=True))

    return dataclasses.replace(trial, is_efficient=not any(map(beats, trials)))
