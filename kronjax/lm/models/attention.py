"""Causal attention for every port: with padding, grouped heads and a cache.

    softmax(Q Kᵀ / √d + mask) V

Queries are `[b, t, h, d]`, keys and values `[b, s, g, d]` with `g` dividing `h`: query
head `i` reads group `i g // h`. Queries are taken in blocks; without a cache, or with
one that is still empty, a block sees only the keys up to its end, which saves nearly
half of the products and most of the memory. Scores and softmax are float32 whatever
the weights are.

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
"""Queries per block: small enough for the scores of a head to stay in a cache."""

_record: contextvars.ContextVar[list[tuple[jax.Array, jax.Array]] | None] = (
    contextvars.ContextVar("record", default=None)
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, in slots of a fixed number.

    Attributes:
        layers: For each layer its keys and values, each `[b, slots, g, d]`.
        valid: `[b, slots]`, bool: whether the slot holds a token that counts.
        length: int32, the number of slots filled, padding included.
    """

    layers: tuple[tuple[jax.Array, jax.Array], ...]
    valid: jax.Array
    length: jax.Array

    @property
    def slots(self) -> int:
        """Number of slots."""
        return self.valid.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where the tokens of one call stand.

    Attributes:
        positions: `[b, t]`, int32, counted from the first token that is not padding.
        valid: `[b, s]`, bool, the keys that count; None for all.
        start: int32, the slot of the first token; the number 0 for a cache that is
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
        shape: `(b, slots, g, d)`.
        dtype: Of the keys and values.
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
        shape: `(b, t)` of the tokens.
        mask: `[b, t]`, bool, False for padding on either side; None for no padding.
        positions: `[b, t]`, overrides the positions that follow from the mask.
        cache: What the tokens are appended to.
        fresh: Whether the cache is known to be empty.

    Raises:
        ValueError: If the mask has another shape, or the cache too few slots.
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
    """Yield a list to which every `attend` inside adds its queries and keys.

    What is traced must be used where it was traced, as with any value of jax.
    """
    seen: list[tuple[jax.Array, jax.Array]] = []
    token = _record.set(seen)
    try:
        yield seen
    finally:
        _record.reset(token)


def log_probabilities(q: jax.Array, k: jax.Array) -> jax.Array:
    """Return the logarithms of what each query gives to each key, without padding.

    Args:
        q: `[b, t, h, d]`.
        k: `[b, t, g, d]`.

    Returns:
        `[b, h, t, t]`, float32; the lowest number where a key comes after the query.
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
    """Attend to everything up to each query.

    Args:
        q: `[b, t, h, d]`.
        k: `[b, t, g, d]`, of the same tokens.
        v: `[b, t, g, d]`.
        places: Of these tokens.
        past: Keys and values of one layer of a cache, each `[b, slots, g, d]`.

    Returns:
        `[b, t, h d]`, and the keys and values: those given, or those of the cache with
        the new ones in their slots.
    """
    b, t, h, d = q.shape
    seen = _record.get()
    if seen is not None:
        seen.append((q, k))
    if past is not None:
        assert places.start is not None
        zero = jnp.zeros((), jnp.int32)
        at = (zero, jnp.asarray(places.start, jnp.int32), zero, zero)
        k, v = (
            jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)
            for old, new in zip(past, (k, v), strict=True)
        )
    # What a query sees begins in the first slot, wherever that is known to be.
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
    """Turn pairs of channels by angles that grow with the position.

    Channel `i` is paired with channel `i + d/2`, as in the Hugging Face checkpoints.

    Args:
        x: `[b, t, h, d]`.
        positions: `[b, t]`.
        frequencies: `[d/2]`, float32, radians per position.

    Returns:
        `[b, t, h, d]` in the dtype of `x`.

    Source: Su et al. (2021).
    """
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return turned.astype(x.dtype)


def _attend_block(q, k, v, rows, valid):
    """Attend with queries at the slots `rows`: `[b, t, h, d]`."""
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
    # Finite: a row of padding sees nothing, and must not become NaN.
    scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bghts,bsgd->btghd", weights, v).reshape(b, t, h, d)
