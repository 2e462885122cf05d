"""What is known for certain about an answer: certificates on the host, in float64.

`certificate` proves the bounds, one matrix at a time; `newton` says whether the answer
is a strict local minimum. Both are brought together here, for a batch. An accelerator
without float64 of its own may emulate it with fewer digits than the bounds allow for:
whatever jax computes on, proofs are the processor's.

>>> from kronjax.kronecker import KroneckerTerms
>>> half = np.eye(2)[None] / 2**0.5
>>> found = certificate_of(np.diag([1.0, 0.0, 0.0, 1.0]), (KroneckerTerms(half, half),))
>>> round(float(found.global_bound), 6), bool(found.local_gap < 1e-12)
(0.5, True)
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kronjax.kronecker import KroneckerTerms
from kronjax.proof import bounds
from kronjax.proof.newton import Finish


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Certificate:
    """What is proven about an approximation; `[...]` for a batch, float64.

    Attributes:
        error: `‖L^{1/2} (T − K) R^{1/2}‖_2`.
        local_bound: No change of all `A_k`, or of all `B_k`, reaches less.
        local_gap: By how much of the error such a change could lower it, at most.
        global_bound: No sum of that Kronecker rank reaches less; 0 if none is known, as
            for several configurations.
        kkt_residual: Of the second-order finish, see `newton.Finish`; NaN without one.
        second_order: `strict local minimum` (multipliers and projected Hessian are
            positive), `not proven`, or empty without a finish.
    """

    error: np.ndarray
    local_bound: np.ndarray
    local_gap: np.ndarray
    global_bound: np.ndarray
    kkt_residual: np.ndarray
    second_order: np.ndarray


def certificate_of(
    matrix: np.ndarray,
    terms: Sequence[KroneckerTerms],
    left_weight: np.ndarray | None = None,
    right_weight: np.ndarray | None = None,
    finishes: Sequence[Finish] | None = None,
) -> Certificate:
    """Return the certificate of sums for one matrix or a batch.

    Args:
        matrix: `[..., m, n]`.
        terms: One for each configuration, with the same batch axes.
        left_weight: `[m, m]` or `[..., m, m]`, or None.
        right_weight: `[n, n]` or `[..., n, n]`, or None.
        finishes: Of `newton.finish`, one for each matrix, or None.
    """
    matrix = np.asarray(matrix)
    *batch, m, n = matrix.shape
    flat = [
        _flat(matrix, 2),
        *(_side(one, batch) for one in (left_weight, right_weight)),
    ]
    factors = [jax.tree.map(lambda x: _flat(x, 3), one) for one in terms]
    rows = []
    with jax.enable_x64(True), jax.default_device(_host()):
        for i in range(len(flat[0])):
            target, left, right = (None if x is None else _double(x[i]) for x in flat)
            own = tuple(jax.tree.map(lambda x, i=i: _double(x[i]), x) for x in factors)
            dual = None if finishes is None else finishes[i].dual
            found = jax.device_get(_program()(target, own, left, right, dual))
            rows.append([found.error, found.local_bound, found.global_bound])
    bounds: Any = np.reshape(np.array(rows, np.float64).T, (3, *batch))
    error, local, bound = bounds
    safe = np.where(error > 0, error, 1)
    kkt = np.full(len(rows), np.nan)
    second = np.full(len(rows), "", object)
    for i, one in enumerate(finishes or ()):
        kkt[i] = one.kkt_residual
        second[i] = "strict local minimum" if one.is_strict_minimum else "not proven"
    return Certificate(
        error=error[()],
        local_bound=local[()],
        local_gap=np.where(error > 0, 1 - local / safe, 0 * error)[()],
        global_bound=bound[()],
        kkt_residual=kkt.reshape(batch)[()],
        second_order=second.reshape(batch)[()],
    )


@functools.cache
def _program() -> Any:
    return jax.jit(bounds.certify)


def _host():
    """Return the processor, or None where jax was told to use accelerators only."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _flat(array, axes):
    return np.reshape(np.asarray(array), (-1, *np.shape(array)[-axes:]))


def _side(weight, batch):
    """Return the weights of every matrix, or None."""
    if weight is None:
        return None
    return _flat(np.broadcast_to(weight, (*batch, *np.shape(weight)[-2:])), 2)


def _double(x):
    return np.asarray(x, np.float64)
