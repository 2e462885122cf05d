"""Folders in and out: what is saved comes back, what is wrong is refused by name."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx, serialization

from kronjax import lm, nn
from kronjax.kronecker import KroneckerTerms
from kronjax.lm import checkpoint, gpt2, llama, opt, storage

CONFIGS = {
    "gpt2": (gpt2, {"n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 16}),
    "gpt2-untied": (
        gpt2,
        {
            "n_embd": 12,
            "n_layer": 1,
            "n_head": 2,
            "n_positions": 16,
            "tie_word_embeddings": False,
        },
    ),
    "opt": (
        opt,
        {
            "hidden_size": 12,
            "num_hidden_layers": 2,
            "ffn_dim": 20,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "word_embed_proj_dim": 6,
        },
    ),
    "llama": (
        llama,
        {
            "hidden_size": 12,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "rope_type": "llama3",
            "rope_factor": 2.0,
        },
    ),
}
TOKENS = np.arange(1, 11, dtype=np.int32).reshape(2, 5)


def make(case, seed=0):
    port, values = CONFIGS[case]
    config = port.Config(vocab_size=300, **values)
    return port.Model(config, rngs=nnx.Rngs(seed))


def factor(model, kinds="kmh"):
    """Give the first layers other kinds: Kronecker, masked, a sum of two kinds."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        dtype = jax.tree.leaves(nnx.state(model))[0].dtype
        return jnp.asarray(rng.normal(size=shape), dtype)

    for kind, (name, layer) in zip(
        kinds, nn.linear_layers(model).items(), strict=False
    ):
        m, n = layer.in_features, layer.out_features
        bias = None if layer.bias is None else draw(n)
        square = KroneckerTerms(draw(2, m // 2, n // 2), draw(2, 2, 2))
        kernel = draw(m, n)
        low = KroneckerTerms(draw(3, m, 1), draw(3, 1, n))
        made = {
            "k": lambda terms=square, b=bias: nn.KroneckerLinear([terms], b),
            "h": lambda terms=(square, low), b=bias: nn.KroneckerLinear(terms, b),
            "m": lambda k=kernel, b=bias: nn.MaskedLinear(k, k > 0.2, b),
        }[kind]()
        nn.replace(model, name, made)
    return model


def logits(model):
    return np.asarray(model(TOKENS))


@pytest.mark.parametrize("case", sorted(CONFIGS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_comes_back_bit_by_bit(case, dtype, tmp_path, tokenizer):
    lm.save(make(case), tmp_path / "dense")
    model = factor(lm.load(tmp_path / "dense", dtype=dtype))
    model.tokenizer, model.recipe = tokenizer, "layers: all\n"
    lm.save(model, tmp_path / "out")
    back = lm.load(tmp_path / "out")
    assert {type(x) for x in nn.linear_layers(back).values()} == {
        nnx.Linear,
        nn.KroneckerLinear,
        nn.MaskedLinear,
    }
    np.testing.assert_array_equal(logits(back), logits(model))
    assert logits(back).dtype == dtype
    assert back.tokenizer == tokenizer and back.recipe == model.recipe
    assert back.config == model.config


@pytest.mark.parametrize("case", sorted(CONFIGS))
def test_an_export_is_dense_and_computes_the_same(case, tmp_path):
    model = factor(make(case))
    expected = logits(model)
    lm.export(model, tmp_path / "out")
    back = lm.load(tmp_path / "out")
    assert {type(x) for x in nn.linear_layers(back).values()} == {nnx.Linear}
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits(back), expected, atol=1e-5 * scale)
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["model_type"] == case.partition("-")[0]
    # The model itself is as it was.
    np.testing.assert_array_equal(logits(model), expected)


def test_an_exact_representation_leaves_the_logits_unchanged():
    from kronjax import kronecker

    model = make("gpt2")
    expected = logits(model)
    for name, layer in nn.linear_layers(model).items():
        kernel = layer.kernel[...]
        r = kronecker.rearrange(kernel, (3, 4))
        u, s, vt = np.linalg.svd(np.asarray(r), full_matrices=False)
        m2, n2 = kernel.shape[0] // 3, kernel.shape[1] // 4
        terms = KroneckerTerms(
            jnp.asarray((u * s).T.reshape(-1, 3, 4)),
            jnp.asarray(vt.reshape(-1, m2, n2)),
        )
        nn.replace(model, name, nn.KroneckerLinear([terms], layer.bias[...]))
    np.testing.assert_allclose(logits(model), expected, atol=1e-5)


def test_shards_and_old_names_are_read(tmp_path):
    model = make("gpt2")
    lm.save(model, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    tensors["h.0.attn.bias"] = np.ones((1, 1, 16, 16), np.float32)  # a causal mask
    tensors["lm_head.weight"] = tensors["wte.weight"]
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for i in range(2):
        part = {name: tensors[name] for name in names[i::2]}
        file = f"model-0000{i + 1}-of-00002.safetensors"
        safetensors.numpy.save_file(part, tmp_path / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / storage.INDEX).write_text(json.dumps({"weight_map": index}))
    np.testing.assert_array_equal(logits(lm.load(tmp_path)), logits(model))


def test_a_head_that_differs_from_its_embedding_is_told(tmp_path):
    lm.save(make("gpt2"), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["lm_head.weight"] = 2 * tensors["transformer.wte.weight"]
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        lm.load(tmp_path)


def test_opt_is_read_from_flax_msgpack(tmp_path):
    """As Flax stored it: kernels [in, out], and its own words for weights."""
    model = make("opt")
    lm.save(model, tmp_path)
    nested = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        at = nested.setdefault("model", {}).setdefault("decoder", {})
        for key in path[:-1]:
            at = at.setdefault(str(key), {})
        at[path[-1]] = np.asarray(variable.get_value())
    (tmp_path / "model.safetensors").unlink()
    content = serialization.msgpack_serialize(nested)
    (tmp_path / storage.MSGPACK).write_bytes(content)
    np.testing.assert_array_equal(logits(lm.load(tmp_path)), logits(model))
    (tmp_path / storage.MSGPACK).write_bytes(content[:-100])
    with pytest.raises(ValueError, match="truncated"):
        lm.load(tmp_path)


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(folder, edit):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    safetensors.numpy.save_file(tensors, path)


def shard_outside(folder):
    outside = folder.parent / "outside.safetensors"
    shutil.copy(folder / "model.safetensors", outside)
    names = safetensors.numpy.load_file(outside)
    index = {"weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (folder / storage.INDEX).write_text(json.dumps(index))


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def only_a_pickle(folder):
    os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")


HARM = {
    "unknown architecture": (
        lambda x: edit_config(x, model_type="mamba"),
        "'mamba' is not supported; those of model_type gpt2, opt, llama",
    ),
    "missing tensor": (
        lambda x: edit_tensors(x, lambda t: t.pop("transformer.h.1.ln_1.bias")),
        r"1 missing \(h\.1\.ln_1\.bias\)",
    ),
    "extra tensor": (
        lambda x: edit_tensors(x, lambda t: t.update(more=np.zeros(2))),
        r"1 left over \(more\)",
    ),
    "wrong shape": (
        lambda x: edit_tensors(
            x, lambda t: t.update({"transformer.ln_f.bias": np.zeros(5)})
        ),
        r"ln_f\.bias has shape \(5,\), config\.json asks for \(12,\)",
    ),
    "sizes that lie": (
        lambda x: edit_config(x, n_embd=24),
        r"shape \(36,\), .* for \(72,\)",
    ),
    "a size without end": (
        lambda x: edit_config(x, n_layer=10**9),
        "1000000000 blocks",
    ),
    "a size that is no number": (
        lambda x: edit_config(x, n_embd="12"),
        "n_embd is '12'",
    ),
    "a size below one": (lambda x: edit_config(x, n_head=0), "n_head is 0"),
    "heads that do not divide": (
        lambda x: edit_config(x, n_head=5),
        "multiple of n_head",
    ),
    "an activation": (lambda x: edit_config(x, activation_function="x"), "'x'; known"),
    "integers": (
        lambda x: edit_tensors(
            x, lambda t: t.update({"transformer.ln_f.bias": np.zeros(12, int)})
        ),
        "int64",
    ),
    "a truncated file": (cut, "truncated"),
    "a path that climbs out": (shard_outside, "outside of its folder"),
    "a pickle": (only_a_pickle, "pickle.*save_pretrained"),
    "no JSON": (lambda x: (x / "config.json").write_text("{"), "not JSON"),
    "no mapping": (lambda x: (x / "config.json").write_text("[]"), "not a mapping"),
    "no config": (lambda x: (x / "config.json").unlink(), "no config.json"),
    "no weights": (lambda x: (x / "model.safetensors").unlink(), "no weights"),
    "a later format": (
        lambda x: edit_config(x, model_type="kronjax", format=2),
        "update kronjax",
    ),
}


@pytest.mark.parametrize("harm", sorted(HARM))
def test_what_is_wrong_with_a_folder_is_told(harm, tmp_path):
    folder = tmp_path / "model"
    lm.save(make("gpt2"), folder)
    damage, words = HARM[harm]
    damage(folder)
    with pytest.raises((ValueError, OSError), match=words):
        lm.load(folder)


def test_layers_that_do_not_fit_their_tensors_are_told(tmp_path):
    lm.save(factor(make("gpt2")), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["layers"]["h.0.attn.c_attn"]["terms"][0]["b"] = [2, 4, 2]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"c_attn maps 12 to 36.* 24 to 36"):
        lm.load(tmp_path)


def test_a_hub_name_without_a_network_names_the_remedy(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def fail(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match="no route.*local folder"):
        lm.load("openai-community/gpt2")


@pytest.mark.parametrize("name", ["no-such-folder", "./no/such", "/no/such/folder"])
def test_a_path_never_reaches_for_the_network(name, monkeypatch):
    monkeypatch.setattr(checkpoint, "_fetch", lambda name: pytest.fail(name))
    with pytest.raises(FileNotFoundError, match="owner/name"):
        lm.load(name)


def test_a_save_that_fails_leaves_the_old_folder(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    lm.save(make("gpt2", seed=0), folder)
    (folder / "metrics.jsonl").write_text("{}\n")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        lm.save(make("gpt2", seed=1), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_interruption_between_the_renames_leaves_the_old_folder(
    tmp_path, monkeypatch
):
    folder = tmp_path / "model"
    lm.save(make("gpt2", seed=0), folder)
    expected = logits(lm.load(folder))
    rename = os.rename

    def interrupted(source, target):
        if Path(source).name.endswith(".new"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lm.save(make("gpt2", seed=1), folder)
    np.testing.assert_array_equal(logits(lm.load(folder)), expected)


def test_a_save_replaces_the_model_and_keeps_the_rest(tmp_path, tokenizer):
    folder = tmp_path / "model"
    first = factor(make("gpt2"))
    first.tokenizer, first.recipe = tokenizer, "old\n"
    lm.save(first, folder)
    (folder / "metrics.jsonl").write_text("{}\n")
    second = make("gpt2", seed=1)
    lm.save(second, folder)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "metrics.jsonl", "model.safetensors"]
    modes = {(folder / name).stat().st_mode for name in names}
    assert len(modes) == 1  # as readable as anything else
    np.testing.assert_array_equal(logits(lm.load(folder)), logits(second))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_is_no_folder_to_save_in(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="it is a file"):
        lm.save(make("gpt2"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_settings_that_no_port_uses_are_written_back(tmp_path):
    lm.save(make("llama"), tmp_path)
    edit_config(tmp_path, bos_token_id=7, torch_dtype="float16")
    lm.export(lm.load(tmp_path), tmp_path / "out")
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["bos_token_id"] == 7
    assert values["dtype"] == "float32" and "torch_dtype" not in values
    assert values["rope_scaling"]["rope_type"] == "llama3"
    assert "rope_factor" not in values
