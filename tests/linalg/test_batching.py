import itertools

import jax
import jax.numpy as jnp
import pytest

from kronjax.kronecker import Configuration
from kronjax.linalg.batching import after, any_lane, in_turn, pick
from kronjax.proof import bounds
from kronjax.solver import continuation
from kronjax.solver.problem import Problem

LAPACK = {"cholesky", "eigh", "geqrf", "householder_product", "lu", "qr", "svd"}


def decomposes(equation):
    """Return whether an equation of a jaxpr, or its callees, decomposes a matrix."""
    called = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns"))
    inner = [getattr(x, "jaxpr", x) for x in called]
    return equation.primitive.name in LAPACK or any(
        decomposes(one) for x in inner if hasattr(x, "eqns") for one in x.eqns
    )


def side_by_side(function, *arguments):
    """Return the pairs of decompositions without a dependency between them."""
    made_by, before = {}, []
    traced = jax.make_jaxpr(function)(*arguments).jaxpr

    def wanted(variables):
        known = {made_by[v] for v in map(id, variables) if v in made_by}
        return known.union(*(before[j] for j in known))

    for i, equation in enumerate(traced.eqns):
        before.append(wanted(equation.invars))
        made_by |= {id(v): i for v in equation.outvars}
    # Unused results are not computed.
    found = [i for i in sorted(wanted(traced.outvars)) if decomposes(traced.eqns[i])]
    assert len(found) > 1
    return [(i, j) for i, j in itertools.combinations(found, 2) if i not in before[j]]


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("num_starts", [1, 2])
def test_decompositions_are_sequenced(rank, num_starts):
    configurations = Configuration((3, 4), rank), Configuration((12, 1), rank)
    problem = Problem.of((12, 12), configurations, num_starts=num_starts)
    assert problem.is_factored == (rank == 4)
    matrix = jnp.ones((12, 12))

    def begin(matrix):
        return continuation.start(problem, matrix)

    def end(*given):
        return continuation.finish(problem, *given)

    def prove(*given):
        terms = end(*given).terms
        return terms, bounds.certify_stage(matrix, terms, 18.0)

    assert not side_by_side(begin, matrix)
    given = jax.eval_shape(begin, matrix)
    assert not side_by_side(end, *given)
    assert not side_by_side(prove, *given)


def test_any_lane_returns_the_flag_without_a_batch():
    assert not any_lane(jnp.array(False))
    assert any_lane(jnp.array(True))


def test_any_lane_covers_all_lanes_of_nested_batches():
    flags = jnp.array([[False, False], [False, True]])
    assert jax.vmap(jax.vmap(any_lane))(flags).all()
    assert not jax.vmap(jax.vmap(any_lane))(jnp.zeros((2, 2), bool)).any()


def test_any_lane_keeps_conditionals_under_vmap():
    def branch(x):
        return jax.lax.cond(any_lane(x > 0), jnp.sin, jnp.cos, x)

    jaxpr = jax.make_jaxpr(jax.vmap(branch))(jnp.ones(3))
    assert any(eqn.primitive.name == "cond" for eqn in jaxpr.eqns)


def test_pick_branches_on_scalars_and_selects_in_batches():
    condition, x = jnp.array([True, False]), {"a": jnp.ones((2, 3))}

    def picked(condition, x, y):
        return pick(condition, x, {"a": y})

    alone = jax.make_jaxpr(picked)(condition[0], {"a": jnp.ones(3)}, jnp.zeros(3))
    assert "cond[" in str(alone)
    mapped = jax.vmap(picked, in_axes=(0, 0, None))
    assert mapped(condition, x, jnp.zeros(3))["a"].tolist() == [[1] * 3, [0] * 3]
    assert "cond[" not in str(jax.make_jaxpr(mapped)(condition, x, jnp.zeros(3)))
    one_lane = {"a": x["a"][:1]}, jnp.zeros(3)
    assert "cond[" in str(jax.make_jaxpr(mapped)(condition[:1], *one_lane))
    for flag, value in ((True, 1), (False, 0)):
        assert mapped(jnp.array([flag]), *one_lane)["a"].tolist() == [[value] * 3]
    twice = jax.vmap(mapped, in_axes=(None, None, 0))
    assert twice(condition, x, jnp.zeros((4, 3)))["a"].shape == (4, 2, 3)


def test_after_changes_nothing_and_is_not_simplified_away():
    x = jnp.arange(3.0)
    other = jnp.array([1e300, 1.0, 2.0])
    assert (after(x, other) == x).all()
    compiled = jax.jit(after).lower(x, other).compile().as_text()
    assert "multiply" in compiled or "reduce" in compiled


def test_in_turn_maps_sequentially():
    x = (jnp.ones(2), 2 * jnp.ones(2))
    one, two = in_turn(jnp.multiply, x, x)
    assert (one == 1).all()
    assert (two == 4).all()
    # The second result waits for the first: what is not finite there shows.
    endless = jnp.full(2, jnp.inf)
    assert jnp.isnan(in_turn(jnp.exp, (endless, x[1]))[1]).all()
