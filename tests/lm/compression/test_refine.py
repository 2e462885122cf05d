import numpy as np
import pytest
from flax import nnx
from language_models import make_llama

from kronjax import nn, recipe
from kronjax.io.cache import Cache
from kronjax.lm.compression import pipeline, refine

RULES = recipe.loads("""
rules:
  - {match: "layers.1.mlp.*", method: low-rank, fraction: 0.4, weighting: none}
  - {match: "*", method: keep}
""")


@pytest.fixture(scope="module")
def dense():
    return make_llama()


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 30, 20 * 16).astype(np.int32)


def kernels(model):
    layers = nn.linear_layers(model)
    return {k: np.asarray(nn.dense(v).kernel[...]) for k, v in layers.items()}


def test_refinement_reduces_the_error_of_a_block(dense, tokens):
    model = pipeline.compress(dense, RULES)
    before = kernels(model)
    found = refine.refine(
        model, dense, tokens, steps=60, context=16, rate=1e-2, progress=False
    )
    assert found[0] is None  # this block has no factors
    assert found[1].kept
    assert found[1].after < 0.9 * found[1].before
    after = kernels(model)
    for name in before:
        changed = not np.array_equal(before[name], after[name])
        assert changed == name.startswith("layers.1.mlp.")
    assert isinstance(nn.linear_layers(model)["layers.1.mlp.up_proj"].a[0], nnx.Param)


def test_factors_that_are_worse_on_held_out_windows_are_dropped(dense, tokens):
    model = pipeline.compress(dense, RULES)
    before = kernels(model)
    found = refine.refine(
        model, dense, tokens, steps=3, context=16, rate=30.0, progress=False
    )
    assert not found[1].kept
    for name, kernel in kernels(model).items():
        np.testing.assert_array_equal(kernel, before[name])


def test_short_texts_are_refused(dense):
    model = pipeline.compress(dense, RULES)
    with pytest.raises(ValueError, match="9 windows"):
        refine.refine(model, dense, np.zeros(100, np.int32), context=16)


def test_finished_blocks_are_not_trained_again(dense, tokens, tmp_path, monkeypatch):
    def run():
        model = pipeline.compress(dense, RULES)
        done = refine.refine(
            model,
            dense,
            tokens,
            steps=60,
            context=16,
            rate=1e-2,
            work=Cache(tmp_path),
            progress=False,
        )
        return done, kernels(model)

    done, first = run()
    monkeypatch.setattr(refine, "_train", lambda *_: pytest.fail("trained again"))
    again, second = run()
    assert done == again
    for name, kernel in first.items():
        np.testing.assert_array_equal(kernel, second[name])
