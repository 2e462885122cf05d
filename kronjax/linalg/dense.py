"""Multiplication of Kronecker sums to dense matrices, in NumPy or jax.

A sum is one product of rearranged factors: `R(Σ_k A_k ⊗ B_k) = Σ_k vec(A_k) vec(B_k)ᵀ`.
Importing this module does not load jax.

>>> import numpy as np
>>> multiply_out(np.ones((1, 2, 3)), np.ones((1, 4, 5))).shape
(8, 15)
"""


def multiply_out(a, b):
    """Return `Σ_k A_k ⊗ B_k`.

    Args:
        a: `[..., r, m1, n1]`, NumPy or jax.
        b: `[..., r, m2, n2]`, likewise.

    Returns:
        `[..., m1 m2, n1 n2]`, in the dtype of the factors.
    """
    *batch, r, m1, n1 = a.shape
    m2, n2 = b.shape[-2:]
    left = a.reshape(*batch, r, m1 * n1).swapaxes(-2, -1)
    blocks = (left @ b.reshape(*batch, r, m2 * n2)).reshape(*batch, m1, n1, m2, n2)
    return blocks.swapaxes(-3, -2).reshape(*batch, m1 * m2, n1 * n2)
