"""Starts of schemes in the literature, which train what they begin with.

    van-loan    the fit as it is: by norm and weights Van Loan's, spectral or data-aware
    rescaled    the same, multiplied to the norm of the kernel
    pruning     A = every second row or column, say, and B = [1, ε]
    random      normal factors, their sum of the norm of the kernel

>>> by_name(np.ones((2, 2), np.float32), (), "van-loan")
()
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from kronjax.kronecker import KroneckerTerms


def by_name(
    kernel: np.ndarray, terms: tuple[KroneckerTerms, ...], start: str
) -> tuple[KroneckerTerms, ...]:
    """Return terms as a scheme of the literature begins its training with them."""
    if start == "rescaled":
        return _rescaled(kernel, terms)
    if start == "pruning":
        return tuple(_pruned(kernel, one) for one in terms)
    if start == "random":
        return _rescaled(kernel, _random(kernel, terms))
    return terms


def _rescaled(kernel, terms):
    """Return terms whose sum has the Frobenius norm of the kernel."""
    total = sum(np.asarray(one.to_matrix()) for one in terms)
    size = np.linalg.norm(total)
    scale = np.sqrt(np.linalg.norm(kernel) / (size if size > 0 else 1))
    return jax.tree.map(lambda x: x * scale, terms)


def _random(kernel, terms):
    """Return normal factors, drawn from a seed that the kernel decides.

    So every layer has another one, and the same call makes the same model.
    """
    seed = int.from_bytes(hashlib.sha256(kernel.tobytes()).digest()[:8], "little")
    draws = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(draws.standard_normal(x.shape), x.dtype), terms
    )


def _pruned(kernel, terms: KroneckerTerms) -> KroneckerTerms:
    """Return `A ⊗ B` with `A` a sub-grid of the kernel and `B` nearly a unit vector.

    Of a factor `B` `[1, 2]`, say, `A` is every second column; what is left out begins
    with small weights, so that training can use it.
    """
    (_, m1, n1), (rank, m2, n2) = terms.a.shape, terms.b.shape
    blocks = kernel.reshape(m1, m2, n1, n2)
    energy = np.sum(blocks**2, axis=(0, 2)).ravel()
    a, b = [], []
    for place in np.argsort(-energy)[:rank]:
        unit = np.full(m2 * n2, 1e-2, np.float32)
        unit[place] = 1
        i, j = divmod(int(place), n2)
        a.append(blocks[:, i, :, j])
        b.append(unit.reshape(m2, n2))
    return KroneckerTerms(jnp.asarray(np.stack(a)), jnp.asarray(np.stack(b)))
