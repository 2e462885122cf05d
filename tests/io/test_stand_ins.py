"""Files that are not what their names say, and the remedies that messages name."""

import gzip
import io
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from kronjax.io import json_values, matrices, stand_ins, tensors

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\n"
    b"size 269060552\n"
)


def archive():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", b"x")
    return buffer.getvalue()


WRONG = {
    "pointer": (POINTER, "Git LFS pointer: run git lfs pull"),
    "gzip": (gzip.compress(b"{}", mtime=0), "gzip: unpack it with gunzip"),
    "page": (b"\n <!DOCTYPE html><title>Sign in</title>", "HTML page.* download"),
    "pickle": (pickle.dumps([1, 2], 2), "a pickle.* save_pretrained"),
    "archive": (archive(), "a zip archive.* save_pretrained"),
}


@pytest.mark.parametrize("kind", sorted(WRONG))
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "x.npy"])
def test_messages_name_the_kind_of_a_wrong_file_and_the_remedy(tmp_path, kind, name):
    content, words = WRONG[kind]
    if name == "x.npy" and kind in ("pickle", "archive"):
        words = "never unpickled|should it end in .npz"
    (tmp_path / name).write_bytes(content)
    readers = {
        "model.safetensors": matrices.map_tensors,
        "config.json": json_values.read_json,
        "x.npy": matrices.read,
    }
    with pytest.raises(ValueError, match=words) as error:
        readers[name](tmp_path / name)
    assert name in str(error.value)


def test_a_file_of_the_right_kind_is_not_described(tmp_path):
    for length in range(1, 40):  # headers of many lengths, 0x80 among them
        path = tmp_path / "x.safetensors"
        safetensors.numpy.save_file({"a" * length: np.ones(2)}, path)
        assert stand_ins.describe_file(path) is None
    assert stand_ins.describe(b'{"model_type": "gpt2"}') is None


def test_a_pickle_is_no_matrix(tmp_path):
    (tmp_path / "x.pt").write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="x.pt is a pickle.*never opened: store"):
        matrices.read(tmp_path / "x.pt")


@pytest.mark.parametrize("inside", [False, True])
def test_factorize_never_opens_a_pickle(tmp_path, inside):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="only as a pickle .*save_pretrained"):
        tensors.map_all(tmp_path if inside else path)
