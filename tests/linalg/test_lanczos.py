import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronjax.linalg import lanczos


@jax.jit
def bounds(matrix, start):
    return lanczos.map_norm_bounds(
        lambda x: jnp.matmul(matrix, x, precision="highest"),
        lambda y: jnp.matmul(y, matrix, precision="highest"),
        start,
    )


def matrices(dtype):
    rng = np.random.default_rng(0)
    shape = (90, 70)
    normal = rng.standard_normal(shape)
    flat = np.linalg.qr(normal)[0]
    first = np.zeros(shape)
    first[0, 0] = 1
    kinds = {
        "normal": normal,
        "decaying": normal * np.arange(1, 71) ** -0.5,
        "orthogonal": flat,
        "rank one": first,
        "rank two": normal[:, :2] @ normal[:2],
        "tiny": 1e-25 * normal,
        "huge": 1e25 * normal,
    }
    return {name: matrix.astype(dtype) for name, matrix in kinds.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", matrices(np.float32))
def test_the_bounds_enclose_the_norm_for_every_seed(dtype, name):
    matrix = matrices(dtype)[name]
    true = np.linalg.norm(matrix.astype(np.float64), 2)
    for seed in range(20):
        start = jax.random.normal(jax.random.key(seed), (70,), dtype)
        found = bounds(jnp.asarray(matrix), start)
        assert float(found.lower) <= true <= float(found.upper)
        assert float(found.upper) <= float(found.lower) * (1 + 1e-3)


def test_the_failure_rate_is_at_most_the_requested_one():
    """A failure rate of one in five is requested here, with few steps."""
    matrix = np.diag(np.linspace(0.5, 1, 70))

    def upper(key):
        start = jax.random.normal(key, (70,))
        return lanczos.map_norm_bounds(
            lambda x: jnp.asarray(matrix) @ x,
            lambda y: jnp.asarray(matrix) @ y,
            start,
            steps=8,
            failure=0.2,
        ).upper

    found = jax.jit(jax.vmap(upper))(jax.random.split(jax.random.key(0), 500))
    # Five standard deviations above a fifth.
    assert np.mean(np.asarray(found) < 1) <= 0.2 + 5 * (0.16 / 500) ** 0.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zero_has_norm_zero(dtype):
    found = bounds(jnp.zeros((90, 70), dtype), jnp.ones(70, dtype))
    assert float(found.lower) == float(found.upper) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_matrices_have_no_bounds(bad):
    matrix = np.ones((90, 70))
    matrix[3, 4] = bad
    found = bounds(jnp.asarray(matrix), jnp.ones(70))
    assert not np.isfinite(found.upper)
    assert np.isnan(found.lower)


def test_the_bounds_of_a_batch_enclose_every_norm():
    stacked = jnp.asarray(np.stack(list(matrices(np.float64).values())))
    starts = jax.random.normal(jax.random.key(1), (len(stacked), 70))
    found = jax.jit(jax.vmap(bounds))(stacked, starts)
    for i, matrix in enumerate(stacked):
        true = np.linalg.norm(matrix, 2)
        assert float(found.lower[i]) <= true * (1 + 1e-14)
        assert float(found.upper[i]) >= true
