"""Hooks of the site: notebooks as pages, formulas as MathML, help texts of commands.

Notebooks are shown with the outputs that they hold; nothing is executed. Formulas turn
into MathML while the site is built, so that no script has to be loaded to draw them.
"""

import base64
import contextlib
import html
import io
import json
import os
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent

COPIES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/README.md": "scripts.md",
    "bench/results/training_study.png": "training_study.png",
}
"""Files of the repository that the site has, too, by the path of their copy."""

FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)
"""A formula as the extension `arithmatex` leaves it."""

OUTSIDE = re.compile(
    r"""<(?!a\s)[^>]*\s(?:src|srcset|href|data)=["']?(?:https?:)?//""", re.IGNORECASE
)
"""A tag, other than a link to follow, that loads something from elsewhere."""

HELP = re.compile(r"^<!-- help: ([\w-]+) -->$", re.MULTILINE)
"""The place of the help text of a command."""

ENTRY = re.compile(r"  ([-A-Z]\S*(?: \S+)*)(?:  +(\S.*))?")
"""The first line of an option in a help text: its name, and the begin of its text."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, its figures, and copies of files."""
    for path, content in generated().items():
        files.append(File.generated(config, path, content=content))
    return files


def generated() -> dict[str, str | bytes]:
    """Return the content of the files that are not below `docs/`, by path."""
    found: dict[str, str | bytes] = {}
    for source, path in COPIES.items():
        found[path] = (ROOT / source).read_bytes()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, figures = notebook(json.loads(path.read_text("utf-8")), path.stem)
        found[f"notebooks/{path.stem}.md"] = text
        found |= {f"notebooks/{name}": content for name, content in figures.items()}
    return found


def on_page_markdown(markdown: str, **_) -> str:
    """Insert the help texts of commands, and turn links into those of the site.

    Pages link to files of the repository, so that they can be read there as well.
    """
    for source, path in COPIES.items():
        markdown = re.sub(rf"\]\((\.\./)?\.\./{source}", rf"](\1{path}", markdown)
    markdown = re.sub(
        r"\]\((\.\./)?\.\./(notebooks/\w+)\.ipynb", r"](\1\2.md", markdown
    )
    return HELP.sub(lambda match: help_of(match[1]), markdown)


def on_page_content(html: str, **_) -> str:
    """Replace formulas by MathML."""
    return FORMULA.sub(_mathml, html)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse pages that load something over the network."""
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        if found := OUTSIDE.search(path.read_text("utf-8")):
            raise PluginError(f"{path.name} loads from elsewhere: {found[0][:80]}")
    for path in sorted(Path(config.site_dir).rglob("*.css")):
        if re.search(r"url\([\"']?(?:https?:)?//", path.read_text("utf-8")):
            raise PluginError(f"{path.name} loads from elsewhere")


def notebook(content: dict, stem: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its figures by name.

    Args:
        content: The notebook, as its JSON says.
        stem: The name of the file, from which the names of figures are made.
    """
    parts: list[str] = []
    figures: dict[str, bytes] = {}
    for cell in content["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{stem}_{len(figures) + 1}.png"
                figures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![Figure {len(figures)} of the notebook]({name})")
            elif "text/markdown" in data:
                parts.append("".join(data["text/markdown"]))
            else:
                text = "".join(data.get("text/plain", output.get("text", "")))
                parts.append(f"```text\n{text.rstrip()}\n```")
    download = f"*`notebooks/{stem}.ipynb` in the repository, as it ran.*"
    first, *rest = parts
    return "\n\n".join([first, download, *rest]), figures


def help_of(command: str) -> str:
    """Return the help text of a command as Markdown: its usage, its text, its options.

    Args:
        command: Name of the command.
    """
    from kronjax.cli.main import main

    printed = io.StringIO()
    width, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "88"
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([command, "--help"])
    finally:
        os.environ.pop("COLUMNS") if width is None else os.environ.update(COLUMNS=width)
    usage, *rest = printed.getvalue().strip().split("\n\n")
    text = [x for x in rest if not x.startswith(" ")]
    rows: list[list[str]] = []
    for line in "\n".join(x for x in rest if x.startswith(" ")).splitlines():
        if match := ENTRY.fullmatch(line):
            rows.append([match[1], match[2] or ""])
        elif line.startswith("   ") and rows:
            rows[-1][1] += f" {line.strip()}"
    options = []
    for name, words in rows:
        if not name.startswith("-h"):
            words = re.sub(r"([*_<])", r"\\\1", words.strip())
            options.append(f"`{name}`\n:   {words}")
    head = f"```text\n{usage.removeprefix('usage: ')}\n```"
    return "\n\n".join([*text, head, *options])


def _mathml(match: re.Match[str]) -> str:
    formula = html.unescape(match[2]).strip()
    if match[1] == "span":
        return convert(formula)
    return f'<div class="formula">{convert(formula, display="block")}</div>'
