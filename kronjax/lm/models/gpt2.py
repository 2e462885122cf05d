"""GPT-2: learned positions, pre-norm blocks, one matrix for queries, keys and values.

    x ← x + Attention(LN(x)),   x ← x + W_proj gelu(W_fc LN(x))

The attributes have the names of the tensors in checkpoints of Hugging Face, which store
kernels `[n_in, n_out]`; the head is the transposed embedding. The port reads GPT-2 from
small to XL, and DistilGPT2.

References: Radford et al. (2019).

>>> config = Config(n_embd=8, n_head=2, n_layer=1, n_positions=4, vocab_size=10)
>>> model = nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0)))
>>> model.h[0].mlp.c_fc.kernel.shape
(8, 32)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import nnx

from kronjax.lm.models import attention
from kronjax.lm.models.attention import Places
from kronjax.lm.models.base import (
    BaseConfig,
    LanguageModel,
    activation,
    embedding,
    split_heads,
)

ARCHITECTURE = "GPT2LMHeadModel"
"""Name of the class of transformers that opens an export."""

PREFIXES = ("transformer.",)
"""Prefixes of tensor names in files; the first one is written."""

TRANSPOSED = r"lm_head"
"""Layers whose kernels are stored `[n_out, n_in]`: only a separate head. The others are
of the class `Conv1D` in transformers, which stores `[n_in, n_out]`."""

BUFFERS = r"h\.\d+\.attn\.(bias|masked_bias)"
"""Tensors of old checkpoints that are not parameters: causal masks."""


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """Settings; the defaults are those of GPT-2 small."""

    model_type: ClassVar[str] = "gpt2"
    LAYERS: ClassVar[str] = "n_layer"
    CONTEXT: ClassVar[str] = "n_positions"
    EPSILON: ClassVar[str | float] = "layer_norm_epsilon"
    ALIASES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "bias": (True,),
        "use_bias": (True,),
        "position_embedding_type": ("absolute", "learned"),
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False

    def __post_init__(self):
        """Check that this port supports the settings."""
        if self.n_embd % self.n_head:
            raise ValueError(
                f"config.json: n_embd {self.n_embd} is not a multiple of n_head "
                f"{self.n_head}"
            )
        if not self.scale_attn_weights or self.scale_attn_by_inverse_layer_idx:
            raise ValueError(
                "config.json: the only supported scaling of attention is "
                "scale_attn_weights"
            )
        activation(self.activation_function)

    @property
    def cache_shape(self) -> tuple[int, int]:
        """`(g, d)`: the number of key-value heads and the width of a head."""
        return self.n_head, self.n_embd // self.n_head


class Attention(nnx.Module):
    """Self-attention with as many key-value heads as query heads."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Create layers with random weights."""
        width = config.n_embd
        self.heads = config.n_head
        self.c_attn = nnx.Linear(width, 3 * width, rngs=rngs)
        self.c_proj = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array, places: Places, past=None):
        """Return the states `[b, t, width]`, and the keys and values."""
        q, k, v = (
            split_heads(part, self.heads)
            for part in jax.numpy.split(self.c_attn(x), 3, axis=-1)
        )
        y, present = attention.attend(q, k, v, places, past)
        return self.c_proj(y), present


class MLP(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Create layers with random weights."""
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nnx.Linear(config.n_embd, inner, rngs=rngs)
        self.c_proj = nnx.Linear(inner, config.n_embd, rngs=rngs)
        self.act = activation(config.activation_function)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `[b, t, width]`."""
        return self.c_proj(self.act(self.c_fc(x)))


class Block(nnx.Module):
    """Attention and MLP, each after a layer norm and with a residual connection."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Create layers with random weights."""
        self.ln_1 = _layer_norm(config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.ln_2 = _layer_norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array, places: Places, past=None):
        """Return the states `[b, t, width]`, and the keys and values."""
        y, present = self.attn(self.ln_1(x), places, past)
        x = x + y
        return x + self.mlp(self.ln_2(x)), present


class Model(LanguageModel):
    """GPT-2 with its tied or separate head."""

    EMBEDDING = "wte"
    HIDDEN = ((("mlp.c_fc",), "mlp.c_proj"),)

    config: Config

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Create layers with random weights."""
        self.config = config
        self.wte = embedding(config.vocab_size, config.n_embd, rngs=rngs)
        self.wpe = embedding(config.n_positions, config.n_embd, rngs=rngs)
        self.h = nnx.List(Block(config, rngs=rngs) for _ in range(config.n_layer))
        self.ln_f = _layer_norm(config, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.n_embd, config.vocab_size, use_bias=False, rngs=rngs
            )

    @property
    def blocks(self) -> nnx.List:
        """The blocks, in order."""
        return self.h

    def embed(self, tokens: jax.Array, places: Places) -> jax.Array:
        """Return the states before the first block: `[b, t]` to `[b, t, width]`."""
        return self.wte(tokens) + self.wpe(places.positions)

    def finish(self, x: jax.Array) -> jax.Array:
        """Return the states before the head `[b, t, width]`."""
        return self.ln_f(x)


def _layer_norm(config: Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # In GPT-2's residual stream some channels are in the thousands and others near 1,
    # so E[x²] − E[x]² would cancel.
    return nnx.LayerNorm(
        config.n_embd,
        epsilon=config.layer_norm_epsilon,
        use_fast_variance=False,
        rngs=rngs,
    )
