"""What the ports share: reading `config.json`, activations, and the calls of a model.

A port is a module with a `Config`, whose fields bear the names of Hugging Face's
`config.json`, and a `Model`, whose attributes bear the names of its tensors. So the
path of a layer, `h.0.mlp.c_fc`, is the name under which users know it, and the key map
of a port is a prefix and the orientation of its matrices.

>>> activation("silu")(0.0).item()
0.0
"""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kronjax.io.cache import digest
from kronjax.lm.models import attention
from kronjax.lm.models.attention import Cache, Places
from kronjax.lm.text.tokenizer import Tokenizer

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Return the activation function that `config.json` calls `name`.

    Raises:
        ValueError: If it is unknown; lists those that are not.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"config.json asks for the activation {name!r}; known are "
            f"{', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """Settings of a model under the names that `config.json` gives them.

    Attributes:
        origin: The whole of the `config.json` that was read, as JSON text, so that
            what no port uses (generation settings, say) is written back.
    """

    origin: str = dataclasses.field(default="{}", repr=False, compare=False)

    model_type: typing.ClassVar[str]
    """Value of `model_type` in `config.json`."""

    LAYERS: typing.ClassVar[str] = "num_hidden_layers"
    """The field with the number of blocks."""

    CONTEXT: typing.ClassVar[str] = "max_position_embeddings"
    """The field with the largest number of positions."""

    # What every port answers, whatever its own names are.
    vocab_size: int = 0

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> Self:
        """Take the fields of this port out of the values of a `config.json`.

        Raises:
            ValueError: If a value has the wrong type, or a size is not positive.
        """
        known: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name != "origin" and values.get(field.name) is not None:
                value = values[field.name]
                known[field.name] = _checked(cls, field.name, value)
        return cls(**known, origin=json.dumps(dict(values)))

    def to_hugging_face(self) -> dict[str, Any]:
        """Return the values for a `config.json`: what was read, and the fields."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "origin" and getattr(self, field.name) is not None
        }
        return {**json.loads(self.origin), **fields, "model_type": self.model_type}

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return getattr(self, self.LAYERS)

    @property
    def context(self) -> int:
        """Largest number of positions."""
        return getattr(self, self.CONTEXT)

    @property
    def cache_shape(self) -> tuple[int, int]:
        """`(g, d)`: the key-value heads, and the width of a head."""
        raise NotImplementedError


class LanguageModel(nnx.Module):
    """A causal language model: tokens `[b, t]` to logits `[b, t, vocab_size]`.

    Attributes:
        config: The settings of the port.
        tokenizer: That of its folder, or None.
        recipe: Text of the recipe that made the model what it is, or None.
    """

    HIDDEN: typing.ClassVar[tuple[tuple[tuple[str, ...], str], ...]] = ()
    """In a block: layers whose outputs meet elementwise, and the one after them."""

    VALUES: typing.ClassVar[tuple[str, str] | None] = None
    """In a block: the layer that makes values, and the one that reads their means."""

    config: Any
    tokenizer: Tokenizer | None = None
    recipe: str | None = None

    @property
    def blocks(self) -> nnx.List:
        """The blocks, in order."""
        raise NotImplementedError

    def embed(self, tokens: jax.Array, places: Places) -> jax.Array:
        """Return the states before the first block: `[b, t]` to `[b, t, width]`."""
        raise NotImplementedError

    def apply_block(
        self, block: Any, x: jax.Array, places: Places, past: Any = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Return the states after a block `[b, t, width]`, and keys and values."""
        return block(x, places, past)

    def finish(self, x: jax.Array) -> jax.Array:
        """Return the states before the head from those after all blocks."""
        raise NotImplementedError

    def hidden(
        self, tokens: jax.Array, places: Places, cache: Cache | None = None
    ) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
        """Return the states before the head `[b, t, ·]`, and keys and values."""
        x = self.embed(tokens, places)
        layers = []
        for i, block in enumerate(self.blocks):
            x, present = self.apply_block(block, x, places, cache and cache.layers[i])
            layers.append(present)
        return self.finish(x), layers

    def head(self, hidden: jax.Array) -> jax.Array:
        """Return logits: `[..., width]` to `[..., vocab_size]`."""
        raise NotImplementedError

    def __call__(
        self,
        tokens: jax.Array,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Return the logits of the token after each one.

        Args:
            tokens: `[b, t]`, integers below `vocab_size`.
            mask: `[b, t]`, bool, False for padding, on either side.
            positions: `[b, t]`, below `config.context`; by default counted from the
                first token that is not padding.

        Returns:
            `[b, t, vocab_size]`, in the dtype of the parameters. Those of padding mean
            nothing.

        Raises:
            ValueError: If there are more tokens than the model has positions.
        """
        if positions is None and mask is None and tokens.shape[1] > self.config.context:
            raise ValueError(
                f"{tokens.shape[1]} tokens, and the model has {self.config.context} "
                "positions; take fewer"
            )
        places = attention.locate(tokens.shape, mask=mask, positions=positions)
        return self.head(self.hidden(tokens, places)[0])

    def step(
        self, tokens: jax.Array, cache: Cache, *, mask: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Append tokens to a cache and return the logits after the last of them.

        Args:
            tokens: `[b, t]`. The cache must have `t` slots left, which is not checked.
            cache: Of `empty_cache`, or of the step before.
            mask: `[b, t]`, bool, False for padding; pad on the left.

        Returns:
            Logits `[b, vocab_size]`, and the cache with these tokens.
        """
        places = attention.locate(tokens.shape, mask=mask, cache=cache)
        x, layers = self.hidden(tokens, places, cache)
        assert places.valid is not None
        length = cache.length + tokens.shape[1]
        return self.head(x[:, -1]), Cache(tuple(layers), places.valid, length)

    def prefill(
        self, tokens: jax.Array, slots: int, *, mask: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Begin with some tokens: `step` on an empty cache, and faster.

        Args:
            tokens: `[b, t]`.
            slots: Of the cache, at least `t`.
            mask: `[b, t]`, bool, False for padding; pad on the left.

        Returns:
            Logits `[b, vocab_size]` after the last token, and the cache.
        """
        cache = self.empty_cache(tokens.shape[0], slots)
        places = attention.locate(tokens.shape, mask=mask, cache=cache, fresh=True)
        x, layers = self.hidden(tokens, places, cache)
        assert places.valid is not None
        length = cache.length + tokens.shape[1]
        return self.head(x[:, -1]), Cache(tuple(layers), places.valid, length)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Return a cache for `batch` rows of up to `slots` tokens."""
        shape = (batch, slots, *self.config.cache_shape)
        return attention.empty_cache(
            self.config.num_layers, shape, parameter_dtype(self)
        )


def parameter_dtype(model: nnx.Module) -> np.dtype:
    """Return the dtype of the parameters: of several, the most precise."""
    dtypes = {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))}
    return max(dtypes, key=lambda dtype: (jnp.finfo(dtype).bits, str(dtype)))


def tokenizer_of(model: LanguageModel, given: Tokenizer | None = None) -> Tokenizer:
    """Return the tokenizer that is given, or else that of the model.

    Raises:
        ValueError: If there is none; says what to do.
    """
    tokenizer = model.tokenizer if given is None else given
    if tokenizer is None:
        raise ValueError(
            "the model has no tokenizer; put tokenizer.json into its folder, or set "
            "model.tokenizer to what kronjax.lm.text.tokenizer.read_tokenizer returns"
        )
    return tokenizer


def check_vocabulary(
    model: LanguageModel, tokens: np.ndarray, tokenizer: Tokenizer | None = None
) -> None:
    """Refuse tokens that the model does not know.

    Args:
        model: Any port.
        tokens: `[n]`, not empty.
        tokenizer: What they come from, if it is known.

    Raises:
        ValueError: If there are any; names the sizes.
    """
    size = model.config.vocab_size
    low, high = int(tokens.min()), int(tokens.max())
    if low >= 0 and high < size:
        return
    message = (
        f"token {low if low < 0 else high} is not in the vocabulary of the model, "
        f"which has {size} tokens"
    )
    if tokenizer is not None:
        message = (
            f"vocabulary mismatch: {message}, the tokenizer {tokenizer.size}; it "
            "belongs to another model"
        )
    raise ValueError(message)


def embedding(size: int, features: int, *, rngs: nnx.Rngs) -> nnx.Embed:
    """Return a table of `size` rows that computes in the dtype of its numbers.

    Left to itself `nnx.Embed` computes in the dtype that it was made with, which would
    turn a model that was loaded as bfloat16 into a float32 one.
    """
    table = nnx.Embed(size, features, rngs=rngs)
    table.dtype = None  # type: ignore[assignment]
    return table


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """Split channels into heads: `[b, t, h d]` to `[b, t, h, d]`."""
    return x.reshape(*x.shape[:-1], heads, -1)


def _checked(cls, name, value):
    """Return `value` if it is what the field `name` holds."""
    kind = typing.get_type_hints(cls)[name]
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, tuple(kinds)) or (
        isinstance(value, bool) != (bool in kinds)
    ):
        wanted = " or ".join(one.__name__ for one in kinds if one is not type(None))
        raise ValueError(f"config.json: {name} is {value!r}, which is no {wanted}")
    number = int in kinds or float in kinds
    if number and not isinstance(value, bool) and not 0 < value < float("inf"):
        raise ValueError(f"config.json: {name} is {value}; it must be positive")
    return value


def fingerprint(model: LanguageModel) -> str:
    """Return a digest of everything that a model computes with."""
    leaves = jax.tree.leaves(nnx.state(model))
    return digest(model.config, *map(np.asarray, leaves))
