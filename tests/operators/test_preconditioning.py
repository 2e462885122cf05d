"""Preconditioners against dense eigenvalues, SciPy's solvers and what people use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
from helpers import van_loan

import kronjax
from bench.grids import anisotropic, diffusion, disk
from kronjax import Configuration, KroneckerTerms
from kronjax.kronecker import rearrange
from kronjax.linalg.dense import multiply_out
from kronjax.operators import fit, preconditioning
from kronjax.operators.preconditioning import preconditioner
from kronjax.operators.symmetric import ambient_of
from kronjax.solver import manifold

SIZES = 4, 5
A = diffusion(*SIZES)
QUICK = {"num_starts": 1, "progress": False}


def of(matrix, rank, **options):
    return preconditioner(matrix, Configuration((4, 4), rank), **{**QUICK, **options})


def measured(found, matrix):
    """Return the eigenvalues of the preconditioned matrix, ascending."""
    applied = found.as_linear_operator().matmat(matrix)
    values = np.linalg.eigvals(applied)
    np.testing.assert_allclose(values.imag, 0, atol=1e-9)
    return np.sort(values.real)


@pytest.fixture(scope="module")
def forward():
    return of(A, 2)


@pytest.fixture(scope="module")
def backward():
    return of(A, 3, inverse=True)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_spectrum_is_proven_and_sharp(name, request):
    found = request.getfixturevalue(name)
    values = measured(found, A)
    low, high = found.spectrum
    assert low <= values[0] * (1 + 1e-12) and values[-1] <= high * (1 + 1e-12)
    assert found.condition_bound <= 1.01 * values[-1] / values[0]
    assert found.condition_bound == pytest.approx(
        (1 + found.error) / (1 - found.error), rel=1e-2
    )


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_hardly_any_change_of_one_side_lowers_the_error(name, request):
    found = request.getfixturevalue(name)
    proof = found.certify(scipy.sparse.csr_array(A))
    assert proof.error == pytest.approx(found.error, rel=1e-3)
    assert proof.local_gap < 0.02
    assert 0 < proof.global_bound <= proof.error
    with pytest.raises(ValueError, match="shape"):
        found.certify(np.eye(5))


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_sum_is_exactly_symmetric(name, request):
    terms = request.getfixturevalue(name).terms
    whole = multiply_out(np.asarray(terms.a), np.asarray(terms.b))
    np.testing.assert_array_equal(whole, whole.T)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_solve_applies_the_inverse_of_the_sum(name, request):
    found = request.getfixturevalue(name)
    whole = np.asarray(found.terms.to_matrix())
    inverse = whole if found.inverse else np.linalg.inv(whole)
    x = np.random.default_rng(0).standard_normal((3, 2, 20))
    expected = x @ inverse
    np.testing.assert_allclose(found.solve(x), expected, rtol=1e-9, atol=1e-9)
    jitted = jax.jit(lambda m, x: m.solve(x))
    np.testing.assert_allclose(jitted(found, x), expected, rtol=1e-9, atol=1e-9)
    mapped = jax.vmap(found.solve)(jnp.asarray(x))
    np.testing.assert_allclose(mapped, expected, rtol=1e-9, atol=1e-9)
    short = found.solve(x.astype(np.float32))
    assert short.dtype == jnp.float32
    np.testing.assert_allclose(short, expected, rtol=1e-4, atol=1e-4)
    linear = found.as_linear_operator()
    np.testing.assert_allclose(linear @ x[0, 0], expected[0, 0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(linear @ x[0].T, expected[0].T, rtol=1e-9, atol=1e-9)


def test_conjugate_gradients_need_no_more_iterations_than_proven(forward):
    b = np.random.default_rng(0).standard_normal(20)
    exact, count = np.linalg.solve(A, b), []

    def energy(x):
        return float((x - exact) @ A @ (x - exact)) ** 0.5

    scipy.sparse.linalg.cg(
        A,
        b,
        rtol=1e-14,
        M=forward.as_linear_operator(),
        callback=lambda x: count.append(energy(x)),
    )
    wanted = 1e-6 * energy(np.zeros(20))
    assert next(i for i, x in enumerate(count, 1) if x <= wanted) <= forward.iterations(
        1e-6
    )
    x, _ = jax.scipy.sparse.linalg.cg(
        lambda x: jnp.asarray(A) @ x, jnp.asarray(b), M=forward.solve, tol=1e-10
    )
    np.testing.assert_allclose(x, exact, rtol=1e-7)


def test_fewer_than_what_people_use(forward):
    """Below Van Loan's sum, and below the weighted Frobenius fit."""

    def condition(near):
        values = np.linalg.eigvals(np.linalg.solve(near, A)).real
        return values.max() / values.min() if values.min() > 0 else np.inf

    plain = van_loan(A, (4, 4), 2).to_matrix()
    assert forward.condition_bound < condition(plain)
    weight = np.linalg.inv(A)
    weighted = kronjax.approximate(
        A,
        Configuration((4, 4), 2),
        norm="frobenius",
        left_weight=weight,
        right_weight=weight,
    )
    assert forward.condition_bound < condition(weighted.matrix())


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_matrix_does_not_matter(forward, scale):
    found = of(scale * A, 2)
    assert found.condition_bound == pytest.approx(forward.condition_bound, rel=1e-3)


@pytest.mark.parametrize("inverse", [False, True])
def test_high_contrasts_end_definite_and_with_less_than_one_product(inverse):
    matrix = diffusion(4, 5, disk(1e5))
    found = of(matrix, 2, inverse=inverse)
    values = measured(found, matrix)
    assert values[0] > 0 and found.condition_bound < 1.05 * values[-1] / values[0]
    assert found.condition_bound < np.linalg.cond(matrix) / 20
    assert found.condition_bound < of(matrix, 1, inverse=inverse).condition_bound


@pytest.mark.parametrize("inverse", [False, True])
def test_one_product_is_found_exactly(inverse):
    left, right = diffusion(2, 2), diffusion(5, 1)
    found = of(np.kron(left, right), 1, inverse=inverse)
    assert found.condition_bound < 1 + 1e-5


def test_skew_symmetric_products_are_found_and_inverted():
    matrix = anisotropic(4)
    ends = [of(matrix, 2, num_starts=3), of(matrix, 2, inverse=True)]
    for found in ends:
        assert found.condition_bound < np.linalg.cond(matrix) / 3
        values = measured(found, matrix)
        assert found.condition_bound == pytest.approx(values[-1] / values[0], rel=1e-2)
    assert ends[0].ranks == (1, 1)
    lower = np.linalg.cholesky(matrix)
    q = np.linalg.inv(lower)
    assert fit.fit(q, matrix, (4, 4), 3, num_starts=1).error < 1e-6


def test_sparse_matrices_and_sums_are_taken(forward):
    sparse = of(scipy.sparse.csr_array(A), 2)
    assert sparse.spectrum == forward.spectrum
    terms = KroneckerTerms(
        np.stack([np.eye(4), diffusion(4, 1)]), np.stack([diffusion(5, 1), np.eye(5)])
    )
    assert of(terms, 2).condition_bound < 1 + 1e-5


def test_a_null_space_is_deflated():
    line = np.diag([1.0, 2, 2, 1]) - np.eye(4, k=1) - np.eye(4, k=-1)
    other = np.diag([1.0, 2, 2, 2, 1]) - np.eye(5, k=1) - np.eye(5, k=-1)
    neumann = np.kron(line, np.eye(5)) + np.kron(np.eye(4), other)
    with pytest.raises(ValueError, match=r"(?s)not positive definite.*null_space"):
        of(neumann, 2)
    found = of(neumann, 2, null_space=np.ones(20))
    values = measured(found, neumann)
    assert values[0] == pytest.approx(0, abs=1e-9)
    low, high = found.spectrum
    assert low <= values[1] + 1e-9 and values[-1] <= high + 1e-9
    with pytest.raises(ValueError, match="not the null space"):
        of(neumann, 2, null_space=np.arange(20))
    with pytest.raises(ValueError, match="got shape"):
        of(neumann, 2, null_space=np.ones(40))
    with pytest.raises(ValueError, match="independent"):
        of(neumann, 2, null_space=np.ones((20, 2)))


def test_results_print_in_ten_lines(forward, backward):
    for found in (forward, backward):
        text = repr(found)
        assert len(text.splitlines()) <= 10 and f"{found.condition_bound:.5g}" in text
        assert "<table" in found._repr_html_()


@pytest.mark.parametrize(
    ("matrix", "rank", "options", "message"),
    [
        (A + np.triu(A, 1), 2, {}, r"not symmetric: A\[\d+, \d+\] ="),
        (A - 3 * np.eye(20), 2, {}, "least eigenvalue is -"),
        (np.where(np.eye(20) > 0, np.nan, A), 2, {}, "NaN"),
        (A.astype(complex), 2, {}, "complex"),
        (A[:, :10], 2, {}, "square"),
        (A, 3, {}, "inverse=True"),
        (A, 11, {"inverse": True}, "at most 10"),
        (np.eye(21), 1, {}, "does not divide"),
    ],
)
def test_bad_input_is_refused_with_the_reason(matrix, rank, options, message):
    with pytest.raises(ValueError, match=message):
        of(matrix, rank, **options)


def test_other_configurations_are_refused():
    with pytest.raises(ValueError, match="square"):
        preconditioner(A, Configuration((4, 5), 1))
    with pytest.raises(ValueError, match="Configuration"):
        preconditioner(A, (4, 4))
    with pytest.raises(ValueError, match="num_starts"):
        of(A, 1, num_starts=0)
    with pytest.raises(ValueError, match="shape"):
        of(A, 1).solve(np.ones(19))


def test_too_large_a_matrix_is_refused_before_it_is_formed(monkeypatch):
    monkeypatch.setattr(preconditioning.matrices, "physical_memory", lambda: 10_000)
    with pytest.raises(MemoryError, match="20 rows"):
        of(scipy.sparse.csr_array(A), 1)


@pytest.mark.parametrize("kind", sorted(fit.OBJECTIVES))
def test_gradients_are_derivatives(kind):
    """Of both objectives, by central differences along a tangent vector."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(np.eye(20) + 0.1 * rng.standard_normal((20, 20)))
    near = rearrange(jnp.asarray(np.eye(20) + A / 10), (4, 4))
    ambients = [ambient_of(near, SIZES, parity) for parity in fit.PARITIES]
    start = fit._start(q, SIZES, ambients, (2, 0))
    exponent = jnp.asarray(2 if kind == "norm" else 3.0)
    objective = fit._objective(q, SIZES, kind, exponent, start.present)
    (point,) = start.best
    noise = rng.standard_normal((point.a.shape[1], point.b.shape[1]))
    tangent = manifold.project(point, jnp.asarray(noise))
    slope = manifold.inner(objective((point,))[1][0], tangent)
    step = 1e-6

    def value(sign):
        moved = jax.tree.map(lambda x: sign * step * x, tangent)
        return float(objective((manifold.retract(point, moved),))[0])

    assert (value(1) - value(-1)) / (2 * step) == pytest.approx(float(slope), rel=1e-6)
