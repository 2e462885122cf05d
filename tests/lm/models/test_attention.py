"""Attention against its formula in float64, in blocks, with padding and a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronjax.lm.models import attention

B, T, H, D = 2, 10, 6, 4


def reference(q, k, v, valid):
    """Compute attention for one query and one head at a time."""
    b, t, h, d = q.shape
    share = h // k.shape[2]
    y = np.zeros((b, t, h, d))
    for row in range(b):
        for i in range(t):
            for head in range(h):
                readable = [j for j in range(i + 1) if valid[row, j]]
                if not readable:
                    continue
                keys = k[row, readable, head // share]
                values = v[row, readable, head // share]
                scores = keys @ q[row, i, head] / np.sqrt(d)
                weights = np.exp(scores - scores.max())
                y[row, i, head] = weights @ values / weights.sum()
    return y.reshape(b, t, h * d)


def draw(groups, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, T, H, D))
    k, v = rng.normal(size=(2, B, T, groups, D))
    valid = np.ones((B, T), bool)
    valid[0, :3] = False  # padding on the left of one row, on the right of the other
    valid[1, 8:] = False
    return q, k, v, valid


def as_float32(*arrays):
    return (jnp.asarray(x, jnp.float32) for x in arrays)


@pytest.mark.parametrize(("groups", "block"), [(6, 256), (2, 4), (1, 3)])
def test_attention_equals_the_reference(groups, block, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", block)
    attend = jax.jit(lambda *inputs: attention.attend(*inputs)[0])
    q, k, v, valid = draw(groups)
    places = attention.locate((B, T), mask=jnp.asarray(valid))
    y = attend(*as_float32(q, k, v), places)
    np.testing.assert_allclose(
        np.asarray(y)[valid], reference(q, k, v, valid)[valid], atol=1e-5
    )
    everything = np.ones((B, T), bool)
    y = attend(*as_float32(q, k, v), attention.locate((B, T)))
    np.testing.assert_allclose(y, reference(q, k, v, everything), atol=1e-5)


def test_a_row_of_padding_gives_no_nan():
    q, k, v, _ = draw(6)
    places = attention.locate((B, T), mask=jnp.zeros((B, T), bool))
    y, _ = attention.attend(*as_float32(q, k, v), places)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("pieces", [(10,), (4, 6), (7, 1, 1, 1)])
def test_tokens_may_be_appended_to_a_cache_in_any_pieces(pieces):
    q, k, v, valid = draw(2)
    valid[:] = True
    valid[0, :3] = False
    cache = attention.empty_cache(1, (B, T + 5, 2, D), jnp.float32)
    got, first = [], 0
    for size in pieces:
        part = slice(first, first + size)
        places = attention.locate(
            (B, size), mask=jnp.asarray(valid[:, part]), cache=cache
        )
        # Positions count the tokens that are not padding, from the first of them.
        expected = np.maximum(np.cumsum(valid, axis=1) - 1, 0)[:, part]
        np.testing.assert_array_equal(places.positions, expected)
        inputs = as_float32(q[:, part], k[:, part], v[:, part])
        y, layer = attention.attend(*inputs, places, cache.layers[0])
        cache = attention.Cache((layer,), places.valid, cache.length + size)
        got.append(np.asarray(y))
        first += size
    got = np.concatenate(got, axis=1)
    expected = reference(q, k, v, valid)
    np.testing.assert_allclose(got[valid], expected[valid], atol=1e-5)
    assert cache.slots == T + 5 and int(cache.length) == T


def test_products_of_rotated_vectors_depend_on_position_differences():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 1, 1, 1, 8))
    frequencies = jnp.asarray(10.0 ** -np.arange(4), jnp.float32)

    def product(i, j):
        rotated = (
            attention.rotate(jnp.asarray(z, jnp.float32), jnp.array([[p]]), frequencies)
            for z, p in ((x, i), (y, j))
        )
        return float(jnp.sum(jnp.multiply(*rotated)))

    assert product(3, 5) == pytest.approx(product(13, 15), abs=1e-4)
    assert product(3, 5) != pytest.approx(product(3, 6), abs=1e-2)
    assert product(0, 0) == pytest.approx(float(np.sum(x * y)), abs=1e-5)


def test_a_mask_of_another_shape_raises_an_error():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        attention.locate((2, 4), mask=jnp.ones((2, 3), bool))
