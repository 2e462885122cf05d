import jax
import jax.numpy as jnp

from kronjax.lanes import after, any_lane


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


def test_after_changes_nothing_but_the_order():
    x = jnp.arange(3.0)
    assert (after(x, jnp.array([1e300])) == x).all()
    text = jax.jit(after).lower(x, x).compile().as_text()
    assert text.count("parameter(1)") > 0
