import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronjax import spectral

estimate = jax.jit(spectral.estimate_norm)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=st.integers(0, 999), shape=st.sampled_from([(90, 70), (70, 90), (20, 30)]))
def test_never_above_and_close_to_the_true_value(dtype, seed, shape):
    matrix = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    true = np.linalg.norm(matrix.astype(np.float64), 2)
    got = float(estimate(jnp.asarray(matrix)))
    assert got <= true
    assert got >= true * (1 - 1e-4)


@pytest.mark.parametrize("top", [1, 5, 40])
def test_a_cluster_at_the_top_does_no_harm(top):
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((90, 90)))
    v, _ = np.linalg.qr(rng.standard_normal((90, 90)))
    s = np.concatenate([np.ones(top), np.linspace(0.999, 0.5, 90 - top)])
    got = float(estimate(jnp.asarray((u * s) @ v)))
    assert 1 - 1e-4 <= got <= 1


def test_a_batch_is_estimated_lane_by_lane():
    matrices = jnp.asarray(np.random.default_rng(1).standard_normal((3, 90, 70)))
    got = jax.jit(jax.vmap(spectral.estimate_norm))(matrices)
    alone = [estimate(matrix) for matrix in matrices]
    np.testing.assert_allclose(got, alone, rtol=1e-6)


def test_a_linear_map_is_known_by_its_products():
    rng = np.random.default_rng(2)
    a, b = (
        jnp.asarray(rng.standard_normal((8, 9))),
        jnp.asarray(rng.standard_normal((10, 12))),
    )

    def forward(x):
        return jnp.einsum("ij,pq,jqk->ipk", a, b, x.reshape(9, 12, -1)).reshape(80, -1)

    def adjoint(y):
        return jnp.einsum("ij,pq,ipk->jqk", a, b, y.reshape(8, 10, -1)).reshape(108, -1)

    start = jnp.asarray(rng.standard_normal((108, 4)))
    got = spectral.estimate_map_norm(forward, adjoint, start)
    true = np.linalg.norm(a, 2) * np.linalg.norm(b, 2)
    assert true * (1 - 1e-5) <= got <= true


@pytest.mark.parametrize("shape", [(90, 70), (8, 8), (1, 1), (1, 90)])
def test_zero_matrices_have_norm_zero(shape):
    assert estimate(jnp.zeros(shape)) == 0


@pytest.mark.parametrize("shape", [(90, 70), (8, 8), (1, 90), (90, 1)])
def test_rank_one_is_exact(shape):
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal(shape[0]), rng.standard_normal(shape[1])
    true = np.linalg.norm(x) * np.linalg.norm(y)
    assert float(estimate(jnp.asarray(np.outer(x, y)))) == pytest.approx(true, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("shape", [(90, 70), (8, 8)])
def test_float32_works_at_every_scale(scale, shape):
    matrix = np.random.default_rng(4).standard_normal(shape)
    got = float(estimate(jnp.asarray(matrix * scale, jnp.float32)))
    assert got / scale == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-4)
