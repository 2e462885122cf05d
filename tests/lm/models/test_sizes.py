"""Counts of parameters, bytes and operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from language_models import make_llama

from kronjax import nn
from kronjax.kronecker import KroneckerTerms
from kronjax.lm.models import gpt2, sizes


def abstract(config):
    return nnx.eval_shape(lambda: gpt2.Model(config, rngs=nnx.Rngs(0)))


def test_gpt2_small_has_the_published_number_of_parameters():
    found = sizes.count(abstract(gpt2.Config()))
    assert found.parameters == 124_439_808 and found.bytes == 4 * 124_439_808
    assert found.embeddings == 768 * (50257 + 1024) and found.other == 25 * 2 * 768
    assert len(found.layers) == 48
    first = found.layers[0]
    assert (first.name, first.kind) == ("h.0.attn.c_attn", "dense")
    assert first.shape == (768, 2304) and first.parameters == 769 * 2304
    weights = 12 * 12 * 768**2 + 768 * 50257
    biases = 12 * 9 * 768
    assert found.flops == 2 * weights + biases


def test_abstract_layers_are_counted():
    """The row (64, 32) of Krony-PT's table, without weights in memory."""
    model = abstract(gpt2.Config())
    for name in [name for name in nn.linear_layers(model) if ".mlp." in name]:
        a, b = ((64, 32), (48, 24)) if name.endswith("c_proj") else ((32, 64), (24, 48))
        described = {"kind": "kronecker", "bias": True}
        described["terms"] = [{"a": [1, *a], "b": [1, *b]}]
        nn.replace(model, name, nn.from_description(described))
    found = sizes.count(model)
    assert found.parameters == 67_893_504 and found.bytes == 4 * 67_893_504
    assert found.layers[-1].kind == "1 × 64x32 ⊗ 48x24"


def test_an_untied_head_is_counted_as_a_layer():
    config = gpt2.Config(n_embd=8, n_head=2, n_layer=1, vocab_size=10)
    tied = sizes.count(abstract(config))
    own = sizes.count(
        abstract(
            gpt2.Config(
                n_embd=8,
                n_head=2,
                n_layer=1,
                vocab_size=10,
                tie_word_embeddings=False,
            )
        )
    )
    assert own.parameters == tied.parameters + 80 and own.flops == tied.flops
    assert own.layers[-1].name == "lm_head"


def test_llama_has_no_position_embeddings():
    changes = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 16}
    model = nnx.eval_shape(lambda: make_llama(**changes, num_key_value_heads=1))
    found = sizes.count(model)
    layers = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
    assert (found.embeddings, found.other) == (80, 5 * 8)
    assert found.parameters == 80 + 40 + layers and found.flops == 2 * (layers + 80)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layers_of_all_kinds_are_counted(tiny, dtype):
    graphdef, state = nnx.split(tiny)
    tiny = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), state))
    before = sizes.count(tiny)
    terms = KroneckerTerms(jnp.ones((2, 4, 8), dtype), jnp.ones((2, 8, 16), dtype))
    nn.replace(tiny, "h.0.mlp.c_fc", nn.KroneckerLinear([terms, terms]))
    old = tiny.h[1].mlp.c_fc
    mask = np.arange(32 * 128).reshape(32, 128) % 4 == 0
    kernel, bias = old.kernel[...], old.bias[...]
    nn.replace(tiny, "h.1.mlp.c_fc", nn.MaskedLinear(kernel, jnp.asarray(mask), bias))
    found = sizes.count(tiny)
    by_name = {layer.name: layer for layer in found.layers}
    factored, masked = by_name["h.0.mlp.c_fc"], by_name["h.1.mlp.c_fc"]
    assert factored.kind == "2 × 4x8 ⊗ 8x16 + 2 × 4x8 ⊗ 8x16"
    assert factored.parameters == 2 * 2 * (32 + 128)
    assert (masked.kind, masked.parameters) == ("masked", 32 * 128 // 4 + 128)
    saved = 32 * 128 + 128 - factored.parameters + 32 * 128 * 3 // 4
    assert before.parameters - found.parameters == saved
    # A masked kernel is held whole, with a byte for each entry of its mask.
    item = jnp.dtype(dtype).itemsize
    dropped = item * (32 * 128 + 128 - factored.parameters)
    assert before.bytes - found.bytes == dropped - 32 * 128
    dense = next(x for x in before.layers if x.name == "h.0.mlp.c_fc")
    assert before.flops - found.flops == dense.flops - factored.flops
