"""Text that every Python installation has: the documentation in its standard library.

The text consists of the docstrings, the comments, and the chapters of the language
reference that `help()` shows, read by `ast` from the sources of the running Python;
none of it is bundled. Modules are in alphabetical order, so the text depends only on
the version of Python, and on whether parts such as tkinter are installed.

Some modules are held out: whole modules that share few words with others, and that
Python 3.11 to 3.14 have on every system.

>>> is_held_out("statistics"), is_held_out("email.message")
(True, False)
"""

import ast
import inspect
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

HELD_OUT = frozenset(
    [
        "argparse",
        "calendar",
        "configparser",
        "csv",
        "fractions",
        "graphlib",
        "heapq",
        "ipaddress",
        "random",
        "shlex",
        "statistics",
        "tempfile",
        "textwrap",
        "wave",
    ]
)
"""Modules and packages that no model is trained on."""

_SKIPPED = frozenset(
    [
        "__pycache__",
        "dist-packages",
        "ensurepip",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    ]
)

_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_TOPICS = "pydoc_data.topics"
_BETWEEN = "\n\n\n"  # passages
_LEAST = 40  # characters; shorter comments mean little without the code


def training() -> str:
    """Return the text of all modules that are not held out: about 3 million letters.

    Raises:
        FileNotFoundError: If the sources of the standard library are not installed.
    """
    return _joined(documents())


def documents() -> Iterator[str]:
    """Yield the texts that `training` joins, one for each module.

    Raises:
        FileNotFoundError: If the sources of the standard library are not installed.
    """
    root = _library()
    return _read(root, (x for x in _modules(root, root) if not is_held_out(x)))


def held_out() -> str:
    """Return the text of the held-out modules: about a twentieth of the whole.

    Raises:
        FileNotFoundError: If the sources of the standard library are not installed.
    """
    root = _library()
    names = set()
    for name in HELD_OUT:
        names.update(_modules(root, root / name))
        if (root / f"{name}.py").is_file():
            names.add(name)
    return _joined(_read(root, names))


def is_held_out(module: str) -> bool:
    """Return whether a module, such as `json.decoder`, is held out."""
    return module.partition(".")[0] in HELD_OUT


def passages(source: str) -> Iterator[str]:
    """Yield the docstrings and the longer comments of a module, in order.

    Args:
        source: The text of the module.

    Raises:
        SyntaxError: If the source is not valid Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for example about escapes
        tree = ast.parse(source)
    lines = source.splitlines()
    blocks: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (docstring := ast.get_docstring(node)):
            first = node.body[0]
            blocks.append((first.lineno, docstring))
            # A line of a docstring may look like a comment.
            for i in range(first.lineno - 1, first.end_lineno or first.lineno):
                lines[i] = ""
    blocks.extend(_comments(lines))
    for _, passage in sorted(blocks):
        yield "\n".join(line.rstrip() for line in passage.splitlines())


def _comments(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Yield blocks of whole-line comments, and the number of their first line."""
    block: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        line = line.strip()
        if line.startswith("#") and not line.startswith("#!"):
            block.append(line.lstrip("#").removeprefix(" "))
        elif block:
            text = inspect.cleandoc("\n".join(block))
            if len(text) >= _LEAST:
                yield number - len(block), text
            block = []


def _topics(source: str) -> Iterator[str]:
    """Yield the chapters of the language reference, the values of one dictionary."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            values = (getattr(value, "value", None) for value in node.values)
            yield from (value.strip() for value in values if isinstance(value, str))


def _library() -> Path:
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "statistics.py").is_file():
        raise FileNotFoundError(
            f"this Python has no sources of its standard library in {root}; the demo "
            "reads its text from them: run it with another installation of Python"
        )
    return root


def _modules(root: Path, folder: Path) -> Iterator[str]:
    """Yield the names of the modules in a folder, relative to `root`."""
    for path in folder.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if not _SKIPPED & set(parts) and all(part.isidentifier() for part in parts):
            yield ".".join(parts)


def _read(root: Path, names: Iterable[str]) -> Iterator[str]:
    """Yield the texts of modules in order; skip unreadable and empty ones."""
    for name in sorted(names):
        path = root.joinpath(*name.split(".")).with_suffix(".py")
        try:
            with tokenize.open(path) as file:
                source = file.read()
            parts = _topics(source) if name == _TOPICS else passages(source)
            text = _BETWEEN.join(parts)
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue  # damaged or unreadable files are skipped
        if text:
            yield text


def _joined(texts: Iterable[str]) -> str:
    return _BETWEEN.join(texts) + "\n"
