"""Memory maps of files and folders of tensors."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from kronjax.io import tensors
from kronjax.io.notes import Note


def write(path, **tensors):
    safetensors.numpy.save_file(tensors, path)


def index(folder, where, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"weight_map": where}))


def test_files_folders_and_shards_give_the_same_tensors(tmp_path):
    a, b = np.arange(6.0).reshape(2, 3), np.ones(2, np.float32)
    for folder in ("one", "two", "three"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "one" / "any.safetensors", a=a, b=b)
    for folder in ("two", "three"):
        write(tmp_path / folder / "x.safetensors", a=a)
        write(tmp_path / folder / "y.safetensors", b=b)
    index(
        tmp_path / "three",
        {"a": "x.safetensors", "b": "y.safetensors"},
        "d" + tensors.INDEX,
    )
    write(tmp_path / "three" / "other.safetensors", a=a)  # the index does not name it
    places = ["one", "one/any.safetensors", "two", "three"]
    for place in places:
        mapped = tensors.map_all(tmp_path / place)
        assert sorted(mapped) == ["a", "b"]
        np.testing.assert_array_equal(mapped["a"], a)
        assert mapped["a"].base is not None  # a view of the file


@pytest.mark.parametrize("with_index", [False, True])
def test_a_tensor_in_two_shards_is_refused(tmp_path, with_index):
    write(tmp_path / "x.safetensors", a=np.ones(2), b=np.ones(2))
    write(tmp_path / "y.safetensors", a=np.ones(2))
    if with_index:
        index(tmp_path, {"b": "x.safetensors", "a": "y.safetensors"})
    with pytest.raises(ValueError, match=r"tensor a is in both .\.safetensors and"):
        tensors.map_all(tmp_path)


@pytest.mark.parametrize("shard", ["../x", "/dev/zero", "", "..", "a/b.safetensors"])
def test_an_index_may_not_name_files_outside_of_its_folder(tmp_path, shard):
    index(tmp_path, {"a": shard})
    with pytest.raises(ValueError, match="outside of its folder"):
        tensors.map_all(tmp_path)


def test_files_and_folders_without_tensors_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no .safetensors"):
        tensors.map_all(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        tensors.map_all(tmp_path / "x")
    (tmp_path / "x.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="neither"):
        tensors.map_all(tmp_path / "x.txt")
    index(tmp_path, {"a": "x"})
    index(tmp_path, {"a": "x"}, "b.safetensors.index.json")
    with pytest.raises(ValueError, match="2 indices"):
        tensors.map_all(tmp_path)


def test_a_single_file_comes_before_shards(tmp_path):
    old, new = np.zeros((2, 2)), np.ones((2, 2))
    shard = "model-00001-of-00001.safetensors"
    write(tmp_path / shard, a=old)
    write(tmp_path / "model.safetensors", a=new)
    for with_index in (False, True):
        if with_index:
            index(tmp_path, {"a": shard})
        with pytest.warns(Note, match="holds model.safetensors and .*is read, in the"):
            mapped = tensors.map_all(tmp_path)
        np.testing.assert_array_equal(mapped["a"], new)
    (tmp_path / shard).unlink()
    with pytest.warns(Note):
        np.testing.assert_array_equal(tensors.map_all(tmp_path)["a"], new)


def test_shards_without_an_index_are_read_if_all_are_there(tmp_path):
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        write(tmp_path / name, **{f"x{number}": np.ones((2, 2))})
    assert sorted(tensors.map_all(tmp_path)) == ["x1", "x2"]
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002-of-00002"):
        tensors.map_all(tmp_path)


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16]
)
def test_tensors_of_few_bits_are_mapped_as_they_are(tmp_path, dtype):
    x = np.linspace(-2, 2, 12).reshape(3, 4).astype(dtype)
    code = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "bfloat16": "BF16"}
    entry = {"dtype": code[str(x.dtype)], "shape": [3, 4]}
    entry["data_offsets"] = [0, x.nbytes]
    header = json.dumps({"x": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + x.tobytes()
    (tmp_path / "x.safetensors").write_bytes(content)
    mapped = tensors.map_all(tmp_path)["x"]
    assert mapped.dtype == x.dtype
    np.testing.assert_array_equal(np.float32(mapped), np.float32(x))
