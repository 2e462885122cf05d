"""OPT: learned positions with an offset, norms before or after, separate projections.

    x ← x + Attention(LN(x)),   x ← x + fc2 relu(fc1 LN(x))

With `do_layer_norm_before` false (the 350M model) each norm follows its sum instead.
The attributes have the names of the tensors in checkpoints of Hugging Face, which store
kernels `[n_out, n_in]`; the head is the transposed embedding. The port reads OPT from
125M to 66B.

References: Zhang et al. (2022).

>>> config = Config(hidden_size=8, ffn_dim=16, num_hidden_layers=1, vocab_size=10,
...                 num_attention_heads=2, max_position_embeddings=4)
>>> model = nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0)))
>>> model.layers[0].fc1.kernel.shape
(8, 16)
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

ARCHITECTURE = "OPTForCausalLM"
"""Name of the class of transformers that opens an export."""

PREFIXES = ("model.decoder.", "decoder.")
"""Prefixes of tensor names in files; the first one is written."""

TRANSPOSED = r".*"
"""Layers whose kernels are stored `[n_out, n_in]`: all of them."""

BUFFERS = r"(?!)"
"""Tensors of old checkpoints that are not parameters: none."""

OFFSET = 2
"""Number of rows at the beginning of the table of positions that are never used."""


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """Settings; the defaults are those of OPT-125M."""

    model_type: ClassVar[str] = "opt"
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "bias": (True,),
        "use_bias": (True,),
        "position_embedding_type": ("absolute", "learned"),
    }

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    num_attention_heads: int = 12
    word_embed_proj_dim: int | None = None
    activation_function: str = "relu"
    do_layer_norm_before: bool = True
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self):
        """Check that this port supports the settings."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config.json: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        activation(self.activation_function)

    @property
    def embedding_size(self) -> int:
        """Width of the token embedding and of the input of the head."""
        return self.word_embed_proj_dim or self.hidden_size

    @property
    def cache_shape(self) -> tuple[int, int]:
        """`(g, d)`: the number of key-value heads and the width of a head."""
        heads = self.num_attention_heads
        return heads, self.hidden_size // heads


class Attention(nnx.Module):
    """Self-attention with as many key-value heads as query heads."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Create layers with random weights."""
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = _linear(config, width, width, rngs)
        self.k_proj = _linear(config, width, width, rngs)
        self.v_proj = _linear(config, width, width, rngs)
        self.out_proj = _linear(config, width, width, rngs)

    def __call__(self, x: jax.Array, places: Places, past=None):
        """Return the states `[b, t, width]`, and the keys and values."""
        q, k, v = (
            split_heads(project(x), self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        y, present = attention.attend(q, k, v, places, past)
        return self.out_proj(y), present


class Block(nnx.Module):
    """Attention and an MLP, each with a layer norm and a residual connection."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Create layers with random weights."""
        self.norm_first = config.do_layer_norm_before
        self.self_attn = Attention(config, rngs=rngs)
        self.self_attn_layer_norm = _layer_norm(config, rngs)
        self.fc1 = _linear(config, config.hidden_size, config.ffn_dim, rngs)
        self.fc2 = _linear(config, config.ffn_dim, config.hidden_size, rngs)
        self.final_layer_norm = _layer_norm(config, rngs)
        self.act = activation(config.activation_function)

    def __call__(self, x: jax.Array, places: Places, past=None):
        """Return the states `[b, t, width]`, and the keys and values."""
        before, after = self.norm_first, not self.norm_first
        norm = self.self_attn_layer_norm
        y, present = self.self_attn(norm(x) if before else x, places, past)
        x = norm(x + y) if after else x + y
        norm = self.final_layer_norm
        y = self.fc2(self.act(self.fc1(norm(x) if before else x)))
        return norm(x + y) if after else x + y, present


class Model(LanguageModel):
    """OPT with its tied or separate head."""

    EMBEDDING = "embed_tokens"
    HIDDEN = ((("fc1",), "fc2"),)
    VALUES = ("self_attn.v_proj", "self_attn.out_proj")

    config: Config

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Create layers with random weights."""
        self.config = config
        width, narrow = config.hidden_size, config.embedding_size
        rows = config.max_position_embeddings + OFFSET
        self.embed_tokens = embedding(config.vocab_size, narrow, rngs=rngs)
        self.embed_positions = embedding(rows, width, rngs=rngs)
        if narrow != width:
            self.project_in = nnx.Linear(narrow, width, use_bias=False, rngs=rngs)
            self.project_out = nnx.Linear(width, narrow, use_bias=False, rngs=rngs)
        self.layers = nnx.List(
            Block(config, rngs=rngs) for _ in range(config.num_hidden_layers)
        )
        if config.do_layer_norm_before:
            self.final_layer_norm = _layer_norm(config, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                narrow, config.vocab_size, use_bias=False, rngs=rngs
            )

    @property
    def blocks(self) -> nnx.List:
        """The blocks, in order."""
        return self.layers

    def embed(self, tokens: jax.Array, places: Places) -> jax.Array:
        """Return the states before the first block: `[b, t]` to `[b, t, width]`."""
        x = self.embed_tokens(tokens)
        x = self.project_in(x) if self._is_narrow else x
        return x + self.embed_positions(places.positions + OFFSET)

    def finish(self, x: jax.Array) -> jax.Array:
        """Return the states before the head, `[b, t, embedding_size]`."""
        if self.config.do_layer_norm_before:
            x = self.final_layer_norm(x)
        return self.project_out(x) if self._is_narrow else x

    @property
    def _is_narrow(self) -> bool:
        return self.config.embedding_size != self.config.hidden_size


def _linear(config: Config, n_in: int, n_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(n_in, n_out, use_bias=config.enable_bias, rngs=rngs)


def _layer_norm(config: Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    affine = config.layer_norm_elementwise_affine
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=1e-5,
        use_bias=affine,
        use_scale=affine,
        use_fast_variance=False,
        rngs=rngs,
    )
