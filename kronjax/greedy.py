"""Greedy choice of the configurations to mix, compared at equal parameters.

`choose` adds the term with the largest gain per parameter, one after the other. The
gain of a term of the configuration `c` is `σ_1²(R_c(E))`, the decrease of `‖E‖_F²`;
with weights, that of the matrix in the coordinates of `weighted`. After every block of
choices all terms are refined together (not under weights), and at the end terms that no
longer pay are exchanged; whether they pay is decided without the weights. `search`
solves the chosen configurations in the norm of the user, next to low rank and
homogeneous sums. Without a budget of parameters an information criterion decides the
number of terms,

    m n log(‖E‖_F² / (m n)) + q Σ_c r_c (d1 + d2 − r_c),    q = log(m n)

Weights are only approximated here, and the joint fit is left to the solver. Deciding by
`‖L^{1/2} E R^{1/2}‖_F` and refining by gradient steps in the coordinates of `weighted`
was tried: the steps are too slow to separate overlapping terms, and of eight planted
sums four or five were found with a budget instead of eight. The criterion finds few
under weights either way (two of eight), because the noise is white without them.

References: Cai, Chen and Xiao (2019), for the criterion; (2023), for greedy sums.

>>> [c.a_shape for c in candidates((4, 4))]
[(4, 1), (1, 2), (2, 1), (2, 2), (2, 4), (4, 2)]
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from kronjax.kronecker import Configuration, divisors
from kronjax.linalg.dense import multiply_out
from kronjax.solver.weighted import RIDGE

BLOCKS = 16
"""Largest number of blocks of choices in which a budget is spent."""

POWERS = (1.0, 0.5, 0.0)
"""Powers of the number of parameters that divide the gains; the best sum is taken."""

THOROUGH = 5000
"""Number of entries up to which all powers are tried, and the choice is repeated
without each of the chosen configurations."""

NARROW = 8
"""Number of candidates for larger matrices: those with the best first terms."""

SPREAD = 3.0
"""Largest number of parameters of a term, over the smallest of all candidates."""


def candidates(
    shape: tuple[int, int], spread: float | None = None
) -> list[Configuration]:
    """Return all configurations for a matrix of `shape`, low rank first.

    Only one of several that express the same sums is returned: `(1, n)` is low rank,
    too. Trivial configurations, a matrix times a number, are omitted.

    Args:
        shape: `(m, n)`.
        spread: Limit on the parameters of a term, over those of the smallest; low rank
            is always kept. None for no limit.

    Returns:
        Configurations of rank one.
    """
    m, n = shape
    trivial = {(1, 1), (m, n), (1, n)}
    shapes = [(m1, n1) for m1 in divisors(m) for n1 in divisors(n)]
    unique = [Configuration(a, 1) for a in shapes if a not in trivial or a == (m, 1)]
    unique.sort(key=lambda c: (c.a_shape != (m, 1), c.a_shape[0] * c.a_shape[1]))
    least = min(c.num_parameters(shape) for c in unique)
    limit = math.inf if spread is None else spread * least
    return unique[:1] + [c for c in unique[1:] if c.num_parameters(shape) <= limit]


def choose(
    matrix: np.ndarray,
    parameters: int | None,
    among: Sequence[Configuration],
    left_weight: np.ndarray | None = None,
    right_weight: np.ndarray | None = None,
) -> tuple[Configuration, ...]:
    """Choose configurations and their ranks for a matrix, term by term.

    Args:
        matrix: `[m, n]`, float32 or float64.
        parameters: Number of parameters, enough for one term; None leaves the number of
            terms to the information criterion.
        among: Candidates, for example from `candidates`.
        left_weight: Weight of the rows, `[m, m]`, or None.
        right_weight: Weight of the columns, `[n, n]`, or None.

    Returns:
        Configurations, the one with the most parameters first. Deterministic. The
        criterion may choose none, if not even one term pays.
    """
    shape = matrix.shape
    scale = np.max(np.abs(matrix))
    empty = _State.of(
        matrix / (scale if scale > 0 else 1), among, left_weight, right_weight
    )
    empty = dataclasses.replace(empty, is_informed=parameters is None)
    block = 1
    if parameters is not None:
        cheapest = min(c.num_parameters(shape) for c in among)
        block = max(1, parameters // cheapest // BLOCKS)
    if matrix.size > THOROUGH:
        best = _run(_narrowed(empty), parameters, block, 1.0, exchanges=2)
        return _sorted(best)
    power, best = min(
        ((power, _run(empty, parameters, block, power)) for power in POWERS),
        key=lambda pair: pair[1].cost(),
    )
    # Exchanges do not fully repair a wrong early choice.
    for a_shape in list(best.held):
        rest = tuple(c for c in among if c.a_shape != a_shape)
        if any(c.num_parameters(shape) <= (parameters or math.inf) for c in rest):
            trial = dataclasses.replace(empty, among=rest)
            trial = _run(trial, parameters, block, power)
            best = min(best, trial, key=_State.cost)
    return _sorted(best)


def tails(
    matrix: np.ndarray,
    configurations: Sequence[Configuration],
    left_weight: np.ndarray | None = None,
    right_weight: np.ndarray | None = None,
) -> list[float]:
    """Return the relative squared Frobenius error of each configuration alone.

    With weights the errors are those in the coordinates of `weighted`, and therefore
    approximate.

    Args:
        matrix: `[m, n]`.
        configurations: Configurations with their ranks.
        left_weight: Weight of the rows, `[m, m]`, or None.
        right_weight: Weight of the columns, `[n, n]`, or None.
    """
    state = _State.of(matrix, configurations, left_weight, right_weight)
    results = []
    for c in configurations:
        x = state.rearranged(c)
        s = leading(x, c.rank)[1]
        results.append(1 - float(np.sum(s**2) / max(np.sum(x**2), 1e-300)))
    return results


@dataclasses.dataclass(frozen=True)
class _State:
    """The chosen terms, `{a_shape: (a [r, d1], b [r, d2])}`, and the residual."""

    residual: np.ndarray
    among: tuple[Configuration, ...]
    roots: dict
    held: dict
    is_informed: bool = False

    @classmethod
    def of(cls, matrix, among, left_weight, right_weight):
        roots = {}
        if left_weight is not None or right_weight is not None:
            weights = left_weight, right_weight
            for c in among:
                pairs = zip(weights, c.a_shape, c.b_shape(matrix.shape), strict=True)
                roots[c.a_shape] = [_factored_root(*pair) for pair in pairs]
        return cls(matrix, tuple(among), roots, {})

    def rearranged(self, configuration):
        """Return `R_c(E)` in the coordinates of the configuration, `[d1, d2]`."""
        x = self.residual
        left, right = self.roots.get(configuration.a_shape, (None, None))
        if left is not None:
            x = _times(x.T, left).T
        if right is not None:
            x = _times(x, right)
        return rearrange(x, configuration.a_shape)

    def to_matrix(self, a_shape, a, b):
        """Multiply out terms given in the coordinates of a configuration."""
        m, n = self.residual.shape
        b_shape = m // a_shape[0], n // a_shape[1]
        x = multiply_out(a.reshape(-1, *a_shape), b.reshape(-1, *b_shape))
        left, right = self.roots.get(a_shape, (None, None))
        if left is not None:
            x = _times(x.T, tuple(map(np.linalg.inv, left))).T
        return x if right is None else _times(x, tuple(map(np.linalg.inv, right)))

    def num_parameters(self):
        """Return the number of parameters of all terms."""
        return sum(a.size + b.size for a, b in self.held.values())

    def cost(self):
        """Return the objective: the squared residual, or the information criterion."""
        size = self.residual.size
        square = float(np.sum(np.square(self.residual, dtype=np.float64)))
        if not self.is_informed:
            return square
        freedom = sum(a.size + b.size - len(a) ** 2 for a, b in self.held.values())
        rounding = float(np.finfo(self.residual.dtype).eps) ** 2
        return size * math.log(square / size + rounding) + math.log(size) * freedom


def _sorted(state):
    shape = state.residual.shape
    chosen = [Configuration(a, len(pair[0])) for a, pair in state.held.items()]
    return tuple(sorted(chosen, key=lambda c: (-c.num_parameters(shape), c.a_shape)))


def _narrowed(state):
    """Return the state with only the candidates with the best first terms."""
    shape = state.residual.shape

    def worth(c):
        s = leading(state.rearranged(c), 1)[1]
        return -(float(s[0]) ** 2) / c.num_parameters(shape)

    first, *others = state.among
    among = (first, *sorted(others, key=worth)[: NARROW - 1])
    return dataclasses.replace(state, among=among)


def _run(state, parameters, block, power, exchanges=2 * BLOCKS):
    """Grow a sum, and exchange the terms that pay least while the cost falls."""
    state = _grow(state, parameters, block, power)
    for _ in range(exchanges):
        trial = _grow(_drop(state, block), parameters, block, power)
        if not trial.cost() < state.cost() - 1e-6 * abs(state.cost()):
            break
        state = trial
    return state


def _grow(state, parameters, block, power):
    """Return the state with as many terms as the budget, or the criterion, allows.

    The criterion may rise before it falls, so its minimum on the way is taken.
    """
    shape = state.residual.shape
    limit = state.residual.size // 2 if parameters is None else parameters
    best = state
    while True:
        offers = []
        left = limit - state.num_parameters()
        for c in state.among:
            price = c.num_parameters(shape)
            room = c.max_rank(shape) - len(state.held.get(c.a_shape, ((), ()))[0])
            count = min(block, room, left // price)
            if count > 0:
                u, s, vt = leading(state.rearranged(c), count)
                offers.append((s**2 / price**power, c, u * s, vt))
        if not offers:
            return best
        (gains, c, a, b), *others = sorted(offers, key=lambda x: -x[0][0])
        # Take the terms whose gain exceeds that of the best other configuration.
        rival = others[0][0][0] if others else 0
        count = max(1, int(np.sum(gains > rival)))
        state = _refine(_add(state, c, a[:, :count].T, b[:count]))
        if parameters is not None or state.cost() < best.cost():
            best = state


def _add(state, configuration, a, b):
    shape = configuration.a_shape
    old = state.held.get(shape)
    pair = (a, b)
    if old is not None:
        pair = np.concatenate([old[0], a]), np.concatenate([old[1], b])
    residual = state.residual - state.to_matrix(shape, a, b)
    return dataclasses.replace(
        state, held={**state.held, shape: pair}, residual=residual
    )


def _drop(state, count):
    """Return the state without `count` terms that pay least per parameter."""
    worst = None
    for shape, (a, b) in state.held.items():
        gain = np.sum(b[-1] ** 2) * np.sum(a[-1] ** 2) / (a[0].size + b[0].size)
        if worst is None or gain < worst[0]:
            worst = gain, shape
    if worst is None:
        return state
    a, b = state.held[worst[1]]
    keep = max(len(a) - count, 0)
    held = {shape: pair for shape, pair in state.held.items() if shape != worst[1]}
    if keep:
        held[worst[1]] = a[:keep], b[:keep]
    residual = state.residual + state.to_matrix(worst[1], a[keep:], b[keep:])
    return _refine(dataclasses.replace(state, held=held, residual=residual))


def _refine(state, sweeps=30):
    """Fit all terms together: each configuration in turn, by a subspace iteration.

    Nothing is done under weights: the coordinates of a configuration are then not
    those of the error.
    """
    if state.roots or not state.held:
        return state
    residual, held = state.residual, dict(state.held)
    before = np.sum(residual**2)
    if residual.size > THOROUGH:
        sweeps = 3
    for _ in range(sweeps if len(held) > 1 else 1):
        for shape, (a, b) in held.items():
            x = rearrange(residual, shape) + a.T @ b
            q = np.linalg.qr(x @ b.T)[0]
            u, s, vt = np.linalg.svd(q.T @ x, full_matrices=False)
            a, b = ((q @ u) * s).T, vt
            held[shape] = a, b
            residual = unrearrange(x - a.T @ b, shape, residual.shape)
        after = np.sum(residual**2)
        if after > before * (1 - 1e-4):
            break
        before = after
    return dataclasses.replace(state, residual=residual, held=held)


def leading(x: np.ndarray, count: int):
    """Return the `count` leading singular triplets of `[d1, d2]`.

    Those of a large matrix come from a subspace iteration with a fixed random start.
    """
    width = count + 8
    if 3 * width > min(x.shape) or min(x.shape) <= 64:
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        return u[:, :count], s[:count], vt[:count]
    rng = np.random.default_rng(0)
    q = x @ rng.standard_normal((x.shape[1], width)).astype(x.dtype)
    for _ in range(3):
        q = np.linalg.qr(q)[0]
        q = x @ (x.T @ q)
    q = np.linalg.qr(q)[0]
    u, s, vt = np.linalg.svd(q.T @ x, full_matrices=False)
    return q @ u[:, :count], s[:count], vt[:count]


def _factored_root(weight, n1, n2):
    """Return `F1`, `F2` with weight `≈ (F1 F1ᵀ) ⊗ (F2 F2ᵀ)`, from partial traces."""
    if weight is None:
        return None
    n = n1 * n2
    mean = np.trace(weight) / n
    gram = weight / mean + RIDGE * np.eye(n, dtype=weight.dtype)
    blocks = gram.reshape(n1, n2, n1, n2)
    first = np.einsum("iaja->ij", blocks) / n2
    second = np.einsum("iaib->ab", blocks) / n1
    return _root(first), _root(second)


def _root(gram):
    values, vectors = np.linalg.eigh(gram)
    return vectors * np.sqrt(np.maximum(values, RIDGE))


def _times(x, pair):
    """Return `X (P ⊗ Q)`."""
    first, second = pair
    half = (x.reshape(-1, len(second)) @ second).reshape(-1, len(first), len(second))
    return np.einsum("mia,ij->mja", half, first, optimize=True).reshape(x.shape)


def rearrange(x: np.ndarray, a_shape: tuple[int, int]) -> np.ndarray:
    """Return the result of `kronecker.rearrange` for a NumPy matrix `[m, n]`."""
    (m, n), (m1, n1) = x.shape, a_shape
    return x.reshape(m1, m // m1, n1, n // n1).swapaxes(1, 2).reshape(m1 * n1, -1)


def unrearrange(
    x: np.ndarray, a_shape: tuple[int, int], shape: tuple[int, int]
) -> np.ndarray:
    """Invert `rearrange` for a matrix of `shape`."""
    (m, n), (m1, n1) = shape, a_shape
    return x.reshape(m1, n1, m // m1, n // n1).swapaxes(1, 2).reshape(m, n)
