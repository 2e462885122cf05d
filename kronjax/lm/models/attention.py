"""Causal attention with padding, grouped heads and a key-value cache.

    softmax(Q Kᵀ / √d + mask) V

Queries are `[b, t, h, d]`, keys and values `[b, s, g, d]` with `g` dividing `h`: query
head `i` reads group `i g // h`. Queries are processed in blocks; without a cache, or
with an empty one, a block reads only the keys up to its own end, which saves nearly
half of the products and most of the memory. Scores and softmax are float32 whatever
the dtype of the weights.

References: Vaswani et al. (2017); Ainslie et al. (2023) for the groups.

>>> places = locate((1, 3), mask=jnp.array([[False, True, True]]))
>>> places.positions
Array([[0, 0, 1]], dtype=int32)
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

BLOCK = 256
"""Number of queries per block, small enough for a head's scores to fit in a cache."""

_record: contextvars.ContextVar[list[tuple[jax.Array, jax.Array]] | None] = (
    contextvars.ContextVar("record", default=None)
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, in a fixed number of slots.

    Attributes:
        layers: Keys and values of each layer, each `[b, slots, g, d]`.
        valid: Slots that hold a token other than padding, `[b, slots]`, bool.
        length: Number of filled slots, padding included, int32.
    """

    layers: tuple[tuple[jax.Array, jax.Array], ...] = dataclasses.field(repr=False)
    valid: jax.Array = dataclasses.field(repr=False)
    length: jax.Array

    @property
    def slots(self) -> int:
        """Number of slots."""
        return self.valid.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Positions of the tokens of one call, and the keys that they may read.

    Attributes:
        positions: Positions counted from the first token that is not padding,
            `[b, t]`, int32.
        valid: Keys that are not padding, `[b, s]`, bool; None if none is padding.
        start: Slot of the first token, int32; the Python number 0 for a cache that is
            known to be empty, and None without a cache.
    """

    positions: jax.Array
    valid: jax.Array | None
    start: jax.Array | int | None


def empty_cache(
    num_layers: int, shape: tuple[int, int, int, int], dtype: jax.typing.DTypeLike
) -> Cache:
    """Return a cache without tokens.

    Args:
        num_layers: Number of layers.
        shape: Shape of the keys and of the values of a layer, `(b, slots, g, d)`.
        dtype: The dtype of the keys and values.
    """
    layers = tuple(
        (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(num_layers)
    )
    return Cache(layers, jnp.zeros(shape[:2], bool), jnp.zeros((), jnp.int32))


def locate(
    shape: tuple[int, ...],
    *,
    mask: jax.Array | None = None,
    positions: jax.Array | None = None,
    cache: Cache | None = None,
    fresh: bool = False,
) -> Places:
    """Return the places of new tokens.

    Args:
        shape: Shape of the tokens, `(b, t)`.
        mask: `[b, t]`, bool, False for padding on either side; None for no padding.
        positions: Positions `[b, t]` that replace those which follow from the mask.
        cache: The cache to which the tokens are appended, or None.
        fresh: Whether the cache is known to be empty.

    Raises:
        ValueError: If the shape of the mask differs from that of the tokens, or the
            cache has too few slots.
    """
    b, t = shape
    if cache is not None and t > cache.slots:
        raise ValueError(f"{t} tokens do not fit into {cache.slots} slots of a cache")
    if mask is None:
        mask = jnp.ones(shape, bool) if cache is not None else None
    elif mask.shape != (b, t):
        raise ValueError(f"mask has shape {mask.shape}, the tokens {(b, t)}")
    if positions is None:
        if mask is None:
            positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), shape)
        else:
            positions = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
            if cache is not None:
                before = jnp.sum(cache.valid, axis=1, dtype=jnp.int32)
                positions = positions + before[:, None]
            positions = jnp.maximum(positions, 0)
    if cache is None:
        return Places(positions, mask, None)
    assert mask is not None
    valid = jax.lax.dynamic_update_slice(
        cache.valid, mask.astype(bool), (jnp.zeros((), jnp.int32), cache.length)
    )
    return Places(positions, valid, 0 if fresh else cache.length)


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[jax.Array, jax.Array]]]:
    """Yield a list to which every `attend` in the block adds its queries and keys.

    Tracers in the list must be used within the same trace, as usual in jax.
    """
    recorded: list[tuple[jax.Array, jax.Array]] = []
    token = _record.set(recorded)
    try:
        yield recorded
    finally:
        _record.reset(token)


def log_probabilities(q: jax.Array, k: jax.Array) -> jax.Array:
    """Return the logarithms of the attention weights, for tokens without padding.

    Args:
        q: Queries, `[b, t, h, d]`.
        k: Keys, `[b, t, g, d]`.

    Returns:
        Log-weights `[b, h, t, t]`, float32, of each query and each key; the lowest
        float where the key comes after the query.
    """
    b, t, h, d = q.shape
    g = k.shape[2]
    q = q.reshape(b, t, g, h // g, d)
    scores = jnp.einsum("btghd,bsgd->bghts", q, k, preferred_element_type=jnp.float32)
    allowed = jnp.tril(jnp.ones((t, t), bool))[None, None, None]
    scores = jnp.where(allowed, scores * (d**-0.5), jnp.finfo(jnp.float32).min)
    return jax.nn.log_softmax(scores, axis=-1).reshape(b, h, t, t)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    places: Places,
    past: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Compute causal attention: each query reads the keys up to its own token.

    Args:
        q: Queries, `[b, t, h, d]`.
        k: Keys of the same tokens, `[b, t, g, d]`.
        v: Values of the same tokens, `[b, t, g, d]`.
        places: Places of these tokens.
        past: Keys and values of one layer of a cache, each `[b, slots, g, d]`.

    Returns:
        The result `[b, t, h d]`, and the keys and values: the given ones, or those of
        the cache with the given ones in their slots.
    """
    b, t, h, d = q.shape
    recorded = _record.get()
    if recorded is not None:
        recorded.append((q, k))
    if past is not None:
        assert places.start is not None
        zero = jnp.zeros((), jnp.int32)
        at = (zero, jnp.asarray(places.start, jnp.int32), zero, zero)
        k, v = (
            jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)
            for old, new in zip(past, (k, v), strict=True)
        )
    # Without a cache, or with one known to be empty, query `i` is in slot `i`.
    from_start = past is None or isinstance(places.start, int)
    blocks = []
    for first in range(0, t, BLOCK):
        last = min(first + BLOCK, t)
        end = last if from_start else k.shape[1]
        valid = None if places.valid is None else places.valid[:, :end]
        rows = jnp.arange(first, last, dtype=jnp.int32)
        rows = rows if from_start else rows + jnp.asarray(places.start)
        blocks.append(
            _attend_block(q[:, first:last], k[:, :end], v[:, :end], rows, valid)
        )
    y = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)
    return y.reshape(b, t, h * d), (k, v)


def rotate(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Rotate pairs of channels by angles proportional to the position.

    Channel `i` is paired with channel `i + d/2`, as in checkpoints of Hugging Face.

    Args:
        x: Queries or keys, `[b, t, h, d]`.
        positions: Positions, `[b, t]`.
        frequencies: Radians per position of each pair, `[d/2]`, float32.

    Returns:
        The rotated array, `[b, t, h, d]`, in the dtype of `x`.

    Source: Su et al. (2021).
    """
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return rotated.astype(x.dtype)


def _attend_block(q, k, v, rows, valid):
    """Return the attention `[b, t, h, d]` of queries in the slots `rows`."""
    b, t, h, d = q.shape
    g = k.shape[2]
    q = q.reshape(b, t, g, h // g, d)
    scores = jnp.einsum(
        "btghd,bsgd->bghts", q, k, preferred_element_type=jnp.float32
    ) * (d**-0.5)
    allowed = rows[:, None] >= jnp.arange(k.shape[1], dtype=jnp.int32)[None]
    allowed = allowed[None, None, None]
    if valid is not None:
        allowed = allowed & valid[:, None, None, None, :]
    # A finite value: a query at padding reads no key, and -inf would make it NaN.
    scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bghts,bsgd->btghd", weights, v).reshape(b, t, h, d)
