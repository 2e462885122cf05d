"""README and the pages of `docs/`: blocks run, commands parse, names have a page.

Fences are `python`, `sh`, `yaml` or `text`. The blocks of a page run in order, in one
namespace and one temporary folder. A comment before a fence says more:

    <!-- run -->          the kronjax commands of an `sh` block run, too
    <!-- file: NAME -->   a block is written to a file of the folder
    <!-- output -->       a `text` block is what the block before it prints: the words
                          are the same, and numbers are near
    <!-- sketch -->       a block is no program and does not run
    <!-- slow -->         anywhere: the page takes long
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import as_users_run_it

import kronjax
from kronjax import lm, nn
from kronjax.cli import main as command_line

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"(?:<!-- ([^\n]*?) -->\n\n?)?^```(\w*)\n(.*?)^```$", re.M | re.S)
LANGUAGES = {"python", "sh", "yaml", "text"}


class Block(NamedTuple):
    comment: str
    language: str
    code: str


def name_of(path):
    return str(path.relative_to(ROOT))


@functools.cache
def blocks(path):
    return [Block(*groups) for groups in FENCE.findall(path.read_text("utf-8"))]


def shell_lines(block):
    """Return the lines of a block without comments, continuation lines joined."""
    for line in block.code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield line.strip(), words


COMMANDS = [
    pytest.param(words[1:], id=f"{name_of(path)}: {' '.join(words)}"[:110])
    for path in PAGES
    for block in blocks(path)
    if block.language == "sh"
    for _, words in shell_lines(block)
    if words[0] == "kronjax"
]


@pytest.fixture
def parsed(monkeypatch):
    """Replace every command by one of the same options that does nothing."""
    calls = []

    def without_effect(function):
        @functools.wraps(function)
        def command(*args, **kwargs):
            calls.append(function.__name__)
            return 0

        return command

    for module in (
        *("approximate", "compress", "doctor", "factorize", "language", "new"),
        *("report", "train"),
    ):
        module = getattr(command_line, module)
        for name, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__module__", "") == module.__name__:
                monkeypatch.setattr(module, name, without_effect(value))
    monkeypatch.setattr(command_line, "demo", without_effect(command_line.demo))
    return calls


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_is_accepted(words, parsed):
    if words == ["--version"]:
        return
    assert command_line.main(words) == 0
    assert parsed == [words[0]]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_block_says_what_it_is(path):
    text = path.read_text("utf-8")
    assert len(re.findall(r"^```", text, re.M)) == 2 * len(blocks(path))
    assert {block.language for block in blocks(path)} <= LANGUAGES


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_module_that_a_page_runs_exists(path):
    for block in blocks(path):
        for line, _ in shell_lines(block) if block.language == "sh" else ():
            for module in re.findall(r"python -m ([\w.]+)", line):
                assert importlib.util.find_spec(module), line
            for script in re.findall(r"(?:pytest|bash) .*?((?:tests/|\.ci/)\S+)", line):
                assert (ROOT / script).exists(), line


def runs(block):
    return "run" in block.comment.split() or block.language == "python"


def with_blocks():
    for path in PAGES:
        if any(runs(block) for block in blocks(path)):
            slow = "<!-- slow -->" in path.read_text("utf-8")
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(path, id=name_of(path), marks=marks)


@pytest.mark.parametrize("path", list(with_blocks()))
def test_blocks_run_in_order(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    namespace = {"__name__": "__main__"}
    printed = ""
    with as_users_run_it():
        for number, block in enumerate(blocks(path)):
            where = f"{name_of(path)}, block {number}"
            if block.comment.startswith("file: "):
                Path(block.comment.removeprefix("file: ")).write_text(block.code)
            elif block.comment == "output":
                assert_same(block.code, printed, where)
            elif block.comment != "sketch" and runs(block):
                with contextlib.redirect_stdout(io.StringIO()) as stream:
                    if block.language == "python":
                        exec(compile(block.code, where, "exec"), namespace)
                    else:
                        run_commands(block)
                printed = stream.getvalue()


def run_commands(block):
    for line, words in shell_lines(block):
        assert words[0] == "kronjax", line
        assert command_line.main(words[1:]) == 0, line


def assert_same(expected, printed, where):
    """Compare words exactly and numbers roughly; `…` stands for anything."""
    wanted, given = (
        re.sub(r"[─-╿]+", " ", text).replace(",", "").split()
        for text in (expected, printed)
    )
    assert len(wanted) == len(given), f"{where}:\n{printed}"
    for ours, theirs in zip(wanted, given, strict=True):
        same = "…" in ours or ours == theirs or is_near(ours, theirs)
        assert same, f"{where}: {ours!r} is {theirs!r} in\n{printed}"


def is_near(ours, theirs):
    """Compare numbers: within 2 %, or within a unit of the last digit that is shown."""
    ours, theirs = (x.strip("()[];:%+×") for x in (ours, theirs))
    try:
        shown, found = float(ours), float(theirs)
    except ValueError:
        return False
    digits = ours.partition("e")[0].partition(".")[2]
    unit = 0 if "e" in ours else 10.0 ** -len(digits)
    return found == pytest.approx(shown, rel=0.02, abs=unit)


def documented(page):
    text = (DOCS / "interface" / page).read_text("utf-8")
    return re.findall(r"^::: (\S+)$", text, re.M)


@pytest.mark.parametrize("package", [kronjax, lm, nn], ids=lambda x: x.__name__)
def test_the_interface_has_every_public_name_once(package):
    page = package.__name__.rsplit(".", 1)[-1] + ".md"
    names = sorted(f"{package.__name__}.{name}" for name in package.__all__)
    assert sorted(documented(page)) == names


def test_further_names_of_the_interface_exist():
    for name in documented("modules.md"):
        module, _, name = name.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__, name


def test_the_interface_has_every_command_once():
    text = (DOCS / "interface" / "command-line.md").read_text("utf-8")
    shown = re.findall(r"^### kronjax (\S+)\n\n<!-- help: (\S+) -->$", text, re.M)
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        pytest.raises(SystemExit),
    ):
        command_line.main(["--help"])
    usage = re.search(r"\{([\w,]+)\}", printed.getvalue())
    assert usage is not None
    assert sorted(shown) == sorted((name, name) for name in usage[1].split(","))


def test_every_name_after_a_package_exists():
    for path in PAGES:
        code = "\n".join(b.code for b in blocks(path) if b.language == "python")
        for package, name in ((kronjax, "kronjax"), (lm, "lm"), (nn, "nn")):
            used = set(re.findall(rf"(?<![\w./]){name}\.([A-Za-z]\w*)", code))
            for each in used:
                module = f"{package.__name__}.{each}"
                assert hasattr(package, each) or importlib.import_module(module)


def test_readme_has_the_commands_that_set_up_a_fresh_machine():
    readme = (ROOT / "README.md").read_text("utf-8")
    begin = "python3 -m venv .venv && . .venv/bin/activate && "
    assert f"{begin}pip install -e . && kronjax demo\n" in readme
    assert f"{begin}pip install -e '.[test]' && pytest\n" in readme


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_to_files_of_the_repository_exist(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert (path.parent / link).exists(), link


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 160
