import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronjax.linalg import spectral

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
def test_clustered_leading_values_are_estimated(top):
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


def test_a_linear_map_needs_only_its_products():
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


def spread(shape, low, dtype, seed=0):
    """A matrix with singular values from 1 to `low`, evenly on a logarithmic scale."""
    rng = np.random.default_rng(seed)
    k = min(shape)
    u, v = (np.linalg.qr(rng.standard_normal((side, k)))[0] for side in shape)
    return jnp.asarray((u * np.geomspace(1, low, k)) @ v.T, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
@pytest.mark.parametrize("low", [0.1, 1e-9])
def test_triplets_by_the_gram_matrix_agree_with_an_svd(shape, low, dtype):
    matrix = 1e20 * spread(shape, low, dtype)
    eps = float(jnp.finfo(dtype).eps)
    u, s, vt = map(doubled, spectral.triplets_by_gram(matrix))
    exact = np.linalg.svd(doubled(matrix), compute_uv=False)
    np.testing.assert_allclose((u * s) @ vt, matrix, atol=20 * eps * exact[0])
    # Large values agree to rounding, small ones to its square root.
    large = exact > eps**0.25 * exact[0]
    np.testing.assert_allclose(s[large], exact[large], rtol=20 * eps**0.5)
    np.testing.assert_allclose(s, exact, atol=20 * eps**0.5 * exact[0])
    shorter = u if shape[0] < shape[1] else vt.T
    assert np.abs(shorter.T @ shorter - np.eye(20)).max() < 40 * eps


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_leading_uses_the_gram_matrix_for_large_matrices(dtype):
    @jax.jit
    def leading(matrix):
        return spectral.leading(matrix, 100)

    small = spread((280, spectral.LARGE - 1), 0.1, dtype)
    matrix = spread((280, spectral.LARGE), 0.1, dtype)
    texts = [leading.lower(x).compile().as_text() for x in (small, matrix)]
    assert ["syevd" in text for text in texts] == [False, True]
    q, core, vt = map(doubled, leading(matrix))
    exact = np.linalg.svd(doubled(matrix), compute_uv=False)
    left = np.linalg.norm(doubled(matrix) - q @ core @ vt)
    assert left == pytest.approx(np.linalg.norm(exact[100:]), rel=1e-4)
    for basis in (q, vt.T):
        gram = basis.T @ basis
        assert np.abs(gram - np.eye(100)).max() < 100 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("low", [0.3, 1e-9, 0])
def test_lengths_sum_to_at_least_the_nuclear_norm(low):
    matrix = spread((40, 30), low or 1, jnp.float32) * np.float32(low > 0)
    total = float(jnp.sum(spectral.lengths_by_gram(matrix)))
    exact = float(np.linalg.norm(doubled(matrix), "nuc"))
    assert exact <= total <= exact * 1.001


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@given(
    seed=st.integers(0, 999),
    low=st.sampled_from([1, 0.3, 1e-3, 1e-9]),
    shape=st.sampled_from([(30, 20), (20, 30)]),
)
def test_leading_by_gram_is_the_nearest_of_its_rank(dtype, seed, low, shape):
    matrix = spread(shape, low, dtype, seed)
    eps = float(jnp.finfo(dtype).eps)
    q, core, vt = map(doubled, leading_by_gram(matrix))
    s = np.linalg.svd(doubled(matrix), compute_uv=False)
    left = np.linalg.norm(doubled(matrix) - q @ core @ vt)
    best = np.linalg.norm(s[6:])
    assert left**2 <= best**2 * (1 + 1e-5) + (100 * eps) ** 2
    for basis in (q, vt.T):
        assert np.abs(basis.T @ basis - np.eye(6)).max() < 100 * eps


@pytest.mark.parametrize("rank", [0, 2, 6])
def test_leading_by_gram_has_orthonormal_bases_at_lower_rank(rank):
    rng = np.random.default_rng(5)
    parts = rng.standard_normal((rank, 20, 1)), rng.standard_normal((rank, 1, 30))
    matrix = jnp.asarray(np.sum(parts[0] @ parts[1], axis=0))
    both = jnp.stack([matrix, jnp.asarray(rng.standard_normal((20, 30)))])
    q, core, vt = jax.vmap(leading_by_gram)(both)
    np.testing.assert_allclose((q @ core @ vt)[0], matrix, atol=1e-12)
    gram = jnp.swapaxes(q, 1, 2) @ q
    np.testing.assert_allclose(gram, np.stack([np.eye(6)] * 2), atol=1e-12)


def test_zero_matrices_do_not_send_a_batch_to_the_svd(monkeypatch):
    called, decompose = [], spectral._leading_by_svd

    def slow(matrix, rank):
        jax.debug.callback(called.append, rank)
        return decompose(matrix, rank)

    monkeypatch.setattr(spectral, "_leading_by_svd", slow)
    regular = spread((30, 20), 0.3, jnp.float64)
    for other, is_slow in ((0 * regular, False), (spread((30, 20), 1e-9, float), True)):
        batch = jnp.stack([regular, other])
        jax.block_until_ready(
            jax.vmap(lambda x: spectral.leading_by_gram(x, 20))(batch)
        )
        jax.effects_barrier()
        assert bool(called) == is_slow


@jax.jit
def leading_by_gram(matrix):
    return spectral.leading_by_gram(matrix, 6)


def doubled(x):
    return np.asarray(x, np.float64)
