import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import kronecker_sum_reference, schatten_reference
from jax.sharding import Mesh, PartitionSpec

from kronjax import solve
from kronjax.kronecker import Configuration, rearrange
from kronjax.solver import continuation
from kronjax.solver.descent import Status
from kronjax.solver.problem import Problem

SMALL = Configuration((3, 4), 2)


@functools.cache
def solver(configuration, norm="spectral", num_starts=4):
    """Solve a batch, compiled once for each problem."""
    return jax.jit(
        jax.vmap(lambda x: solve(x, configuration, norm=norm, num_starts=num_starts))
    )


def draw(seed, count=3, shape=(12, 12)):
    return np.random.default_rng(seed).standard_normal((count, *shape))


def errors(matrices, solution):
    return np.array(
        [
            np.linalg.norm(matrix - kronecker_sum_reference(a, b), 2)
            for matrix, a, b in zip(
                matrices, solution.terms[0].a, solution.terms[0].b, strict=True
            )
        ]
    )


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(1, 9.267008995043), (3, 7.419063837001), (6, 5.953099929932)],
)
def test_regression_values(rank, expected):
    matrix = np.random.default_rng(0).standard_normal((1, 36, 36))
    solution = solver(Configuration((6, 6), rank))(jnp.asarray(matrix))
    assert errors(matrix, solution)[0] <= expected * (1 + 2e-4)
    assert solution.status[0] == Status.CONVERGED
    # From Van Loan's start alone: the very minimum of the published value.
    alone = solver(Configuration((6, 6), rank), num_starts=1)(jnp.asarray(matrix))
    assert errors(matrix, alone)[0] == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize(("schedule", "num_starts"), [("fixed", 1), ("adaptive", 2)])
def test_factors_and_manifold_points_reach_the_same_errors(
    schedule, num_starts, monkeypatch
):
    configuration, matrices = Configuration((3, 4), 5), jnp.asarray(draw(5))
    assert Problem.of((12, 12), configuration).is_factored

    def run(matrix):
        return solve(matrix, configuration, num_starts=num_starts, schedule=schedule)

    found = {}
    for is_factored in (True, False):
        monkeypatch.setattr(Problem, "is_factored", is_factored)
        # Another function each time: what is patched is no argument.
        solution = jax.jit(jax.vmap(lambda x: run(x)))(matrices)
        assert (solution.status == Status.CONVERGED).all()
        found[is_factored] = errors(matrices, solution)
        np.testing.assert_allclose(
            solution.spectral_error, found[is_factored], rtol=1e-5
        )
    # Two starts may end in two minima.
    close = 5e-4 if num_starts == 1 else 3e-2
    np.testing.assert_allclose(found[True], found[False], rtol=close)


@pytest.mark.parametrize(
    ("seed", "close"),
    [(1, 1e-3), (6, 3e-2)],  # the latter ends in two minima
)
def test_factors_of_several_configurations_under_a_weight(seed, close, monkeypatch):
    configurations = Configuration((3, 4), 4), Configuration((12, 1), 2)
    matrix, roots = draw(seed, 2)
    weight = jnp.asarray(roots @ roots.T)
    assert Problem.of((12, 12), configurations).is_factored
    values = {}
    for is_factored in (True, False):
        monkeypatch.setattr(Problem, "is_factored", is_factored)
        found = jax.jit(
            lambda x, weight: solve(
                x, configurations, norm="schatten:6", right_weight=weight, num_starts=1
            )
        )(jnp.asarray(matrix), weight)
        error = matrix - sum(
            kronecker_sum_reference(one.a, one.b) for one in found.terms
        )
        values[is_factored] = schatten_reference(error @ roots, 6)
        assert found.trace.value[-1] == pytest.approx(values[is_factored], rel=1e-4)
    assert values[True] == pytest.approx(values[False], rel=close)


@pytest.mark.parametrize("rank", [1, 4])
def test_a_single_exponent_with_several_starts_stays_finite(rank):
    # The best start repeats its own path, so no line search leads beyond it.
    matrix = jnp.asarray(draw(0, 1, (4, 6))[0])
    found = solve(matrix, Configuration((2, 3), rank), num_starts=2, schedule=[4])
    assert jnp.isfinite(found.spectral_error)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found.terms))


def test_van_loans_critical_point_is_left():
    corner, rest = np.zeros((6, 6)), np.eye(6)
    corner[0, 0], rest[0, 0] = 1, 0
    matrix = np.kron(corner, corner) + 1.05 / 5 * np.kron(rest, rest)
    target = jnp.asarray(matrix)[None]
    solution = solver(Configuration((6, 6), 1))(target)
    assert solution.trace.spectral_error[0, 0] == pytest.approx(1, abs=1e-9)
    assert errors(target, solution)[0] <= 0.1736
    alone = solver(Configuration((6, 6), 1), num_starts=1)(target)
    assert errors(target, alone)[0] == pytest.approx(1, abs=1e-6)


def test_the_diagonal_example_reaches_one_half():
    matrix = jnp.diag(jnp.array([1.0, 0.0, 0.0, 1.0]))
    solution = jax.jit(lambda x: solve(x, Configuration((2, 2), 1)))(matrix)
    assert float(solution.spectral_error) == pytest.approx(0.5, rel=1e-3)


def test_an_exact_sum_of_the_requested_rank_is_found():
    rng = np.random.default_rng(1)
    matrices = np.stack(
        [
            kronecker_sum_reference(
                rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 4, 3))
            )
            for _ in range(3)
        ]
    )
    solution = solver(SMALL)(jnp.asarray(matrices))
    assert errors(matrices, solution).max() < 1e-12
    assert (solution.status == Status.CONVERGED).all()
    # Only the perturbed starts spend products.
    assert solution.trace.products[:, 4:].sum(1).max() <= 7 + 9 + 11 + 13


def test_columns_times_rows_give_eckart_young_mirsky():
    matrices = draw(2)
    solution = solver(Configuration((12, 1), 3))(jnp.asarray(matrices))
    expected = np.linalg.svd(matrices, compute_uv=False)[:, 3]
    np.testing.assert_allclose(errors(matrices, solution), expected, rtol=3e-4)


def test_a_rank_above_the_maximum_is_exact():
    matrices = draw(3)
    solution = solver(Configuration((3, 4), 99))(jnp.asarray(matrices))
    assert solution.terms[0].a.shape == (3, 12, 3, 4)
    assert errors(matrices, solution).max() < 1e-12


def test_the_minimum_is_invariant():
    matrix = draw(4, 1)[0]
    rng = np.random.default_rng(5)

    def orthogonal(n):
        return np.linalg.qr(rng.standard_normal((n, n)))[0]

    turned = np.kron(orthogonal(3), orthogonal(4)) @ matrix
    turned = turned @ np.kron(orthogonal(4), orthogonal(3)).T
    batch = np.stack([matrix, turned, -3e5 * matrix])
    got = errors(batch, solver(SMALL)(jnp.asarray(batch)))
    assert got[1] == pytest.approx(got[0], rel=1e-3)
    assert got[2] == pytest.approx(3e5 * got[0], rel=1e-3)
    transposed = solver(Configuration((4, 3), 2))(jnp.asarray(batch.swapaxes(1, 2)))
    np.testing.assert_allclose(
        errors(batch.swapaxes(1, 2), transposed)[0], got[0], rtol=1e-3
    )


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_float32_works_at_every_scale(scale):
    matrices = draw(6)
    reference = solver(SMALL)(jnp.asarray(matrices))
    solution = solver(SMALL)(jnp.asarray(matrices * scale, jnp.float32))
    assert solution.terms[0].a.dtype == solution.spectral_error.dtype == jnp.float32
    got = errors(matrices * scale, solution) / scale
    np.testing.assert_allclose(got, errors(matrices, reference), rtol=2e-3)


def test_bad_lanes_do_not_disturb_good_ones():
    matrices = draw(7, 4)
    good = solver(SMALL)(jnp.asarray(matrices))
    matrices[1, 3, 3], matrices[2] = np.nan, 0
    mixed = solver(SMALL)(jnp.asarray(matrices))
    assert mixed.status.tolist() == [
        Status.CONVERGED,
        Status.NONFINITE,
        Status.CONVERGED,
        Status.CONVERGED,
    ]
    assert np.isnan(mixed.spectral_error[1])
    assert (mixed.terms[0].a[1:3] == 0).all()
    assert mixed.spectral_error[2] == 0
    for lane in (0, 3):
        np.testing.assert_allclose(
            mixed.spectral_error[lane], good.spectral_error[lane], rtol=1e-9
        )


def test_never_worse_than_van_loan_and_the_reported_error_is_true():
    matrices = draw(8, 8)
    solution = solver(SMALL)(jnp.asarray(matrices))
    got = errors(matrices, solution)
    for matrix, error, a, b in zip(
        matrices, got, solution.frobenius[0].a, solution.frobenius[0].b, strict=True
    ):
        van_loan = matrix - kronecker_sum_reference(a, b)
        assert error <= np.linalg.norm(van_loan, 2)
        s = np.linalg.svd(rearrange(matrix, (3, 4)), compute_uv=False)
        assert np.linalg.norm(van_loan) == pytest.approx(np.sqrt((s[2:] ** 2).sum()))
    assert (solution.spectral_error <= got).all()
    np.testing.assert_allclose(solution.spectral_error, got, rtol=1e-5)


def test_the_trace_records_values_steps_and_products():
    matrices = draw(9)
    solve_fixed = jax.vmap(lambda x: solve(x, SMALL, schedule="fixed"))
    trace = jax.jit(solve_fixed)(jnp.asarray(matrices)).trace
    expected = [2, 4, 6, 18, 66, 258, 1026, 4098]
    np.testing.assert_array_equal(trace.p, np.broadcast_to(expected, (3, 8)))
    assert (np.diff(trace.value, axis=1) <= 1e-9).all()
    assert (trace.spectral_error <= trace.value).all()
    # A stage with s steps spends at least s + 1 evaluations.
    products = np.array([2, 2, 3, 5, 7, 9, 11, 13])
    least = (np.asarray(trace.steps) + 1) * products
    assert (trace.products[:, 1:] >= least[:, 1:]).all()
    assert (trace.products[:, 0] == 0).all()


def test_each_matrix_stops_at_its_own_exponent():
    matrices = np.concatenate([draw(11, 6), np.zeros((1, 12, 12))])
    loose, tight = (
        jax.jit(jax.vmap(lambda x, t=t: solve(x, SMALL, tolerance=t)))(
            jnp.asarray(matrices)
        )
        for t in (4e-3, 2e-4)
    )
    ends = np.asarray(loose.trace.p[:, -1])
    assert (ends < np.asarray(tight.trace.p[:, -1]))[:6].all()
    assert ends[6] < ends[:6].min()  # exact from the start
    spent = np.asarray(loose.trace.products.sum(1) / tight.trace.products.sum(1))
    assert spent[:6].max() < 0.7
    # Stages after the end cost nothing and repeat its values.
    idle = np.asarray(loose.trace.p[:, 1:] == loose.trace.p[:, :-1])
    assert (np.asarray(loose.trace.products)[:, 1:][idle] == 0).all()
    assert (errors(matrices, loose) <= errors(matrices, tight) * 1.01).all()
    # Alone it ends at the same place as in the batch.
    alone = jax.jit(lambda x: solve(x, SMALL, tolerance=4e-3))(jnp.asarray(matrices[1]))
    assert alone.trace.p[-1] == ends[1]
    np.testing.assert_allclose(alone.spectral_error, loose.spectral_error[1], rtol=1e-8)


@pytest.mark.parametrize(
    ("norm", "p", "ps"),
    [
        ("schatten:4", 4, [2, 4, 4]),
        ("schatten:10", 10, [2, 4, 6, 10]),
        ("frobenius", 2, [2]),
        (2, 2, [2]),
    ],
)
def test_other_norms(norm, p, ps):
    # Heavy tails: the starts end at different minima, and the best must come out.
    matrices = np.random.default_rng(10).standard_t(2, (8, 12, 12))
    solution = solver(SMALL, norm=norm)(jnp.asarray(matrices))
    np.testing.assert_array_equal(solution.trace.p[0], ps)
    alone = solver(SMALL, norm=norm, num_starts=1)(jnp.asarray(matrices))

    def value(solution, i):
        terms = solution.terms[0]
        approximation = kronecker_sum_reference(terms.a[i], terms.b[i])
        return schatten_reference(matrices[i] - approximation, p)

    for i in range(8):
        assert value(solution, i) == pytest.approx(
            float(solution.trace.value[i, -1]), rel=1e-6
        )
        assert value(solution, i) <= value(alone, i) * (1 + 1e-4)
    assert (solution.status == Status.CONVERGED).all()


def test_terms_are_sorted_orthogonal_and_balanced():
    terms = solver(SMALL)(jnp.asarray(draw(11))).terms[0]
    for a, b in zip(terms.a, terms.b, strict=True):
        a, b = a.reshape(2, -1), b.reshape(2, -1)
        s = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        assert s[0] >= s[1]
        np.testing.assert_allclose(a @ a.T, np.diag(s), atol=1e-10)
        np.testing.assert_allclose(b @ b.T, np.diag(s), atol=1e-10)


def test_one_compilation_serves_every_matrix_and_every_p(monkeypatch):
    traces = []
    original = continuation.schatten.value_and_gradient

    def counted(matrix, squarings):
        traces.append(squarings)
        return original(matrix, squarings)

    monkeypatch.setattr(continuation.schatten, "value_and_gradient", counted)
    run = jax.jit(
        lambda x, key, tolerance: solve(x, SMALL, key=key, tolerance=tolerance)
    )
    run(jnp.asarray(draw(12)[0]), jax.random.key(0), 1e-3)
    first = len(traces)
    assert first <= 4  # restart and step, not once for each stage
    run(jnp.asarray(draw(13)[0]), jax.random.key(1), 1e-4)
    assert len(traces) == first


def test_the_key_reaches_the_perturbed_starts():
    run = jax.jit(lambda x, key: solve(x, SMALL, key=key))
    matrix = jnp.asarray(draw(14)[0])
    one, same, other = (run(matrix, jax.random.key(seed)).trace for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.products, same.products)
    assert (one.products != other.products).any()


def test_vmap_scan_and_shard_map_agree():
    matrices = jnp.asarray(draw(15, 2))
    expected = solver(SMALL, num_starts=1)(matrices).spectral_error

    def one(x):
        return solve(x, SMALL, num_starts=1).spectral_error

    scanned = jax.jit(lambda xs: jax.lax.map(one, xs))(matrices)
    np.testing.assert_allclose(scanned, expected, rtol=2e-4)
    mesh = Mesh(np.array(jax.devices()[:1]), ("batch",))
    spec = PartitionSpec("batch")
    sharded = jax.jit(
        jax.shard_map(
            jax.vmap(one), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
    )(matrices)
    # Rounding differs between programs, and grows along the path.
    np.testing.assert_allclose(sharded, expected, rtol=1e-6)


def test_a_tuple_of_configurations_is_fitted_jointly():
    pair = (Configuration((3, 4), 1), Configuration((12, 1), 1))
    matrices = draw(16)
    solution = solver(pair)(jnp.asarray(matrices))
    assert [terms.rank for terms in solution.terms] == [1, 1]
    rest = matrices - sum(np.asarray(terms.to_matrix()) for terms in solution.terms)
    got = np.linalg.norm(rest, 2, axis=(1, 2))
    np.testing.assert_allclose(solution.spectral_error, got, rtol=1e-5)
    alone = errors(matrices, solver(Configuration((3, 4), 1))(jnp.asarray(matrices)))
    assert (got < alone).all()


def test_a_tuple_is_fitted_jointly_in_the_frobenius_norm_too():
    pair = (Configuration((3, 4), 1), Configuration((12, 1), 1))
    matrices = np.random.default_rng(16).standard_t(2, (8, 12, 12))
    solution = solver(pair, norm="frobenius")(jnp.asarray(matrices))
    rest = matrices - sum(np.asarray(terms.to_matrix()) for terms in solution.terms)
    got = np.linalg.norm(rest, axis=(1, 2))
    np.testing.assert_allclose(got, solution.trace.value[:, -1], rtol=1e-6)
    greedy = matrices - sum(np.asarray(t.to_matrix()) for t in solution.frobenius)
    assert (got < np.linalg.norm(greedy, axis=(1, 2))).all()


def equations(jaxpr):
    """Yield all equations of a jaxpr, including those of loops and branches."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_every_product_asks_for_full_precision():
    jaxpr = jax.make_jaxpr(lambda x: solve(x, SMALL))(jnp.zeros((12, 12))).jaxpr
    found = [
        eqn.params["precision"]
        for eqn in equations(jaxpr)
        if eqn.primitive.name == "dot_general"
    ]
    assert len(found) > 50
    assert {str(p) for pair in found for p in pair or [None]} == {"HIGHEST"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(matrix=np.zeros((2, 12, 12))), "solve takes one matrix.*jax.vmap"),
        (dict(matrix=np.zeros((0, 12))), "solve takes one matrix"),
        (dict(matrix=np.zeros((12, 12), np.int64)), "float32 or float64; got int64"),
        (dict(configuration=Configuration((5, 4), 1)), "5 is not a divisor"),
        (dict(norm="nuclear"), 'norm must be "spectral"'),
        (dict(norm="schatten:5"), "p = 2, 4, 6"),
        (dict(norm=7), "p = 2, 4, 6"),
        (dict(num_starts=0), "starts must be at least 1"),
        (dict(max_products=0), "max_products must be at least 1"),
        (dict(configuration=()), "at least one Configuration"),
        (dict(configuration=((3, 4), 2)), r"got \(3, 4\)"),
        (dict(norm="-inf"), "p = 2, 4, 6"),
        (dict(norm="schatten:spectral"), 'norm must be "spectral"'),
    ],
)
def test_mistakes_are_named(arguments, message):
    arguments = {"matrix": np.zeros((12, 12)), "configuration": SMALL} | arguments
    matrix = jnp.asarray(arguments.pop("matrix"))
    with pytest.raises(ValueError, match=message):
        solve(matrix, arguments.pop("configuration"), **arguments)
