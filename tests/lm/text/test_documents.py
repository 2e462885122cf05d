"""Reading text: joining of rows, and messages for damaged files."""

import gzip
import hashlib
import json
import sys
import types

import pytest

from kronjax.lm.text import documents

LINES = " \n = Title = \n \n First line . \n Second line , with a \u2028 in it . \n"

# Without the time, which would give parallel workers different names of tests.
ZIPPED = gzip.compress(b"{}" * 99, mtime=0)


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_a_text_file_is_not_changed(write):
    text = documents.read_text(write("a.txt", LINES))
    assert text.text == LINES and text.join == "none"
    assert text.rows == (
        " = Title = ",
        " First line . ",
        " Second line , with a \u2028 in it . ",
    )
    assert text.sha256 == hashlib.sha256(LINES.encode()).hexdigest()


def test_blank_lines_are_joined_as_for_the_published_figures(write):
    text = documents.read_text(write("wiki.test.raw", LINES), join="blank-lines")
    # As `datasets` yields rows: a blank line is empty, other lines keep the newline.
    rows = ["" if not line.strip() else line + "\n" for line in LINES.split("\n")[:-1]]
    assert list(text.rows) == rows
    assert text.text == "\n\n".join(rows)
    assert text.text.startswith("\n\n = Title = \n\n\n\n\n First line")


def test_line_ends_and_byte_order_marks_of_other_systems_are_accepted(write):
    path = write("a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")
    assert documents.read_text(path, join="blank-lines").rows == ("one\n", "", "two\n")
    assert documents.read_text(path).text == "one\r\n\r\ntwo\r\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("join", ["none", "blank-lines"])
def test_rows_are_joined_by_blank_lines(write, tmp_path, name, join):
    rows = ["One\nmore.", "", "Two \u2028 \u00e9."]
    path = tmp_path / name
    if name == "a.parquet":
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"n": [1, 2, 3], "page": rows}), path)
    else:
        lines = "\n".join(json.dumps({"page": row}, ensure_ascii=False) for row in rows)
        content = f"{lines}\n\n".encode()
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    text = documents.read_text(path, column="page", join=join)
    assert list(text.rows) == rows and text.text == "\n\n".join(rows)
    assert text.source == str(path)
    with pytest.raises(ValueError, match=r"'text'.*there are.*page"):
        documents.read_text(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "a.txt is empty"),
        ("a.txt", " \n\n", "a.txt is empty"),
        ("a.txt", b"good, then \xff", "not UTF-8: byte 11 is 0xff"),
        ("a.jsonl", '{"text": "one"}\n{"txt": "two"}', "row 2: no field 'text'"),
        ("a.jsonl", '{"text": "one"}\n["two"]', "row 2: no field 'text'"),
        ("a.jsonl", '{"text": 3}', "row 1: 'text' is 3, not a string"),
        ("a.jsonl", '{"text": "one"}\n{"text": "tw', "row 2: not JSON"),
        ("a.jsonl", '{"text": "\\ud83d"}', "row 1: 'text' is not Unicode"),
        (
            "a.jsonl.gz",
            ZIPPED[:-9],
            "truncated or not a gzip",
        ),
        ("a.jsonl.gz", b"plain", "truncated or not a gzip"),
        ("a.parquet", b"PAR1 and no more", "truncated or not a Parquet"),
    ],
)
def test_damaged_files_are_refused(write, name, content, message):
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=message):
        documents.read_text(write(name, content))


def test_a_truncated_parquet_file_is_refused(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": ["one", None]}), path)
    with pytest.raises(ValueError, match="row 2: 'text' is None"):
        documents.read_text(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="truncated"):
        documents.read_text(path)


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file.*dataset:OWNER/NAME"):
        documents.read_text("wikitext")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        documents.read_text(tmp_path)
    with pytest.raises(ValueError, match="write none or blank-lines"):
        documents.read_text("wikitext", join="lines")


@pytest.mark.parametrize(
    ("library", "name"), [("pyarrow", "a.parquet"), ("datasets", "dataset:a/b:test")]
)
def test_a_missing_library_is_reported_with_its_extra(
    write, monkeypatch, library, name, tmp_path
):
    monkeypatch.setitem(sys.modules, library, None)
    write("a.parquet", b"")
    source = tmp_path / name if name.endswith("parquet") else name
    with pytest.raises(ImportError, match=rf"{library}: pip install 'kronjax\[data\]'"):
        documents.read_text(source)


def test_datasets_are_loaded_by_name(monkeypatch):
    class Rows(dict):
        column_names = ("text", "label")

    def load_dataset(*path, split):
        if path == ("away/gone",):
            raise ConnectionError("no network")
        assert path in (("owner/name",), ("owner/name", "config"))
        return Rows(text=["one\n", "", f"{split}\n"])

    library = types.ModuleType("datasets")
    library.__dict__["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", library)
    for name in ("dataset:owner/name:test", "dataset:owner/name:config:test"):
        text = documents.read_text(name)
        assert text.text == "one\n\n\n\n\ntest\n" and text.source == name
    with pytest.raises(ValueError, match=r"no column 'page'; there are text, label"):
        documents.read_text("dataset:owner/name:test", column="page")
    with pytest.raises(ValueError, match=r"no network\); without a network, give"):
        documents.read_text("dataset:away/gone:test")
    for name in ("dataset:owner/name", "dataset::test", "dataset:a:b:c:d"):
        with pytest.raises(ValueError, match="not the name of a dataset; write"):
            documents.read_text(name)
