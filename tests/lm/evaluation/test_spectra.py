"""Spectral norms, stable ranks and ratios of bounds, compared with definitions."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from language_models import make_llama

from kronjax import nn
from kronjax.kronecker import KroneckerTerms
from kronjax.lm.evaluation import spectra
from kronjax.lm.training import pruning
from kronjax.lm.training.settings import Pruning


@given(
    st.integers(0, 99), st.sampled_from([1e-200, 1e-20, 1.0, 1e20]), st.integers(1, 5)
)
def test_the_stable_rank_is_at_most_the_rank_and_scale_invariant(seed, scale, rank):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(8, rank)) @ rng.normal(size=(rank, 6))
    plain, scaled = (spectra.of_kernel("", x) for x in (kernel, scale * kernel))
    assert plain.rank == scaled.rank == rank
    assert 1 <= plain.stable_rank <= rank * (1 + 1e-12)
    assert scaled.stable_rank == pytest.approx(plain.stable_rank)
    assert plain.spectral == pytest.approx(np.linalg.norm(kernel, 2))
    assert scaled.frobenius == pytest.approx(scale * np.linalg.norm(kernel))


def test_the_stable_rank_of_a_kronecker_product_is_a_product():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 6)), rng.normal(size=(3, 5))
    left, right, both = (spectra.of_kernel("", x) for x in (a, b, np.kron(a, b)))
    assert both.stable_rank == pytest.approx(left.stable_rank * right.stable_rank)
    assert both.rank == left.rank * right.rank


def test_kernels_of_zeros_and_of_nan():
    zeros = spectra.of_kernel("fc", np.zeros((3, 4)))
    assert (zeros.spectral, zeros.stable_rank, zeros.rank) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"h\.0\.fc has entries"):
        spectra.of_kernel("h.0.fc", np.full((2, 2), np.nan))


def test_the_ratio_of_bounds_follows_the_definition():
    before, after = make_llama(), make_llama()
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

    comparison = spectra.compare(before, after)
    expected = np.log10(bound(after) / bound(before))
    assert comparison.log10_bound == pytest.approx(expected, rel=1e-6)
    plain = json.loads(json.dumps(comparison.plain(), allow_nan=False))
    by_name = {layer["name"]: layer for layer in plain["layers"]}
    assert by_name[name]["after"]["stable_rank"] == pytest.approx(1)
    kinds = {row[0]: row for row in spectra.rows(plain)}
    assert len(kinds) == 7 and all(len(row) == 7 for row in kinds.values())
    assert "10^" in spectra.verdict(plain)
    assert spectra.compare(before, make_llama()).log10_bound == 0


def test_models_with_different_layers_raise_an_error():
    few = make_llama(num_hidden_layers=1)
    with pytest.raises(ValueError, match="different layers"):
        spectra.compare(make_llama(), few)
