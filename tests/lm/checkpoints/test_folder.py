"""Several checkpoints in one folder, and files that are missing or stand in."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx, serialization
from ports import make

from kronjax import lm
from kronjax.io.notes import Note
from kronjax.lm.checkpoints.folder import INDEX, MSGPACK

TOKENS = np.arange(1, 11, dtype=np.int32).reshape(2, 5)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 269060552\n"


def logits(model):
    return np.asarray(model(TOKENS))


def shards(folder, count=2, *, with_index=True):
    """Replace `model.safetensors` by shards."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    names, where = sorted(tensors), {}
    for i in range(count):
        file = f"model-0000{i + 1}-of-0000{count}.safetensors"
        part = {name: tensors[name] for name in names[i::count]}
        safetensors.numpy.save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    if with_index:
        (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    path.unlink()
    return sorted(set(where.values()))


def msgpack(model, folder):
    nested = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        at = nested.setdefault("transformer", {})
        for key in path[:-1]:
            at = at.setdefault(str(key), {})
        value = np.asarray(variable.get_value())
        # GPT-2 alone stores its kernels as [n_in, n_out] in safetensors files.
        at[path[-1]] = value.T if path[-1] == "kernel" else value
    (folder / MSGPACK).write_bytes(serialization.msgpack_serialize(nested))


@pytest.fixture
def two(tmp_path):
    """A folder with `model.safetensors` of a model, and older shards of another."""
    new, old = make("gpt2", seed=1), make("gpt2", seed=2)
    lm.save(old, tmp_path)
    files = shards(tmp_path)
    lm.save(new, tmp_path / "new")
    shutil.move(tmp_path / "new/model.safetensors", tmp_path)
    return tmp_path, new, old, files


def test_a_single_file_comes_before_an_index_of_older_shards(two):
    folder, new, _, files = two
    words = "model.safetensors is read, in the order of transformers"
    for missing in ("", *files):
        (folder / (missing or "nothing")).unlink(missing_ok=True)
        with pytest.warns(Note, match=words):
            np.testing.assert_array_equal(logits(lm.load(folder)), logits(new))


@pytest.mark.parametrize("content", [POINTER, "{}", ""])
def test_a_damaged_index_does_not_matter_beside_a_single_file(two, content):
    folder, new, _, _ = two
    (folder / INDEX).write_text(content)
    with pytest.warns(Note, match="model.safetensors is read, in the order of"):
        np.testing.assert_array_equal(logits(lm.load(folder)), logits(new))


def test_complete_shards_are_read_in_place_of_a_pointer(two):
    folder, _, old, files = two
    (folder / "model.safetensors").write_text(POINTER)
    with pytest.warns(Note, match="json is read, for model.safetensors is a Git LFS"):
        np.testing.assert_array_equal(logits(lm.load(folder)), logits(old))
    (folder / files[1]).write_text(POINTER)
    with (
        pytest.warns(Note),
        pytest.raises(ValueError, match="model.safetensors: this is a Git LFS pointer"),
    ):
        lm.load(folder)


def test_a_complete_msgpack_is_read_where_a_shard_is_missing(two):
    folder, new, _, files = two
    (folder / "model.safetensors").unlink()
    msgpack(new, folder)
    (folder / files[0]).unlink()
    with pytest.warns(Note, match=f"{MSGPACK} is read, for {files[0]} is missing"):
        np.testing.assert_array_equal(logits(lm.load(folder)), logits(new))
    (folder / MSGPACK).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {files[0]}.*download it"):
        lm.load(folder)


def test_shards_without_their_index_are_read(tmp_path):
    model = make("opt")
    lm.save(model, tmp_path)
    files = shards(tmp_path, with_index=False)
    np.testing.assert_array_equal(logits(lm.load(tmp_path)), logits(model))
    (tmp_path / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {files[1]}"):
        lm.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adapter_model.safetensors", "only an adapter.*merge_and_unload"),
        ("pytorch_model.bin", "only as a pickle.*save_pretrained"),
        ("model-q4.gguf", "no weights but model-q4.gguf: give the path"),
        ("readme.md", "holds no weights"),
    ],
)
def test_a_folder_without_weights_says_what_it_holds(tmp_path, name, words):
    lm.save(make("gpt2"), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises((ValueError, OSError), match=words):
        lm.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.safetensors", "without their config.json: give the folder"),
        ("model.pt", "only as a pickle.*save_pretrained"),
        ("model.onnx", "neither a folder nor a .gguf file"),
    ],
)
def test_a_file_that_is_no_model_says_what_to_give(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=words):
        lm.load(tmp_path / name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", MSGPACK])
def test_a_git_lfs_pointer_is_named_with_its_remedy(tmp_path, name):
    lm.save(make("gpt2"), tmp_path)
    if name == MSGPACK:
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text(POINTER)
    words = f"{name}: this is a Git LFS pointer: run git lfs pull"
    with pytest.raises(ValueError, match=words):
        lm.load(tmp_path)
