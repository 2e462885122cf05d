"""Norms of the residual `E = T − K`, in float64 on the host, weighted or not.

The weighted norms, of `L^{1/2} E R^{1/2}`, need the root of one weight at most:
`‖·‖_F² = <L E R, E>`, and `‖·‖_2²` is the largest eigenvalue of `E R Eᵀ L`.

>>> import numpy as np
>>> float(measure(np.diag([3.0, 4.0]), ()).frobenius)
5.0
"""

import dataclasses

import numpy as np

from kronjax.linalg.dense import multiply_out


@dataclasses.dataclass(frozen=True)
class ResidualNorms:
    """Norms of `T − K`, float64; of shape `[...]` for a batch.

    Attributes:
        spectral: `‖T − K‖_2`.
        frobenius: `‖T − K‖_F`.
    """

    spectral: np.ndarray
    frobenius: np.ndarray

    def over(self, whole: "ResidualNorms") -> "ResidualNorms":
        """Return the ratios to other norms; 0 where those are 0."""
        return ResidualNorms(
            _ratio(self.spectral, whole.spectral),
            _ratio(self.frobenius, whole.frobenius),
        )


def measure(given, terms, left=None, right=None) -> ResidualNorms:
    """Return the norms of matrices minus the sum of `terms`.

    Args:
        given: The matrices, `[..., m, n]`, real.
        terms: Any number of `KroneckerTerms` with the same batch axes.
        left: Weight of the rows, `[m, m]` or `[..., m, m]`, or None.
        right: Weight of the columns, `[n, n]` or `[..., n, n]`, or None.

    Returns:
        `ResidualNorms`, `[...]`.
    """
    *batch, m, n = given.shape
    matrices = given.reshape(-1, m, n)
    factors = [(_flat(term.a, 3), _flat(term.b, 3)) for term in terms]
    norms = []
    for i, matrix in enumerate(matrices):
        residual = matrix.astype(np.float64)
        for pair in factors:
            a, b = (np.asarray(x[i], np.float64) for x in pair)
            residual = residual - multiply_out(a, b)
        norms.append(_norms(residual, _pick(left, i), _pick(right, i)))
    spectral, frobenius = (np.reshape(x, batch)[()] for x in zip(*norms, strict=True))
    return ResidualNorms(spectral, frobenius)


def whiten(matrix, left=None, right=None) -> np.ndarray:
    """Return `L^{1/2} T R^{1/2}`, `[..., m, n]`, float64; weights as in `measure`."""
    result = np.asarray(matrix, np.float64)
    if left is not None:
        result = _root(left) @ result
    return result if right is None else result @ _root(right)


def _root(weight):
    values, vectors = np.linalg.eigh(np.asarray(weight, np.float64))
    roots = np.sqrt(np.maximum(values, 0))[..., None, :]
    return (vectors * roots) @ vectors.swapaxes(-2, -1)


def _flat(array, axes):
    return array.reshape(-1, *array.shape[-axes:])


def _pick(weight, number):
    if weight is None or weight.ndim == 2:
        return weight
    return _flat(weight, 2)[number]


def _norms(matrix, left=None, right=None):
    """Return the spectral and Frobenius norm of `[m, n]`, float64, at any scale."""
    largest = np.max(np.abs(matrix))
    scaled = matrix / (largest if largest > 0 else 1)
    if left is None and right is None:
        gram = scaled @ scaled.T if len(scaled) < len(scaled.T) else scaled.T @ scaled
        top = max(np.linalg.eigvalsh(gram)[-1], 0)
        return largest * np.sqrt(top), largest * np.linalg.norm(scaled)
    if right is None:  # the left weight is that of the columns of the transpose
        scaled, left, right = scaled.T, None, left
    right, right_unit = _unit(right)
    gram = scaled @ right @ scaled.T
    unit = largest * np.sqrt(right_unit)
    if left is not None:
        left, left_unit = _unit(left)
        values, vectors = np.linalg.eigh(left)
        root = vectors * np.sqrt(np.maximum(values, 0))
        gram = root.T @ gram @ root
        unit = unit * np.sqrt(left_unit)
    top = max(np.linalg.eigvalsh((gram + gram.T) / 2)[-1], 0)
    return unit * np.sqrt(top), unit * np.sqrt(max(np.trace(gram), 0))


def _unit(weight):
    weight = np.asarray(weight, np.float64)
    largest = np.max(np.abs(weight))
    return weight / largest, largest


def _ratio(part, whole):
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1), 0.0)[()]
