"""Validation of the matrices and weights that users pass, on the host.

`matrix` and `weight` return NumPy arrays in the dtype of the computation, or raise a
`ValueError` that says what is wrong and what to pass instead.

>>> import numpy as np
>>> weight(np.diag([1, 2]), "right_weight", 2, (), np.float32).dtype
dtype('float32')
"""

import jax.numpy as jnp
import numpy as np

LARGEST = 1e25
"""Upper limit of the largest entry of a weight; the lower limit is its inverse."""

SLACK = 1e-5
"""Relative asymmetry and negative eigenvalues that are accepted as rounding."""


def matrix(given, dtype, notes: list[str]) -> np.ndarray:
    """Return the matrix in the dtype of the computation.

    Args:
        given: `[..., m, n]`, NumPy or jax, real.
        dtype: "float32", "float64", or None for float64 if the matrix has it and
            float32 otherwise.
        notes: List to which decisions made on behalf of the user are appended.

    Returns:
        `[..., m, n]`.

    Raises:
        ValueError: If the matrix is empty, a vector, complex, or not finite.
    """
    array = np.asarray(given)
    if array.ndim < 2 or array.size == 0:
        raise ValueError(
            f"expected matrices [..., m, n] with entries; got shape {array.shape}. "
            "Reshape a vector to [1, n] or [n, 1]."
        )
    if array.dtype.kind not in "fiub" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"expected real numbers; got dtype {array.dtype}.")
    if dtype is None:
        dtype = "float64" if array.dtype == np.float64 else "float32"
        if array.dtype not in (np.float32, np.float64):
            notes.append(f"{array.dtype} input computed in float32")
    if dtype not in ("float32", "float64", np.float32, np.float64):
        raise ValueError(f'dtype must be "float32" or "float64"; got {dtype!r}.')
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    finite = np.isfinite(converted)
    if not finite.all():
        position = tuple(int(i) for i in np.argwhere(~finite)[0])
        if np.isfinite(np.float64(array[position])):
            raise ValueError(
                f"entries overflow float32, the first at {position}: "
                f'{array[position]}; pass dtype="float64".'
            )
        raise ValueError(
            f"the matrix has {np.count_nonzero(~finite)} NaN or infinite entries, the "
            f"first at {position}: {array[position]}. Replace them before solving."
        )
    largest = np.max(np.abs(converted), axis=(-2, -1), keepdims=True).astype(np.float64)
    ratios = converted / np.where(largest > 0, largest, 1)
    norms = np.linalg.norm(ratios, axis=(-2, -1))
    if np.any(
        norms > np.finfo(converted.dtype).max / np.maximum(largest[..., 0, 0], 1)
    ):
        raise ValueError(f"a Frobenius norm overflows {dtype}; scale the matrix down.")
    return converted


def weight(
    given, name: str, size: int, batch: tuple[int, ...], dtype
) -> np.ndarray | None:
    """Return a weight, symmetric, in the dtype of the computation.

    Args:
        given: One weight `[size, size]` shared by all matrices, or one for each matrix,
            `[..., size, size]`; None for the identity.
        name: Name of the argument, for error messages.
        size: Number of rows or columns of the matrices.
        batch: Shape of the batch axes of the matrices.
        dtype: The dtype of the computation.

    Returns:
        The weight, or None.

    Raises:
        ValueError: If the weight has the wrong size, is not symmetric or not positive
            semidefinite beyond rounding, is zero, or holds NaN or infinite entries.
    """
    if given is None:
        return None
    array = np.asarray(given)
    if array.shape not in ((size, size), (*batch, size, size)):
        raise ValueError(
            f"{name} must be [{size}, {size}], or one for each matrix, "
            f"{[*batch, size, size]}; got shape {array.shape}. For y = x @ K "
            "the left_weight is the second moment mean(xᵀ x) of the inputs, the "
            "right_weight that of the gradients at y."
        )
    if array.dtype.kind not in "fiub" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must hold real numbers; got dtype {array.dtype}.")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        position = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(
            f"{name} has NaN or infinite entries, the first at {position}; compute the "
            "second moments in float32 or wider."
        )
    flat = array.reshape(-1, size, size)
    for i in range(len(flat)):
        flat[i] = _semidefinite(flat[i], f"{name}[{i}]" if len(flat) > 1 else name)
    return flat.reshape(array.shape).astype(dtype)


def _semidefinite(array, name):
    largest = np.max(np.abs(array))
    if largest == 0:
        raise ValueError(f"{name} is zero, so that every sum has error 0; omit it.")
    if not 1 / LARGEST <= largest <= LARGEST:
        raise ValueError(
            f"{name} has a largest entry of {largest:.3g}, too far from 1 for the "
            "computation; divide it by that entry, which changes no solution."
        )
    unit = array / largest
    asymmetry = np.max(np.abs(unit - unit.T))
    if asymmetry > SLACK:
        raise ValueError(
            f"{name} is not symmetric: it differs from its transpose by "
            f"{asymmetry:.2g} of its largest entry; pass (C + C.T) / 2 if that is "
            "intended."
        )
    unit = (unit + unit.T) / 2
    slack = SLACK * np.linalg.norm(unit)
    try:
        np.linalg.cholesky(unit + slack * np.eye(len(unit)))
    except np.linalg.LinAlgError:
        lowest, *_, highest = np.linalg.eigvalsh(unit)
        raise ValueError(
            f"{name} is not positive semidefinite: its eigenvalues reach from "
            f"{lowest * largest:.3g} to {highest * largest:.3g}. Pass a second moment "
            "mean(x xᵀ), or clip the eigenvalues at zero."
        ) from None
    return unit * largest
