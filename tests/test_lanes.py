import jax
import jax.numpy as jnp

from kronjax.lanes import after, any_lane, in_turn


def test_any_lane_is_the_flag_itself_without_a_batch():
    assert not any_lane(jnp.array(False))
    assert any_lane(jnp.array(True))


def test_any_lane_asks_all_lanes_of_nested_batches():
    flags = jnp.array([[False, False], [False, True]])
    assert jax.vmap(jax.vmap(any_lane))(flags).all()
    assert not jax.vmap(jax.vmap(any_lane))(jnp.zeros((2, 2), bool)).any()


def test_any_lane_keeps_a_branch_a_branch():
    def branch(x):
        return jax.lax.cond(any_lane(x > 0), jnp.sin, jnp.cos, x)

    jaxpr = jax.make_jaxpr(jax.vmap(branch))(jnp.ones(3))
    assert any(eqn.primitive.name == "cond" for eqn in jaxpr.eqns)


def test_after_changes_nothing_and_is_not_simplified_away():
    x = jnp.arange(3.0)
    other = jnp.array([1e300, 1.0, 2.0])
    assert (after(x, other) == x).all()
    compiled = jax.jit(after).lower(x, other).compile().as_text()
    assert "multiply" in compiled or "reduce" in compiled


def test_in_turn_maps_and_chains():
    x = (jnp.ones(2), 2 * jnp.ones(2))
    one, two = in_turn(jnp.multiply, x, x)
    assert (one == 1).all()
    assert (two == 4).all()
    # The second result waits for the first: what is not finite there shows.
    endless = jnp.full(2, jnp.inf)
    assert jnp.isnan(in_turn(jnp.exp, (endless, x[1]))[1]).all()
