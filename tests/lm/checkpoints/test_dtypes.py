"""Dtypes of tensors from load to export, and sizes of files."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from ports import VARIANTS, make

from kronjax import lm, nn
from kronjax.kronecker import KroneckerTerms
from kronjax.lm.checkpoints import dtypes, hugging_face

TOKENS = np.arange(1, 11, dtype=np.int32).reshape(2, 5)
BF16 = np.dtype(ml_dtypes.bfloat16)


def mixed(folder, case="llama", weights=BF16):
    """Save a model with vectors in float32 and matrices in another dtype."""
    lm.save(make(case), folder)
    path = folder / "model.safetensors"
    tensors = {
        name: x.astype(weights if x.ndim == 2 else np.float32)
        for name, x in safetensors.numpy.load_file(path).items()
    }
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    return {name: x.dtype for name, x in tensors.items()}


def stored(folder):
    path = folder / "model.safetensors"
    return {name: x.dtype for name, x in safetensors.numpy.load_file(path).items()}


def size(folder):
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("case", ["gpt2", "opt-untied", "llama"])
@pytest.mark.parametrize("weights", [BF16, np.dtype(np.float16)])
def test_every_tensor_keeps_its_dtype(tmp_path, case, weights):
    expected = mixed(tmp_path / "source", case, weights)
    model = lm.load(tmp_path / "source")
    lm.save(model, tmp_path / "saved")
    lm.export(model, tmp_path / "export")
    for folder in ("saved", "export"):
        assert stored(tmp_path / folder) == expected
        assert size(tmp_path / folder) == size(tmp_path / "source")
        values = json.loads((tmp_path / folder / "config.json").read_text())
        assert values["dtype"] == str(weights)  # that of most parameters
    assert np.isfinite(np.asarray(model(TOKENS), np.float32)).all()


def test_a_factored_layer_is_exported_in_the_dtype_of_its_factors(tmp_path):
    """A float32 layer, as `approximate` returns it, in a bfloat16 model."""
    model = hugging_face.cast(make("gpt2"), "bfloat16")
    layer = nn.linear_layers(model)["h.0.mlp.c_fc"]
    a, b = jnp.ones((1, 12, 48)), jnp.full((1, 2, 2), 0.1)
    bias = layer.bias[...]
    nn.replace(model, "h.0.mlp.c_fc", nn.KroneckerLinear([KroneckerTerms(a, b)], bias))
    assert model.empty_cache(1, 4).layers[0][0].dtype == jnp.float32
    lm.export(model, tmp_path)
    found = stored(tmp_path)
    assert found.pop("transformer.h.0.mlp.c_fc.weight") == np.float32
    assert set(found.values()) == {BF16}
    expected = np.asarray(model(TOKENS), np.float32)
    got = np.asarray(lm.load(tmp_path)(TOKENS), np.float32)
    np.testing.assert_allclose(got, expected, atol=0.05 * np.abs(expected).max())


def test_new_parameters_take_the_dtype_of_the_kernel_they_replace(tmp_path):
    mixed(tmp_path)
    dense = lm.load(tmp_path)
    smaller = hugging_face.cast(dense, "float32")
    layer = nn.linear_layers(smaller)["layers.0.mlp.up_proj"]
    m, n = nn.shape_of(layer)
    terms = KroneckerTerms(jnp.ones((2, m, 1)), jnp.ones((2, 1, n)))
    nn.replace(smaller, "layers.0.mlp.up_proj", nn.KroneckerLinear([terms]))
    back = dtypes.restored(smaller, dense)
    for path, variable in nnx.to_flat_state(nnx.state(back)):
        is_norm = path[-1] == "scale"
        assert variable.get_value().dtype == (np.float32 if is_norm else BF16), path


@pytest.mark.parametrize("case", sorted(VARIANTS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_size_of_a_file_is_known_before_it_is_written(tmp_path, case, dtype):
    model = hugging_face.cast(make(case), dtype)
    for number, (name, layer) in enumerate(nn.linear_layers(model).items()):
        kernel = layer.kernel[...]
        m, n = kernel.shape
        if number == 1:
            nn.replace(model, name, nn.MaskedLinear(kernel, kernel > 0, None))
        if number == 2:
            ones = np.ones((m, 3), np.float32), np.ones((3, n), np.float32)
            nn.replace(model, name, nn.InterpolativeLinear.of(*ones))
        lm.save(model, tmp_path)
        if number < 4:
            assert dtypes.file_size(model) == size(tmp_path)


def test_an_outline_has_the_dtypes_of_the_file_or_of_the_config(tmp_path):
    mixed(tmp_path)
    outline = hugging_face.outline(tmp_path)
    assert dtypes.file_size(outline) == size(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert dtypes.main_dtype(hugging_face.outline(tmp_path)) == np.float32
    path = tmp_path / "config.json"
    values = json.loads(path.read_text()) | {"torch_dtype": "bfloat16"}
    del values["dtype"]
    path.write_text(json.dumps(values))
    assert dtypes.main_dtype(hugging_face.outline(tmp_path)) == BF16


def test_eight_bit_floats_are_read_only_in_a_dtype_that_computes(tmp_path):
    model = make("llama")
    lm.save(model, tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = safetensors.numpy.load_file(path)
    small = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    # safetensors writes no such array: the bytes get another dtype in the header.
    tensors[name] = small.view(np.uint8)
    content = safetensors.numpy.save(tensors)
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b'"U8"', b'"F8_E4M3"')
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    with pytest.raises(ValueError, match=r"float8_e4m3fn.*--dtype bfloat16"):
        lm.load(tmp_path)
    back = lm.load(tmp_path, dtype="bfloat16")
    kernel = np.asarray(back.layers[1].mlp.up_proj.kernel[...], np.float32)
    np.testing.assert_array_equal(kernel.T, small.astype(np.float32))
