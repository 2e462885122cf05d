import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronjax.linalg import norms

bounds = jax.jit(norms.norm_bounds)

SHAPES = [(90, 70), (70, 90), (200, 20), (5, 3)]
KINDS = ["normal", "decaying", "graded", "low rank", "cluster", "orthogonal", "noisy"]


def matrix_of(kind, seed, shape):
    """Return a matrix with the kind of spectrum that the name describes."""
    rng = np.random.default_rng(seed)
    if kind == "normal":
        return rng.standard_normal(shape)
    k = min(shape)
    u, v = (np.linalg.qr(rng.standard_normal((side, k)))[0] for side in shape)
    i = np.arange(k)
    s = {
        "decaying": (i + 1.0) ** -0.5,
        "graded": 10.0 ** (-i),
        "low rank": 1.0 * (i < 2),
        "cluster": np.where(i < k // 2, 1, 0.999),
        "orthogonal": np.ones(k),
        "noisy": np.where(i < 1, 1, 0.3),
    }[kind]
    return (u * s) @ v.T


def check(matrix, found):
    # NumPy's own error, far below that of the bounds but for what is exact.
    true = np.linalg.norm(matrix.astype(np.float64), 2)
    assert float(found.lower) <= true * (1 + 1e-14)
    assert float(found.upper) >= true * (1 - 1e-14)
    return float(found.upper) / float(found.lower) - 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(
    seed=st.integers(0, 999),
    shape=st.sampled_from(SHAPES),
    kind=st.sampled_from(KINDS),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 3.0, 1e30]),
)
def test_the_bounds_enclose_the_norm(dtype, seed, shape, kind, scale):
    matrix = (matrix_of(kind, seed, shape) * scale).astype(dtype)
    width = check(matrix, bounds(jnp.asarray(matrix)))
    assert width < 2e-2


@pytest.mark.parametrize(("dtype", "width"), [(np.float32, 1e-3), (np.float64, 1e-3)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["decaying", "graded", "low rank", "noisy"])
def test_bounds_of_dominant_norms_are_narrow(dtype, width, shape, kind):
    for seed in range(3):
        matrix = matrix_of(kind, seed, shape).astype(dtype)
        assert check(matrix, bounds(jnp.asarray(matrix))) <= width


def test_float64_bounds_reach_the_requested_width():
    fine = jax.jit(lambda matrix: norms.norm_bounds(matrix, width=1e-7))
    for kind in ("normal", "decaying", "low rank"):
        matrix = matrix_of(kind, 0, (90, 70))
        assert check(matrix, fine(jnp.asarray(matrix))) <= 1e-7


def test_the_upper_bound_covers_vectors_orthogonal_to_the_start():
    """Leading vectors orthogonal to the start enter the bound of the remainder."""
    start = np.array(jax.random.normal(jax.random.key(0), (70, 16), np.float64))
    hidden = np.linalg.qr(np.c_[start, np.eye(70)[:, :3]])[0][:, 16:]
    matrix = np.eye(70) + 9 * hidden @ hidden.T
    check(matrix, bounds(jnp.asarray(matrix)))
    matrix, start = np.diag(np.r_[np.zeros(69), 1.0]), np.eye(70)[:, :16]
    found = bounds(jnp.asarray(matrix), jnp.asarray(start))
    assert 0 <= float(found.lower) <= 1 <= float(found.upper)


def test_a_batch_is_bounded_lane_by_lane():
    rng = np.random.default_rng(1)
    scales = np.array([1.0, 1e-20, 1e20])[:, None, None]
    matrices = rng.standard_normal((3, 90, 70)) * scales
    matrices[1] = np.outer(matrices[1, :, 0], matrices[1, 0])
    found = jax.jit(jax.vmap(norms.norm_bounds))(jnp.asarray(matrices))
    for i, matrix in enumerate(matrices):
        here = jax.tree.map(lambda x, i=i: x[i], found)
        assert check(matrix, here) < 1e-3
        alone = bounds(jnp.asarray(matrix))
        assert float(here.lower) == pytest.approx(float(alone.lower), rel=1e-3)


def test_vectors_serve_as_a_start_for_a_nearby_matrix():
    matrix = matrix_of("decaying", 2, (90, 70))
    found = bounds(jnp.asarray(matrix))
    nearby = matrix + 1e-4 * matrix_of("normal", 3, (90, 70))
    again = bounds(jnp.asarray(nearby), found.vectors)
    assert check(nearby, again) <= 1e-3
    assert found.vectors.shape == (70, 16)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(90, 70), (1, 90), (90, 1), (1, 1)])
def test_zero_has_norm_zero(dtype, shape):
    found = bounds(jnp.zeros(shape, dtype))
    assert float(found.lower) == float(found.upper) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_matrices_have_no_bounds(bad):
    matrix = np.ones((90, 70))
    matrix[3, 4] = bad
    found = bounds(jnp.asarray(matrix))
    assert np.isnan(found.lower)
    assert np.isnan(found.upper)


@pytest.mark.parametrize("shape", [(1, 90), (90, 1), (1, 1), (2, 2)])
def test_vectors_and_scalars(shape):
    matrix = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    assert check(matrix, bounds(jnp.asarray(matrix))) < 1e-4


@pytest.mark.parametrize("largest", [3.4e38, 1.2e-38])
def test_at_the_ends_of_float32(largest):
    matrix = (matrix_of("orthogonal", 5, (90, 70)) * largest).astype(np.float32)
    matrix[np.abs(matrix) < 1.2e-38] = 0
    matrix[0, 0] = largest
    assert check(matrix, bounds(jnp.asarray(matrix))) >= 0


def test_short_dtypes_are_computed_in_float32():
    matrix = jnp.asarray(matrix_of("decaying", 6, (90, 70)), jnp.bfloat16)
    found = bounds(matrix)
    assert found.upper.dtype == jnp.float32
    assert check(np.asarray(matrix, np.float32), found) <= 1e-3


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="jax.vmap"):
        norms.norm_bounds(jnp.zeros(shape))
