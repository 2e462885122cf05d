"""Tests of lower bounds against sums and changes that could violate them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import total, van_loan
from hypothesis import given, settings
from hypothesis import strategies as st

import kronjax
from kronjax import Configuration
from kronjax.io import exported
from kronjax.kronecker import KroneckerTerms, rearrange, unrearrange
from kronjax.proof import bounds, certificate, multipliers
from kronjax.proof.tangent_map import TangentMap
from kronjax.solver.weighted import Root

CASES = [(((2, 3), (3, 2)), 1), (((3, 2), (2, 4)), 2)]
certify = jax.jit(bounds.certify)


def draw(rng, shapes, rank, dtype=np.float64):
    a, b = shapes
    return KroneckerTerms(
        jnp.asarray(rng.normal(size=(rank, *a)), dtype),
        jnp.asarray(rng.normal(size=(rank, *b)), dtype),
    )


def weight(rng, n):
    x = rng.normal(size=(n, 2 * n))
    return jnp.asarray(x @ x.T)


def reached(matrix, terms, rng, roots=(None, None), size=1.0):
    """Return the least norm after random changes of one side of all terms."""
    left, right = roots
    best = np.inf
    for side in ("a", "b") * 10:
        move = {side: size * rng.normal(size=getattr(terms, side).shape)}
        a, b = terms.a + move.get("a", 0), terms.b + move.get("b", 0)
        rest = np.asarray(matrix - KroneckerTerms(a, b).to_matrix())
        rest = rest if left is None else left.T @ rest
        rest = rest if right is None else rest @ right
        best = min(best, np.linalg.norm(rest, 2))
    return best


def least_squares_of_a(matrix, terms, power):
    """Return the slope of a Schatten norm with respect to all of A."""
    rest = np.asarray(matrix - terms.to_matrix())
    u, s, vt = np.linalg.svd(rest)
    k = len(s)
    dual = (u[:, :k] * (s / s[0]) ** (power - 1)) @ vt[:k]
    ambient = np.asarray(rearrange(jnp.asarray(dual), terms.a.shape[1:]))
    slope = (ambient @ np.asarray(terms.b).reshape(len(terms.b), -1).T).T
    return slope.reshape(terms.a.shape)


def least_along_slope(matrix, terms, power, lengths):
    """Return the least norm after gradient steps on all of A of the given lengths."""
    slope = least_squares_of_a(matrix, terms, power)
    slope /= np.linalg.norm(slope)
    moved = (KroneckerTerms(terms.a + x * slope, terms.b) for x in lengths)
    return min(np.linalg.norm(np.asarray(matrix - x.to_matrix()), 2) for x in moved)


@settings(max_examples=30)
@given(
    case=st.sampled_from(CASES),
    seed=st.integers(0, 999),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_bounds_hold_for_arbitrary_sums(case, seed, scale):
    (layout, rank), rng = case, np.random.default_rng(seed)
    matrix = jnp.asarray(
        rng.normal(size=tuple(np.multiply(*map(np.array, layout)))) * scale
    )
    terms = draw(rng, layout, rank)
    terms = KroneckerTerms(terms.a * scale, terms.b)
    found = certify(matrix, (terms,))
    error = np.linalg.norm(np.asarray(matrix - terms.to_matrix()) / scale, 2)
    np.testing.assert_allclose(found.error / scale, error, rtol=1e-12)
    assert 0 <= found.local_bound <= found.error
    # Descent on A alone, by steps of all lengths, stays above the local bound.
    unit = KroneckerTerms(terms.a / scale, terms.b)
    norm = least_along_slope(matrix / scale, unit, 8, np.geomspace(1e-3, 10, 20))
    assert norm >= found.local_bound / scale * (1 - 1e-12)
    # And no sum of this rank stays below the global one.
    for _ in range(10):
        other = draw(rng, layout, rank)
        norm = np.linalg.norm(np.asarray(matrix / scale - other.to_matrix()), 2)
        assert norm >= found.global_bound / scale
    best = kronjax.approximate(
        np.asarray(matrix), Configuration(layout[0], rank), num_starts=1, progress=False
    )
    assert best.error.spectral >= found.global_bound * (1 - 1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_solutions_have_small_gaps_and_a_finish_closes_them(dtype):
    matrix = np.random.default_rng(0).normal(size=(12, 12)).astype(dtype)
    finish = dtype == np.float64
    found = kronjax.approximate(
        matrix, Configuration((3, 4), 2), num_starts=1, finish=finish, progress=False
    )
    proven = kronjax.certify(found, matrix)
    assert proven.error == pytest.approx(found.error.spectral, rel=1e-12)
    if finish:
        assert -1e-12 <= proven.local_gap < 1e-10 and proven.kkt_residual < 1e-11
        assert proven.second_order == "strict local minimum"
    else:
        assert 0 < proven.local_gap < 5e-3
        assert np.isnan(proven.kkt_residual) and proven.second_order == ""
    assert 0.5 * proven.error < proven.global_bound < proven.error
    # In float32 the bounds are as valid, and wider.
    single = certify(
        jnp.asarray(matrix, jnp.float32),
        jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), found.terms),
    )
    assert single.local_bound.dtype == np.float32
    local, bound = float(single.local_bound), float(single.global_bound)
    assert 0.99 * proven.local_bound < local <= proven.local_bound + 1e-5 * proven.error
    # The climb of the global bound takes another path in float32.
    assert 0.5 * proven.error < bound < proven.error


def test_exact_cases():
    half = jnp.eye(2)[None] / 2**0.5
    found = certify(jnp.diag(jnp.array([1.0, 0, 0, 1])), (KroneckerTerms(half, half),))
    np.testing.assert_allclose(jax.tree.leaves(found), 0.5, rtol=1e-12)
    # Low rank (Eckart, Young and Mirsky): the least that rank 2 leaves is s_3.
    matrix = np.random.default_rng(1).normal(size=(6, 8))
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    terms = KroneckerTerms(
        jnp.asarray((u * s)[:, :2].T[:, :, None]), jnp.asarray(vt[:2, None])
    )
    found = certify(jnp.asarray(matrix), (terms,))
    np.testing.assert_allclose(found.error, s[2], rtol=1e-12)
    np.testing.assert_allclose(found.local_bound, s[2], rtol=1e-10)
    # Nothing is left: both bounds are at rounding level, and none is above the error.
    whole = draw(np.random.default_rng(2), ((2, 3), (3, 2)), 2)
    found = certify(whole.to_matrix(), (whole,))
    assert found.error < 1e-13 and found.global_bound <= found.error


@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)])
def test_weights_and_their_norms(sides):
    rng = np.random.default_rng(3)
    matrix = jnp.asarray(rng.normal(size=(6, 6)))
    left, right = (weight(rng, 6) if side else None for side in sides)
    roots = [None if x is None else Root.of(x) for x in (left, right)]
    roots = [None if x is None else np.asarray(x.factor * x.scale) for x in roots]
    found = kronjax.approximate(
        np.asarray(matrix), Configuration((2, 3), 2), num_starts=1, progress=False,
        left_weight=left, right_weight=right,
    )  # fmt: skip
    proven = kronjax.certify(found, np.asarray(matrix), left, right)
    assert proven.error == pytest.approx(found.weighted.spectral, rel=1e-4)
    assert 0 <= proven.local_gap < 1e-2
    assert 0 < proven.global_bound < proven.error
    (terms,) = found.terms
    for size in (1e-3, 1e-1, 1):
        assert reached(matrix, terms, rng, roots, size) >= proven.local_bound
    for _ in range(20):
        other = draw(rng, ((2, 3), (3, 2)), 2)
        assert reached(matrix, other, rng, roots, 0.3) >= proven.global_bound


def test_several_configurations_have_a_local_bound_alone():
    rng = np.random.default_rng(4)
    matrix = rng.normal(size=(12, 12))
    wanted = [Configuration((3, 4), 1), Configuration((12, 1), 1)]
    found = kronjax.approximate(
        matrix, wanted, num_starts=1, finish=True, progress=False
    )
    proven = kronjax.certify(found, matrix)
    assert proven.global_bound == 0
    assert proven.local_gap < 1e-8
    # The two tangent spaces share directions, along which nothing changes.
    assert proven.second_order == "not proven"


def test_the_tangent_map_and_its_adjoint_agree_and_the_normal_part_is_normal():
    rng = np.random.default_rng(5)
    terms = draw(rng, ((2, 3), (3, 2)), 2), draw(rng, ((6, 1), (1, 6)), 1)
    roots = Root.of(weight(rng, 6)), Root.of(weight(rng, 6))
    for given_roots in ((None, None), roots):
        space = TangentMap.of((6, 6), terms, *given_roots)
        y = jnp.asarray(rng.normal(size=(6, 6)))
        xi = space.pull(jnp.asarray(rng.normal(size=(6, 6))))
        both = zip(space.pull(y), xi, strict=True)
        inner = sum(
            jnp.sum(p * q)
            for x, z in both
            for p, q in zip(jax.tree.leaves(x), jax.tree.leaves(z), strict=True)
        )
        np.testing.assert_allclose(jnp.sum(space.push(xi) * y), inner, rtol=1e-10)
        rest = space.normal_part(y)
        assert space.length(space.pull(rest)) < 1e-12
        # A change of one factor of one term is tangent.
        one = terms[0]
        moved = KroneckerTerms(one.a, jnp.asarray(rng.normal(size=one.b.shape)))
        change = moved.to_matrix()
        if given_roots[0] is not None:
            change = roots[0].factor.T @ change @ roots[1].factor
        assert abs(jnp.sum(change * rest)) < 1e-11 * jnp.linalg.norm(change)


def test_rank_deficient_sums_are_certified():
    rng = np.random.default_rng(6)
    matrix = jnp.asarray(rng.normal(size=(6, 6)))
    terms = draw(rng, ((2, 3), (3, 2)), 2)
    zero = KroneckerTerms(terms.a.at[1].set(0), terms.b)
    twice = KroneckerTerms(terms.a.at[1].set(terms.a[0]), terms.b)
    nothing = jax.tree.map(jnp.zeros_like, terms)
    for one in (zero, twice, nothing):
        found = certify(matrix, (one,))
        assert 0 <= found.local_bound <= found.error
        assert 0 <= found.global_bound <= found.error
        norm = reached(matrix, one, rng, size=0.3)
        assert norm >= found.local_bound
    lost = certify(matrix.at[0, 0].set(jnp.nan), (terms,))
    assert all(np.isnan(jax.tree.leaves(lost)))
    empty = certify(jnp.zeros((6, 6)), (nothing,))
    assert jax.tree.leaves(empty) == [0, 0, 0]


def test_a_batch_agrees_with_its_matrices_alone():
    rng = np.random.default_rng(7)
    matrices = jnp.asarray(rng.normal(size=(3, 6, 6)))
    terms = jax.tree.map(
        lambda *x: jnp.stack(x), *(draw(rng, ((2, 3), (3, 2)), 2) for _ in range(3))
    )
    both = jax.jit(jax.vmap(lambda x, y: bounds.certify(x, (y,))))(matrices, terms)
    for i, matrix in enumerate(matrices):
        one = certify(matrix, (jax.tree.map(lambda x, i=i: x[i], terms),))
        np.testing.assert_allclose(both.error[i], one.error, rtol=1e-12)
        np.testing.assert_allclose(both.local_bound[i], one.local_bound, rtol=1e-9)
        # Where the climb of the global bound ends depends on the last digits, by 2 %:
        # it is above where it begins, and below a sum of that rank.
        s = np.linalg.svd(np.asarray(rearrange(matrix, (2, 3))), compute_uv=False)
        begun = np.linalg.norm(s[2:]) / 6**0.5
        near = np.asarray(matrix) - total([van_loan(np.asarray(matrix), (2, 3), 2)])
        for bound in (both.global_bound[i], one.global_bound):
            assert 1.1 * begun < bound < np.linalg.norm(near, 2)
    host = certificate.certificate_of(np.asarray(matrices), (terms,))
    assert host.local_gap.shape == (3,)
    np.testing.assert_allclose(host.error, both.error, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [256, 512])
@pytest.mark.parametrize("flat", [False, True])
def test_large_matrices_are_proven_by_eigenvectors(monkeypatch, dtype, rows, flat):
    rng = np.random.default_rng(0)
    terms = draw(rng, ((rows // 16, 16), (16, 16)), 2, dtype)
    rest = rng.normal(size=(rows, 256))
    if flat:  # as solving leaves it
        u, s, vt = np.linalg.svd(rest, full_matrices=False)
        rest = (u * np.minimum(s, s[100])) @ vt
    matrix = jnp.asarray(rest, dtype) + terms.to_matrix()
    called, decompose = [], bounds.spectral.triplets_by_gram

    def spy(matrix):
        called.append(matrix.shape)
        return decompose(matrix)

    program = jax.jit(lambda rounds: bounds.certify_stage(matrix, (terms,), 18, rounds))
    monkeypatch.setattr(bounds.spectral, "triplets_by_gram", spy)
    balanced = program(multipliers.BALANCED)
    # Balancing is stable near a solution only. Elsewhere its conjugate gradients
    # amplify the last digits: in float32, with 256 rows, the bounds are from 16.7 to
    # 17.8 for matrices that differ by one rounding, where the gradient proves 21.9.
    rounds = multipliers.BALANCED if flat else 0
    by_eigenvectors = program(rounds)
    assert called[0] == (rows, 256)
    monkeypatch.setattr(bounds.spectral, "triplets_by_gram", decompose)
    monkeypatch.setattr(bounds.spectral, "LARGE", 257)
    # Another function: what is patched is no argument.
    by_values = jax.jit(lambda x: bounds.certify_stage(matrix, (terms,), 18, x))(rounds)
    matrix, terms = jax.tree.map(lambda x: np.asarray(x, np.float64), (matrix, terms))
    error = np.linalg.norm(matrix - np.asarray(terms.to_matrix()), 2)
    # The rounding of E is relative to the norms of all that it is made of.
    sizes = [matrix, *(np.kron(*x) for x in zip(terms.a, terms.b, strict=True))]
    rounding = float(jnp.finfo(dtype).eps) * sum(map(np.linalg.norm, sizes)) / error
    for found in (balanced, by_eigenvectors, by_values):
        assert error <= float(found.error) <= error * (1 + 30 * rounding)
    # What both ways share but for rounding, and the share of it that is proven.
    proven = float(by_eigenvectors.local_bound)
    assert proven == pytest.approx(float(by_values.local_bound), rel=30 * rounding)
    assert proven > (0.99 if flat else 0.65) * error
    # No change of all A_k reaches less, in float64, than any of them proves.
    reachable = least_along_slope(matrix, terms, 18, np.geomspace(1e-3, 1, 10))
    assert reachable < 0.99 * error or flat
    assert 0 < max(proven, float(balanced.local_bound)) <= min(error, reachable)


def test_proofs_are_computed_on_the_cpu(monkeypatch):
    jitted, asked = exported.compiled, []

    def on_what(function, platform, options, shapes):
        def run(*arguments):
            asked.extend([platform, jax.config.jax_default_device.platform])
            return jitted(function, platform, options, shapes)(*arguments)

        return run

    monkeypatch.setattr(exported, "compiled", on_what)
    half = np.eye(2)[None] / 2**0.5
    certificate.certificate_of(np.eye(4), (KroneckerTerms(half, half),))
    assert asked == ["cpu", "cpu"]


def test_proofs_work_without_a_cpu_backend(monkeypatch):
    def missing(**_):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(certificate.jax, "local_devices", missing)
    half = np.eye(2)[None] / 2**0.5
    assert (
        certificate.certificate_of(np.eye(4), (KroneckerTerms(half, half),)).error < 4
    )


def test_a_finish_in_another_norm_or_precision_is_refused():
    matrix = np.eye(6)
    wanted = Configuration((2, 3), 1)
    with pytest.raises(ValueError, match="finish is for"):
        kronjax.approximate(matrix, wanted, norm="frobenius", finish=True)
    with pytest.raises(ValueError, match='dtype="float64"'):
        kronjax.approximate(matrix, wanted, dtype="float32", finish=True)


def test_normal_parts_are_orthogonal_to_both_factors():
    rng = np.random.default_rng(8)
    terms = draw(rng, ((2, 3), (3, 2)), 2)
    rest = TangentMap.of((6, 6), (terms,)).normal_part(
        jnp.asarray(rng.normal(size=(6, 6)))
    )
    ambient = rearrange(rest, (2, 3))
    assert jnp.abs(terms.a.reshape(2, -1) @ ambient).max() < 1e-13
    assert jnp.abs(ambient @ terms.b.reshape(2, -1).T).max() < 1e-13
    np.testing.assert_allclose(unrearrange(ambient, (2, 3), (3, 2)), rest)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_stage_bound_holds_for_changes_of_one_side(dtype):
    rng = np.random.default_rng(3)
    matrix = jnp.asarray(rng.normal(size=(12, 18)), dtype)
    one = Configuration((3, 6), 2)
    # A loose solution, from which a change of A alone still lowers the norm.
    options = {"norm": "schatten:10", "num_starts": 1, "tolerance": 1.0}
    found = kronjax.approximate(np.asarray(matrix), one, progress=False, **options)
    (terms,) = jax.tree.map(jnp.asarray, found.terms)
    certified = jax.jit(bounds.certify_stage)(matrix, (terms,), 10.0)
    certified = jax.tree.map(float, certified)
    error = float(found.error.spectral)
    assert error <= certified.error <= error * (1 + 1e-4)
    assert certified.global_bound == 0
    matrix, terms = jax.tree.map(lambda x: np.asarray(x, np.float64), (matrix, terms))
    reachable = min(
        reached(matrix, terms, rng, size=1e-2),
        least_along_slope(matrix, terms, 66, np.geomspace(1e-3, 1, 20)),
    )
    assert 0.5 * error < certified.local_bound <= reachable < 0.99 * error


def test_balancing_a_gradient_narrows_the_gap():
    rng = np.random.default_rng(4)
    matrix = rng.normal(size=(24, 24))
    found = kronjax.approximate(
        matrix, Configuration((4, 6), 6), num_starts=1, tolerance=1e-2, progress=False
    )
    last = float(found.trace.p[-1])
    program = jax.jit(bounds.certify_stage)

    def gap(rounds):
        bounds = program(jnp.asarray(matrix), found.terms, last, rounds)
        return 1 - float(bounds.local_bound / bounds.error)

    balanced = gap(multipliers.BALANCED)
    assert balanced < 2e-2 and 2 * balanced < gap(0)
    assert balanced < gap(multipliers.BALANCED // 2) < gap(0)


def test_multipliers_narrow_the_gap_of_the_gradient(monkeypatch):
    rng = np.random.default_rng(4)
    matrix = rng.normal(size=(24, 24))
    found = kronjax.approximate(
        matrix, Configuration((4, 6), 6), num_starts=1, tolerance=1e-2, progress=False
    )

    def gap():
        # Another function each time: what is patched is no argument.
        program = jax.jit(lambda *x: bounds.certify(*x))
        proven = program(jnp.asarray(matrix), found.terms)
        return 1 - float(proven.local_bound / proven.error)

    thorough = gap()
    # As for large matrices: in float32, and with two penalties.
    monkeypatch.setattr(multipliers, "FINE", 8)
    assert gap() < 1.4 * thorough
    monkeypatch.setattr(multipliers, "ROUNDS", 0)
    assert thorough < 2e-2 and 2 * thorough < gap()


def test_the_stage_bound_of_nonfinite_matrices_is_nan():
    terms = (KroneckerTerms(jnp.ones((1, 2, 2)), jnp.ones((1, 2, 2))),)
    found = bounds.certify_stage(jnp.eye(4).at[0, 0].set(jnp.nan), terms, 18.0)
    assert np.isnan([found.error, found.local_bound]).all()
    # The exponent may have another dtype.
    short = jax.tree.map(jnp.float32, (2 * jnp.eye(4), terms))
    found = bounds.certify_stage(*short, jnp.float64(18))
    assert found.local_bound.dtype == jnp.float32
    assert 0 <= found.local_bound <= found.error
    exact = bounds.certify_stage(jnp.ones((4, 4)), terms, 18.0)
    assert exact.local_bound <= exact.error < 1e-12
