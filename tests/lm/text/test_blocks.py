"""Files of tokens, and the order of blocks."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import SENTENCES
from hypothesis import given
from hypothesis import strategies as st

from kronjax.lm.text import blocks
from kronjax.lm.text.blocks import Blocks
from kronjax.lm.text.documents import stream


@given(st.integers(2, 60), st.integers(1, 8), st.integers(0, 3))
def test_an_epoch_has_every_block_once(size, length, seed):
    tokens = np.arange(size, dtype=np.uint16)
    if size <= length:
        with pytest.raises(ValueError, match="hold no block"):
            Blocks(tokens, length, seed)
        return
    blocks = Blocks(tokens, length, seed)
    epoch = blocks.take(blocks.count, blocks.count)  # the second epoch
    assert epoch.dtype == np.int32 and epoch.shape == (blocks.count, length + 1)
    begins = np.sort(epoch[:, 0])
    assert np.all(np.diff(begins) == length)
    assert np.all(epoch == epoch[:, :1] + np.arange(length + 1))


@given(st.integers(0, 40), st.integers(1, 9))
def test_samples_depend_only_on_the_position(first, count):
    tokens = np.random.default_rng(0).integers(0, 9, 50)
    whole = Blocks(tokens, 4, seed=1).take(0, 60)
    part = Blocks(tokens, 4, seed=1).take(first, count)
    np.testing.assert_array_equal(part, whole[first : first + count])


def test_the_order_differs_by_epoch_and_by_seed():
    tokens = np.arange(101)
    first, second = (Blocks(tokens, 4, 0).take(i * 25, 25)[:, 0] for i in (0, 1))
    other = Blocks(tokens, 4, 1).take(0, 25)[:, 0]
    assert not np.array_equal(first, second) and not np.array_equal(first, other)


def test_held_out_blocks_are_separate_from_training():
    tokens = np.arange(1000)
    training, held_out = blocks.split(tokens, 10, fraction=0.05)
    assert len(held_out) == 5 * 10 + 1
    assert np.array_equal(np.concatenate([training, held_out]), tokens)
    windows = blocks.in_order(held_out, 10, most=3)
    assert windows.shape == (3, 11)
    assert windows[0, 0] == held_out[0] and windows[-1, -1] == held_out[-1]
    assert blocks.split(tokens, 10, fraction=0.0)[1].size == 0
    with pytest.raises(ValueError, match="has 30 tokens.* needs 32"):
        blocks.split(tokens[:30], 15, fraction=0.05)
    with pytest.raises(ValueError, match="must be in"):
        blocks.split(tokens, 10, fraction=1.0)


def write(path, rows):
    if path.suffix == ".txt":
        path.write_text("\n".join(rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path)
    else:
        content = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_texts_become_files_of_tokens(name, tmp_path, tokenizer):
    write(tmp_path / name, SENTENCES)
    tokens = blocks.prepare(tmp_path / name, tokenizer, tmp_path / "tokens")
    documents = ["\n".join(SENTENCES)] if name == "a.txt" else SENTENCES
    expected = [x for row in documents for x in (*tokenizer.encode(row), tokenizer.eos)]
    assert tokens.dtype == np.uint16
    assert isinstance(tokens, np.memmap)
    np.testing.assert_array_equal(tokens, expected)
    (file,) = (tmp_path / "tokens").iterdir()
    written = file.stat().st_mtime_ns
    again = blocks.prepare(tmp_path / name, tokenizer, tmp_path / "tokens")
    assert file.stat().st_mtime_ns == written
    np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_long_texts_are_read_in_pieces_of_whole_paragraphs(name, tmp_path):
    text = "\n\n".join(SENTENCES * 5) + " " + "é" * 300
    if name == "a.txt":
        (tmp_path / name).write_text(text)
    else:
        write(tmp_path / name, [text, " ", text])
    documents = [list(pieces) for pieces in stream(tmp_path / name, size=100)]
    assert len(documents) == (1 if name == "a.txt" else 2)
    for pieces in documents:
        assert "".join(pieces) == text and len(pieces) > 3
        assert all(piece.endswith("\n\n") for piece in pieces[:-1])


def test_an_invalid_byte_is_reported_with_its_position(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffé\n".encode() + b"ab\xff\n")
    with pytest.raises(ValueError, match="byte 8 is 0xff"):
        [list(pieces) for pieces in stream(path)]


def test_an_incomplete_file_of_tokens_is_removed(tmp_path, tokenizer, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    write(tmp_path / "a.txt", SENTENCES)
    folder = tmp_path / "tokens"
    with monkeypatch.context() as patch:
        patch.setattr(blocks.os, "fsync", full)
        with pytest.raises(OSError, match="cannot write .*tokens-.*No space"):
            blocks.prepare(tmp_path / "a.txt", tokenizer, folder)
    assert list(folder.iterdir()) == []
    assert len(blocks.prepare(tmp_path / "a.txt", tokenizer, folder)) > 50


def test_empty_texts_are_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        blocks.prepare(tmp_path / "a.txt", tokenizer, tmp_path / "tokens")
