"""Pruning: masks, schedules, and masks as data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from language_models import make_llama

from kronjax import lm, nn
from kronjax.kronecker import KroneckerTerms
from kronjax.lm.compression.moments import Moments
from kronjax.lm.models import sizes
from kronjax.lm.training import masks, saliency
from kronjax.lm.training.pruning import Gradual, begin, prune, sparsity
from kronjax.lm.training.settings import Pruning

TOKENS = np.arange(12, dtype=np.int32).reshape(1, 12)


class Two(nnx.Module):
    """Two layers without a language model."""

    def __init__(self):
        self.up = nnx.Linear(16, 32, use_bias=False, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(32, 16, use_bias=False, rngs=nnx.Rngs(1))


def mixed():
    """A model with a Kronecker sum with scalars and an interpolative layer."""
    model, rng = make_llama(num_hidden_layers=1), np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    square = KroneckerTerms(draw(2, 4, 8), draw(2, 4, 4))
    low = KroneckerTerms(draw(3, 16, 1), draw(3, 1, 32))
    layer = nn.KroneckerLinear([square, low], scales=[draw(2), draw(3)])
    nn.replace(model, "layers.0.mlp.up_proj", layer)
    layer = nn.InterpolativeLinear.of(draw(32, 5), draw(5, 16))
    nn.replace(model, "layers.0.mlp.down_proj", layer)
    return model


@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.5, 0.5, 1.0, 3.0, 1e30]), min_size=6),
    st.integers(1, 6),
)
def test_the_largest_of_all_arrays_are_kept_also_with_ties(values, count):
    draws = np.array((values * 2)[:12], np.float32)
    first, second = masks_of(draws[:4], draws[4:].reshape(2, 4), count)
    flat = np.concatenate([first, second.ravel()])
    assert flat.sum() == count
    # Of equal scores the first, as in a stable sort.
    expected = np.argsort(-draws, kind="stable")[:count]
    assert set(np.flatnonzero(flat)) == set(expected)


@jax.jit
def _both(a, b, count):
    return masks.keep_largest([a, b], count)


def masks_of(a, b, count):
    return map(np.asarray, _both(jnp.asarray(a), jnp.asarray(b), count))


def test_too_many_entries_are_refused():
    huge = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    with pytest.raises(ValueError, match="prune by layers"):
        jax.eval_shape(lambda x: masks.keep_largest([x], 5), huge)


def test_a_pattern_keeps_the_largest_of_every_group():
    x = np.abs(np.random.default_rng(0).normal(size=(2, 8, 3))).astype(np.float32)
    x[0, :4, 0] = 1  # ties
    mask = np.asarray(masks.keep_pattern(jnp.asarray(x), 2, 4))
    groups, kept = x.reshape(2, 2, 4, 3), mask.reshape(2, 2, 4, 3)
    assert np.all(kept.sum(axis=2) == 2)
    smallest = np.where(kept, groups, np.inf).min(axis=2)
    assert np.all(smallest >= np.where(kept, 0, groups).max(axis=2))
    assert mask[0, :4, 0].tolist() == [True, True, False, False]


@pytest.mark.parametrize("weighted", [False, True])
def test_a_score_is_the_error_of_zeroing_an_entry(weighted):
    rng, model = np.random.default_rng(1), mixed()
    for name in ("layers.0.mlp.up_proj", "layers.0.mlp.down_proj"):
        layer = nn.linear_layers(model)[name]
        half = rng.normal(size=(layer.in_features, 7))
        moment = half @ half.T if weighted else np.eye(layer.in_features)
        found = saliency.of(
            layer, jnp.asarray(moment, jnp.float32) if weighted else None
        )
        root = np.linalg.cholesky(moment + 1e-9 * np.eye(len(moment))).T
        whole = np.asarray(layer.materialize(), np.float64)
        for place, score in found.items():
            part = layer.parts()[place]
            for _ in range(4):
                at = tuple(rng.integers(0, part.shape))
                value = part[...]
                part[...] = value.at[at].set(0)
                lost = np.asarray(layer.materialize(), np.float64) - whole
                part[...] = value
                expected = np.linalg.norm(root @ lost)
                np.testing.assert_allclose(score[at], expected, rtol=1e-3, atol=1e-4)


def test_scores_respect_the_order_of_the_inputs():
    rng = np.random.default_rng(0)
    order = rng.permutation(8)
    moment = np.diag(np.arange(1.0, 9)).astype(np.float32)
    terms = KroneckerTerms(jnp.ones((1, 8, 1)), jnp.ones((1, 1, 3)))
    layer = nn.KroneckerLinear([terms], rows=order)
    found = saliency.of(layer, moment)["a"]
    np.testing.assert_allclose(found[0, :, 0] ** 2, 3 * (order + 1), rtol=1e-5)


@pytest.mark.parametrize("scope", ["layer", "global", "output"])
def test_exactly_the_requested_entries_are_pruned(scope):
    model = Two()
    dense = {k: np.abs(v.kernel[...]) for k, v in nn.linear_layers(model).items()}
    prune(model, Pruning(0.75, scope))
    layers = nn.linear_layers(model)
    kept = {k: np.asarray(v.mask[...]) for k, v in layers.items()}
    total = sum(x.size for x in kept.values())
    assert sum(x.sum() for x in kept.values()) == total // 4
    assert sparsity(model) == pytest.approx(0.75)
    for name, mask in kept.items():
        assert np.array_equal(np.asarray(layers[name].kernel[...]) != 0, mask)
        if scope == "output":
            assert np.all(mask.sum(axis=0) == len(mask) // 4)
        if scope == "layer":
            least = dense[name][mask].min()
            assert least >= dense[name][~mask].max()
    if scope == "global":
        assert len({x.mean() for x in kept.values()}) > 1
        every = [
            (np.array(dense[k])[m], np.array(dense[k])[~m]) for k, m in kept.items()
        ]
        assert min(x.min() for x, _ in every) >= max(x.max() for _, x in every)


def test_moments_weight_the_scores():
    model = Two()
    names = list(nn.linear_layers(model))
    draws = np.random.default_rng(0)
    inputs = {
        k: np.diag(draws.random(v.in_features) ** 4).astype(np.float32)
        for k, v in nn.linear_layers(model).items()
    }
    moments = Moments({k: k for k in names}, inputs, {}, 10, "", shrinkage=0)
    kernels = {k: np.asarray(v.kernel[...]) for k, v in nn.linear_layers(model).items()}
    prune(model, Pruning(0.5, "output"), moments)
    for name, layer in nn.linear_layers(model).items():
        score = np.abs(kernels[name]) * np.sqrt(np.diag(inputs[name]))[:, None]
        order = np.argsort(-score, axis=0)[: len(score) // 2]
        expected = np.zeros(score.shape, bool)
        np.put_along_axis(expected, order, True, axis=0)
        assert np.array_equal(layer.mask[...], expected)


def test_pruning_is_invariant_to_the_scaling_of_factors():
    first, second = mixed(), mixed()
    layer = nn.linear_layers(second)["layers.0.mlp.up_proj"]
    layer.a[0][...] *= 64.0
    layer.b[0][...] /= 64.0
    for model in (first, second):
        prune(model, Pruning(0.5, match="*.mlp.*"))
    masked, scaled = (
        nn.linear_layers(x)["layers.0.mlp.up_proj"].a[0].mask[...]
        for x in (first, second)
    )
    assert np.array_equal(masked, scaled)
    low = nn.linear_layers(first)["layers.0.mlp.down_proj"]
    assert nn.cost(low).parameters == round(nn.cost(low).held / 2)
    attention = nn.linear_layers(first)["layers.0.self_attn.q_proj"]
    assert isinstance(attention, nnx.Linear)


def test_masked_models_are_saved_loaded_exported_and_counted(tmp_path):
    model = mixed()
    prune(model, Pruning(0.5, match="*.mlp.*"))
    expected = np.asarray(model(TOKENS))
    lm.save(model, tmp_path / "masked")
    back = lm.load(tmp_path / "masked")
    np.testing.assert_array_equal(np.asarray(back(TOKENS)), expected)
    assert sizes.count(back) == sizes.count(model)
    counted = sizes.count(model)
    held = sum(x.held for x in counted.layers if ".mlp." in x.name)
    assert counted.held - counted.parameters == pytest.approx(held / 2, abs=4)
    assert "4x8 ⊗ 4x4 + 3 × 16x1 ⊗ 1x32, masked" in {
        x.kind.removeprefix("2 × ") for x in counted.layers
    }
    lm.export(back, tmp_path / "dense")
    dense = lm.load(tmp_path / "dense")
    assert {type(x) for x in nn.linear_layers(dense).values()} == {nnx.Linear}
    np.testing.assert_allclose(dense(TOKENS), expected, rtol=2e-4, atol=1e-5)
    kernel = np.asarray(nn.linear_layers(dense)["layers.0.mlp.gate_proj"].kernel[...])
    assert np.mean(kernel == 0) == 0.5


def test_a_schedule_only_removes_entries_and_then_stops():
    model = Two()
    pruning = Pruning(0.6, steps=10, every=4, begin=2)
    begin(model, pruning)
    hook = Gradual(pruning, 20)
    assert sorted(hook.schedule) == [2, 6, 10, 12]
    graph, _ = nnx.split(model)
    before, seen = None, []
    for step in range(21):
        hook(step, model)
        layers = nn.linear_layers(model)
        now = np.concatenate([np.ravel(x.mask[...]) for x in layers.values()])
        if before is not None:
            assert not np.any(now & ~before)
        assert hook.due(step) == (step in (6, 10, 12))
        seen.append(round(1 - now.mean(), 2))
        before = now
        # Training may change masked values; they stay masked.
        for layer in layers.values():
            layer.kernel[...] += 5.0 * ~layer.mask[...]
    assert seen[:6] == [0] * 6 and seen[12:] == [0.6] * 9
    assert nnx.split(model)[0] == graph  # so nothing is compiled again


def test_a_pattern_is_reached_step_by_step():
    model = Two()
    pruning = Pruning(pattern=(2, 4), steps=8, every=1)
    hook = Gradual(pruning, 8)
    shares = []
    for step in range(9):
        hook(step, model)
        if step:
            layers = nn.linear_layers(model).values()
            kept = np.concatenate([np.ravel(x.mask[...]) for x in layers])
            shares.append(kept.mean())
    assert set(shares) == {1, 0.75, 0.5} and shares == sorted(shares, reverse=True)
    for layer in nn.linear_layers(model).values():
        groups = np.asarray(layer.mask[...]).reshape(-1, 4, layer.out_features)
        assert np.all(groups.sum(axis=1) == 2)


@pytest.mark.parametrize("given", [1.0, -0.1, float("nan"), 2, None])
def test_sparsities_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match=r"at least 0 and below 1"):
        Pruning(given)


def test_impossible_prunings_are_refused_with_the_layer():
    with pytest.raises(ValueError, match="write 2:4"):
        Pruning(pattern=(4, 2))
    with pytest.raises(ValueError, match="leave out the sparsity"):
        Pruning(0.3, pattern=(2, 4))
    with pytest.raises(ValueError, match="write layer, global or output"):
        Pruning(0.3, "row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every is 0"):
        Pruning(0.3, every=0)
    with pytest.raises(ValueError, match="ends at step 30, the run has 20"):
        Gradual(Pruning(0.5, steps=30), 20)
    with pytest.raises(ValueError, match=r"layers.0.mlp.\w+_proj: .* all outputs"):
        begin(mixed(), Pruning(0.5, "output"))
    with pytest.raises(ValueError, match="cannot be grouped for 2:7"):
        begin(make_llama(num_hidden_layers=1), Pruning(pattern=(2, 7)))
    with pytest.raises(ValueError, match="matches no layer"):
        begin(make_llama(num_hidden_layers=1), Pruning(0.5, match="h.*"))
    model = mixed()
    layer = nn.linear_layers(model)["layers.0.mlp.up_proj"]
    layer.a[0] = nn.LowRankFactor(jnp.ones((2, 4, 1)), jnp.ones((2, 1, 8)))
    with pytest.raises(ValueError, match="no entries of its own"):
        begin(model, Pruning(0.5))


def test_masked_entries_stay_masked_at_lower_sparsity():
    model = Two()
    prune(model, Pruning(0.75))
    before = sparsity(model)
    prune(model, Pruning(0.25))
    assert sparsity(model) == before


def test_sparsity_zero_changes_nothing():
    model, expected = Two(), Two()
    prune(model, Pruning(0.0))
    x = jnp.ones((1, 16), jnp.float32)
    np.testing.assert_array_equal(model.up(x), expected.up(x))
    assert sparsity(model) == 0
