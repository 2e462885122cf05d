"""Truncation against closed forms, and refusals."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from language_models import make_llama

from kronjax import lm, nn
from kronjax.kronecker import KroneckerTerms, rearrange
from kronjax.lm.compression import truncate
from kronjax.lm.compression.moments import Moments
from kronjax.lm.models import sizes
from kronjax.lm.training import pruning
from kronjax.lm.training.settings import Pruning

TOKENS = np.arange(12, dtype=np.int32).reshape(1, 12)
UP = "layers.0.mlp.up_proj"


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def kernel(layer):
    return np.asarray(layer.materialize(), np.float64)


def tail(matrix, rank):
    """The Frobenius error of the best approximation of a rank."""
    values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    return np.linalg.norm(values[rank:])


@pytest.mark.parametrize("method", ["low-rank", "interpolative"])
def test_stages_of_low_rank_truncate_the_current_kernel(method):
    model, match = make_llama(num_hidden_layers=1), ["*.up_proj", "*.down_proj"]
    every = nn.linear_layers(model)
    layers = {k: every[k] for k in every if k.endswith(("up_proj", "down_proj"))}
    total = {k: np.prod(nn.shape_of(v)) for k, v in layers.items()}
    old = {k: np.asarray(v.kernel[...]) for k, v in layers.items()}
    for fraction in truncate.fractions(0.4, 2):
        changed = truncate.to_fraction(model, fraction, match=match, method=method)
        assert set(changed) == set(total)
        for name in changed:
            layer = nn.linear_layers(model)[name]
            cost, rank = nn.cost(layer).parameters, layer.rank
            assert cost <= fraction * total[name]
            more = sum(nn.shape_of(layer)) - 2 * rank * (method == "interpolative")
            assert cost + more > fraction * total[name]  # one rank more is too much
            # The best of the dense kernel is also the best of what it was cut to.
            error = np.linalg.norm(kernel(layer) - old[name])
            np.testing.assert_allclose(error, tail(old[name], rank), rtol=1e-3)
    assert truncate.to_fraction(model, 0.5, match=match, method=method) == []


def test_moments_weight_the_truncation():
    model, rng = make_llama(num_hidden_layers=1), np.random.default_rng(0)
    names = list(nn.linear_layers(model))
    half = {
        n: rng.normal(size=(nn.shape_of(x)[0],) * 2) ** 3
        for n, x in nn.linear_layers(model).items()
    }
    inputs = {n: (x @ x.T).astype(np.float32) for n, x in half.items()}
    moments = Moments({n: n for n in names}, inputs, {}, 9, "", shrinkage=0)
    old = np.asarray(nn.linear_layers(model)[UP].kernel[...], np.float64)
    truncate.to_fraction(model, 0.5, match=UP, moments=moments)
    layer = nn.linear_layers(model)[UP]
    root = np.linalg.cholesky(inputs[UP].astype(np.float64)).T
    error = np.linalg.norm(root @ (kernel(layer) - old))
    assert error == pytest.approx(tail(root @ old, layer.rank), rel=1e-2)


@pytest.mark.parametrize("scales", [False, True])
def test_truncated_sums_are_nearest_even_after_training(scales):
    # Far from orthogonal, as after training: the second half repeats the first, nearly.
    a = jnp.concatenate([draw(3, 4, 8), draw(3, 4, 8) + 0.1 * draw(3, 4, 8, seed=1)])
    terms = KroneckerTerms(a, 8 * draw(6, 4, 4, seed=2))
    order = np.random.default_rng(0).permutation(16)
    layer = nn.KroneckerLinear(
        [terms], jnp.ones(32), rows=order, scales=[draw(6)] if scales else None
    )
    whole = rearrange(jnp.asarray(layer.terms[0].to_matrix()), (4, 8))
    for rank in (1, 4, 6, 9):
        made = layer.truncate([rank])
        assert made.a[0].shape[0] == min(rank, 6)
        lost = np.linalg.norm(kernel(made) - kernel(layer))
        np.testing.assert_allclose(lost, tail(whole, rank), rtol=1e-3, atol=1e-3)
        flat = np.asarray(made.a[0][...]).reshape(min(rank, 6), -1)
        gram = flat @ flat.T
        assert np.allclose(gram, np.diag(np.diag(gram)), atol=1e-4 * gram.max())
    assert (made.scales is not None) == scales
    assert np.array_equal(made.inputs[...], layer.inputs[...])


def test_kronecker_layers_of_a_model_get_fewer_terms_in_proportion():
    model = make_llama(num_hidden_layers=1)
    layer = nn.KroneckerLinear(
        [
            KroneckerTerms(draw(8, 4, 8), draw(8, 4, 4)),
            KroneckerTerms(draw(4, 16, 1), draw(4, 1, 32)),
        ]
    )
    nn.replace(model, UP, layer)
    assert truncate.to_fraction(model, 0.5, match=UP) == [UP]
    made = nn.linear_layers(model)[UP]
    assert [x.shape[0] for x in made.a] == [3, 1]
    assert nn.cost(made).parameters <= 256


def test_low_rank_factors_are_nearest_and_smaller(tmp_path):
    model = make_llama(num_hidden_layers=1)
    nn.replace(
        model, UP, nn.KroneckerLinear([KroneckerTerms(draw(2, 8, 16), draw(2, 2, 2))])
    )
    layer = nn.linear_layers(model)[UP]
    before, old = nn.cost(layer).parameters, np.asarray(layer.a[0][...])
    truncate.inside(layer, "a", 3)
    truncate.inside(layer, "b", 1)  # would not be smaller
    assert isinstance(layer.b[0], nnx.Param)
    assert before - nn.cost(layer).parameters == 2 * (8 * 16 - 3 * 24)
    for k in range(2):
        error = np.linalg.norm(np.asarray(layer.a[0][...])[k] - old[k])
        np.testing.assert_allclose(error, tail(old[k], 3), rtol=1e-4)
    described = {x.name: x.kind for x in sizes.count(model).layers}
    assert described[UP] == "2 × 8x16 of rank 3 ⊗ 2x2"
    lm.save(model, tmp_path)
    np.testing.assert_array_equal(lm.load(tmp_path)(TOKENS), model(TOKENS))


def test_masks_are_never_undone():
    model = make_llama(num_hidden_layers=1)
    pruning.begin(model, Pruning(0.5, match="*.up_proj"))
    with pytest.raises(ValueError, match=f"{UP}: masks"):
        truncate.to_fraction(model, 0.5)
    layer = nn.KroneckerLinear([KroneckerTerms(draw(2, 8, 16), draw(2, 2, 2))])
    layer.a[0] = nn.MaskedFactor(layer.a[0][...], jnp.ones((2, 8, 16), bool))
    with pytest.raises(ValueError, match="undo"):
        layer.truncate([1])
    with pytest.raises(ValueError, match="undo its mask"):
        truncate.inside(layer, "a", 1)
    for to, stages in ((1.0, 2), (0.0, 2), (-1, 2), (0.5, 0)):
        with pytest.raises(ValueError, match="between 0 and 1|at least one"):
            truncate.fractions(to, stages)
    with pytest.raises(ValueError, match="matches no layer"):
        truncate.to_fraction(model, 0.5, match="h.*")
