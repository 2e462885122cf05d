"""Llama: rotary positions, grouped key-value heads, gated MLP, RMS norms.

    x ← x + Attention(RMS(x)),   x ← x + W_down (silu(W_gate RMS(x)) * W_up RMS(x))

The attributes have the names of the tensors in checkpoints of Hugging Face, which store
kernels `[n_out, n_in]`. The port reads SmolLM, SmolLM2, TinyLlama and Llama 1 to 3.

References: Touvron et al. (2023); Grattafiori et al. (2024) for the scaling of the
frequencies in Llama 3.

>>> config = Config(hidden_size=8, intermediate_size=12, num_hidden_layers=1,
...                 num_attention_heads=2, num_key_value_heads=1, vocab_size=10)
>>> model = nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0)))
>>> model.layers[0].self_attn.k_proj.kernel.shape
(8, 4)
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import numpy as np
from flax import nnx

from kronjax.lm.models import attention, rotary
from kronjax.lm.models.attention import Places
from kronjax.lm.models.base import (
    BaseConfig,
    LanguageModel,
    activation,
    embedding,
    split_heads,
)

ARCHITECTURE = "LlamaForCausalLM"
"""Name of the class of transformers that opens an export."""

PREFIXES = ("model.",)
"""Prefixes of tensor names in files; the first one is written."""

TRANSPOSED = r".*"
"""Layers whose kernels are stored `[n_out, n_in]`: all of them."""

BUFFERS = r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
"""Tensors of old checkpoints that are not parameters: rotary frequencies."""


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """Settings; the defaults are those of Llama-7B.

    The fields that begin with `rope_`, except `rope_theta`, are in the mapping
    `rope_scaling` or `rope_parameters` of a `config.json`, without that prefix.
    """

    model_type: ClassVar[str] = "llama"
    EPSILON: ClassVar[str | float] = "rms_norm_eps"
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "scale_attn_weights": (True,),
        "use_rms_norm": (True,),
        "norm_type": ("rmsnorm", "rms_norm", "RMSNorm"),
        "position_embedding_type": ("rope", "rotary"),
        "rope_scaling": (...,),
        "rope_parameters": (...,),
    }

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_type: str = "default"
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_position_embeddings: int = 8192

    def __post_init__(self):
        """Check that this port supports the settings."""
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads {self.num_attention_heads} is no "
                f"multiple of num_key_value_heads {self.kv_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config.json: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_width % 2:
            raise ValueError(
                f"config.json: the width of a head is {self.head_width}; it must be "
                "even, because channels are rotated in pairs"
            )
        if self.rope_type not in rotary.KEYS:
            raise ValueError(
                f"config.json: rope_type {self.rope_type!r} is not supported; "
                f"{', '.join(rotary.KEYS)} are"
            )
        if not self.rope_low_freq_factor < self.rope_high_freq_factor:
            raise ValueError(
                "config.json: low_freq_factor must be below high_freq_factor"
            )
        activation(self.hidden_act)

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> Self:
        """Return the configuration in the values of a `config.json`."""
        for name in sorted(_ROPE_FIELDS & values.keys()):
            if values[name] is not None:
                raise ValueError(
                    f"config.json: {name} has no effect outside of rope_scaling or "
                    "rope_parameters; move it there"
                )
        rope = {
            key if key in ("rope_type", rotary.THETA) else f"rope_{key}": value
            for key, value in rotary.read(values).items()
        }
        config = super().from_hugging_face({**values, **rope})
        return dataclasses.replace(config, origin=json.dumps(dict(values)))

    def to_hugging_face(self) -> dict[str, Any]:
        """Return the values for a `config.json`."""
        values = super().to_hugging_face()
        rope = {name: values.pop(name) for name in list(values) if name in _ROPE_FIELDS}
        kind = rope["rope_type"]
        if not values.get("rope_parameters") and kind != "default":
            scaling = {key: rope[f"rope_{key}"] for key in rotary.KEYS[kind]}
            values["rope_scaling"] = {"rope_type": kind, **scaling}
        return values

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Number of channels of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def cache_shape(self) -> tuple[int, int]:
        """`(g, d)`: the number of key-value heads and the width of a head."""
        return self.kv_heads, self.head_width

    def frequencies(self) -> np.ndarray:
        """Return the radians per position of each pair of channels, `[d/2]`, float32.

        Llama 3 divides the frequencies of the pairs that turn less than
        `rope_low_freq_factor` times over the original context by `rope_factor`, keeps
        those that turn more than `rope_high_freq_factor` times, and interpolates
        between them.
        """
        d = self.head_width
        f = self.rope_theta ** (-np.arange(0, d, 2, dtype=np.float64) / d)
        if self.rope_type == "linear":
            f = f / self.rope_factor
        elif self.rope_type == "llama3":
            low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
            turns = self.rope_original_max_position_embeddings * f / (2 * math.pi)
            blend = np.clip((turns - low) / (high - low), 0, 1)
            f = f * (blend + (1 - blend) / self.rope_factor)
        return f.astype(np.float32)


_ROPE_FIELDS = {
    field.name
    for field in dataclasses.fields(Config)
    if field.name.startswith("rope_") and field.name != "rope_theta"
}


class Attention(nnx.Module):
    """Self-attention whose key-value heads are shared by several query heads."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Create layers with random weights."""
        self.heads, self.kv_heads = config.num_attention_heads, config.kv_heads
        width, d, bias = config.hidden_size, config.head_width, config.attention_bias

        def linear(n_in, n_out):
            return nnx.Linear(n_in, n_out, use_bias=bias, rngs=rngs)

        self.q_proj = linear(width, self.heads * d)
        self.k_proj = linear(width, self.kv_heads * d)
        self.v_proj = linear(width, self.kv_heads * d)
        self.o_proj = linear(self.heads * d, width)

    def __call__(self, x: jax.Array, places: Places, frequencies, past=None):
        """Return the states `[b, t, width]`, and the keys and values."""
        q = split_heads(self.q_proj(x), self.heads)
        k = split_heads(self.k_proj(x), self.kv_heads)
        v = split_heads(self.v_proj(x), self.kv_heads)
        q, k = (attention.rotate(y, places.positions, frequencies) for y in (q, k))
        y, present = attention.attend(q, k, v, places, past)
        return self.o_proj(y), present


class MLP(nnx.Module):
    """A linear layer gated by another one, and a third that projects back."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Create layers with random weights."""
        width, inner, bias = (
            config.hidden_size,
            config.intermediate_size,
            config.mlp_bias,
        )
        self.gate_proj = nnx.Linear(width, inner, use_bias=bias, rngs=rngs)
        self.up_proj = nnx.Linear(width, inner, use_bias=bias, rngs=rngs)
        self.down_proj = nnx.Linear(inner, width, use_bias=bias, rngs=rngs)
        self.act = activation(config.hidden_act)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `[b, t, width]`."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """Attention and MLP, each after an RMS norm and with a residual connection."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Create layers with random weights."""
        self.input_layernorm = _rms_norm(config, rngs)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = _rms_norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array, places: Places, frequencies, past=None):
        """Return the states `[b, t, width]`, and the keys and values."""
        y, present = self.self_attn(self.input_layernorm(x), places, frequencies, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Model(LanguageModel):
    """Llama with its tied or separate head."""

    EMBEDDING = "embed_tokens"
    HIDDEN = ((("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),)
    VALUES = ("self_attn.v_proj", "self_attn.o_proj")

    config: Config

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Create layers with random weights."""
        self.config = config
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.List(
            Block(config, rngs=rngs) for _ in range(config.num_hidden_layers)
        )
        self.norm = _rms_norm(config, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs
            )

    @property
    def blocks(self) -> nnx.List:
        """The blocks, in order."""
        return self.layers

    def embed(self, tokens: jax.Array, places: Places) -> jax.Array:
        """Return the states before the first block: `[b, t]` to `[b, t, width]`."""
        return self.embed_tokens(tokens)

    def apply_block(self, block, x: jax.Array, places: Places, past=None):
        """Return the states after a block, `[b, t, width]`, and its keys and values."""
        frequencies = jax.numpy.asarray(self.config.frequencies())
        return block(x, places, frequencies, past)

    def finish(self, x: jax.Array) -> jax.Array:
        """Return the states before the head `[b, t, width]`."""
        return self.norm(x)


def _rms_norm(config: Config, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)
