"""Certificates: proven statements about an approximation, in float64 on the host.

`bounds` proves lower bounds for one matrix at a time, and `newton` decides whether a
sum is a strict local minimum. `certify` combines both for an approximation of one
matrix or of a batch. Proofs are always computed on the CPU, whatever device jax uses
otherwise: an accelerator without native float64 may emulate it with fewer digits than
the bounds allow for.

>>> from kronjax.kronecker import KroneckerTerms
>>> half = np.eye(2)[None] / 2**0.5
>>> proof = certificate_of(np.diag([1.0, 0.0, 0.0, 1.0]), (KroneckerTerms(half, half),))
>>> round(float(proof.global_bound), 6), bool(proof.local_gap < 1e-12)
(0.5, True)
"""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from kronjax import cpu_threads, display, validation
from kronjax.io import exported
from kronjax.kronecker import KroneckerTerms
from kronjax.linalg import compiling
from kronjax.proof import bounds
from kronjax.proof.newton import Finish

exported.register(KroneckerTerms, bounds.Bounds)

AGREEMENT = 1e-8
"""Relative tolerance, over the size of the matrix, for errors of the same solution."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Certificate:
    """Bounds on what any other sum could reach; arrays `[...]` for a batch, float64.

    Attributes:
        error: `‖L^{1/2} (T − K) R^{1/2}‖_2`.
        local_bound: Lower bound on the error after any change of all `A_k`, or of all
            `B_k`.
        local_gap: Largest fraction of the error by which such a change could lower it.
        global_bound: Lower bound on the error of every sum of the same Kronecker rank;
            0 if none is known, as for several configurations.
        kkt_residual: Stationarity residual of the second-order finish, see
            `newton.Finish`; NaN without a finish.
        second_order: `strict local minimum` (multipliers and projected Hessian are
            positive), `not proven`, or empty without a finish.
    """

    error: np.ndarray
    local_bound: np.ndarray
    local_gap: np.ndarray
    global_bound: np.ndarray
    kkt_residual: np.ndarray
    second_order: np.ndarray

    def __repr__(self) -> str:
        """Return the error, the gap and the bound; median and worst of a batch."""
        return "\n".join(display.lines(*self._summary()))

    def _repr_html_(self) -> str:
        title, rows = self._summary()
        return display.table(title, rows)

    def _summary(self) -> tuple[str, list[tuple[str, str]]]:
        title, count = "Certificate", np.size(self.error)
        if count > 1:
            title += f" of {count} approximations"
        rows = [
            ("spectral error", display.spread(self.error)),
            ("local gap", display.gap(self.local_gap)),
            ("", "(what a change of all A_k, or of all B_k, can gain)"),
        ]
        bound = np.ravel(self.global_bound)
        if np.any(bound > 0):
            ratio = np.ravel(self.error)[bound > 0] / bound[bound > 0]
            if count == 1:
                rows.append(("global bound", f"{bound[0]:.5g}"))
            rows += [
                ("error / bound", display.spread(ratio, ".3g")),
                ("", "(no sum of the same Kronecker rank is below the global bound)"),
            ]
        if np.any(np.asarray(self.second_order) != ""):
            residual = f"{np.max(self.kkt_residual):.1g}"
            text = f"{display.counts(self.second_order)}; KKT residual {residual}"
            rows.append(("second order", text))
        return title, rows


def certify(
    approximation: Any, matrix, left_weight=None, right_weight=None
) -> Certificate:
    """Prove how good an approximation is.

    The first call for a shape takes seconds to compile. A proof takes, for every
    matrix, some ten singular value decompositions in float64 and 100 to 200 eigenvalue
    decompositions of the leading part of the error. Several matrices are proven at the
    same time. Four 768×768 of rank 4 took half as long as their solve, on two cores.

    Args:
        approximation: Result of `approximate`, or any object with `terms`, one
            `KroneckerTerms` for each configuration, and `finishes`, one `newton.Finish`
            for each matrix or None.
        matrix: The matrices that were approximated, `[..., m, n]`, NumPy or jax, real.
        left_weight: The weight of the rows with which they were approximated, `[m, m]`
            or `[..., m, m]`, or None.
        right_weight: The weight of the columns, `[n, n]` or `[..., n, n]`, or None.

    Returns:
        `Certificate` with the batch axes of the matrices.

    Raises:
        ValueError: If the matrix or a weight does not fit the terms, is not finite or
            not a valid input of `approximate`; or if `finishes` belong to another
            matrix or to other weights.
    """
    terms, finishes = approximation.terms, approximation.finishes
    batch, shape = terms[0].a.shape[:-3], terms[0].shape
    if np.shape(matrix) != (*batch, *shape):
        raise ValueError(
            f"the approximation is of matrices of shape {(*batch, *shape)}; got "
            f"shape {np.shape(matrix)}. Pass the matrix that was approximated."
        )
    target = validation.matrix(matrix, "float64", [])
    # Weights are rounded to the precision of the solve.
    single = terms[0].a.dtype == np.float32
    dtype = np.float32 if single else np.float64
    weights = (
        validation.weight(left_weight, "left_weight", shape[0], batch, dtype),
        validation.weight(right_weight, "right_weight", shape[1], batch, dtype),
    )
    certificate = certificate_of(target, terms, *weights, finishes)
    if finishes is not None:
        _check_finishes(finishes, np.asarray(certificate.error), target, weights)
    return certificate


def _check_finishes(finishes: Sequence[Finish], errors, matrix, weights) -> None:
    """Raise a `ValueError` if the finishes have other errors than the certificate.

    The second-order statement of a finish holds only for its own matrix and weights.
    """
    given = [finish.spectral_error for finish in finishes]
    is_known = [finish.status != "rank_deficient" for finish in finishes]
    size = _size(matrix)
    for weight in weights:
        size = size if weight is None else size * np.sqrt(_size(weight))
    differs = np.abs(np.reshape(given, errors.shape) - errors) > AGREEMENT * size
    if np.any(differs & np.reshape(is_known, errors.shape)):
        raise ValueError(
            "the second-order finish of the approximation has another error than "
            "its terms have for this matrix and these weights; pass the matrix, "
            "left_weight and right_weight that were given to kronjax.approximate."
        )


def _size(array) -> np.ndarray:
    """Return an upper bound on the Frobenius norms of `[..., m, n]`."""
    largest = np.max(np.abs(array), axis=(-2, -1))
    return largest * math.sqrt(math.prod(array.shape[-2:]))


def certificate_of(
    matrix: np.ndarray,
    terms: Sequence[KroneckerTerms],
    left_weight: np.ndarray | None = None,
    right_weight: np.ndarray | None = None,
    finishes: Sequence[Finish] | None = None,
) -> Certificate:
    """Return the certificate of sums of one matrix or a batch; inputs are not checked.

    Args:
        matrix: `[..., m, n]`.
        terms: One `KroneckerTerms` for each configuration, with the same batch axes.
        left_weight: `[m, m]` or `[..., m, m]`, or None.
        right_weight: `[n, n]` or `[..., n, n]`, or None.
        finishes: Results of `newton.finish`, one for each matrix, or None.
    """
    matrix = np.asarray(matrix)
    *batch, m, n = matrix.shape
    flat = [
        _flat(matrix, 2),
        *(_side(weight, batch) for weight in (left_weight, right_weight)),
    ]
    factors = [jax.tree.map(lambda x: _flat(x, 3), each) for each in terms]

    def arguments(i):
        target, left, right = (None if x is None else _double(x[i]) for x in flat)
        own = tuple(jax.tree.map(lambda x: _double(x[i]), x) for x in factors)
        dual = None if finishes is None else finishes[i].dual
        return target, own, left, right, dual

    @contextlib.contextmanager
    def settings():  # which every thread has of its own
        with jax.enable_x64(True), jax.default_device(_host()):
            yield

    def program(given):
        shapes = exported.shapes(*given)
        return exported.compiled(bounds.certify, "cpu", options, shapes)

    def prove(i):
        given = arguments(i)
        with settings():
            proof = jax.device_get(program(given)(*given))
        return proof.error, proof.local_bound, proof.global_bound

    count, options = len(flat[0]), tuple(compiling.options(m * n, "cpu").items())
    if count:
        with settings():
            program(arguments(0))  # compiled once, not by every thread
    # Decompositions keep one core busy.
    with (
        cpu_threads.one_blas_thread(),
        ThreadPoolExecutor(cpu_threads.cores()) as threads,
    ):
        rows = list(threads.map(prove, range(count)))
    columns: Any = np.reshape(np.array(rows, np.float64).T, (3, *batch))
    error, local, bound = columns
    safe = np.where(error > 0, error, 1)
    kkt = np.full(len(rows), np.nan)
    second = np.full(len(rows), "", object)
    for i, finish in enumerate(finishes or ()):
        kkt[i] = finish.kkt_residual
        second[i] = "strict local minimum" if finish.is_strict_minimum else "not proven"
    return Certificate(
        error=error[()],
        local_bound=local[()],
        local_gap=np.where(error > 0, 1 - local / safe, 0 * error)[()],
        global_bound=bound[()],
        kkt_residual=kkt.reshape(batch)[()],
        second_order=second.reshape(batch)[()],
    )


def _host():
    """Return the CPU, or None where jax is configured without its CPU backend."""
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
