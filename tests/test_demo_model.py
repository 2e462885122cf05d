import pytest

from kronjax.demo import corpus


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of few words."""
    files = {
        "statistics.py": '"""Means."""\n# A comment of the length that counts here.\n',
        "heapq/__init__.py": '"""Heaps."""\n',
        "heapq/inner.py": '"""More on heaps."""\n',
        "email/message.py": '"""Messages.\n    \n    Indented."""\ndef f(): "Sent."\n',
        "abc.py": "#!/usr/bin/python of a length that comments have to have\nx = 1\n",
        "broken.py": '"""Not closed',
        "null.py": '"""\0"""',
        "latin.py": b'"""Gr\xfc\xdfe."""',
        "test/test_abc.py": '"""A test."""\n',
        "site-packages/other.py": '"""Not of the library."""\n',
        "pydoc_data/topics.py": 'topics = {"if": "The if statement\\n"}\n',
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def test_modules_are_read_in_order_and_those_held_out_apart(library):
    assert list(corpus.documents()) == [
        "Messages.\n\nIndented.\n\n\nSent.",
        "The if statement",
    ]
    assert corpus.training() == "\n\n\n".join(corpus.documents()) + "\n"
    assert corpus.held_out() == (
        "Heaps.\n\n\nMore on heaps.\n\n\n"
        "Means.\n\n\nA comment of the length that counts here.\n"
    )


def test_without_sources_the_error_says_so(library):
    (library / "statistics.py").unlink()
    for read in (corpus.training, corpus.held_out):
        with pytest.raises(FileNotFoundError, match="no sources of its standard"):
            read()


def test_a_comment_inside_a_docstring_is_no_comment():
    example = "# nothing but an example of some length here"
    source = f'def f():\n    """Long:\n\n    {example}\n    """'
    assert list(corpus.passages(source)) == [f"Long:\n\n{example}"]


def test_the_two_parts_of_the_library_are_disjoint():
    held_out, training = corpus.held_out(), corpus.training()
    assert held_out == corpus.held_out()
    assert 0.03 < len(held_out) / (len(held_out) + len(training)) < 0.08
    long = {passage for passage in held_out.split("\n\n\n") if len(passage) > 300}
    assert len(long) > 50
    assert not long & set(training.split("\n\n\n"))
