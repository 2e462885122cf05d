"""Base classes of the language models: configuration, forward pass, cached decoding.

Each architecture is a port: a module with a `Config`, whose fields have the names of
Hugging Face's `config.json`, and a `Model`, whose attributes have the names of its
tensors. So the path of a layer, `h.0.mlp.c_fc`, is the name that users know, and a
port maps names by a prefix alone; `kronjax.lm.models.registry.Port` lists what it
declares.

Orientation: the kernel `K` of a linear layer is `[n_in, n_out]`, and the layer computes
`y = x @ K + bias`. This holds for every model and every layer in kronjax. Files of
Hugging Face store some kernels transposed, `[n_out, n_in]`; each port says which
(`TRANSPOSED`), and only `kronjax.lm.checkpoints` converts.

>>> activation("silu")(0.0).item()
0.0
"""

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kronjax import nn
from kronjax.io.cache import digest
from kronjax.lm.models import attention, settings
from kronjax.lm.models.attention import Cache, Places
from kronjax.lm.text.tokenizer import Tokenizer

_exact = functools.partial(jax.nn.gelu, approximate=False)
_tanh = functools.partial(jax.nn.gelu, approximate=True)
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _exact,
    "gelu_new": _tanh,
    "gelu_pytorch_tanh": _tanh,
    "gelu_python": _exact,
    "gelu_fast": _tanh,
    "gelu_accurate": _tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Return the activation function that `config.json` calls `name`.

    Raises:
        ValueError: If the name is unknown; the message lists the known ones.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"config.json asks for the activation {name!r}; known are "
            f"{', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """Settings of a model, under their names in `config.json`.

    Attributes:
        origin: The complete `config.json` that was read, as JSON text, so that
            settings that no port uses (for generation, say) are written back.
        vocab_size: Number of tokens in the vocabulary.
        tie_word_embeddings: Whether the head is the transposed embedding.
    """

    origin: str = dataclasses.field(default="{}", repr=False, compare=False)

    model_type: typing.ClassVar[str]
    """Value of `model_type` in `config.json`."""

    LAYERS: typing.ClassVar[str] = "num_hidden_layers"
    """Name of the field with the number of blocks."""

    CONTEXT: typing.ClassVar[str] = "max_position_embeddings"
    """Name of the field with the largest number of positions."""

    ALIASES: typing.ClassVar[Mapping[str, str]] = {}
    """Names of fields by other names that transformers accepts for them."""

    NEUTRAL: typing.ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Values of settings that are no fields and change nothing; see `settings`."""

    EPSILON: typing.ClassVar[str | float] = 1e-5
    """Name of the field with the epsilon of all norms, or its value."""

    # Every port has these two fields; the others have names of their own.
    vocab_size: int = 0
    tie_word_embeddings: bool = True

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> Self:
        """Return the configuration in the values of a `config.json`.

        Raises:
            ValueError: If a value has the wrong type, a size is not positive, or a
                setting changes the model in a way that it does not compute.
        """
        known: dict[str, Any] = {}
        named = settings.with_aliases(values, cls.ALIASES)
        for field in dataclasses.fields(cls):
            if field.name != "origin" and named.get(field.name) is not None:
                value = named[field.name]
                known[field.name] = _checked(cls, field.name, value)
        config = cls(**known, origin=json.dumps(dict(values)))
        config.check(named)
        return config

    def check(self, values: Mapping[str, Any]) -> None:
        """Refuse settings that are no fields and change what the model computes.

        Args:
            values: The content of `config.json`.

        Raises:
            ValueError: If there is such a setting; the message names it.
        """
        epsilon = self.EPSILON
        settings.check(
            settings.without_window(values, self.context),
            known={field.name for field in dataclasses.fields(self)},
            neutral=self.NEUTRAL,
            epsilon=getattr(self, epsilon) if isinstance(epsilon, str) else epsilon,
        )

    def to_hugging_face(self) -> dict[str, Any]:
        """Return the values for a `config.json`: the ones read, and the fields."""
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
        """`(g, d)`: the number of key-value heads and the width of a head."""
        raise NotImplementedError


class LanguageModel(nnx.Module):
    """A causal language model: tokens `[b, t]` to logits `[b, t, vocab_size]`.

    Attributes:
        config: The settings of the port.
        tokenizer: The tokenizer from the model's folder, or None.
        recipe: Text of the recipe by which the model was compressed, or None.
    """

    EMBEDDING: typing.ClassVar[str]
    """Name of the table of token embeddings."""

    HEAD: typing.ClassVar[str] = "lm_head"
    """Name of the linear layer that computes logits, where the head is not tied."""

    HIDDEN: typing.ClassVar[tuple[tuple[tuple[str, ...], str], ...]] = ()
    """Pairs of names in a block: layers whose outputs are combined elementwise, and
    the layer that reads the result."""

    VALUES: typing.ClassVar[tuple[str, str] | None] = None
    """Two names in a block: the layer that computes the attention values, and the layer
    that reads their weighted means."""

    config: BaseConfig
    tokenizer: Tokenizer | None = None
    recipe: str | None = None

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        """Create a model of random parameters."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """Return a line with the architecture and the sizes, without the arrays."""
        arrays = jax.tree.leaves(nnx.state(self, nnx.Param))
        count = sum(math.prod(x.shape) for x in arrays)
        layers = [*nn.linear_layers(self).values(), *nn.tables(self).values()]
        compressed = sum(not isinstance(x, nnx.Linear | nnx.Embed) for x in layers)
        return (
            f"<{self.config.model_type} model: {self.config.num_layers} blocks, "
            f"{count:,} parameters, {parameter_dtype(self)}, "
            f"{compressed} compressed layers>"
        )

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
        """Return the states after a block, `[b, t, width]`, and its keys and values."""
        return block(x, places, past)

    def finish(self, x: jax.Array) -> jax.Array:
        """Return the states before the head, given those after the last block."""
        raise NotImplementedError

    def hidden(
        self, tokens: jax.Array, places: Places, cache: Cache | None = None
    ) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
        """Return the states before the head, `[b, t, ·]`, and all keys and values."""
        x = self.embed(tokens, places)
        layers = []
        for i, block in enumerate(self.blocks):
            x, present = self.apply_block(block, x, places, cache and cache.layers[i])
            layers.append(present)
        return self.finish(x), layers

    def head(self, hidden: jax.Array) -> jax.Array:
        """Return logits: `[..., width]` to `[..., vocab_size]`."""
        if self.config.tie_word_embeddings:
            return getattr(self, self.EMBEDDING).attend(hidden)
        return getattr(self, self.HEAD)(hidden)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Return, for every token, the logits of the next one.

        Args:
            tokens: Tokens, `[b, t]`, integers below `vocab_size`.
            mask: `[b, t]`, bool, False for padding, which may be on either side.
            positions: `[b, t]`, below `config.context`; by default counted from the
                first token that is not padding.

        Returns:
            Logits `[b, t, vocab_size]`, in the dtype of the parameters. Those at
            padding are undefined.

        Raises:
            ValueError: If there are more tokens than the model has positions.
        """
        if positions is None and mask is None and tokens.shape[1] > self.config.context:
            raise ValueError(
                f"got {tokens.shape[1]} tokens, but the model has "
                f"{self.config.context} positions; take fewer tokens"
            )
        places = attention.locate(tokens.shape, mask=mask, positions=positions)
        return self.head(self.hidden(tokens, places)[0])

    def step(
        self, tokens: jax.Array, cache: Cache, *, mask: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Append tokens to a cache and return the logits after the last of them.

        Args:
            tokens: Tokens, `[b, t]`. The cache must have `t` free slots, which is not
                checked.
            cache: The result of `empty_cache` or of the previous step.
            mask: `[b, t]`, bool, False for padding, which must be on the left.

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
        """Return what `step` returns for an empty cache, faster.

        Args:
            tokens: Tokens, `[b, t]`.
            slots: Number of slots of the cache, at least `t`.
            mask: `[b, t]`, bool, False for padding, which must be on the left.

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


def inner_layers(module: nnx.Module) -> dict[str, nn.Layer]:
    """Return the linear layers of a model, or of a block, by name, without the head."""
    head = getattr(module, "HEAD", None)
    return {k: v for k, v in nn.linear_layers(module).items() if k != head}


def parameter_dtype(model: nnx.Module) -> np.dtype:
    """Return the dtype of the parameters: the most precise one if there are several."""
    dtypes = {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))}
    return max(dtypes, key=lambda dtype: (jnp.finfo(dtype).bits, str(dtype)))


def tokenizer_of(model: LanguageModel, given: Tokenizer | None = None) -> Tokenizer:
    """Return `given`, or the model's own tokenizer if it is None.

    Raises:
        ValueError: If the model has no tokenizer either; the message names the remedy.
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
    """Check that all tokens are in the vocabulary of a model.

    Args:
        model: Any language model.
        tokens: Tokens, `[n]`, at least one.
        tokenizer: The tokenizer that produced them, if known.

    Raises:
        ValueError: If a token is out of range; the message gives the sizes.
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
    """Return a table of `size` rows that computes in the dtype of its entries.

    By default, `nnx.Embed` computes in the dtype with which it was created, which would
    turn a model loaded as bfloat16 into a float32 one.
    """
    table = nnx.Embed(size, features, rngs=rngs)
    table.dtype = None  # type: ignore[assignment]
    return table


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """Split channels into heads: `[b, t, h d]` to `[b, t, h, d]`."""
    return x.reshape(*x.shape[:-1], heads, -1)


def _checked(cls, name, value):
    """Return `value` if it has the type of the field `name`."""
    hint = typing.get_type_hints(cls)[name]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, tuple(kinds)) or (
        isinstance(value, bool) != (bool in kinds)
    ):
        wanted = " or ".join(x.__name__ for x in kinds if x is not type(None))
        raise ValueError(
            f"config.json: {name} is {value!r}; it must be of type {wanted}"
        )
    number = int in kinds or float in kinds
    if number and not isinstance(value, bool) and not 0 < value < float("inf"):
        raise ValueError(f"config.json: {name} is {value}; it must be positive")
    return value


def fingerprint(model: LanguageModel) -> str:
    """Return a digest of the configuration and of all arrays of a model."""
    leaves = jax.tree.leaves(nnx.state(model))
    return digest(model.config, *map(np.asarray, leaves))
