"""Round trips through folders of Hugging Face, and errors for damaged folders."""

import dataclasses
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
from ports import VARIANTS, make

from kronjax import lm, nn
from kronjax.kronecker import KroneckerTerms
from kronjax.lm.checkpoints import sources
from kronjax.lm.checkpoints.folder import INDEX, MSGPACK, SAVED, STAGING
from kronjax.lm.text.tokenizer import Tokenizer

TOKENS = np.arange(1, 11, dtype=np.int32).reshape(2, 5)


def factor(model, kinds="kmh"):
    """Replace the first layers and the token table of a model.

    The layers become of the kinds k (a Kronecker sum), m (masked) and h (a sum of two
    configurations).
    """
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
        new = {
            "k": lambda terms=square, b=bias: nn.KroneckerLinear([terms], b),
            "h": lambda terms=(square, low), b=bias: nn.KroneckerLinear(terms, b),
            "m": lambda k=kernel, b=bias: nn.MaskedLinear(k, k > 0.2, b),
        }[kind]()
        nn.replace(model, name, new)
    # Configurations of the table: two rows of B for each row of A, and low rank.
    name, table = next(iter(nn.tables(model).items()))
    m, n = nn.shape_of(table)
    terms = [
        KroneckerTerms(draw(2, m // 2, n // 2), draw(2, 2, 2)),
        KroneckerTerms(draw(1, m, 1), draw(1, 1, n)),
    ]
    nn.replace(model, name, nn.KroneckerEmbedding(terms))
    return model


def logits(model):
    return np.asarray(model(TOKENS))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, "float32") for case in sorted(VARIANTS)), ("gpt2", "bfloat16")],
)
def test_a_saved_model_loads_bit_by_bit(case, dtype, tmp_path, tokenizer):
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
    assert nn.KroneckerEmbedding in {type(x) for x in nn.tables(back).values()}
    np.testing.assert_array_equal(logits(back), logits(model))
    assert logits(back).dtype == dtype
    assert back.tokenizer == tokenizer and back.recipe == model.recipe
    assert back.config == model.config


@pytest.mark.parametrize("case", sorted(VARIANTS))
def test_an_export_is_dense_and_computes_the_same(case, tmp_path):
    model = factor(make(case))
    expected = logits(model)
    lm.export(model, tmp_path / "out")
    back = lm.load(tmp_path / "out")
    assert {type(x) for x in nn.linear_layers(back).values()} == {nnx.Linear}
    assert {type(x) for x in nn.tables(back).values()} == {nnx.Embed}
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits(back), expected, atol=1e-5 * scale)
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["model_type"] == case.partition("-")[0]
    # The model itself is unchanged.
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


def test_shards_and_names_without_prefix_are_read(tmp_path):
    model = make("gpt2")
    lm.save(model, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    tensors["h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.float32)  # a causal mask
    tensors["lm_head.weight"] = tensors["wte.weight"]
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for i in range(2):
        part = {name: tensors[name] for name in names[i::2]}
        file = f"model-0000{i + 1}-of-00002.safetensors"
        safetensors.numpy.save_file(part, tmp_path / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    np.testing.assert_array_equal(logits(lm.load(tmp_path)), logits(model))
    first = tmp_path / "model-00001-of-00002.safetensors"
    part = safetensors.numpy.load_file(first)
    safetensors.numpy.save_file({**part, "evil.extra": np.ones(2)}, first)
    with pytest.raises(ValueError, match="evil.extra, which the index lacks"):
        lm.load(tmp_path)


def test_a_tied_head_that_differs_from_its_embedding_raises_an_error(tmp_path):
    lm.save(make("gpt2"), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["lm_head.weight"] = 2 * tensors["transformer.wte.weight"]
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        lm.load(tmp_path)


def test_opt_is_read_from_flax_msgpack(tmp_path):
    """Flax stored kernels `[n_in, n_out]`, under its own names for weights."""
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
    (tmp_path / MSGPACK).write_bytes(content)
    np.testing.assert_array_equal(logits(lm.load(tmp_path)), logits(model))
    (tmp_path / MSGPACK).write_bytes(content[:-100])
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
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def only_a_pickle(folder):
    os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")


HARM = {
    "unknown architecture": (
        lambda x: edit_config(x, model_type="mamba"),
        "model_type 'mamba' is not supported; supported are gpt2, opt, llama",
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
        r"ln_f\.bias has shape \(5,\), config\.json asks for \(24,\)",
    ),
    "sizes that contradict the tensors": (
        lambda x: edit_config(x, n_embd=48),
        r"shape \(72,\), .* for \(144,\)",
    ),
    "an enormous number of blocks": (
        lambda x: edit_config(x, n_layer=10**9),
        "1000000000 blocks",
    ),
    "a size that is not a number": (
        lambda x: edit_config(x, n_embd="24"),
        "n_embd is '24'",
    ),
    "a size below one": (lambda x: edit_config(x, n_head=0), "n_head is 0"),
    "heads that do not divide": (
        lambda x: edit_config(x, n_head=5),
        "multiple of n_head",
    ),
    "an activation": (lambda x: edit_config(x, activation_function="x"), "'x'; known"),
    "integers": (
        lambda x: edit_tensors(
            x, lambda t: t.update({"transformer.ln_f.bias": np.zeros(24, int)})
        ),
        "int64",
    ),
    "a truncated file": (cut, "truncated"),
    "a shard outside the folder": (shard_outside, "outside of its folder"),
    "a pickle": (only_a_pickle, "pickle.*save_pretrained"),
    "a model type that is a list": (
        lambda x: edit_config(x, model_type=["x"]),
        "not supp",
    ),
    "NaN": (
        lambda x: (x / "config.json").write_text('{"model_type": NaN}'),
        "NaN is not a JSON number",
    ),
    "a recipe in bytes": (
        lambda x: (x / "recipe.yaml").write_bytes(b"\xff"),
        "recipe.yaml is not text",
    ),
    "a config that is not JSON": (
        lambda x: (x / "config.json").write_text("{"),
        "not JSON",
    ),
    "a config that is not a mapping": (
        lambda x: (x / "config.json").write_text("[]"),
        "not a mapping",
    ),
    "no config": (lambda x: (x / "config.json").unlink(), "no config.json"),
    "no weights": (lambda x: (x / "model.safetensors").unlink(), "no weights"),
    "a later format": (
        lambda x: edit_config(x, model_type="kronjax", format=2),
        "update kronjax",
    ),
}


@pytest.mark.parametrize("harm", sorted(HARM))
def test_a_damaged_folder_raises_an_error_that_names_the_damage(harm, tmp_path):
    folder = tmp_path / "model"
    lm.save(make("gpt2"), folder)
    damage, words = HARM[harm]
    damage(folder)
    with pytest.raises((ValueError, OSError), match=words):
        lm.load(folder)


def test_layers_that_do_not_fit_their_tensors_raise_an_error(tmp_path):
    lm.save(factor(make("gpt2")), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["layers"]["h.0.attn.c_attn"]["terms"][0]["b"] = [2, 4, 2]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"c_attn maps 24 to 72.* 48 to 72"):
        lm.load(tmp_path)


def test_a_hub_name_without_a_network_names_the_remedy(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def fail(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match="no route.*local folder"):
        lm.load("openai-community/gpt2")


def test_of_subfolders_on_the_hub_only_chat_templates_are_fetched():
    huggingface_hub = pytest.importorskip("huggingface_hub")
    wanted = ["config.json", "a.json", "additional_chat_templates/rag.jinja"]
    others = ["onnx/config.json", "adapter/adapter_model.safetensors", "model.bin"]
    kept = huggingface_hub.utils.filter_repo_objects(
        wanted + others,
        allow_patterns=sources.HUB_FILES,
        ignore_patterns=sources.OTHER_FOLDERS,
    )
    assert list(kept) == wanted


def test_a_pickle_on_the_hub_is_refused(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path)
    )
    monkeypatch.setattr(
        huggingface_hub, "list_repo_files", lambda name: ["pytorch_model.bin"]
    )
    with pytest.raises(ValueError, match="someone/model holds.*a pickle"):
        lm.load("someone/model")


@pytest.mark.parametrize("name", ["no-such-folder", "./no/such", "/no/such/folder"])
def test_a_path_never_uses_the_network(name, monkeypatch):
    monkeypatch.setattr(sources, "_fetch", lambda name: pytest.fail(name))
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


@pytest.mark.parametrize("step", range(8))
def test_a_killed_save_leaves_a_complete_model(step, tmp_path, tokenizer):
    """Each call that changes a folder is once the last one, as in a power failure."""
    folder = tmp_path / "model"
    first, second = make("gpt2", seed=0), factor(make("gpt2", seed=1))
    first.tokenizer, second.recipe = tokenizer, "new\n"
    lm.save(first, folder)
    (folder / "log.txt").write_text("mine")
    before, after = logits(first), logits(second)
    with pytest.MonkeyPatch.context() as patch:
        calls = iter(range(100))
        for name in ("rename", "replace"):
            patch.setattr(os, name, killed_at(step, calls, getattr(os, name)))
        patch.setattr(Path, "unlink", killed_at(step, calls, Path.unlink))
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        try:
            lm.save(second, folder)
            done = True
        except KeyboardInterrupt:
            done = False
    back = lm.load(folder)
    got = logits(back)
    assert np.array_equal(got, after) or (step == 0 and np.array_equal(got, before))
    assert done or step < 6
    assert (back.recipe == "new\n") == np.array_equal(got, after)
    assert (folder / "log.txt").read_text() == "mine"
    assert not (folder / SAVED).exists()


def killed_at(step, calls, function):
    def call(*args, **kwargs):
        if next(calls) == step:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call


def test_staging_folders_of_killed_saves_are_removed_later(tmp_path):
    left = tmp_path / f"{STAGING}x"
    left.mkdir()
    lm.save(make("gpt2"), tmp_path)
    assert left.exists()  # its save may still be running
    os.utime(left, (0, 0))
    lm.save(make("gpt2"), tmp_path)
    assert not left.exists()


def test_a_save_replaces_the_model_and_keeps_the_rest(tmp_path, tokenizer, monkeypatch):
    folder = tmp_path / "model"
    first = factor(make("gpt2"))
    first.tokenizer, first.recipe = tokenizer, "old\n"
    lm.save(first, folder)
    others = ("metrics.jsonl", "model-best.safetensors", "weights.bin")
    for name in others:
        (folder / name).write_text("mine")
    old = ("merges.txt", "model-00001-of-00002.safetensors", INDEX, "report.json")
    for name in old:
        (folder / name).write_text("{}")
    second = make("gpt2", seed=1)
    second.tokenizer = tokenizer
    (tmp_path / "link").symlink_to(folder)
    lm.save(second, tmp_path / "link")
    names = {path.name for path in folder.iterdir()}
    ours = {"config.json", "model.safetensors", *tokenizer.files}
    assert names == {*ours, *others}
    assert len({(folder / name).stat().st_mode for name in names}) == 1
    np.testing.assert_array_equal(logits(lm.load(folder)), logits(second))
    monkeypatch.chdir(folder)
    lm.save(first, ".")
    np.testing.assert_array_equal(logits(lm.load(".")), logits(first))


def test_chat_templates_are_saved_with_their_folder(tmp_path, tokenizer):
    extra = {"chat_template.jinja": b"a", "additional_chat_templates/rag.jinja": b"b"}
    model = make("gpt2")
    model.tokenizer = Tokenizer({**tokenizer.files, **extra})
    for folder in (tmp_path / "first", tmp_path / "second"):
        lm.save(model, folder)
        assert not (folder / SAVED).exists()
        model = lm.load(folder)
        assert model.tokenizer.files.keys() == {*tokenizer.files, *extra}
    model.tokenizer = tokenizer
    lm.save(model, folder)
    assert lm.load(folder).tokenizer == tokenizer


def test_a_full_disk_raises_an_os_error(tmp_path, monkeypatch):
    def fail(*args):
        raise safetensors.SafetensorError("I/O error")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="cannot write .*I/O error"):
        lm.save(make("gpt2"), tmp_path / "out")


def test_save_and_load_expand_a_home_folder_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    lm.save(make("gpt2"), "~/model")
    assert (tmp_path / "model/config.json").exists()
    assert lm.load("~/model").config.n_embd == 24
    with pytest.raises(OSError, match="no such user"):
        lm.load("~nobody-of-this-name/model")


def test_saving_over_a_file_raises_an_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="it is a file"):
        lm.save(make("gpt2"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_settings_that_no_port_uses_are_written_back(tmp_path):
    model = make("llama")
    scaling = {"rope_type": "llama3", "rope_factor": 2.0}
    model.config = dataclasses.replace(model.config, origin="{}", **scaling)
    lm.save(model, tmp_path)
    edit_config(tmp_path, bos_token_id=7, torch_dtype="float16")
    lm.export(lm.load(tmp_path), tmp_path / "out")
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["bos_token_id"] == 7
    assert values["dtype"] == "float32" and "torch_dtype" not in values
    assert values["rope_scaling"]["rope_type"] == "llama3"
    assert "rope_factor" not in values
