import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import schatten_reference
from hypothesis import given
from hypothesis import strategies as st

from kronjax.linalg import schatten

SQUARINGS = st.sampled_from([-1, 0, 1, 3, 7, 11])
SHAPES = [(8, 8), (5, 9), (9, 5)]
evaluate = jax.jit(schatten.value_and_gradient)


def draw(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape)


def gradient_reference(matrix, p):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    norm = schatten_reference(matrix, p)
    return norm * (u * (s / norm) ** (p - 1)) @ vt


@given(st.integers(0, 99), st.sampled_from(SHAPES), SQUARINGS)
def test_value_and_gradient_agree_with_singular_values(seed, shape, j):
    matrix = draw(seed, shape)
    p = float(schatten.exponent(j))
    value, gradient = evaluate(jnp.asarray(matrix), j)
    norm = schatten_reference(matrix, p)
    assert float(value) == pytest.approx(norm**2 / 2, rel=1e-11)
    expected = gradient_reference(matrix, p)
    np.testing.assert_allclose(gradient, expected, atol=1e-10 * norm)


@given(st.integers(0, 99), st.sampled_from(SHAPES), SQUARINGS)
def test_float32_loses_no_more_than_p_roundings(seed, shape, j):
    matrix = draw(seed, shape).astype(np.float32)
    p = float(schatten.exponent(j))
    value, gradient = evaluate(jnp.asarray(matrix), j)
    assert value.dtype == gradient.dtype == jnp.float32
    norm = schatten_reference(matrix, p)
    assert float(value) == pytest.approx(norm**2 / 2, rel=1e-6 + 1e-7 * p)
    # <gradient, E> = ‖E‖_p²: the direction is right even where entries cancel.
    assert np.vdot(gradient, matrix) == pytest.approx(norm**2, rel=1e-5 + 4e-7 * p)


@pytest.mark.parametrize("shape", [(7, 7), (11, 7), (7, 11)])
def test_halves_of_symmetric_products_are_mirrored(shape, monkeypatch):
    monkeypatch.setattr(schatten, "HALVED", 3)
    program = jax.jit(lambda *x: schatten.value_and_gradient(*x))
    matrix = jnp.asarray(draw(0, shape))
    lines = program.lower(matrix, 3).as_text().splitlines()
    products = [x.split("-> tensor<")[1] for x in lines if "dot_general" in x]
    # Of 7 columns: 3 and 4, of those 1 and 2, 2 and 2; twice, and one whole product.
    assert len(products) == 2 * 7 + 1
    assert sum(x.startswith("7x7x") for x in products) == (shape == (7, 7))
    for j in (-1, 0, 5):
        value, gradient = program(matrix, j)
        norm = schatten_reference(matrix, float(schatten.exponent(j)))
        assert float(value) == pytest.approx(norm**2 / 2, rel=1e-11)
        expected = gradient_reference(matrix, float(schatten.exponent(j)))
        np.testing.assert_allclose(gradient, expected, atol=1e-10 * norm)


@pytest.mark.parametrize("j", [-1, 0, 3, 11])
@pytest.mark.parametrize(("dtype", "scale"), [("float32", 1e18), ("float64", 1e150)])
def test_no_scale_overflows(j, dtype, scale):
    matrix = draw(0, (8, 8)).astype(dtype)
    value, gradient = evaluate(jnp.asarray(matrix), j)
    for factor in (scale, 1 / scale):
        big_value, big_gradient = evaluate(jnp.asarray(matrix * factor, dtype), j)
        assert float(big_value) / factor**2 == pytest.approx(float(value), rel=1e-4)
        np.testing.assert_allclose(
            np.asarray(big_gradient, float) / factor, gradient, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_the_gradient_is_right_where_the_value_leaves_float32(scale):
    matrix = draw(0, (8, 8))
    _, gradient = evaluate(jnp.asarray(matrix * scale, jnp.float32), 5)
    expected = gradient_reference(matrix, 66.0)
    np.testing.assert_allclose(np.asarray(gradient, float) / scale, expected, atol=1e-3)


@pytest.mark.parametrize("j", [-1, 0, 5, 11])
@pytest.mark.parametrize(
    "matrix",
    [np.zeros((8, 8)), np.eye(8), np.diag([1.0] * 4 + [0.0] * 4), np.ones((8, 8))],
    ids=["zero", "equal", "equal and zero", "rank one"],
)
def test_equal_and_zero_singular_values_have_a_finite_derivative(matrix, j):
    value, gradient = evaluate(jnp.asarray(matrix), j)
    norm = schatten_reference(matrix, float(schatten.exponent(j)))
    assert float(value) == pytest.approx(norm**2 / 2, rel=1e-12)
    assert np.isfinite(gradient).all()
    assert np.vdot(gradient, matrix) == pytest.approx(norm**2, rel=1e-12)


@given(st.integers(0, 99))
def test_norms_fall_with_p_towards_the_spectral_norm(seed):
    matrix = jnp.asarray(draw(seed, (8, 8)))
    values = [float(jnp.sqrt(2 * evaluate(matrix, j)[0])) for j in range(-1, 12)]
    assert all(x >= y * (1 - 1e-12) for x, y in zip(values, values[1:], strict=False))
    top = schatten_reference(matrix, np.inf)
    assert top <= values[-1] * (1 + 1e-12)
    assert values[-1] <= top * 8 ** (1 / 4098) * (1 + 1e-12)


@pytest.mark.parametrize("p", [1, 2, 3.5, 18, 4098, np.inf])
def test_exact_norm_agrees_with_the_reference(p):
    matrices = draw(0, (3, 8, 8))
    expected = [schatten_reference(matrix, p) for matrix in matrices]
    np.testing.assert_allclose(schatten.norm(jnp.asarray(matrices), p), expected)
    assert schatten.norm(jnp.zeros((8, 8)), p) == 0


def test_one_compilation_serves_every_p():
    traced = []

    @jax.jit
    def value(matrix, j):
        traced.append(j)
        return schatten.value_and_gradient(matrix, j)[0]

    for j in range(-1, 12):
        value(jnp.eye(8), j)
    assert len(traced) == 1
