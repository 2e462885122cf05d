"""Spectral norms, stable ranks and the ratio of bounds against definitions."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from kronjax import nn
from kronjax.kronecker import KroneckerTerms
from kronjax.lm.evaluation import spectra
from kronjax.lm.models import llama
from kronjax.lm.training import pruning
from kronjax.lm.training.settings import Pruning

CONFIG = llama.Config(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=30,
    tie_word_embeddings=True,
)


def make():
    return llama.Model(CONFIG, rngs=nnx.Rngs(0))


@given(
    st.integers(0, 99), st.sampled_from([1e-200, 1e-20, 1.0, 1e20]), st.integers(1, 5)
)
def test_the_stable_rank_is_below_the_rank_and_knows_no_scale(seed, scale, rank):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(8, rank)) @ rng.normal(size=(rank, 6))
    one, other = (spectra.of_kernel("", x) for x in (kernel, scale * kernel))
    assert one.rank == other.rank == rank
    assert 1 <= one.stable_rank <= rank * (1 + 1e-12)
    assert other.stable_rank == pytest.approx(one.stable_rank)
    assert one.spectral == pytest.approx(np.linalg.norm(kernel, 2))
    assert other.frobenius == pytest.approx(scale * np.linalg.norm(kernel))


def test_a_kronecker_product_has_the_product_of_stable_ranks():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 6)), rng.normal(size=(3, 5))
    one, two, both = (spectra.of_kernel("", x) for x in (a, b, np.kron(a, b)))
    assert both.stable_rank == pytest.approx(one.stable_rank * two.stable_rank)
    assert both.rank == one.rank * two.rank


def test_zeros_and_what_is_not_finite():
    zeros = spectra.of_kernel("fc", np.zeros((3, 4)))
    assert (zeros.spectral, zeros.stable_rank, zeros.rank) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"h\.0\.fc has entries"):
        spectra.of_kernel("h.0.fc", np.full((2, 2), np.nan))


def test_the_ratio_of_bounds_is_that_of_the_definitions():
    before, after = make(), make()
    pruning.prune(after, Pruning(0.5, match="*.mlp.*"))
    layer = nn.linear_layers(after)["layers.0.self_attn.q_proj"]
    layer.kernel[...] *= 3.0
    name = "layers.1.mlp.up_proj"
    terms = KroneckerTerms(jnp.ones((1, 4, 4)), jnp.ones((1, 4, 8)))
    nn.replace(after, name, nn.KroneckerLinear([terms]))

    def bound(model):
        kernels = [
            np.asarray(nn.dense(x).kernel[...], np.float64)
            for x in nn.linear_layers(model).values()
        ]
        norms = [np.linalg.norm(x, 2) for x in kernels]
        sranks = [
            (np.linalg.norm(x) / n) ** 2 for x, n in zip(kernels, norms, strict=True)
        ]
        return np.prod(norms) ** 2 * sum(sranks)

    found = spectra.compare(before, after)
    expected = np.log10(bound(after) / bound(before))
    assert found.log10_bound == pytest.approx(expected, rel=1e-6)
    plain = json.loads(json.dumps(found.plain(), allow_nan=False))
    by_name = {one["name"]: one for one in plain["layers"]}
    assert by_name[name]["after"]["stable_rank"] == pytest.approx(1)
    kinds = {row[0]: row for row in spectra.rows(plain)}
    assert len(kinds) == 7 and all(len(row) == 7 for row in kinds.values())
    assert "10^" in spectra.verdict(plain)
    assert spectra.compare(before, make()).log10_bound == 0


def test_models_of_other_layers_are_refused():
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    few = llama.Model(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="other layers"):
        spectra.compare(make(), few)
