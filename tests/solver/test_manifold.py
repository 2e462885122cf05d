import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tolerance
from hypothesis import given
from hypothesis import strategies as st

from kronjax.linalg import spectral
from kronjax.solver import manifold

D1, D2, RANK = 12, 20, 3


def draw(seed, rank=RANK, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    ambient = jnp.asarray(rng.standard_normal((3, D1, D2)), dtype)
    return manifold.nearest(ambient[0], rank), ambient[1], ambient[2]


def stack(*tangents):
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1), *tangents)


def scaled(factor, tangent):
    return jax.tree.map(lambda x: factor * x, tangent)


@given(st.integers(0, 99))
def test_nearest_is_the_truncated_singular_value_decomposition(seed):
    matrix = np.random.default_rng(seed).standard_normal((D1, D2))
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    point = manifold.nearest(jnp.asarray(matrix), RANK)
    expected = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
    np.testing.assert_allclose(manifold.to_ambient(point), expected, atol=1e-12)


@given(st.integers(0, 99))
def test_projection_is_orthogonal(seed):
    point, x, y = draw(seed)
    px, py = manifold.project(point, x), manifold.project(point, y)
    np.testing.assert_allclose(point.a @ px.a.T, 0, atol=1e-13)
    np.testing.assert_allclose(point.b @ px.b.T, 0, atol=1e-13)
    ambient = manifold.tangent_to_ambient(point, px)
    again = manifold.project(point, ambient)
    for one, two in zip(jax.tree.leaves(px), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-12)
    # Self-adjoint, and the inner product is that of the ambient space.
    other = manifold.tangent_to_ambient(point, py)
    np.testing.assert_allclose(jnp.vdot(ambient, y), jnp.vdot(x, other), rtol=1e-10)
    np.testing.assert_allclose(
        manifold.inner(px, py), jnp.vdot(ambient, other), rtol=1e-10
    )


@given(st.integers(0, 99))
def test_changing_all_left_or_all_right_factors_is_tangent(seed):
    point, x, _ = draw(seed)
    for ambient in (x[:, :RANK] @ point.b, point.a.T @ x[:RANK]):
        tangent = manifold.project(point, ambient)
        back = manifold.tangent_to_ambient(point, tangent)
        np.testing.assert_allclose(back, ambient, atol=1e-12)


@given(st.integers(0, 99))
def test_transported_vectors_are_tangent_and_tangent_ones_stay(seed):
    source, x, _ = draw(seed)
    target, *_ = draw(seed + 1000)
    vector = manifold.project(source, x)
    moved = manifold.transport(target, vector)
    np.testing.assert_allclose(moved.a @ target.a.T, 0, atol=1e-12)
    np.testing.assert_allclose(moved.b @ target.b.T, 0, atol=1e-12)
    again = manifold.transport(target, moved)
    for one, two in zip(jax.tree.leaves(moved), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-12)


@given(st.integers(0, 99))
def test_transport_after_a_short_step_is_nearly_projection(seed):
    point, x, y = draw(seed)
    tangent, vector = (manifold.project(point, z) for z in (x, y))
    length = jnp.sqrt(manifold.inner(tangent, tangent))
    lost = []
    for size in (2e-3, 1e-3):
        moved = manifold.retract(point, scaled(size / length, tangent))
        ours = manifold.tangent_to_ambient(moved, manifold.transport(moved, vector))
        exact = manifold.project(moved, manifold.tangent_to_ambient(point, vector))
        exact = manifold.tangent_to_ambient(moved, exact)
        lost.append(float(jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact)))
    assert lost[0] < 1e-2
    assert lost[1] < 0.7 * lost[0]


@pytest.mark.parametrize("retract", [manifold.retract, manifold.retract_metric])
@given(seed=st.integers(0, 99))
def test_retractions_are_of_second_order(retract, seed):
    point, x, _ = draw(seed)
    tangent = manifold.project(point, x)
    tangent = scaled(1 / jnp.sqrt(manifold.inner(tangent, tangent)), tangent)
    here = manifold.to_ambient(point)
    slope = manifold.tangent_to_ambient(point, tangent)
    normal, along = [], []
    for size in (1e-2, 5e-3):
        moved = retract(point, scaled(size, tangent))
        np.testing.assert_allclose(moved.a @ moved.a.T, np.eye(RANK), atol=1e-12)
        np.testing.assert_allclose(moved.b @ moved.b.T, np.eye(RANK), atol=1e-12)
        rest = manifold.to_ambient(moved) - here - size * slope
        normal.append(float(jnp.linalg.norm(rest)))
        projected = manifold.project(point, rest)
        along.append(float(jnp.sqrt(manifold.inner(projected, projected))))
    assert 3 < normal[0] / normal[1] < 5  # quadratic
    assert along[0] < 1e-13 or along[0] / along[1] > 7  # at least cubic, or exact


def test_retracting_nothing_moves_nothing():
    point, x, _ = draw(0)
    nothing = scaled(0, manifold.project(point, x))
    for retract in (manifold.retract, manifold.retract_metric):
        moved = manifold.to_ambient(retract(point, nothing))
        np.testing.assert_allclose(moved, manifold.to_ambient(point), atol=1e-12)


@pytest.mark.parametrize("singular", [0.0, 1e-14])
def test_retract_survives_a_nearly_singular_core(singular):
    point, x, _ = draw(1)
    core = jnp.diag(jnp.array([2.0, 1.0, singular]))
    point = manifold.Point(point.a, core, point.b)
    tangent = manifold.project(point, x)
    tangent = manifold.Tangent(tangent.a, jnp.zeros((RANK, RANK)), tangent.b)
    moved = manifold.retract(point, tangent)
    expected = manifold.retract_metric(point, tangent)
    np.testing.assert_allclose(
        manifold.to_ambient(moved), manifold.to_ambient(expected), atol=1e-10
    )
    np.testing.assert_allclose(moved.a @ moved.a.T, np.eye(RANK), atol=1e-12)


def test_retracting_nothing_from_a_singular_core_moves_nothing():
    point, x, _ = draw(1)
    point = manifold.Point(point.a, jnp.zeros((RANK, RANK)), point.b)
    moved = manifold.retract(point, scaled(0, manifold.project(point, x)))
    assert (manifold.to_ambient(moved) == 0).all()


def test_retract_of_a_batch_treats_every_lane_by_itself():
    point, x, _ = draw(2)
    singular = manifold.Point(point.a, point.core.at[-1, -1].set(0), point.b)
    points = jax.tree.map(lambda *x: jnp.stack(x), point, singular)
    tangent = scaled(0.1, manifold.project(point, x))
    tangents = jax.tree.map(lambda x: jnp.stack([x, x]), tangent)
    batch = jax.jit(jax.vmap(manifold.retract))(points, tangents)
    for i, one in enumerate((point, singular)):
        alone = manifold.to_ambient(manifold.retract(one, tangent))
        lane = manifold.to_ambient(jax.tree.map(lambda x, i=i: x[i], batch))
        np.testing.assert_allclose(lane, alone, atol=1e-10)


def test_metric_retraction_finds_the_nearest_point():
    point, x, _ = draw(3)
    tangent = manifold.project(point, x)
    wanted = manifold.to_ambient(point) + manifold.tangent_to_ambient(point, tangent)
    expected = manifold.to_ambient(manifold.nearest(wanted, RANK))
    got = manifold.to_ambient(manifold.retract_metric(point, tangent))
    np.testing.assert_allclose(got, expected, atol=1e-11)


def svd_sides(function, *args):
    """Return the smaller side of every matrix that `function` decomposes."""
    sides = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("svd", "eigh"):
                sides.append(min(eqn.invars[0].aval.shape[-2:]))
            for value in eqn.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    if hasattr(inner, "jaxpr"):
                        visit(inner.jaxpr)
                    elif hasattr(inner, "eqns"):
                        visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return sides


@pytest.mark.parametrize(
    ("decay", "dtype"), [(0.0, jnp.float32), (0.5, jnp.float64), (2.0, jnp.float32)]
)
def test_nearest_of_a_large_rearrangement_is_truncated_and_accurate(decay, dtype):
    d1, d2, rank = 2048, 1152, 4
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((d1, 64)), rng.standard_normal((64, d2))
    weights = np.arange(1.0, 65.0) ** -decay
    noise = 10.0 if decay == 0.0 else 0.1
    matrix = (left * weights) @ right + noise * rng.standard_normal((d1, d2))
    values = np.linalg.eigvalsh(matrix.T @ matrix)[::-1]
    target = jnp.asarray(matrix, dtype)
    find = jax.jit(lambda x: manifold.nearest(x, rank))
    assert max(svd_sides(find, target)) <= 64
    point = jax.tree.map(lambda x: np.asarray(x, np.float64), find(target))
    error = np.linalg.norm(matrix - point.a.T @ point.core @ point.b)
    best = np.sqrt(values[rank:].sum())
    assert best * (1 - 1e-6) <= error <= best * (1 + 2e-6)
    # The flat spectrum is the hard case: the leading values are settled all the same.
    assert np.diag(point.core) == pytest.approx(np.sqrt(values[:rank]), rel=2e-4)


@pytest.mark.parametrize("shape", [(200, 150), (20, 30)])
def test_leading_is_exact_at_low_rank(shape):
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((shape[0], 3)) @ rng.standard_normal((3, shape[1]))
    q, core, vt = spectral.leading(jnp.asarray(matrix), 5)
    np.testing.assert_allclose(q @ core @ vt, matrix, atol=1e-11 * core[0, 0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtype_is_kept(dtype):
    point, x, _ = draw(0, dtype=dtype)
    tangent = manifold.project(point, x)
    moved = manifold.retract(point, scaled(0.1, tangent))
    assert {leaf.dtype for leaf in jax.tree.leaves((point, tangent, moved))} == {
        jnp.dtype(dtype)
    }
    assert jnp.abs(moved.a @ moved.a.T - jnp.eye(RANK, dtype=dtype)).max() < tolerance(
        dtype
    )
