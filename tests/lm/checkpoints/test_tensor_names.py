"""Names of tensors: prefixes of wrappers, and heads that are tied to embeddings."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from ports import make

from kronjax import lm
from kronjax.io.notes import Note
from kronjax.lm.checkpoints.tensor_names import are_copies

EMBEDDINGS = {
    "gpt2": "transformer.wte.weight",
    "opt": "model.decoder.embed_tokens.weight",
    "llama-tied": "model.embed_tokens.weight",
}


def edit(folder, change):
    """Replace the tensors of a folder by the result of a function of them."""
    path = folder / "model.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path)


def same(a, b):
    """Return whether two models have the same parameters; NaN equals NaN."""
    leaves = (jax.tree.leaves(nnx.state(x)) for x in (a, b))
    return all(
        np.array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32), True)
        for x, y in zip(*leaves, strict=True)
    )


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "base_model.model.",
        "_forward_module.",
        "module._orig_mod.",
        "_orig_mod.module.base_model.model.",
        "net.student.",
    ],
)
@pytest.mark.parametrize("case", ["gpt2", "opt-untied", "llama"])
def test_prefixes_of_wrappers_are_removed_and_told(tmp_path, prefix, case):
    model = make(case)
    lm.save(model, tmp_path)
    edit(tmp_path, lambda t: {prefix + name: x for name, x in t.items()})
    with pytest.warns(Note, match=f"the prefix {prefix} of the names"):
        assert same(lm.load(tmp_path), model)


def test_marks_of_wrapped_blocks_are_removed(tmp_path):
    model = make("llama")
    lm.save(model, tmp_path)
    edit(
        tmp_path,
        lambda t: {
            name.replace("layers.1.", "layers.1._orig_mod."): x for name, x in t.items()
        },
    )
    with pytest.warns(Note, match="_orig_mod"):
        assert same(lm.load(tmp_path), model)


def test_a_prefix_that_only_some_names_have_is_no_wrapper(tmp_path):
    lm.save(make("llama"), tmp_path)
    name = "lm_head.weight"
    edit(tmp_path, lambda t: {("module." + k if k == name else k): t[k] for k in t})
    with pytest.raises(ValueError, match=r"1 missing \(lm_head.* left over \(module"):
        lm.load(tmp_path)


def test_an_adapter_that_is_not_merged_is_refused(tmp_path):
    lm.save(make("llama"), tmp_path)
    more = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": 1}
    edit(tmp_path, lambda t: t | {name: np.ones(2) for name in more})
    with pytest.raises(ValueError, match="lora_A.weight .* merge_and_unload"):
        lm.load(tmp_path)


@pytest.mark.parametrize("case", sorted(EMBEDDINGS))
@pytest.mark.parametrize("stored", ["head", "both"])
def test_a_tied_head_may_be_stored_under_either_name(tmp_path, case, stored):
    model, name = make(case), EMBEDDINGS[case]
    lm.save(model, tmp_path)
    keep = {} if stored == "head" else {name}

    def change(tensors):
        copy = {"lm_head.weight": tensors[name]}
        return {k: x for k, x in tensors.items() if k != name or k in keep} | copy

    edit(tmp_path, change)
    assert same(lm.load(tmp_path), model)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_two_copies_of_tied_weights_are_compared_after_a_common_cast(tmp_path, dtype):
    model = make("llama-tied")
    model.embed_tokens.embedding[...] = (
        model.embed_tokens.embedding[...].at[3, 4].set(np.nan)
    )
    lm.save(model, tmp_path)
    name = EMBEDDINGS["llama-tied"]
    edit(tmp_path, lambda t: t | {"lm_head.weight": t[name].astype(dtype)})
    assert same(lm.load(tmp_path), model)
    edit(tmp_path, lambda t: t | {"lm_head.weight": 2 * t[name]})
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        lm.load(tmp_path)
    path = tmp_path / "config.json"  # the remedy works
    values = json.loads(path.read_text()) | {"tie_word_embeddings": False}
    path.write_text(json.dumps(values))
    assert not lm.load(tmp_path).config.tie_word_embeddings


def test_copies_are_equal_only_with_equal_shapes():
    x = np.float32([[1, np.nan]])
    assert are_copies(x, x.astype(ml_dtypes.bfloat16))
    assert not are_copies(x, x.T)
    assert not are_copies(x, np.float32([[1, 2]]))


@pytest.mark.parametrize("ending", ["qweight", "scales", "weight_scale", "SCB"])
def test_quantised_tensors_are_named(tmp_path, ending):
    lm.save(make("llama"), tmp_path)
    name = f"model.layers.0.mlp.up_proj.{ending}"
    edit(tmp_path, lambda t: t | {name: np.ones(2, np.int32)})
    words = rf"quantised \(tensor layers.0.mlp.up_proj.{ending}\).*before quantisation"
    with pytest.raises(ValueError, match=words):
        lm.load(tmp_path)


def test_a_missing_head_names_a_remedy_that_works(tmp_path):
    lm.save(make("llama"), tmp_path)
    edit(tmp_path, lambda t: {k: x for k, x in t.items() if k != "lm_head.weight"})
    with pytest.raises(ValueError, match="set tie_word_embeddings to true"):
        lm.load(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text()) | {"tie_word_embeddings": True}
    path.write_text(json.dumps(values))
    assert lm.load(tmp_path).config.tie_word_embeddings
