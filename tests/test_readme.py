"""The commands and names of README exist."""

import functools
import re
import shlex
from pathlib import Path

import pytest

import kronjax
from kronjax import lm, nn
from kronjax.cli.main import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def commands():
    """Every `kronjax ...` line of a block, continuation lines joined."""
    for language, block in BLOCKS:
        for line in [] if language else block.replace("\\\n", " ").split("\n"):
            if line.startswith("kronjax "):
                yield line.partition("#")[0].strip()


@functools.cache
def options(command):
    """The options that the help of a command names."""
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("sys.stdout.write", lambda text: printed.append(text))
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
    assert end.value.code == 0
    return set(re.findall(r"--[a-z][a-z-]*", "".join(printed)))


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_every_command_has_the_options_that_readme_gives_it(line):
    _, command, *words = shlex.split(line)
    given = {word for word in words if word.startswith("--")}
    assert given <= options(command)


def test_every_public_name_in_readme_exists():
    python = "\n".join(block for language, block in BLOCKS if language == "python")
    for package, name in ((kronjax, "kronjax"), (lm, "lm"), (nn, "nn")):
        used = set(re.findall(rf"(?<![\w.]){name}\.([A-Za-z]\w*)", python))
        assert used
        for one in used - {"kronecker", "permute", "linalg"}:
            assert getattr(package, one)


def test_readme_has_the_commands_that_set_up_a_fresh_machine():
    begin = "python3 -m venv .venv && . .venv/bin/activate && "
    assert f"{begin}pip install -e . && kronjax demo\n" in README
    assert f"{begin}pip install -e '.[test]' && pytest\n" in README
