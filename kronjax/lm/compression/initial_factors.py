"""Initial factors of schemes in the literature, which train them later.

    van-loan    the fit as it is: by norm and weights Van Loan's, spectral or data-aware
    rescaled    the same, multiplied to the norm of the kernel
    pruning     A = a sub-grid of the kernel, such as every second row, and B = [1, ε]
    random      normal factors, whose sum has the norm of the kernel

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
    """Return the factors that a scheme of the literature starts its training from.

    Args:
        kernel: `[n_in, n_out]`.
        terms: The fit, one sum for each configuration.
        start: Name of the scheme.
    """
    return _STARTS[start](kernel, terms)


def _fitted(kernel, terms):
    """Return the fit as it is."""
    return terms


def _rescaled(kernel, terms):
    """Return terms whose sum has the Frobenius norm of the kernel."""
    total = sum(np.asarray(x.to_matrix()) for x in terms)
    size = np.linalg.norm(total)
    scale = np.sqrt(np.linalg.norm(kernel) / (size if size > 0 else 1))
    return jax.tree.map(lambda x: x * scale, terms)


def _random(kernel, terms):
    """Return normal factors whose sum has the norm of the kernel.

    The kernel decides the seed: every layer has another seed, and the same call makes
    the same model.
    """
    seed = int.from_bytes(hashlib.sha256(kernel.tobytes()).digest()[:8], "little")
    draws = np.random.default_rng(seed)
    drawn = jax.tree.map(
        lambda x: jnp.asarray(draws.standard_normal(x.shape), x.dtype), terms
    )
    return _rescaled(kernel, drawn)


def _pruned(kernel, terms):
    """Return terms whose left factors are sub-grids of the kernel."""
    return tuple(_sub_grids(kernel, x) for x in terms)


def _sub_grids(kernel, terms: KroneckerTerms) -> KroneckerTerms:
    """Return `A ⊗ B` with `A` a sub-grid of the kernel and `B` nearly a unit vector.

    With a factor `B` `[1, 2]`, for example, `A` is every second column; the other
    columns start with small weights, so that training can use them.
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


_STARTS = {
    "van-loan": _fitted,
    "rescaled": _rescaled,
    "pruning": _pruned,
    "random": _random,
}
