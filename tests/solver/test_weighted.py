import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import kronecker_sum_reference

from kronjax import Configuration, Status, approximate, solve
from kronjax.kronecker import KroneckerTerms
from kronjax.solver import weighted

SMALL = Configuration((3, 4), 2)
MIXTURE = (Configuration((3, 4), 1), Configuration((12, 1), 2))


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def weight(seed, n=12, rank=24, decay=1.5):
    """Return a second moment with a spectrum of a few decades."""
    x = draw(seed, rank, n) * np.arange(1, n + 1) ** -decay
    return x.T @ x


def root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def dense(terms):
    return sum(kronecker_sum_reference(one.a, one.b) for one in terms)


@functools.cache
def solver(configuration, norm="frobenius", sides=(False, True)):
    """Solve one matrix with weights of the given sides."""

    def run(matrix, left, right):
        weights = {"left_weight": left, "right_weight": right}
        given = {k: v for (k, v), on in zip(weights.items(), sides, strict=True) if on}
        return solve(matrix, configuration, norm=norm, num_starts=1, **given)

    return jax.jit(run)


def block_optimum(matrix, left, right, a_shape, b):
    """Return the least weighted error over all left factors, right ones given."""
    m1, n1 = a_shape
    columns = []
    for one in b:
        for i in range(m1):
            for j in range(n1):
                unit = np.zeros(a_shape)
                unit[i, j] = 1
                columns.append((left @ np.kron(unit, one) @ right).ravel())
    design, target = np.array(columns).T, (left @ matrix @ right).ravel()
    found = np.linalg.lstsq(design, target, rcond=None)[0]
    return np.linalg.norm(target - design @ found)


@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)])
def test_low_rank_is_the_whitened_svd(sides):
    matrix, left, right = draw(0, 12, 12), weight(1), weight(2)
    found = solver(Configuration((12, 1), 3), sides=sides)(matrix, left, right)
    left = root(left) if sides[0] else np.eye(12)
    right = root(right) if sides[1] else np.eye(12)
    s = np.linalg.svd(left @ matrix @ right, compute_uv=False)
    got = np.linalg.norm(left @ (matrix - dense(found.terms)) @ right)
    assert got == pytest.approx(np.linalg.norm(s[3:]), rel=1e-3)
    assert found.trace.p.tolist() == [2]  # a closed form


@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)])
def test_no_exact_block_improves_a_weighted_fit(sides):
    matrix, left, right = draw(3, 12, 12), weight(4), weight(5)
    found = solver(SMALL, sides=sides)(matrix, left, right)
    left = root(left) if sides[0] else np.eye(12)
    right = root(right) if sides[1] else np.eye(12)
    [terms] = found.terms
    got = np.linalg.norm(left @ (matrix - dense(found.terms)) @ right)
    assert got == pytest.approx(float(found.trace.value[-1]), rel=1e-4)
    assert got < 0.97 * float(found.trace.value[0])
    best = block_optimum(matrix, left, right, (3, 4), np.asarray(terms.b))
    assert best <= got * (1 + 1e-9)
    assert got <= best * (1 + 2e-3)
    assert found.status == Status.CONVERGED


def test_kronecker_factored_weights_have_a_closed_form():
    left, right = (
        np.kron(weight(6, 3), weight(7, 4)),
        np.kron(weight(8, 4), weight(9, 3)),
    )
    matrix = draw(10, 12, 12)
    found = solver(SMALL, sides=(True, True))(matrix, left, right)
    factors = [np.kron(root(weight(6, 3)), root(weight(7, 4)))]
    factors += [np.kron(root(weight(8, 4)), root(weight(9, 3)))]
    whitened = factors[0] @ matrix @ factors[1]
    plain = solve(jnp.asarray(whitened), SMALL, norm="frobenius")
    np.testing.assert_allclose(found.trace.value[0], plain.trace.value[0], rtol=1e-3)
    np.testing.assert_allclose(found.trace.value[-1], plain.trace.value[-1], rtol=1e-3)


@pytest.mark.parametrize("norm", ["frobenius", "schatten:6"])
def test_identities_change_nothing(norm):
    matrix = draw(11, 12, 12)
    eye = np.eye(12)
    plain = solver(SMALL, norm, (False, False))(matrix, eye, eye)
    for scale in (1e-20, 3.0, 1e20):
        found = solver(SMALL, norm, (True, True))(matrix, scale * eye, eye)
        np.testing.assert_allclose(
            found.trace.value[-1] / np.sqrt(scale), plain.trace.value[-1], rtol=1e-4
        )
        np.testing.assert_allclose(
            found.spectral_error / np.sqrt(scale), plain.spectral_error, rtol=1e-2
        )


def test_a_mixture_is_fitted_jointly_under_weights():
    matrix, right = draw(12, 12, 12), weight(13)
    found = solver(MIXTURE)(matrix, None, right)
    turned = solver(MIXTURE[::-1])(matrix, None, right)
    half = root(right)

    def error(terms):
        return np.linalg.norm((matrix - dense(terms)) @ half)

    assert error(found.terms) < 0.97 * error(found.frobenius)
    assert error(turned.terms) == pytest.approx(error(found.terms), rel=0.05)
    for one in MIXTURE:  # more terms, less error
        alone = solver(one)(matrix, None, right)
        assert error(found.terms) < error(alone.terms)


def test_the_spectral_norm_takes_weights():
    matrix, left, right = draw(14, 12, 12), weight(15), weight(16)
    found = approximate(matrix, SMALL, left_weight=left, right_weight=right)
    whitened = root(left) @ (matrix - found.matrix()) @ root(right)
    assert found.weighted is not None
    assert found.weighted.spectral == pytest.approx(np.linalg.norm(whitened, 2))
    assert found.weighted.frobenius == pytest.approx(np.linalg.norm(whitened))
    size = np.linalg.norm(root(left) @ matrix @ root(right), 2)
    assert found.weighted_relative.spectral == pytest.approx(
        found.weighted.spectral / size
    )
    plain = approximate(matrix, SMALL)
    assert plain.weighted is None
    unaware = root(left) @ (matrix - plain.matrix()) @ root(right)
    assert found.weighted.spectral < 0.8 * np.linalg.norm(unaware, 2)
    assert found.error.spectral > plain.error.spectral
    assert found.weighted.spectral < found.van_loan.spectral


@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_shares_its_weights_or_has_one_for_each(shared):
    matrices = draw(17, 2, 12, 12)
    rights = np.stack([weight(18), weight(18 if shared else 19)])
    given = rights[0] if shared else rights
    options = {"norm": "frobenius", "num_starts": 1}
    found = approximate(matrices, SMALL, right_weight=given, **options)
    for i in range(2):
        alone = approximate(matrices[i], SMALL, right_weight=rights[i], **options)
        np.testing.assert_allclose(
            found.weighted.frobenius[i], alone.weighted.frobenius, rtol=1e-4
        )


def test_singular_weights_are_made_regular():
    matrix = draw(20, 12, 12)
    right = weight(21, rank=4)
    found = approximate(matrix, SMALL, norm=2, right_weight=right, dtype="float32")
    assert np.isfinite(found.matrix()).all()
    assert found.weighted.frobenius < 0.2 * np.linalg.norm(matrix @ root(right))
    assert found.status == Status.CONVERGED


def test_a_nonfinite_weight_affects_only_its_lane():
    matrices = draw(22, 2, 12, 12)
    rights = np.stack([weight(23), np.full((12, 12), np.nan)])
    found = jax.jit(
        jax.vmap(lambda w, c: solve(w, SMALL, norm=2, right_weight=c, num_starts=1))
    )(matrices, rights)
    assert found.status.tolist()[1] == Status.NONFINITE
    assert np.isnan(found.spectral_error[1]) and np.isfinite(found.spectral_error[0])
    assert np.isfinite(found.terms[0].a[0]).all()
    assert np.isfinite(found.terms[0].a[1]).all()


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("right_weight", np.eye(11), r"must be \[12, 12\].*got shape \(11, 11\)"),
        ("left_weight", np.ones(12), "must be"),
        (
            "right_weight",
            np.triu(np.ones((12, 12))),
            r"not symmetric.*\(C \+ C.T\) / 2",
        ),
        (
            "right_weight",
            np.diag([-1.0] + [1.0] * 11),
            "not positive semidefinite.*from -1",
        ),
        ("left_weight", np.where(np.eye(12), np.nan, 0), r"NaN.*first at \(0, 0\)"),
        ("left_weight", np.zeros((12, 12)), "is zero"),
        ("left_weight", np.eye(12) * 1j, "real numbers"),
        ("left_weight", np.eye(12) * 1e-40, "largest entry of 1e-40.*divide it"),
        ("right_weight", np.eye(12) * 1e39, "largest entry of 1e.39.*divide it"),
    ],
)
def test_bad_weights_are_named(name, bad, message):
    with pytest.raises(ValueError, match=name + ".*" + message):
        approximate(draw(24, 12, 12), SMALL, **{name: bad})


def test_solve_names_a_weight_of_the_wrong_size():
    with pytest.raises(ValueError, match=r"left_weight must be \[12, 12\], float64"):
        solve(jnp.asarray(draw(25, 12, 12)), SMALL, left_weight=jnp.eye(3))


@pytest.mark.parametrize(
    "pair", [((12, 1), (1, 12)), ((3, 4), (3, 4)), ((1, 1), (12, 12))]
)
def test_configurations_that_express_the_same_sums_are_refused(pair):
    configurations = [Configuration(shape, 1) for shape in pair]
    with pytest.raises(ValueError, match="express the same sums.*rank=2"):
        approximate(draw(26, 12, 12), configurations)


def test_trivial_configurations_of_one_column_are_equivalent():
    pair = [Configuration((1, 1), 1), Configuration((12, 1), 1)]
    with pytest.raises(ValueError, match="express the same sums"):
        approximate(draw(26, 12, 1), pair)


@hypothesis.settings(max_examples=10)
@hypothesis.given(seed=st.integers(0, 2**20), shape=st.sampled_from([(3, 4), (12, 1)]))
def test_frames_are_linear_and_agree_with_their_adjoint_and_terms(seed, shape):
    left, right = weight(seed), weight(seed + 1)
    roots = [weighted.Root.of(jnp.asarray(x)) for x in (left, right)]
    configuration = Configuration(shape, 2)
    [frame], [backs] = weighted.frames((12, 12), (configuration,), *roots)
    x, y = (jnp.asarray(draw(seed + i, 12, 12)) for i in (2, 3))
    np.testing.assert_allclose(
        jnp.vdot(frame.forward(x), y), jnp.vdot(x, frame.adjoint(y)), rtol=1e-8
    )
    terms = KroneckerTerms(
        jnp.asarray(draw(seed + 4, 2, *shape)),
        jnp.asarray(draw(seed + 5, 2, *configuration.b_shape((12, 12)))),
    )
    original = frame.to_terms(terms).to_matrix()
    np.testing.assert_allclose(
        weighted.whiten(original, *roots),
        frame.forward(terms.to_matrix()),
        atol=1e-6 * np.abs(original).max(),
    )
    np.testing.assert_allclose(
        weighted.to_start(original, *backs), terms.to_matrix(), atol=1e-4
    )
