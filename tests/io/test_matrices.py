"""Matrices from files, factors into files, and atomic writes."""

import os
import re
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from helpers import kronecker_sum_reference

from kronjax.io import atomic, matrices

MATRIX = np.arange(48, dtype=np.float32).reshape(6, 8)
OTHER = np.ones((4, 2), np.float32)
BIAS = np.ones(5, np.float32)


def save(folder, suffix, **arrays):
    path = folder / f"file{suffix}"
    if suffix == ".npy":
        (array,) = arrays.values()
        np.save(path, array)
    elif suffix == ".npz":
        np.savez(path, **arrays)
    else:
        safetensors.numpy.save_file(arrays, path)
    return path


@pytest.mark.parametrize("suffix", matrices.SUFFIXES)
def test_a_file_with_one_matrix_needs_no_name(tmp_path, suffix):
    source = matrices.read(save(tmp_path, suffix, weight=MATRIX))
    np.testing.assert_array_equal(source.matrix, MATRIX)
    assert source.name == (None if suffix == ".npy" else "weight")
    assert (source.a_shape, source.rank) == (None, None)


@pytest.mark.parametrize("suffix", matrices.SUFFIXES[1:])
def test_vectors_beside_the_only_matrix_are_ignored(tmp_path, suffix):
    path = save(tmp_path, suffix, weight=MATRIX, bias=BIAS)
    assert matrices.read(path).name == "weight"


@pytest.mark.parametrize("suffix", matrices.SUFFIXES)
@pytest.mark.parametrize("shape", [(6, 8), (3, 6, 8), (2, 1, 6, 8)])
def test_rows_and_columns_are_taken_before_transposing(tmp_path, suffix, shape):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    path = save(tmp_path, suffix, weight=array)
    source = matrices.read(path, rows="1:5", columns="-3:", transpose=True)
    np.testing.assert_array_equal(
        source.matrix, np.swapaxes(array[..., 1:5, -3:], -1, -2)
    )
    assert source.matrix.flags.c_contiguous


@pytest.mark.parametrize("code", sorted(set(matrices.SAFETENSORS_DTYPES) - {"BOOL"}))
def test_every_dtype_of_safetensors_is_read_exactly(tmp_path, code):
    matrix = MATRIX.astype(matrices.SAFETENSORS_DTYPES[code])
    path = save(tmp_path, ".safetensors", bias=BIAS, weight=matrix)
    with safetensors.safe_open(path, framework="np") as file:
        assert file.get_slice("weight").get_dtype() == code
    array = matrices.read(path).matrix
    assert array.dtype == matrix.dtype
    np.testing.assert_array_equal(array, matrix)


def test_all_tensors_are_mapped_and_masks_are_not_matrices(tmp_path):
    mask = MATRIX > 0
    path = save(tmp_path, ".safetensors", bias=BIAS, mask=mask)
    mapped = matrices.map_tensors(path)
    np.testing.assert_array_equal(mapped["mask"], mask)
    np.testing.assert_array_equal(mapped["bias"], BIAS)
    with pytest.raises(ValueError, match="dtype bool, not real numbers"):
        matrices.read(path, tensor="mask")


def test_foreign_byte_order_becomes_native(tmp_path):
    path = save(tmp_path, ".npy", weight=MATRIX.astype(">f4"))
    array = matrices.read(path).matrix
    assert array.dtype.isnative
    np.testing.assert_array_equal(array, MATRIX)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, range(8)),
        (":", range(8)),
        ("2:", range(2, 8)),
        (":-2", range(6)),
        ("-8:8", range(8)),
        (" 3 : 4 ", range(3, 4)),
    ],
)
def test_slices_follow_python(text, expected):
    assert range(8)[matrices.select(text, 8)] == expected


@pytest.mark.parametrize("text", ["3", "", "a:b", "1:2:3", "1.5:2", "9:", ":9", "-9:"])
def test_invalid_slices_are_refused(text):
    with pytest.raises(ValueError, match=r"--columns .*8"):
        matrices.select(text, 8, "columns")


@pytest.mark.parametrize("text", ["3:3", "5:2", "8:", "-1:0"])
def test_empty_slices_are_refused(text):
    with pytest.raises(ValueError, match="none of the 8 rows"):
        matrices.select(text, 8)


@pytest.mark.parametrize("suffix", matrices.SUFFIXES[1:])
def test_several_matrices_are_listed_and_close_names_suggested(tmp_path, suffix):
    path = save(tmp_path, suffix, query=MATRIX, value=OTHER, bias=BIAS)
    with pytest.raises(ValueError, match=r"2 matrices.*--tensor: query, value"):
        matrices.read(path)
    with pytest.raises(ValueError, match="no tensor qurey; did you mean query"):
        matrices.read(path, tensor="qurey")
    with pytest.raises(ValueError, match="no tensor zzz"):
        matrices.read(path, tensor="zzz")
    with pytest.raises(ValueError, match="bias is a vector"):
        matrices.read(path, tensor="bias")
    assert matrices.read(path, tensor="value").matrix.shape == (4, 2)


@pytest.mark.parametrize("suffix", matrices.SUFFIXES)
@pytest.mark.parametrize(
    ("array", "message"),
    [
        (BIAS, r"a vector of shape \(5,\)"),
        (np.float32(1), "a single number"),
        (np.ones((0, 3), np.float32), r"empty: its shape is \(0, 3\)"),
    ],
)
def test_arrays_that_are_not_matrices_are_refused(tmp_path, suffix, array, message):
    with pytest.raises(ValueError, match=message):
        matrices.read(save(tmp_path, suffix, weight=np.asarray(array)))


@pytest.mark.parametrize("suffix", matrices.SUFFIXES[:2])
@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1, None], [2, 3]], object), "never unpickled"),
        (MATRIX.astype(complex), "complex"),
        (MATRIX.astype(str), "not real numbers"),
        (MATRIX.astype(ml_dtypes.bfloat16), "bfloat16 as .safetensors"),
    ],
)
def test_arrays_of_other_than_real_numbers_are_refused(
    tmp_path, suffix, array, message
):
    with pytest.raises(ValueError, match=message):
        matrices.read(save(tmp_path, suffix, weight=array))


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_bare_pickle_is_refused(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ValueError, match="never unpickled"):
        matrices.read(path)


@pytest.mark.parametrize("suffix", matrices.SUFFIXES)
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.6, 0.97])
def test_truncated_files_are_reported(tmp_path, suffix, kept):
    path = save(tmp_path, suffix, weight=MATRIX)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    kind = rf"truncated or not an? {suffix[1:]} file"
    with pytest.raises(ValueError, match=kind):
        matrices.read(path)


def npy_content(header):
    """The bytes of a .npy file with any header and 16 zeros as data."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(16)


# NumPy answers with a TokenError, an OverflowError, a TypeError, and a RuntimeWarning
# before the ValueError; all warnings are errors in these tests.
@pytest.mark.parametrize(
    "shape", ["(2,2", f"({10**30}, 2)}}", "(2.5, 2)}", f"({2**62}, {2**62})}}"]
)
@pytest.mark.parametrize("suffix", matrices.SUFFIXES[:2])
def test_damaged_headers_are_reported(tmp_path, suffix, shape):
    content = npy_content("{'descr': '<f4', 'fortran_order': False, 'shape': " + shape)
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    if suffix == ".npz":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("weight.npy", content)
    with pytest.raises(ValueError, match=f"truncated or not an {suffix[1:]} file"):
        matrices.read(path)


def test_a_shape_of_booleans_is_refused(tmp_path):
    path = tmp_path / "file.npy"
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (True, True)}"
    path.write_bytes(npy_content(header))
    with pytest.raises(ValueError, match="truncated or not an npy file"):
        matrices.read(path)


def test_an_archive_named_npy_is_refused(tmp_path):
    path = save(tmp_path, ".npz", weight=MATRIX).rename(tmp_path / "file.npy")
    with pytest.raises(ValueError, match="should it end in .npz"):
        matrices.read(path)


def test_other_files_in_an_archive_are_ignored(tmp_path):
    path = save(tmp_path, ".npz", weight=MATRIX)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("README.txt", "Weights of a model.")
        archive.mkdir("folder")
    assert matrices.read(path).name == "weight"
    np.testing.assert_array_equal(matrices.read(path, tensor="weight").matrix, MATRIX)
    with pytest.raises(ValueError, match="README.txt is a file in the archive, but no"):
        matrices.read(path, tensor="README.txt")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("README.txt", "Weights of a model.")
    with pytest.raises(ValueError, match="holds no matrix; it holds nothing"):
        matrices.read(path)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [(8, 1, "cannot be read: .*encrypted"), (10, 99, "cannot be read: .*compression")],
)
def test_archives_that_cannot_be_read_are_refused(tmp_path, position, value, message):
    path = save(tmp_path, ".npz", weight=MATRIX)
    content = bytearray(path.read_bytes())
    # The flags and the method stand in the directory and, 2 earlier, in the entry.
    content[content.index(b"PK\x01\x02") + position] = value
    content[position - 2] = value
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        matrices.read(path)


def test_unsuitable_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        matrices.read(tmp_path / "none.npy")
    with pytest.raises(IsADirectoryError, match="folder"):
        matrices.read(tmp_path)
    path = tmp_path / "weights.bin"
    path.touch()
    with pytest.raises(ValueError, match="safetensors"):
        matrices.read(path)
    path = save(tmp_path, ".npy", weight=MATRIX)
    with pytest.raises(ValueError, match="leave out --tensor"):
        matrices.read(path, tensor="weight")


@pytest.mark.parametrize("batch", [(), (2,)])
def test_written_factors_are_read_as_their_product(tmp_path, batch):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(*batch, 3, 2, 4)), rng.normal(size=(*batch, 3, 5, 2))
    path = tmp_path / "factors.safetensors"
    matrices.write_terms(path, a, b, {"note": "a test"})
    source = matrices.read(path)
    assert (source.name, source.a_shape, source.rank) == (None, (2, 4), 3)
    expected = np.array(
        [
            kronecker_sum_reference(left, right)
            for left, right in zip(
                a.reshape(-1, 3, 2, 4), b.reshape(-1, 3, 5, 2), strict=True
            )
        ]
    ).reshape(*batch, 10, 8)
    np.testing.assert_allclose(source.matrix, expected, rtol=1e-12, atol=1e-12)
    part = matrices.read(path, rows=":5", transpose=True)
    np.testing.assert_array_equal(
        part.matrix, np.swapaxes(source.matrix[..., :5, :], -1, -2)
    )
    assert (part.a_shape, part.rank) == (None, None)
    np.testing.assert_array_equal(matrices.read(path, tensor="b").matrix, b)
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "kronjax", "note": "a test"}


def test_a_damaged_file_of_factors_is_refused(tmp_path):
    path = tmp_path / "factors.safetensors"
    marked = {"format": matrices.FORMAT}
    safetensors.numpy.save_file({"a": np.ones((2, 3, 3))}, path, marked)
    with pytest.raises(ValueError, match="no a and b"):
        matrices.read(path)
    a, b = np.ones((2, 3, 3)), np.ones((3, 4, 4))
    safetensors.numpy.save_file({"a": a, "b": b}, path, marked)
    with pytest.raises(ValueError, match="do not belong together"):
        matrices.read(path)


def test_products_larger_than_the_memory_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "factors.safetensors"
    size = 10**6
    a, b = np.ones((1, size, 1), np.float16), np.ones((1, 1, size), np.float16)
    matrices.write_terms(path, a, b, {})
    with pytest.raises(ValueError, match=r"\(1000000, 1000000\): that takes 24,000 GB"):
        matrices.read(path)
    a, b = np.ones((2, 1, 4, 1)), np.ones((2, 1, 1, 4))
    matrices.write_terms(path, a, b, {})
    monkeypatch.setattr(matrices, "physical_memory", lambda: 3 * 8 * 2 * 16)
    assert matrices.read(path).matrix.shape == (2, 4, 4)
    monkeypatch.setattr(matrices, "physical_memory", lambda: 3 * 8 * 2 * 16 - 1)
    with pytest.raises(ValueError, match="multiplies out"):
        matrices.read(path)


def test_names_that_are_not_utf8_become_readable():
    assert atomic.readable(matrices.Path("größe.npy")) == "größe.npy"
    name = atomic.readable(matrices.Path(os.fsdecode(b"gr\xf6\xdfe.npy")))
    assert name == "gr\ufffd\ufffde.npy"


def test_a_full_disk_is_reported_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "out.png"
    path.write_bytes(b"old")

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    message = re.escape(f"cannot write {path}: No space left on device")
    with pytest.raises(OSError, match=message):
        atomic.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_output_is_refused_in_advance(tmp_path):
    good = tmp_path / "out.safetensors"
    atomic.check_output(good, ".safetensors")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="no such folder"):
        atomic.check_output(tmp_path / "none" / good.name, ".safetensors")
    with pytest.raises(ValueError, match="must end in .safetensors"):
        atomic.check_output(tmp_path / "out.npy", ".safetensors")
    good.touch()
    atomic.check_output(good, ".safetensors")
    with pytest.raises(ValueError, match="it is the input"):
        atomic.check_output(good, ".safetensors", source=tmp_path / "." / good.name)
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        atomic.check_output(folder, ".safetensors")


def test_a_folder_without_permission_is_refused_in_advance(tmp_path, monkeypatch):
    def refuse(self, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(matrices.Path, "touch", refuse)
    path = tmp_path / "out.safetensors"
    with pytest.raises(
        PermissionError, match=re.escape(f"cannot write {path}: Permission denied")
    ):
        atomic.check_output(path, ".safetensors")


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"old")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        matrices.write_terms(path, np.ones((1, 2, 2)), np.ones((1, 2, 2)), {})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_heterogeneous_sums_are_read_as_their_product(tmp_path):
    path = tmp_path / "mixed.safetensors"
    rng = np.random.default_rng(5)
    pairs = [
        (rng.normal(size=(r, *a)), rng.normal(size=(r, 6 // a[0], 8 // a[1])))
        for r, a in ((3, (2, 4)), (2, (6, 1)), (1, (3, 2)))
    ]
    matrices.write_terms(path, *pairs[0], {}, pairs[1:])
    source = matrices.read(path)
    dense = sum(kronecker_sum_reference(*pair) for pair in pairs)
    np.testing.assert_allclose(source.matrix, dense, rtol=1e-14, atol=1e-14)
    assert (source.a_shape, source.rank) == ((2, 4), 3)
    assert source.rest == (((6, 1), 2), ((3, 2), 1))
    matrices.write_terms(
        path, *pairs[0], {}, [(np.ones((1, 2, 2)), np.ones((1, 2, 2)))]
    )
    with pytest.raises(ValueError, match="the sums have different shapes"):
        matrices.read(path)
