"""Tests that norms, gradients and sums agree with torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronjax.kronecker import KroneckerTerms
from kronjax.linalg import schatten

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("j", [-1, 0, 3, 7])
def test_schatten_gradient_agrees_with_automatic_differentiation_by_torch(j):
    matrix = np.random.default_rng(0).standard_normal((9, 7))
    p = float(schatten.exponent(j))
    leaf = torch.tensor(matrix, requires_grad=True)
    singular = torch.linalg.svdvals(leaf)
    norm = singular[0] * ((singular / singular[0]) ** p).sum() ** (1 / p)
    (norm**2 / 2).backward()
    value, gradient = schatten.value_and_gradient(jnp.asarray(matrix), j)
    assert float(value) == pytest.approx(float(norm.detach() ** 2 / 2), rel=1e-12)
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), atol=1e-11)


def test_kronecker_sums_agree_with_torch():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 5, 2))
    expected = sum(
        torch.kron(torch.tensor(x), torch.tensor(y)) for x, y in zip(a, b, strict=True)
    )
    got = jax.jit(KroneckerTerms.to_matrix)(
        KroneckerTerms(jnp.asarray(a), jnp.asarray(b))
    )
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-14)
