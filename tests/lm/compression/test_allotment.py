"""Budgets of whole models, against the files that are written."""

import re

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from ports import make

from kronjax import lm, nn
from kronjax.lm.compression import candidates, pipeline, plan
from kronjax.runs import engine

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def mixed():
    """A model with matrices in bfloat16 and vectors in float32."""
    model = make("llama", hidden_size=48, intermediate_size=96, head_dim=8)
    graph, state = nnx.split(model)
    state = jax.tree.map(lambda x: x.astype(BF16) if x.ndim == 2 else x, state)
    return nnx.merge(graph, state)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Leave out mixtures, which take long to compile."""
    monkeypatch.setattr(candidates, "probe", lambda *_: [])


def written(model, folder):
    lm.save(model, folder)
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("part", [0.55, 0.7, 0.85, 0.99, 1.0])
def test_a_budget_in_bytes_holds_for_the_file(mixed, tmp_path, part):
    whole = written(mixed, tmp_path / "dense")
    budget = round(part * whole)
    done = pipeline.run(mixed, f"{budget / 1e3}KB", progress=False)
    size = written(done.model, tmp_path / "small")
    assert 0.85 * budget < size <= budget
    kept = nnx.to_flat_state(nnx.state(done.model, nnx.Param))
    for path, variable in kept:
        value = variable.get_value()
        assert value.dtype == (np.float32 if path[-1] == "scale" else BF16), path


def test_a_budget_of_the_whole_file_changes_nothing(mixed, tmp_path):
    whole = written(mixed, tmp_path / "dense")
    made = plan.make(mixed, f"{whole / 1e3}KB", progress=False)
    assert not any(choice.method.changes for choice in made.choices)


@pytest.mark.parametrize("budget", ["16KB", "5KB", "1K", "7K", "10KFLOP", "0.02"])
def test_an_impossible_budget_is_refused_with_the_smallest_possible(
    mixed, tmp_path, budget
):
    with pytest.raises(ValueError, match="smallest possible|leaves nothing") as error:
        plan.make(mixed, budget, progress=False)
    unit = budget.lstrip("0123456789.")
    words = re.search(rf"([0-9.]+{unit})( or more)?$", str(error.value))
    done = pipeline.run(mixed, words[1], progress=False)  # the remedy works
    if unit == "KB":
        assert written(done.model, tmp_path) <= 1e3 * float(words[1].removesuffix("KB"))


def damaged(model, name="layers.0.mlp.up_proj"):
    """Return a copy of a model with a NaN in a kernel."""
    copy = nnx.merge(*nnx.split(model))
    kernel = nn.linear_layers(copy)[name].kernel
    kernel[...] = kernel[...].at[0, 0].set(np.nan)
    return copy


def test_a_damaged_kernel_stays_dense_and_the_others_keep_the_budget(mixed, tmp_path):
    model = damaged(mixed)
    done = pipeline.run(model, "60KB", progress=False)
    assert written(done.model, tmp_path) <= 60_000
    (failed,) = done.failed
    assert failed.name == "layers.0.mlp.up_proj"
    assert failed.reason == "stays dense: it holds NaN or infinite entries"
    with pytest.raises(ValueError, match="smallest possible"):
        pipeline.run(model, "28KB", progress=False)


def test_fits_that_fail_never_exceed_a_budget(mixed, monkeypatch):
    decomposed = engine._decomposed

    def fail(target, cache):
        is_hit = target.matrix.shape == (48, 96)
        return None if is_hit else decomposed(target, cache)

    monkeypatch.setattr(engine, "_decomposed", fail)
    words = (
        r"takes .*, more than its budget of 50,000 bytes, for [1-4] layers could not"
    )
    with pytest.raises(ValueError, match=words):
        pipeline.run(mixed, "50KB", progress=False)
