"""GPT-2: learned positions, pre-norm blocks, one matrix for queries, keys and values.

    x ← x + Attention(LN(x)),   x ← x + W_proj gelu(W_fc LN(x))

Attributes bear the names of the checkpoints of Hugging Face, whose matrices are stored
`[in, out]` as here; the head is the transposed embedding. Serves GPT-2 small to XL and
DistilGPT2.

References: Radford et al. (2019).

>>> config = Config(n_embd=8, n_head=2, n_layer=1, n_positions=4, vocab_size=10)
>>> model = nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0)))
>>> model.h[0].mlp.c_fc.kernel.shape
(8, 32)
"""

import dataclasses
from typing import ClassVar

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
"""The class of transformers that opens an export."""

PREFIXES = ("transformer.",)
"""What stands before the names of tensors; the first is what is written."""

TRANSPOSED = r"lm_head"
"""Linear layers whose kernels are stored `[n_out, n_in]`: only the head, for the others
are `Conv1D` in transformers, which stores `[n_in, n_out]`."""

BUFFERS = r"h\.\d+\.attn\.(bias|masked_bias)"
"""Names of tensors in old checkpoints that are no parameters: causal masks."""


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """Settings; the defaults are GPT-2 small."""

    model_type: ClassVar[str] = "gpt2"
    LAYERS: ClassVar[str] = "n_layer"
    CONTEXT: ClassVar[str] = "n_positions"

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
        """Refuse what would be computed wrongly."""
        if self.n_embd % self.n_head:
            raise ValueError(
                f"config.json: n_embd {self.n_embd} is no multiple of n_head "
                f"{self.n_head}"
            )
        if not self.scale_attn_weights or self.scale_attn_by_inverse_layer_idx:
            raise ValueError(
                "config.json: of the scalings of attention only scale_attn_weights is "
                "supported"
            )
        activation(self.activation_function)

    @property
    def cache_shape(self) -> tuple[int, int]:
        """`(g, d)`: the key-value heads, and the width of a head."""
        return self.n_head, self.n_embd // self.n_head


class Attention(nnx.Module):
    """Self-attention with as many key-value heads as heads."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Draw the weights."""
        width = config.n_embd
        self.heads = config.n_head
        self.c_attn = nnx.Linear(width, 3 * width, rngs=rngs)
        self.c_proj = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array, places: Places, past=None):
        """Return `[b, t, width]`, and keys and values."""
        q, k, v = (
            split_heads(part, self.heads)
            for part in jax.numpy.split(self.c_attn(x), 3, axis=-1)
        )
        y, present = attention.attend(q, k, v, places, past)
        return self.c_proj(y), present


class MLP(nnx.Module):
    """Two linear maps with an activation between them."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Draw the weights."""
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nnx.Linear(config.n_embd, inner, rngs=rngs)
        self.c_proj = nnx.Linear(inner, config.n_embd, rngs=rngs)
        self.act = activation(config.activation_function)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `[b, t, width]`."""
        return self.c_proj(self.act(self.c_fc(x)))


class Block(nnx.Module):
    """Attention and MLP, each behind a layer norm and beside a shortcut."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Draw the weights."""
        self.ln_1 = _layer_norm(config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.ln_2 = _layer_norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array, places: Places, past=None):
        """Return `[b, t, width]`, and keys and values."""
        y, present = self.attn(self.ln_1(x), places, past)
        x = x + y
        return x + self.mlp(self.ln_2(x)), present


class Model(LanguageModel):
    """GPT-2 with its tied or separate head."""

    EMBEDDING = "wte"
    HIDDEN = ((("mlp.c_fc",), "mlp.c_proj"),)

    config: Config

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Draw the weights."""
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
    # The residual stream of GPT-2 has channels in the thousands beside others near
    # one: E[x²] − E[x]² would cancel.
    return nnx.LayerNorm(
        config.n_embd,
        epsilon=config.layer_norm_epsilon,
        use_fast_variance=False,
        rngs=rngs,
    )
